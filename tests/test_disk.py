"""Whether a run may write where it is to, and finds room there: on disks that are really full, read-only or missing."""

import dataclasses
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_disk import fill, make_read_only

from oneb.checkpoints.disk import _free_bytes, check_room, check_start, least_disk_use, room_for
from oneb.checkpoints.lock import RunLock
from oneb.checkpoints.rundir import RunDirectory, claimed, run_directory, sidecar_path
from oneb.errors import OnebError
from oneb.planner import Disk, disk_use, settled
from oneb.presets import resolve
from oneb.train import run
from oneb.train.run import train

# A checkpoint of it has 371k parameters: 1.5 MB of weights, and as much of Lion's state.
NANO = {"size": "nano", "n_layers": 2, "path": "demo", "device": "cpu", "live": "off", "phases": "32@0", "steps": 4,
        "max_seq_len": 32, "grad_accum": 2, "eval_iters": 1, "warmup_steps": 1, "optimizer": "lion",
        "lr_schedule": "constant"}
NOBODY = 65_534


def configuration(root, **given):
    return resolve({**NANO, "root": str(root), **given})


def refused(config) -> str:
    """What ``train`` says when it refuses, before it has opened or allocated anything."""
    def build(*_):
        raise AssertionError("the model is built, though the run cannot be saved")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "build", build)
        with pytest.raises(OnebError) as caught:
            train(config)
    return str(caught.value)


def as_nobody(work) -> str:
    """What ``work`` returns, or the OnebError that it raises, for a user without rights."""
    read_end, write_end = os.pipe()
    if not (pid := os.fork()):
        try:
            if os.getuid() == 0:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
            said = str(work())
        except OnebError as error:
            said = f"refused: {error}"
        except BaseException as error:
            said = f"crashed: {error!r}"
        os.write(write_end, said.encode())
        os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as file:
        said = file.read().decode()
    os.waitpid(pid, 0)
    return said


@pytest.fixture
def open_folder():
    """A folder that every user may enter, as pytest's own is not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o777)
    yield folder
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o777)
    shutil.rmtree(folder)


# ---- where nothing can be written

def test_a_read_only_root_is_refused_before_the_model_is_built(disk):
    root = disk(2**24)
    assert run_directory(configuration(root)).is_new
    make_read_only(root)
    for folder in (root, root / "deeper" / "still"):
        said = refused(configuration(folder))
        assert f"{root} is on a file system that is mounted read-only; choose another --run-root" in said


def test_a_disk_that_became_read_only_is_noticed_by_every_check(disk):
    root = disk(2**24)
    config = configuration(root)
    chosen = run_directory(config)
    make_read_only(root)
    with pytest.raises(OnebError, match=r"no file can be made \(Read-only file system\).*--run-root"):
        check_start(config, chosen)
    with pytest.raises(OnebError, match=r"mounted read-only; choose another --run-root"), claimed(config, chosen):
        pass
    assert "mounted read-only" in room_for(root, 1)


@pytest.mark.parametrize(("name", "message"), [
    ("file", "is a file"), ("file/runs/more", "is a file"), ("dangling", "is a link to .*nowhere.*not there"),
    ("dangling/runs", "is a link to .*nowhere.*not there"), ("circle", "Too many levels of symbolic links"),
    ("circle/runs", "Too many levels of symbolic links"), ("x" * 300, "name too long"),
])
def test_a_root_that_cannot_be_made_is_refused_before_the_model_is_built(tmp_path, name, message):
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    said = refused(configuration(tmp_path / name))
    assert re.search(message, said, re.IGNORECASE), said
    assert "--run-root" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["circle", "dangling", "file"]


def test_a_root_that_is_a_link_is_followed(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    config = configuration(tmp_path / "runs")
    chosen = run_directory(config)
    check_start(config, chosen)
    with claimed(config, chosen):
        assert [path.name for path in (tmp_path / "disk").iterdir()] == [config.name]


def test_a_root_that_is_missing_is_made_with_the_first_file(tmp_path):
    config = configuration(tmp_path / "a" / "b")
    chosen = run_directory(config)
    check_start(config, chosen)
    assert list(tmp_path.iterdir()) == []
    with claimed(config, chosen) as directory:
        assert directory.path == tmp_path / "a" / "b" / config.name


@pytest.mark.parametrize("mode", [0o555, 0o666, 0o000])
@pytest.mark.parametrize("below", ["", "missing/folders"])
def test_no_permission_is_refused_with_the_folder_s_name(open_folder, mode, below):
    root = open_folder / "runs"
    root.mkdir()
    (root / "there").mkdir()
    root.chmod(mode)
    config = configuration(root / below)
    said = as_nobody(lambda: run_directory(config))
    assert said.startswith("refused: ")
    assert f"{root} gives this user no permission; choose another --run-root" in said
    assert "no permission" in as_nobody(lambda: room_for(root / "last.pt", 1))


def test_another_user_s_run_is_refused(open_folder):
    if os.getuid() != 0:
        pytest.skip("needs two users")
    config = configuration(open_folder, if_exists="resume")
    directory = open_folder / config.name
    directory.mkdir(mode=0o755)
    assert "no permission" in as_nobody(lambda: run_directory(config))
    directory.chmod(0o777)
    with RunLock(directory):
        pass
    chosen = run_directory(config)
    assert ".lock cannot be written (Permission denied)" in as_nobody(lambda: check_start(config, chosen))
    assert as_nobody(lambda: check_start(config, RunDirectory(open_folder / "other", is_new=True))) == "None"


def test_what_is_in_the_way_since_is_an_error_and_not_an_endless_loop(tmp_path):
    config = configuration(tmp_path / "runs")
    chosen = run_directory(config)
    (tmp_path / "runs").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OnebError, match="is a link to .*--run-root"), claimed(config, chosen):
        pass
    (tmp_path / "runs").unlink()
    (tmp_path / "runs").write_text("x")
    with pytest.raises(OnebError, match="is a file.*--run-root"), claimed(config, chosen):
        pass


def test_a_run_that_another_process_has_is_refused_before_the_model_is_built(tmp_path):
    config = configuration(tmp_path, if_exists="resume")
    (tmp_path / config.name).mkdir()
    with RunLock(tmp_path / config.name):
        assert f"another process is training in {tmp_path / config.name} (process {os.getpid()}" in refused(config)
    check_start(config, run_directory(config))


# ---- where there is no room

def test_a_full_disk_is_refused_with_sizes_and_fixes_before_the_model_is_built(disk):
    root = disk(9 * 2**20)
    config = configuration(root, save_every=1)
    check_start(configuration(root), run_directory(config))  # with last.pt alone it would fit
    said = refused(config)
    assert "the run's checkpoints take 16." in said  # four files, the next one, best.pt, and 1 MiB for the log
    assert "2.8 MiB each, best.pt 1.4 MiB; with its log" in said
    assert f"{root} has 9.0 MiB free; make room, or give a larger --save-every (now 1, which makes 4 more files), or " \
           "--keep-last 2, or another --run-root, or --no-save-optim" in said
    fill(root)
    assert f"{root} has 0 B free" in refused(configuration(root))
    assert [path.name for path in root.iterdir()] == ["large"]


def test_a_disk_without_an_inode_is_refused_before_the_model_is_built(disk):
    root = disk(2**24, nr_inodes=4)
    for number in range(3):
        (root / str(number)).touch()
    assert "no file can be made (No space left on device)" in refused(configuration(root))
    assert "no inode is free" in room_for(root / "last.pt", 1)
    (root / "0").unlink()
    assert room_for(root / "last.pt", 1) is None


def test_what_is_still_open_is_counted_as_little_as_it_can_become():
    config = resolve({**{name: value for name, value in NANO.items() if name != "optimizer"}, "root": "runs"})
    assert config.optim.optimizer == "auto"
    least = least_disk_use(config).total_bytes
    for optimizer in ("lion", "lion8bit", "adamw"):
        given = configuration("runs", optimizer=optimizer)
        assert least <= least_disk_use(given).total_bytes
        assert least_disk_use(given) == disk_use(settled(given))


def test_a_run_that_fits_may_go_on_there(disk):
    """The smallest disk that the run starts on is enough to resume it, with its own checkpoints there."""
    def accepted(size):
        config = configuration(disk(size), save_every=2, keep_last=1)
        try:
            check_start(config, run_directory(config))
        except OnebError:
            return None
        return config

    assert not accepted(9 * 2**20)
    config = next(filter(None, (accepted(size * 2**19) for size in range(19, 40))))
    assert train(config) == 0
    for steps in (6, 8):
        longer = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True),
                                     train=dataclasses.replace(config.train, steps=steps))
        assert train(longer) == 0
    root = Path(config.run.root)
    assert [path.name for path in root.glob("*/step*.pt")] == ["step00000008.pt"]


LAST_BYTES, BEST_BYTES = 5000, 2000


class Files:
    """A run directory in which files come and go as in a run's, and the most room that they took."""

    def __init__(self, path, save_every, keep_last):
        self.path, self.save_every, self.keep_last = path, save_every, keep_last
        self.most = self.bytes()

    def bytes(self):
        return sum({path.stat().st_ino: path.stat().st_size for path in self.path.glob("*.pt*")}.values())

    def write(self, name, size):
        (self.path / "new.pt").write_bytes(bytes(size))
        self.most = max(self.most, self.bytes())
        os.replace(self.path / "new.pt", self.path / name)

    def step(self, step):
        if self.save_every and step % self.save_every == 0:
            self.write(name := f"step{step:08d}.pt", LAST_BYTES)
            (self.path / "last.pt").unlink(missing_ok=True)
            os.link(self.path / name, self.path / "last.pt")
            for old in sorted(self.path.glob("step*.pt"))[:-self.keep_last] if self.keep_last else ():
                old.unlink()
        else:
            self.write("last.pt", LAST_BYTES)
        self.write("best.pt", BEST_BYTES)


@settings(max_examples=150)
@given(steps=st.integers(1, 25), stop=st.integers(0, 24), save_every=st.integers(0, 8), keep_last=st.integers(0, 4),
       before=st.none() | st.tuples(st.integers(0, 8), st.integers(0, 4)))
def test_the_room_asked_for_is_what_the_rest_of_the_run_takes(steps, stop, save_every, keep_last, before):
    """Whenever it is resumed, and whatever --save-every and --keep-last were before."""
    stop = min(stop, steps - 1)
    config = configuration("runs", steps=steps, save_every=save_every, keep_last=keep_last)
    planned = disk_use(settled(config))
    copies = (planned.total_bytes - planned.best_bytes) // planned.last_bytes
    plan = Disk(LAST_BYTES, BEST_BYTES, planned.step_files, copies * LAST_BYTES + BEST_BYTES)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        path.mkdir()
        files = Files(path, *(before or (save_every, keep_last)))
        for step in range(1, stop + 1):
            files.step(step)
        checkpoint = None
        if stop:
            checkpoint = path / "last.pt"
            sidecar_path(checkpoint).write_text(
                f'{{"step": {stop}, "tokens": 1, "best_val_loss": null, "sha256": "", "bytes": {LAST_BYTES}, '
                f'"model": {{}}}}')
        directory = RunDirectory(path, resume_from=checkpoint)
        needed = room_asked_for(config, directory, plan)
        if stop:
            sidecar_path(checkpoint).unlink()
        else:
            needed -= 2**20 + 512 * (steps // config.log.log_every)  # for the log, which these files have not
            assert needed == plan.total_bytes
        rest = Files(path, save_every, keep_last)
        there = rest.bytes()
        for step in range(stop + 1, steps + 1):
            rest.step(step)
        taken = rest.most - there
    assert taken <= needed
    assert needed <= taken + LAST_BYTES + BEST_BYTES


def room_asked_for(config, directory, plan):
    """The fewest free bytes with which a run is let pass."""
    def passes(free):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("oneb.checkpoints.disk._free_bytes", lambda _: free)
            try:
                check_room(config, directory, plan)
            except OnebError:
                return False
            return True

    low, high = -1, 10**7
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if passes(middle) else (middle, high)
    return high


# ---- before each save

def test_room_for_a_save(disk):
    folder = disk(2**20)
    free = shutil.disk_usage(folder).free
    for path in (folder, folder / "last.pt"):
        assert room_for(path, free) is None
        assert room_for(path, free + 1) == f"{folder} has 1.0 MiB free, and 1.0 MiB are needed"
    (folder / "last.pt").write_bytes(bytes(free // 2))
    assert room_for(folder / "last.pt", free) == f"{folder} has 512.0 KiB free, and 1.0 MiB are needed"
    large = fill(folder)
    assert room_for(folder / "last.pt", 1) == f"{folder} has 0 B free, and 1 B are needed"
    large.unlink()
    assert room_for(folder / "last.pt", 1) is None


def test_room_in_a_folder_that_is_gone(tmp_path):
    gone = tmp_path / "run"
    assert room_for(gone / "last.pt", 1) == f"{gone} cannot be reached (No such file or directory)"
    (tmp_path / "file").touch()
    assert "cannot be reached (Not a directory)" in room_for(tmp_path / "file" / "run" / "last.pt", 1)


def test_a_file_system_that_does_not_tell_is_trusted():
    """Network drives that report no size at all, as /proc does."""
    if not Path("/proc/self").exists():
        pytest.skip("no /proc")
    assert shutil.disk_usage("/proc").total == 0
    assert _free_bytes(Path("/proc")) is None
