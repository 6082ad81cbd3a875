"""Every command that the documents show: it parses, and it plans."""

import json
import re
import shlex
from pathlib import Path

import pytest

from oneb.cli import bench, data, launch, prepare, report, sample
from oneb.cli.options import config_from_args
from oneb.config import VARIANTS
from oneb.planner import make_plan
from oneb.presets import resolve

ROOT = Path(__file__).parents[1]
DOCUMENTS = [path for path in (ROOT / "README.md", ROOT / "docs/LAUNCH_1B.md", ROOT.parent / "shared/spec/LAUNCH_1B.md")
             if path.exists()]
# Commands of other programs, which only have to be on this list.
FOREIGN = (r"git clone \S+$", r"cd \w+$", r"wandb login$", r"wandb sync ", r"pip install |python3? -m pip install ")


def commands(path: Path) -> list[str]:
    """The commands in a document's bash blocks, in order, without comments; a notebook's too (``!`` and ``%``)."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL):
        for line in re.sub(r"\\+\n\s*", " ", block).splitlines():
            # An option that is commented out in a notebook is a command too.
            line = re.sub(r"^#(?=!)", "", line.strip())
            if line and not line.startswith("#"):
                found.append(re.sub(r"^pythono?(?= )", "python3", line.lstrip("!%")))
    return found


COMMANDS = [pytest.param(command, id=f"{path.parent.name}/{path.name}: {command}")
            for path in DOCUMENTS for command in commands(path)]


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """An empty folder, but for the checkpoint that the guide resumes from."""
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/oneb_decoupled_decoupled_seed1337"
    run.mkdir(parents=True)
    (run / "last.pt").write_bytes(b"")
    (run / "last.pt.json").write_text(json.dumps({
        "step": 500, "tokens": 1, "sha256": "", "bytes": 0, "best_val_loss": 3.0, "model": vars(resolve({}).model)}))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_works(command, capsys):
    words = shlex.split(command, comments=True)
    if any(re.match(pattern, command) for pattern in FOREIGN):
        for word in words:
            assert not word.endswith(".txt") or (ROOT / word).is_file(), word
        return
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        return
    assert words.pop(0) in ("python3", "python")
    program = " ".join(words[:3]) if words[0] == "-m" else words[0]
    if program == "run_1b_launch.py":
        options = [word for word in words[1:] if word != "--run"]
        assert launch.main(options) == 0
        output = capsys.readouterr()
        assert output.err == ""
        assert "[plan] global_batch=" in output.out
    elif program == "prepare_fineweb.py":
        assert prepare.build_parser().parse_args(words[1:]).output
    elif program == "-m oneb sample":
        assert sample.build_parser().parse_args(words[3:]).ckpt
    elif program == "-m oneb data":
        assert data.build_parser().parse_args(words[3:]).path
    elif program == "-m oneb report":
        assert report.build_parser().parse_args(words[3:]).run_dir
    elif program == "-m oneb bench":
        assert bench.build_parser().parse_args(words[3:]).out
    else:
        pytest.fail(f"nothing here knows how to check {program!r}")


@pytest.mark.parametrize("path", DOCUMENTS, ids=str)
def test_a_document_shows_commands(path):
    assert len(commands(path)) > 1


def test_the_guide_covers_every_command_of_the_contract():
    contract = ROOT.parent / "shared/spec/LAUNCH_1B.md"
    if not contract.exists():
        pytest.skip("the contract is not beside this checkout")
    ours = {command for command in commands(ROOT / "docs/LAUNCH_1B.md") if "run_1b_launch" in command}
    theirs = {command for command in commands(contract) if "run_1b_launch" in command}
    assert theirs - ours == set()


def plan_of(*words: str):
    return make_plan(config_from_args(launch.build_parser().parse_args(words)))


def test_the_variants_table_is_what_the_planner_counts():
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([\d.]+)B \| ([\d,]+) bytes \|", (ROOT / "README.md").read_text(), re.M)
    assert {variant for variant, _, _ in rows} == set(VARIANTS)
    for variant, billions, kv_bytes in rows:
        plan = plan_of("--variant", variant)
        assert (f"{plan.parameters / 1e9:.2f}", f"{plan.kv_bytes_per_token:,}") == (billions, kv_bytes)


@pytest.mark.parametrize("path", [ROOT / "README.md", *(ROOT / "docs").glob("*.md")], ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(path):
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        if target.startswith("http"):
            continue
        name, _, heading = target.partition("#")
        file = path.parent / name if name else path
        assert file.is_file(), target
        headings = re.findall(r"^#+ (.*)$", file.read_text(), re.M) if heading else []
        assert not heading or heading in {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}, target


def test_even_sizes_of_the_guide_are_even():
    sizes = []
    for command in commands(ROOT / "docs/LAUNCH_1B.md"):
        if "--tag even" in command:
            sizes.append(plan_of(*[word for word in shlex.split(command)[2:] if word != "--run"]).parameters)
    assert len(sizes) == 3
    assert max(sizes) / min(sizes) < 1.001
