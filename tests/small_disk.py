"""File systems of a size that can really be full, or read-only, or without room for another file."""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

__all__ = ["disk"]

_REPOSITORY = Path(__file__).parents[1]
_INSIDE = "ONEB_TEST_IN_NAMESPACE"


def mount(folder: Path, **options) -> None:
    """Mount a tmpfs with these options on ``folder``.

    Raises:
        OSError, CalledProcessError: nothing may be mounted here.
    """
    words = ",".join(name if value is True else f"{name}={value}" for name, value in options.items())
    subprocess.run(["mount", "-t", "tmpfs", "-o", words, "tmpfs", str(folder)], check=True, capture_output=True)


def make_read_only(folder: Path) -> None:
    """What is mounted at ``folder`` can no longer be written, not even by root."""
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)


def fill(folder: Path) -> Path:
    """Write a file until the disk has no byte left; returns its path."""
    path = folder / "large"
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    assert shutil.disk_usage(folder).free == 0
    return path


def _run_in_namespace(node: str) -> None:
    """Run a test where this user is root: in a user and mount namespace of its own."""
    if _INSIDE in os.environ or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here: needs root, or a kernel that lets users have namespaces")
    done = subprocess.run(["unshare", "-rm", sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", node],
                          env={**os.environ, _INSIDE: "1"}, cwd=_REPOSITORY, capture_output=True, text=True)
    if done.returncode:
        pytest.fail(done.stdout + done.stderr, pytrace=False)
    pytest.skip("passed, in a namespace of its own")


@pytest.fixture
def disk(request, tmp_path) -> Iterator[Callable[..., Path]]:
    """Makes a file system of a given size in bytes, with more tmpfs options if need be."""
    mounted = []

    def make(size: int, **options) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        try:
            mount(folder, size=size, **options)
        except (OSError, subprocess.CalledProcessError):
            _run_in_namespace(request.node.nodeid)
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)
