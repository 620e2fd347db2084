"""The mask function: equal to transformers' own masks, whatever the cache and the padding; the form
that it hands on; what it does not take.
"""

from __future__ import annotations

import random

import pytest
import torch
from transformers import masking_utils
from transformers.masking_utils import sdpa_mask

from fastinfer.integrations import _masks
from fastinfer.integrations._masks import (
    as_bool,
    decode,
    encode,
    fastinfer_mask,
    is_key_range,
    recognise,
)


def causal(window: int | None):
    if window is None:
        return masking_utils.causal_mask_function
    return masking_utils.sliding_window_causal_mask_function(window)


def random_case(rng: random.Random) -> dict:
    """A step over a cache: some tokens seen, some dropped by a sliding cache, some slots empty."""
    seen, q_length, spare = rng.choice([0, 0, 3, 9]), rng.choice([1, 1, 2, 7]), rng.choice([0, 4])
    kv_offset = rng.choice([0, rng.randint(0, seen)])
    batch = rng.choice([1, 3])
    mask = None
    if rng.random() < 0.7:
        mask = torch.ones(batch, seen + q_length, dtype=torch.bool)
        for row in mask:
            row[: rng.choice([0, rng.randint(0, seen + q_length)])] = False
    return {
        "batch_size": batch,
        "q_length": q_length,
        "kv_length": seen + q_length + spare - kv_offset,
        "q_offset": rng.choice([seen, torch.tensor(seen)]),
        "kv_offset": kv_offset,
        "attention_mask": mask,
        "allow_is_causal_skip": rng.random() < 0.7,
    }


def expand(got, case: dict, window: int | None) -> torch.Tensor:
    """What the attention function computes for a mask, bool [B, 1, Nq, Nk]."""
    q, k = case["q_length"], case["kv_length"]
    if got is None:  # causal from the first key, or one query that sees everything
        i, j = torch.arange(q)[:, None], torch.arange(k)[None]
        seen = (j <= i) if q > 1 else torch.ones(1, k, dtype=torch.bool)
        if window is not None:
            assert k <= window
        return seen.expand(case["batch_size"], 1, q, k)
    if got.dtype == torch.bool:  # as somebody works on it
        assert not case["allow_is_causal_skip"]
        return got
    assert got.dim() == 4 and is_key_range(got)
    return as_bool(got, q, k)


@pytest.mark.parametrize("seed", range(60))
def test_equal_to_the_masks_of_transformers(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(10):
        case, window = random_case(rng), rng.choice([None, None, 1, 3, 8])
        case["mask_function"], local = causal(window), {"local_size": window}
        got = expand(fastinfer_mask(**case, **local), case, window)
        want = sdpa_mask(**{**case, "allow_is_causal_skip": False}, **local)
        # Rows of padding tokens are nobody's.
        real = torch.ones(case["batch_size"], case["q_length"], dtype=torch.bool)
        if case["attention_mask"] is not None:
            real = case["attention_mask"][:, -case["q_length"] :]
        assert torch.equal(got[:, 0][real], want.expand_as(got)[:, 0][real]), case


@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("window", [None, 2])
def test_both_directions(side: str | None, window: int | None) -> None:
    function = masking_utils.bidirectional_mask_function
    if window is not None:
        function = masking_utils.sliding_window_bidirectional_mask_function(window)
    mask = torch.ones(2, 7, dtype=torch.bool)
    if side is not None:
        mask[0, slice(0, 3) if side == "left" else slice(4, 7)] = False
    case = {"batch_size": 2, "q_length": 7, "kv_length": 7, "attention_mask": mask}
    got = fastinfer_mask(**case, mask_function=function, allow_is_bidirectional_skip=True)
    want = sdpa_mask(**case, mask_function=function, allow_is_causal_skip=False)
    if side is None and window is None:
        assert got is None
    elif side is not None and window is not None:
        assert got.dtype == torch.bool and torch.equal(got, want)
    else:
        assert torch.equal(as_bool(got, 7, 7), want.expand(2, 1, 7, 7))


def test_patterns_without_a_kernel_keep_their_mask() -> None:
    for function in (
        masking_utils.chunked_causal_mask_function(3, torch.zeros(1, dtype=torch.int)),
        masking_utils.or_masks(causal(None), causal(2)),
        masking_utils.and_masks(causal(2), causal(None)),
        lambda b, h, q, k: k <= q,
    ):
        assert recognise(function) is None
        case = {"batch_size": 1, "q_length": 6, "kv_length": 6, "mask_function": function}
        got = fastinfer_mask(**case)
        assert got.dtype == torch.bool
        assert torch.equal(got, sdpa_mask(**case, allow_is_causal_skip=False))
    hole = torch.tensor([[1, 1, 0, 1, 1]]).bool()
    got = fastinfer_mask(batch_size=1, q_length=5, kv_length=5, attention_mask=hole)
    assert got.dtype == torch.bool
    assert torch.equal(got, sdpa_mask(batch_size=1, q_length=5, kv_length=5, attention_mask=hole))


def test_masks_that_models_work_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who does not allow a mask to be skipped gets rows and columns, in every step."""

    class Config:
        model_type = "with an indexer"

    def ask(q_length: int, kv_length: int, q_offset, skip: bool, window: int | None = None):
        return fastinfer_mask(
            batch_size=2,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            mask_function=causal(window),
            local_size=window,
            allow_is_causal_skip=skip,
            config=Config,
        )

    monkeypatch.setattr(_masks, "_workers", set())
    fixed = torch.tensor(6)
    # transformers skips no mask of such a step: one more that is not worked on
    assert is_key_range(ask(1, 12, fixed, False)) and is_key_range(ask(1, 9, 6, False, 4))
    assert ask(1, 7, 6, False).dtype == torch.bool
    assert ask(6, 6, 0, False).shape == (2, 1, 6, 6) and ask(6, 6, 0, True) is None
    assert ask(6, 12, torch.tensor(0), False).shape == (2, 1, 6, 12)
    for got in (ask(1, 12, fixed, False), ask(1, 9, 6, False, 4)):
        assert got.dtype == torch.bool and got.shape[2] == 1
    both = fastinfer_mask(
        batch_size=2,
        q_length=5,
        kv_length=7,
        mask_function=masking_utils.bidirectional_mask_function,
        allow_is_bidirectional_skip=False,
    )
    assert both.dtype == torch.bool and both.all() and both.shape[2:] == (5, 7)


def test_recognised_functions() -> None:
    assert recognise(masking_utils.causal_mask_function) == (True, None)
    assert recognise(masking_utils.bidirectional_mask_function) == (False, None)
    assert recognise(masking_utils.sliding_window_causal_mask_function(9)) == (True, 9)
    both = masking_utils.sliding_window_bidirectional_mask_function(4)
    assert recognise(both) == (False, 4)


def test_layers_read_a_mask_without_copies() -> None:
    mask = encode(torch.arange(5), torch.arange(5, 10), causal=True, window=3)
    keys = decode(mask)
    assert keys.first.tolist() == [0, 1, 2, 3, 4] and keys.count.tolist() == [5, 6, 7, 8, 9]
    assert keys.causal and keys.window == 3 and keys.sides == (2, 0)
    storage = mask.untyped_storage().data_ptr()
    assert {t.untyped_storage().data_ptr() for t in (keys.first, keys.count)} == {storage}


def test_masks_survive_contiguous() -> None:
    """generate with a static cache calls .contiguous() on what it is given."""
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :2] = False
    got = fastinfer_mask(
        batch_size=2, q_length=9, kv_length=9, attention_mask=mask, mask_function=causal(4)
    )
    assert got.shape == (2, 9, 1, 2) and got.dtype == torch.int32
    assert torch.equal(as_bool(got, 9, 9), as_bool(got.contiguous(), 9, 9))
