"""Arguments without data: None where a tensor belongs, and tensors on the meta device.

torch runs the fake kernel as soon as one argument is a meta tensor. Unless that is refused, an
operator returns memory as it was allocated.
"""

from __future__ import annotations

import pytest
import torch

import fastinfer as fi

ROWS, HIDDEN = 3, 32


def _calls() -> dict[str, tuple]:
    x, w = torch.randn(ROWS, HIDDEN), torch.randn(HIDDEN)
    q, k = torch.randn(ROWS, 4, 16), torch.randn(ROWS, 2, 16)
    cos, slots = torch.randn(10, 8), torch.arange(ROWS)
    cache = torch.zeros(4, 8, 2, 16)
    table, cu = torch.tensor([[0, 1]]), torch.tensor([0, ROWS])
    return {
        "rms_norm": (x, w),
        "fused_add_rms_norm": (x, x.clone(), w),
        "rms_norm_quant": (x, w),
        "linear": (x, torch.randn(8, HIDDEN)),
        "apply_rotary": (q, k, cos, cos, slots),
        "apply_rotary_and_cache": (q, k, k, cos, cos, slots, cache, cache.clone(), slots),
        "reshape_and_cache": (k, k, cache, cache.clone(), slots),
        "gather_cache": (cache, cache.clone(), table, cu, ROWS),
        "copy_blocks": (cache, cache.clone(), torch.tensor([[0, 1]])),
        "verify_draft": (torch.randn(1, 3, 5), torch.tensor([[1, 2]])),
    }


CASES = [(name, i) for name, args in _calls().items() for i in range(len(args))]


@pytest.mark.parametrize("name,i", CASES)
def test_one_meta_tensor_among_others(name: str, i: int) -> None:
    args = list(_calls()[name])
    if not isinstance(args[i], torch.Tensor):
        pytest.skip("not a tensor")
    args[i] = args[i].to("meta")
    with pytest.raises(RuntimeError, match=rf"^{name}: \w+ must be on the same device") as error:
        getattr(fi, name)(*args)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", list(_calls()))
def test_only_meta_tensors(name: str) -> None:
    args = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in _calls()[name]]
    getattr(fi, name)(*args)


def test_swap_blocks_between_meta_and_cpu() -> None:
    a, mapping = torch.zeros(2, 3), torch.tensor([[0, 1]])
    for src, dst in ((a, a.to("meta")), (a.to("meta"), a)):
        with pytest.raises(RuntimeError, match=r"^swap_blocks: src and dst must both hold data"):
            fi.swap_blocks(src, dst, mapping)
    fi.swap_blocks(a.to("meta"), a.to("meta"), mapping)  # the mapping stays on the CPU


@pytest.mark.parametrize(
    "name,i,arg",
    [
        ("rms_norm", 1, "weight"),
        ("fused_add_rms_norm", 1, "residual"),
        ("apply_rotary", 2, "cos"),
        ("apply_rotary_and_cache", 5, "positions"),
        ("reshape_and_cache", 4, "slot_mapping"),
        ("gather_cache", 3, "cu_seqlens"),
        ("copy_blocks", 2, "block_mapping"),
        ("verify_draft", 1, "draft_token_ids"),
    ],
)
def test_none_for_a_tensor(name: str, i: int, arg: str) -> None:
    args = list(_calls()[name])
    args[i] = None
    with pytest.raises(TypeError, match=f"^{name}: {arg} must be a tensor, got None"):
        getattr(fi, name)(*args)


def test_rotary_table_without_dimensions() -> None:
    with pytest.raises(RuntimeError, match=r"^apply_rotary: cos must have 2 dimensions"):
        fi.apply_rotary(torch.randn(3, 4, 16), None, torch.tensor(1.0), torch.tensor(1.0))


def test_caches_that_require_grad() -> None:
    k, cache = torch.randn(ROWS, 2, 16), torch.zeros(4, 8, 2, 16)
    with pytest.raises(RuntimeError, match=r"^reshape_and_cache: an input requires grad"):
        fi.reshape_and_cache(k, k, cache.requires_grad_(), cache.detach(), torch.arange(ROWS))
