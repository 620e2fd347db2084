"""What every tokenizer offers, whatever file it came from."""

from __future__ import annotations

import operator
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

from .stream import TokenStream, WindowStream

if TYPE_CHECKING:
    from .files import TokenizerSettings


class TokenizerError(ValueError):
    """A tokenizer file or an argument to a tokenizer is not usable."""


class TokenizerNotFoundError(TokenizerError, FileNotFoundError):
    """The folder holds no tokenizer that fastinfer can read."""


class TokenizerDependencyError(TokenizerError, ImportError):
    """The tokenizer needs a package that is not installed."""


class Tokenizer(ABC):
    """Text <-> token ids, plus the special tokens and the chat template of one checkpoint.

    Built by :func:`fastinfer.text.load_tokenizer`. Instances hold no per-request state, so one
    serves any number of requests.
    """

    def __init__(self, settings: TokenizerSettings) -> None:
        self.named_special_tokens: dict[str, str] = dict(settings.named)
        self.chat_template: str | dict[str, str] | None = settings.chat_template

    # ---- text <-> ids -----------------------------------------------------------------------

    @abstractmethod
    def _encode(self, text: str, add_special_tokens: bool) -> list[int]: ...

    @abstractmethod
    def _decode(self, ids: list[int], skip_special_tokens: bool) -> str: ...

    @abstractmethod
    def convert_id_to_token(self, token_id: int) -> str | None:
        """The vocabulary entry of an id, or None where the id has none (padded vocabularies)."""

    @abstractmethod
    def convert_token_to_id(self, token: str) -> int | None:
        """The id of a vocabulary entry, or None."""

    @property
    @abstractmethod
    def vocab_size(self) -> int:
        """One more than the largest id the tokenizer knows, added tokens included."""

    @property
    @abstractmethod
    def all_special_ids(self) -> list[int]:
        """Ids that ``skip_special_tokens`` leaves out, ascending."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Turn text into token ids.

        Special tokens spelled out in the text become their ids, as in transformers.

        Args:
            text: any valid Unicode string.
            add_special_tokens: add what the checkpoint adds around a prompt (BOS and such).

        Returns:
            The token ids.

        Raises:
            TokenizerError: the text is not a string, or holds lone surrogates.
        """
        if not isinstance(text, str):
            raise TokenizerError(
                f"encode: text must be a str, got {type(text).__name__}; "
                "pass token ids to the engine as they are"
            )
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise TokenizerError(
                "encode: text must be valid Unicode, got a lone surrogate at position "
                f"{error.start}; drop it with text.encode('utf-8', 'ignore').decode()"
            ) from None
        return self._encode(text, add_special_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Turn token ids into text; ids without a vocabulary entry add nothing.

        Args:
            ids: token ids, any iterable of integers.
            skip_special_tokens: leave out the ids in :attr:`all_special_ids`.

        Returns:
            The text; bytes that are not UTF-8 appear as U+FFFD.

        Raises:
            TokenizerError: an id is negative or not an integer.
        """
        return self._decode([self.check_id(i) for i in ids], skip_special_tokens)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text that has begun, special tokens spelled out.

        A token may hold a part of a character only. Its leading space, if it has one, is there,
        which :meth:`decode` of that token alone drops with many tokenizers.
        """
        once, twice = (self._decode([self.check_id(token_id)] * n, False) for n in (1, 2))
        return twice[len(once) :].encode("utf-8", "replace")

    def stream(self, skip_special_tokens: bool = True) -> TokenStream:
        """A fresh incremental decoder: ids in one by one, complete characters out."""
        return WindowStream(self, skip_special_tokens)

    @staticmethod
    def check_id(token_id: int) -> int:
        """The id as an int in [0, 2**31), or a clear error."""
        try:
            value = operator.index(token_id)
        except TypeError:
            value = -1
        if not 0 <= value < 2**31:
            raise TokenizerError(
                f"decode: ids must be integers in [0, 2**31), got {token_id!r}; "
                "drop padding such as -1 before decoding"
            )
        return value

    # ---- special tokens ---------------------------------------------------------------------

    def _named_id(self, name: str) -> int | None:
        token = self.named_special_tokens.get(name)
        return None if token is None else self.convert_token_to_id(token)

    @property
    def bos_token(self) -> str | None:
        """Text of the beginning-of-sequence token."""
        return self.named_special_tokens.get("bos_token")

    @property
    def bos_token_id(self) -> int | None:
        """Id of the beginning-of-sequence token."""
        return self._named_id("bos_token")

    @property
    def eos_token(self) -> str | None:
        """Text of the end-of-sequence token."""
        return self.named_special_tokens.get("eos_token")

    @property
    def eos_token_id(self) -> int | None:
        """Id of the end-of-sequence token; ``generation_config.json`` may list more of them."""
        return self._named_id("eos_token")

    @property
    def pad_token(self) -> str | None:
        """Text of the padding token."""
        return self.named_special_tokens.get("pad_token")

    @property
    def pad_token_id(self) -> int | None:
        """Id of the padding token."""
        return self._named_id("pad_token")

    @property
    def unk_token(self) -> str | None:
        """Text of the unknown token."""
        return self.named_special_tokens.get("unk_token")

    @property
    def unk_token_id(self) -> int | None:
        """Id of the unknown token."""
        return self._named_id("unk_token")

    @property
    def all_special_tokens(self) -> list[str]:
        """Texts of :attr:`all_special_ids`, in the same order."""
        return [self.convert_id_to_token(i) or "" for i in self.all_special_ids]

    def __len__(self) -> int:
        return self.vocab_size

    def __bool__(self) -> bool:
        return True
