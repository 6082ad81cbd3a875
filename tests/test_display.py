"""What the displays leave on the screen."""

from __future__ import annotations

import io
import re
import sys

import pytest
from forked_runs import within

from oneb.errors import OnebError
from oneb.show.dashboard import sparkline
from oneb.show.display import LineDisplay, PlainDisplay, QuietDisplay, make_display
from oneb.show.screen import Progress, bar, fit


class Terminal(io.StringIO):
    """A stream that says it is a terminal; without a file behind it, 80 columns wide."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines that a terminal would show: a carriage return goes back to the first column."""
        lines = []
        for line in self.getvalue().split("\n"):
            shown = ""
            for part in line.split("\r"):
                shown = part + shown[len(part) :]
            lines.append(shown.rstrip())
        return lines


META = {
    "type": "meta", "name": "demo", "variant": "decoupled", "parameters": 928_000_000, "kv_bytes_per_token": 33792,
    "device": "NVIDIA H200", "torch": "2.11", "attention_backend": "cudnn", "param_dtype": "bf16",
    "compute_dtype": "bf16", "data": "fineweb_1b.npy", "train_tokens": 990_000_000, "val_tokens": 10_000_000,
}


def train_row(step: int, **values) -> dict:
    return {
        "type": "train", "step": step, "tokens": step * 1000, "loss": 3.41234, "lr": 2e-4, "grad_norm": 0.6,
        "seq_len": 1024, "tok_s": 81234.0, "mfu": 0.52, "step_ms": 1000.0, "data_ms": 0.1, "memory_gib": 41.2,
        "skipped": 0, "elapsed_s": 10.0,
    } | values


def eval_row(step: int, loss: float, best: float) -> dict:
    return {"type": "eval", "step": step, "tokens": step * 1000, "val_loss": loss, "best_val_loss": best,
            "seq_len": 1024, "eval_tokens": 163840, "eval_s": 2.3}


def event(name: str, message: str, step: int = 40) -> dict:
    return {"type": "event", "step": step, "event": name, "message": message}


def display(mode: str, stream=None, **options):
    stream = stream or io.StringIO()
    return make_display(mode, **({"steps": 20000, "start_step": 0, "name": "demo", "stream": stream} | options)), stream


def test_the_mode_and_the_stream_choose_the_display():
    assert type(display("auto")[0]) is PlainDisplay
    assert type(display("basic", Terminal())[0]) is PlainDisplay
    assert type(display("off", Terminal())[0]) is QuietDisplay
    assert type(display("auto", Terminal())[0]) is LineDisplay
    fallback, stream = display("rich")
    assert type(fallback) is PlainDisplay
    assert "needs a terminal" in stream.getvalue()


def test_plain_lines_hold_the_figures_in_80_columns():
    shown, stream = display("basic", steps=1_000_000)
    shown.log(train_row(20))
    shown.log(train_row(999_980, step_ms=1e9, skipped=3, loss=None, mfu=0.999))
    usual, worst = stream.getvalue().splitlines()
    assert max(len(worst), len(usual)) < 80
    for text in ("loss nan", "81.2K tok/s", "ETA ", "3 skipped"):
        assert text in worst
    assert usual == "step      20/1000000  loss 3.4123  81.2K tok/s  MFU 52%  ETA 11d 13h"


def test_evaluations_events_and_the_start_have_lines_of_their_own():
    shown, stream = display("basic")
    shown.log(META)
    shown.log(eval_row(20, 3.5, 3.5))
    shown.log(eval_row(40, 3.6, 3.5))
    shown.log(event("warning", "odd"))
    shown.log({"type": "analysis", "step": 40, "grad_rms": {}})
    lines = stream.getvalue().splitlines()
    assert "928M parameters" in lines[0]
    assert "33.0 KiB" in lines[0]
    assert "NVIDIA H200" in lines[1]
    assert "990M tokens" in lines[2]
    assert "val loss 3.5000 (best so far)" in lines[3]
    assert "val loss 3.6000 (best 3.5000)" in lines[4]
    assert lines[5:] == ["step 40  warning: odd"]


def test_off_is_silent_about_steps_and_still_warns():
    shown, stream = display("off")
    shown.status("evaluating")
    shown.log(train_row(20))
    shown.advance(21)
    shown.log(event("checkpoint", "saved"))
    assert stream.getvalue() == ""
    shown.log(event("warning", "odd"))
    shown.log(eval_row(40, 3.5, 3.5))
    shown.message("bye")
    assert len(stream.getvalue().splitlines()) == 3


def test_the_progress_line_is_rewritten_below_the_lines_that_stay():
    shown, terminal = display("auto", Terminal(), total_tokens=20_000_000)
    shown.status("compiling for 1024 tokens a sequence, which takes about half a minute")
    shown.log(train_row(20))
    shown.log(eval_row(20, 3.5, 3.5))
    shown.log(train_row(40))
    assert terminal.screen()[-1] == "  0%  40/20000  loss 3.4123  val 3.5000  81.2K tok/s  MFU 52%  ETA 4m 06s"
    shown.close()
    lines = terminal.screen()
    assert "val loss 3.5000" in lines[0]
    assert lines[1].startswith("  0%  40/20000")
    assert lines[2:] == [""]
    assert max(map(len, lines)) < 80


def test_what_is_waited_for_counts_seconds_by_itself():
    shown, terminal = display("auto", Terminal())
    shown.status("evaluating")
    assert within(60, lambda: re.search(r"evaluating … [1-9]\d*s$", terminal.screen()[-1]))
    shown.advance(1)
    assert "evaluating" not in terminal.screen()[-1]
    shown.close()


@pytest.mark.parametrize("mode", ["auto", "rich"])
def test_a_wait_is_shown_until_the_next_step_with_how_long_it_has_taken(mode):
    shown, terminal = display(mode, Terminal())
    shown.waiting("waiting for data: train_000002.bin, 10% of 191 MiB", 2.0)
    shown.waiting("waiting for data: train_000002.bin, 15% of 191 MiB", 3.0)
    waited = re.search(r"train_000002\.bin, 15% of 191 MiB(?: … (\d+)s)?", terminal.getvalue())
    assert int(waited[1]) >= 3 if mode == "auto" else waited
    drawn = len(terminal.getvalue())
    shown.advance(1)
    assert "waiting" not in terminal.getvalue()[drawn:].rpartition("\r")[2]
    shown.close()


def test_plain_output_tells_of_a_wait_when_it_has_been_silent(monkeypatch):
    shown, stream = display("basic")
    monkeypatch.setattr("oneb.show.display._WAITING_S", 600.0)
    shown.waiting("waiting for data", 9.0)
    assert stream.getvalue() == ""
    monkeypatch.setattr("oneb.show.display._WAITING_S", 0.0)
    shown.waiting("waiting for data", 10.0)
    assert stream.getvalue() == "waiting for data …\n"


def test_how_much_of_the_data_is_there_stands_in_the_line_until_all_is():
    shown, terminal = display("auto", Terminal())
    shown.progress.data = "3/11"
    shown.log(train_row(20, memory_gib=None))
    assert "data 3/11" in terminal.screen()[-1]
    shown.progress.data = None
    shown.log(train_row(40))
    assert "data" not in terminal.screen()[-1]
    shown.close()


def test_plain_output_says_that_slow_steps_are_made(monkeypatch):
    shown, stream = display("basic")
    shown.advance(1)
    assert stream.getvalue() == ""
    monkeypatch.setattr("oneb.show.display._QUIET_S", 0.0)
    shown.advance(2)
    assert stream.getvalue().split() == ["step", "2/20000"]


def test_time_left_is_by_the_median_speed_and_by_tokens_where_they_are_known():
    steps = Progress(steps=100, step=0, total_tokens=None)
    assert steps.eta_s() is None
    for step, ms in ((10, 500.0), (20, 500.0), (30, 9000.0)):
        steps.take(train_row(step, step_ms=ms))
    assert steps.eta_s() == pytest.approx(35.0)
    steps.take(train_row(40, step_ms=2000.0, seq_len=2048))
    assert steps.eta_s() == pytest.approx(120.0)  # steps of another length do not count

    tokens = Progress(steps=100, step=0, total_tokens=1_000_000)
    tokens.take(train_row(10, tokens=10_000, tok_s=1000.0))
    assert tokens.eta_s() == pytest.approx(990.0)


@pytest.mark.parametrize("mode", ["auto", "basic", "rich"])
def test_a_terminal_that_went_away_does_not_stop_the_run(mode):
    class Gone(Terminal):
        def write(self, text):
            raise OSError(5, "Input/output error")

    shown, _ = display(mode, Gone())
    shown.status("compiling")
    shown.log(train_row(20))
    shown.advance(21)
    shown.message("unseen")
    shown.close()
    assert shown.lost


def test_a_stream_that_knows_only_ascii():
    raw = io.BytesIO()
    shown, _ = display("basic", io.TextIOWrapper(raw, encoding="ascii"))
    shown.status("evaluating")
    assert raw.getvalue() == b"evaluating ?\n"
    assert bar(0.5, 4, "ascii") == "##--"
    assert bar(0.5, 4, "UTF-8") == "━━──"


def test_fit_leaves_out_what_matters_least():
    texts = {"step": "1/2", "loss": "loss 3", "memory": "40 GiB", "eta": "ETA 1s"}
    assert fit(texts, ("step", "loss", "eta", "memory"), 80) == "1/2  loss 3  ETA 1s  40 GiB"
    assert fit(texts, ("step", "loss", "eta", "memory"), 20) == "1/2  loss 3  ETA 1s"
    assert fit(texts, ("step", "loss", "eta", "memory"), 2) == "1/"


def test_rich_draws_the_dashboard():
    shown, terminal = display("rich", Terminal())
    shown.status("compiling")
    shown.log(META)
    for step in range(20, 200, 20):
        shown.log(train_row(step, loss=10 - step / 40))
    shown.log(eval_row(180, 3.5, 3.5))
    shown.log(event("warning", "odd [red]text"))
    shown.close()
    text = terminal.getvalue()
    for part in ("compiling", "demo", "41.2 GiB", "training loss", "val loss", "best", "odd [red]text", "180/20000"):
        assert part in text


def test_rich_absent(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich.live", None)
    with pytest.raises(OnebError, match="python3 -m pip install rich"):
        display("rich", Terminal())


def test_sparkline_falls_as_the_values_do():
    assert len(sparkline([1.0] * 100, 10)) == 10
    line = sparkline([float(x) for x in range(100, 0, -1)], 10)
    assert list(line) == sorted(line, reverse=True)
    assert (line[0], line[-1]) == ("█", "▁")


@pytest.mark.parametrize("mode", ["basic", "auto", "rich"])
def test_a_row_whose_only_step_compiled_has_no_speed(mode):
    shown, terminal = display(mode, Terminal())
    shown.log(train_row(1, tok_s=None, mfu=None, step_ms=None, data_ms=None))
    shown.log(train_row(2, step_ms=500.0))
    shown.close()
    assert "81.2K" in terminal.getvalue()
    assert "None" not in terminal.getvalue()
