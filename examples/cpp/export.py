"""Compiles a transformers model with fastinfer's attention and int4 linears ahead of time.

    python examples/cpp/export.py examples/tiny/model model.pt2 [cpu | cuda]

The package computes logits [B, S, vocab] of input_ids and attention_mask [B, S] (int64), for any B
and S >= 2; `main.cpp` loads it without Python.
"""

from __future__ import annotations

import sys

import torch
from transformers import AutoModelForCausalLM

from fastinfer.integrations.transformers import FastinferInt4Config, enable


class Logits(torch.nn.Module):
    """Tensors in, a tensor out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, attention_mask=attention_mask, use_cache=False).logits


def main(checkpoint: str, package: str, device: str = "cpu", max_length: int = 256) -> None:
    enable()
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        attn_implementation="fastinfer",
        quantization_config=FastinferInt4Config(group_size=32),
        dtype=torch.float16 if device == "cuda" else torch.float32,
    )
    model = model.to(device).eval()
    ids = torch.arange(10, 22, device=device).view(2, 6)
    batch = torch.export.Dim("batch", min=1, max=64)
    length = torch.export.Dim("length", min=2, max=max_length)
    shape = {0: batch, 1: length}
    with torch.no_grad():
        program = torch.export.export(
            Logits(model),
            (ids, torch.ones_like(ids)),
            dynamic_shapes={"input_ids": shape, "attention_mask": shape},
        )
        names = {
            str(node.target) for node in program.graph.nodes if "fastinfer" in str(node.target)
        }
        print("operators:", ", ".join(sorted(names)))
        torch._inductor.aoti_compile_and_package(program, package_path=package)


if __name__ == "__main__":
    main(*sys.argv[1:4])
