"""The bench's parent process: starts a child a task, gathers their rows, keeps the results up to date. No torch."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from oneb.bench import results
from oneb.bench.children import Children, spread, tail
from oneb.bench.points import Point, Settings, configuration
from oneb.bench.results import Row
from oneb.data.sidecar import Sidecar, write_sidecar
from oneb.files import sha256_file
from oneb.units import format_count

RANDOM_TOKENS = "random_tokens.npy"
_DOCUMENT_TOKENS = 1000  # on average, about as in FineWeb-Edu


class Parent:
    """Measures ``tasks``, each in a process of its own.

    Args:
        tasks: lists of points; those of one task share a process, and differ in lengths and micro-batches only.
        settings: what all points share.
        out: the results file; written anew whenever a child has ended.
        command, commit: for the results.
        interpreter: the children's Python.
        further: options of the launcher, as words.
        timeout_s: longest time of a child.
        random_tokens: whether to write a token file, in place of ``settings.data``.

    Raises:
        OnebError: options of a point that do not go together, before anything is measured.
    """

    def __init__(
        self, tasks: Sequence[list[Point]], settings: Settings, *, out: Path, command: str, commit: str,
        interpreter: str, further: Sequence[str], timeout_s: float, random_tokens: bool,
    ) -> None:
        self.tasks, self.settings, self.out, self.command, self.commit = tasks, settings, out, command, commit
        self.interpreter, self.further, self.random_tokens = interpreter, list(further), random_tokens
        self._children = Children(timeout_s)
        self._rows: dict[int, list[Row]] = {}
        self._facts: dict[str, Any] = {}
        self._folder = Path()
        for task in tasks:
            for point in task:
                configuration(point, settings, "runs")

    @property
    def rows(self) -> list[Row]:
        """The rows so far, in the order of the tasks."""
        return [row for number in sorted(self._rows) for row in self._rows[number]]

    def run(self, places: Sequence[Mapping[str, str]]) -> bool:
        """Measure; ``places`` are the environments of the children, one child at a time in each.

        Returns:
            Whether it came to its end; False after Ctrl-C.
        """
        n_points = sum(map(len, self.tasks))
        print(f"{n_points} points in {len(self.tasks)} processes, {self.settings.total_steps} steps each", flush=True)
        with tempfile.TemporaryDirectory(prefix="oneb_bench_") as folder:
            self._folder = Path(folder)
            if self.random_tokens:
                self._write_random_tokens()
            try:
                spread(list(enumerate(self.tasks)), places, self._do, self._children)
            except KeyboardInterrupt:
                return False
        return True

    def _do(self, numbered: tuple[int, list[Point]], environment: Mapping[str, str]) -> None:
        number, points = numbered
        out, log = self._folder / f"{number}.json", self._folder / f"{number}.log"
        more = f" and {len(points) - 1} more" if len(points) > 1 else ""
        label = f"[{number + 1}/{len(self.tasks)}]"
        print(f"{label} {results.name(points[0].to_row())}{more}", flush=True)
        error = self._children.run(self._words(points, out), environment, log)
        record = results.load(out) if out.exists() else {"rows": []}
        rows = record.pop("rows")
        # A child that ends early leaves points without rows.
        rows += [{**point.to_row(), "error": error or "its process wrote no row", "log": tail(log)}
                 for point in points[len(rows):]]
        self._facts |= {key: value for key, value in record.items() if key not in ("command", "commit", "date")}
        self._rows[number] = rows
        for row in rows:
            print(f"{label} {results.line(row)}", flush=True)
        shared = any(len(task) > 1 for task in self.tasks)
        results.save(self.out, self.rows, command=self.command, commit=self.commit, **self._facts,
                     points_share_processes=shared)

    def _words(self, points: list[Point], out: Path) -> list[str]:
        """The child's command line."""
        first, settings = points[0], self.settings
        sizes = dict.fromkeys("auto" if point.batch_size is None else str(point.batch_size) for point in points)
        words = [
            self.interpreter, "-m", "oneb", "bench", "--one", "--variants", first.variant,
            "--lengths", *dict.fromkeys(str(point.seq_len) for point in points),
            "--precisions", first.precision, "--batch-size", *sizes,
            "--batch-tokens", str(settings.batch_tokens), "--size", settings.size, "--device", settings.device,
            "--data", settings.data, "--steps", str(settings.steps), "--warmup", str(settings.warmup),
            "--ceiling-seconds", str(settings.ceiling_s), "--commit", self.commit, "--out", str(out),
        ]
        words += ["--null-attn"] if settings.null_attn else []
        words += [] if settings.profile else ["--no-profile"]
        return words + (["--", *self.further] if self.further else [])

    def _write_random_tokens(self) -> None:
        """A token file as long as the longest run reads, once for all children; in documents, for ``--doc-mask``."""
        import numpy as np

        points = [point for task in self.tasks for point in task]
        a_step = max(max(self.settings.batch_tokens, (point.batch_size or 1) * point.seq_len) for point in points)
        # A tenth of a small file is its validation tail, which must hold a window.
        n_tokens = max(self.settings.total_steps * a_step * 5 // 4, 20 * max(point.seq_len for point in points))
        vocabulary = configuration(points[0], self.settings, "runs").model.vocab_size
        dtype = np.uint16 if vocabulary <= 2**16 else np.uint32
        path = self._folder / RANDOM_TOKENS
        chance = np.random.default_rng(0)
        ids = chance.integers(1, vocabulary, size=n_tokens, dtype=dtype)
        ids[chance.random(n_tokens) < 1 / _DOCUMENT_TOKENS] = 0
        np.save(path, ids)
        write_sidecar(path, Sidecar(
            tokens=n_tokens, documents=1 + int((ids == 0).sum()), encoding="random", vocab_size=vocabulary, eot=0,
            source="oneb bench", format=f"npy {np.dtype(dtype).name}", sha256=sha256_file(path), max_id=vocabulary - 1))
        print(f"no --data: {format_count(n_tokens)} random tokens take its place; their loss means nothing", flush=True)
        self.settings = dataclasses.replace(self.settings, data=str(path))
