"""Names of data on the command line, against paths, and what is nearly one of the two."""

from __future__ import annotations

from pathlib import Path

import pytest

from oneb.cli.data_size import count_tokens
from oneb.data.names import DataName, named_folder, parse_name
from oneb.errors import OnebError


@pytest.mark.parametrize(("text", "source", "n_tokens", "folder"), [
    ("fineweb-edu:1B", "fineweb-edu", 10**9, "fineweb-edu-1B"),
    ("fineweb-edu:1000M", "fineweb-edu", 10**9, "fineweb-edu-1B"),
    ("fineweb-edu:1.5B", "fineweb-edu", 1_500_000_000, "fineweb-edu-1.5B"),
    ("fineweb:123456789", "fineweb", 123_456_789, "fineweb-123456789"),
    ("owner/na-me_2.x:5M", "owner/na-me_2.x", 5_000_000, "owner--na-me_2.x-5M"),
    ("owner/name@main:100K", "owner/name@main", 100_000, "owner--name@main-100K"),
])
def test_names(text, source, n_tokens, folder):
    name = parse_name(text)
    assert name == DataName(source, n_tokens)
    assert name.folder("root") == Path("root") / folder
    assert parse_name(str(name)) == name
    assert count_tokens(text, "npy") == n_tokens


@pytest.mark.parametrize("path", ["fineweb_1b.npy", "demo", "data/", "*.npy", "/a:b/c.npy", "a b:1B", "x.npy:y:1B"])
def test_paths_are_no_names(path):
    assert parse_name(path) is None


def test_what_is_no_path_at_all_and_damaged_manifests_tell_nothing(tmp_path):
    assert named_folder("x" * 300) is None
    assert named_folder("~nobody-of-that-name/x") is None
    for content in ("[]", "{", *(f'{{"files": [{{"name": "a.bin", "tokens": {n}}}]}}' for n in ('"x"', "null"))):
        (tmp_path / "dataset.json").write_text(content)
        assert named_folder(str(tmp_path)) == tmp_path
        assert count_tokens(str(tmp_path), "npy") is None


def test_a_file_called_like_a_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_name("fineweb-edu:1B") is not None
    (tmp_path / "fineweb-edu:1B").write_bytes(b"")
    assert parse_name("fineweb-edu:1B") is None


@pytest.mark.parametrize(("path", "message"), [
    ("pile:1B", "'pile' is not a file, nor a name that is known; .* fineweb-edu, fineweb, or owner/name"),
    ("fineweb-edu", "how many tokens.* --data fineweb-edu:1B"),
    ("fineweb-edu:lots", "'lots' is not a count.*fineweb-edu:1B"),
    ("fineweb-edu:", "is not a count"), ("owner/name:0", "less than one"), ("fineweb-edu:1", "at least 2 tokens")])
def test_what_is_nearly_a_name_is_explained(path, message):
    with pytest.raises(OnebError, match=message):
        parse_name(path)
