"""A paged KV cache for one's own generation loop: blocks are handed out, shared and taken back, and
every step gets the index tensors that the operators ask for.

    cache = PagedKVCache(num_layers=32, num_kv_heads=8, head_dim=128, num_blocks=512)
    sequences = [cache.allocate() for _ in prompts]
    step = cache.append(sequences, [len(p) for p in prompts])
    for layer in range(32):  # in the model, over packed tokens [T, H, D]
        out = cache.attend(layer, q, k, v, step)

Shapes: T packed tokens, B sequences, P block size. A token of position j of a sequence lies in
block block_table[j // P], row j % P.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import _lib, ops
from ._host_loader import load_host

_WHO = "PagedKVCache"


@dataclass(slots=True, frozen=True)
class CacheStep:
    """Where the new tokens of one step go, and what their queries see.

    Attributes:
        slots: int32 [T], row of the cache per new token: block * P + offset.
        block_table: int32 [B, max_blocks]; entries past a sequence's blocks are 0 and never read.
        seqlens: int32 [B], tokens of each sequence with the new ones.
        cu_seqlens: int32 [B + 1], where each sequence's new tokens begin.
        max_new: most new tokens of a sequence.
        max_len: tokens of the longest sequence.
        positions: int32 [T], position of each new token in its sequence.
    """

    slots: Tensor
    block_table: Tensor
    seqlens: Tensor
    cu_seqlens: Tensor
    max_new: int
    max_len: int
    positions: Tensor


@dataclass(slots=True)
class _Sequence:
    blocks: list[int]
    length: int


class PagedKVCache:
    """Keys and values of many sequences in blocks of P tokens.

    Args:
        num_layers: layers that share the block tables.
        num_kv_heads: Hkv.
        head_dim: D.
        num_blocks: blocks in all.
        block_size: P, tokens per block.
        dtype: of keys and values: fp32 (CPU), fp16 or bf16.
        device: where they live.

    Attributes:
        k, v: [num_layers, num_blocks, P, Hkv, D]; `k[layer]` is what the operators take.

    Raises:
        ValueError: a size is smaller than 1, or the dtype is none of these.

    Reference: Kwon et al., "PagedAttention", 2023.
    """

    def __init__(
        self,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        num_blocks: int,
        block_size: int = 16,
        *,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
    ) -> None:
        shape = (num_layers, num_blocks, block_size, num_kv_heads, head_dim)
        names = ("num_layers", "num_blocks", "block_size", "num_kv_heads", "head_dim")
        for name, size in zip(names, shape, strict=True):
            if size < 1:
                raise ValueError(f"{_WHO}: {name} must be at least 1, got {size}")
        if dtype not in _lib.FLOATS:
            raise ValueError(f"{_WHO}: dtype must be one of {_lib.FLOATS}, got {dtype}")
        self.block_size = block_size
        # Not cleared: no slot is read before it was written.
        self.k, self.v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        host = load_host()
        self._out_of_blocks = host.OutOfBlocks
        self._pool = host.BlockPool(num_blocks)
        self._sequences: dict[int, _Sequence] = {}
        self._names = itertools.count()

    @property
    def num_free_blocks(self) -> int:
        """Blocks that no sequence holds."""
        return int(self._pool.num_free)

    @property
    def sequences(self) -> list[int]:
        """The sequences that exist."""
        return list(self._sequences)

    def length(self, sequence: int) -> int:
        """Tokens of a sequence."""
        return self._get("length", sequence).length

    def blocks(self, sequence: int) -> list[int]:
        """The blocks of a sequence, in order."""
        return list(self._get("blocks", sequence).blocks)

    def allocate(self) -> int:
        """A new, empty sequence; it takes blocks as tokens are appended."""
        name = next(self._names)
        self._sequences[name] = _Sequence([], 0)
        return name

    def fork(self, sequence: int) -> int:
        """A new sequence with the same tokens, in the same blocks. The first of the two to write
        into a shared block gets a copy of it.
        """
        source = self._get("fork", sequence)
        self._pool.acquire(source.blocks)
        name = next(self._names)
        self._sequences[name] = _Sequence(list(source.blocks), source.length)
        return name

    def free(self, sequence: int) -> None:
        """Give back the blocks of a sequence, which is then unknown."""
        found = self._get("free", sequence)
        del self._sequences[sequence]
        self._pool.release(found.blocks[::-1])

    def append(self, sequences: Sequence[int], counts: Sequence[int] | int = 1) -> CacheStep:
        """Make room for new tokens.

        Args:
            sequences: which get new tokens, each once.
            counts: how many each, at least 1; a number: the same for all.

        Returns:
            Where they go. Their keys and values have to be written (`write` or `attend`) in every
            layer before they are read.

        Raises:
            OutOfBlocks: not enough free blocks; nothing has changed.
            KeyError: a sequence is not known.
            ValueError: a sequence is named twice, or a count is smaller than 1.
        """
        counts = [counts] * len(sequences) if isinstance(counts, int) else list(counts)
        if len(counts) != len(sequences):
            raise ValueError(
                f"{_WHO}.append: counts must have one number per sequence ({len(sequences)}), got "
                f"{len(counts)}"
            )
        if len(set(sequences)) != len(sequences):
            raise ValueError(f"{_WHO}.append: sequences must be named once, got {list(sequences)}")
        if any(count < 1 for count in counts):
            raise ValueError(f"{_WHO}.append: counts must be at least 1, got {counts}")
        found = [self._get("append", name) for name in sequences]
        starts = [s.length for s in found]
        self._reserve(found, counts)
        for sequence, count in zip(found, counts, strict=True):
            sequence.length += count
        return self._step(found, starts, counts)

    def block_table(self, sequences: Sequence[int]) -> Tensor:
        """int32 [B, max_blocks]: the blocks of each sequence, filled up with 0."""
        return self._table([self._get("block_table", name) for name in sequences])

    def seqlens(self, sequences: Sequence[int]) -> Tensor:
        """int32 [B]: tokens of each sequence."""
        return self._int([self._get("seqlens", name).length for name in sequences])

    def write(self, layer: int, k: Tensor, v: Tensor, step: CacheStep) -> None:
        """Store keys and values [T, Hkv, D] of a step's tokens."""
        ops.reshape_and_cache(k, v, self.k[layer], self.v[layer], step.slots)

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, step: CacheStep, **options: Any
    ) -> Tensor:
        """Store the step's keys and values, then causal attention of its queries over everything
        that their sequences hold.

        Args:
            layer: which of the layers.
            q: [T, Hq, D], packed as in `step.cu_seqlens`.
            k, v: [T, Hkv, D].
            step: from `append`.
            options: keyword arguments of `flash_attn_varlen_func`: window_size, softcap, sinks, ...

        Returns:
            [T, Hq, D].
        """
        self.write(layer, k, v, step)
        out = ops.flash_attn_varlen_func(
            q,
            self.k[layer],
            self.v[layer],
            step.cu_seqlens,
            None,
            step.max_new,
            step.max_len,
            block_table=step.block_table,
            seqused_k=step.seqlens,
            **{"causal": True, **options},
        )
        assert isinstance(out, Tensor)
        return out

    def _get(self, call: str, name: int) -> _Sequence:
        try:
            return self._sequences[name]
        except KeyError:
            raise KeyError(
                f"{_WHO}.{call}: sequence must be one that allocate or fork returned and free did "
                f"not take, got {name!r}"
            ) from None

    def _reserve(self, found: list[_Sequence], counts: list[int]) -> None:
        """Blocks for the new tokens, and copies of shared blocks that they are written into."""
        size = self.block_size
        more = [
            -(-(s.length + n) // size) - len(s.blocks) for s, n in zip(found, counts, strict=True)
        ]
        # Several sequences of this call may share a block: the last of its holders keeps it.
        holders: dict[int, int] = {}
        copies: list[tuple[_Sequence, int]] = []
        for sequence in found:
            if sequence.length % size:
                block = sequence.blocks[-1]
                left = holders.setdefault(block, self._pool.ref_count(block))
                if left > 1:
                    copies.append((sequence, block))
                    holders[block] = left - 1
        wanted = sum(more) + len(copies)
        if wanted > self._pool.num_free:
            raise self._out_of_blocks(
                f"{_WHO}.append: {wanted} blocks wanted, {self._pool.num_free} of "
                f"{self._pool.num_blocks} are free; free sequences, or make num_blocks larger"
            )
        fresh = iter(self._pool.allocate(wanted))
        pairs = []
        for sequence, block in copies:
            sequence.blocks[-1] = next(fresh)
            pairs.append((block, sequence.blocks[-1]))
        if pairs:
            # Blocks are the second dimension here; layers are copied in one launch.
            mapping = torch.tensor(pairs, dtype=torch.int32, device=self.k.device)
            ops.copy_blocks(list(self.k), list(self.v), mapping)
            self._pool.release([block for block, _ in pairs])
        for sequence, n in zip(found, more, strict=True):
            sequence.blocks += itertools.islice(fresh, n)

    def _step(self, found: list[_Sequence], starts: list[int], counts: list[int]) -> CacheStep:
        size = self.block_size
        positions, slots = [], []
        for sequence, start in zip(found, starts, strict=True):
            for j in range(start, sequence.length):
                positions.append(j)
                slots.append(sequence.blocks[j // size] * size + j % size)
        return CacheStep(
            slots=self._int(slots),
            block_table=self._table(found),
            seqlens=self._int([s.length for s in found]),
            cu_seqlens=self._int([0, *itertools.accumulate(counts)]),
            max_new=max(counts, default=0),
            max_len=max((s.length for s in found), default=0),
            positions=self._int(positions),
        )

    def _table(self, found: list[_Sequence]) -> Tensor:
        width = max((len(s.blocks) for s in found), default=0)
        return self._int([s.blocks + [0] * (width - len(s.blocks)) for s in found]).view(
            len(found), width
        )

    def _int(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32).to(self.k.device, non_blocking=True)
