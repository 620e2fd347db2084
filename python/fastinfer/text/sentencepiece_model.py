"""``tokenizer.model``, through the ``sentencepiece`` package (Llama 2, Baichuan2, old Mistral).

Encoding follows the Llama tokenizer: special and added tokens are cut out of the text first, each
piece of text between them goes through sentencepiece on its own. In legacy mode (the default, and
``"legacy": true`` in tokenizer_config.json) each piece gets sentencepiece's leading space; with
``"legacy": false`` only the start of the text does.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from .base import Tokenizer, TokenizerDependencyError, TokenizerError
from .files import AddedToken, TokenizerSettings
from .stream import REPLACE_EACH_BYTE, ByteStream

# Appended to a serialized ModelProto this reads "normalizer_spec { add_dummy_prefix: false }":
# protobuf merges repeated occurrences of a sub-message, the last value of a scalar wins.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_SPACE = "\u2581"


class SentencePieceTokenizer(Tokenizer):
    """A tokenizer described by a sentencepiece ``tokenizer.model``."""

    def __init__(self, path: Path, settings: TokenizerSettings) -> None:
        super().__init__(settings)
        self._sp = _load_model(path.read_bytes(), path.name)
        config = settings.config
        named = self.named_special_tokens
        for name in ("bos", "eos", "unk", "pad"):
            token_id = getattr(self._sp, f"{name}_id")()
            if token_id >= 0 and f"{name}_token" not in config:
                named.setdefault(f"{name}_token", self._sp.id_to_piece(token_id))

        self._added: dict[int, AddedToken] = {}
        self._added_ids: dict[str, int] = {}
        for token_id, token in sorted(settings.added.items()):
            self._add(token, token_id)
        for token in settings.special.values():
            self._add(token)
        for content in named.values():
            self._add(AddedToken(content))
        self._special_ids = sorted(i for i, token in self._added.items() if token.special)
        self._splitter = _splitter(self._added.values())
        self._vocab_size = max([self._sp.vocab_size() - 1, *self._added]) + 1

        self._prefix: list[int] = []
        self._suffix: list[int] = []
        # Llama's defaults where the file is silent: BOS yes, EOS no.
        if config.get("add_bos_token") is not False and self.bos_token_id is not None:
            self._prefix = [self.bos_token_id]
        if config.get("add_eos_token") and self.eos_token_id is not None:
            self._suffix = [self.eos_token_id]

        probe = self._sp.normalize("  a")
        self._strip_each = not probe.startswith(_SPACE * 2)  # model removes extra whitespace
        self._strip = probe not in ("a", _SPACE * 2 + "a") or self._strip_each
        self._prefix_first = config.get("add_prefix_space") is not False
        self._prefix_rest = self._prefix_first and config.get("legacy") is not False
        self._plain = self._sp
        if not self._prefix_rest:
            self._plain = _load_model(path.read_bytes() + _NO_DUMMY_PREFIX, path.name)
        self._bytes: dict[int, bytes] = {}

    def _add(self, token: AddedToken, declared: int | None = None) -> None:
        if token.content in self._added_ids:
            return
        token_id = self._sp.piece_to_id(token.content)
        if self._sp.id_to_piece(token_id) != token.content:  # not a piece: piece_to_id said unk
            end = max([self._sp.vocab_size() - 1, *self._added]) + 1
            token_id = end if declared is None else declared
        # The same id may be declared under another spelling: sentencepiece's own one is replaced.
        if token_id in self._added or (declared is not None and token_id != declared):
            raise TokenizerError(
                f"load_tokenizer: {token.content!r} must have an id of its own, got {token_id} "
                f"(declared {declared}), which tokenizer.model or another added token contradicts;"
                " fix added_tokens_decoder or added_tokens.json"
            )
        self._added[token_id] = token
        self._added_ids[token.content] = token_id

    # ---- Tokenizer --------------------------------------------------------------------------

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        position = 0
        for match in self._splitter.finditer(text):
            ids += self._encode_plain(text[position : match.start()], first=position == 0)
            ids.append(self._added_ids[match.group(match.lastgroup or 0)])
            position = match.end()
        ids += self._encode_plain(text[position:], first=position == 0)
        return [*self._prefix, *ids, *self._suffix] if add_special_tokens else ids

    def _encode_plain(self, text: str, *, first: bool) -> list[int]:
        prefixed = self._prefix_first if first else self._prefix_rest
        return (self._sp if prefixed else self._plain).encode(text) if text else []

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        stream = self.stream(skip_special_tokens)
        return "".join([stream.push(i) for i in ids]) + stream.flush()

    def convert_id_to_token(self, token_id: int) -> str | None:
        token_id = self.check_id(token_id)
        if token_id in self._added:
            return self._added[token_id].content
        return self._sp.id_to_piece(token_id) if token_id < self._sp.vocab_size() else None

    def convert_token_to_id(self, token: str) -> int | None:
        if token in self._added_ids:
            return self._added_ids[token]
        token_id = self._sp.piece_to_id(token)
        return token_id if self._sp.id_to_piece(token_id) == token else None

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def all_special_ids(self) -> list[int]:
        return list(self._special_ids)

    def stream(self, skip_special_tokens: bool = True) -> ByteStream:
        return _SentencePieceStream(self, skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token adds; control pieces that are no special token add none."""
        data = self._bytes.get(token_id)
        if data is None:
            data = self._token_bytes(token_id)
            self._bytes[token_id] = data
        return data

    def _token_bytes(self, token_id: int) -> bytes:
        token = self.convert_id_to_token(token_id)
        if token is None:
            return b""
        if token_id not in self._added:
            if self._sp.is_control(token_id):
                return b""
            if self._sp.is_byte(token_id):
                return bytes([int(token[3:5], 16)])
            token = token.replace(_SPACE, " ")
        return token.encode("utf-8")

    def takes_leading_space(self, token_id: int) -> bool:
        """Whether a leading space of this token can be sentencepiece's own prefix."""
        return token_id not in self._added and not self._sp.is_byte(token_id)


class _SentencePieceStream(ByteStream):
    """Drops the space that sentencepiece puts before the text, as its own decoder does."""

    __slots__ = ("_each", "_tokenizer")

    def __init__(self, tokenizer: SentencePieceTokenizer, skip_special_tokens: bool) -> None:
        skip = frozenset(tokenizer.all_special_ids) if skip_special_tokens else frozenset()
        super().__init__(
            lambda i: b"" if i in skip else tokenizer.token_bytes(i),
            errors=REPLACE_EACH_BYTE,
            strip=int(tokenizer._strip),
        )
        self._tokenizer = tokenizer
        self._each = tokenizer._strip_each

    def _strip_leading(self, token_id: int, data: bytes) -> bytes:
        if data.startswith(b" ") and self._tokenizer.takes_leading_space(token_id):
            data = data[1:]
            if not self._each:
                self._strip = 0
        if data:
            self._strip = 0
        return data


def _load_model(proto: bytes, name: str) -> Any:
    try:
        import sentencepiece
    except ImportError:
        raise TokenizerDependencyError(
            f"load_tokenizer: {name} must be read by the sentencepiece package, got no such "
            "package; run pip install 'fastinfer[sentencepiece]'"
        ) from None
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=proto)
    except RuntimeError as error:
        raise TokenizerError(
            f"load_tokenizer: {name} must be a sentencepiece model, got a file it cannot parse; "
            "download it again, or save the tokenizer as tokenizer.json"
        ) from error


def _splitter(tokens: Any) -> re.Pattern[str]:
    """A pattern that finds added tokens in text, the longest first; group 1.. holds the token."""
    patterns = []
    for index, token in enumerate(sorted(tokens, key=lambda t: len(t.content), reverse=True)):
        body = f"(?P<t{index}>{re.escape(token.content)})"
        if token.single_word:
            body = rf"(?<!\w){body}(?!\w)"
        if token.lstrip:
            # at the start of a run of spaces only: trying each would take quadratic time
            body = rf"(?:(?<!\s)\s+)?{body}"
        if token.rstrip:
            body = rf"{body}\s*"
        patterns.append(body)
    return re.compile("|".join(patterns) or r"(?!)")
