"""A run's charts on Weights & Biases. Whatever becomes of it, of its server or of its client, the run goes on."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from oneb.config import Config
from oneb.errors import OnebError
from oneb.files import write_text
from oneb.show.sinks import CHARTED, chart_values, check_installed

_ID_FILE = "wandb_id.txt"
# A machine without network must start training soon, and one that is about to be taken away must end soon.
_INIT_TIMEOUT_S = 30.0
_FINISH_TIMEOUT_S = 15.0
# The client ends its own waits after so long; beyond that and this, it is stuck, and is left behind.
_STUCK_S = 15.0
_TEARDOWN_S = 5.0


class WandbSink:
    """Charts on Weights & Biases, over our own step and tokens.

    A resumed run continues its W&B run: the id is ``--wandb-id``, else the one kept in ``wandb_id.txt`` of the run
    directory. W&B cannot take a step back, so steps that it has are not sent again: after a resume or a rollback its
    charts go on behind the newest step that they show. If W&B cannot be reached or refuses the login, the run is logged
    offline into the run directory instead; if its client dies, no more is logged.

    Args:
        config: the run; its ``log`` section decides project, entity, name, group, tags, mode and id.
        run_dir: the run directory; must exist.
        newest_step: the highest step that an earlier attempt at this run has logged; -1 for none.

    Attributes:
        warnings: what W&B does not do as asked for.

    Raises:
        OnebError: the wandb client is not installed, or takes none of these settings.
    """

    def __init__(self, config: Config, run_dir: Path, newest_step: int = -1) -> None:
        check_installed("--wandb", "wandb", "the W&B client")
        self.warnings: list[str] = []
        self._run_dir = run_dir
        self._works = True
        self._next_step = 0
        continues = (run_dir / _ID_FILE).exists()
        self._run = self._start(config, run_dir)
        if self._run:
            # An offline client does not know what was logged before.
            self._next_step = newest_step + 1 if continues and self._run.offline else self._run.starting_step
            self._try(self._define_axes)
        self._newest_step = self._next_step - 1

    def log(self, row: dict[str, Any]) -> None:
        """Chart a train, eval or analysis row; a meta row joins the W&B config; events stay in ``train.jsonl``."""
        if row["type"] == "meta":
            facts = {name: value for name, value in row.items() if name != "type"}
            self._try(lambda: self._run.config.update({"meta": facts}, allow_val_change=True))
        elif row["type"] in CHARTED and row["step"] >= self._next_step:
            self._newest_step = max(self._newest_step, row["step"])
            axes = {name: row[name] for name in ("step", "tokens") if name in row}
            self._try(lambda: self._run.log(axes | chart_values(row), step=row["step"]))

    def rewind(self, step: int) -> None:
        """Nothing up to the newest step that was logged is logged again."""
        self._next_step = self._newest_step + 1

    def close(self) -> None:
        """Finish the W&B run; gives up uploading after a while (the data stays in the run directory)."""
        if self._works:
            if not _done_within(_FINISH_TIMEOUT_S + _STUCK_S, lambda: self._try(self._run.finish)):
                self._works = False
                self.warnings.append("the W&B client does not answer, and is left behind")
            elif getattr(self._run, "_finish_timed_out", False):
                self.warnings.append(f"W&B has not taken all in {_FINISH_TIMEOUT_S:.0f} s; upload the rest with: "
                                     f"wandb sync --include-online {self._run_dir}/wandb/run-*")
        # Even one that hangs takes away the client's own wait, without an end, at the interpreter's exit.
        _done_within(_TEARDOWN_S, _teardown)

    def _try(self, work: Callable[[], None]) -> None:
        if not self._works:
            return
        try:
            work()
        except Exception as error:  # fallback: charts must not end a run, and the client raises anything when it dies
            if self._works:  # and was not left behind meanwhile
                self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._works = False
        self.warnings.append(f"W&B has failed ({type(error).__name__}: {_first_line(error)}) and gets no more of this "
                             f"run; train.jsonl has its rows, {self._run_dir}/wandb what W&B had taken")

    def _define_axes(self) -> None:
        self._run.define_metric("step")
        self._run.define_metric("tokens")
        for prefix in CHARTED:
            self._run.define_metric(f"{prefix}/*", step_metric="step")

    def _start(self, config: Config, run_dir: Path) -> Any:
        """The client's run, online or offline; None where it can be neither."""
        import wandb

        options = _options(config, run_dir)
        mode = config.log.wandb_mode
        try:
            run = wandb.init(**options, mode=mode, settings=_settings(wandb))
        except Exception as error:  # fallback: no network, no login, or a client that cannot run
            self.warnings.append(f"W&B is not online ({_first_line(error)}); logging offline. After `wandb login`, "
                                 f"upload with: wandb sync {run_dir}/wandb/offline-run-*")
            # Else the client still holds the run's id for the attempt that failed. Its process may try again for hours.
            _done_within(_TEARDOWN_S, _teardown)
            try:
                run = wandb.init(**options, mode="offline", settings=_settings(wandb))
            except wandb.errors.UsageError as second:
                raise OnebError(f"W&B does not take these settings: {_first_line(second)}; correct the --wandb-… "
                                "options, or leave out --wandb") from None
            except Exception as second:  # fallback: training needs no charts
                self._give_up(second)
                return None
        if mode != "disabled":
            write_text(run_dir / _ID_FILE, run.id + "\n")
        return run


def _teardown() -> None:
    """End the client's process, which else is waited for when the interpreter exits."""
    import wandb

    with contextlib.suppress(Exception):  # fallback: it is dead already, which whoever noticed it has said
        wandb.teardown()


def _done_within(seconds: float, work: Callable[[], None]) -> bool:
    """Do ``work`` in a thread that does not outlive the process; whether it came to an end in time."""
    thread = threading.Thread(target=work, name="oneb-wandb", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _options(config: Config, run_dir: Path) -> dict[str, Any]:
    log = config.log
    kept = run_dir / _ID_FILE
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


def _settings(wandb: Any) -> Any:
    """Short waits; and the console left alone, since it holds a progress line that is rewritten all the time."""
    limits = {"init_timeout": _INIT_TIMEOUT_S, "login_timeout": _INIT_TIMEOUT_S}
    if "finish_timeout" in getattr(wandb.Settings, "model_fields", {}):  # older clients have none
        limits["finish_timeout"] = _FINISH_TIMEOUT_S
    return wandb.Settings(console="off", **limits)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".")
