"""``tokenizer.json``, through the ``tokenizers`` package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from .base import Tokenizer, TokenizerError
from .files import AddedToken, TokenizerSettings
from .stream import REPLACE_EACH_BYTE, ByteStream, TokenStream, WindowStream


class JsonTokenizer(Tokenizer):
    """A tokenizer described by a ``tokenizer.json``."""

    def __init__(self, path: Path, settings: TokenizerSettings) -> None:
        super().__init__(settings)
        try:
            self._tok = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises bare Exception for a bad file
            raise TokenizerError(
                f"load_tokenizer: {path.name} must be a tokenizer that the tokenizers package "
                f"({tokenizers.__version__}) reads, got {error}; download it again or update "
                "tokenizers"
            ) from error
        # A file may carry the settings of somebody's training run; prompts are never cut or padded.
        self._tok.no_truncation()
        self._tok.no_padding()
        self._declare(settings)

        added = self._tok.get_added_tokens_decoder()
        self._special_ids = sorted(i for i, token in added.items() if token.special)
        vocab = self._tok.get_vocab(with_added_tokens=True)
        self._vocab_size = max(vocab.values(), default=-1) + 1
        self._bytes: dict[int, bytes] = {}
        self._layout = _byte_layout(self._tok.decoder)

    def _declare(self, settings: TokenizerSettings) -> None:
        """Tell the tokenizer about tokens that only the side files mention."""
        for token_id, token in sorted(settings.added.items()):
            if self._tok.token_to_id(token.content) is None:
                self._tok.add_tokens([_convert(token)])
                got = self._tok.token_to_id(token.content)
                if got != token_id:
                    raise TokenizerError(
                        f"load_tokenizer: {token.content!r} must have id {token_id} as "
                        f"tokenizer_config.json says, got {got}; tokenizer.json lacks it, so save "
                        "the tokenizer again"
                    )
        known = {
            token.content
            for token in self._tok.get_added_tokens_decoder().values()
            if token.special
        }
        missing = [_convert(t) for t in settings.special.values() if t.content not in known]
        if missing:
            self._tok.add_special_tokens(missing)

    # ---- Tokenizer --------------------------------------------------------------------------

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return self._tok.encode(text, add_special_tokens=add_special_tokens).ids

    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self._tok.decode(ids, skip_special_tokens=skip_special_tokens)

    def convert_id_to_token(self, token_id: int) -> str | None:
        return self._tok.id_to_token(self.check_id(token_id))

    def convert_token_to_id(self, token: str) -> int | None:
        return self._tok.token_to_id(token)

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def all_special_ids(self) -> list[int]:
        return list(self._special_ids)

    def token_bytes(self, token_id: int) -> bytes:
        return (
            super().token_bytes(token_id) if self._layout is None else self._token_bytes(token_id)
        )

    def stream(self, skip_special_tokens: bool = True) -> TokenStream:
        if self._layout is None:
            return WindowStream(self, skip_special_tokens)
        errors, strip = self._layout
        get = self._token_bytes
        if skip_special_tokens:
            skip = frozenset(self._special_ids)

            def get(token_id: int) -> bytes:
                return b"" if token_id in skip else self._token_bytes(token_id)

        return ByteStream(get, errors=errors, strip=strip)

    def _token_bytes(self, token_id: int) -> bytes:
        data = self._bytes.get(token_id)
        if data is None:
            token = self.convert_id_to_token(token_id) or ""
            byte_level = self._layout is not None and self._layout[0] == "replace"
            data = _byte_level_bytes(token) if byte_level else _byte_fallback_bytes(token)
            self._bytes[token_id] = data
        return data


def _convert(token: AddedToken) -> tokenizers.AddedToken:
    return tokenizers.AddedToken(
        token.content,
        special=token.special,
        lstrip=token.lstrip,
        rstrip=token.rstrip,
        single_word=token.single_word,
        normalized=token.normalized,
    )


def _byte_layout(decoder: Any) -> tuple[str, int] | None:
    """(codec error handler, leading spaces to drop) of a decoder made of bytes, else None."""
    if decoder is None:
        return None
    state = json.loads(decoder.__getstate__())
    steps = state.get("decoders") if state.get("type") == "Sequence" else [state]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return "replace", 0
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or kinds[3:] not in ([], ["Strip"]):
        return None
    replace, strip = steps[0], steps[3] if len(steps) == 4 else {"start": 0, "stop": 0}
    if replace.get("pattern") != {"String": "\u2581"} or replace.get("content") != " ":
        return None
    if strip.get("stop") or strip.get("content", " ") != " ":
        return None
    return REPLACE_EACH_BYTE, int(strip["start"])


def _byte_level_alphabet() -> dict[str, int]:
    """The printable stand-ins of GPT-2's byte-level BPE, character -> byte."""
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    alphabet = {chr(byte): byte for byte in own}
    others = (byte for byte in range(256) if byte not in own)
    alphabet.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return alphabet


_ALPHABET = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_ALPHABET[char] for char in token])
    except KeyError:  # an added token with characters outside the alphabet stands for itself
        return token.encode("utf-8")


def _byte_fallback_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        try:
            return bytes([int(token[3:5], 16)])
        except ValueError:
            pass
    return token.replace("\u2581", " ").encode("utf-8")
