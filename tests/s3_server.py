"""A real S3 protocol server (moto's) on loopback, and before it a proxy that refuses, stalls, cuts and alters."""

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator

import boto3
from moto.server import ThreadedMotoServer

BUCKET = "bucket"
S3 = f"s3://{BUCKET}/here"
BUSY = (b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nContent-Length: 66\r\nConnection: close\r\n\r\n"
        b"<Error><Code>ServiceUnavailable</Code><Message>no</Message></Error>")


class Proxy:
    """TCP on loopback to the server at ``port``, a request a connection.

    Attributes:
        fault: called with a request's method and target; gives what happens to it: ``refuse`` (reset), ``busy`` (503),
            ``stall`` (the request is not even read to its end), ``silent`` (it is, and never answered), ``cut`` (half
            of the answer's body), ``flip`` (an altered byte in it), ``die`` (reset after 2 MB of the request), None.
        requests: methods and targets so far.
    """

    def __init__(self, port: int) -> None:
        self.fault: Callable[[str, str], str | None] = lambda method, target: None
        self.requests: list[tuple[str, str]] = []
        self.upstream = port
        self.over = threading.Event()
        self.released = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def count(self, method: str, part: str) -> int:
        """Requests of that method with ``part`` in their targets."""
        return sum(known == method and part in target for known, target in self.requests)

    def close(self) -> None:
        self.over.set()
        self.released.set()
        with contextlib.suppress(OSError):
            self.listener.shutdown(socket.SHUT_RDWR)  # closing alone waits for the thread that accepts
        self.listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self.listener.accept()[0]
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                if not (some := client.recv(65536)):
                    return
                head += some
            line, _, rest = head.partition(b"\r\n")
            method, target = line.decode().split()[:2]
            self.requests.append((method, target))
            fault = self.fault(method, target)
            if fault == "refuse":
                _reset(client)
            elif fault == "busy":
                client.sendall(BUSY)
                client.settimeout(0.5)
                while client.recv(65536):
                    pass
            elif fault == "stall":
                self.released.wait()
            else:
                with socket.create_connection(("127.0.0.1", self.upstream)) as server:
                    server.sendall(line + b"\r\nConnection: close\r\n" + rest)
                    self._pump(client, server, fault)
            # Closing alone waits for the thread that reads from it.
            client.shutdown(socket.SHUT_RDWR)

    def _pump(self, client: socket.socket, server: socket.socket, fault: str | None) -> None:
        sending = threading.Thread(target=_forward, args=(client, server, fault), daemon=True)
        sending.start()
        if fault == "silent":
            self.released.wait()
        elif fault in ("cut", "flip"):
            answer = b""
            while some := server.recv(1 << 20):
                answer += some
            head, _, body = answer.partition(b"\r\n\r\n")
            if fault == "cut":
                body = body[:len(body) // 2]
            elif body:
                middle = len(body) // 2
                body = body[:middle] + bytes([body[middle] ^ 1]) + body[middle + 1:]
            client.sendall(head + b"\r\n\r\n" + body)
        else:
            while some := server.recv(1 << 20):
                client.sendall(some)


def _forward(client: socket.socket, server: socket.socket, fault: str | None) -> None:
    sent = 0
    with contextlib.suppress(OSError):
        while some := client.recv(1 << 20):
            server.sendall(some)
            sent += len(some)
            if fault == "die" and sent > 2_000_000:
                _reset(server)
                _reset(client)
                return


def _reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)
    connection.close()


@contextlib.contextmanager
def s3_server() -> Iterator[int]:
    """The port of a server of its own."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        yield server.get_host_and_port()[1]
    finally:
        server.stop()


def environment(url: str) -> dict[str, str]:
    """What a user of that S3 has in the environment."""
    return {"AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": "/dev/null",
            "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}


def client(port: int):
    """boto3's own, past the proxy: what really lies there."""
    return boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1",
                        aws_access_key_id="key", aws_secret_access_key="secret")


def stored(port: int) -> dict[str, bytes]:
    s3 = client(port)
    return {known["Key"].removeprefix("here/run/"): s3.get_object(Bucket=BUCKET, Key=known["Key"])["Body"].read()
            for known in s3.list_objects_v2(Bucket=BUCKET).get("Contents", ())}


def uploads_under_way(port: int) -> list:
    return client(port).list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
