"""Checkpoints that nobody has saved: pickles that run code, archives that unpack to more, other types, other shapes.

Every file here has a sidecar that is right, with its size and its SHA-256: what is tested is what comes after these.
"""

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from second_process import python
from test_trainer import NANO, run

from oneb.errors import OnebError
from oneb.files import sha256_file, write_json
from oneb.presets import resolve
from oneb.train import recorder
from oneb.train.checkpoint import load_checkpoint
from oneb.train.resume import reload
from oneb.train.run import train
from oneb.train.rundir import CheckpointError, check_resume, checkpoints, read_sidecar, run_directory, sidecar_path
from oneb.train.setup import build
from oneb.use.generate import load_trained

NAME = "oneb_decoupled_seed1337"
STEPS = 3


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A run of three steps, and what its last.pt holds."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(recorder, "write_plots", lambda directory: None)
        monkeypatch.setattr(recorder, "write_summary", lambda directory: None)
        directory, _ = run(tmp_path_factory.mktemp("made"), n_layers=1, steps=STEPS, eval_every=0)
    return directory, torch.load(directory / "last.pt", weights_only=True)


@pytest.fixture
def directory(made, tmp_path):
    return shutil.copytree(made[0], tmp_path / NAME)


@pytest.fixture(scope="module")
def parts(made, tmp_path_factory):
    """Of a run that would continue it."""
    return build(configuration(tmp_path_factory.mktemp("unused")), lambda text: None)


def configuration(root, **given):
    return resolve({**NANO, "n_layers": 1, "steps": 6, "eval_every": 0, "root": str(root), "resume": True, **given})


def publish(path: Path, data: bytes, **values) -> Path:
    """Write a checkpoint's bytes, and beside them a sidecar that vouches for them."""
    path.write_bytes(data)
    sidecar = json.loads(sidecar_path(path).read_text())
    write_json(sidecar_path(path), {**sidecar, "bytes": len(data), "sha256": sha256_file(path), **values})
    return path


def saved(contents) -> bytes:
    file = io.BytesIO()
    torch.save(contents, file)
    return file.getvalue()


def archive(original: bytes, change, compress: int = zipfile.ZIP_STORED) -> bytes:
    """A checkpoint's archive packed anew, each entry being ``change(name, data)``; None leaves it out."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(original)) as old, zipfile.ZipFile(file, "w", compress) as new:
        for entry in old.infolist():
            if (data := change(entry.filename, old.read(entry))) is not None:
                new.writestr(entry.filename, data)
    return file.getvalue()


def with_pickle(original: bytes, data: bytes, compress: int = zipfile.ZIP_STORED) -> bytes:
    return archive(original, lambda name, old: data if name.endswith("/data.pkl") else old, compress)


class Call:
    """Pickles as a call."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


# ---- pickles

PICKLES = {
    "os.system": lambda mark: Call(os.system, f"touch {mark}"),
    "eval": lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"),
    "exec": lambda mark: Call(exec, f"open({str(mark)!r}, 'w')"),
    "open": lambda mark: Call(open, str(mark), "w"),
    "popen": lambda mark: Call(os.popen, f"touch {mark}"),
    "torch.load": lambda mark: Call(torch.load, str(mark)),
    "makedirs": lambda mark: Call(os.makedirs, str(mark)),
    "getattr": lambda mark: Call(getattr, Call(__import__, "os"), "system"),
    "bytearray": lambda mark: Call(bytearray, 2**40),
    "storage": lambda mark: Call(torch.UntypedStorage, 2**45),
}


@pytest.mark.parametrize("place", ["instead", "field", "key"])
@pytest.mark.parametrize("kind", PICKLES)
def test_a_pickle_runs_no_code(made, directory, tmp_path, kind, place):
    mark = tmp_path / "ran"
    call = PICKLES[kind](mark)
    value = {"instead": call, "field": {"format": 1, "step": call}, "key": {"format": 1, "model": OrderedDict(w=call)}}
    path = directory / "last.pt"
    publish(path, with_pickle(saved(made[1]), pickle.dumps(value[place], protocol=2)))
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)
    with pytest.raises(OnebError):
        train(configuration(tmp_path))
    assert not mark.exists()
    # And the file is what it is taken for: read without care, it does run.
    if kind in ("eval", "exec", "open", "makedirs", "os.system") and place == "instead":
        pickle.loads(pickle.dumps(value[place], protocol=2))
        assert mark.exists()


@pytest.mark.parametrize("protocol", range(6))
def test_a_bare_pickle_of_any_protocol_is_no_checkpoint(directory, tmp_path, protocol):
    mark = tmp_path / "ran"
    path = publish(directory / "last.pt", pickle.dumps({"step": Call(os.mkdir, str(mark))}, protocol))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)
    assert not mark.exists()


def test_what_torch_itself_would_load_of_a_plain_script_module_is_refused(directory):
    """A TorchScript archive is code."""
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    with pytest.raises(CheckpointError):
        load_checkpoint(publish(directory / "last.pt", file.getvalue()))


# ---- archives

def loaded_with_little_memory(paths: list[Path], mebibytes: int) -> list[str]:
    """What loading each of them raises in a process that may take so much more memory than it has."""
    code = f"""
import resource
from pathlib import Path
from oneb.train.checkpoint import load_checkpoint
taken = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + {mebibytes} * 2**20,) * 2)
for path in {[str(path) for path in paths]}:
    try:
        load_checkpoint(Path(path))
    except Exception as error:
        print(type(error).__name__, str(error))
"""
    return python("-c", code).splitlines()


def test_a_zip_bomb_is_not_unpacked(made, directory):
    """64 MiB of nothing in 64 KiB, read by a process without that much memory."""
    original, nothing = saved(made[1]), bytes(2**26)
    file = io.BytesIO(original)
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED, compresslevel=1) as appended:
        appended.writestr("archive/more", nothing)

    def tensor(name, old):
        return nothing if name.endswith("/data/0") else old

    bombs = [with_pickle(original, b"\x80\x02" + nothing, zipfile.ZIP_DEFLATED),
             archive(original, tensor, zipfile.ZIP_DEFLATED), file.getvalue()]
    paths = []
    for number, data in enumerate(bombs):
        assert len(data) < 2**22
        path = shutil.copy(directory / "last.pt", directory / f"{number}.pt")
        shutil.copy(sidecar_path(directory / "last.pt"), sidecar_path(path))
        paths.append(publish(path, data))
    said = loaded_with_little_memory(paths, 48)
    assert len(said) == len(bombs)
    for line in said:
        assert line.startswith("CheckpointError")
        assert "it is compressed" in line


def test_parts_that_are_more_than_the_whole_are_refused(made, directory):
    """Fifty entries that are the same bytes."""
    file = io.BytesIO(saved(made[1]))
    with zipfile.ZipFile(file, "a") as overlapping:
        largest = max(overlapping.infolist(), key=lambda entry: entry.file_size)
        for number in range(50):
            again = zipfile.ZipInfo(f"archive/data/9{number}")
            again.header_offset, again.CRC = largest.header_offset, largest.CRC
            again.file_size = again.compress_size = largest.file_size
            overlapping.filelist.append(again)
        overlapping._didModify = True
    with pytest.raises(CheckpointError, match="larger than the whole"):
        load_checkpoint(publish(directory / "last.pt", file.getvalue()))


def appended(data: bytes, *, comment: bytes = b"", **entries: bytes) -> bytes:
    file = io.BytesIO(data)
    with zipfile.ZipFile(file, "a") as more:
        more.comment = comment
        for name, entry in entries.items():
            more.writestr(name.replace("__", "/"), entry)
    return file.getvalue()


ARCHIVES = {
    "prefix": lambda data: b"#!/bin/sh\n" + data,
    "suffix": lambda data: data + b"more",
    "comment": lambda data: appended(data, comment=b"PK\5\6" * 10),
    "two pickles": lambda data: appended(data, **{"other__data.pkl": b"\x80\x02}."}),
    "no pickle": lambda data: archive(data, lambda name, old: None if name.endswith(".pkl") else old),
    "no weights": lambda data: archive(data, lambda name, old: None if "/data/" in name else old),
    "short weights": lambda data: archive(data, lambda name, old: old[:5] if "/data/" in name else old),
    "cut": lambda data: data[:-1000],
    "empty": lambda data: b"",
    "not zip": lambda data: b"PK\3\4" + data[99:5000],
    "text": lambda data: b"a checkpoint",
}


def test_what_these_archives_are_made_from_is_whole(made, directory):
    data = archive(saved(made[1]), lambda name, old: old)
    assert load_checkpoint(publish(directory / "last.pt", data))["step"] == STEPS


@pytest.mark.parametrize("damage", ARCHIVES)
def test_other_archives_are_refused(made, directory, damage):
    path = publish(directory / "last.pt", ARCHIVES[damage](saved(made[1])))
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


# ---- types and shapes

def huge(contents):
    """One number, said to be a trillion of them."""
    contents["model"]["embedding"] = torch.zeros(1).expand(10**6, 10**6)


def swapped(contents):
    names, tensors = zip(*contents["model"].items(), strict=True)
    contents["model"] = dict(zip(names[1:] + names[:1], tensors, strict=True))


def cyclic(contents):
    contents["watch"] = {}
    contents["watch"]["self"] = contents["watch"]


def shared(contents):
    """A thousand references: as a tree, 10 to the power of 60."""
    value = [1.0] * 10
    for _ in range(60):
        value = [value] * 10
    contents["watch"] = {"recent": value}


def first(tensors):
    return next(iter(tensors))


SPOILED = {
    "no model": lambda c: c.pop("model"),
    "model is a list": lambda c: c.update(model=list(c["model"].values())),
    "a weight is a number": lambda c: c["model"].update(embedding=3.0),
    "a weight is missing": lambda c: c["model"].popitem(),
    "a weight more": lambda c: c["model"].update({"\x1b[2Jmore": torch.ones(2)}),
    "a weight in integers": lambda c: c["model"].update(embedding=c["model"]["embedding"].long()),
    "a weight of another shape": lambda c: c["model"].update(embedding=c["model"]["embedding"][:-1].clone()),
    "a weight turned": lambda c: c["model"].update(embedding=c["model"]["embedding"].T),
    "a sparse weight": lambda c: c["model"].update(embedding=c["model"]["embedding"].to_sparse()),
    "a huge weight": huge,
    "weights swapped": swapped,
    "step is text": lambda c: c.update(step="3"),
    "step is negative": lambda c: c.update(step=-3),
    "step is huge": lambda c: c.update(step=10**30),
    "step is another": lambda c: c.update(step=STEPS + 1),
    "step is true": lambda c: c.update(step=True),
    "step is a tensor": lambda c: c.update(step=torch.tensor(3)),
    "tokens are a list": lambda c: c.update(tokens=[1]),
    "best is not a number": lambda c: c.update(best_val_loss=float("nan")),
    "config is a list": lambda c: c.update(config=[1, 2]),
    "config section is text": lambda c: c["config"].update(train="x"),
    "config of other types": lambda c: c["config"]["train"].update(steps="many"),
    "config phases of text": lambda c: c["config"]["train"].update(phases=[["a", "b"]]),
    "config phases empty": lambda c: c["config"]["train"].update(phases=[]),
    "config names no options": lambda c: c["config"]["train"].update({3: 4}),
    "model of no heads": lambda c: c["config"]["model"].update(n_heads=0),
    "model of a million layers": lambda c: c["config"]["model"].update(n_layers=10**6),
    "model of endless context": lambda c: c["config"]["model"].update(max_seq_len=10**12),
    "optimizer is a tensor": lambda c: c.update(optimizer=torch.ones(3)),
    "optimizer lacks its kind": lambda c: c["optimizer"].pop("kind"),
    "optimizer kind is a list": lambda c: c["optimizer"].update(kind=["lion"]),
    "optimizer of another kind": lambda c: c["optimizer"].update(kind="\x1b[2Jadamw"),
    "optimizer state of a number": lambda c: c["optimizer"]["state"].update({first(c["optimizer"]["state"]): 3}),
    "optimizer state missing": lambda c: c["optimizer"]["state"].popitem(),
    "optimizer state of another shape": lambda c: c["optimizer"]["state"][first(c["optimizer"]["state"])].update(
        exp_avg=torch.ones(7)),
    "optimizer state of another dtype": lambda c: c["optimizer"]["state"]["embedding"].update(
        exp_avg=c["optimizer"]["state"]["embedding"]["exp_avg"].double()),
    "updates uncounted": lambda c: c["optimizer"].update(n_updates=-1),
    "no scaler": lambda c: c.pop("scaler"),
    "scaler of text": lambda c: c.update(scaler="off"),
    "scale is a vector": lambda c: c["scaler"].update(scale=torch.ones(3)),
    "scale is zero": lambda c: c["scaler"].update(scale=torch.tensor(0.0)),
    "scale is nan": lambda c: c["scaler"].update(scale=torch.tensor(float("nan"))),
    "skipped steps in floats": lambda c: c["scaler"].update(skipped_steps=torch.tensor(0.5)),
    "no rng": lambda c: c.pop("rng"),
    "rng is short": lambda c: c["rng"].update(cpu=torch.zeros(5, dtype=torch.uint8)),
    "rng of other numbers": lambda c: c["rng"].update(cpu=torch.full_like(c["rng"]["cpu"], 255)),
    "rng in floats": lambda c: c["rng"].update(cpu=torch.rand(len(c["rng"]["cpu"]))),
    "cuda rng is a number": lambda c: c["rng"].update(cuda=3),
    "fit of zero": lambda c: c.update(fit=[{"seq_len": 64, "batch_size": 0, "grad_accum": 8}]),
    "fit of text": lambda c: c.update(fit="4 x 2"),
    "fit lacks a number": lambda c: c.update(fit=[{"seq_len": 64}]),
    "float8 of numbers": lambda c: c.update(float8={"scale": 3}),
    "fingerprint is a number": lambda c: c.update(data_fingerprint=3),
    "fingerprint is another": lambda c: c.update(data_fingerprint="\x1b[2J" * 100),
    "encoding is a list": lambda c: c.update(encoding=["bytes"]),
    "made with numbers": lambda c: c.update(made_with={"torch": 2.1}),
    "skips are triples": lambda c: c.update(skips=[[1, 2, 3]]),
    "skips are negative": lambda c: c.update(skips=[[1, -2]]),
    "watch is a list": lambda c: c.update(watch=[1]),
    "watch goes round": cyclic,
    "watch is too much": shared,
    "evaluated at text": lambda c: c.update(evaluated_at="3"),
    "another format": lambda c: c.update(format=2),
}


def fresh(contents) -> dict:
    """Its containers copied, its tensors not."""
    if isinstance(contents, dict):
        return {name: fresh(value) for name, value in contents.items()}
    return [fresh(value) for value in contents] if isinstance(contents, (list, tuple)) else contents


def test_what_these_are_spoiled_from_is_whole(made, directory, parts):
    path = publish(directory / "last.pt", saved(fresh(made[1])))
    assert reload(parts, path).step == STEPS


@pytest.mark.parametrize("how", SPOILED)
def test_a_checkpoint_of_other_types_or_shapes_is_refused_before_anything_changes(made, directory, parts, how):
    contents = fresh(made[1])
    SPOILED[how](contents)
    path = publish(directory / "last.pt", saved(contents))
    before = {name: tensor.clone() for name, tensor in parts.model.state_dict().items()}
    optimizer = {name: state["exp_avg"].clone() for name, state in parts.optimizer.state_dict()["state"].items()}
    rng = torch.get_rng_state()
    with pytest.raises(OnebError) as caught:
        reload(parts, path)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000
    for name, tensor in parts.model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for name, state in parts.optimizer.state_dict()["state"].items():
        assert torch.equal(state["exp_avg"], optimizer[name])
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("how", ["a weight of another shape", "rng is short", "step is text", "weights swapped"])
def test_a_run_passes_over_it_to_the_one_before(made, directory, tmp_path, how):
    """As over any that is damaged: it is named, and nothing of it is used."""
    older = directory / "step00000003.pt"
    for path in (older, sidecar_path(older)):
        shutil.copy(str(path).replace(older.name, "last.pt"), path)
    contents = fresh(made[1])
    SPOILED[how](contents)
    publish(directory / "last.pt", saved(contents), serial=9)
    config = configuration(tmp_path, resume=False, if_exists="resume")
    assert run_directory(config).resume_from.name == "last.pt"
    assert train(config) == 0
    log = (directory / "train.jsonl").read_text()
    assert "passed over to continue" in log
    assert read_sidecar(directory / "last.pt")["step"] == 6


@pytest.mark.parametrize("how", ["model of a million layers", "model of endless context", "model of no heads",
                                 "encoding is a list", "a weight of another shape", "config section is text"])
def test_text_is_not_made_from_it_either(made, directory, how):
    contents = fresh(made[1])
    SPOILED[how](contents)
    with pytest.raises(OnebError):
        load_trained(publish(directory / "last.pt", saved(contents)), "cpu")


def test_a_name_out_of_a_checkpoint_is_never_a_path(made, directory, tmp_path):
    contents = fresh(made[1])
    contents["encoding"] = str(tmp_path / "tokenizer")
    with pytest.raises(OnebError, match="none of gpt2, bytes"):
        load_trained(publish(directory / "last.pt", saved(contents)), "cpu")


# ---- at random

@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_flipped_bytes_with_a_right_sidecar_are_an_error_or_a_checkpoint(made, directory, data):
    """In the pickle and the archive's own bytes; among the weights any bytes are weights."""
    path = directory / "last.pt"
    contents = bytearray((made[0] / "last.pt").read_bytes())
    with zipfile.ZipFile(io.BytesIO(contents)) as whole:
        entry = next(entry for entry in whole.infolist() if entry.filename.endswith("data.pkl"))
        ranges = [(entry.header_offset, entry.header_offset + entry.file_size + 100), (whole.start_dir, len(contents))]
    for _ in range(data.draw(st.integers(1, 8))):
        start, end = data.draw(st.sampled_from(ranges))
        contents[data.draw(st.integers(start, end - 1))] = data.draw(st.integers(0, 255))
    publish(path, bytes(contents))
    with contextlib.suppress(CheckpointError):
        assert load_checkpoint(path)["step"] == STEPS


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_sidecar_of_anything_is_an_error_or_a_sidecar(made, directory, data):
    path = directory / "last.pt"
    values = json.loads(sidecar_path(made[0] / "last.pt").read_text())
    place = values
    while isinstance(place[key := data.draw(st.sampled_from(sorted(place)))], dict) and place[key] and \
            data.draw(st.booleans()):
        place = place[key]
    place[key] = data.draw(PLAIN)
    sidecar_path(path).write_text(json.dumps(values))
    checkpoints(directory)
    # The launcher's questions have an answer, or a reason.
    asked = configuration(directory.parent, allow_change=data.draw(st.booleans()))
    said = []
    for question in (lambda: [str(read_sidecar(path)["step"])], lambda: check_resume(asked)):
        try:
            said += question()
        except OnebError as error:
            said.append(str(error).replace("\n", ""))
    assert all(map(str.isprintable, said))


@pytest.mark.parametrize("text", [
    b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"step": 1e999}', b'{"step": NaN}',
    b'{"step": ' + b"9" * 10_000 + b"}", b" " * 2**20 + b"{}", b'{"a":' * 50_000, bytes(2**22),
], ids=range(12))
def test_a_sidecar_of_any_bytes_is_damaged(directory, text):
    sidecar_path(directory / "last.pt").write_bytes(text)
    with pytest.raises(CheckpointError, match="is damaged"):
        read_sidecar(directory / "last.pt")


def test_a_sidecar_that_is_a_folder_or_a_device_is_damaged(directory):
    sidecar = sidecar_path(directory / "last.pt")
    sidecar.unlink()
    sidecar.symlink_to("/dev/zero")
    with pytest.raises(CheckpointError, match="is damaged"):
        read_sidecar(directory / "last.pt")
    sidecar.unlink()
    sidecar.mkdir()
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_sidecar(directory / "last.pt")


@pytest.mark.slow
def test_many_random_archives(made, directory):
    """Thousands of damaged files, in one process whose memory is limited."""
    chance = random.Random(11)
    original = (made[0] / "last.pt").read_bytes()
    for _ in range(5000):
        contents = bytearray(original)
        for _ in range(chance.choice((1, 2, 50))):
            contents[chance.choice((chance.randrange(4096), chance.randrange(len(contents)),
                                    len(contents) - 1 - chance.randrange(8192)))] = chance.randrange(256)
        if chance.random() < 0.3:
            del contents[chance.randrange(len(contents)):]
        path = publish(directory / "last.pt", bytes(contents))
        with contextlib.suppress(CheckpointError):
            load_checkpoint(path)
