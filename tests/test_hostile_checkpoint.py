"""Checkpoints that nobody has saved: other types, other shapes under a right sidecar; and sidecars of anything."""

import json
import shutil

import pytest
import torch
from hostile_helpers import *  # noqa: F403
from hostile_helpers import STEPS, configuration, publish, saved
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from oneb.checkpoints.rundir import (
    CheckpointError,
    check_resume,
    checkpoints,
    read_sidecar,
    run_directory,
    sidecar_path,
)
from oneb.errors import OnebError
from oneb.train.resume import reload
from oneb.train.run import train
from oneb.train.setup import build
from oneb.use.generate import load_trained


@pytest.fixture(scope="module")
def parts(made, tmp_path_factory):
    """Of a run that would continue it."""
    return build(configuration(tmp_path_factory.mktemp("unused")), lambda text: None)


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


# ---- sidecars

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
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
