"""What oneb bench works out without a GPU: its points, its tables and plots."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from oneb.bench import results
from oneb.bench.points import Point, Settings, configuration, grid
from oneb.cli import bench
from oneb.config import device_defaults
from oneb.errors import OnebError
from oneb.gpus import get_gpu
from oneb.inspect import growth
from oneb.roofline import gemms, predict, table_ceilings

RESULTS = Path(__file__).parents[1] / "bench/results"


def configured(variant, seq_len=2048, batch_size=8, batch_tokens=65536, precision="bf16", **given):
    settings = Settings(data="x.npy", batch_tokens=batch_tokens, given=given)
    return configuration(Point(variant, seq_len, precision, batch_size), settings, "runs")


def test_the_grid_is_every_combination_once():
    points = grid(["a", "b", "a"], [16, 32], ["bf16"], [None, 4])
    assert len(points) == len(set(points)) == 8
    assert points[0] == Point("a", 16, "bf16", None)


def test_a_point_decides_its_run():
    config = configured("gqa", 8192, 4, optimizer="adamw")
    assert config.train.phases == ((0, 8192),)
    assert config.train.sequences(8192) * 8192 == 65536
    assert config.model.max_seq_len == 8192
    assert config.optim.optimizer == "adamw"
    assert (config.train.eval_every, config.run.save_every) == (0, 0)


@given(seq_len=st.integers(16, 5000), batch_size=st.none() | st.integers(1, 40), batch_tokens=st.integers(16, 300_000))
def test_a_step_has_the_tokens_asked_for_in_whole_micro_batches(seq_len, batch_size, batch_tokens):
    train = configured("decoupled", seq_len, batch_size, batch_tokens).train
    assert train.batch_size == batch_size  # left open where the point leaves it open
    sequences, whole = train.sequences(seq_len), batch_size or 1
    assert sequences % whole == 0
    # One micro-batch more would be too many; a step is never without one.
    assert sequences * seq_len <= batch_tokens or sequences == whole
    assert (sequences + whole) * seq_len > batch_tokens


# ---- tables and plots

def synthetic_row(variant, seq_len, precision="bf16", batch_size=None, **more):
    config = configured(variant, seq_len, batch_size or 4, precision=precision)
    config = dataclasses.replace(config, train=device_defaults(config.train, "cuda"))
    eight_bit = precision == "fp8"
    ceilings = table_ceilings(get_gpu("h200"), gemms(config.model, (batch_size or 4) * seq_len, eight_bit))
    predicted = predict(config, seq_len, ceilings, batch_size=batch_size or 4, grad_accum=config.train.grad_accum,
                        recomputed_layers=0, eight_bit=eight_bit)
    return {**Point(variant, seq_len, precision, batch_size).to_row(), "batch_size": batch_size or 4, "error": None,
            "tokens_per_step": 65536, "tok_s": 0.8 * predicted["tok_s"], "step_ms": 900.0, "predicted": predicted,
            "parameters": 1.2e9, "null_attn": False, "breakdown": None, "expected_tok_s": 0.9 * predicted["tok_s"],
            **more}


def test_results_come_back_as_they_were_saved_and_tables_show_them(tmp_path):
    shares = dict.fromkeys(results.CLASSES, 0.1) | {"gemm": 0.2}
    rows = [
        synthetic_row("baseline", 2048, breakdown={"share": shares, "largest_unknown": {"name": "odd", "ms": 1.25}}),
        {**Point("gqa", 512, "fp8", 4).to_row(), "error": "out of memory"},
    ]
    path = tmp_path / "deep" / "r.json"
    results.save(path, rows, command="oneb bench", commit="abc", gpu="H200")
    record = results.load(path)
    assert record["rows"] == rows
    assert (record["command"], record["commit"], record["gpu"]) == ("oneb bench", "abc", "H200")
    text = results.report(record["rows"])
    header, line = text.splitlines()[:2]
    assert len(header) == len(line)
    assert "20.0" in line
    assert [f"{rows[0][key]:,.0f}" for key in ("tok_s", "expected_tok_s")] == line.split()[5:7]
    assert header.split()[5:9] == ["tok/s", "expected", "roofline", "ms/step"]
    assert f"{rows[0]['predicted']['tok_s']:,.0f}" in line
    assert "failed: gqa 512 fp8 micro-batch 4: out of memory" in text
    assert "unknown kernel: baseline 2048 bf16 micro-batch 4: 1.25 ms a step in odd" in text
    assert "peak GiB" not in header  # nobody measured it
    assert "recomputed" not in header
    assert "recomputed" in results.report([synthetic_row("baseline", 2048, recomputed_layers=7)])
    markdown = results.report(record["rows"], markdown=True).splitlines()
    assert len({row.count("|") for row in markdown[:3]}) == 1
    results.save(path, [], command="x")
    assert results.load(path)["rows"] == []


@pytest.mark.parametrize("text", ["", "[]", '{"rows": 3}', '{"results": []}', '{"rows": [{"variant": "baseline"}]}'])
def test_other_files_are_not_results(text, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(OnebError, match="r.json"):
        results.load(path)


def measured_records():
    return [results.load(path) for path in sorted(RESULTS.glob("growth_*_h200.json"))]


@pytest.mark.parametrize("record", measured_records(), ids=lambda record: record["date"])
def test_rows_stored_without_an_expected_speed_get_it_from_their_options(record):
    """The reference is what was measured."""
    record = json.loads(json.dumps(record))
    stored = [row.pop("expected_tok_s", None) for row in record["rows"]]
    rows = results.with_expected(record)["rows"]
    assert len(rows) >= 6
    for row, before in zip(rows, stored, strict=True):
        rel = 0.15 if row["batch_size"] * row["seq_len"] > 2048 else 0.3  # then the host's speed is what counts
        assert row["expected_tok_s"] == pytest.approx(row["tok_s"], rel=rel)
        assert before is None or row["expected_tok_s"] == pytest.approx(before, rel=0.1)


def test_expected_speeds_are_kept_where_stored_and_never_made_up():
    row, *others = measured_records()[0]["rows"]
    row.pop("expected_tok_s", None)

    def expected(gpu="NVIDIA H200", **changes):
        return results.with_expected({"gpu": gpu, "rows": [{**row, **changes}]})["rows"][0].get("expected_tok_s")

    usual = expected()
    assert expected(expected_tok_s=1234.5) == 1234.5
    assert expected(gpu="cpu") is expected(gpu=None) is expected(error="out of memory") is None
    assert expected(options={"batch_size": "of another version"}) is None
    layers = [expected(recomputed_layers=layers) for layers in (0, 11, 22)]
    assert layers[0] == usual > layers[1] > layers[2] > 0.6 * usual
    assert expected(train={**row["train"], "grad_checkpoint": True}) == layers[2]  # as it was once written
    assert expected(options={"n_layers": 11}) > 1.5 * usual
    assert expected(gpu="NVIDIA H100 80GB HBM3") <= usual


def test_the_growth_plots_show_the_rows(tmp_path):
    rows = [synthetic_row(variant, seq_len, precision) for variant in ("baseline", "decoupled")
            for precision in ("bf16", "fp8") for seq_len in (512, 2048, 8192)]
    rows += [synthetic_row("decoupled", 2048, batch_size=size) for size in (1, 4, 32)]
    rows += [synthetic_row("gqa", 2048)]
    rows += [{**Point("gqa", 512, "bf16").to_row(), "error": "out of memory"}]
    records = [{"gpu": "H200", "commit": commit, "rows": part} for commit, part in (("a", rows[:8]), ("b", rows[8:]))]
    written = growth.write_growth(records, tmp_path / "plots")
    assert [path.name for path in written] == [growth.LENGTH_PLOT, growth.BATCH_PLOT, growth.ROOFLINE_PLOT]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    figure = growth.length_figure(rows[:12], "H200")
    drawn = figure.axes[0].lines
    lines = {line.get_label(): line for line in drawn}
    assert {label for label in lines if not label.startswith("_")} == {
        "baseline, bf16", "baseline, fp8", "decoupled, bf16", "decoupled, fp8", "expected, as plans show it"}
    fp8 = lines["decoupled, fp8"]
    expected = [row for row in rows[:12] if (row["variant"], row["precision"]) == ("decoupled", "fp8")]
    assert list(fp8.get_xdata()) == [512, 2048, 8192]
    assert list(fp8.get_ydata()) == [row["tok_s"] for row in expected]
    dashed = drawn[list(drawn).index(fp8) + 1]
    assert list(dashed.get_xdata()) == [512, 2048, 8192]
    assert list(dashed.get_ydata()) == [row["expected_tok_s"] for row in expected]
    assert figure.axes[0].get_xscale() == "log"
    bars = growth.roofline_figure([rows[1], rows[-2]], "H200").axes[0]
    widths = {round(patch.get_y() + patch.get_height() / 2, 6): 0.0 for patch in bars.patches}
    for patch in bars.patches:
        widths[round(patch.get_y() + patch.get_height() / 2, 6)] += patch.get_width()
    assert sorted(widths.values()) == pytest.approx(sorted(
        1e6 / speed for row in (rows[1], rows[-2]) for speed in (row["tok_s"], row["predicted"]["tok_s"])))


def test_one_point_a_curve_is_no_growth(tmp_path):
    record = {"rows": [synthetic_row("baseline", 2048), synthetic_row("baseline", 2048)]}
    names = [path.name for path in growth.write_growth([record], tmp_path)]
    assert names == [growth.ROOFLINE_PLOT]


def test_of_two_measurements_of_a_point_the_first_is_drawn(tmp_path, monkeypatch):
    rows = [synthetic_row("decoupled", seq_len) for seq_len in (512, 2048)]
    again = [{**row, "tok_s": 2 * row["tok_s"]} for row in [synthetic_row("decoupled", 4096), *rows]]
    figures = []
    draw = growth.length_figure
    monkeypatch.setattr(growth, "length_figure", lambda *args: figures.append(draw(*args)) or figures[-1])
    growth.write_growth([{"commit": "first", "rows": rows}, {"commit": "second", "rows": again}], tmp_path)
    line = figures[0].axes[0].lines[0]
    assert list(line.get_xdata()) == [512, 2048, 4096]
    assert list(line.get_ydata()) == [rows[0]["tok_s"], rows[1]["tok_s"], again[0]["tok_s"]]
    assert any("commit first, second" in text.get_text() for text in figures[0].texts)


def test_stored_results_of_several_files_become_pictures_by_the_command(tmp_path, capsys):
    files = [str(path) for path in sorted(RESULTS.glob("growth_*_h200.json"))]
    assert bench.main(["--show", *files, "--plots", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        growth.LENGTH_PLOT, growth.BATCH_PLOT, growth.ROOFLINE_PLOT}
    shown = capsys.readouterr().out
    assert "expected" in shown
    assert "roofline" in shown
