"""Choosing the next token: sampling from logits, and verifying the tokens of a draft.

Both run without a host synchronisation: every parameter is a tensor with one value per row.
Randomness is counter based: a row's draw is a function of (seed, step) and its own logits, whatever
else is in the batch.

The draw is an exponential race: argmax over the kept tokens of w_i / e_i, w_i = exp((x_i - max x) /
T) in fp32 and e_i ~ Exp(1). Exact recipe: word = Philox4x32-10 with key (seed low, seed high) and
counter (step low, step high, token // 4, stream), element token % 4; u = (word + 1/2) / 2^32; e =
-log(1 - u). Streams: 0 for a draw, 1 (token 0) for an accept test, 2 for the replacement of a
rejected draft.

References: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011 (Philox). Holtzman et
al., "The curious case of neural text degeneration", 2020 (top-p). Nguyen et al., "Turning up the
heat: min-p sampling", 2024. Leviathan et al., "Fast inference from transformers via speculative
decoding", 2023; Chen et al., "Accelerating large language model decoding with speculative
sampling", 2023.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import _lib
from ._reference_sampling import sample_reference, verify_draft_reference

__all__ = [
    "SampleOutput",
    "VerifyOutput",
    "sample",
    "sample_reference",
    "verify_draft",
    "verify_draft_reference",
]

_sample = _lib.op("sample")
_verify_draft = _lib.op("verify_draft")


class SampleOutput(NamedTuple):
    """Result of `sample`.

    Attributes:
        token_ids: int64 [B].
        logprobs: fp32 [B], natural log, or None when not asked for.
        top_ids: int64 [B, n], best first, or None when n = 0.
        top_logprobs: fp32 [B, n], or None when n = 0.
    """

    token_ids: Tensor
    logprobs: Tensor | None
    top_ids: Tensor | None
    top_logprobs: Tensor | None


class VerifyOutput(NamedTuple):
    """Result of `verify_draft`.

    Attributes:
        token_ids: int64 [B, k + 1]; the first num_accepted + 1 entries of a row are its new tokens,
            the rest is -1.
        num_accepted: int32 [B], how many draft tokens were kept.
    """

    token_ids: Tensor
    num_accepted: Tensor


def sample(
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
    return_logprobs: bool = False,
    num_top_logprobs: int = 0,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> SampleOutput:
    """One token per row, after penalties, temperature, top-k, top-p and min-p; or the argmax.

    In this order, for every row: repetition penalty r (x > 0 ? x / r : x * r, on tokens of the
    prompt or of the output), frequency penalty (x - f * count), presence penalty (x - p where count
    > 0), temperature, top-k, top-p on the distribution that top-k left, min-p. All arithmetic in
    fp32. Of equal logits the lower id comes first. A NaN logit counts as -inf; several +inf logits
    share all the probability; a row without any finite or +inf logit gives token 0 with
    log-probability -inf.

    Args:
        logits: [B, V], fp32, fp16 or bf16, any row stride; 1 <= V < 2^23.
        temperature: fp32 [B]; 0 (also anything not > 0) = greedy: the argmax, exactly. None = 1.
        top_k: int32 or int64 [B]; keeps the logits >= the k-th largest one, so all that tie with
            it. <= 0 or >= V = off.
        top_p: fp32 [B]; keeps the fewest tokens, most probable first, whose probabilities add up to
            top_p or more; at least one. >= 1 = off.
        min_p: fp32 [B]; keeps tokens with probability >= min_p * (largest probability). <= 0 = off.
        seeds: int64 [B], one per request. None = 0: then all rows draw with the same random
            numbers.
        steps: int64 [B], the number of the draw within its request, e.g. how many tokens it has
            generated. None = 0: then a repeated call repeats its tokens.
        repetition_penalty: fp32 [B], 1 = off. Needs prompt_mask or output_counts.
        presence_penalty: fp32 [B], 0 = off. Needs output_counts.
        frequency_penalty: fp32 [B], 0 = off. Needs output_counts.
        prompt_mask: bool [B, V], tokens that occur in the prompt; any row stride.
        output_counts: int32 [B, V], how often each token was generated; any row stride.
        return_logprobs: also return the log-probability of the chosen token under the processed
            distribution (after penalties, temperature and truncation, renormalised); of a greedy
            row under the softmax of its penalised logits.
        num_top_logprobs: n; also return the n most probable tokens and their log-probabilities
            under the same distribution; those outside the kept set follow in the order of their
            logits with -inf.
        out: int64 [B] to write the tokens to.
        workspace: not needed, on CPU or on CUDA; accepted and left alone.

    Returns:
        SampleOutput(token_ids, logprobs, top_ids, top_logprobs); what was not asked for is None.

    Raises:
        RuntimeError: wrong dtype, shape, device or strides, or an input requires grad. With
            FASTINFER_VALIDATE=1 also parameter values out of range.

    Reference: Salmon et al. 2011 (Philox); Holtzman et al. 2020 (top-p); Nguyen et al. 2024
    (min-p).
    """
    _lib.require_tensors("sample", logits=logits)
    _lib.refuse_grad("sample", logits)
    _tensors(
        "sample",
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        steps=steps,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
    )
    if num_top_logprobs < 0:  # (no message before it is needed: the number may be a symbol)
        raise RuntimeError(
            f"sample: num_top_logprobs must be >= 0, got {num_top_logprobs}; 0 asks for none"
        )
    batch, device = logits.shape[:1], logits.device
    if out is None:
        out = torch.empty(batch, dtype=torch.int64, device=device)
    logprobs = top_ids = top_logprobs = None
    if return_logprobs:
        logprobs = torch.empty(batch, dtype=torch.float32, device=device)
    if num_top_logprobs:
        shape = (*batch, num_top_logprobs)
        top_ids = torch.empty(shape, dtype=torch.int64, device=device)
        top_logprobs = torch.empty(shape, dtype=torch.float32, device=device)
    _sample(
        logits,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        steps=steps,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        prompt_mask=prompt_mask,
        output_counts=output_counts,
        token_ids=out,
        logprobs=logprobs,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
        workspace=workspace,
    )
    return SampleOutput(out, logprobs, top_ids, top_logprobs)


def verify_draft(
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
    workspace: Tensor | None = None,
) -> VerifyOutput:
    """Accept or replace draft tokens so that the output is distributed as the target exactly.

    With target p and draft q, position by position: draft token x is accepted when u * q(x) < p(x),
    u uniform in (0, 1). At the first rejection the token is drawn from normalize(max(p - q, 0)) and
    the row ends. When every draft was accepted, one more token is drawn from p. A greedy row
    accepts while the draft is the argmax. p is the processed distribution of `sample` with the
    row's temperature, top-k, top-p and min-p; q must be the distribution the drafts were really
    drawn from.

    Position i uses step + i. A row with no drafts gives the token that `sample` gives for the same
    seed and step. Drafts may be drawn by `sample` with the same seeds and steps: the tests here use
    other random numbers. If nothing is left of p - q (it can only be rounding), p replaces it.
    Penalties are not part of this operator: they change from position to position; pass penalised
    logits.

    Args:
        target_logits: [B, k + 1, V], fp32, fp16 or bf16, any outer strides: the target's logits
            after the last token and after each draft.
        draft_token_ids: int64 or int32 [B, k]. An id outside 0..V-1 is rejected.
        draft_probs: fp32 [B, k, V], any outer strides; None = the drafts were certain (q is
            one-hot, e.g. n-gram lookup).
        num_draft_tokens: int32 or int64 [B], drafts in each row, clamped to 0..k; None = k.
        temperature, top_k, top_p, min_p, seeds, steps: as in `sample`, one value per row.
        workspace: not needed, on CPU or on CUDA; accepted and left alone.

    Returns:
        VerifyOutput(token_ids int64 [B, k + 1] padded with -1, num_accepted int32 [B]).

    Raises:
        RuntimeError: wrong dtype, shape, device or strides, or an input requires grad. With
            FASTINFER_VALIDATE=1 also draft ids or parameter values out of range.

    Reference: Leviathan et al. 2023; Chen et al. 2023.
    """
    _lib.require_tensors(
        "verify_draft", target_logits=target_logits, draft_token_ids=draft_token_ids
    )
    _lib.refuse_grad("verify_draft", target_logits, draft_probs)
    _tensors(
        "verify_draft",
        num_draft_tokens=num_draft_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        steps=steps,
    )
    shape, device = target_logits.shape[:2], target_logits.device
    token_ids = torch.empty(shape, dtype=torch.int64, device=device)
    num_accepted = torch.empty(shape[:1], dtype=torch.int32, device=device)
    _verify_draft(
        target_logits,
        draft_token_ids,
        draft_probs,
        num_draft_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seeds=seeds,
        steps=steps,
        token_ids=token_ids,
        num_accepted=num_accepted,
        workspace=workspace,
    )
    return VerifyOutput(token_ids, num_accepted)


def _tensors(name: str, **arguments: Tensor | None) -> None:
    """A number where a tensor belongs is the likely mistake; torch's own message for it has many
    lines."""
    for arg, value in arguments.items():
        if value is not None and not isinstance(value, Tensor):
            raise TypeError(
                f"{name}: {arg} must be a tensor with one value per row, got "
                f"{type(value).__name__}; wrap it with torch.full((B,), value)"
            )


def _per_row(
    name: str, batch: int, dtypes: tuple[torch.dtype, ...], **arguments: Tensor | None
) -> None:
    for arg, t in arguments.items():
        if t is not None:
            _lib.check_dtype(name, arg, t, dtypes)
            _lib.check(
                t.dim() == 1 and t.shape[0] == batch,
                f"{name}: {arg} must have shape [{batch}], got {_lib.describe(t)}; one per row",
            )


_FLOAT = (torch.float32,)
_INTS = (torch.int32, torch.int64)


@_lib.register_fake("sample")
def _(
    logits: Tensor,
    *,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor | None,
    steps: Tensor | None,
    repetition_penalty: Tensor | None,
    presence_penalty: Tensor | None,
    frequency_penalty: Tensor | None,
    prompt_mask: Tensor | None,
    output_counts: Tensor | None,
    token_ids: Tensor,
    logprobs: Tensor | None,
    top_ids: Tensor | None,
    top_logprobs: Tensor | None,
    workspace: Tensor | None,
) -> None:
    name = "sample"
    _lib.check_dtype(name, "logits", logits, _lib.FLOATS)
    _lib.check(
        logits.dim() == 2, f"{name}: logits must have 2 dimensions, got {_lib.describe(logits)}"
    )
    batch = logits.shape[0]
    _per_row(
        name,
        batch,
        _FLOAT,
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logprobs=logprobs,
    )
    _per_row(name, batch, _INTS, top_k=top_k)
    _per_row(name, batch, (torch.int64,), seeds=seeds, steps=steps, out=token_ids)
    for arg, t, dtype in (
        ("prompt_mask", prompt_mask, torch.bool),
        ("output_counts", output_counts, torch.int32),
    ):
        if t is not None:
            _lib.check_dtype(name, arg, t, (dtype,))
            _lib.check(
                t.shape == logits.shape,
                f"{name}: {arg} must have shape {list(logits.shape)}, got {_lib.describe(t)}",
            )


@_lib.register_fake("verify_draft")
def _(
    target_logits: Tensor,
    draft_token_ids: Tensor,
    draft_probs: Tensor | None,
    num_draft_tokens: Tensor | None,
    *,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seeds: Tensor | None,
    steps: Tensor | None,
    token_ids: Tensor,
    num_accepted: Tensor,
    workspace: Tensor | None,
) -> None:
    name = "verify_draft"
    _lib.check_dtype(name, "target_logits", target_logits, _lib.FLOATS)
    _lib.check(
        target_logits.dim() == 3,
        f"{name}: target_logits must have 3 dimensions, got {_lib.describe(target_logits)}",
    )
    batch, positions, vocab = target_logits.shape
    _lib.check_dtype(name, "draft_token_ids", draft_token_ids, _INTS)
    _lib.check(
        draft_token_ids.dim() == 2
        and draft_token_ids.shape[0] == batch
        and draft_token_ids.shape[1] == positions - 1,
        f"{name}: draft_token_ids must have shape [{batch}, {positions - 1}], got "
        f"{_lib.describe(draft_token_ids)}; one draft less than there are positions",
    )
    if draft_probs is not None:
        _lib.check_dtype(name, "draft_probs", draft_probs, _FLOAT)
        _lib.check(
            draft_probs.dim() == 3
            and draft_probs.shape[0] == batch
            and draft_probs.shape[1] == positions - 1
            and draft_probs.shape[2] == vocab,
            f"{name}: draft_probs must have shape [{batch}, {positions - 1}, {vocab}], got "
            f"{_lib.describe(draft_probs)}; one distribution per draft",
        )
    _per_row(name, batch, _FLOAT, temperature=temperature, top_p=top_p, min_p=min_p)
    _per_row(name, batch, _INTS, top_k=top_k, num_draft_tokens=num_draft_tokens)
    _per_row(name, batch, (torch.int64,), seeds=seeds, steps=steps)
