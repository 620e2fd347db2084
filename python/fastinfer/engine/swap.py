"""Preemption by swap: the blocks of a request that gives way wait in host memory.

Worth it when moving them out and back takes less time than computing the tokens again:

    2 * blocks * block_bytes / bandwidth   <   tokens / prefill rate

The bandwidth is measured at start, the rate while the engine works. Copies are part of a step's
plan and run in front of it, first out, then in, on the stream of the steps: a block may be handed
out again at once, and a step in flight that still writes it comes first.

`SwapSpace` knows no tensors; `HostCache` is the memory behind it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

from .. import ops
from ..models import LayerCache, ModelConfig
from .kv_cache import allocate_cache
from .request import Request
from .step_plan import SchedulePlan

if TYPE_CHECKING:
    from .._host_py import BlockPool

_TRIAL_BLOCKS = 64  # moved to measure the bandwidth
_ENOUGH_TOKENS = 64  # of a step whose time says something about prompts
_FRESH = 0.2  # weight of a new observation


class SwapSpace:
    """Which blocks of the host are free, and whether to use them.

    Args:
        num_blocks: How many there are.
        block_bytes: Bytes of one.
        bandwidth: Bytes per second between host and device.
    """

    def __init__(self, num_blocks: int, block_bytes: int, bandwidth: float) -> None:
        self.num_blocks = num_blocks
        self.seconds_per_block = 2 * block_bytes / bandwidth
        self.prefill_rate: float | None = None  # tokens per second; None: not measured yet
        self._free = list(range(num_blocks))

    @property
    def num_free(self) -> int:
        """Blocks that hold nobody's tokens."""
        return len(self._free)

    def take_out(
        self, request: Request, plan: SchedulePlan, blocks_for: Callable[[int], int]
    ) -> bool:
        """Plan to move what a request has computed to the host, if that pays."""
        count = blocks_for(request.num_computed)
        if not self.pays(count, request.num_computed):
            return False
        request.host_blocks = self._free[-count:]
        del self._free[-count:]
        request.num_on_host = request.num_computed
        plan.swap_out += zip(request.block_table, request.host_blocks, strict=False)
        return True

    def bring_back(self, request: Request, plan: SchedulePlan, pool: BlockPool) -> None:
        """Plan to move back what the prefix cache did not have."""
        missing = request.host_blocks[len(request.block_table) :]
        if missing:
            blocks = pool.allocate(len(missing))
            request.block_table += blocks
            plan.swap_in += zip(missing, blocks, strict=True)
            request.num_computed = request.num_on_host
        self.forget(request)

    def forget(self, request: Request) -> None:
        """Free what a request has on the host. Copies in plans so far come first."""
        self._free += request.host_blocks
        request.host_blocks = []

    def pays(self, blocks: int, tokens: int) -> bool:
        """Whether there is room, and moving is faster than computing again."""
        if not 0 < blocks <= len(self._free):
            return False
        rate = self.prefill_rate
        return rate is None or blocks * self.seconds_per_block < tokens / rate

    def observe(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens of prompts took so long."""
        if tokens < _ENOUGH_TOKENS or seconds <= 0:
            return
        rate = tokens / seconds
        before = self.prefill_rate or rate
        self.prefill_rate = before + _FRESH * (rate - before)


class HostCache:
    """Blocks in host memory, pinned where there is a GPU.

    Args:
        model: Sizes of the cache's inner dimensions.
        layers: The cache on the device.
        num_blocks: Of the host.
        block_size: P.
    """

    def __init__(
        self, model: ModelConfig, layers: list[LayerCache], num_blocks: int, block_size: int
    ) -> None:
        _, host = allocate_cache(
            model,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=layers[0].k.dtype,
            device=torch.device("cpu"),
            pinned=layers[0].k.is_cuda,
        )
        self.num_blocks = num_blocks
        self._host, self._device = _tensors(host), _tensors(layers)

    def move(self, out: Sequence[tuple[int, int]], back: Sequence[tuple[int, int]]) -> None:
        """Copy blocks: (device, host) pairs out, then (host, device) pairs back."""
        if out:
            ops.swap_blocks(self._device, self._host, torch.tensor(out))
        if back:
            ops.swap_blocks(self._host, self._device, torch.tensor(back))

    def measure_bandwidth(self) -> float:
        """Bytes per second, over a few blocks out and back; changes nothing on the device."""
        count = min(_TRIAL_BLOCKS, self.num_blocks, self._device[0].shape[0])
        size = sum(t[0].numel() * t.element_size() for t in self._device)
        pairs = [(i, i) for i in range(count)]
        fastest = float("inf")
        for _ in range(3):
            self._wait()
            start = time.perf_counter()
            self.move(pairs, pairs)
            self._wait()
            fastest = min(fastest, time.perf_counter() - start)
        return 2 * count * size / fastest

    def _wait(self) -> None:
        if self._device[0].is_cuda:
            torch.cuda.synchronize(self._device[0].device)


def _tensors(layers: Sequence[LayerCache]) -> list[torch.Tensor]:
    sides = [(c.k, c.v, c.k_scale, c.v_scale) for c in layers]
    return [side for layer in sides for side in layer if side is not None]
