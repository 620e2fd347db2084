"""Text for calibration, and running one decoder block over all of it.

Between two blocks the hidden states of all calibration tokens are kept (fp32 [tokens, hidden], in
memory or in files); everything inside a block lives for one step of about 512 tokens at a time.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, MutableSequence, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..models.attention import AttentionMetadata, LayerCache
from ..models.config import ModelConfig
from ..models.rotary import RotaryTable
from ..text import Tokenizer
from .blocks import Block
from .canonical import QuantError
from .memory import all_finite
from .notes import note

_PAGE = 16
_TOKENS_PER_RUN = 512  # tokens that go through a block together


def read_text(path: str | os.PathLike[str], option: str) -> str:
    """A UTF-8 text file.

    Args:
        path: the file.
        option: what the caller gave it as, for error messages.
    """
    file = Path(path)
    try:
        found = file.is_file()
    except (OSError, ValueError):  # no file can have such a name
        found = False
    if not found:
        text = str(path)
        if len(text) > 200 or "\n" in text:
            raise FileNotFoundError(
                f"quantize: {option} must be the path of a text file, got {len(text)} characters "
                "of text; write them to a file and give its path"
            )
        raise FileNotFoundError(f"quantize: {option} must be a text file, got {text!r}")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"quantize: {option} must be UTF-8 text, got {str(path)!r} with {error.reason}; "
            "convert the file"
        ) from error


def encode_text(tokenizer: Tokenizer, text: str) -> Tensor:
    """Token ids of a text.

    A text that spells out the tokenizer's beginning-of-sequence token is a list of documents; line
    breaks at their ends only separate them in the file and are dropped.

    Args:
        tokenizer: of the checkpoint.
        text: special tokens spelled out in it become their ids.

    Returns:
        int64 [T].
    """
    bos = tokenizer.bos_token
    if not bos or bos not in text:
        return torch.tensor(tokenizer.encode(text), dtype=torch.int64)
    head, *documents = text.split(bos)
    pieces = [bos + document.rstrip("\r\n") for document in documents]
    if head.strip():
        pieces.insert(0, bos + head.rstrip("\r\n"))
    ids = [i for p in pieces for i in tokenizer.encode(p, add_special_tokens=False)]
    return torch.tensor(ids, dtype=torch.int64)


def calibration_tokens(
    tokenizer: Tokenizer, text: str, *, samples: int, seqlen: int
) -> list[Tensor]:
    """Pieces of a text, evenly spread over it.

    Args:
        tokenizer: of the checkpoint.
        text: see `encode_text`.
        samples: pieces wanted.
        seqlen: tokens per piece.

    Returns:
        int64 [seqlen] each; fewer (a note says so) when the text is short, at least one, which may
        be shorter than seqlen.
    """
    if samples < 1 or seqlen < 2:
        raise ValueError(
            f"quantize: samples must be at least 1 and seqlen at least 2, got {samples} and "
            f"{seqlen}"
        )
    ids = encode_text(tokenizer, text)
    if ids.numel() < 2:
        raise ValueError(
            "quantize: the calibration text must have at least 2 tokens, got "
            f"{ids.numel()}; give more text"
        )
    whole = max(1, ids.numel() // seqlen)
    if whole < samples:
        note(
            "calibration",
            f"the text has {whole} pieces of {seqlen} tokens, {samples} were asked for",
        )
    count = min(samples, whole)
    return [ids[i * whole // count * seqlen :][:seqlen] for i in range(count)]


@dataclass(slots=True)
class Packed:
    """Several sequences as one step of the model."""

    tokens: Tensor  # int64 [T]
    meta: AttentionMetadata
    blocks: int  # cache blocks used


def pack_sequences(sequences: Sequence[Tensor]) -> Packed:
    """One prefill of all these sequences, each with its own pages from 0 on."""
    lengths = [int(s.numel()) for s in sequences]
    pages = [-(-n // _PAGE) for n in lengths]
    first = [sum(pages[:i]) for i in range(len(pages))]
    table = torch.full((len(pages), max(pages)), -1, dtype=torch.int32)
    slots = []
    for i, (n, p, f) in enumerate(zip(lengths, pages, first, strict=True)):
        table[i, :p] = torch.arange(f, f + p, dtype=torch.int32)
        slots.append(torch.arange(f * _PAGE, f * _PAGE + n))
    ends = torch.tensor([0, *lengths]).cumsum(0)
    meta = AttentionMetadata(
        positions=torch.cat([torch.arange(n) for n in lengths]),
        slot_mapping=torch.cat(slots),
        cu_seqlens_q=ends.to(torch.int32),
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        block_table=table,
        max_seqlen_q=max(lengths),
        max_seqlen_k=max(lengths),
    )
    return Packed(torch.cat(list(sequences)), meta, sum(pages))


def pack_all(sequences: Sequence[Tensor], tokens: int = _TOKENS_PER_RUN) -> list[Packed]:
    """All sequences in as many steps as keep each within `tokens` (or one sequence)."""
    steps: list[Packed] = []
    waiting: list[Tensor] = []
    for sequence in sequences:
        if waiting and sum(s.numel() for s in waiting) + sequence.numel() > tokens:
            steps.append(pack_sequences(waiting))
            waiting = []
        waiting.append(sequence)
    if waiting:
        steps.append(pack_sequences(waiting))
    return steps


def empty_cache(
    config: ModelConfig,
    blocks: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
) -> LayerCache:
    """A cache of one layer; one of 8 bits has a scale per token and head."""
    shape = (blocks, _PAGE, config.num_kv_heads, config.head_dim)
    k, v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
    if dtype.itemsize > 1:
        return LayerCache(k, v)
    scales = (torch.empty(shape[:-1], dtype=torch.float32, device=device) for _ in range(2))
    return LayerCache(k, v, *scales)


def move_metadata(meta: AttentionMetadata, device: torch.device) -> AttentionMetadata:
    """The same step, its tensors on a device."""
    tensors = {
        field.name: value.to(device)
        for field in dataclasses.fields(meta)
        if isinstance(value := getattr(meta, field.name), Tensor)
    }
    return dataclasses.replace(meta, **tensors)


class _Reached(Exception):
    """The input that was waited for is there."""


class Calibration:
    """All calibration tokens on their way through the model.

    Args:
        config: of the model.
        sequences: token ids, one tensor per sequence.
        embedding: [V, hidden], any dtype.
        hidden: where to keep the hidden states; those that are there already are kept. None: in
            memory.

    Attributes:
        hidden: fp32 [T, hidden] per step: the input of the next block.
    """

    def __init__(
        self,
        config: ModelConfig,
        sequences: Sequence[Tensor],
        embedding: Tensor,
        hidden: MutableSequence[Tensor] | None = None,
    ) -> None:
        self.config = config
        self.steps = pack_all(sequences)
        longest = max(step.meta.max_seqlen_q for step in self.steps)
        rows = max(int(step.tokens.max()) for step in self.steps)
        if rows >= embedding.shape[0]:
            raise ValueError(
                f"quantize: token ids must be below {embedding.shape[0]}, the model's vocabulary, "
                f"got {rows}; check that the tokenizer belongs to the model"
            )
        self.hidden: MutableSequence[Tensor] = [] if hidden is None else hidden
        for step in self.steps[len(self.hidden) :]:
            self.hidden.append(embedding[step.tokens].float())
        blocks = max(step.blocks for step in self.steps)
        self.cache = empty_cache(config, blocks, torch.float32)
        self.rotary = {}
        for kind, rope in config.rope.items():
            table = RotaryTable(
                rope, config.head_dim, length=longest, max_position=config.max_position
            )
            table.fill()
            self.rotary[kind] = table

    @property
    def tokens(self) -> int:
        """How many there are."""
        return sum(step.tokens.numel() for step in self.steps)

    def run(self, block: Block, step: int) -> Tensor:
        """Output of the block, fp32 [T, hidden]."""
        rotary = self.rotary[self.config.layer_types[block.index]]
        # The block adds to its input in place.
        hidden = self.hidden[step].clone()
        out, residual = block.layer(hidden, None, self.steps[step].meta, self.cache, rotary)
        return out + residual

    def attend(self, block: Block, step: int, x: Tensor) -> Tensor:
        """Output of the attention module for an input that is already normalised."""
        rotary = self.rotary[self.config.layer_types[block.index]]
        return block.layer.attn(x, self.steps[step].meta, self.cache, rotary)

    def advance(self, block: Block) -> None:
        """Take the outputs of the block as the input of the next one."""
        for step in range(len(self.steps)):
            out = self.run(block, step)
            if not all_finite(out):
                raise QuantError(
                    f"quantize: activations must be finite, got NaN or infinity after block "
                    f"{block.index}; check the checkpoint"
                )
            self.hidden[step] = out

    def inputs_of(self, block: Block, name: str, take: Callable[[int, Tensor], None]) -> None:
        """Run the block up to one linear layer, showing its inputs.

        Args:
            block: to run.
            name: of the layer, one of MODULES.
            take: called with step and input [T, K]; the input may be reused afterwards.
        """

        def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            take(step, args[0])
            raise _Reached

        handle = block.linear(name).register_forward_pre_hook(stop)
        try:
            for step in range(len(self.steps)):
                try:
                    self.run(block, step)
                except _Reached:
                    continue
        finally:
            handle.remove()


class Statistics:
    """What AWQ and SmoothQuant want to know of an input [T, K]: means, maxima, a sample.

    Args:
        in_features: K.
        sample: rows to keep.
        of: rows that will come.

    Attributes:
        count: rows seen.
        total: float64 [K], sum of |x|.
        max_abs: fp32 [K], largest |x|.
        sample: fp32 [rows, K], evenly spread.
    """

    def __init__(self, in_features: int, *, sample: int, of: int) -> None:
        self.count = 0
        self.total = torch.zeros(in_features, dtype=torch.float64)
        self.max_abs = torch.zeros(in_features)
        self._every = max(1, -(-of // sample))
        self.sample = torch.empty(-(-of // self._every), in_features)

    def add(self, x: Tensor) -> None:
        """Take inputs."""
        if not all_finite(x):
            raise QuantError("quantize: activations must be finite, got NaN or infinity")
        magnitude = x.detach().float().abs()
        self.total += magnitude.sum(0, dtype=torch.float64)
        self.max_abs = torch.maximum(self.max_abs, magnitude.amax(0))
        rows = x.detach()[-self.count % self._every :: self._every]
        first = -(-self.count // self._every)
        self.sample[first : first + rows.shape[0]] = rows
        self.count += x.shape[0]

    @property
    def mean_abs(self) -> Tensor:
        """fp32 [K]."""
        return (self.total / max(self.count, 1)).float()
