"""Rows that survive kills and resumes, and the real W&B client without a network."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest

from oneb.config import Config, LogConfig
from oneb.errors import OnebError
from oneb.train.sinks import JsonlSink, WandbSink


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
    assert sink.warning is None
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


def test_steps_that_wandb_has_are_not_sent_again(run_dir):
    sink = WandbSink(wandb_config(), run_dir)
    sink._run._starting_step = 41  # what a resumed online run reports when its last step was 40
    sink.log(train_row(40, loss=9.0))
    sink.log(train_row(60, loss=2.0))
    sink.log(train_row(80))
    summary = sink._run.summary
    assert (summary["step"], summary["train/loss"]) == (60, 2.0)
    sink.close()


def test_without_a_login_the_run_goes_offline_and_says_so(run_dir):
    sink = WandbSink(wandb_config(wandb_mode="online"), run_dir)
    assert sink._run.offline
    assert "wandb login" in sink.warning
    assert f"wandb sync {run_dir}" in sink.warning
    sink.log(train_row(20))
    sink.close()


def test_a_network_that_refuses_does_not_stop_training(run_dir, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr("oneb.train.sinks._WANDB_INIT_TIMEOUT_S", 1.0)
    sink = WandbSink(wandb_config(wandb_mode="online"), run_dir)
    assert sink._run.offline
    assert "offline" in sink.warning
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
