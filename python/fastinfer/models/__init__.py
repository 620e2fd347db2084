"""Decoders, their configuration, and loading from Hugging Face-format checkpoints."""

from .attention import AttentionMetadata, LayerCache
from .config import ModelConfig, load_config
from .decoder import CausalLM
from .loader import load_model, start_loading
from .rope_config import RopeConfig

__all__ = [
    "AttentionMetadata",
    "CausalLM",
    "LayerCache",
    "ModelConfig",
    "RopeConfig",
    "load_config",
    "load_model",
    "start_loading",
]
