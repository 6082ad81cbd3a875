"""Fixtures for tests that need real text: tiktoken without a network, and a tokenized set of books."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

__all__ = ["books_npy", "gpt2_cache"]

# A test that a busy machine slows down is not a failed test.
settings.register_profile("oneb", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("oneb")

_SHARED_DATA = Path(__file__).parents[2] / "shared" / "data"
_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"


def books_parquet() -> list[Path]:
    """The parquet files of books beside the repository; skips the test where there are none."""
    files = sorted((_SHARED_DATA / "books").glob("*.parquet"))
    if not files:
        pytest.skip("no shared books beside the repository")
    return files


def write_npy(path: Path, ids, dtype=np.uint16, meta: dict | None = None) -> Path:
    """A token file as numpy itself writes it, with a sidecar of ``meta`` if given."""
    np.save(path, np.asarray(ids, dtype))
    if meta is not None:
        Path(f"{path}.meta").write_text("".join(f"{key}: {value}\n" for key, value in meta.items()))
    return path


@pytest.fixture(scope="session")
def gpt2_cache(tmp_path_factory):
    """A TIKTOKEN_CACHE_DIR with GPT-2's two files under the names tiktoken gives them (sha1 of the URL)."""
    source = _SHARED_DATA / "gpt2_bpe"
    if not source.is_dir():
        pytest.skip("no shared GPT-2 vocabulary beside the repository")
    cache = tmp_path_factory.mktemp("tiktoken")
    for name in ("vocab.bpe", "encoder.json"):
        shutil.copy(source / name, cache / hashlib.sha1((_GPT2_URL + name).encode()).hexdigest())
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)
    yield cache
    if before is None:
        del os.environ["TIKTOKEN_CACHE_DIR"]
    else:
        os.environ["TIKTOKEN_CACHE_DIR"] = before


@pytest.fixture(scope="session")
def books_npy(gpt2_cache, tmp_path_factory) -> Path:
    """1M GPT-2 tokens of books, made by the real command."""
    from oneb.cli.prepare import main

    output = tmp_path_factory.mktemp("books") / "books.npy"
    files = [str(path) for path in books_parquet()]
    assert main(["--tokens", "1M", "--output", str(output), "--input", *files]) == 0
    return output
