"""What oneb bench works out without a GPU: its points, its tables and plots."""

import dataclasses

import pytest

from oneb.bench import results
from oneb.bench.points import Point, Settings, configuration, grid, largest_batch_size
from oneb.config import VARIANTS, device_defaults
from oneb.errors import OnebError
from oneb.gpus import get_gpu
from oneb.inspect import growth
from oneb.memory import step_memory
from oneb.roofline import gemms, predict, table_ceilings


def settled(variant, seq_len=2048, batch_size=8, batch_tokens=65536, precision="bf16", size="1b", **given):
    settings = Settings(size=size, data="x.npy", batch_tokens=batch_tokens, given=given)
    config = configuration(Point(variant, seq_len, precision, batch_size), settings, batch_size, "runs")
    return settings, dataclasses.replace(config, train=device_defaults(config.train, "cuda"))


def test_the_grid_is_every_combination_once():
    points = grid(["a", "b", "a"], [16, 32], ["bf16"], [None, 4])
    assert len(points) == len(set(points)) == 8
    assert points[0] == Point("a", 16, "bf16", None)


def test_a_point_decides_its_run():
    _, config = settled("gqa", 8192, 4, optimizer="adamw")
    assert config.train.phases == ((0, 8192),)
    assert config.train.sequences(8192) * 8192 == 65536
    assert config.model.max_seq_len == 8192
    assert config.optim.optimizer == "adamw"
    assert (config.train.eval_every, config.run.save_every) == (0, 0)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("free_gib", [20, 60, 141])
def test_the_automatic_micro_batch_is_the_largest_that_fits(variant, free_gib):
    for seq_len in (512, 2048, 16384):
        settings, config = settled(variant, seq_len, 1)
        chosen = largest_batch_size(Point(variant, seq_len, "bf16"), settings, config, free_gib * 2**30)

        def fits(size, config=config, seq_len=seq_len):
            needed = sum(step_memory(config, seq_len, size, 0, optimizer="lion").values())
            return size * seq_len <= 65536 and needed <= 0.9 * free_gib * 2**30

        assert chosen == max([1, *(2**i for i in range(9) if fits(2**i))])


# ---- tables and plots

def synthetic_row(variant, seq_len, precision="bf16", batch_size=None, **more):
    _, config = settled(variant, seq_len, batch_size or 4, precision=precision)
    eight_bit = precision == "fp8"
    ceilings = table_ceilings(get_gpu("h200"), gemms(config.model, (batch_size or 4) * seq_len, eight_bit))
    predicted = predict(config, seq_len, ceilings, batch_size=batch_size or 4, grad_accum=config.train.grad_accum,
                        recomputed_layers=0, eight_bit=eight_bit)
    return {**Point(variant, seq_len, precision, batch_size).to_row(), "batch_size": batch_size or 4, "error": None,
            "tokens_per_step": 65536, "tok_s": 0.8 * predicted["tok_s"], "step_ms": 900.0, "predicted": predicted,
            "parameters": 1.2e9, "null_attn": False, "breakdown": None, **more}


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
    assert f"{rows[0]['tok_s']:,.0f}" in line
    assert "failed: gqa 512 fp8 micro-batch 4: out of memory" in text
    assert "unknown kernel: baseline 2048 bf16 micro-batch 4: 1.25 ms a step in odd" in text
    assert "peak GiB" not in header  # nobody measured it
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
    if "variant" not in text:
        with pytest.raises(OnebError, match="r.json"):
            growth.write_growth([path], tmp_path / "plots")
    assert not (tmp_path / "plots").exists()


def test_the_growth_plots_show_the_rows(tmp_path):
    rows = [synthetic_row(variant, seq_len, precision) for variant in ("baseline", "decoupled")
            for precision in ("bf16", "fp8") for seq_len in (512, 2048, 8192)]
    rows += [synthetic_row("decoupled", 2048, batch_size=size) for size in (1, 4, 32)]
    rows += [synthetic_row("gqa", 2048)]
    rows += [{**Point("gqa", 512, "bf16").to_row(), "error": "out of memory"}]
    for name, part in (("a", rows[:8]), ("b", rows[8:])):
        results.save(tmp_path / f"{name}.json", part, command="oneb bench", commit="c", gpu="H200")
    written = growth.write_growth([tmp_path / "a.json", tmp_path / "b.json"], tmp_path / "plots")
    assert [path.name for path in written] == [growth.LENGTH_PLOT, growth.BATCH_PLOT, growth.ROOFLINE_PLOT]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
    figure = growth.length_figure(rows[:12], "H200")
    lines = {line.get_label(): line for line in figure.axes[0].lines}
    fp8 = lines["decoupled, fp8"]
    expected = [row for row in rows[:12] if (row["variant"], row["precision"]) == ("decoupled", "fp8")]
    assert list(fp8.get_xdata()) == [512, 2048, 8192]
    assert list(fp8.get_ydata()) == [row["tok_s"] for row in expected]
    assert figure.axes[0].get_xscale() == "log"
    bars = growth.roofline_figure([rows[1], rows[-2]], "H200").axes[0]
    widths = {round(patch.get_y() + patch.get_height() / 2, 6): 0.0 for patch in bars.patches}
    for patch in bars.patches:
        widths[round(patch.get_y() + patch.get_height() / 2, 6)] += patch.get_width()
    assert sorted(widths.values()) == pytest.approx(sorted(
        1e6 / speed for row in (rows[1], rows[-2]) for speed in (row["tok_s"], row["predicted"]["tok_s"])))


def test_one_point_a_curve_is_no_growth(tmp_path):
    results.save(tmp_path / "r.json", [synthetic_row("baseline", 2048)], command="oneb bench", commit="c")
    names = [path.name for path in growth.write_growth([tmp_path / "r.json"], tmp_path)]
    assert names == [growth.ROOFLINE_PLOT]
