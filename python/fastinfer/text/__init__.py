"""Text in and out of token ids: tokenizers, incremental decoding and chat templates."""

from .base import Tokenizer, TokenizerDependencyError, TokenizerError, TokenizerNotFoundError
from .chat import ChatTemplateError, encode_chat, render_chat
from .detokenizer import IncrementalDetokenizer
from .limits import RenderLimits
from .tokenizer import load_tokenizer

__all__ = [
    "ChatTemplateError",
    "IncrementalDetokenizer",
    "RenderLimits",
    "Tokenizer",
    "TokenizerDependencyError",
    "TokenizerError",
    "TokenizerNotFoundError",
    "encode_chat",
    "load_tokenizer",
    "render_chat",
]
