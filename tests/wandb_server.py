"""A W&B server on loopback, as much of one as the real client needs to be online; a process of its own, which a test
kills, or tells to hang.

    python tests/wandb_server.py FOLDER [--hang-at login|start|rows] [--die-at rows] [--after N] [--port PORT]

Writes ``FOLDER/port`` when it listens, and every history line that it is sent to ``FOLDER/history.jsonl``. Speaks
GraphQL by the operation's name (of the client's own documents) and the client's ``file_stream`` protocol; everything
else is answered with an empty object.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import signal
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

ENTITY = {"id": "RW50aXR5OjE=", "name": "tester"}
FOREVER_S = 3600.0


class Server(ThreadingHTTPServer):
    """What was sent, and what is to go wrong: ``hang_at`` or ``die_at`` a stage, after ``after`` requests of it."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, folder: Path, port: int, hang_at: str | None, die_at: str | None, after: int) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.folder = folder
        self.hang_at, self.die_at, self.after = hang_at, die_at, after
        self.lock = threading.Lock()
        self.seen: dict[str, int] = {}
        self.history: dict[str, list[str]] = {}
        self.config: dict[str, str] = {}

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up in the middle is nobody's fault."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def reached(self, stage: str) -> None:
        """A request of ``stage`` came in: go wrong if it is time to."""
        with self.lock:
            count = self.seen[stage] = self.seen.get(stage, 0) + 1
        if count <= self.after:
            return
        if stage == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        # A server that hangs, hangs for whatever it is asked from then on.
        if self.hang_at and self.seen.get(self.hang_at, 0) > self.after:
            time.sleep(FOREVER_S)

    def bucket(self, name: str, project: str) -> dict:
        """A run, as ``upsertBucket`` and the query before a resume describe it."""
        lines = self.history.get(name, [])
        return {
            "id": f"id-{name}", "name": name, "displayName": name, "description": None, "sweepName": None,
            "config": self.config.get(name, "{}"), "tags": [], "notes": None, "summaryMetrics": "{}",
            "project": {"id": "project", "name": project, "entity": ENTITY}, "wandbConfig": json.dumps({"t": 1}),
            "historyLineCount": len(lines), "eventsLineCount": 0, "logLineCount": 0,
            "historyTail": json.dumps(lines[-1:]), "eventsTail": "[]",
        }

    def take_rows(self, run: str, body: dict) -> None:
        """Keep the history lines of a ``file_stream`` request, if it has any."""
        history = (body.get("files") or {}).get("wandb-history.jsonl")
        if not history:
            return
        self.reached("rows")
        with self.lock, open(self.folder / "history.jsonl", "a") as file:
            for line in history["content"]:
                self.history.setdefault(run, []).append(line)
                file.write(line.strip() + "\n")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer({})

    do_PUT = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        if self.path.endswith("/graphql"):
            request = json.loads(body)
            found = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])
            self._answer({"data": self._graphql(found.group(1) if found else "", request.get("variables") or {})})
        elif self.path.endswith("/file_stream"):
            self.server.take_rows(self.path.split("/")[-2], json.loads(body))
            self._answer({})
        else:
            self._answer({})

    def _graphql(self, operation: str, variables: dict) -> dict:
        server, name = self.server, variables.get("name") or "run"
        project = variables.get("project") or "oneb"
        with open(server.folder / "operations.txt", "a") as file:
            file.write(f"{operation} {json.dumps(variables)[:300]}\n")
        if operation == "Viewer":
            server.reached("login")
            return {"viewer": {"id": "VXNlcjox", "entity": "tester", "username": "tester", "email": "tester@localhost",
                               "flags": "{}", "teams": {"edges": []}}}
        if operation == "ServerFeaturesQuery":
            return {"serverInfo": {"features": []}}
        if operation == "RunResumeStatus":
            there = name in server.history
            return {"model": {"id": "project", "name": project, "entity": ENTITY,
                              "bucket": server.bucket(name, project) if there else None}}
        if operation == "UpsertBucket":
            server.reached("start")
            inserted = name not in server.history
            server.history.setdefault(name, [])
            server.config[name] = variables.get("config") or server.config.get(name, "{}")
            return {"upsertBucket": {"bucket": server.bucket(name, project), "inserted": inserted}}
        if operation == "CreateRunFiles":
            host, port = server.server_address[:2]
            return {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": [
                {"name": file, "uploadUrl": f"http://{host}:{port}/upload"} for file in variables.get("files", [])]}}
        return {}

    def _answer(self, value: dict) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--hang-at", choices=("login", "start", "rows"))
    parser.add_argument("--die-at", choices=("login", "start", "rows"))
    parser.add_argument("--after", type=int, default=0)
    args = parser.parse_args()
    server = Server(args.folder, args.port, args.hang_at, args.die_at, args.after)
    (args.folder / "port.tmp").write_text(str(server.server_address[1]))
    (args.folder / "port.tmp").rename(args.folder / "port")
    server.serve_forever()


if __name__ == "__main__":
    main()
