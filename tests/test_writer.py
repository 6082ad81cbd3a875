"""The thread that writes checkpoints: what it copies, when tensors may change again, what a full disk does to it."""

import errno
import threading
import time

import pytest
import torch

from oneb import host_memory
from oneb.checkpoints import checkpoint
from oneb.checkpoints.rundir import read_sidecar
from oneb.files import sha256_file
from oneb.train import writer
from oneb.train.device import open_device
from oneb.train.writer import CheckpointWriter

WRONG_S = 60  # that a write waits for a word of the test, which only a mistake of ours keeps it from
CPU = open_device("cpu")
FINITE = torch.tensor(True)


@pytest.fixture(autouse=True)
def _memory(monkeypatch):
    """Enough for a copy, whatever else this machine is busy with."""
    monkeypatch.setattr(writer, "available_bytes", lambda: None)


def contents(step, seed=0, n=50_000):
    """A checkpoint's, with tensors of every kind that there is in one."""
    generator = torch.Generator().manual_seed(seed)
    weights = {"w": torch.randn(n, generator=generator).bfloat16(), "odd": torch.randn(3, 5, generator=generator),
               "scalar": torch.tensor(float(seed)), "empty": torch.empty(0, 4)}
    state = {"w": {"exp_avg": torch.randint(-128, 127, (n,), generator=generator, dtype=torch.int8)}}
    return {"step": step, "tokens": step, "best_val_loss": 1.0, "config": {"model": {}, "optim": {"optimizer": "lion"}},
            "model": weights, "optimizer": {"n_updates": step, "state": state}, "rng": [torch.tensor([1, 2])]}


def read(path):
    assert sha256_file(path) == read_sidecar(path)["sha256"]
    return torch.load(path, weights_only=True)


def tensors(value):
    return dict(writer.tensors_of(value))


def assert_equal(found, wanted):
    found, wanted = tensors(found), tensors(wanted)
    assert found.keys() == wanted.keys()
    for place in wanted:
        assert found[place].dtype == wanted[place].dtype
        assert torch.equal(found[place], wanted[place]), place


@pytest.mark.parametrize("has_memory", [True, False])
def test_what_changes_after_wait_copied_is_not_in_the_file(tmp_path, monkeypatch, has_memory):
    """Without memory for a copy the tensors are free once the file is written."""
    if not has_memory:
        monkeypatch.setattr(writer, "available_bytes", lambda: 0)
    path, called = tmp_path / "last.pt", threading.Event()
    with CheckpointWriter(CPU) as writing:
        for step in (1, 2, 3):
            live, wanted = contents(step, seed=step), contents(step, seed=step)
            writing.submit(path, live, FINITE, called.set)
            writing.wait_copied()
            assert has_memory or path.exists()
            for tensor in tensors(live).values():
                tensor.zero_()
            writing.wait()
            assert_equal(read(path), wanted)
        results = list(writing.results())
    assert [(result.step, result.error) for result in results] == [(1, None), (2, None), (3, None)]
    assert results[0].n_bytes == path.stat().st_size
    assert called.is_set()


def test_the_copy_does_not_wait_for_the_disk(tmp_path, monkeypatch):
    go = threading.Event()
    real = checkpoint._write

    def slow(path, values):
        assert go.wait(WRONG_S)
        return real(path, values)

    monkeypatch.setattr(checkpoint, "_write", slow)
    with CheckpointWriter(CPU) as writing:
        last, best = contents(7), contents(7) | {"optimizer": None}
        writing.submit(tmp_path / "last.pt", last, FINITE, lambda: None)
        writing.wait_copied()
        # Of the same step: what was copied for the first is the second's, too, so nothing waits for the first.
        writing.submit(tmp_path / "best.pt", best, FINITE, lambda: None)
        writing.wait_copied()
        assert writing.busy
        assert not (tmp_path / "last.pt").exists()
        for tensor in (*tensors(last).values(), *tensors(best).values()):
            tensor.zero_()
        go.set()
        writing.wait()
        assert not writing.busy
        assert_equal(read(tmp_path / "last.pt"), contents(7))
        assert_equal(read(tmp_path / "best.pt"), contents(7) | {"optimizer": None})


def test_the_end_of_one_write_says_nothing_about_the_next_copy(tmp_path, monkeypatch):
    """A second checkpoint is handed over while the first is written: its tensors are free when they are copied."""
    go, real = threading.Event(), checkpoint._write
    monkeypatch.setattr(checkpoint, "_write", lambda path, values: go.wait(WRONG_S) and real(path, values))
    with CheckpointWriter(CPU) as writing:
        writing.reserve(contents(0))
        writing.submit(tmp_path / "a.pt", contents(1, seed=1), FINITE, lambda: None)
        writing.submit(tmp_path / "b.pt", live := contents(2, seed=2), FINITE, lambda: None)
        freed = threading.Thread(target=lambda: (writing.wait_copied(), live["model"]["w"].zero_()))
        freed.start()
        time.sleep(0.1)
        assert freed.is_alive()
        real_copy = writing._host.copy
        monkeypatch.setattr(writing._host, "copy", lambda values: time.sleep(0.2) or real_copy(values))
        go.set()
        writing.wait()
        freed.join()
    assert_equal(read(tmp_path / "b.pt"), contents(2, seed=2))


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    with CheckpointWriter(CPU) as writing:
        writing.submit(tmp_path / "last.pt", contents(1), FINITE, lambda: None)
        writing.submit(tmp_path / "last.pt", contents(2), torch.tensor(False), lambda: pytest.fail("called"))
        writing.wait()
        assert [result.error for result in writing.results()] == [None, "the weights of step 2 are not finite"]
    assert read(tmp_path / "last.pt")["step"] == 1


def test_a_mistake_of_ours_is_raised_in_the_loop(tmp_path):
    with CheckpointWriter(CPU) as writing:
        writing.submit(tmp_path / "last.pt", contents(1), FINITE, lambda: {}["a bug"])
        writing.wait()
        with pytest.raises(KeyError, match="a bug"):
            list(writing.results())
        writing.submit(tmp_path / "last.pt", contents(2), FINITE, lambda: None)  # the thread lives on
        writing.wait()
    assert read_sidecar(tmp_path / "last.pt")["step"] == 2


def test_a_full_disk_leaves_what_was_there_and_nothing_else(disk):
    """2 MiB hold one checkpoint of 1 MiB, and the next one only once something else has gone."""
    folder = disk(2 * 2**20)
    path, n = folder / "last.pt", 320_000
    (folder / "other").write_bytes(bytes(2**19))
    with CheckpointWriter(CPU) as writing:
        for step in (1, 2):
            writing.submit(path, contents(step, seed=step, n=n), FINITE, lambda: None)
            writing.wait()
        first, second = writing.results()
        assert first.error is None
        assert "No space left" in second.error
        assert {entry.name for entry in folder.iterdir()} == {"other", "last.pt", "last.pt.json"}
        assert_equal(read(path), contents(1, seed=1, n=n))
        (folder / "other").unlink()
        writing.submit(path, contents(3, seed=3, n=n), FINITE, lambda: None)
        writing.wait()
        assert [result.error for result in writing.results()] == [None]
    assert_equal(read(path), contents(3, seed=3, n=n))


def test_memory_that_was_reserved_is_the_one_that_is_used(tmp_path, monkeypatch):
    with CheckpointWriter(CPU) as writing:
        writing.reserve(contents(0))
        writing.wait()
        monkeypatch.setattr(writer, "available_bytes", lambda: 0)  # from here on, none is to be had
        may_write = threading.Event()
        saving = writer.save_checkpoint
        monkeypatch.setattr(writer, "save_checkpoint", lambda *given: may_write.wait(WRONG_S) and saving(*given))
        writing.submit(tmp_path / "last.pt", live := contents(1, seed=1), FINITE, lambda: None)
        writing.wait_copied()  # for the copy, not for the file
        assert not (tmp_path / "last.pt").exists()
        live["model"]["w"].zero_()
        may_write.set()
        writing.wait()
    assert_equal(read(tmp_path / "last.pt"), contents(1, seed=1))


def test_memory_that_the_system_refuses_is_done_without(tmp_path, monkeypatch):
    """It may have limits of its own, whatever it says to be free."""
    def refuse(*given):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(writer.mmap, "mmap", refuse)
    with CheckpointWriter(CPU) as writing:
        writing.reserve(contents(0))
        writing.submit(tmp_path / "last.pt", contents(1, seed=1), FINITE, lambda: None)
        writing.wait()
        assert [result.error for result in writing.results()] == [None]
    assert_equal(read(tmp_path / "last.pt"), contents(1, seed=1))


def test_a_copy_of_a_part_is_not_taken_for_one_of_the_whole(tmp_path, monkeypatch):
    """best.pt of a step may be copied before last.pt, which has the optimizer's state besides."""
    may_write, saving = threading.Event(), writer.save_checkpoint
    monkeypatch.setattr(writer, "save_checkpoint", lambda *given: may_write.wait(WRONG_S) and saving(*given))
    live = contents(1, seed=1)
    with CheckpointWriter(CPU) as writing:
        writing.submit(tmp_path / "best.pt", live | {"optimizer": None}, FINITE, lambda: None)
        writing.submit(tmp_path / "last.pt", live, FINITE, lambda: None)
        threading.Timer(0.2, may_write.set).start()
        writing.wait_copied()
        for tensor in tensors(live).values():
            tensor.zero_()
        writing.wait()
    assert_equal(read(tmp_path / "last.pt"), contents(1, seed=1))


def test_a_step_that_comes_again_is_copied_again(tmp_path):
    with CheckpointWriter(CPU) as writing:
        writing.submit(tmp_path / "last.pt", contents(1, seed=1), FINITE, lambda: None)
        writing.forget()
        writing.submit(tmp_path / "last.pt", contents(1, seed=2), FINITE, lambda: None)
        writing.wait()
    assert_equal(read(tmp_path / "last.pt"), contents(1, seed=2))


def test_after_the_end_there_is_nothing_to_wait_for(tmp_path):
    writing = CheckpointWriter(CPU)
    writing.submit(tmp_path / "last.pt", contents(1), FINITE, lambda: None)
    writing.close()
    assert not writing.busy
    writing.wait()
    assert read_sidecar(tmp_path / "last.pt")["step"] == 1


def test_memory_of_the_host_and_of_a_container(tmp_path):
    meminfo, group = tmp_path / "meminfo", tmp_path / "cgroup"
    group.mkdir()
    meminfo.write_text("MemTotal:  64 kB\nMemAvailable:    2048 kB\n")
    assert host_memory.available_bytes(meminfo, group) == 2 * 2**20
    (group / "memory.max").write_text("max\n")
    assert host_memory.available_bytes(meminfo, group) == 2 * 2**20
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("900000\n")
    (group / "memory.stat").write_text("anon 300000\ninactive_file 550000\n")
    assert host_memory.available_bytes(meminfo, group) == 650_000
    meminfo.write_text("")
    assert host_memory.available_bytes(meminfo, group) == 650_000
    assert host_memory.available_bytes(tmp_path / "none", tmp_path / "none") is None


@pytest.mark.gpu
def test_page_locked_memory_is_given_back(tmp_path):
    """Memory that stays locked after it is unmapped spoils whatever gets its address next."""
    device, live = open_device("cuda"), contents(1) | {"model": {"w": torch.randn(2**24, device="cuda")}}
    finite = torch.ones((), dtype=torch.bool, device="cuda")
    for _ in range(8):
        with CheckpointWriter(device) as writing:
            writing.submit(tmp_path / "last.pt", live, finite, lambda: None)
            writing.wait()
            assert [result.error for result in writing.results()] == [None]
            assert len(writing._host._registered) == len([t for t in tensors(live).values() if t.numel()])
        assert not writing._host._registered
        for size in (2**20, 2**22, 2**24):
            there = torch.randn(size, device="cuda")
            assert torch.equal(there.cpu().cuda(), there)


@pytest.mark.gpu
def test_on_the_gpu_steps_go_on_while_a_checkpoint_is_written(tmp_path):
    """2 GiB on the device, changed as soon as that is allowed: the file has the old values, in every bit."""
    device = open_device("cuda")
    live = contents(1) | {"model": {str(i): torch.randn(2**26, device="cuda") for i in range(8)}}
    wanted = {name: tensor.cpu() for name, tensor in live["model"].items()}
    with CheckpointWriter(device) as writing:
        writing.reserve(live)
        writing.wait()
        writing.submit(tmp_path / "last.pt", live, torch.ones((), dtype=torch.bool, device="cuda"), lambda: None)
        waited = writing.wait_copied()
        for tensor in live["model"].values():
            tensor.zero_()
        assert writing.busy
        writing.wait()
        (result,) = writing.results()
    assert result.error is None
    assert waited < result.seconds / 2
    assert_equal(read(tmp_path / "last.pt")["model"], wanted)
