"""Streaming: the same text as decoding at once, whole characters only, stop strings."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastinfer.text import IncrementalDetokenizer, Tokenizer, load_tokenizer
from fastinfer.text.detokenizer import StopMatcher
from fastinfer.text.stream import ByteStream, WindowStream

KINDS = ["byte_level", "llama_json", "sentencepiece_folder", "metaspace", "wordpiece"]
EXAMPLES = settings(max_examples=80, deadline=None, derandomize=True)
FAMILY = "\U0001f469\u200d\U0001f469\u200d\U0001f467"


@pytest.fixture(params=KINDS)
def tok(request: pytest.FixtureRequest) -> Tokenizer:
    return load_tokenizer(request.getfixturevalue(request.param))


def stream(tok: Tokenizer, ids: list[int], **options) -> list[str]:
    detok = IncrementalDetokenizer(tok, **options)
    pieces = [detok.append(i) for i in ids]
    pieces.append(detok.finish())
    assert "".join(pieces) == detok.text
    return pieces


def is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def byte_runs_are_utf8(tok: Tokenizer, ids: list[int], skip: bool) -> bool:
    """Whether each run of byte tokens is text; `tokenizers` gives up on a run that is not."""
    run, special = b"", set(tok.all_special_ids) if skip else set()
    for token in [*(tok.convert_id_to_token(i) for i in ids if i not in special), "end"]:
        if token is not None and token.startswith("<0x"):
            run += bytes([int(token[3:5], 16)])
        elif token is not None:
            if not is_utf8(run):
                return False
            run = b""
    return True


# ---- streamed text == decoded text ----------------------------------------------------------


def test_random_ids_stream_to_the_decoded_text(tok: Tokenizer) -> None:
    @EXAMPLES
    @given(st.lists(st.integers(0, tok.vocab_size + 2), max_size=40), st.booleans())
    def check(ids: list[int], skip: bool) -> None:
        pieces = stream(tok, ids, skip_special_tokens=skip)
        if byte_runs_are_utf8(tok, ids, skip):
            assert "".join(pieces) == tok.decode(ids, skip)

    check()


def test_random_text_streams_to_itself(tok: Tokenizer) -> None:
    alphabet = st.sampled_from("ab  \n\u00e9\u65e5\u672c\ufffd\U0001f642\u200d")

    @EXAMPLES
    @given(st.text(alphabet, max_size=25))
    def check(text: str) -> None:
        ids = tok.encode(text)
        assert "".join(stream(tok, ids)) == tok.decode(ids)

    check()


def test_kinds_of_stream(request: pytest.FixtureRequest) -> None:
    for kind in KINDS:
        tok = load_tokenizer(request.getfixturevalue(kind))
        expected = WindowStream if kind in ("metaspace", "wordpiece") else ByteStream
        assert isinstance(tok.stream(), expected)


@pytest.mark.parametrize("kind", ["byte_level", "llama_json"])
def test_window_stream_on_byte_tokenizers(kind: str, request: pytest.FixtureRequest) -> None:
    """The general stream gets ordinary text right on any tokenizer."""
    tok = load_tokenizer(request.getfixturevalue(kind))
    for text in ["the café 日本語 🙂 x", "  a  b ", FAMILY * 3, "\ufffd"]:
        ids = tok.encode(text)
        window = WindowStream(tok)
        pieces = [window.push(i) for i in ids] + [window.flush()]
        assert "".join(pieces) == tok.decode(ids)
        assert all("\ufffd" not in piece for piece in pieces) or "\ufffd" in text


# ---- whole characters -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["byte_level", "llama_json", "sentencepiece_folder"])
def test_no_half_character_is_printed(kind: str, request: pytest.FixtureRequest) -> None:
    tok = load_tokenizer(request.getfixturevalue(kind))
    text = f"a\u00e9\u6f22{FAMILY}\U0001f600z"
    ids = tok.encode(text, add_special_tokens=False)
    assert len(ids) > len(text)  # characters are split over tokens
    detok = IncrementalDetokenizer(tok)
    shown = ""
    for token_id in ids:
        piece = detok.append(token_id)
        shown += piece
        assert "\ufffd" not in piece
        assert text.startswith(shown)
    assert shown + detok.finish() == text
    assert len(detok.text.split("\u200d")) == 3


def byte_ids(tok: Tokenizer, data: bytes) -> list[int]:
    """One token per byte."""
    from fastinfer.text.tokenizer_json import _ALPHABET

    names = {byte: char for char, byte in _ALPHABET.items()}
    ids = [
        tok.convert_token_to_id(names[b]) or tok.convert_token_to_id(f"<0x{b:02X}>") for b in data
    ]
    if tok.convert_token_to_id("<0x00>") is not None:
        ids = [tok.convert_token_to_id(f"<0x{b:02X}>") for b in data]
    assert None not in ids
    return ids


@pytest.mark.parametrize("kind", ["byte_level", "llama_json", "sentencepiece_folder"])
def test_broken_bytes_come_out_and_never_stall(kind: str, request: pytest.FixtureRequest) -> None:
    tok = load_tokenizer(request.getfixturevalue(kind))
    each = kind != "byte_level"  # byte fallback shows every bad byte, byte level every sequence

    # An unfinished character waits, and comes out at the end.
    assert stream(tok, byte_ids(tok, b"x\xf0\x9f\x99"))[:4] == ["x", "", "", ""]
    assert stream(tok, byte_ids(tok, b"x\xf0\x9f\x99"))[-1] == "\ufffd" * (3 if each else 1)
    # The next character shows that it is broken.
    assert stream(tok, byte_ids(tok, b"\xe6\x97A")) == ["", "", "\ufffd" * (1 + each) + "A", ""]
    # Bytes that begin nothing come out at once, however many.
    for bad in (b"\xff", b"\x80"):
        pieces = stream(tok, byte_ids(tok, bad * 300))
        assert pieces == ["\ufffd"] * 300 + [""]
    # So does an endless run of first bytes, one behind.
    assert stream(tok, byte_ids(tok, b"\xf0" * 300)) == ["", *["\ufffd"] * 300]


def test_valid_characters_before_a_broken_byte_survive(llama_json: Path) -> None:
    tok = load_tokenizer(llama_json)
    ids = byte_ids(tok, "\u00e9\U0001f642".encode() + b"\xff")
    assert tok.decode(ids) == "\ufffd" * 7  # the tokenizers package drops the whole run
    assert "".join(stream(tok, ids)) == "\u00e9\U0001f642\ufffd"


class FakeTokenizer(Tokenizer):
    """Decodes 0 to U+FFFD, 1 to nothing, 2 to " x" with the text's first space dropped."""

    vocab_size = 3

    def __init__(self) -> None:
        self.longest = 0

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return []

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        self.longest = max(self.longest, len(ids))
        words = ["\ufffd", "", " x"]
        return "".join(words[token_id] for token_id in ids).removeprefix(" ")

    def convert_id_to_token(self, token_id: int) -> str | None:
        return "x"

    def convert_token_to_id(self, token: str) -> int | None:
        return None

    @property
    def all_special_ids(self) -> list[int]:
        return []


def test_window_stream_is_bounded() -> None:
    tok = FakeTokenizer()
    assert "".join(stream(tok, [0] * 100)) == "\ufffd" * 100
    detok = IncrementalDetokenizer(tok)
    for _ in range(40):
        detok.append(0)
    assert len(detok.text) >= 32  # long before the end of the stream
    assert "".join(stream(tok, [1] * 100)) == ""
    assert tok.longest <= 16


def test_window_keeps_context_over_ids_without_text() -> None:
    assert "".join(stream(FakeTokenizer(), [2, 1, 2, 1, 1, 2])) == "x x x"


def test_cost_per_token_is_constant(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    real = tok._decode
    monkeypatch.setattr(
        tok, "_decode", lambda ids, skip: (sizes.append(len(ids)), real(ids, skip))[1]
    )
    ids = (tok.encode("the quick brown fox ") * 100)[:600]
    detok = IncrementalDetokenizer(tok)
    for i in [*ids, *[tok.all_special_ids[0]] * 600]:
        detok.append(i)
    assert max(sizes, default=0) <= 16


# ---- spaces and prompts ---------------------------------------------------------------------


def test_leading_space_depends_on_the_prompt(tok: Tokenizer) -> None:
    prompt, both = tok.encode("the quick"), tok.encode("the quick brown fox")
    assert both[: len(prompt)] == prompt
    ids = both[len(prompt) :]
    detok = IncrementalDetokenizer(tok, prompt_token_ids=prompt)
    text = "".join(map(detok.append, ids)) + detok.finish()
    assert text == " brown fox"
    assert "".join(stream(tok, ids)) == tok.decode(ids)
    # A prompt of special tokens only is no text to continue.
    bos = tok.all_special_ids[:1]
    detok = IncrementalDetokenizer(tok, prompt_token_ids=bos)
    assert "".join(map(detok.append, ids)) + detok.finish() == tok.decode(ids)
    # Only the tail of a long prompt is read.
    for long in (prompt * 50, prompt + bos * 50):
        detok = IncrementalDetokenizer(tok, prompt_token_ids=long)
        assert "".join(map(detok.append, ids)) + detok.finish() == " brown fox"


def test_character_split_between_prompt_and_output(byte_level: Path) -> None:
    tok = load_tokenizer(byte_level)
    ids = byte_ids(tok, "a\U0001f642b".encode())
    detok = IncrementalDetokenizer(tok, prompt_token_ids=ids[:3])
    assert [detok.append(i) for i in ids[3:]] == ["", "\U0001f642", "b"]


# ---- stop strings ---------------------------------------------------------------------------


def chars(tok: Tokenizer, text: str) -> list[int]:
    return byte_ids(tok, text.encode())


def test_stop_string_across_tokens(byte_level: Path) -> None:
    tok = load_tokenizer(byte_level)
    detok = IncrementalDetokenizer(tok, stop=["STOP"])
    assert [detok.append(i) for i in chars(tok, "xSTSTO")] == ["x", "", "", "ST", "", ""]
    assert not detok.stopped and detok.stop_reason is None and detok.text == "xST"
    assert detok.append(chars(tok, "P")[0]) == ""
    assert detok.stopped and detok.stop_reason == "STOP"
    assert detok.append(chars(tok, "y")[0]) == ""
    assert detok.finish() == "" and detok.text == "xST"

    kept = IncrementalDetokenizer(tok, stop="STOP", include_stop_str=True)
    assert "".join(map(kept.append, chars(tok, "xSTSTOPy"))) == "xSTSTOP" == kept.text
    assert kept.stop_reason == "STOP"


def test_stop_prefix_is_flushed_at_the_end(byte_level: Path) -> None:
    tok = load_tokenizer(byte_level)
    assert stream(tok, chars(tok, "abEN"), stop="END") == ["a", "b", "", "", "EN"]
    detok = IncrementalDetokenizer(tok, stop=["END"])
    detok.append(chars(tok, "E")[0])
    assert (detok.finish(), detok.finish(), detok.stopped) == ("E", "", False)
    with pytest.raises(ValueError, match="finished"):
        detok.append(1)


def test_stop_inside_one_token_and_in_multibyte_text(byte_level: Path) -> None:
    tok = load_tokenizer(byte_level)
    ids = tok.encode("the quick brown", add_special_tokens=False)
    assert "".join(stream(tok, ids, stop=["ick b"])) == "the qu"
    ids = tok.encode(f"ok{FAMILY}.\u65e5\u672c\u8a9e", add_special_tokens=False)
    assert "".join(stream(tok, ids, stop=["\u672c"])) == f"ok{FAMILY}.\u65e5"
    # A stop string that only the end of the stream completes.
    detok = IncrementalDetokenizer(tok, stop=["\ufffd"])
    detok.append(byte_ids(tok, b"\xf0")[0])
    assert detok.finish() == "" and detok.stop_reason == "\ufffd"
    # Special tokens can stop too when they are printed.
    end = tok.encode("a<|im_end|>b", add_special_tokens=False)
    pieces = stream(tok, end, skip_special_tokens=False, stop=["<|im_end|>"])
    assert "".join(pieces) == "a"


STOPS = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


@settings(EXAMPLES, max_examples=300)
@given(STOPS, st.lists(st.text("abc", max_size=4), max_size=12))
@example(["a", "ba"], ["ba"])  # end together: the longer counts
@example(["abab", "ba"], ["a", "b", "a", "b"])  # the shorter is complete first
@example(["aab"], ["aa", "ab"])
def test_stop_matcher_against_search(stops: list[str], chunks: list[str]) -> None:
    text = "".join(chunks)
    ends = [(text.index(stop) + len(stop), -len(stop), stop) for stop in set(stops) if stop in text]
    want = (min(ends)[0], min(ends)[2]) if ends else None

    matcher, seen, got = StopMatcher(stops), "", None
    for chunk in chunks:
        hit = matcher.feed(chunk)
        if hit is not None:
            got = (len(seen) + hit[0], hit[1])
            break
        seen += chunk
        tails = [k for k in range(len(seen) + 1) for s in stops if k < len(s)]
        assert matcher.longest_prefix == max(
            k
            for k in tails
            if any(s.startswith(seen[len(seen) - k :]) for s in stops if k < len(s))
        )
    assert got == want


def test_stop_does_not_depend_on_tokens(byte_level: Path) -> None:
    tok = load_tokenizer(byte_level)

    @EXAMPLES
    @given(
        st.text("the quick.\u65e5\n", max_size=30),
        st.lists(st.text("the quick.\u65e5", min_size=1, max_size=4), max_size=3),
        st.booleans(),
    )
    def check(text: str, stops: list[str], include: bool) -> None:
        options = {"stop": stops, "include_stop_str": include}
        long, short = tok.encode(text, add_special_tokens=False), chars(tok, text)
        assert "".join(stream(tok, long, **options)) == "".join(stream(tok, short, **options))

    check()


@pytest.mark.parametrize("stop", ["", [""], ["a", ""], [3]])
def test_bad_stop(byte_level: Path, stop) -> None:
    with pytest.raises(ValueError, match="stop must be non-empty strings"):
        IncrementalDetokenizer(load_tokenizer(byte_level), stop=stop)


def test_bad_id(tok: Tokenizer) -> None:
    with pytest.raises(ValueError, match="ids must be integers"):
        IncrementalDetokenizer(tok).append(-1)
