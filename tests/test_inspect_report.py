"""Plots and summary from nothing but a run directory's files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from oneb.cli.report import main
from oneb.errors import OnebError
from oneb.inspect.plots import loss_figure, smooth, throughput_figure, tick_text, write_plots
from oneb.inspect.rows import phase_rows, read_run
from oneb.inspect.summary import training_seconds, write_summary
from oneb.presets import resolve

META = {
    "type": "meta", "time": 1.7e9, "name": "demo", "steps": 400, "start_step": 0, "variant": "decoupled",
    "parameters": 928_000_000, "matmul_parameters": 920_000_000, "kv_bytes_per_token": 33792,
    "flops_per_token": {"64": 5.6e9, "128": 5.8e9}, "device": "NVIDIA H200", "torch": "2.11", "oneb": "0.1.0",
    "attention_backend": "cudnn", "param_dtype": "bf16", "compute_dtype": "bf16", "data": "fineweb_1b.npy",
    "data_fingerprint": "ab12", "train_tokens": 100_000, "val_tokens": 1000, "encoding": "gpt2", "peak_flops": 989e12,
}


def train_row(step: int, **values) -> dict:
    seq_len = 64 if step <= 200 else 128
    return {
        "type": "train", "step": step, "tokens": step * 64 + max(0, step - 200) * 64, "loss": 3 + 8 / step, "lr": 2e-4,
        "grad_norm": 0.5, "seq_len": seq_len, "tok_s": 80_000.0 - seq_len, "mfu": 0.47, "step_ms": 200.0,
        "data_ms": 0.2, "memory_gib": 41.2, "skipped": 0, "elapsed_s": step * 0.5,
    } | values


def eval_row(step: int, loss: float | None) -> dict:
    return {"type": "eval", "step": step, "tokens": train_row(step)["tokens"], "val_loss": loss, "best_val_loss": loss,
            "seq_len": 128, "eval_tokens": 16384, "eval_s": 2.0}


def event(name: str, step: int, message: str) -> dict:
    return {"type": "event", "step": step, "event": name, "message": message}


def make_run(path: Path, rows: list[dict], config: bool = True) -> Path:
    path.mkdir(parents=True)
    (path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if config:
        (path / "config.json").write_text(json.dumps(resolve({"tag": "demo"}).to_dict()))
        (path / "plan.json").write_text("{}")
    return path


def whole_run(path: Path) -> Path:
    """A resumed run of two phases with a loss that was not finite."""
    rows = [META]
    for step in range(2, 401, 2):
        if step == 302:
            rows += [META | {"start_step": 300}, event("resume", 300, "continues last.pt")]
        rows.append(train_row(step, **({"loss": None, "grad_norm": None} if step == 100 else {}),
                              skipped=int(step >= 100), elapsed_s=(step if step <= 300 else step - 300) * 0.5))
        if step % 100 == 0:
            rows.append(eval_row(step, 3.2 - step / 1000))
    rows += [event("warning", 100, "odd"), event("checkpoint", 400, "saved"), event("finish", 400, "finished")]
    return make_run(path, rows)


@pytest.mark.parametrize("rows", [
    pytest.param([META, train_row(20)], id="one row"),
    pytest.param([META, train_row(20, loss=None, mfu=None, memory_gib=None, tok_s=None), train_row(40)], id="nulls"),
    pytest.param([META, train_row(20, mfu=None), eval_row(20, 3.0), eval_row(40, None)], id="no mfu"),
    pytest.param([META, eval_row(20, 3.0)], id="only an evaluation"),
    pytest.param([META, train_row(20, loss=None), train_row(40, loss=None)], id="diverged"),
    pytest.param([train_row(20), train_row(40)], id="no meta row"),
])
def test_any_run_gets_its_plots_and_summary(tmp_path, rows):
    run_dir = make_run(tmp_path / "demo", rows, config=False)
    paths = write_plots(run_dir)
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    text = write_summary(run_dir).read_text()
    assert "config.json is missing" in text


def test_a_run_without_rows_has_no_plots(tmp_path):
    run_dir = make_run(tmp_path / "demo", [META])
    assert write_plots(run_dir) == []
    assert "At step 0 of 400" in write_summary(run_dir).read_text()
    empty = make_run(tmp_path / "empty", [])
    assert write_plots(empty) == []
    assert "Not started" in write_summary(empty).read_text()


def test_the_loss_plot_shows_what_the_rows_say(tmp_path):
    run = read_run(whole_run(tmp_path / "demo_run"))
    figure = loss_figure(run)
    ax = figure.axes[0]
    drawn = {line.get_label(): line for line in ax.lines}
    val = drawn["validation (best 2.8000 at 38.4K)"]
    assert val.get_xdata().tolist() == [6400.0, 12800.0, 25600.0, 38400.0]
    assert val.get_ydata().tolist() == pytest.approx([3.1, 3.0, 2.9, 2.8])
    assert drawn["not finite (1x)"].get_xdata().tolist() == [6400.0]
    assert drawn["resumed"].get_xdata().tolist() == [25600.0]
    assert [text.get_text() for text in ax.texts] == ["64 tokens", "128 tokens"]
    titles = [text.get_text() for text in figure.texts]
    assert titles == ["demo_run", "decoupled · 928M parameters · 38.4K tokens · NVIDIA H200"]


def test_the_step_axis_follows_the_tokens_through_phases(tmp_path):
    figure = loss_figure(read_run(whole_run(tmp_path / "demo")))
    figure.draw_without_rendering()
    upper = figure.axes[0].child_axes[0]
    # The upper edge ends where 1.02 x the last row's tokens are: 768 tokens, so six steps of 128, past step 400.
    assert upper.get_xlim() == pytest.approx((0.0, 406.0))


def test_the_throughput_plot_has_mfu_where_it_is_known(tmp_path):
    run = read_run(whole_run(tmp_path / "demo"))
    figure = throughput_figure(run)
    assert [ax.get_ylabel() for ax in figure.axes] == ["tokens a second", "MFU (%)"]
    assert "peak memory 41.2 GiB" in figure.texts[1].get_text()
    no_mfu = make_run(tmp_path / "cpu", [META, train_row(20, mfu=None)])
    assert len(throughput_figure(read_run(no_mfu)).axes) == 1


def test_plots_leave_matplotlib_as_it_was(tmp_path):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    write_plots(whole_run(tmp_path / "demo"))
    assert dict(mpl.rcParams) == before


def test_without_matplotlib_a_run_still_ends(tmp_path, monkeypatch):
    run_dir = whole_run(tmp_path / "demo")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(UserWarning, match="pip install matplotlib"):
        assert write_plots(run_dir) == []
    assert "![loss]" not in write_summary(run_dir).read_text()


def test_the_summary_tells_what_a_comparison_needs(tmp_path):
    run_dir = whole_run(tmp_path / "demo")
    (run_dir / "best.pt").touch()
    write_plots(run_dir)
    text = write_summary(run_dir).read_text()
    for part in ("Finished: 400 steps, 38.4K tokens, 3m 20s", "| validation | 2.8000 | 2.8000 (step 400", "928,000,000",
                 "5.6 G (at 64), 5.8 G (at 128)", "33,792 bytes", "same shape is not the same size", "47.0%",
                 "41.2 GiB", "NVIDIA H200, torch 2.11", "0.38 passes", "![loss](loss.png)",
                 "![throughput](throughput.png)", "warning: odd", "continues last.pt", "not finite: 1",
                 "oneb sample --ckpt"):
        assert part in text, part
    assert "--resume" not in text  # nothing is left to do
    assert "saved" not in text


def test_an_unfinished_run_says_how_to_go_on(tmp_path):
    stopped = event("stopped", 20, "stopped by signal 15")
    run_dir = make_run(tmp_path / "my runs" / "demo", [META, train_row(20), stopped])
    (run_dir / "last.pt").touch()
    text = write_summary(run_dir).read_text()
    assert "Stopped at step 20 of 400" in text
    command = re.search(r"^python3 run_1b_launch.py.*", text, re.M).group()
    assert f"--ckpt '{run_dir}/last.pt' --resume --run" in command
    assert "--tag demo --variant decoupled --seed 1337" in command


def test_wall_time_adds_up_over_processes(tmp_path):
    rows = [META, *(train_row(step, elapsed_s=e) for step, e in ((1, 10.0), (2, 20.0), (3, 5.0), (4, 9.0), (5, 7.0)))]
    assert training_seconds(read_run(make_run(tmp_path / "demo", rows))) == pytest.approx(20 + 9 + 7)


def test_the_summary_says_what_the_machine_has_cost(tmp_path):
    # 20 s and, after the resume, 9 s; an hour is 3600.
    rows = [META, *(train_row(step, elapsed_s=e) for step, e in ((1, 10.0), (2, 20.0), (3, 5.0), (4, 9.0)))]
    run_dir = make_run(tmp_path / "demo", rows)
    assert "$" not in write_summary(run_dir).read_text().split("\n\n")[1]
    (run_dir / "config.json").write_text(json.dumps(resolve({"tag": "demo", "price": 360.0}).to_dict()))
    assert "29s, $2.90 at $360.00 an hour." in write_summary(run_dir).read_text()


def test_a_torn_last_row_is_left_out_and_damage_is_named(tmp_path):
    run_dir = make_run(tmp_path / "demo", [META, train_row(20)])
    with open(run_dir / "train.jsonl", "a") as file:
        file.write('{"type": "tra')
    assert [row["step"] for row in read_run(run_dir).train] == [20]
    (run_dir / "config.json").write_text("{")
    assert "config.json is damaged" in write_summary(run_dir).read_text()
    (run_dir / "train.jsonl").write_text("{\n{}\n")
    with pytest.raises(OnebError, match="line 1 is not JSON"):
        read_run(run_dir)


def test_what_is_not_a_run_is_answered_with_what_was_meant(tmp_path, capsys):
    run_dir = make_run(tmp_path / "runs" / "demo", [META])
    (run_dir / "last.pt").touch()
    for given in (tmp_path / "runs", run_dir / "last.pt"):
        with pytest.raises(OnebError, match=f"for instance {re.escape(str(run_dir))}"):
            read_run(given)
    assert main([str(tmp_path / "absent")]) == 2
    assert "does not exist" in capsys.readouterr().err


def test_report_prints_what_it_wrote(tmp_path, capsys):
    run_dir = whole_run(tmp_path / "demo")
    assert main([str(run_dir)]) == 0
    assert capsys.readouterr().out.split() == [
        str(run_dir / n) for n in ("loss.png", "throughput.png", "summary.md", "report.html")]


def test_reports_need_no_torch():
    code = ("import sys; import oneb.inspect.plots, oneb.inspect.summary, oneb.cli.report; "
            "assert not {'torch', 'matplotlib'} & set(sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)


def test_smooth_is_the_mean_around_each_row():
    values = np.array([5.0, 4.0, np.nan, 2.0, 1.0, 0.0])
    assert smooth(values, 2).tolist() == pytest.approx([5.0, 4.5, 3.0, 1.5, 1.0, 0.5])
    assert np.isnan(smooth(np.array([np.nan, np.nan]), 2)).all()


@pytest.mark.parametrize(("count", "text"), [
    (0, "0"), (200e6, "200M"), (2e9, "2B"), (1.5e9, "1.5B"), (1.25e9, "1.25B"), (10e3, "10K"),
    (12.5e3, "12.5K"), (20, "20"),
])
def test_ticks_are_short(count, text):
    assert tick_text(count) == text


def test_phases_of_rows():
    rows = [train_row(100), train_row(200), train_row(300)]
    assert [(phase.seq_len, len(phase.rows)) for phase in phase_rows(rows)] == [(64, 2), (128, 1)]
