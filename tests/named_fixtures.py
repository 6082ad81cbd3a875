"""Fixtures of the tests of named data, for the files that name this one in ``pytest_plugins``."""

from collections.abc import Iterator

import pytest
from hub_server import Hub, serve
from named_helpers import REPO, TEXTS, Machine, parquet, ready


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(Hub({REPO: ready(), "somebody/books": {"a.parquet": parquet(TEXTS)},
                    "HuggingFaceFW/fineweb-edu": {"sample/10BT/000.parquet": parquet(TEXTS)}})) as hub:
        yield hub
        for event in hub.held.values():
            event.set()


@pytest.fixture
def machine(hub, tmp_path) -> Machine:
    return Machine(hub, tmp_path / "a")
