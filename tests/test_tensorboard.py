"""TensorBoard's own readers show every step once: after resumes, rollbacks, a clock set back, and a full disk."""

import json
import os
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

import pytest
from small_disk import fill
from test_trainer import run

from oneb.errors import OnebError
from oneb.show import tensorboard_sink
from oneb.show.tensorboard_sink import TensorBoardSink

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402


def train_row(step: int, loss: float) -> dict:
    return {"type": "train", "step": step, "tokens": step * 1024, "loss": loss, "mfu": None}


def curve(run_dir: Path, tag: str = "train/loss") -> list[tuple[int, float]]:
    """A chart as TensorBoard reads it."""
    reader = EventAccumulator(str(run_dir / "tensorboard"), size_guidance={"scalars": 0})
    reader.Reload()
    return [(event.step, event.value) for event in reader.Scalars(tag)]


def log(sink: TensorBoardSink, steps: range, loss: float) -> None:
    for step in steps:
        sink.log(train_row(step, loss))


def test_rows_are_charts_and_on_disk_at_once(tmp_path):
    sink = TensorBoardSink(tmp_path)
    sink.log({"type": "meta", "start_step": 0, "device": "cpu"})
    sink.log(train_row(20, 3.0))
    sink.log(train_row(40, float("nan")))
    sink.log({"type": "eval", "step": 40, "tokens": 40960, "val_loss": 2.5})
    sink.log({"type": "analysis", "step": 40, "grad_rms": {"embedding": 0.5}, "by_head": [[1.0, 3.0], [2.0, 4.0]]})
    sink.log({"type": "event", "step": 40, "event": "warning", "message": "no chart"})
    assert curve(tmp_path) == [(20, 3.0)]
    assert curve(tmp_path, "train/tokens") == [(20, 20480.0), (40, 40960.0)]
    assert curve(tmp_path, "eval/val_loss") == [(40, 2.5)]
    assert curve(tmp_path, "analysis/grad_rms/embedding") == [(40, 0.5)]
    assert curve(tmp_path, "analysis/by_head/layer_01") == [(40, 3.0)]
    sink.close()


def test_no_step_is_shown_twice(tmp_path, monkeypatch):
    """A rollback, a kill (nothing is closed), and a resume whose clock is an hour behind."""
    first = TensorBoardSink(tmp_path)
    log(first, range(1, 9), 3.0)
    first.rewind(5)
    log(first, range(6, 11), 2.0)
    an_hour_ago = time.time() - 3600
    monkeypatch.setattr(tensorboard_sink.time, "time", lambda: an_hour_ago)
    second = TensorBoardSink(tmp_path, resume_step=7)
    log(second, range(8, 13), 1.0)
    assert curve(tmp_path) == [*((step, 3.0) for step in range(1, 6)), (6, 2.0), (7, 2.0),
                               *((step, 1.0) for step in range(8, 13))]
    third = TensorBoardSink(tmp_path)  # the run begins anew
    log(third, range(1, 3), 4.0)
    assert curve(tmp_path) == [(1, 4.0), (2, 4.0)]


def test_what_a_full_disk_refuses_is_written_later(tmp_path, disk):
    folder = disk(2**20)
    sink = TensorBoardSink(folder)
    log(sink, range(1, 11), 3.0)
    large = fill(folder)
    log(sink, range(11, 200), 3.0)
    assert len(sink.warnings) == 1
    assert "No space left" in sink.warnings[0]
    large.unlink()
    log(sink, range(200, 211), 3.0)
    sink.close()
    assert curve(folder) == [(step, 3.0) for step in range(1, 211)]
    assert len(sink.warnings) == 1


def test_a_resumed_run_continues_its_charts(tmp_path):
    directory, _ = run(tmp_path, steps=8, tensorboard=True)
    run(tmp_path, steps=12, tensorboard=True, ckpt=str(directory / "last.pt"), resume=True, allow_change=True)
    assert [step for step, _ in curve(directory)] == list(range(1, 13))
    rows = [json.loads(line) for line in (directory / "train.jsonl").read_text().splitlines()]
    losses = [(row["step"], pytest.approx(row["loss"])) for row in rows if row["type"] == "train"]
    assert curve(directory) == losses


def test_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(OnebError, match="python3 -m pip install tensorboard"):
        TensorBoardSink(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("fast", ["true", "false"])
def test_the_program_itself_shows_every_step_once(tmp_path, fast):
    """Both of its loaders: the one in Python, and the data server, whose reader is another program."""
    first = TensorBoardSink(tmp_path)
    log(first, range(1, 9), 3.0)
    first.rewind(5)
    log(first, range(6, 11), 2.0)
    second = TensorBoardSink(tmp_path, resume_step=7)
    log(second, range(8, 13), 1.0)
    program = subprocess.Popen(
        [sys.executable, "-m", "tensorboard.main", "--logdir", str(tmp_path), "--port", "0", "--load_fast", fast],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env={**os.environ, "NO_PROXY": "*"})
    try:
        address = next(word for line in program.stdout for word in line.split() if word.startswith("http://localhost"))
        query = urllib.parse.urlencode({"run": "tensorboard", "tag": "train/loss"})
        deadline, shown = time.monotonic() + 60, []
        while len(shown) < 12 and time.monotonic() < deadline:
            time.sleep(1)
            try:
                with urllib.request.urlopen(f"{address}data/plugin/scalars/scalars?{query}") as answer:
                    shown = json.load(answer)
            except OSError:  # not loaded yet
                continue
    finally:
        program.kill()
    assert [(step, value) for _, step, value in shown] == [
        *((step, 3.0) for step in range(1, 6)), (6, 2.0), (7, 2.0), *((step, 1.0) for step in range(8, 13))]
