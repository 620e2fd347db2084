"""Sizes of the models that whole-model benchmarks run, as transformers' configs name them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

SHAPES: dict[str, dict[str, int]] = {
    "llama3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "llama3-70b": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "tiny": {
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 4096,
    },
}


def write_config(name: str, folder: Path, dtype: str = "bfloat16", *, int4: bool = False) -> None:
    """A folder that `--load-format dummy` runs: a Llama of these sizes, without weights."""
    config: dict[str, Any] = {
        **SHAPES[name],
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": dtype,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }
    if int4:
        config["quantization_config"] = {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "sym": True,
        }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config) + "\n")


if __name__ == "__main__":  # python bench/shapes.py llama3-8b DIR
    write_config(sys.argv[1], Path(sys.argv[2]))
