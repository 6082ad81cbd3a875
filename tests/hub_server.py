"""A Hugging Face Hub on loopback, and the CDN that it redirects to: listings, ETags, ranges, and faults to order.

What they send is what the Hub's own answers carry (huggingface_hub reads no more than that), among it the headers by
which a client with hf_xet would leave HTTP for the Xet protocol, which nobody speaks here.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

COMMIT = "87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
_PAGE = 3  # entries of a listing, so that there is more than one page
_STEP = 16 * 1024


@dataclass
class Fault:
    """What goes wrong with one request.

    Args:
        where: "api" (listings), "head" and "resolve" (a file's address at the Hub), "cdn", or "other".
        status: answer this instead.
        headers: with it, or instead of the right ones; a function is asked when they are sent.
        cut_after, stall_after, trickle_after: send so many bytes of the body, then close, send nothing, or 5 KB
            a second.
        flip: change a byte of the body.
        path: only of requests with this in their paths.
        no_ranges: send all of the file whatever range was asked for.
        body: instead of the right one.
    """

    where: str
    status: int | None = None
    headers: dict[str, str | Callable[[], str]] = field(default_factory=dict)
    cut_after: int | None = None
    stall_after: int | None = None
    trickle_after: int | None = None
    flip: bool = False
    no_ranges: bool = False
    body: bytes | None = None
    path: str = ""


@dataclass
class Request:
    """What a client asked for."""

    where: str
    path: str
    start: int  # of the range, 0 without
    sent: int = 0  # bytes of the body
    authorized: bool = False
    at: float = field(default_factory=time.monotonic)


@dataclass
class Hub:
    """Data sets by name, each one's files by path; ``gated`` ones want a token."""

    datasets: dict[str, dict[str, bytes]]
    gated: set[str] = field(default_factory=set)
    faults: list[Fault] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    commit: str = COMMIT  # of every data set
    small: int = 0  # files up to so many bytes are in git itself, not in LFS
    endpoint: str = ""
    cdn: str = ""
    held: dict[str, threading.Event] = field(default_factory=dict)  # files that the CDN sends once their event is set
    closing: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def asked(self, *where: str) -> list[Request]:
        """Requests, of ``where`` only if given; without what the client asks for about itself."""
        return [request for request in self.requests if request.where in (where or ("api", "head", "resolve", "cdn"))]

    def environment(self, home: object) -> dict[str, str]:
        """For a process whose Hub this is, its cache under ``home``."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "NO_PROXY": "127.0.0.1",
                "HF_HUB_DOWNLOAD_TIMEOUT": "600", "HF_HUB_ETAG_TIMEOUT": "600", "HF_TOKEN": "", "HF_HUB_OFFLINE": "0"}

    def recover(self) -> None:
        """No more faults."""
        with self.lock:
            self.faults.clear()


@contextlib.contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """``hub``, answering until the end of the block."""
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), type(kind.__name__, (kind,), {"hub": hub}))
               for kind in (_HubHandler, _CdnHandler)]
    hub.endpoint, hub.cdn = (f"http://127.0.0.1:{server.server_port}" for server in servers)
    threads = [threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True) for server in servers]
    for server, thread in zip(servers, threads, strict=True):
        server.daemon_threads = True
        server.block_on_close = False
        thread.start()
    try:
        yield hub
    finally:
        hub.closing.set()
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: object) -> None:
        pass

    def begin(self, where: str) -> tuple[Request, Fault | None]:
        wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        request = Request(where, unquote(self.path), int(wanted[1]) if wanted else 0,
                          authorized="Authorization" in self.headers)
        with self.hub.lock:
            self.hub.requests.append(request)
            fault = next((fault for fault in self.hub.faults if fault.where == where and fault.path in request.path),
                         None)
            if fault is not None:
                self.hub.faults.remove(fault)
        return request, fault

    def answer(self, status: int, body: bytes = b"", headers: dict | None = None,
               request: Request | None = None, fault: Fault | None = None) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(body))} | (headers or {})).items():
            self.send_header(name, value() if callable(value) else value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            self.send_body(body, request, fault or Fault(""))
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def send_body(self, body: bytes, request: Request | None, fault: Fault) -> None:
        stops = [stop for stop in (fault.cut_after, fault.stall_after, fault.trickle_after) if stop is not None]
        whole = min([len(body), *stops])
        for first in range(0, whole, _STEP):
            if request is not None:
                request.sent = min(first + _STEP, whole)  # before: a client that has it all may be looked at at once
            self.wfile.write(body[first:min(first + _STEP, whole)])
        if stops:
            self.close_connection = True
        if fault.stall_after is not None:
            self.hub.closing.wait(600)
        elif fault.trickle_after is not None:
            for first in range(whole, len(body), 100):
                self.wfile.write(body[first:first + 100])
                if self.hub.closing.wait(0.02):
                    break

    def refuse(self, fault: Fault) -> None:
        self.answer(fault.status or 500, b"{}" if fault.body is None else fault.body, fault.headers)


class _HubHandler(_Handler):
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        resolve = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        listing = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/(tree|revision)/([^/]+)/?(.*)", path)
        found = resolve or listing
        # The client asks for other things, too, about itself.
        where = "other" if not found else "api" if listing else "head" if self.command == "HEAD" else "resolve"
        request, fault = self.begin(where)
        if fault is not None:
            self.refuse(fault)
        elif found is None or found[1] not in self.hub.datasets:
            self.answer(404, headers={"X-Error-Code": "RepoNotFound"})
        elif found[1] in self.hub.gated and not request.authorized:
            self.answer(401, headers={"X-Error-Code": "GatedRepo"})
        elif found[2 if resolve else 3] not in ("main", self.hub.commit):
            self.answer(404, headers={"X-Error-Code": "RevisionNotFound"})
        elif resolve:
            self.send_file(resolve[1], resolve[3])
        elif listing[2] == "revision":
            self.send_json({"id": listing[1], "sha": self.hub.commit})
        else:
            self.send_tree(self.hub.datasets[listing[1]], listing[4])

    def send_file(self, dataset: str, path: str) -> None:
        data = self.hub.datasets[dataset].get(path)
        commit = {"X-Repo-Commit": self.hub.commit}
        if data is None:
            self.answer(404, headers=commit | {"X-Error-Code": "EntryNotFound"})
        elif len(data) <= self.hub.small:
            self.answer(200, data, commit | {"ETag": f'"{_git_oid(data)}"'})
        else:
            sha256 = _sha256(data)
            self.answer(302, headers=commit | {
                "Location": f"{self.hub.cdn}/{quote(dataset)}/{quote(path)}?Signature={sha256[:8]}",
                "X-Linked-Size": str(len(data)), "X-Linked-ETag": f'"{sha256}"', "ETag": f'"{_git_oid(data)}"',
                "X-Xet-Hash": sha256,
                "Link": f'<{self.hub.endpoint}/api/datasets/{dataset}/xet-read-token>; rel="xet-auth"',
            })

    def send_tree(self, files: dict[str, bytes], folder: str) -> None:
        below = [path for path in files if not folder or path.startswith(f"{folder}/")]
        if folder and not below:
            self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
            return
        entries = [self.entry(path, files[path]) for path in below]
        entries += [{"type": "directory", "path": parent, "oid": "0" * 40, "size": 0}
                    for parent in sorted({path.rpartition("/")[0] for path in below} - {"", folder})]
        first = int(parse_qs(urlsplit(self.path).query).get("cursor", ["0"])[0])
        page = self.path.partition("?")[0]
        more = {"Link": f'<{self.hub.endpoint}{page}?recursive=true&cursor={first + _PAGE}>; rel="next"'}
        self.send_json(entries[first:first + _PAGE], more if first + _PAGE < len(entries) else {})

    def entry(self, path: str, data: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(data), "oid": _git_oid(data)}
        if len(data) > self.hub.small:
            entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 135}
        return entry

    def send_json(self, value: object, headers: dict[str, str] | None = None) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"} | (headers or {}))


class _CdnHandler(_Handler):
    def do_GET(self) -> None:
        _, owner, name, path = unquote(urlsplit(self.path).path).split("/", 3)
        if (held := self.hub.held.get(path)) is not None:
            held.wait(600)
        request, fault = self.begin("cdn")
        data = self.hub.datasets[f"{owner}/{name}"][path]
        if fault is not None and (fault.status is not None or fault.body is not None):
            self.refuse(fault)
        elif request.start >= len(data) > 0:
            self.answer(416, headers={"Content-Range": f"bytes */{len(data)}"})
        else:
            self.send_range(data, request, fault or Fault("cdn"))

    def send_range(self, data: bytes, request: Request, fault: Fault) -> None:
        start = 0 if fault.no_ranges else request.start
        body = data[start:]
        if fault.flip:
            body = bytes([body[0] ^ 1]) + body[1:]
        headers = {"ETag": f'"{_sha256(data)}"', "Accept-Ranges": "bytes"}
        partly = "Range" in self.headers and not fault.no_ranges
        if partly:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self.answer(206 if partly else 200, body, headers | fault.headers, request, fault)


@functools.lru_cache(maxsize=32)
def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
