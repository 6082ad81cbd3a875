"""Data that fails under a run: whole nano runs, real files, real damage."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from data_helpers import write_npy

from oneb.checkpoints.checkpoint import load_checkpoint
from oneb.cli.train import main
from oneb.data.loader import BatchLoader
from oneb.data.order import BatchOrder
from oneb.data.reading import OpenFile, TokenFile
from oneb.data.tokens import open_tokens
from oneb.errors import OnebError
from oneb.files import read_json_lines

REPOSITORY = Path(__file__).resolve().parents[1]
VOCAB = 257
N_TOKENS = 200_000
NPY_HEADER = 128
META = {"tokens": N_TOKENS, "encoding": "bytes", "vocab_size": VOCAB, "max_id": 256, "eot": 256}


def random_ids(seed: int = 0, n_tokens: int = N_TOKENS) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, n_tokens)


def words(root: Path, data: Path, steps: int, *more: str) -> list[str]:
    """Options of a run of some milliseconds a step."""
    return ["--size", "nano", "--vocab-size", str(VOCAB), "--layers", "1", "--d-model", "32", "--n-head", "2",
            "--data", str(data), "--device", "cpu", "--train-seq-len", "32", "--batch-size", "2", "--grad-accum", "1",
            "--steps", str(steps),
            "--log-every", "1", "--eval-every", "0", "--eval-iters", "1", "--live", "basic", "--run-root", str(root),
            "--lr", "1e-3", "--lr-schedule", "constant", "--warmup-steps", "2", *more]


@contextlib.contextmanager
def running(root: Path, data: Path) -> Iterator[subprocess.Popen]:
    """The trainer in a process and a process group of its own, some steps into its run."""
    # Its output in a file: it would wait for whoever is to empty a pipe.
    with open(output_of(root), "w") as output:
        process = subprocess.Popen([sys.executable, "-m", "oneb.train", *words(root, data, 10**6)], cwd=REPOSITORY,
                                   stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        wait_until(lambda: last_step(root) >= 5, process, root)
        yield process
    finally:
        process.kill()
        process.wait()


def output_of(root: Path) -> Path:
    return root.with_name("output.txt")


def ended(process: subprocess.Popen, root: Path, code: int) -> str:
    """What it printed, once it has ended with that code."""
    process.wait(300)
    output = output_of(root).read_text()
    assert process.returncode == code, output
    return output


def wait_until(holds, process: subprocess.Popen, root: Path) -> None:
    deadline = time.monotonic() + 300
    while not holds():
        assert process.poll() is None, output_of(root).read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def rows_of(root: Path) -> list[dict]:
    found = list(root.glob("*/train.jsonl"))
    return read_json_lines(found[0]) if found else []


def losses(root: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in rows_of(root) if row["type"] == "train"}


def last_step(root: Path) -> int:
    return max(losses(root), default=0)


def ends_with_mistake(process: subprocess.Popen, root: Path) -> str:
    """Waits for the end that a user's mistake has, with the last step saved; gives the message."""
    output = ended(process, root, 2)
    assert "Traceback" not in output
    (checkpoint,) = root.glob("*/last.pt")
    assert load_checkpoint(checkpoint)["step"] == last_step(root) >= 5
    return output.split("error: ")[-1]


def resumes(root: Path, data: Path) -> None:
    step = last_step(root)
    assert main(words(root, data, step + 3, "--resume")) == 0
    assert last_step(root) == step + 3


# -- In the middle of a run ----------------------------------------------------------------------

def test_a_file_that_is_replaced_is_read_on_and_refused_at_resume(tmp_path, capsys):
    data, root = write_npy(tmp_path / "x.npy", random_ids(), meta=META), tmp_path / "runs"
    other = write_npy(tmp_path / "y.npy", random_ids(1), meta=META)
    with running(root, data) as process:
        data.unlink()
        deleted_at = last_step(root)
        wait_until(lambda: last_step(root) >= deleted_at + 15, process, root)  # more than what was read ahead
        os.replace(other, data)
        wait_until(lambda: last_step(root) >= deleted_at + 30, process, root)
        process.send_signal(signal.SIGTERM)
        ended(process, root, 143)
    done = last_step(root)
    same = write_npy(tmp_path / "z.npy", random_ids(), meta=META)
    assert main(words(tmp_path / "undisturbed", same, done)) == 0
    assert losses(root) == losses(tmp_path / "undisturbed")
    capsys.readouterr()
    assert main(words(root, data, done + 3, "--resume")) == 2
    assert "is not the data that" in capsys.readouterr().err
    assert last_step(root) == done
    resumes(root, write_npy(data, random_ids(), meta=META))


def test_a_file_that_is_cut_short_ends_the_run_with_its_place_and_the_last_step_saved(tmp_path):
    data, root = write_npy(tmp_path / "x.npy", random_ids(), meta=META), tmp_path / "runs"
    with running(root, data) as process:
        os.truncate(data, NPY_HEADER + 2 * 1000 + 1)
        message = ends_with_mistake(process, root)
    assert message.startswith(f"{data} now ends before token offset ")
    offset, byte = map(int, re.search(r"token offset (\d+) \(byte (\d+)\);", message).groups())
    assert 1000 <= offset < N_TOKENS
    assert byte == NPY_HEADER + 2 * offset + (offset == 1000)
    assert "continues with --resume" in message
    assert main(words(root, data, 10**6, "--resume")) == 2  # as it is, it is no data
    resumes(root, write_npy(data, random_ids(), meta=META))


def test_ids_beyond_the_vocabulary_written_under_a_run_are_found_on_the_host(tmp_path):
    data, root = write_npy(tmp_path / "x.npy", random_ids(), meta=META), tmp_path / "runs"
    with running(root, data) as process:
        with open(data, "r+b") as file:
            file.seek(NPY_HEADER)
            file.write(np.full(N_TOKENS, VOCAB, "<u2").tobytes())
        message = ends_with_mistake(process, root)
    assert message.startswith(f"{data}: token id {VOCAB} at token offset ")
    assert 0 <= int(message.split("token offset ")[1].split()[0]) < N_TOKENS
    resumes(root, write_npy(data, random_ids(), meta=META))


@contextlib.contextmanager
def disk_image(folder: Path, mib: int, fill) -> Iterator[tuple[Path, Path]]:
    """A file system in a file, (image, where it is mounted), read-only and with nothing of it in memory.

    ``fill`` writes its content into a folder.
    """
    image, place = folder / "image", folder / "disk"
    place.mkdir()
    os.close(os.open(image, os.O_CREAT | os.O_WRONLY))
    os.truncate(image, mib * 2**20)

    def command(*arguments: str) -> None:
        try:
            subprocess.run(arguments, check=True, capture_output=True, text=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"a disk that fails needs the right to mount one here: {error}")

    command("mkfs.ext4", "-q", "-F", str(image))
    for options in ("loop", "loop,ro"):
        command("mount", "-o", options, str(image), str(place))
        try:
            if options == "loop":
                fill(place)
            else:
                yield image, place
        finally:
            subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fails_ends_the_run_with_the_place_and_the_last_step_saved(tmp_path):
    n_tokens, root = 8_000_000, tmp_path / "runs"

    def fill(folder: Path) -> None:
        write_npy(folder / "x.npy", random_ids(0, n_tokens), meta=META | {"tokens": n_tokens})

    with disk_image(tmp_path, 32, fill) as (image, folder):
        with running(root, folder / "x.npy") as process:
            os.truncate(image, 2**21)  # whatever is behind that is EIO
            with open(folder / "x.npy") as file:  # unless it is in memory, by now perhaps all of it
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            message = ends_with_mistake(process, root)
        assert message.startswith(f"{folder / 'x.npy'} cannot be read any more, at token offset ")
        assert "Input/output error" in message
        assert "continues with --resume" in message
    data = write_npy(tmp_path / "x.npy", random_ids(0, n_tokens), meta=META | {"tokens": n_tokens})
    resumes(root, data)


def of_threads(process: subprocess.Popen, name: str) -> dict[str, str]:
    """That file of /proc, by the thread's number."""
    found = {}
    for path in Path("/proc", str(process.pid), "task").glob(f"*/{name}"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has ended meanwhile
            found[path.parent.name] = path.read_text()
    return found


def test_ctrl_c_to_the_whole_group_finds_no_helper_process_and_the_loader_deaf(tmp_path):
    data, root = write_npy(tmp_path / "x.npy", random_ids(), meta=META), tmp_path / "runs"
    tasks = Path("/proc/self/task")
    if not (tasks / str(os.getpid()) / "children").exists():
        pytest.skip("the system does not say which children a process has")
    with running(root, data) as process:
        children, status = of_threads(process, "children"), of_threads(process, "status")
        assert set(children.values()) == {""}
        blocked = {thread: int(text.split("SigBlk:")[1].split()[0], 16) for thread, text in status.items()}
        stops = sum(1 << number - 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        assert stops in (mask & stops for mask in blocked.values())  # the loader's thread
        assert blocked[str(process.pid)] & stops == 0  # the main thread
        os.killpg(process.pid, signal.SIGINT)
        ended(process, root, 130)
    (checkpoint,) = root.glob("*/last.pt")
    assert load_checkpoint(checkpoint)["step"] == last_step(root)


# -- Before a run --------------------------------------------------------------------------------

def wrong_dtype(path: Path) -> None:
    np.save(path, np.zeros(N_TOKENS, np.float32))


def corrupt_header(path: Path) -> None:
    content = bytearray(write_npy(path, random_ids()).read_bytes())
    content[20:60] = bytes(40)
    path.write_bytes(content)


def cut_short(path: Path) -> None:
    os.truncate(write_npy(path, random_ids()), NPY_HEADER + 2 * 5000)


def bad_id(path: Path) -> None:
    ids = random_ids()
    ids[123_456] = VOCAB
    write_npy(path, ids)


def sidecar_of_another(path: Path) -> None:
    write_npy(path, random_ids(), meta=META | {"tokens": N_TOKENS + 1})


def unreadable_sidecar(path: Path) -> None:
    write_npy(path, random_ids())
    Path(f"{path}.meta").mkdir()


@pytest.mark.parametrize(("damage", "fault"), [
    (lambda path: path.write_bytes(b""), "empty file"),
    (lambda path: write_npy(path, [1, 2, 3]), "wanted at least 33"),
    (cut_short, "promises 200000 tokens, the file ends at token offset 5000"),
    (wrong_dtype, "holds float32; wanted token ids as uint16"),
    (corrupt_header, "is not a .npy file"),
    (bad_id, "token id 257 at token offset 123456 is outside the vocabulary"),
    (sidecar_of_another, "says 200001 tokens but"),
    (unreadable_sidecar, "x.npy.meta cannot be read: Is a directory"),
    (lambda path: None, "there is no such file, folder or glob"),
], ids=["empty", "short", "cut short", "dtype", "header", "id", "sidecar", "sidecar is a folder", "missing"])
def test_damaged_data_stops_a_run_before_it_writes_anything(tmp_path, capsys, damage, fault):
    damage(tmp_path / "x.npy")
    assert main(words(tmp_path / "runs", tmp_path / "x.npy", 10)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert fault in error
    assert not (tmp_path / "runs").exists()


# -- The reader and the loader by themselves -----------------------------------------------------

def test_an_error_of_the_kernel_is_told_with_its_place():
    memory = Path("/proc/self/mem")  # nothing is at its start: EIO
    if not memory.exists():
        pytest.skip("no /proc/self/mem")
    tokens = TokenFile("x.npy", OpenFile(memory), np.dtype("<u2"), 128, 1000)
    with pytest.raises(OnebError, match=r"x.npy cannot be read any more, at token offset 70 \(byte 268\): Input"):
        tokens.read(70, 5)


def test_more_shards_than_open_files_are_allowed(tmp_path):
    for number in range(150):
        write_npy(tmp_path / f"{number:03}.npy", np.arange(10) + number)
    code = ("import resource, sys\nfrom oneb.data.tokens import open_tokens\n"
            "resource.setrlimit(resource.RLIMIT_NOFILE, (100, int(sys.argv[2])))\n"
            "print(open_tokens(sys.argv[1], vocab_size=257).read(0, 1500).sum())")

    def child(hard_limit: int) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", code, str(tmp_path), str(hard_limit)], cwd=REPOSITORY, text=True,
                              capture_output=True)

    expected = sum(45 + 10 * number for number in range(150))
    enough = child(1000)
    assert enough.stdout.strip() == str(expected), enough.stderr
    assert "cannot be read: Too many open files" in child(100).stderr


def test_a_stop_does_not_wait_for_data_that_never_comes(tmp_path, monkeypatch):
    monkeypatch.setattr("oneb.data.loader._CLOSE_S", 0.5)
    tokens = open_tokens(str(write_npy(tmp_path / "x.npy", random_ids(), meta=META)), vocab_size=VOCAB)
    order = BatchOrder(N_TOKENS, seed=0, phases=((0, 32),), batch_sequences=(2,))
    begins, hangs = threading.Event(), threading.Event()
    tokens.read_into = lambda out, start: hangs.wait(120)  # a server that does not answer
    loader = BatchLoader(tokens, order, vocab_size=VOCAB, start_step=0, total_steps=100)

    def stop(number, frame) -> None:
        raise InterruptedError(number)

    before = signal.signal(signal.SIGTERM, stop)
    began = time.monotonic()

    def kill() -> None:
        begins.wait()
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGTERM)

    def wait() -> None:
        begins.set()
        loader.next()

    try:
        threading.Thread(target=kill).start()
        with pytest.raises(InterruptedError), loader:
            wait()
        assert time.monotonic() - began < 100  # closing does not wait for it for long
    finally:
        signal.signal(signal.SIGTERM, before)
        hangs.set()
