"""The command against a Hub on loopback, in processes of their own: ready tokens, parquet, and the way back to text."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import COMMIT, Fault, Hub, serve

ROOT = Path(__file__).parents[1]
TEXTS = [[f"document {number} of file {file} " + "word " * (number % 50) for number in range(400)] for file in range(3)]
DOCUMENTS = [np.random.default_rng(number).integers(0, 50256, 5 + number % 300).tolist() for number in range(200)]
STREAM = [token for document in DOCUMENTS for token in (50256, *document)]
READY = [token for document in DOCUMENTS for token in (*document, 50256)]


def shard(ids: list[int]) -> bytes:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    return header.tobytes() + np.array(ids, "<u2").tobytes()


def parquet(texts: list[str]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.table({"body": texts, "text": texts}), buffer, row_group_size=100)
    return buffer.getvalue()


@pytest.fixture
def hub() -> Iterator[Hub]:
    bounds = [0, 5000, 10_000, 15_000, len(STREAM)]
    shards = {f"finewebedu_train_{number + 1:06d}.bin": shard(STREAM[bounds[number]:bounds[number + 1]])
              for number in range(4)}
    text = {f"sample/10BT/{number:03d}_00000.parquet": parquet(texts) for number, texts in enumerate(TEXTS)}
    with serve(Hub({"kjj0/finewebedu10B-gpt2": shards | {"finewebedu_val_000000.bin": shard([1, 2, 3])},
                    "HuggingFaceFW/fineweb-edu": text | {"README.md": b"no data"},
                    "somebody/books": {f"data/{number}.parquet": parquet(texts) for number, texts in enumerate(TEXTS)}
                    })) as hub:
        yield hub


def run(hub: Hub, folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "prepare_fineweb.py"), "--output", str(folder / "x.npy"), *arguments]
    return subprocess.run(command, text=True, capture_output=True,
                          env=os.environ | hub.environment(folder / "home") | environment)


def ids(folder: Path) -> list[int]:
    return np.load(folder / "x.npy").tolist()


def meta(folder: Path) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in (folder / "x.npy.meta").read_text().splitlines())


def fetched(hub: Hub) -> set[str]:
    return {request.path.rpartition("/")[2] for request in hub.asked("resolve")}


def test_ready_tokens_are_the_default_and_no_more_of_them_than_needed(hub, gpt2_cache, tmp_path):
    done = run(hub, tmp_path, "--tokens", "7K")
    assert done.returncode == 0, done.stderr
    assert ids(tmp_path) == READY[:7000]
    assert fetched(hub) == {"finewebedu_train_000001.bin", "finewebedu_train_000002.bin"}
    about = meta(tmp_path)
    assert (about["tokens"], about["encoding"], about["revision"]) == ("7000", "gpt2", COMMIT)
    assert about["source"] == f"kjj0/finewebedu10B-gpt2@{COMMIT} finewebedu_train_*.bin"
    sources = json.loads((tmp_path / "x.npy.sources.json").read_text())
    assert [source["name"] for source in sources] == ["finewebedu_train_000001.bin", "finewebedu_train_000002.bin"]
    assert all(len(source["sha256"]) == 64 for source in sources)


def test_with_the_files_in_the_cache_no_network_is_needed(hub, gpt2_cache, tmp_path):
    assert run(hub, tmp_path, "--tokens", "7K").returncode == 0
    before = len(hub.requests)
    done = run(hub, tmp_path, "--tokens", "7K", "--force", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert ids(tmp_path) == READY[:7000]
    assert len(hub.requests) == before


def test_more_than_is_ready_is_tokenized(hub, gpt2_cache, tmp_path):
    done = run(hub, tmp_path, "--tokens", str(len(READY) + 1))
    assert done.returncode == 0, done.stderr
    assert "fewer than --tokens; tokenizing the text instead" in done.stderr
    assert meta(tmp_path)["source"].startswith(f"HuggingFaceFW/fineweb-edu@{COMMIT} ")


@pytest.mark.parametrize("workers", ["1", "2"])
def test_parquet_from_the_hub(hub, gpt2_cache, tmp_path, workers):
    done = run(hub, tmp_path, "--tokens", "30K", "--tokenizer", "bytes", "--workers", workers)
    assert done.returncode == 0, done.stderr
    expected = [token for text in TEXTS[0] + TEXTS[1] + TEXTS[2] for token in (*text.encode(), 256)]
    assert ids(tmp_path) == expected[:30_000]
    assert fetched(hub) == {"000_00000.parquet"}
    assert meta(tmp_path)["revision"] == COMMIT


def test_any_dataset_and_column(hub, tmp_path):
    done = run(hub, tmp_path, "--source", "somebody/books", "--text-column", "body", "--tokenizer", "bytes",
               "--tokens", "1B")
    assert done.returncode == 0, done.stderr
    assert ids(tmp_path) == [token for texts in TEXTS for text in texts for token in (*text.encode(), 256)]
    assert "fewer than the 1000000000 asked for" in done.stderr


def test_the_hub_fails_and_recovers(hub, gpt2_cache, tmp_path):
    hub.faults += [Fault("cdn", status=503), Fault("cdn", cut_after=3000), Fault("api", status=429,
                                                                               headers={"Retry-After": "1"})]
    done = run(hub, tmp_path, "--tokens", "12K")
    assert done.returncode == 0, done.stderr
    assert ids(tmp_path) == READY[:12_000]
    assert not hub.faults


def test_names_that_are_not_there_are_explained(hub, tmp_path):
    done = run(hub, tmp_path, "--source", "pile", "--tokens", "1M")
    assert done.returncode == 2
    assert "'pile' is not known; wanted fineweb-edu, fineweb, or owner/name" in done.stderr
    done = run(hub, tmp_path, "--source", "nobody/nothing", "--tokens", "1M", "--tokenizer", "bytes")
    assert done.returncode == 2
    assert "no such dataset" in done.stderr
    assert not (tmp_path / "x.npy.parts").exists()
