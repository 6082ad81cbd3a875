"""Fixtures of the tests of ``--save-to``, for the files that name this one in ``pytest_plugins``."""

import logging

import pytest
from mirror_helpers import PART, PATIENCE_S
from s3_server import BUCKET, Proxy, client, environment, s3_server

from oneb.checkpoints import mirror, place, remote
from oneb.checkpoints.mirror import Mirror


@pytest.fixture(scope="module")
def port():
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    with s3_server() as port:
        client(port).create_bucket(Bucket=BUCKET)
        yield port


@pytest.fixture
def proxy(port, impatient, monkeypatch):
    """A proxy of its own, the environment that points to it, and an empty bucket behind it."""
    s3 = client(port)
    for known in s3.list_objects_v2(Bucket=BUCKET).get("Contents", ()):
        s3.delete_object(Bucket=BUCKET, Key=known["Key"])
    faulty = Proxy(port)
    for name, value in environment(faulty.url).items():
        monkeypatch.setenv(name, value)
    yield faulty
    faulty.close()


@pytest.fixture
def impatient(monkeypatch):
    """Attempts soon after each other; and S3's smallest parts, so that a few megabytes are many of them.

    An answer is waited for longer than any machine takes: the tests of silence shorten what they are about.
    """
    for module, name, value in (
        (place, "CONNECT_TIMEOUT_S", PATIENCE_S), (place, "READ_TIMEOUT_S", PATIENCE_S),
        (place, "REQUEST_S", PATIENCE_S), (place, "REQUEST_ATTEMPTS", 1), (mirror, "RETRY_S", (0.1, 0.3)),
        (mirror, "FINISH_RETRY_S", 0.1), (mirror, "STALL_S", PATIENCE_S), (remote, "STALL_S", PATIENCE_S),
        (remote, "CHECK_S", PATIENCE_S), (place, "BLOCK_BYTES", PART), (mirror, "BLOCK_BYTES", PART),
    ):
        monkeypatch.setattr(module, name, value)


@pytest.fixture
def mirrors(impatient):
    """Makes mirrors that are closed in the end, and tells what each said."""
    made = []

    def make(where, directory):
        said = []
        made.append(Mirror(str(where), directory, say=said.append))
        made[-1].said = said
        return made[-1]

    yield make
    for one in made:
        one.close()
