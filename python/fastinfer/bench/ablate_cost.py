"""What a run had to compute and to move, counted from the plans of its steps, and what bounds it.

Least seconds of each part, on the rates measured here by torch itself:

    compute   multiplications of linear layers and attention / rate of a large matmul
    weights   steps * bytes of the weights that a step reads / rate of a large copy
    cache     keys and values read and written / rate of a large copy
    scores    where attention is not fused: scores written and read / rate of a large copy
    launch    what is left of the run: launches, the host, everything that waits

The largest of them is the bound. Kernels do not reach those rates, so `launch` is an upper limit.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.step_plan import SchedulePlan
from ..models import CausalLM

PARTS = ("compute", "weights", "cache", "scores", "launch")
_SCORE_PASSES = 5  # written, scaled, masked, softmax in and out


@dataclass(slots=True)
class Rates:
    """Of this machine: bytes and multiplications (two operations each) per second."""

    bytes: float
    flops: float


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """Time a large copy and a large matmul; well under a second."""
    cuda = device.type == "cuda"
    source = torch.randn((64 if cuda else 8) << 20, device=device)
    target = torch.empty_like(source)
    n = 8192 if cuda else 512
    a = torch.randn(n, n, device=device).to(dtype)
    copied = 2 * source.numel() * 4
    rate = copied / _fastest(device, lambda: target.copy_(source))
    return Rates(rate, 2 * n**3 / _fastest(device, lambda: torch.matmul(a, a)))


def _fastest(device: torch.device, call: Any) -> float:
    best = float("inf")
    for _ in range(5):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def weight_bytes(model: torch.nn.Module) -> int:
    """Of all parameters and buffers, each counted once."""
    seen = {}
    for tensor in (*model.parameters(), *model.buffers()):
        seen[tensor.data_ptr()] = max(tensor.nbytes, seen.get(tensor.data_ptr(), 0))
    return sum(seen.values())


@torch.inference_mode()
def linear_ms(model: CausalLM, tokens: int) -> float:
    """Milliseconds that the linear layers of a step of so many tokens take by themselves.

    Those of the first layer, times the number of layers; called one after the other, so that what
    a call costs the host is part of it where that is the limit.
    """
    device = model.embed_tokens.weight.device
    calls: list[tuple[torch.nn.Module, torch.Tensor]] = []
    outer: tuple[str, ...] = ()
    for name, layer in model.layers[0].named_modules():
        inputs = getattr(layer, "in_features", None)
        if not isinstance(inputs, int) or name.startswith(outer):  # or a part of one
            continue
        outer += (f"{name}.",)
        calls.append((layer, torch.randn(tokens, inputs, device=device).to(model.dtype)))

    def run() -> None:
        for layer, x in calls:
            layer(x)

    return 1e3 * len(model.layers) * _fastest(device, run)


class WorkCounter:
    """Adds up what the plans of a run ask for; `EngineCore.on_plan`."""

    def __init__(self, model: CausalLM, token_bytes: float, block_size: int) -> None:
        config, attn = model.config, model.layers[0].attn
        self.token_bytes = token_bytes  # of the cache
        self.block_size = block_size
        self.step_bytes = weight_bytes(model)
        if model.lm_head is not None:
            self.step_bytes -= model.embed_tokens.weight.nbytes  # only rows of it are read
        heads, kv = config.num_heads, config.num_kv_heads
        per_layer = config.hidden_size * (2 * heads + 2 * kv) * config.head_dim
        per_layer += 3 * config.hidden_size * config.intermediate_size
        self.flops_per_token = 2 * config.num_layers * per_layer
        self.flops_per_sample = 2 * config.hidden_size * config.vocab_size
        self.flops_per_score = 4 * config.num_layers * heads * config.head_dim
        self.bytes_per_score = 0
        if not attn.fused:
            self.bytes_per_score = _SCORE_PASSES * config.num_layers * heads * model.dtype.itemsize
        self.steps = self.tokens = self.sampled = self.cached = self.scores = 0
        self.materialized = self.used = self.reserved = 0
        self.prompt_steps = self.mixed_steps = self.prompt_pieces = self.largest_step = 0

    def __call__(self, plan: SchedulePlan) -> None:
        """Count a step."""
        self.steps += plan.burst[0] if plan.burst else 1
        longest = longest_count = pieces = 0
        for chunk in plan.chunks:
            if not chunk.count:  # of a request that ended in the burst before: it holds nothing
                continue
            start, count = chunk.start, chunk.count
            end = start + count
            self.sampled += chunk.samples
            pieces += start < chunk.request.num_prompt
            self.cached += end + count  # read once, the new ones written
            self.scores += count * start + count * (count + 1) // 2
            self.used += end
            self.reserved += len(chunk.request.block_table) * self.block_size
            longest, longest_count = max(longest, end), max(longest_count, count)
        self.prompt_pieces += pieces
        self.prompt_steps += pieces > 0
        self.mixed_steps += 0 < pieces < len(plan.chunks)
        self.largest_step = max(self.largest_step, plan.num_tokens)
        self.tokens += plan.num_tokens
        self.materialized += len(plan.chunks) * longest * longest_count  # padded

    @property
    def waste(self) -> float:
        """Share of the reserved places in the cache that hold nothing, on average over steps."""
        return 1 - self.used / self.reserved if self.reserved else 0.0

    def parts(self, seconds: float, rates: Rates) -> dict[str, float]:
        """Seconds of each part."""
        flops = self.tokens * self.flops_per_token + self.sampled * self.flops_per_sample
        flops += self.scores * self.flops_per_score
        found = {
            "compute": flops / rates.flops,
            "weights": self.steps * self.step_bytes / rates.bytes,
            "cache": self.cached * self.token_bytes / rates.bytes,
            "scores": self.materialized * self.bytes_per_score / rates.bytes,
        }
        found["launch"] = max(seconds - sum(found.values()), 0.0)
        return found


def bound(parts: dict[str, float]) -> str:
    """The largest part."""
    return max(parts, key=lambda name: parts[name])
