"""sample and verify_draft in plain torch: fp64, full sorts, one obvious step after the other.

The random numbers are those of the kernels (Philox4x32-10 by seed, step and token), so that the
tokens agree except where two candidates are closer than fp32 rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor

STREAM_SAMPLE, STREAM_ACCEPT, STREAM_RESAMPLE = 0, 1, 2
_MASK = 0xFFFFFFFF


def _mulhilo(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b; a and b below 2^32, in int64 without overflow."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox_reference(key: tuple[Tensor, Tensor], counter: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold 32-bit values (Salmon et al. 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        h0, l0 = _mulhilo(0xD2511F53, c0)
        h1, l1 = _mulhilo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0
        k0 = (k0 + 0x9E3779B9) & _MASK
        k1 = (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def uniform_reference(seeds: Tensor, steps: Tensor, n: int, stream: int) -> Tensor:
    """Uniforms (word + 1/2) / 2^32 of tokens 0..n-1: fp64 [B, n] from int64 seeds and steps [B]."""
    blocks = torch.arange((n + 3) // 4, device=seeds.device)
    shape = (seeds.shape[0], blocks.shape[0])
    seeds, steps = seeds[:, None].expand(shape), steps[:, None].expand(shape)
    words = philox_reference(
        (seeds & _MASK, (seeds >> 32) & _MASK),
        (
            steps & _MASK,
            (steps >> 32) & _MASK,
            blocks.expand(shape),
            torch.full(shape, stream, device=seeds.device),
        ),
    )
    return (torch.stack(words, -1).flatten(1)[:, :n].double() + 0.5) * 2.0**-32


def _race(weights: Tensor, seeds: Tensor, steps: Tensor, stream: int) -> Tensor:
    """argmax of weight / Exp(1), lowest id on ties."""
    e = -torch.log1p(-uniform_reference(seeds, steps, weights.shape[-1], stream))
    return _first_max(weights / e)


def _first_max(x: Tensor) -> Tensor:
    """argmax with the lowest index on ties (torch.argmax promises none)."""
    return (x == x.amax(-1, keepdim=True)).int().cumsum(-1).eq(0).sum(-1)


def penalise_reference(
    logits: Tensor,
    repetition_penalty: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    output_counts: Tensor | None = None,
) -> Tensor:
    """Logits after repetition, frequency and presence penalties, NaN -> -inf; fp64 [B, V]."""
    x = logits.double()
    counts = (
        torch.zeros_like(x) if output_counts is None else output_counts.clamp_min(0).to(x.dtype)
    )
    if repetition_penalty is not None:
        seen = counts > 0 if prompt_mask is None else prompt_mask | (counts > 0)
        r = repetition_penalty.double()[:, None]
        x = torch.where(seen, torch.where(x > 0, x / r, x * r), x)
    if frequency_penalty is not None:
        x = x - frequency_penalty.double()[:, None] * counts
    if presence_penalty is not None:
        x = x - presence_penalty.double()[:, None] * (counts > 0)
    return torch.where(x.isnan(), float("-inf"), x)


def distribution_reference(
    x: Tensor,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What is sampled from penalised logits x: (log-probabilities, kept) as fp64 and bool [B, V].

    A temperature-0 row is the log-softmax of x, nothing cut.
    """
    b, v = x.shape
    inf = float("inf")
    one = torch.ones(b, dtype=torch.float64, device=x.device)
    t = one if temperature is None else temperature.double()
    greedy = ~(t > 0)
    top = x.amax(-1, keepdim=True)
    distance = torch.where(x == top, 0.0, x - top)
    distance = torch.where(x == -inf, -inf, distance)
    scaled = distance / torch.where(greedy, one, t)[:, None]
    scaled = torch.where(distance == -inf, -inf, scaled)
    order = torch.sort(x, dim=-1, descending=True, stable=True).indices
    kept = torch.ones_like(x, dtype=torch.bool)
    if top_k is not None:
        k = torch.where((top_k > 0) & (top_k < v), top_k, v).long()
        kth = x.gather(1, order).gather(1, (k - 1)[:, None])
        kept &= x >= kth
    if top_p is not None:
        p = torch.softmax(torch.where(kept, scaled, -inf), -1).gather(1, order)
        wanted = torch.where(top_p < 1, top_p.double(), inf)
        before = p.cumsum(-1) - p
        in_nucleus = before < wanted[:, None]
        in_nucleus[:, 0] = True
        kept &= torch.empty_like(kept).scatter_(1, order, in_nucleus)
    if min_p is not None:
        kept &= scaled.exp() >= min_p.double().clamp(0, 1)[:, None]
    kept |= greedy[:, None]
    logprobs = torch.log_softmax(torch.where(kept, scaled, -inf), -1)
    return torch.where(logprobs.isnan(), -inf, logprobs), kept


def sample_reference(
    logits: Tensor,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seeds: Tensor | None = None,
    steps: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    prompt_mask: Tensor | None = None,
    output_counts: Tensor | None = None,
    num_top_logprobs: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`sample` in plain torch: (token_ids, logprobs, top_ids, top_logprobs), log-probabilities in
    fp64."""
    x = penalise_reference(
        logits, repetition_penalty, presence_penalty, frequency_penalty, prompt_mask, output_counts
    )
    logprobs, _ = distribution_reference(x, temperature, top_k, top_p, min_p)
    zero = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    drawn = _race(
        logprobs.exp(),
        zero if seeds is None else seeds,
        zero if steps is None else steps,
        STREAM_SAMPLE,
    )
    greedy = x.amax(-1) == float("-inf")
    if temperature is not None:
        greedy |= ~(temperature > 0)
    token_ids = torch.where(greedy, _first_max(x), drawn)
    best = torch.sort(x, dim=-1, descending=True, stable=True).indices[:, :num_top_logprobs]
    chosen = logprobs.gather(1, token_ids[:, None])[:, 0]
    return token_ids, chosen, best, logprobs.gather(1, best)


def verify_draft_reference(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    draft_probs: Tensor | None = None,
    num_draft_tokens: Tensor | None = None,
    *,
    temperature: Tensor | None = None,
    top_k: Tensor | None = None,
    top_p: Tensor | None = None,
    min_p: Tensor | None = None,
    seeds: Tensor | None = None,
    steps: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`verify_draft` in plain torch: (token_ids [B, k + 1], num_accepted [B])."""
    b, positions, v = target_logits.shape
    device = target_logits.device
    zero = torch.zeros(b, dtype=torch.int64, device=device)
    seeds = zero if seeds is None else seeds
    steps = zero if steps is None else steps
    k = positions - 1
    n = torch.full((b,), k, device=device) if num_draft_tokens is None else num_draft_tokens
    n = n.long().clamp(0, k)
    token_ids = torch.full((b, positions), -1, dtype=torch.int64, device=device)
    accepted = torch.zeros(b, dtype=torch.int32, device=device)
    alive = torch.ones(b, dtype=torch.bool, device=device)
    for i in range(positions):
        x = penalise_reference(target_logits[:, i])
        p = distribution_reference(x, temperature, top_k, top_p, min_p)[0].exp()
        greedy = x.amax(-1) == float("-inf")
        if temperature is not None:
            greedy |= ~(temperature > 0)
        p = torch.where(greedy[:, None], torch.nn.functional.one_hot(_first_max(x), v).double(), p)
        last = alive & (n == i)
        bonus = _race(p, seeds, steps + i, STREAM_SAMPLE)
        token_ids[:, i] = torch.where(last, bonus, token_ids[:, i])
        alive = alive & ~last
        if i == k:
            break
        draft = draft_token_ids[:, i].long()
        valid = (draft >= 0) & (draft < v)
        index = torch.where(valid, draft, 0)[:, None]
        q = torch.zeros_like(p).scatter_(1, index, valid[:, None].double())
        if draft_probs is not None:
            q = torch.where(greedy[:, None], q, draft_probs[:, i].double())
        u = uniform_reference(seeds, steps + i, 1, STREAM_ACCEPT)[:, 0]
        accept = valid & (u * q.gather(1, index)[:, 0] < p.gather(1, index)[:, 0])
        residual = (p - q).clamp_min(0).nan_to_num(0.0)
        residual = torch.where(residual.sum(-1, keepdim=True) > 0, residual, p)
        replacement = _race(residual, seeds, steps + i, STREAM_RESAMPLE)
        token = torch.where(accept, draft, replacement)
        token_ids[:, i] = torch.where(alive, token, token_ids[:, i])
        accepted += (alive & accept).int()
        alive = alive & accept
    return token_ids, accepted
