"""oneb plan: GPUs and variants side by side."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from oneb.cli.plan import main, parse_price
from oneb.errors import OnebError
from oneb.gpus import GPUS, get_gpu
from oneb.planner import fit_to, make_plan
from oneb.presets import resolve
from oneb.units import format_duration

ROOT = Path(__file__).parents[1]


def compared(capsys, *words: str) -> str:
    assert main(words) == 0
    return capsys.readouterr().out


def rows(output: str) -> list[list[str]]:
    """The cells of the table, the marks at its left included, without its heading."""
    lines = output.splitlines()
    start = next(number for number, line in enumerate(lines) if line.split()[:1] == ["gpu"])
    return [re.split(r"\s{2,}", line.strip()) for line in lines[start + 1:lines.index("", start)]]


def expected(gpu: str, price: float | None = None, **options):
    config, card = resolve(options), get_gpu(gpu)
    return make_plan(config, gpu=card, fit=fit_to(config, card, card.usable_bytes), price=price)


def test_cards_are_sorted_by_what_the_run_costs(capsys):
    output = compared(capsys)
    found = [row if row[0] not in ("$", ">", "$>") else row[1:] for row in rows(output)]
    costs = [float(row[-1].lstrip("~$").replace(",", "")) for row in found]
    assert costs == sorted(costs)
    priced = {gpu.key for gpu in GPUS if gpu.price_per_hour is not None}
    assert {row[0] for row in found} <= priced
    for row in found[:3]:
        assert float(row[-1].lstrip("~$")) == pytest.approx(expected(row[0]).dollars, abs=0.006)
    # A card that is left out of the table is said not to work.
    for key in priced - {row[0] for row in found}:
        assert f"  {key}: needs " in output


def test_prices_of_the_user_win_and_the_others_are_dated(capsys):
    output = compared(capsys, "--gpus", "h100", "h200", "--price", "h100=2.49")
    h100, h200 = (next(row for row in rows(output) if key in row) for key in ("h100", "h200"))
    assert h100[-1] == f"${expected('h100', 2.49).dollars:.2f}"
    assert h200[-1] == f"~${expected('h200').dollars:.2f}"
    assert f"{get_gpu('h200').price_source}: h200 ${get_gpu('h200').price_per_hour:.2f}" in output
    assert get_gpu("h100").price_source not in output
    every = compared(capsys, "--gpus", "h100", "h200", "--price", "1.5")
    assert "~$" not in every
    assert "approximate" not in every


def test_speeds_are_marked_where_nobody_measured_them(capsys):
    output = compared(capsys, "--gpus", "h100", "h200")
    estimated = {key: cell.startswith("~") for row in rows(output) for key in row if key in ("h100", "h200")
                 for cell in row if cell.endswith("K")}
    assert estimated == {"h100": True, "h200": False}
    assert "only on h200 was it" in output
    assert "data sheet" not in compared(capsys, "--gpus", "h200")


def test_cheapest_and_fastest_are_marked(capsys):
    output = compared(capsys, "--gpus", "h100", "b200", "4090", "--price", "b200=20", "4090=0.1", "h100=3")
    marked = {row[0]: row[1] for row in rows(output) if row[0] in ("$", ">")}
    assert marked == {"$": "4090", ">": "b200"}
    assert "$ cheapest: 4090, decoupled: " in output
    assert "> fastest: b200, decoupled: " in output
    both = compared(capsys, "--gpus", "h100", "4090", "--price", "4090=10", "h100=3")
    assert rows(both)[0][:2] == ["$>", "h100"]


def test_variants_are_compared_too(capsys):
    output = compared(capsys, "--gpus", "h100", "--variants", "baseline", "decoupled", "--train-seq-len", "2048")
    assert {tuple(cell for cell in row if cell in ("baseline", "decoupled"))
            for row in rows(output)} == {("baseline",), ("decoupled",)}
    assert "variant" not in compared(capsys, "--gpus", "h100", "--variant", "baseline").splitlines()[2]


def test_what_is_not_possible_is_listed_with_the_reason(capsys):
    output = compared(capsys, "--gpus", "h100", "3090", "4060", "--variant", "baseline", "--precision", "fp8",
                      "--train-seq-len", "2048", "--optimizer", "adamw")
    assert "  3090: has no fp8" in output
    assert re.search(r"  4060: needs [\d.]+ GiB of 7\.6 GiB", output)
    assert [row[1] for row in rows(output)] == ["h100"]
    nothing = compared(capsys, "--gpus", "3090", "--precision", "fp8")
    assert "3090: has no fp8" in nothing


def test_a_budget_compares_how_far_it_goes(capsys):
    output = compared(capsys, "--gpus", "h100", "4090", "a10", "--budget", "40.2", "--price", "h100=2", "4090=0.5")
    tokens = [row[-1] for row in rows(output)]
    assert len(tokens) == 2
    amounts = [float(text[:-1]) * {"M": 1e6, "B": 1e9}[text[-1]] for text in tokens]
    assert amounts == sorted(amounts, reverse=True)
    assert [row[-2] for row in rows(output)] == [  # all of the time that is paid for
        format_duration(40.2 / {"h100": 2, "4090": 0.5}[row[0]] * 3600) for row in rows(output)]
    assert re.search(r"a10: .*no price of a10", output)


@pytest.mark.parametrize("words", [
    (), ("--gpus", "4060ti-16", "a6000-ada", "h100", "--variants", "bottleneck", "decoupled", "--target-tokens", "50B",
         "--batch-size", "1", "--grad-accum", "256", "--price", "0.4"),
    ("--budget", "4000", "--batch-tokens", "512K", "--variants", "baseline", "bottleneck"),
    ("--variants", "baseline", "gqa", "gqa_kv2", "--gpus", "3090", "4060", "--precision", "fp8"),
])
def test_the_screen_fits_80_columns(capsys, words):
    lines = compared(capsys, *words).splitlines()
    assert max(map(len, lines)) <= 80, max(lines, key=len)


def test_json_holds_the_plans(capsys, tmp_path):
    file = tmp_path / "plans.json"
    compared(capsys, "--gpus", "h100", "3090", "--precision", "fp8", "--steps", "50", "--json", str(file))
    entries = {entry["gpu"]: entry for entry in json.loads(file.read_text())}
    assert entries["3090"]["plan"] is None
    assert entries["3090"]["why_not"] == "has no fp8"
    plan = entries["h100"]["plan"]
    assert plan["steps"] == 50
    assert plan["dollars"] == expected("h100", precision="fp8", steps=50).dollars


@pytest.mark.parametrize(("words", "said"), [
    (("--gpus", "h1000"), "Did you mean h100"), (("--variants", "baseline", "--variant", "gqa"), "give one of them"),
    (("--device", "cpu"), "oneb plan compares GPUs"), (("--budget", "4", "--steps", "4"), "both set"),
    (("--lr", "-1"), "above 0"), (("--gpus", "h100", "--steps", "5", "--target-tokens", "1B"), "give one of them"),
])
def test_mistakes(capsys, words, said):
    assert main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("text", "price"), [
    ("h100=2.49", ("h100", 2.49)), ("rtx4090=.35", ("4090", 0.35)), ("2", (None, 2.0)),
    ("A100-80GB=0", ("a100-80", 0.0)),
])
def test_prices_as_people_write_them(text, price):
    assert parse_price(text) == price


@pytest.mark.parametrize("text", ["h100=", "=2", "h100=-1", "nan", "inf", "cheap", "h1000=2", "h100:2"])
def test_what_is_no_price(text):
    with pytest.raises(OnebError):
        parse_price(text)


def test_it_needs_no_torch(tmp_path):
    for name in ("torch", "numpy"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name} was imported')\n")
    done = subprocess.run([sys.executable, "-m", "oneb", "plan", "--gpus", "h100"], cwd=ROOT, capture_output=True,
                          text=True, timeout=60, env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")
    assert "h100" in done.stdout
