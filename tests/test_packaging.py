"""What gets installed, and that torch, where there is one, is never touched.

The set-up script runs for real, with pip, on wheels made here: no network.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from oneb.cli.options import add_config_options, config_from_args
from oneb.planner import make_plan

ROOT = Path(__file__).parents[1]
BASE_PYTHON = sys._base_executable  # of the environment that runs the tests
TOOLS = ("bash", "dirname", "rm", "tail", "mktemp", "id", "sleep", "env")


# -- The dependency closure -----------------------------------------------------------------------

def requirements(name: str) -> list[Requirement]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines())
    return [Requirement(line) for line in lines if line]


def plain(name: str) -> str:
    """A distribution's name as packaging compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_torch_or_cuda(name: str) -> bool:
    return plain(name).startswith(("torch", "nvidia-", "triton", "cuda-"))


def test_the_installed_closure_of_the_requirements_is_torch_free():
    closure: dict[str, str] = {}
    waiting = [(requirement, "requirements_runtime.txt") for requirement in requirements("requirements_runtime.txt")]
    while waiting:
        requirement, wanted_by = waiting.pop()
        key = f"{plain(requirement.name)}[{','.join(sorted(requirement.extras))}]"
        if key in closure:
            continue
        closure[key] = wanted_by
        for text in importlib.metadata.requires(requirement.name) or ():
            needed = Requirement(text)
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra})
                                            for extra in (requirement.extras or {""})):
                waiting.append((needed, requirement.name))
    assert len(closure) > len(requirements("requirements_runtime.txt"))
    assert {name: by for name, by in closure.items() if is_torch_or_cuda(name)} == {}


@pytest.mark.slow
def test_the_requirements_resolve_without_torch_in_an_empty_environment(tmp_path):
    """What pip would install on a bare machine, of the newest versions that there are today."""
    subprocess.run([BASE_PYTHON, "-m", "venv", tmp_path / "empty"], check=True)
    done = subprocess.run(
        [tmp_path / "empty/bin/python", "-m", "pip", "install", "--dry-run", "--quiet", "--report",
         tmp_path / "report.json", "-r", ROOT / "requirements_runtime.txt"], capture_output=True, text=True)
    if done.returncode and re.search("connection|resolution|timed out", done.stderr, re.IGNORECASE):
        pytest.skip("no package index")
    assert done.returncode == 0, done.stderr
    names = [item["metadata"]["name"] for item in json.loads((tmp_path / "report.json").read_text())["install"]]
    assert "numpy" in names
    assert [name for name in names if is_torch_or_cuda(name)] == []


def test_the_oneb_command_leads_somewhere():
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["oneb"].partition(":")
    assert callable(getattr(importlib.import_module(module), function))


# -- The set-up script ----------------------------------------------------------------------------

def write_wheel(folder: Path, name: str, version: str, code: str = "", requires: tuple[str, ...] = ()) -> None:
    """A wheel as small as one can be: one module, its metadata."""
    folder.mkdir(exist_ok=True)
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", code)
        needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")


def write_torch(folder: Path, version: str) -> None:
    write_wheel(folder, "torch", version, f"__version__ = '{version}'\nclass cuda:\n    is_available = lambda: False\n")


class Machine:
    """A checkout with requirements of its own, and a PATH with nothing on it but a few tools and ``python3``."""

    def __init__(self, folder: Path, python3: str) -> None:
        self.checkout, self.wheels, bin_folder = folder / "checkout", folder / "wheels", folder / "bin"
        shutil.copytree(ROOT / "scripts", self.checkout / "scripts")
        bin_folder.mkdir()
        for tool in TOOLS:
            (bin_folder / tool).symlink_to(shutil.which(tool))
        (bin_folder / "python3").write_text(f"#!{shutil.which('bash')}\n{python3}\n")
        (bin_folder / "python3").chmod(0o755)
        write_wheel(self.wheels, "small", "1.0")
        write_torch(self.wheels, "2.0")
        write_torch(self.wheels, "9.0")
        self.require("small>=1")
        self.environment = {"PATH": str(bin_folder), "HOME": str(folder), "PIP_NO_INDEX": "1",
                            "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull,
                            "ONEB_TORCH": "torch==2.0"}

    def require(self, *lines: str) -> None:
        (self.checkout / "requirements_runtime.txt").write_text("# needed\n" + "\n".join(lines) + "\n")

    def set_up(self, **environment: str) -> subprocess.CompletedProcess:
        script = ('set -euo pipefail; source scripts/setup_env.sh; setup_env requirements_runtime.txt; '
                  'echo "PYTHON=$PYTHON TORCH=$TORCH_VERSION CUDA=$HAS_CUDA"')
        return subprocess.run(["bash", "-c", script], cwd=self.checkout, env=self.environment | environment,
                              capture_output=True, text=True, timeout=600)


def version_in(python: Path, name: str) -> str:
    program = f"import importlib.metadata; print(importlib.metadata.version('{name}'))"
    return subprocess.run([python, "-c", program], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def active(tmp_path):
    """A machine whose ``python3`` is that of an environment of its own, with pip and nothing else."""
    subprocess.run([BASE_PYTHON, "-m", "venv", tmp_path / "env"], check=True)
    return Machine(tmp_path, f'exec "{tmp_path}/env/bin/python" "$@"'), tmp_path / "env/bin/python"


def test_set_up_in_an_active_environment(active):
    machine, python = active
    first = machine.set_up()
    assert first.returncode == 0, first.stderr
    assert "TORCH=2.0 CUDA=0" in first.stdout
    assert not (machine.checkout / ".venv").exists()
    assert version_in(python, "small") == "1.0"
    assert version_in(python, "torch") == "2.0"

    # The second time nothing is installed: there is nowhere to install from.
    second = machine.set_up(PIP_FIND_LINKS="/nowhere", ONEB_TORCH="torch==9.0")
    assert second.returncode == 0, second.stderr
    assert second.stdout.splitlines() == first.stdout.splitlines()[-1:]

    # A package that wants another torch does not get it, and pip's words are shown.
    write_wheel(machine.wheels, "greedy", "1.0", requires=("torch>=9",))
    machine.require("small>=1", "greedy")
    refused = machine.set_up()
    assert refused.returncode == 1
    assert "torch==2.0" in refused.stderr
    assert "greedy" in refused.stderr
    assert version_in(python, "torch") == "2.0"

    # One that will do with this torch leaves it alone, though there is a newer one.
    write_wheel(machine.wheels, "modest", "1.0", requires=("torch>=1",))
    machine.require("small>=1", "modest")
    assert machine.set_up().returncode == 0
    assert version_in(python, "modest") == "1.0"
    assert version_in(python, "torch") == "2.0"

    # A torch that is there but broken is the user's to repair.
    (module,) = python.parents[1].glob("lib/python*/site-packages/torch.py")
    module.write_text("raise ImportError('libcudart.so is missing')")
    broken = machine.set_up()
    assert broken.returncode == 1
    assert "libcudart.so is missing" in broken.stderr
    assert "never replaces it" in broken.stderr


def check_venv(machine: Machine) -> None:
    done = machine.set_up()
    assert done.returncode == 0, done.stderr
    venv = machine.checkout / ".venv"
    assert f"PYTHON={venv}/bin/python" in done.stdout
    # A CUDA build of torch that the machine came with stays visible.
    assert "include-system-site-packages = true" in (venv / "pyvenv.cfg").read_text()
    assert version_in(venv / "bin/python", "small") == "1.0"
    (installed,) = venv.glob("lib/python*/site-packages/small.py")
    assert installed.is_file()


def test_set_up_makes_an_environment_that_sees_the_systems_packages(tmp_path):
    check_venv(Machine(tmp_path, f'exec "{BASE_PYTHON}" "$@"'))


def test_set_up_without_ensurepip_uses_the_systems_pip(tmp_path):
    """As on Debian without python3-venv, and on Colab."""
    if subprocess.run([BASE_PYTHON, "-m", "pip", "--version"], capture_output=True).returncode:
        pytest.skip("the system's Python has no pip")
    check_venv(Machine(tmp_path, f'[[ "$*" == "-m venv"* && "$*" != *--without-pip* ]] && exit 1\n'
                                 f'exec "{BASE_PYTHON}" "$@"'))


@pytest.mark.parametrize(("python3", "said"), [
    ('[[ $1 == --version ]] && echo Python 3.8.10; exit 1', ["Python 3.8.10 is too old", "3.10", "apt-get install"]),
    (f'[[ "$*" == "-m venv"* || "$*" == "-m pip"* ]] && exit 1; exec "{BASE_PYTHON}" "$@"',
     ["no virtual environment", "apt-get install python3-venv"]),
], ids=["too old", "no venv, no pip"])
def test_set_up_that_cannot_work_says_what_to_install(tmp_path, python3, said):
    machine = Machine(tmp_path, python3)
    done = machine.set_up()
    assert done.returncode == 1
    assert not [part for part in said if part not in done.stderr]
    assert not (machine.checkout / ".venv").exists()


def test_set_up_without_any_python(tmp_path):
    machine = Machine(tmp_path, "")
    (tmp_path / "bin/python3").unlink()
    done = machine.set_up()
    assert done.returncode == 1
    assert "no python3 here" in done.stderr


# -- The quickstart -------------------------------------------------------------------------------

def test_the_quickstart_trains_samples_and_says_what_is_next(tmp_path):
    """The whole script, for a few steps."""
    if sys.prefix == sys.base_prefix:
        pytest.skip("outside an environment the quickstart would make one")
    environment = os.environ | {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    runs = tmp_path / "my runs"
    done = subprocess.run(
        ["bash", ROOT / "quickstart.sh", "--steps", "6", "--eval-iters", "1", "--warmup-steps", "2", "--device", "cpu",
         "--train-seq-len", "32", "--run-root", runs], capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    (run,) = runs.iterdir()
    assert (run / "last.pt").is_file()
    assert f"== Done. The run is in {run}" in done.stdout
    assert "\ndef " in done.stdout
    (next_line,) = re.findall(r"^ *(\S*python\S*) run_1b_launch.py (.*) --run$", done.stdout.split("== Done.")[1], re.M)
    assert Path(next_line[0]).exists() or shutil.which(next_line[0])

    refused = subprocess.run(["bash", ROOT / "quickstart.sh", "--steps", "0"], capture_output=True, text=True,
                             timeout=600, env=environment)
    assert refused.returncode == 2
    assert "--steps 0" in refused.stderr


@pytest.mark.parametrize(("options", "million"), [("NANO", 0.7), ("BILLION", 933)])
def test_what_the_quickstart_asks_for_is_valid(options, million):
    script = f'source <(sed -n "/^NANO=/,/^DATA=/p" quickstart.sh); printf "%s\\0" "${{{options}[@]}}"'
    words = subprocess.run(["bash", "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    parser = argparse.ArgumentParser()
    add_config_options(parser)
    plan = make_plan(config_from_args(parser.parse_args(words.split("\0")[:-1])))
    assert plan.parameters / 1e6 == pytest.approx(million, rel=0.05)
