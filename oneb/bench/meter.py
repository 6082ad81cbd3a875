"""Clock and power of a GPU while something runs, by nvidia-smi."""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import threading
import time
from collections.abc import Iterator

_PERIOD_MS = 200


class Meter:
    """Samples the SM clock (MHz) and the board's power (W) five times a second.

    Args:
        gpu: index or UUID ("GPU-…") as nvidia-smi counts them, which pays no heed to CUDA_VISIBLE_DEVICES; None: no
            GPU, and no samples.
    """

    def __init__(self, gpu: str | None = "0") -> None:
        self.gpu = gpu
        self.samples: list[tuple[float, float, float]] = []

    @contextlib.contextmanager
    def running(self) -> Iterator[Meter]:
        """Sample while the body runs; without nvidia-smi there are no samples."""
        query = ["nvidia-smi", "-i", str(self.gpu), "-lms", str(_PERIOD_MS),
                 "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits"]
        try:
            if self.gpu is None:
                raise FileNotFoundError
            process = subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except FileNotFoundError:
            yield self
            return
        reader = threading.Thread(target=self._read, args=(process,), daemon=True)
        reader.start()
        try:
            yield self
        finally:
            process.terminate()
            reader.join()
            process.wait()

    def _read(self, process: subprocess.Popen) -> None:
        for line in process.stdout:
            with contextlib.suppress(ValueError):  # "[N/A]" where a card does not tell
                clock, watts = (float(part) for part in line.split(","))
                self.samples.append((time.time(), clock, watts))

    def between(self, start: float, end: float) -> dict[str, float | None]:
        """Median ``clock_mhz`` and ``watts`` of the samples from ``start`` to ``end`` (unix times), or None.

        Between two samples, those two count.
        """
        inside = [sample for sample in self.samples if start <= sample[0] <= end]
        if not inside:
            around = 2 * _PERIOD_MS / 1e3
            inside = [sample for sample in self.samples if start - around <= sample[0] <= end + around]
        if not inside:
            return {"clock_mhz": None, "watts": None}
        return {"clock_mhz": statistics.median(s[1] for s in inside), "watts": statistics.median(s[2] for s in inside)}


def with_energy(figures: dict[str, float | None], tok_s: float | None) -> dict[str, float | None]:
    """``figures`` of :meth:`Meter.between` with ``tokens_per_joule`` beside them."""
    watts = figures["watts"]
    return {**figures, "tokens_per_joule": tok_s / watts if tok_s and watts else None}


def driver_version() -> str | None:
    """The NVIDIA driver's version, or None without nvidia-smi."""
    try:
        done = subprocess.run(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"],
                              capture_output=True, text=True)
    except FileNotFoundError:
        return None
    return done.stdout.split("\n")[0].strip() or None
