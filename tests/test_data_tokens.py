"""Token files: every format reads back equal, and every damage is named with its file and offset."""

from __future__ import annotations

import contextlib
import gzip
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from data_helpers import write_npy
from hypothesis import given
from hypothesis import strategies as st

from oneb.cli.data_size import count_tokens
from oneb.data import tokens as tokens_module
from oneb.data.tokens import open_tokens
from oneb.errors import OnebError

VOCAB = 50257
IDS = np.random.default_rng(0).integers(0, VOCAB, 5000)
META = {"tokens": 5000, "documents": 3, "encoding": "gpt2", "vocab_size": VOCAB, "eot": 50256,
        "source": "books", "format": "npy uint16", "max_id": int(IDS.max())}


def write_bin(path: Path, ids, *, magic: int = 20240520, version: int = 1, count: int | None = None) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = magic, version, len(ids) if count is None else count
    path.write_bytes(header.tobytes() + np.asarray(ids, "<u2").tobytes())
    return path


def write_raw(path: Path, ids) -> Path:
    path.write_bytes(np.asarray(ids, "<u2").tobytes())
    return path


def write_pt(path: Path, ids, dtype: torch.dtype = torch.int32, zipped: bool = True) -> Path:
    torch.save(torch.tensor(np.asarray(ids)).to(dtype), path, _use_new_zipfile_serialization=zipped)
    return path


def write_txt(path: Path, ids) -> Path:
    path.write_text("\n".join(" ".join(map(str, row)) for row in np.array_split(np.asarray(ids), 7)))
    return path


WRITERS = {
    "npy uint16": ("x.npy", "npy", lambda path, ids: write_npy(path, ids, np.uint16)),
    "npy uint32": ("x.npy", "npy", lambda path, ids: write_npy(path, ids, np.uint32)),
    "npy int32": ("x.npy", "npy", lambda path, ids: write_npy(path, ids, np.int32)),
    "npy int64": ("x.npy", "npy", lambda path, ids: write_npy(path, ids, np.int64)),
    "npy big-endian": ("x.npy", "npy", lambda path, ids: write_npy(path, ids, ">u2")),
    "bin": ("x.bin", "bin", write_bin),
    "raw": ("x.bin", "raw", write_raw),
    "pt int32": ("x.pt", "pt", write_pt),
    "pt int64": ("x.pt", "pt", lambda path, ids: write_pt(path, ids, torch.int64)),
    "pt uint16": ("x.pt", "pt", lambda path, ids: write_pt(path, ids, torch.uint16)),
    "pt old container": ("x.pt", "pt", lambda path, ids: write_pt(path, ids, zipped=False)),
    "txt": ("x.txt", "txt", write_txt),
}


def message(path, data_format: str = "npy", vocab_size: int = VOCAB) -> str:
    """The error that opening ``path`` raises; it must say which file."""
    with pytest.raises(OnebError) as caught:
        open_tokens(str(path), data_format, vocab_size=vocab_size)
    assert str(path) in str(caught.value)
    return str(caught.value)


# -- Reading -------------------------------------------------------------------------------------

@pytest.mark.parametrize("automatic", [False, True])
@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_reads_back_equal(tmp_path, kind, automatic):
    name, data_format, write = WRITERS[kind]
    path = write(tmp_path / name, IDS)
    tokens = open_tokens(str(path), "auto" if automatic else data_format, vocab_size=VOCAB)
    assert tokens.n_tokens == len(tokens) == len(IDS)
    assert np.array_equal(tokens.read(0, len(IDS)), IDS)
    assert np.array_equal(tokens.read(1234, 77), IDS[1234:1311])
    assert tokens.files == (str(path),)


@pytest.mark.parametrize("kind", ["npy uint16", "npy int64", "bin", "raw", "pt int32"])
def test_binary_files_are_not_loaded(tmp_path, kind):
    name, data_format, write = WRITERS[kind]
    path = write(tmp_path / name, np.resize(IDS, 8 * 2**20))
    Path(f"{path}.meta").write_text(f"tokens: {8 * 2**20}\nmax_id: {IDS.max()}\n")
    tracemalloc.start()  # numpy's memory, too
    tokens = open_tokens(str(path), data_format, vocab_size=VOCAB)
    read = tokens.read(6_001_000, 500)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(read, np.resize(IDS, 6_001_500)[6_001_000:])
    assert peak < {"npy int64": 33, "pt int32": 17}.get(kind, 1) * 2**20  # signed ids are looked at, part by part


@pytest.mark.parametrize("kind", WRITERS)
def test_nothing_is_mapped(tmp_path, kind):
    # Where a mapped file is cut short, the process ends without a word.
    name, data_format, write = WRITERS[kind]
    path = write(tmp_path / name, IDS)
    tokens = open_tokens(str(path), data_format, vocab_size=VOCAB)
    tokens.read(0, len(IDS))
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not say what is mapped")
    assert str(path) not in maps.read_text()


@given(cuts=st.lists(st.integers(1, 4999), max_size=6, unique=True), start=st.integers(0, 5000),
       length=st.integers(0, 5000))
def test_shards_read_as_one_sequence(tmp_path_factory, cuts, start, length):
    folder = tmp_path_factory.mktemp("shards")
    for number, part in enumerate(np.split(IDS, sorted(cuts))):
        write_npy(folder / f"s{number}.npy", part, [np.uint16, np.uint32][number % 2])
    tokens = open_tokens(str(folder), vocab_size=VOCAB)
    length = min(length, 5000 - start)
    assert np.array_equal(tokens.read(start, length), IDS[start:start + length])
    for offset in (0, start, 4999):
        if offset < 5000:
            name, inside = tokens.locate(offset)
            assert np.load(name)[inside] == IDS[offset]


def test_reading_outside_the_data_is_our_own_mistake(tmp_path):
    tokens = open_tokens(str(write_npy(tmp_path / "x.npy", IDS)), vocab_size=VOCAB)
    for start, length in ((-1, 2), (4999, 2), (5001, 0), (3, -1)):
        with pytest.raises(IndexError):
            tokens.read(start, length)


def test_folder_glob_and_order_of_names(tmp_path):
    for name, first in (("b.npy", 2), ("a.npy", 1), ("c.npy", 3), (".hidden.npy", 9)):
        write_npy(tmp_path / name, [first] * 10, meta=META | {"tokens": 10, "max_id": 3})
    write_raw(tmp_path / "other.bin", [7] * 10)
    (tmp_path / "readme.txt").write_text("not tokens")
    assert open_tokens(str(tmp_path), vocab_size=VOCAB).read(0, 30)[::10].tolist() == [1, 2, 3]
    assert open_tokens(str(tmp_path), "raw", vocab_size=VOCAB).n_tokens == 10
    assert open_tokens(f"{tmp_path}/[bc]*", vocab_size=VOCAB).read(0, 20)[::10].tolist() == [2, 3]
    assert ".npy .bin" in message(tmp_path, "auto")
    (tmp_path / "other.bin").unlink()
    assert open_tokens(str(tmp_path), "auto", vocab_size=VOCAB).n_tokens == 30


def test_missing_data_says_how_to_make_it(tmp_path):
    path = tmp_path / "fineweb_1b.npy"
    assert f"python3 prepare_fineweb.py --tokens 100M --output {path}" in message(path)
    assert "python3 prepare_fineweb.py" in message(tmp_path / "*.npy")
    assert "a folder without .npy .bin .pt .txt files (it holds none" in message(tmp_path)
    write_bin(tmp_path / "x.bin", IDS)
    assert "a folder without .npy files (it holds 1 .bin of" in message(tmp_path)
    with pytest.raises(OnebError, match="'parquet' is not known; wanted one of npy, bin"):
        open_tokens("x", "parquet", vocab_size=VOCAB)


# -- Damage --------------------------------------------------------------------------------------

def test_cut_short_or_too_long(tmp_path):
    path = write_npy(tmp_path / "x.npy", IDS)
    path.write_bytes(path.read_bytes()[:128 + 2 * 1000])
    assert "promises 5000 tokens, the file ends at token offset 1000" in message(path)
    path.write_bytes(2 * write_npy(path, IDS).read_bytes())
    assert "promises 5000 tokens, and 10128 bytes follow on them" in message(path)
    path.write_bytes(path.read_bytes()[:50])
    assert "not a .npy file" in message(path)
    path.write_bytes(b"")
    assert "empty file" in message(path)
    header = write_npy(path, IDS).read_bytes()[:128]
    path.write_bytes(header.replace(b"), }", b"\0, }", 1))  # numpy itself raises tokenize.TokenError here
    assert "not a .npy file" in message(path)


def test_not_npy_at_all(tmp_path):
    path = tmp_path / "x.npy"
    path.write_bytes(gzip.compress(b"hello" * 100))
    assert "not a .npy file" in message(path)
    np.save(path, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    assert "holds object" in message(path)


@pytest.mark.parametrize(("array", "fault"), [
    (np.zeros(5, np.float32), "holds float32"), (np.zeros(5, np.uint8), "holds uint8"),
    (np.zeros(5, bool), "holds bool"), (np.zeros((5, 2), np.uint16), r"shape \(5, 2\)"),
    (np.zeros((), np.uint16), r"shape \(\)"), (np.zeros(0, np.uint16), "no tokens"),
    (np.zeros(1, np.uint16), "holds 1 token; wanted at least 2")])
def test_wrong_dtype_or_shape(tmp_path, array, fault):
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(OnebError, match=fault):
        open_tokens(str(tmp_path / "x.npy"), vocab_size=VOCAB)


def test_bin_headers(tmp_path):
    path = tmp_path / "x.bin"
    assert "promises 5001 tokens, the file ends at token offset 5000" in message(
        write_bin(path, IDS, count=5001), "bin")
    assert "promises 4999 tokens, and 2 bytes follow on them" in message(write_bin(path, IDS, count=4999), "bin")
    assert "cut short" in message(write_bin(path, IDS, count=-1), "bin")
    assert "version 2" in message(write_bin(path, IDS, version=2), "bin")
    assert "use --data-format raw" in message(write_bin(path, IDS, magic=1), "bin")
    write_bin(path, IDS)
    path.write_bytes(path.read_bytes()[:1000])
    assert "inside its 1024-byte header" in message(path, "bin")
    path.write_bytes(b"\1\2\3")
    assert "3 bytes, an odd number" in message(path, "raw")


def test_pt_faults(tmp_path):
    path = tmp_path / "x.pt"
    assert "holds float32" in message(write_pt(path, IDS, torch.float32), "pt")
    torch.save({"tokens": torch.zeros(3)}, path)
    assert "holds a dict" in message(path, "pt")
    torch.save(Path("code"), path)  # would need unpickling code
    assert "cannot be loaded" in message(path, "pt")
    write_pt(path, IDS)
    path.write_bytes(path.read_bytes()[:3000])
    assert "cannot be loaded" in message(path, "pt")


def test_a_tensor_saved_from_within_another_reads_as_itself(tmp_path):
    path = tmp_path / "x.pt"
    whole = torch.tensor(IDS, dtype=torch.int64)
    for part in (whole[1000:], whole[:70], whole.view(100, 50)[3]):
        torch.save(part, path)  # with all of the other's data
        tokens = open_tokens(str(path), "pt", vocab_size=VOCAB)
        assert np.array_equal(tokens.read(0, tokens.n_tokens), part.numpy())
    torch.save(whole[::2], path)
    assert "values are not in a row" in message(path, "pt")
    torch.save(torch.tensor(5).expand(10**15), path)  # one value, and a promise
    assert "values are not in a row" in message(path, "pt")


def test_a_compressed_pt_file_is_refused(tmp_path):
    write_pt(tmp_path / "plain.pt", IDS)
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(tmp_path / "plain.pt") as plain, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in plain.infolist():
            packed.writestr(entry.filename, plain.read(entry))
    assert "it is compressed" in message(path, "pt")


def test_txt_faults(tmp_path):
    path = tmp_path / "x.txt"
    for text, offset in (("1 2 x3 4", 2), ("1 2.5", 1), ("-1 2", 0), ("5 1_0", 1), ("9" * 30, 0)):
        path.write_text(text)
        assert f"at token offset {offset} is not a token id" in message(path, "txt")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@given(place=st.integers(0, 2**62), value=st.integers(0, 255), length=st.integers(0, 1200))
@pytest.mark.parametrize("kind", ["npy uint16", "bin", "raw", "pt int32", "pt old container"])
def test_no_damage_raises_anything_but_a_users_error(tmp_path_factory, kind, place, value, length):
    name, data_format, write = WRITERS[kind]
    path = write(tmp_path_factory.getbasetemp() / f"damaged_{name}", [5] * 100)
    content = bytearray(path.read_bytes())
    content[place % min(len(content), 1100)] = value
    path.write_bytes(content[:max(length, 1)] if length < 1100 else content)
    with contextlib.suppress(OnebError):
        open_tokens(str(path), data_format, vocab_size=VOCAB)


@pytest.mark.parametrize("kind", WRITERS)
def test_an_id_outside_the_vocabulary_is_found_at_its_offset(tmp_path, kind, monkeypatch):
    monkeypatch.setattr(tokens_module, "_SCAN_TOKENS", 1000)
    name, data_format, write = WRITERS[kind]
    ids = IDS.copy()
    ids[[3210, 4000]] = 50257
    path = write(tmp_path / name, ids)
    assert "token id 50257 at token offset 3210 is outside the vocabulary" in message(path, data_format)
    assert open_tokens(str(path), data_format, vocab_size=50304).n_tokens == 5000


def test_negative_ids_are_found_even_if_the_sidecar_vouches(tmp_path):
    ids = IDS.copy()
    ids[17] = -2
    assert "token id -2 at token offset 17" in message(write_npy(tmp_path / "x.npy", ids, np.int32, META))


def test_a_long_check_reports_progress(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens_module, "_SCAN_TOKENS", 1000)
    monkeypatch.setattr(tokens_module, "_SCAN_QUIET_S", -1.0)
    lines = []
    open_tokens(str(write_npy(tmp_path / "x.npy", IDS)), vocab_size=VOCAB, log=lines.append)
    assert lines == [f"checking token ids: {done}.00K of 5.00K" for done in (1, 2, 3, 4)]


# -- Sidecars ------------------------------------------------------------------------------------

def test_a_full_sidecar_needs_no_warning_and_no_scan(tmp_path, monkeypatch):
    path = write_npy(tmp_path / "x.npy", IDS, meta=META)
    monkeypatch.setattr(tokens_module, "first_bad_id", None)  # a scan would call it
    tokens = open_tokens(str(path), vocab_size=VOCAB)
    assert tokens.encoding == "gpt2"
    assert tokens.warnings == ()


def test_without_a_sidecar_or_with_an_old_one_it_warns(tmp_path):
    write_npy(tmp_path / "a.npy", IDS)
    (warning,) = open_tokens(str(tmp_path / "a.npy"), vocab_size=VOCAB).warnings
    assert warning.startswith(f"{tmp_path / 'a.npy'} has no .meta sidecar")
    write_npy(tmp_path / "b.npy", IDS, meta={"tokens": "5,000", "tokenizer_of_old": "gpt2", "note": ""})
    write_npy(tmp_path / "c.npy", IDS, meta=META)
    tokens = open_tokens(str(tmp_path), vocab_size=VOCAB)
    assert [warning.partition(")")[0] for warning in tokens.warnings] == [
        f"1 of 3 files (first {tmp_path / 'a.npy'}", f"1 of 3 files (first {tmp_path / 'b.npy'}"]
    assert tokens.encoding == "gpt2"


@pytest.mark.parametrize(("change", "fault"), [
    ({"tokens": 4999}, "says 4999 tokens but"), ({"tokens": "many"}, "`tokens: many` is not a whole number"),
    ({"vocab_size": 60000}, "vocabulary of 60000"), ({"max_id": 50257}, "max_id 50257 is not below vocab_size"),
    ({"eot": 50257}, "eot 50257 is not below vocab_size")])
def test_contradictions(tmp_path, change, fault):
    assert fault in message(write_npy(tmp_path / "x.npy", IDS, meta=META | change))


def test_a_max_id_beyond_the_vocabulary_is_searched_for(tmp_path):
    path = write_npy(tmp_path / "x.npy", IDS, meta={"tokens": 5000, "max_id": int(IDS.max())})
    assert f"at token offset {np.argmax(IDS >= 40000)} is" in message(path, vocab_size=40000)


def test_a_sidecar_that_is_none(tmp_path):
    path = write_npy(tmp_path / "x.npy", IDS)
    Path(f"{path}.meta").write_bytes(b"\xff\xfe\x00")
    assert "is not text" in message(path)
    Path(f"{path}.meta").write_bytes(b"source: books\n" * 10_000)
    assert "more than 65536 bytes" in message(path)
    Path(f"{path}.meta").write_text("tokens: " + "9" * 5000)  # more digits than Python reads
    assert "is not a whole number" in message(path)
    Path(f"{path}.meta").unlink()
    Path(f"{path}.meta").mkdir()
    assert "cannot be read" in message(path)


def test_different_tokenizers_do_not_mix(tmp_path):
    write_npy(tmp_path / "a.npy", IDS, meta=META)
    write_npy(tmp_path / "b.npy", IDS, meta=META | {"encoding": "llama"})
    with pytest.raises(OnebError, match="different tokenizers: gpt2 .*a.npy.*, llama .*b.npy"):
        open_tokens(str(tmp_path), vocab_size=VOCAB)


# -- Fingerprint ---------------------------------------------------------------------------------

def test_fingerprint_knows_the_data_and_not_its_name(tmp_path):
    def fingerprint(path: Path) -> str:
        return open_tokens(str(path), vocab_size=VOCAB).fingerprint

    ids = np.arange(500_000) * 7919 % VOCAB
    original = fingerprint(write_npy(tmp_path / "x.npy", ids))
    assert len(original) == 16
    assert fingerprint(write_npy(tmp_path / "moved.npy", ids, meta=META | {"tokens": 500_000})) == original
    assert original == "1fcf5d16497a7225"  # on every machine
    for place in (0, 20_000, 240_000, 260_000, 490_000, 499_999):
        changed = ids.copy()
        changed[place] ^= 1
        assert fingerprint(write_npy(tmp_path / "y.npy", changed)) != original
    assert fingerprint(write_npy(tmp_path / "y.npy", ids[:-1])) != original
    write_npy(tmp_path / "a.npy", ids[:100]), write_npy(tmp_path / "b.npy", ids[100:])
    assert len({original, fingerprint(tmp_path / "[ab].npy"), fingerprint(tmp_path / "a.npy")}) == 3


# -- The demo ------------------------------------------------------------------------------------

def test_demo_is_the_standard_library_in_bytes():
    tokens = open_tokens("demo", vocab_size=257)
    again = open_tokens("demo", "auto", vocab_size=50257)
    assert tokens.fingerprint == again.fingerprint
    assert tokens.n_tokens == again.n_tokens > 3_000_000
    ids = tokens.read(0, tokens.n_tokens)
    assert np.array_equal(ids, again.read(0, again.n_tokens))
    assert (tokens.encoding, tokens.files, tokens.warnings) == ("bytes", ("demo",), ())
    assert ids[-1] == 256
    documents = np.split(ids, np.flatnonzero(ids == 256) + 1)[:-1]
    texts = {bytes(document[:-1].astype(np.uint8)) for document in documents}
    for module in (gzip, __import__("json"), __import__("xml.dom.minidom").dom.minidom):
        assert Path(module.__file__).read_bytes() in texts
    assert Path(torch.__file__).read_bytes() not in texts


def test_demo_needs_its_vocabulary():
    with pytest.raises(OnebError, match="wanted --vocab-size 257 or more"):
        open_tokens("demo", vocab_size=256)


def test_what_lies_beside_token_files_is_no_token_file(tmp_path):
    for name in ("a.npy", "b.npy"):
        np.save(tmp_path / name, np.arange(50, dtype=np.uint16))
        np.save(tmp_path / f"{name}.idx.npy", np.array([0, 20, 50]))
        (tmp_path / f"{name}.sources.json").write_text("[]")
    for path in (tmp_path, tmp_path / "*.npy", tmp_path / "*"):
        assert open_tokens(str(path), "npy", vocab_size=64).n_tokens == 100
        assert count_tokens(str(path), "npy") == 100
