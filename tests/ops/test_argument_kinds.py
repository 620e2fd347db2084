"""A value of the wrong kind where a tensor or a number belongs: one sentence that names it."""

from __future__ import annotations

import pytest
import torch

import fastinfer as fi

X = torch.ones(2, 16)
ROWS = torch.ones(2, 2, 16)
CACHE = torch.ones(3, 4, 2, 16)
DENSE = torch.ones(2, 3, 2, 16)
LENGTHS = torch.ones(2, dtype=torch.int32)
TABLE = torch.zeros(2, 1, dtype=torch.int32)
PAIRS = torch.zeros(1, 2, dtype=torch.int64)

TENSORS = {
    "rms_norm": {"x": X, "weight": X[0]},
    "fused_add_rms_norm": {"x": X, "residual": X, "weight": X[0]},
    "rms_norm_quant": {"x": X, "weight": X[0]},
    "silu_and_mul": {"x": X},
    "gelu_and_mul": {"x": X},
    "silu_and_mul_quant": {"x": X},
    "repeat_kv": {"x": ROWS},
    "reshape_and_cache": {
        "key": ROWS,
        "value": ROWS,
        "key_cache": CACHE,
        "value_cache": CACHE.clone(),
        "slot_mapping": LENGTHS,
    },
    "gather_cache": {
        "key_cache": CACHE,
        "value_cache": CACHE,
        "block_table": TABLE,
        "cu_seqlens": torch.tensor([0, 1, 2]),
    },
    "copy_blocks": {"block_mapping": PAIRS},
    "swap_blocks": {"block_mapping": PAIRS},
    "apply_rotary": {"q": ROWS, "cos": X[:, :8], "sin": X[:, :8]},
    "merge_attn_states": {
        "prefix_output": ROWS,
        "prefix_lse": X[:, :2],
        "suffix_output": ROWS,
        "suffix_lse": X[:, :2],
    },
    "plan_decode": {"cache_seqlens": LENGTHS},
    "sample": {"logits": X},
    "flash_attn_varlen_func": {"q": ROWS, "k": ROWS, "v": ROWS, "cu_seqlens_q": LENGTHS},
}
OTHERS = {
    "repeat_kv": {"n_rep": 2},
    "gather_cache": {"num_tokens": 2},
    "copy_blocks": {"key_caches": CACHE, "value_caches": CACHE},
    "swap_blocks": {"src": CACHE, "dst": CACHE.clone()},
    "apply_rotary": {"k": None},
    "plan_decode": {"num_heads_q": 2, "num_heads_kv": 2, "head_dim": 16},
    "flash_attn_varlen_func": {"cu_seqlens_k": LENGTHS, "max_seqlen_q": 1, "max_seqlen_k": 1},
}


@pytest.mark.parametrize("wrong", [None, 1.5])
@pytest.mark.parametrize(
    ("name", "argument"), [(name, arg) for name, given in TENSORS.items() for arg in given]
)
def test_not_a_tensor(name: str, argument: str, wrong: object) -> None:
    arguments = {**TENSORS[name], **OTHERS.get(name, {}), argument: wrong}
    with pytest.raises(TypeError, match=f"^{name}: {argument} must be a tensor, got") as caught:
        getattr(fi, name)(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("window", [3, None, (1.5, 0), (1,)])
def test_window_size(window: object) -> None:
    with pytest.raises(RuntimeError, match="window_size must be two integers"):
        fi.flash_attn_func(DENSE, DENSE, DENSE, window_size=window)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [(1.7, "must be an integer or an int32 tensor"), (2**40, "fit in int32")],
)
def test_cache_seqlens_as_a_number(lengths: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        fi.flash_attn_with_kvcache(DENSE, DENSE, DENSE, cache_seqlens=lengths)


def test_no_head_dim() -> None:
    empty = DENSE[..., :0]
    with pytest.raises(RuntimeError, match=r"^flash_attn_func: q must have dimensions"):
        fi.flash_attn_func(empty, empty, empty)


@pytest.mark.parametrize(
    "call",
    [
        lambda n: fi.gather_cache(CACHE, CACHE, TABLE, torch.tensor([0, 1, 2]), n)[0],
        lambda n: fi.repeat_kv(ROWS, n),
        lambda n: fi.sample(X, num_top_logprobs=n).top_logprobs,
        lambda n: fi.flash_attn_with_kvcache(DENSE, DENSE, DENSE, cache_seqlens=n),
    ],
    ids=["gather_cache", "repeat_kv", "sample", "flash_attn_with_kvcache"],
)
def test_compiled_with_a_number_that_changes(call: object) -> None:
    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for n in (2, 3):
        torch.testing.assert_close(compiled(n), call(n))


@pytest.mark.parametrize("inplace", [False, True])
def test_rotary_table_without_dimensions(inplace: bool) -> None:
    with pytest.raises(RuntimeError, match=r"^apply_rotary: cos must have 2 dimensions"):
        fi.apply_rotary(ROWS, None, torch.ones(()), torch.ones(()), inplace=inplace)
