"""Rows that survive kills and resumes, and the real W&B client without a network."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
from small_disk import fill

from oneb.config import Config, LogConfig
from oneb.errors import OnebError
from oneb.show import wandb_sink
from oneb.show.recorder import Recorder
from oneb.show.sinks import JsonlSink
from oneb.show.wandb_sink import WandbSink


def train_row(step: int, loss: float = 3.0) -> dict:
    return {"type": "train", "step": step, "tokens": step * 1024, "loss": loss, "mfu": None}


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_row_is_on_disk_at_once(tmp_path):
    sink = JsonlSink(tmp_path / "train.jsonl")
    sink.log(train_row(20))
    assert read(tmp_path / "train.jsonl") == [train_row(20)]
    sink.log(train_row(40))
    assert [row["step"] for row in read(tmp_path / "train.jsonl")] == [20, 40]
    sink.close()


def test_non_finite_floats_become_null_at_any_depth(tmp_path):
    sink = JsonlSink(tmp_path / "train.jsonl")
    sink.log({"type": "train", "step": 1, "loss": float("nan"), "norms": {"a": [1.0, float("inf"), (float("-inf"),)]}})
    sink.close()
    assert read(tmp_path / "train.jsonl") == [
        {"type": "train", "step": 1, "loss": None, "norms": {"a": [1.0, None, [None]]}}
    ]


def test_resuming_cuts_the_rows_past_the_checkpoint_and_keeps_them_aside(tmp_path):
    path = tmp_path / "train.jsonl"
    first = JsonlSink(path)
    first.log({"type": "meta", "start_step": 0})
    for step in (20, 40, 60):
        first.log(train_row(step))
    first.log({"type": "event", "step": 60, "event": "warning", "message": "late"})
    first.close()

    second = JsonlSink(path, resume_step=40)
    second.log({"type": "meta", "start_step": 40})
    second.log(train_row(60, loss=2.0))
    second.close()
    assert [(r["type"], r.get("step")) for r in read(path)] == [
        ("meta", None), ("train", 20), ("train", 40), ("meta", None), ("train", 60)
    ]
    assert [r["type"] for r in read(tmp_path / "train.cut-1.jsonl")] == ["train", "event"]

    JsonlSink(path, resume_step=20).close()
    assert [r.get("step", r.get("start_step")) for r in read(path)] == [0, 20]
    assert [r.get("step", r.get("start_step")) for r in read(tmp_path / "train.cut-2.jsonl")] == [40, 40, 60]


@pytest.mark.parametrize("torn", ['{"type": "train", "st', json.dumps(train_row(60)), "\0\0\0\0"])
def test_a_torn_last_line_never_runs_into_the_next_row(tmp_path, torn):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(train_row(20)) + "\n" + torn)
    sink = JsonlSink(path, resume_step=20)
    sink.log(train_row(40))
    sink.close()
    assert [row["step"] for row in read(path)] == [20, 40]


def test_a_run_from_step_0_sets_everything_older_aside(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps({"type": "meta", "start_step": 0}) + "\n" + json.dumps(train_row(20)) + "\n")
    JsonlSink(path).close()
    assert read(path) == []
    assert len(read(tmp_path / "train.cut-1.jsonl")) == 2


def test_a_run_without_rows_leaves_no_cut_file(tmp_path):
    JsonlSink(tmp_path / "train.jsonl").close()
    JsonlSink(tmp_path / "train.jsonl").close()
    assert [p.name for p in tmp_path.iterdir()] == ["train.jsonl"]


def test_damage_in_the_middle_is_named(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"type": "tr\n' + json.dumps(train_row(20)) + "\n")
    with pytest.raises(OnebError, match="line 1 is not JSON"):
        JsonlSink(path, resume_step=20)


def test_going_back_cuts_the_rows_that_come_again(tmp_path):
    path = tmp_path / "train.jsonl"
    sink = JsonlSink(path)
    for step in (20, 40, 60):
        sink.log(train_row(step))
    sink.rewind(40)
    sink.log(train_row(60, loss=2.0))
    sink.rewind(40)
    sink.log(train_row(60, loss=1.0))
    sink.close()
    assert read(path) == [train_row(20), train_row(40), train_row(60, loss=1.0)]
    assert read(tmp_path / "train.cut-1.jsonl") == [train_row(60)]
    assert read(tmp_path / "train.cut-2.jsonl") == [train_row(60, loss=2.0)]
    assert sink.warnings == []


def test_rows_that_a_full_disk_refuses_are_written_once_there_is_room(tmp_path, disk):
    folder = disk(2**20)
    sink = JsonlSink(folder / "train.jsonl")
    sink.log(train_row(1))
    large = fill(folder)
    for step in range(2, 300):  # the last block of the file takes some of them, and a part of one
        sink.log(train_row(step))
    there = read(folder / "train.jsonl")
    assert [row["step"] for row in there] == list(range(1, len(there) + 1))
    assert len(there) < 299
    assert len(sink.warnings) == 1
    assert "No space left" in sink.warnings[0]
    large.unlink()
    sink.log(train_row(300))
    sink.close()
    assert read(folder / "train.jsonl") == [train_row(step) for step in range(1, 301)]
    assert [f"the {299 - len(there)} rows kept in memory are in it" in warning for warning in sink.warnings] == [
        False, True]


def test_going_back_on_a_full_disk(tmp_path, disk):
    folder = disk(2**20)
    sink = JsonlSink(folder / "train.jsonl")
    for step in range(1, 101):
        sink.log(train_row(step))
    large = fill(folder)
    sink.rewind(50)
    for step in range(51, 101):
        sink.log(train_row(step, loss=2.0))
    assert read(folder / "train.jsonl") == [train_row(step) for step in range(1, 101)]
    large.unlink()
    sink.close()
    assert read(folder / "train.jsonl") == [train_row(step, loss=2.0 if step > 50 else 3.0) for step in range(1, 101)]
    assert read(folder / "train.cut-1.jsonl") == [train_row(step) for step in range(51, 101)]


def test_a_resume_on_a_full_disk_needs_room_only_for_what_it_cuts(tmp_path, disk):
    folder = disk(2**20)
    path = folder / "train.jsonl"
    path.write_text(json.dumps(train_row(20)) + "\n" + json.dumps(train_row(40)) + "\n" + '{"type": "tr')
    fill(folder)
    JsonlSink(path, resume_step=40).close()
    assert read(path) == [train_row(20), train_row(40)]
    with pytest.raises(OnebError, match="No space left.*make room"):
        JsonlSink(path, resume_step=20)
    assert read(path) == [train_row(20), train_row(40)]


def test_a_folder_that_is_away_for_a_while(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    sink = JsonlSink(folder / "train.jsonl")
    sink.log(train_row(20))
    sink.close()
    folder.rename(tmp_path / "away")
    sink.log(train_row(40))
    assert len(sink.warnings) == 1
    (tmp_path / "away").rename(folder)
    sink.log(train_row(60))
    sink.close()
    assert read(folder / "train.jsonl") == [train_row(step) for step in (20, 40, 60)]


def test_rows_that_are_lost_are_counted(tmp_path):
    sink = JsonlSink(tmp_path / "train.jsonl")
    (tmp_path / "train.jsonl").unlink()
    (tmp_path / "train.jsonl").mkdir()
    sink.log(train_row(20))
    sink.log(train_row(40))
    sink.close()
    assert "2 rows" in sink.warnings[-1]
    assert "are lost" in sink.warnings[-1]


@pytest.mark.parametrize("line", ["12", "null", "[1]", "{}", '{"type": 3}', '{"type": "train", "step": "20"}'])
def test_a_line_that_is_no_row_is_named(tmp_path, line):
    path = tmp_path / "train.jsonl"
    path.write_text(json.dumps(train_row(20)) + f"\n{line}\n" + json.dumps(train_row(40)) + "\n")
    with pytest.raises(OnebError, match="line 2 is no row"):
        JsonlSink(path, resume_step=40)


class Listener:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.rows: list[dict] = []
        self.rewinds: list[int] = []

    def log(self, row: dict) -> None:
        self.rows.append(row)

    def rewind(self, step: int) -> None:
        self.rewinds.append(step)

    def close(self) -> None:
        self.warnings.append("closed")


def eval_row(step: int) -> dict:
    return {"type": "eval", "step": step, "tokens": step * 1024, "val_loss": 3.0}


def test_an_evaluation_that_is_made_again_is_recorded_once(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (train_row(20), train_row(40), eval_row(40))))
    shown, charted = Listener(), Listener()
    recorder = Recorder(tmp_path, shown, [shown])
    recorder.add(JsonlSink(path, resume_step=40))  # saved before its evaluation
    recorder.add(charted)
    recorder.log(eval_row(40))
    recorder.log(train_row(60))
    recorder.log(eval_row(60))
    recorder.rewind(40)
    recorder.log(eval_row(40))
    recorder.log(eval_row(60))
    assert [row["step"] for row in shown.rows if row["type"] == "eval"] == [40, 60, 40, 60]
    assert [row["step"] for row in charted.rows if row["type"] == "eval"] == [60, 60]
    assert charted.rewinds == [40]
    assert [(row["type"], row["step"]) for row in read(path)] == [
        ("train", 20), ("train", 40), ("eval", 40), ("eval", 60)]


def test_what_goes_wrong_in_a_sink_is_recorded_by_all(tmp_path):
    shown, charted = Listener(), Listener()
    recorder = Recorder(tmp_path, shown, [shown])
    recorder.add(JsonlSink(tmp_path / "train.jsonl"))
    recorder.add(charted)
    charted.warnings.append("odd")
    recorder.log(train_row(20))
    recorder.remove(charted)
    recorder.log(train_row(40))
    wanted = [("train", None, 20), ("event", "odd", 20), ("event", "closed", 20), ("train", None, 40)]
    for rows in (shown.rows, read(tmp_path / "train.jsonl")):
        assert [(row["type"], row.get("message"), row["step"]) for row in rows] == wanted
    assert [row["step"] for row in charted.rows] == [20, 20]


def wandb_config(**log) -> Config:
    return dataclasses.replace(Config(), log=dataclasses.replace(LogConfig(wandb=True, wandb_mode="offline"), **log))


@pytest.fixture
def run_dir(tmp_path, monkeypatch) -> Path:
    """A run directory, with a W&B client that has no login and sees nothing of this machine's settings."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "home" / "netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_SILENT", "true")
    directory = tmp_path / "oneb_decoupled_seed1337"
    directory.mkdir()
    return directory


def test_wandb_offline_logs_and_a_resumed_run_keeps_its_id(run_dir):
    sink = WandbSink(wandb_config(wandb_tags="oneb, decoupled", wandb_group="g"), run_dir)
    run = sink._run
    assert sink.warnings == []
    assert (run.offline, run.name, run.group, run.tags) == (True, run_dir.name, "g", ("oneb", "decoupled"))
    assert run.config["model"]["d_model"] == 2048
    sink.log({"type": "meta", "start_step": 0, "device": "cpu"})
    sink.log(train_row(20))
    sink.log({"type": "eval", "step": 20, "tokens": 20480, "val_loss": 3.1})
    sink.log({"type": "analysis", "step": 20, "grad_rms": {"embedding": 0.5},
              "by_layer": [1.0, 2.0], "by_head": [[1.0, 3.0]]})
    sink.log({"type": "event", "step": 20, "event": "warning", "message": "no chart"})
    sink.log(train_row(40))  # the client holds a step's values back until the next step
    summary = dict(run.summary)
    sink.close()
    assert run.config["meta"]["device"] == "cpu"
    assert {k: v for k, v in summary.items() if not k.startswith("_")} == {
        "step": 20, "tokens": 20480, "train/loss": 3.0, "eval/val_loss": 3.1, "analysis/grad_rms/embedding": 0.5,
        "analysis/by_layer/layer_00": 1.0, "analysis/by_layer/layer_01": 2.0, "analysis/by_head/layer_00": 2.0,
    }
    kept = (run_dir / "wandb_id.txt").read_text().strip()
    assert kept == run.id
    assert list(run_dir.glob(f"wandb/offline-run-*-{kept}/run-{kept}.wandb"))

    resumed = WandbSink(wandb_config(), run_dir)
    assert resumed._run.id == kept
    resumed.close()

    asked = WandbSink(wandb_config(wandb_id="mine", wandb_name="other"), run_dir)
    assert (asked._run.id, asked._run.name) == ("mine", "other")
    asked.close()
    assert (run_dir / "wandb_id.txt").read_text().strip() == "mine"


def test_without_a_login_the_run_goes_offline_and_says_so(run_dir):
    sink = WandbSink(wandb_config(wandb_mode="online"), run_dir)
    assert sink._run.offline
    assert "wandb login" in sink.warnings[0]
    assert f"wandb sync {run_dir}" in sink.warnings[0]
    sink.log(train_row(20))
    sink.close()


def test_a_network_that_refuses_does_not_stop_training(run_dir, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    waits, settings = iter([1.0, 120.0]), wandb_sink._settings  # online, and then offline, which has to begin

    def next_settings(wandb):
        monkeypatch.setattr(wandb_sink, "_INIT_TIMEOUT_S", next(waits))
        return settings(wandb)

    monkeypatch.setattr(wandb_sink, "_settings", next_settings)
    sink = WandbSink(wandb_config(wandb_mode="online"), run_dir)
    assert sink._run.offline
    assert "offline" in sink.warnings[0]
    sink.close()


def test_wandb_disabled_leaves_nothing_behind(run_dir):
    sink = WandbSink(wandb_config(wandb_mode="disabled"), run_dir)
    sink.log(train_row(20))
    sink.close()
    assert list(run_dir.iterdir()) == []


def test_wandb_absent(run_dir, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(OnebError, match="python3 -m pip install wandb"):
        WandbSink(wandb_config(), run_dir)
