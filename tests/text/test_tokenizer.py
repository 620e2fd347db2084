"""Loading, encoding and decoding: equal to transformers on the same folder, clear errors."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastinfer.text import (
    Tokenizer,
    TokenizerDependencyError,
    TokenizerError,
    TokenizerNotFoundError,
    load_tokenizer,
)

TEXTS = [
    "",
    " ",
    "the quick brown fox",
    "  two leading spaces, two  inner, one trailing ",
    "café 日本語 🙂👩‍👩‍👧 end",
    "line\n\n  indented\tx",
    "an odd byte \x00 and \ufffd itself",
]
KINDS = ["byte_level", "llama_json", "metaspace", "wordpiece", "sentencepiece_folder"]


def theirs(folder: Path):
    """transformers' own reading of the folder's tokenizer.json."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if (folder / "tokenizer_config.json").exists():
        return AutoTokenizer.from_pretrained(folder)
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


@pytest.mark.parametrize("kind", ["byte_level", "llama_json", "metaspace", "wordpiece"])
def test_equal_to_transformers(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    ours, other = load_tokenizer(folder), theirs(folder)
    specials = "".join(ours.all_special_tokens)
    for text in [*TEXTS, f"a{specials} b{specials}", "long " * 50]:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == other.encode(text, add_special_tokens=special)
            for skip in (True, False):
                assert ours.decode(ids, skip) == other.decode(ids, skip_special_tokens=skip)
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if kind in ("byte_level", "llama_json"):
            assert getattr(ours, name) == getattr(other, name)
            assert getattr(ours, f"{name}_id") == getattr(other, f"{name}_id")
    assert len(ours) == len(other)


def test_special_tokens_and_vocabulary(byte_level: Path) -> None:
    tok = load_tokenizer(byte_level)
    assert isinstance(tok, Tokenizer)
    assert (tok.bos_token, tok.eos_token, tok.pad_token) == ("<|bos|>", "<|im_end|>", "<|pad|>")
    assert tok.unk_token is None and tok.unk_token_id is None
    assert tok.bos_token_id == tok.convert_token_to_id("<|bos|>") == 0
    assert tok.convert_id_to_token(tok.eos_token_id) == "<|im_end|>"
    assert tok.convert_id_to_token(tok.vocab_size) is None
    assert tok.convert_id_to_token(tok.vocab_size - 1) == "naïveté"
    assert tok.convert_token_to_id("no such token") is None
    assert tok.all_special_ids == [0, 1, 2, 3, 4]
    assert tok.all_special_tokens[2] == "<|im_start|>"
    assert tok.decode([tok.bos_token_id, tok.vocab_size + 5]) == ""  # padded vocabulary
    assert tok.decode(torch.tensor(tok.encode("fox"))) == "fox"


def test_side_files_add_and_mark_tokens(byte_level: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(byte_level, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    size = load_tokenizer(byte_level).vocab_size
    config["added_tokens_decoder"] = {str(size): {"content": "<|new|>", "special": True}}
    config["eos_token"] = "<tool>"  # known to tokenizer.json, but not as special
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tok = load_tokenizer(folder)
    assert tok.encode("x<|new|>", add_special_tokens=False)[-1] == size
    assert tok.decode(tok.encode("x<|new|><tool>y")) == "xy"
    assert theirs(folder).encode("x<|new|><tool>y") == tok.encode("x<|new|><tool>y")

    config["added_tokens_decoder"] = {str(size + 7): {"content": "<|new|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match=f"must have id {size + 7}"):
        load_tokenizer(folder)


# ---- sentencepiece --------------------------------------------------------------------------


def test_sentencepiece_equals_sentencepiece(sentencepiece_folder: Path) -> None:
    import sentencepiece

    sp = sentencepiece.SentencePieceProcessor(str(sentencepiece_folder / "tokenizer.model"))
    tok = load_tokenizer(sentencepiece_folder)
    for text in TEXTS:
        assert tok.encode(text) == [1, *sp.encode(text)]
        assert tok.encode(text, add_special_tokens=False) == sp.encode(text)
        assert tok.decode(tok.encode(text)) == sp.decode(sp.encode(text))
    assert (tok.bos_token_id, tok.eos_token_id, tok.unk_token_id) == (1, 2, 0)
    assert tok.vocab_size == sp.vocab_size()


def test_sentencepiece_equals_transformers(sentencepiece_folder: Path, llama_json: Path) -> None:
    # Text that starts with a space is left out: the converted tokenizer adds no prefix to it and so
    # loses a space, where sentencepiece keeps all of them.
    tok, other = load_tokenizer(sentencepiece_folder), theirs(llama_json)
    for text in [TEXTS[2], *TEXTS[4:6], "<s>the dog</s>the fox", "a </s> b"]:
        want = other.encode(text, add_special_tokens=False)
        assert tok.encode(text, add_special_tokens=False) == want
        assert tok.decode(want) == other.decode(want, skip_special_tokens=True)
        assert tok.decode(want, False) == other.decode(want, skip_special_tokens=False)


@pytest.mark.parametrize("extra", [False, True])
@pytest.mark.parametrize("dummy", [False, True])
def test_sentencepiece_decodes_as_sentencepiece(make_sentencepiece, extra: bool, dummy: bool):
    import sentencepiece

    folder = make_sentencepiece(remove_extra_whitespaces=extra, add_dummy_prefix=dummy)
    sp = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    tok = load_tokenizer(folder)
    space, byte_space = sp.piece_to_id("▁"), sp.piece_to_id("<0x20>")

    ids = st.one_of(st.integers(3, sp.vocab_size() - 1), st.sampled_from([space, byte_space, 5]))

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(st.lists(ids, max_size=12))
    def check(ids: list[int]) -> None:
        assert tok.decode(ids) == sp.decode(ids)
        assert tok.decode([1, *ids, 2]) == sp.decode(ids)

    check()


def test_bos_and_eos_switches(make_sentencepiece) -> None:
    both = load_tokenizer(make_sentencepiece({"add_bos_token": True, "add_eos_token": True}))
    none = load_tokenizer(make_sentencepiece({"add_bos_token": False, "add_eos_token": False}))
    silent = load_tokenizer(make_sentencepiece())
    body = none.encode("the dog")
    assert both.encode("the dog") == [1, *body, 2]
    assert silent.encode("the dog") == [1, *body]
    assert both.encode("the dog", add_special_tokens=False) == body
    assert both.encode("") == [1, 2]


def test_legacy_prefix_space(make_sentencepiece) -> None:
    legacy = load_tokenizer(make_sentencepiece({"add_bos_token": False}))
    modern = load_tokenizer(make_sentencepiece({"add_bos_token": False, "legacy": False}))
    plain = make_sentencepiece({"add_bos_token": False, "add_prefix_space": False})

    def tokens(tok: Tokenizer, text: str) -> str:
        return "|".join(tok.convert_id_to_token(i) for i in tok.encode(text))

    assert tokens(legacy, "the</s>the").split("</s>|")[1] == tokens(legacy, "the")
    assert tokens(modern, "the</s>the") == tokens(legacy, "the") + "|</s>|" + tokens(
        load_tokenizer(plain), "the"
    )
    # A space in the text stays a space.
    assert "▁" in tokens(modern, "the</s> the").split("</s>|")[1]
    assert legacy.decode(legacy.encode("the fox")) == "the fox"


def test_baichuan_style_folder(make_sentencepiece) -> None:
    token = {"__type": "AddedToken", "normalized": True, "single_word": True, "lstrip": False}
    config = {
        "tokenizer_class": "BaichuanTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_baichuan.BaichuanTokenizer", None]},
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": {**token, "content": "<s>"},
        "eos_token": {**token, "content": "</s>"},
        "unk_token": {**token, "content": "<unk>"},
        "pad_token": {**token, "content": "<unk>"},
        "sp_model_kwargs": {},
    }
    folder = make_sentencepiece(config, user_defined_symbols=["<reserved_106>", "<reserved_107>"])
    tok = load_tokenizer(folder)
    ids = tok.encode("<reserved_106>the dog<reserved_107>")
    assert tok.bos_token_id not in ids
    assert tok.convert_token_to_id("<reserved_107>") == ids[-1]
    assert tok.convert_id_to_token(ids[1]) == "<reserved_106>"  # after sentencepiece's own prefix
    assert tok.decode(ids) == "<reserved_106>the dog<reserved_107>"
    assert tok.pad_token_id == tok.unk_token_id == 0
    assert tok.bos_token_id in tok.encode("x <s>")  # single_word: not as part of a word
    assert tok.bos_token_id not in tok.encode("x<s>")


def test_added_tokens(make_sentencepiece) -> None:
    tok = load_tokenizer(make_sentencepiece({"pad_token": "<pad>"}, {"<pad>": 420, "<tool>": 421}))
    assert tok.vocab_size == 422
    assert tok.pad_token_id == 420
    ids = tok.encode("a<tool>b<pad>")
    assert 421 in ids and ids[-1] == 420
    assert tok.decode(ids) == "a<tool> b"  # "<tool>" is added but not special
    assert tok.decode(ids, skip_special_tokens=False) == "<s> a<tool> b<pad>"
    assert tok.all_special_ids == [0, 1, 2, 420]

    renamed = {"added_tokens_decoder": {"420": {"content": "<x>", "rstrip": True, "lstrip": True}}}
    tok = load_tokenizer(make_sentencepiece(renamed))
    strip = tok.encode("a <x>  b", add_special_tokens=False)
    assert strip == [*tok.encode("a")[1:], 420, *tok.encode("b")[1:]]

    clash = {"added_tokens_decoder": {"7": {"content": "</s>"}}}
    with pytest.raises(TokenizerError, match="an id of its own"):
        load_tokenizer(make_sentencepiece(clash))


# ---- errors ---------------------------------------------------------------------------------


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(
        TokenizerNotFoundError, match=r"tokenizer\.json or tokenizer\.model"
    ) as info:
        load_tokenizer(tmp_path)
    assert "token ids" in str(info.value)
    assert isinstance(info.value, FileNotFoundError)
    with pytest.raises(TokenizerNotFoundError, match="no folder"):
        load_tokenizer(tmp_path / "absent")


def test_damaged_files(tmp_path: Path, byte_level: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match=r"tokenizer\.json must be a tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.model").write_bytes(b"garbage")
    with pytest.raises(TokenizerError, match="must be a sentencepiece model"):
        load_tokenizer(tmp_path)

    folder = tmp_path / "copy"
    shutil.copytree(byte_level, folder)
    cases = {
        "{": "must be valid JSON",
        "[]": "must hold a JSON object",
        '{"bos_token": {"text": "<s>"}}': "'content'",
        '{"added_tokens_decoder": {"x": "<s>"}}': "non-negative integers",
        '{"chat_template": [{"name": "default"}]}': "chat_template",
        '{"chat_template": 3}': "chat_template",
    }
    for text, message in cases.items():
        (folder / "tokenizer_config.json").write_text(text)
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(folder)


def test_sentencepiece_not_installed(
    sentencepiece_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(TokenizerDependencyError, match=r"fastinfer\[sentencepiece\]") as info:
        load_tokenizer(sentencepiece_folder)
    assert isinstance(info.value, ImportError)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_arguments(kind: str, request: pytest.FixtureRequest) -> None:
    tok = load_tokenizer(request.getfixturevalue(kind))
    with pytest.raises(TokenizerError, match="must be a str"):
        tok.encode([1, 2])
    with pytest.raises(TokenizerError, match="lone surrogate at position 1"):
        tok.encode("a\ud800")
    for bad in (-1, 2**31, "a", 1.5):
        with pytest.raises(TokenizerError, match="decode: ids must be integers"):
            tok.decode([bad])


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_of_tokens_add_up_to_the_text(kind: str, request: pytest.FixtureRequest) -> None:
    tok = load_tokenizer(request.getfixturevalue(kind))
    for text in (*TEXTS, "the 🙂 fox"):
        ids = tok.encode("the" + text, add_special_tokens=False)
        pieces = b"".join(map(tok.token_bytes, ids)).decode()
        assert pieces.lstrip(" ") == tok.decode(ids, False)
    assert tok.token_bytes(tok.vocab_size + 1) == b""
    with pytest.raises(TokenizerError):
        tok.token_bytes(-1)


def test_runs_of_spaces_before_added_tokens_take_linear_time(
    make_sentencepiece: Callable[..., Path],
) -> None:
    spaced = {"special": True, "lstrip": True}
    added = {
        "420": {"content": "<mask>", **spaced},
        "421": {"content": "<r>", "rstrip": True, "special": True},
        "422": {"content": "<b>", "rstrip": True, "single_word": True, **spaced},
    }
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    tok = load_tokenizer(make_sentencepiece({**config, "added_tokens_decoder": added}))
    start = time.monotonic()
    tok.encode("a" + " " * 100_000 + "b")
    assert time.monotonic() - start < 10
    mask, r, b = 420, 421, 422

    def found(text: str) -> list[int]:
        return [i for i in tok.encode(text, add_special_tokens=False) if i >= 420]

    assert found("a  <mask> b") == [mask]
    assert tok.encode("the  <mask>", False) == tok.encode("the<mask>", False)
    assert found("<r>  <mask><mask> <r>  <b>  x") == [r, mask, mask, r, b]
