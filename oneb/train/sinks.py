"""Where a run's rows go: ``train.jsonl``, which is the run's record, and Weights & Biases."""

from __future__ import annotations

import json
import math
import secrets
from pathlib import Path
from typing import Any, Protocol

from oneb.config import Config
from oneb.errors import OnebError
from oneb.files import atomic_writer, read_json_lines

# Rows that become W&B charts, and the prefix of their names there.
_WANDB_PREFIXES = ("train", "eval", "analysis")
_WANDB_ID_FILE = "wandb_id.txt"
# A machine without network must start training soon, and one that loses it must end.
_WANDB_INIT_TIMEOUT_S = 30.0
_WANDB_FINISH_TIMEOUT_S = 120.0


class Sink(Protocol):
    """Takes every row of a run, in order."""

    def log(self, row: dict[str, Any]) -> None:
        """Take one row; its ``type`` is meta, train, eval, analysis or event."""

    def close(self) -> None:
        """Write out what is held back. Nothing is logged afterwards."""


def finite(value: Any) -> Any:
    """``value`` with every NaN and infinity in it replaced by None, which JSON can hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(entry) for entry in value]
    return value


class JsonlSink:
    """One JSON object a line, each on disk as soon as it is logged.

    Args:
        path: ``train.jsonl``; made if it is not there.
        resume_step: the optimizer step that the run continues from; None for a run from step 0. What an earlier
            attempt wrote past that step is moved to ``train.cut-<n>.jsonl`` beside it, since this run writes
            those steps again.

    Raises:
        OnebError: the file is damaged before its last line.
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(path)
        if self.path.exists():
            self._cut(-1 if resume_step is None else resume_step)
        self._file = open(self.path, "ab")  # noqa: SIM115 (closed by close)

    def log(self, row: dict[str, Any]) -> None:
        """Append one row. NaN and infinities become null."""
        self._file.write(_line(row))
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _cut(self, last_step: int) -> None:
        try:
            rows = read_json_lines(self.path)
        except ValueError as error:
            raise OnebError(f"{error}; every line of it should be one JSON object: remove that line "
                            "to continue the run") from None
        kept = [row for row in rows if _step_of(row) <= last_step]
        cut = [row for row in rows if _step_of(row) > last_step]
        if cut:
            # First the copy, then the cut: a kill between the two loses nothing.
            _write_lines(_free_name(self.path), cut)
        # Written anew in any case: a torn last line must not run into the next row.
        _write_lines(self.path, kept)


def _step_of(row: dict[str, Any]) -> int:
    # A meta row stands before the steps that it describes.
    return row["start_step"] if row.get("type") == "meta" else row.get("step", 0)


def _line(row: dict[str, Any]) -> bytes:
    return (json.dumps(finite(row), allow_nan=False) + "\n").encode()


def _write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    with atomic_writer(path) as file:
        file.writelines(_line(row) for row in rows)


def _free_name(path: Path) -> Path:
    number = 1
    while (candidate := path.with_name(f"{path.stem}.cut-{number}{path.suffix}")).exists():
        number += 1
    return candidate


class WandbSink:
    """Charts on Weights & Biases, over our own step and tokens.

    A resumed run continues its W&B run: the id is ``--wandb-id``, else the one kept in ``wandb_id.txt`` of the run
    directory. Steps that W&B already has are not sent again. If W&B cannot be reached or refuses the login, the run
    is logged offline into the run directory instead.

    Args:
        config: the run; its ``log`` section decides project, entity, name, group, tags, mode and id.
        run_dir: the run directory; must exist.

    Attributes:
        warning: why logging is offline although online was asked for; None when all is well.

    Raises:
        OnebError: the wandb client is not installed, or takes none of these settings.
    """

    def __init__(self, config: Config, run_dir: Path) -> None:
        self.warning: str | None = None
        self._run = self._start(config, run_dir)
        self._run.define_metric("step")
        self._run.define_metric("tokens")
        for prefix in _WANDB_PREFIXES:
            self._run.define_metric(f"{prefix}/*", step_metric="step")

    def log(self, row: dict[str, Any]) -> None:
        """Chart a train, eval or analysis row; a meta row joins the W&B config; events stay in ``train.jsonl``."""
        if row["type"] == "meta":
            facts = {name: value for name, value in row.items() if name != "type"}
            self._run.config.update({"meta": facts}, allow_val_change=True)
        elif row["type"] in _WANDB_PREFIXES and row["step"] >= self._run.starting_step:
            self._run.log(_wandb_values(row), step=row["step"])

    def close(self) -> None:
        """Finish the W&B run; gives up uploading after two minutes (the data stays in the run directory)."""
        self._run.finish()

    def _start(self, config: Config, run_dir: Path) -> Any:
        try:
            import wandb
        except ImportError:
            raise OnebError("--wandb needs the W&B client, which is not installed; `python3 -m pip install wandb`, "
                            "or leave out --wandb") from None
        options = _wandb_options(config, run_dir)
        mode = config.log.wandb_mode
        try:
            run = wandb.init(**options, mode=mode, settings=_wandb_settings(wandb))
        except (wandb.errors.CommError, wandb.errors.UsageError) as error:
            self.warning = (f"W&B is not online ({_first_line(error)}); logging offline. After `wandb login`, upload "
                            f"with: wandb sync {run_dir}/wandb/offline-run-*")
            wandb.teardown()  # else the client still holds the run's id for the attempt that failed
            try:
                run = wandb.init(**options, mode="offline", settings=_wandb_settings(wandb))
            except wandb.errors.Error as second:
                raise OnebError(f"W&B does not take these settings: {_first_line(second)}; correct the --wandb-… "
                                "options, or leave out --wandb") from None
        if mode != "disabled":
            (run_dir / _WANDB_ID_FILE).write_text(run.id + "\n", encoding="utf-8")
        return run


def _wandb_options(config: Config, run_dir: Path) -> dict[str, Any]:
    log = config.log
    kept = run_dir / _WANDB_ID_FILE
    kept_id = kept.read_text(encoding="utf-8").strip() if kept.exists() else ""
    return {
        "project": log.wandb_project,
        "entity": log.wandb_entity,
        "name": log.wandb_name or run_dir.name,
        "group": log.wandb_group,
        "tags": [tag.strip() for tag in (log.wandb_tags or "").split(",") if tag.strip()] or None,
        "id": log.wandb_id or kept_id or secrets.token_hex(4),
        "resume": "allow",
        "config": config.to_dict(),
        "allow_val_change": True,
        "dir": str(run_dir),
    }


def _wandb_settings(wandb: Any) -> Any:
    """Short waits; and the console left alone, since it holds a progress line that is rewritten all the time."""
    limits = {"init_timeout": _WANDB_INIT_TIMEOUT_S, "login_timeout": _WANDB_INIT_TIMEOUT_S}
    if "finish_timeout" in getattr(wandb.Settings, "model_fields", {}):  # older clients have none
        limits["finish_timeout"] = _WANDB_FINISH_TIMEOUT_S
    return wandb.Settings(console="off", **limits)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def _wandb_values(row: dict[str, Any]) -> dict[str, Any]:
    """``{"type": "train", "step": 20, "loss": 3.0}`` -> ``{"step": 20, "train/loss": 3.0}``."""
    axes = {name: row[name] for name in ("step", "tokens") if name in row}
    values: dict[str, Any] = {}
    for name, value in row.items():
        if name not in ("type", "step", "tokens"):
            _flatten(f"{row['type']}/{name}", value, values)
    return axes | values


def _flatten(name: str, value: Any, into: dict[str, Any]) -> None:
    """Charts need scalars: dicts by key, lists by layer, and a layer's values by head as their mean."""
    if isinstance(value, dict):
        for key, entry in value.items():
            _flatten(f"{name}/{key}", entry, into)
    elif isinstance(value, list):
        for layer, entry in enumerate(value):
            _flatten(f"{name}/layer_{layer:02d}", sum(entry) / len(entry) if isinstance(entry, list) else entry, into)
    elif value is not None:
        into[name] = value
