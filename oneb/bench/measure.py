"""One point of the bench: a real run of the trainer, timed step by step, profiled, and set beside its ceilings."""

from __future__ import annotations

import dataclasses
import gc
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import sdpa_kernel

from oneb import accounting
from oneb.bench.breakdown import Profile, breakdown
from oneb.bench.ceilings import Cache, measure_ceilings
from oneb.bench.meter import Meter, driver_version, with_energy
from oneb.bench.points import PROFILE_LEAD_IN, PROFILE_STEPS, Point, Settings, configuration
from oneb.bench.results import Row
from oneb.checkpoints.rundir import RunDirectory
from oneb.config import Config, compute_dtype
from oneb.fit import PhaseFit
from oneb.kernels.attention import SDP_BACKENDS
from oneb.kernels.runtime import triton_available
from oneb.model.transformer import DTYPES
from oneb.planner import mfu
from oneb.roofline import EXPONENTIALS_PER_CLOCK, gemm_seconds, gemms, predict, table_ceilings, table_speed
from oneb.show.recorder import Recorder, open_recorder
from oneb.train.clock import StepClock
from oneb.train.device import Device, open_device
from oneb.train.resume import StartingPoint
from oneb.train.setup import Parts, build
from oneb.train.signals import StopRequest
from oneb.train.trainer import Trainer

# Events of a run that its row repeats.
_NOTED = ("warning", "fit", "out_of_memory")


class Bench:
    """Measures points, one after another, in this process.

    Args:
        settings: what all points share.
        folder: for run directories and traces; must exist.
    """

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.settings = settings
        self.folder = folder
        self.device = open_device(settings.device)
        self._ceilings: Cache = {}
        self._measured = 0

    def facts(self) -> dict[str, Any]:
        """What the rows were measured on: gpu, torch, triton, driver, python."""
        return {"gpu": self.device.name, "torch": torch.__version__, "triton": _triton_version(),
                "driver": driver_version() if self.device.is_cuda else None, "python": platform.python_version()}

    def row(self, point: Point) -> Row:
        """Everything measured at ``point``; a point that fails is a row with its ``error``."""
        self._measured += 1
        row = {**point.to_row(), "size": self.settings.size, "null_attn": self.settings.null_attn,
               "options": self.settings.given, "point_of_process": self._measured, "error": None}
        try:
            row |= self._measure(point)
        except torch.OutOfMemoryError as error:
            row["error"] = f"out of memory: {str(error).splitlines()[0]}"
        except Exception as error:  # fallback: the other points go on, and the row says what happened to this one
            row["error"] = f"{type(error).__name__}: {error}"
        finally:
            # What a point leaves behind must not be the next one's: memory, compiled graphs, the peak so far.
            torch.compiler.reset()
            self._free()
        return row

    def _free(self) -> None:
        gc.collect()
        if self.device.is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def _measure(self, point: Point) -> Row:
        directory = RunDirectory(self.folder / f"run{self._measured}", is_new=True)
        directory.path.mkdir()
        parts = build(configuration(point, self.settings, str(self.folder)), print)
        config = parts.config
        with Meter(gpu_uuid() if self.device.is_cuda else None).running() as meter:
            watch, phase = self._run(point, parts, directory)
        row = _identity(parts, phase, self.settings) | watch.figures(meter)
        row["mfu"] = mfu(config, row["tok_s"], point.seq_len, self.device.gpu)
        row["expected_tok_s"] = self._expected(config, phase)
        if self._measured > 1:
            row["first_step_s"] = None  # counted from the process's start, it would hold the points before
        if watch.profile:
            row["breakdown"] = breakdown(watch.profile.path, lead_in=PROFILE_LEAD_IN, steps=PROFILE_STEPS,
                                         micro_batches=phase.grad_accum)
            watch.profile.path.unlink()
            if row["breakdown"] is None:
                row["notes"] = [*row["notes"], "the profiler saw no kernel here, so there is no breakdown"]
        # The ceilings' operands need the room that the model takes.
        del parts, watch
        self._free()
        return row | self._beside(config, phase, row)

    def _run(self, point: Point, parts: Parts, directory: RunDirectory) -> tuple[Watch, PhaseFit]:
        """The run as it was watched, and its micro-batch and recomputation at the end."""
        profile = None
        if self.settings.profile and self.device.is_cuda:
            profile = Profile(directory.path / "trace.json")
        watch = Watch(self.device, self.settings, parts.config.train.sequences(point.seq_len), profile)
        with StopRequest() as stop, open_recorder(parts.config, directory) as recorder, \
                sdpa_kernel(SDP_BACKENDS[parts.backend]):
            trainer = Trainer(parts, directory, _WatchedRecorder(recorder, watch), stop, StartingPoint())
            trainer.clock = watch.clock
            trainer.describe()
            trainer.run()
            if stop.signum:
                raise SystemExit(stop.exit_code)
        return watch, trainer.fit.at(point.seq_len)

    def _expected(self, config: Config, phase: PhaseFit) -> float | None:
        """Tokens a second that a plan would promise; None on cards that are not in the table."""
        if self.device.gpu is None:
            return None
        speed = table_speed(config, self.device.gpu)
        return speed(phase.seq_len, phase.batch_size, phase.grad_accum, phase.recomputed_layers)

    def _beside(self, config: Config, phase: PhaseFit, row: Row) -> Row:
        """Ceilings at this point's shapes, and what a roofline ("predicted") makes of them."""
        eight_bit = config.train.precision == "fp8" and self.device.is_cuda
        found = gemms(config.model, phase.batch_size * phase.seq_len, eight_bit)
        exponentials = _exponentials_per_s(self.device, row["clock_mhz"])
        if self.settings.ceiling_s > 0:
            ceilings = measure_ceilings(found, self.device, DTYPES[compute_dtype(config.train)],
                                        self.settings.ceiling_s, self._ceilings, exponentials)
        elif self.device.gpu:
            ceilings = table_ceilings(self.device.gpu, found, exponentials)
        else:
            return {"ceilings": None, "predicted": None, "gemm": None}
        flops = sum(p.flops for p in found) * phase.grad_accum
        seconds = gemm_seconds(found, ceilings) * phase.grad_accum
        gemm_ms = row["breakdown"] and row["breakdown"]["ms"]["gemm"]
        return {
            "ceilings": ceilings.to_dict(found),
            "predicted": predict(config, phase.seq_len, ceilings, batch_size=phase.batch_size,
                                 grad_accum=phase.grad_accum, recomputed_layers=phase.recomputed_layers,
                                 eight_bit=eight_bit),
            # A step's products: FLOPs, seconds at the ceilings, and what they took (recomputed ones included).
            "gemm": {"flops": flops, "ceiling_ms": seconds * 1e3, "ceiling_tflops": flops / seconds / 1e12,
                     "ms": gemm_ms, "tflops": gemm_ms and flops / gemm_ms / 1e9},
        }


class Watch:
    """Told after each step: notes the time on the device's own clock, and opens and closes the profiled window."""

    def __init__(self, device: Device, settings: Settings, batch_sequences: int, profile: Profile | None) -> None:
        self.device, self.settings, self.profile = device, settings, profile
        self.batch_sequences = batch_sequences
        self.clock = _WaitClock(device.synchronize)
        self.rows: list[Row] = []
        self.peak_gib: float | None = None
        self._marks: list[Any] = []
        self._window = [0.0, 0.0]  # unix times

    def after(self, step: int) -> None:
        """``step`` steps have been asked of the device. Waits for it at both ends of the timed window only."""
        first, last = self.settings.warmup, self.settings.warmup + self.settings.steps
        if first <= step <= last:
            self._marks.append(self._mark())
        if step in (first, last):
            self.device.synchronize()
            self._window[step == last] = time.time()
        if step == last:
            self.peak_gib = self.device.peak_gib()
        if self.profile and step > last:
            self.profile.mark()
        if self.profile and step == last:
            self.profile.start()
        if self.profile and step == self.settings.total_steps:
            self.profile.stop()

    def _mark(self) -> Any:
        if not self.device.is_cuda:
            self.device.synchronize()
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def figures(self, meter: Meter) -> Row:
        """Speed, waiting, memory, energy of the timed steps."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        if self.device.is_cuda:
            times = np.array([before.elapsed_time(after) for before, after in pairs])  # ms
        else:
            times = np.array([after - before for before, after in pairs]) * 1e3
        of_type = {kind: [row for row in self.rows if row["type"] == kind] for kind in ("train", "event")}
        median = float(np.median(times))
        (seq_len,) = {row["seq_len"] for row in of_type["train"]}
        tok_s = seq_len * self.batch_sequences / median * 1e3
        p10, p90 = (float(value) for value in np.percentile(times, [10, 90]))
        # The clock hears of every step but the run's first.
        waits = self.clock.waits_s[self.settings.warmup - 1:][:self.settings.steps]
        return {
            "steps": self.settings.steps, "tok_s": tok_s, "step_ms": median, "step_ms_p10": p10, "step_ms_p90": p90,
            "step_ms_mean": float(times.mean()), "data_ms": float(np.mean(waits)) * 1e3, "memory_gib": self.peak_gib,
            "first_step_s": next(r["since_start_s"] for r in of_type["event"] if r["event"] == "first_step"),
            "recompiles": sum(row["event"] == "recompile" for row in of_type["event"]),
            "skipped": of_type["train"][-1]["skipped"], "loss": of_type["train"][-1]["loss"], "breakdown": None,
            "notes": [row["message"] for row in of_type["event"] if row["event"] in _NOTED],
            **with_energy(meter.between(*self._window), tok_s),
        }


class _WatchedRecorder(Recorder):
    """A run's recorder that also tells the watch."""

    def __init__(self, recorder: Recorder, watch: Watch) -> None:
        super().__init__(recorder.directory, recorder.display, recorder.sinks)
        self._watch = watch

    def log(self, row: Row) -> None:
        super().log(row)
        self._watch.rows.append(row)

    def advance(self, step: int) -> None:
        super().advance(step)
        self._watch.after(step)


class _WaitClock(StepClock):
    """A run's clock that also keeps each step's wait for its data, in seconds."""

    def __init__(self, synchronize: Any) -> None:
        super().__init__(synchronize)
        self.waits_s: list[float] = []

    def step(self, waited_s: float) -> None:
        super().step(waited_s)
        self.waits_s.append(waited_s)


def gpu_uuid() -> str:
    """How nvidia-smi knows the GPU that torch uses, whatever CUDA_VISIBLE_DEVICES hides."""
    uuid = getattr(torch.cuda.get_device_properties(torch.cuda.current_device()), "uuid", None)
    return str(torch.cuda.current_device()) if uuid is None else f"GPU-{uuid}"


def _identity(parts: Parts, phase: PhaseFit, settings: Settings) -> Row:
    config, train, seq_len = parts.config, parts.config.train, phase.seq_len
    return {
        "parameters": sum(accounting.parameter_counts(config.model).values()),
        "flops_per_token": accounting.flops_per_token(config.model, seq_len, config.data.doc_mask),
        "batch_size": phase.batch_size, "grad_accum": phase.grad_accum, "recomputed_layers": phase.recomputed_layers,
        "warmup": settings.warmup,
        "tokens_per_step": train.sequences(seq_len) * seq_len, "data": Path(settings.data).name,
        "compute_dtype": compute_dtype(train), "train": dataclasses.asdict(train),
        "optimizer": config.optim.optimizer, "attention_backend": parts.backend,
    }


def _exponentials_per_s(device: Device, clock_mhz: float | None) -> float | None:
    if not device.is_cuda or clock_mhz is None:
        return None
    properties = torch.cuda.get_device_properties(device.torch)
    return properties.multi_processor_count * EXPONENTIALS_PER_CLOCK * clock_mhz * 1e6


def _triton_version() -> str | None:
    if not triton_available():
        return None
    import triton

    return triton.__version__
