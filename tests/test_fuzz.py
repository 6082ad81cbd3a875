"""The fuzzers' targets (fuzz/targets.py) on seeds, on damaged seeds and on noise; `python fuzz/fuzz.py` goes on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "fuzz"))

from targets import accepts, targets  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol")


@st.composite
def damaged(draw, seeds: tuple[bytes, ...], words: tuple[bytes, ...]) -> bytes:
    """A seed with parts of it overwritten, cut out, doubled or replaced, and perhaps cut short."""
    content = draw(st.sampled_from(seeds))
    pieces = st.binary(max_size=8) | st.sampled_from(words or (b"\0",)) | st.just(b"9" * 5000)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.integers(0, 40)))
        how = draw(st.sampled_from(["replace", "overwrite", "double", "cut"]))
        piece = draw(pieces) if how in ("replace", "overwrite") else content[start:end] * 2 if how == "double" else b""
        content = content[:start] + piece + content[start + len(piece) if how == "overwrite" else end:]
    return content[:draw(st.integers(0, len(content)))] if draw(st.booleans()) else content


def inputs(name: str):
    target = targets()[name]
    return damaged(target.seeds, target.words) | st.binary(max_size=200)


@pytest.mark.parametrize("name", targets())
def test_every_target_accepts_a_seed(name):
    target = targets()[name]
    assert any(accepts(target, seed) for seed in target.seeds)


@pytest.mark.parametrize("name", targets())
@given(data=st.data())
def test_what_is_not_accepted_is_refused_with_a_message(name, data):
    accepts(targets()[name], data.draw(inputs(name)))


@pytest.mark.slow
@pytest.mark.parametrize("name", targets())
@settings(max_examples=20_000)
@given(data=st.data())
def test_the_same_with_many_more_inputs(name, data):
    accepts(targets()[name], data.draw(inputs(name)))
