"""fastinfer: hand-written kernels for LLM inference as PyTorch operators."""

from ._version import __version__

__all__ = ["__version__"]
