"""``--doc-mask``: documents packed into one window are to the model what each of them is alone."""

import itertools
import math

import numpy as np
import pytest
import torch
from data_helpers import write_npy
from hypothesis import given
from hypothesis import strategies as st
from model_cases import CASES, OPTIONS, model_config, relative_error
from test_trainer import NANO, assert_same_weights, losses, run, val_losses, weights

from oneb.data.journal import index_path
from oneb.errors import OnebError
from oneb.inspect.analysis import attention_statistics
from oneb.kernels.attention import choose_backend
from oneb.kernels.documents import documents_of, visible
from oneb.model.transformer import build_model
from oneb.presets import resolve
from oneb.train.resume import reload
from oneb.train.setup import build

OPENING = 7
LENGTHS = ((5, 1, 20, 7, 15), (48,), (1, 30, 17))


# ---- where documents begin and end -----------------------------------------------------------------

@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3))
def test_bounds_of_documents(rows):
    tokens = torch.tensor(rows).long() * OPENING
    documents = documents_of(tokens, OPENING)
    seen = visible(documents)
    for row, opens in enumerate(rows):
        number = list(itertools.accumulate(opens))
        for query, key in itertools.product(range(6), repeat=2):
            assert seen[row, query, key] == (key <= query and number[key] == number[query])
        assert documents.starts[row].tolist() == [number.index(n) for n in number]
        assert documents.ends[row].tolist() == [6 - number[::-1].index(n) for n in number]
        assert documents.positions[row].tolist() == [at - number.index(n) for at, n in enumerate(number)]


def test_documents_are_those_of_the_index(books_npy):
    """The index beside prepared data says where documents start: each is opened by the id before that."""
    tokens = torch.from_numpy(np.load(books_npy).astype(np.int64))[None]
    starts = documents_of(tokens, 50256).starts.unique().numpy()
    index = np.load(index_path(books_npy))
    assert (starts == np.concatenate([[0], index[1:-1] - 1])).all()


# ---- the model -------------------------------------------------------------------------------------

def packed(lengths, config, device):
    """Documents of ids (n,), each but the first begun by the opening id, and all of them in one window (1, T)."""
    generator = torch.Generator().manual_seed(sum(lengths))
    documents = [torch.randint(8, config.vocab_size, (n,), generator=generator) for n in lengths]
    for document in documents[1:]:
        document[0] = OPENING
    documents = [document.to(device) for document in documents]
    return documents, torch.cat(documents)[None]


def hidden_and_gradients(model, sequences, weight):
    """Hidden states of sequences (T, d), and parameters' gradients of their sum weighted by ``weight`` (T, d)."""
    model.zero_grad()
    hidden = torch.cat([model(sequence.view(1, -1))[0] for sequence in sequences])
    (hidden.float() * weight).sum().backward()
    return hidden.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def compare_with_documents_alone(model, lengths, tolerance, gradient_tolerance):
    documents, window = packed(lengths, model.config, model.device)
    weight = torch.randn(window.shape[1], model.config.d_model, generator=torch.Generator().manual_seed(5))
    weight = weight.to(model.device)
    model.document_opening = None
    alone, alone_gradients = hidden_and_gradients(model, documents, weight)
    model.document_opening = OPENING
    together, gradients = hidden_and_gradients(model, window, weight)
    assert relative_error(together, alone) < tolerance
    for name, want in alone_gradients.items():
        slack = 10 if "temperature" in name else 1  # a sum of terms that nearly cancel
        assert relative_error(gradients[name], want) < slack * gradient_tolerance, name


def lively(config, **built):
    """A model whose temperatures and null tokens are away from their neutral start."""
    model = build_model(config, seed=1, **built)
    generator = torch.Generator(model.device).manual_seed(2)
    with torch.no_grad():
        for block in model.blocks:
            for name in ("log_temperature", "null_k", "null_v"):
                if hasattr(block.attention, name):
                    getattr(block.attention, name).normal_(std=0.3, generator=generator)
    return model


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize(("variant", "option"), CASES)
def test_packed_documents_equal_documents_alone(variant, option, fused):
    model = lively(model_config(variant, **OPTIONS[option]), backend="cpu")
    if fused:
        model.fuse()
    for lengths in LENGTHS:
        compare_with_documents_alone(model, lengths, 1e-5, 1e-4)


def test_without_it_documents_are_seen():
    model = lively(model_config("baseline"), backend="cpu")
    _, window = packed(LENGTHS[0], model.config, "cpu")
    across = model(window)
    model.document_opening = OPENING
    within = model(window)
    assert torch.equal(across[:, : LENGTHS[0][0]], within[:, : LENGTHS[0][0]])
    assert relative_error(within[:, LENGTHS[0][0]:], across[:, LENGTHS[0][0]:]) > 1e-3


def test_attention_is_analysed_within_documents():
    model = lively(model_config("decoupled", null_attn=True), backend="cpu")
    documents, window = packed((24, 24), model.config, "cpu")
    alone = [attention_statistics(model, document[None]) for document in documents]
    model.document_opening = OPENING
    found = attention_statistics(model, window)
    for name in ("attention_entropy", "attention_entropy_fraction", "null_mass"):
        torch.testing.assert_close(found[name], (alone[0][name] + alone[1][name]) / 2, rtol=1e-4, atol=1e-5)


def test_documents_of_one_token_have_no_spread():
    model = lively(model_config("decoupled"), backend="cpu")
    model.document_opening = OPENING
    found = attention_statistics(model, torch.full((2, 8), OPENING))
    assert (found["attention_entropy_fraction"] == 0).all()


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["fused", "compiled", "plain"])
@pytest.mark.parametrize(("variant", "given"), [
    ("baseline", {}), ("baseline", {"null_attn": True}), ("gqa", {}), ("bottleneck", {}),
    ("decoupled", {"null_attn": True, "tie_qk": True}), ("baseline", {"n_heads": 2, "d_model": 256}),
])
def test_on_a_gpu(variant, given, way):
    shape = {"d_model": 256, "d_ff": 512, "max_seq_len": 1024, "phases": "1024@0"} if "d_model" not in given else {
        "d_ff": 512, "max_seq_len": 1024, "phases": "1024@0"}
    config = model_config(variant, **shape, **given)
    width = max(config.qk_head_dim, config.v_head_dim)
    backend = choose_backend(torch.device("cuda"), torch.bfloat16, width, doc_mask=True)
    assert backend == "narrow"
    model = lively(config, backend=backend, device="cuda", param_dtype=torch.bfloat16, compute_dtype=torch.bfloat16)
    if way == "fused":
        model.fuse()
    elif way == "compiled":
        torch._dynamo.reset()
        model.compile()
    # One sequence: the lengths of documents would otherwise be other graphs and other tiles.
    for lengths in ((300, 1, 500, 223), (1024,)):
        compare_with_documents_alone(model, lengths, 0.02, 0.06)


# ---- runs ------------------------------------------------------------------------------------------

def short_documents(folder, **meta):
    """A token file of documents of about 20 ids, and the options of a run that reads it."""
    ids = np.random.default_rng(0).integers(0, 299, 40_000)
    ids[np.random.default_rng(1).random(40_000) < 0.05] = 299
    known = {"tokens": 40_000, "documents": 2000, "encoding": "own", "vocab_size": 300, "max_id": 299}
    data = write_npy(folder / "x.npy", ids, meta=known | meta)
    return {"path": str(data), "vocab_size": 300}


def test_a_run_within_documents(tmp_path):
    given = short_documents(tmp_path, eot=299)
    directory, rows = run(tmp_path, **given, doc_mask=True, steps=8, eval_every=4, save_every=4)
    _, across = run(tmp_path, **given, tag="across", steps=8, eval_every=4)
    assert next(row for row in rows if row["type"] == "meta")["doc_mask"] is True
    ours, others = losses(rows), losses(across)
    assert abs(ours[1] - others[1]) < 0.05
    assert all(ours[step] != others[step] for step in ours)
    assert all(val_losses(rows)[step] != val_losses(across)[step] for step in (4, 8))
    again = tmp_path / "again"
    again.mkdir()
    saved = str(directory / "step00000004.pt")
    resumed, _ = run(again, **given, doc_mask=True, steps=8, eval_every=4, resume=True, ckpt=saved)
    assert_same_weights(weights(resumed), weights(directory))
    with pytest.raises(OnebError, match="--doc-mask: .* -> "):
        run(again, **given, steps=8, resume=True, ckpt=saved)


@pytest.mark.slow
def test_prepared_books_are_trained_on_as_they_are(tmp_path, books_npy):
    _, rows = run(tmp_path, path=str(books_npy), vocab_size=50257, d_model=32, n_layers=1, d_ff=64, sem_dim=8,
                  geo_dim=16, attn_dim=16, n_heads=2, doc_mask=True, steps=20, eval_every=0, lr=1e-2)
    meta = next(row for row in rows if row["type"] == "meta")
    assert (meta["encoding"], meta["train_tokens"] + meta["val_tokens"]) == ("gpt2", len(np.load(books_npy)))
    found = losses(rows)
    assert found[1] == pytest.approx(math.log(50257), abs=0.1)
    assert found[20] < found[1] - 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("given", [
    {"variant": "baseline", "deterministic": True}, {"variant": "decoupled", "deterministic": True},
    {"variant": "gqa", "precision": "fp8", "n_heads": 8}, {"variant": "baseline", "precision": "fp16"},
    {"variant": "bottleneck", "precision": "fp32"},
    {"variant": "baseline", "grad_checkpoint": "all", "null_attn": True},
])
def test_runs_on_a_gpu(tmp_path, given):
    """As many ways as there are: the loss falls as it does in fp32 on the CPU, and a resumed run is the same run."""
    given = short_documents(tmp_path, eot=299) | {"d_model": 128, "n_heads": 2, "d_ff": 256, "device": "cuda"} | given
    if given.get("precision") == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("fp8 products need compute capability 8.9")
    directory, rows = run(tmp_path, **given, doc_mask=True, eval_every=0, save_every=6)
    on_cpu = {"device": "cpu", "precision": "fp32", "deterministic": False, "tag": "cpu"}
    _, expected = run(tmp_path, **given | on_cpu, doc_mask=True, eval_every=0)
    for step, loss in losses(expected).items():
        assert losses(rows)[step] == pytest.approx(loss, rel=0.02), step
    if given.get("deterministic"):
        again = tmp_path / "again"
        again.mkdir()
        resumed, _ = run(again, **given, doc_mask=True, eval_every=0, resume=True,
                         ckpt=str(directory / "step00000006.pt"))
        assert_same_weights(weights(resumed), weights(directory))


def test_data_must_say_what_ends_documents(tmp_path):
    with pytest.raises(OnebError, match=r"--doc-mask needs the id that ends documents.*`eot: ID`"):
        run(tmp_path, **short_documents(tmp_path), doc_mask=True)


@pytest.mark.parametrize(("meta", "expected"), [
    ({"eot": 0}, 0), ({"eot": 299}, 299), ({"encoding": "bytes"}, 256), ({"encoding": "gpt2"}, 50256),
])
def test_the_opening_id(tmp_path, meta, expected):
    config = resolve({**NANO, **short_documents(tmp_path, **meta), "doc_mask": True})
    assert build(config, print).model.document_opening == expected


def test_losses_with_and_without_it_are_not_compared(tmp_path):
    given = short_documents(tmp_path, eot=299)
    directory, _ = run(tmp_path, **given, steps=4, eval_every=2, save_every=4)
    for doc_mask in (False, True):
        parts = build(resolve({**NANO, **given, "steps": 8, "doc_mask": doc_mask}), print)
        start = reload(parts, directory / "step00000004.pt")
        assert math.isinf(start.best_val_loss) == doc_mask
