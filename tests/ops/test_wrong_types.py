"""Arguments that are no tensors where tensors are wanted: one sentence with the operator's name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import fastinfer as fi

X = torch.ones(2, 32)
Q, K = torch.ones(1, 2, 2, 32), torch.ones(1, 2, 1, 32)
PACKED = {"group_size": 32, "out_features": 16}


@pytest.mark.parametrize("wrong", [None, [1.0, 2.0], "x", 3])
@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("linear", lambda t: fi.linear(t, X)),
        ("linear", lambda t: fi.linear(X, t)),
        ("int4_linear", lambda t: fi.int4_linear(t, X, X, **PACKED)),
        ("int8_linear", lambda t: fi.int8_linear(X, t, X, **PACKED)),
        ("w8a8_linear", lambda t: fi.w8a8_linear(t, X, X, X)),
        ("w8a8_linear", lambda t: fi.w8a8_linear(X, X, t, X)),
        ("quantize_weight", lambda t: fi.quantize_weight(t, bits=4, group_size=32)),
        ("pack_weight", lambda t: fi.pack_weight(t, X, bits=4, group_size=32)),
        ("quantize_per_token", lambda t: fi.quantize_per_token(t)),
    ],
)
def test_required_tensors(name: str, call: Callable[[Any], Any], wrong: Any) -> None:
    with pytest.raises(TypeError, match=f"{name}: .*must be a tensor, got {type(wrong).__name__}"):
        call(wrong)


@pytest.mark.parametrize("wrong", [[1.0, 2.0], "x", 3])
def test_optional_tensors(wrong: Any) -> None:
    for options in ({"alibi_slopes": wrong}, {"sinks": wrong}):
        with pytest.raises(TypeError, match=r"flash_attn_func: .*must be a tensor, got"):
            fi.flash_attn_func(Q, K, K, **options)
    with pytest.raises(TypeError, match=r"linear: .*must be a tensor, got"):
        fi.linear(X, X, bias=wrong)


def test_a_weight_without_dimensions() -> None:
    with pytest.raises(RuntimeError, match="linear: weight must have 2 dimensions"):
        fi.linear(X, torch.tensor(1.0))


def test_outputs_that_repeat_memory_or_overlap_an_input() -> None:
    out, lse = torch.randn(4, 2, 32), torch.randn(2, 3)
    repeated = torch.empty(1, 2, 32).expand(3, 2, 32)
    with pytest.raises(RuntimeError, match="merge_attn_states: out is written"):
        fi.merge_attn_states(out[:3], lse, out[1:], lse, out=repeated)
    with pytest.raises(RuntimeError, match="merge_attn_states: out must not share memory"):
        fi.merge_attn_states(out[:3], lse, torch.randn(3, 2, 32), lse, out=out[1:])
    want = fi.merge_attn_states(out[:3].clone(), lse, out[:3].clone(), lse)
    assert torch.equal(fi.merge_attn_states(out[:3], lse, out[:3].clone(), lse, out=out[:3]), want)
    other = torch.empty(3, 2).t()
    fi.merge_attn_states(want, lse, want, lse, out_lse=other)  # any strides
    codes = torch.empty(1, 32, dtype=torch.int8).expand(2, 32)
    with pytest.raises(RuntimeError, match="quantize_per_token: q is written"):
        fi.quantize_per_token(X, out=codes)
    cache, ints = torch.randn(2, 4, 2, 32), torch.tensor([[0, 1]], dtype=torch.int32)
    ends = torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(RuntimeError, match="gather_cache: value_out is written"):
        fi.gather_cache(cache, cache, ints, ends, 3, out=(torch.empty(3, 2, 32), repeated))
    with pytest.raises(RuntimeError, match="gather_cache: key_out must not share memory"):
        fi.gather_cache(cache, cache, ints, ends, 3, out=(cache[0, :3], torch.empty(3, 2, 32)))
    row = torch.randn(2, 64)[:1, :32]  # in place, whatever the distance to a row that is not there
    want = fi.rms_norm(row.clone(), row[0].clone())
    same = row.as_strided((1, 32), (32, 1))
    assert torch.equal(fi.rms_norm(row, row[0].clone(), out=same), want)
