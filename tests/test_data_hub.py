"""Streaming from the Hub, against a loopback server that speaks enough of its protocol."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from urllib.parse import unquote, urlsplit

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from oneb.cli import prepare as command
from oneb.data import sources
from oneb.data.sources import SOURCES, Skipped, hub_documents
from oneb.errors import OnebError

DATASET = SOURCES["fineweb-edu"]
TEXTS = [[f"document {number} of file {file} " + "word " * (number % 50) for number in range(400)]
         for file in range(2)]


@dataclass
class Hub:
    """Files of one dataset at one revision; ``ranges`` records what was downloaded."""

    files: dict[str, bytes]
    endpoint: str = ""
    ranges: list[tuple[str, int, int]] = field(default_factory=list)
    broken: bool = False


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:  # paths-info
        form = unquote(self.rfile.read(int(self.headers["Content-Length"])).decode().replace("+", " "))
        self.send_json([self.entry(name) for name in self.hub.files if name in form])

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api, content = f"/api/datasets/{DATASET.repo}/", f"/datasets/{DATASET.repo}/resolve/{DATASET.revision}/"
        if path == f"{api}revision/{DATASET.revision}":
            self.send_json({"id": DATASET.repo, "sha": DATASET.revision, "siblings": []})
        elif path.startswith(f"{api}tree/{DATASET.revision}"):
            self.send_json(self.children(path.removeprefix(f"{api}tree/{DATASET.revision}").strip("/")))
        elif path.startswith(content) and path.removeprefix(content) in self.hub.files and not self.hub.broken:
            self.send_range(path.removeprefix(content))
        else:
            self.send_body(404, b"not found")

    def children(self, folder: str) -> list[dict]:
        """The files and folders directly under ``folder``."""
        prefix = f"{folder}/" if folder else ""
        below = [name.removeprefix(prefix) for name in self.hub.files if name.startswith(prefix)]
        folders = sorted({name.partition("/")[0] for name in below if "/" in name})
        return ([self.entry(prefix + name) for name in below if "/" not in name]
                + [{"type": "directory", "path": prefix + name, "oid": "0" * 40} for name in folders])

    def entry(self, name: str) -> dict:
        return {"type": "file", "path": name, "size": len(self.hub.files[name]), "oid": "0" * 40}

    def send_range(self, name: str) -> None:
        data = self.hub.files[name]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", f"bytes=0-{len(data) - 1}"))
        first, last = int(wanted[1]), min(int(wanted[2]), len(data) - 1)
        self.hub.ranges.append((name, first, last + 1))
        self.send_body(206, data[first:last + 1], {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

    def send_json(self, value: object) -> None:
        self.send_body(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_body(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body)), "ETag": '"1"'} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def parquet(texts: list[str]) -> bytes:
    buffer = BytesIO()
    noise = [np.random.default_rng(number).bytes(2000) for number in range(len(texts))]
    pq.write_table(pa.table({"id": noise, "text": texts}), buffer, row_group_size=100)
    return buffer.getvalue()


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    hub = Hub({f"sample/10BT/{number:03d}_00000.parquet": parquet(texts) for number, texts in enumerate(TEXTS)})
    hub.files["sample/10BT/README.md"] = b"not data"
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield hub
    server.shutdown()
    server.server_close()
    thread.join()


def test_documents_arrive_in_order(hub):
    skipped = Skipped()
    assert list(hub_documents(DATASET, "text", skipped, hub.endpoint)) == TEXTS[0] + TEXTS[1]
    assert str(skipped) == ""


def test_only_what_is_needed_is_downloaded(hub):
    documents = hub_documents(DATASET, "text", Skipped(), hub.endpoint)
    assert next(documents) == TEXTS[0][0]
    documents.close()
    assert hub.ranges
    assert {name for name, _, _ in hub.ranges} == {"sample/10BT/000_00000.parquet"}


def test_the_command_streams_the_exact_count(hub, tmp_path, monkeypatch):
    def from_loopback(*arguments: object) -> Iterator[str]:
        return hub_documents(*arguments, endpoint=hub.endpoint)

    monkeypatch.setattr(sources, "hub_documents", from_loopback)
    output = tmp_path / "x.npy"
    assert command.main(["--tokens", "30K", "--tokenizer", "bytes", "--output", str(output)]) == 0
    expected = [token for text in TEXTS[0] + TEXTS[1] for token in (*text.encode(), 256)][:30_000]
    assert np.load(output).tolist() == expected
    assert f"source: {DATASET.repo}@{DATASET.revision}" in (tmp_path / "x.npy.meta").read_text()


def test_failures_are_explained(hub, monkeypatch):
    with pytest.raises(OnebError, match="000_00000.parquet has no column 'body'; it has id, text"):
        next(hub_documents(DATASET, "body", Skipped(), hub.endpoint))
    hub.broken = True
    with pytest.raises(OnebError, match="the Hugging Face Hub did not deliver HuggingFaceFW/fineweb-edu"):
        next(hub_documents(DATASET, "text", Skipped(), hub.endpoint))
    hub.files.clear()
    with pytest.raises(OnebError, match="has no files|did not deliver"):
        next(hub_documents(DATASET, "text", Skipped(), hub.endpoint + "/"))  # a new address: no cached listing
    with pytest.raises(OnebError, match="did not deliver .*Check the network"):
        next(hub_documents(DATASET, "text", Skipped(), "http://127.0.0.1:9"))
