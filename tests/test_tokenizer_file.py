"""Any tokenizer.json: what it means here, and gigatoken against the tokenizers package on kinds that models use."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from data_helpers import books_parquet
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from oneb.cli.prepare import main
from oneb.data.encode import Fast, ReferenceEncoder, checked_fast, make_encoder, trial_texts, write_vocabulary
from oneb.data.new_characters import NEW, NEW_LETTERS
from oneb.data.tokenizer import FileTokenizer, load_tokenizer
from oneb.errors import OnebError

# What these models' tokenizer.json split text by, the first also tiktoken's cl100k_base (openai_public.py).
SPLITS = {
    "as Llama 3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
                  r"\s*[\r\n]+|\s+(?!\S)|\s+",
    "as Qwen 2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
                 r"\s+(?!\S)|\s+",
}
WORDS = ["the quick brown fox", "Jumps over 12 lazy dogs; don't!\n", "caf\u00e9 \u4e2d\u6587 \U0001f600 x = y[3:4]\n\n"]
KINDS = [*SPLITS, "as Llama 2"]


def byte_level(split: str) -> Backend:
    """As most: a split by a pattern, then bytes; Qwen's normalizes before."""
    backend = Backend(models.BPE())
    if split == SPLITS["as Qwen 2"]:
        backend.normalizer = normalizers.NFC()
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(split), "isolated"), in_bytes])
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(WORDS * 9, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<pad>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return backend


def one_word() -> Backend:
    """As Llama 2's: a text is one word with U+2581 for spaces, and what has no token becomes its bytes."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.train_from_iterator(WORDS * 9, trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False))
    definition = json.loads(backend.to_str())
    definition["added_tokens"] = definition["added_tokens"][:2]
    definition["model"] |= {"byte_fallback": True, "fuse_unk": True, "unk_token": "<unk>"}
    backend = Backend.from_str(json.dumps(definition))
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
                                         decoders.Strip(" ", 1, 0)])
    return backend


@pytest.fixture(scope="session", params=KINDS)
def path(request, tmp_path_factory) -> Path:
    backend = byte_level(SPLITS[request.param]) if request.param in SPLITS else one_word()
    backend.add_tokens([AddedToken("<tool>", special=False), AddedToken("  ", special=False)])
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    backend.save(str(path))
    return path


@pytest.fixture(scope="session")
def tokenizer(path) -> FileTokenizer:
    return load_tokenizer(str(path))


@pytest.fixture(scope="session")
def fast(tokenizer, tmp_path_factory) -> Fast:
    encoder, trouble = checked_fast(tokenizer, write_vocabulary(tokenizer, tmp_path_factory.mktemp("vocabulary")))
    assert trouble == ""
    return encoder


def differing(fast: Fast, tokenizer: FileTokenizer, texts) -> list[str]:
    return [text for text in texts if fast.encode(text.encode()).tolist() != tokenizer.encode(text)]


def test_fuzzed_strings_and_books_are_encoded_as_its_own_package_does(fast, tokenizer):
    assert not differing(fast, tokenizer, trial_texts(1500, seed=7))
    texts = (text for path in books_parquet() for text in pq.read_table(path)["text"].to_pylist()[::200])
    assert not differing(fast, tokenizer, texts)


@given(text=st.text(st.sampled_from("e\u0301\u07fd1 \n\t'</>\u2581\u088f\u20c1\U00016ea0\U0001f6d8\u4e2d"), max_size=40)
       | st.text(max_size=40)
       | st.lists(st.sampled_from(["</s>", "<tool>", "  ", "<pad>", "a", " "])).map("".join))
def test_any_text_is_encoded_as_its_own_package_does(fast, tokenizer, text):
    assert not differing(fast, tokenizer, [text])
    assert tokenizer.eot not in fast.encode(text.encode())


def test_preparing_gives_the_tokens_of_its_own_package(path, tokenizer, tmp_path, capsys):
    chance = random.Random(0)
    texts = ["".join(chance.choices(WORDS, k=9)) for _ in range(50)] + ["</s> <tool>\u088f"]
    with open(tmp_path / "a.jsonl", "w") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    assert main(["--input", str(tmp_path / "a.jsonl"), "--output", str(tmp_path / "x.npy"),
                 "--tokenizer", str(path)]) == 0
    expected = [token for text in texts for token in (*tokenizer.encode(text), tokenizer.eot)]
    assert np.load(tmp_path / "x.npy").tolist() == expected
    assert "warning" not in capsys.readouterr().err


def test_a_kind_that_gigatoken_has_not_is_its_own_packages(tmp_path, capsys):
    backend = Backend(models.WordLevel({"a": 0, "b": 1, "</s>": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.save(str(tmp_path / "words.json"))
    (tmp_path / "a.txt").write_text("a b c")
    arguments = ["--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "x.npy"), "--tokenizer"]
    assert main([*arguments, str(tmp_path / "words.json")]) == 0
    assert np.load(tmp_path / "x.npy").tolist() == [0, 1, 3, 2]
    assert "so the tokenizers package does its work, many times slower" in capsys.readouterr().err


def test_a_split_that_gigatoken_has_not_is_its_own_packages(tmp_path):
    path = tmp_path / "tokenizer.json"
    byte_level(r"\p{L}|\s").save(str(path))
    encoder, trouble = checked_fast(load_tokenizer(str(path)), write_vocabulary(load_tokenizer(str(path)), tmp_path))
    assert encoder is None
    assert "the tokenizers package does its work" in trouble


def test_a_gigatoken_that_differs_in_an_added_token_is_not_used(tokenizer, tmp_path, monkeypatch):
    right = Fast.encode
    monkeypatch.setattr(Fast, "encode", lambda self, document: right(self, document.replace(b"<tool>", b"tool")))
    encoder, trouble = checked_fast(tokenizer, write_vocabulary(tokenizer, tmp_path))
    assert encoder is None
    assert "differently from the tokenizers package" in trouble


def edited(tmp_path: Path, **changes) -> Path:
    """A file like Llama 3's in which ``model`` and ``added_tokens`` (of content and whether special) are changed."""
    backend = byte_level(SPLITS["as Llama 3"])
    for token, special in changes.pop("added_tokens", {}).items():
        (backend.add_special_tokens if special else backend.add_tokens)([
            AddedToken(token, special=special, normalized=False)])
    definition = json.loads(backend.to_str())
    definition["model"] |= changes.pop("model", {})
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(definition | changes))
    return path


def trouble_with(path: Path, folder: Path) -> str:
    tokenizer = load_tokenizer(str(path))
    return checked_fast(tokenizer, write_vocabulary(tokenizer, folder))[1]


def test_tokens_that_overlap_are_its_own_packages(tmp_path):
    """Of a special token's last characters the package makes no other one."""
    assert trouble_with(edited(tmp_path, added_tokens={"<|x|>": True, "|>user": False}), tmp_path).startswith(
        "gigatoken encodes 'a<|x|>user b' differently")
    assert trouble_with(edited(tmp_path, added_tokens={"<|x|>": True, "<|user|>": False}), tmp_path) == ""


@pytest.mark.parametrize("odd", ["an id twice", "an added token's id"])
def test_what_contradicts_itself_is_its_own_packages(tmp_path, capsys, odd):
    definition = json.loads(edited(tmp_path).read_text())
    if odd == "an id twice":
        definition["model"]["vocab"]["zzz"] = 7
    else:
        definition["added_tokens"].append({**definition["added_tokens"][0], "id": 4 * 10**9, "content": "<huge>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(definition))
    (tmp_path / "a.txt").write_text("a<huge>b")
    assert main(["--input", str(tmp_path / "a.txt"), "--output", str(tmp_path / "x.npy"),
                 "--tokenizer", str(tmp_path / "tokenizer.json")]) == 0
    tokenizer = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert np.load(tmp_path / "x.npy").tolist() == [*tokenizer.encode("a<huge>b"), tokenizer.eot]
    assert "several words of this tokenizer have one id, or an added token" in capsys.readouterr().err


def test_nothing_is_left_to_chance_or_cut(tmp_path):
    limits = {"truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}}
    whole = load_tokenizer(str(edited(tmp_path))).encode("the quick brown fox")
    path = edited(tmp_path, model={"dropout": 0.9}, **limits)
    assert load_tokenizer(str(path)).encode("the quick brown fox") == whole
    assert trouble_with(path, tmp_path) == ""


def test_a_byte_order_mark(tmp_path):
    path = edited(tmp_path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert trouble_with(path, tmp_path) == ""


@pytest.mark.parametrize("content", [
    b"", b"[]", b"{}", b"\xff", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}',
    b'{"model": {"type": "WordLevel", "vocab": {"\x00": -1}, "unk_token": "?"}}'])
def test_what_is_no_tokenizer_is_explained(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(OnebError, match=r"tokenizer.json (cannot be read|: no token|: no)|no token in it ends"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize("beside", ['{"eos_token": ["</s>"]}', "[]", "{", '{"eos_token": null}'])
def test_a_config_beside_it_that_says_nothing(tmp_path, beside):
    path = edited(tmp_path)
    path.with_name("tokenizer_config.json").write_text(beside)
    assert load_tokenizer(str(path)).eot == 1


def test_what_ends_a_document(tmp_path):
    path = tmp_path / "tokenizer.json"
    backend = byte_level(SPLITS["as Llama 3"])
    path.write_text(backend.to_str().replace("</s>", "<end>"))
    with pytest.raises(OnebError, match="no token in it ends a document"):
        load_tokenizer(str(path))
    path.with_name("tokenizer_config.json").write_text(json.dumps({"eos_token": "<eot>"}))
    with pytest.raises(OnebError, match="has no token '<eot>', which tokenizer_config.json beside it calls eos_token"):
        load_tokenizer(str(path))
    path.with_name("tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<end>"}}))
    tokenizer = load_tokenizer(str(path))
    assert (tokenizer.eot, tokenizer.name) == (1, str(path))
    for text in ("the quick fox", "<end>", " caf\u00e9 \U0001f600\n"):
        ids = tokenizer.encode(text)
        assert tokenizer.eot not in ids
        assert tokenizer.decode(ids) == text
    assert isinstance(make_encoder(str(path), None), ReferenceEncoder)


# -- New characters ------------------------------------------------------------------------------

@pytest.mark.parametrize(("characters", "inside", "outside"), [
    (NEW_LETTERS, "\u088f\u1acf\u1add\ua7cb\ua7dc\U000105c0\U000143fa\U00031350\U00033479",
     "\u0890\u1ace\u20c1\ua7ca\ua7dd\U000143fb\U0003134f\U0003347a\u4e2d\u00e9a"),
    (NEW, "\u07fd\u088f\u1df6\u20c1\u2ffc\u31ef\ufbc3\ufdce\U0001f6d8\U0001faf8",
     "\u1df5\u20c0\u2ffb\u31f0\ufbc2\U0001f600a")])
def test_new_characters_are_found(characters, inside, outside):
    assert [found for found in inside if not characters.are_in(f"x{found}y".encode())] == []
    assert [found for found in outside if characters.are_in(f"x{found}y".encode())] == []
    assert not characters.are_in(outside.encode())
    assert characters.are_in((outside + inside[-1]).encode())
