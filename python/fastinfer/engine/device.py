"""Which device an engine runs on when nobody says."""

from __future__ import annotations

import os
import warnings

import torch

from .. import _lib, ops
from .._errors import first_line


def choose_device(name: str | None) -> torch.device:
    """The device of that name; for None the current GPU if every operator a step needs runs there.

    Raises:
        ValueError: The name is not a device fastinfer knows.
        RuntimeError: With FASTINFER_STRICT=1, instead of the warning that a GPU is left unused.
    """
    if name is not None:
        try:
            device = torch.device(name)
        except RuntimeError:
            device = torch.device("meta")
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"LLM: device must be 'cpu', 'cuda' or 'cuda:N', got {name!r}")
        if device.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"LLM: device must exist, got {name!r} but torch sees no CUDA device; use "
                "device='cpu' or check the driver with `fastinfer env`"
            )
        return device
    if torch.cuda.is_available() and "cuda_toolkit" in _lib.build_info():
        missing = _probe_cuda()
        if missing is None:
            return torch.device("cuda", torch.cuda.current_device())
        if os.environ.get("FASTINFER_STRICT") == "1":
            raise RuntimeError(f"LLM: the GPU cannot run a step ({missing}); use device='cpu'")
        warnings.warn(
            f"LLM: running on the CPU although there is a GPU, because {missing}", stacklevel=3
        )
    return torch.device("cpu")


@torch.inference_mode()
def _probe_cuda() -> str | None:
    """Why a step cannot run on the GPU, or None: one tiny call of each operator it needs."""
    row = torch.ones(1, 64, device="cuda", dtype=torch.bfloat16)
    heads = row.view(1, 1, 64)
    cache = torch.zeros(1, 16, 1, 64, device="cuda", dtype=torch.bfloat16)
    angles = torch.zeros(16, 32, device="cuda")
    zero = torch.zeros(1, device="cuda", dtype=torch.int64)
    one = torch.ones(1, device="cuda", dtype=torch.int32)
    table = torch.zeros(1, 1, device="cuda", dtype=torch.int32)
    bounds = torch.tensor([0, 1], device="cuda", dtype=torch.int32)
    try:
        ops.rms_norm(row, row[0])
        ops.linear(row, torch.ones(64, 64, device="cuda", dtype=torch.bfloat16))
        ops.silu_and_mul(row)
        ops.apply_rotary_and_cache(
            heads.clone(), heads.clone(), heads, angles, angles, zero, cache, cache.clone(), zero
        )
        ops.flash_attn_varlen_func(
            heads, cache, cache, bounds, None, 1, 1, causal=True, block_table=table, seqused_k=one
        )
        ops.flash_attn_with_kvcache(
            heads.unsqueeze(0), cache, cache, cache_seqlens=one, block_table=table, causal=True
        )
        ops.sample(row.float(), temperature=torch.ones(1, device="cuda"))
        torch.cuda.synchronize()
    except (RuntimeError, NotImplementedError) as error:
        return first_line(error)
    return None
