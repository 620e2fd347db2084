"""The part of a model that one process holds: some of its layers, and of each layer a piece.

    weight (rows x columns)        cut             what it leaves to do
    embedding                      rows            rows of other ranks are zero; sum over ranks
    q, k, v (weight and bias)      rows, by heads  nothing; KV heads are repeated if there are
                                                   fewer than ranks
    gate, up                       rows            nothing
    o, down                        columns         sum over ranks; the bias is rank 0's
    lm_head                        rows            see `distributed/sampling.py`
    norms                          not cut

Vocabulary pieces are equal, the last one padded. Feed-forward channels are cut in units of a
quantisation group, so pieces may differ by one unit.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..distributed.span import Span, even, in_units

if TYPE_CHECKING:
    from ..distributed.group import Communicator, ParallelGroups
    from .config import ModelConfig

_UNITS = (128, 64, 32, 16, 8, 4, 2)


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part.

    Args:
        rank, ranks: place among the processes that share each layer, and how many they are.
        group: their collectives; None where nothing is run (one process, or only sizes are asked).
        first_layer: of this process.
        num_layers: of this process; None: all.
        is_first, is_last: whether the embedding, or the final norm and the head, are here too.
        unit: feed-forward channels that must stay together.
    """

    rank: int = 0
    ranks: int = 1
    group: Communicator | None = None
    first_layer: int = 0
    num_layers: int | None = None
    is_first: bool = True
    is_last: bool = True
    unit: int = 1

    def config(self, whole: ModelConfig) -> ModelConfig:
        """The sizes of this part: layers and heads that are here. The vocabulary stays whole.

        Raises:
            ValueError: the heads cannot be divided.
        """
        heads, kv_heads, ranks = whole.num_heads, whole.num_kv_heads, self.ranks
        if heads % ranks:
            raise ValueError(
                f"LLM: tensor_parallel_size must divide the {heads} attention heads of the model, "
                f"got {ranks}"
            )
        if kv_heads % ranks and ranks % kv_heads:
            raise ValueError(
                f"LLM: tensor_parallel_size must divide the {kv_heads} key/value heads of the "
                f"model or be a multiple of them, got {ranks}"
            )
        count = whole.num_layers if self.num_layers is None else self.num_layers
        return dataclasses.replace(
            whole,
            num_layers=count,
            layer_types=whole.layer_types[self.first_layer : self.first_layer + count],
            num_heads=heads // ranks,
            num_kv_heads=max(kv_heads // ranks, 1),
        )

    def heads(self, total: int, head_dim: int) -> Span:
        """Rows of q, k or v, or columns of o, for a projection of so many heads."""
        if total >= self.ranks:
            size = total // self.ranks
            begin = self.rank * size
        else:
            size, begin = 1, self.rank * total // self.ranks
        begin, size = begin * head_dim, size * head_dim
        return Span(total * head_dim, begin, begin + size, size)

    def inner(self, total: int) -> Span:
        """Rows of gate and up, columns of down."""
        unit = self.unit
        if unit == 1:
            unit = next((u for u in _UNITS if total % (u * self.ranks) == 0), 1)
        while unit % 2 == 0 and -(-total // unit) < self.ranks:
            unit //= 2  # a small model: `quant/cutting.py` can cut inside of a group
        return in_units(total, self.rank, self.ranks, unit)

    def vocabulary(self, total: int, *, padding: int = 0) -> Span:
        """Rows of the embedding or of the head."""
        if self.ranks == 1:
            return Span.whole(total)
        return even(total, self.rank, self.ranks, padding=padding)


WHOLE = Shard()


def divide(config: ModelConfig, groups: ParallelGroups) -> Shard:
    """The part of a model for a place among the processes.

    Raises:
        ValueError: the model cannot be divided like that.
    """
    first, count = stage_layers(config, groups.stages)[groups.stage]
    tensor = groups.tensor
    return Shard(
        rank=0 if tensor is None else tensor.rank,
        ranks=1 if tensor is None else tensor.size,
        group=tensor,
        first_layer=first,
        num_layers=count,
        is_first=groups.stage == 0,
        is_last=groups.stage == groups.stages - 1,
    )


def stage_layers(config: ModelConfig, stages: int) -> list[tuple[int, int]]:
    """(first layer, number of layers) of each stage of a pipeline.

    The slowest stage sets the pace. Steps of a pipeline read weights more than they compute, so a
    stage costs what its weights weigh: the output head as many layers as it is heavy, the embedding
    nothing, because few of its rows are read.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    layers = config.num_layers
    if layers < stages:
        raise ValueError(
            f"LLM: pipeline_parallel_size must be at most the {layers} layers of the model, got "
            f"{stages}"
        )
    projections = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer_weight = (projections + 3 * config.intermediate_size) * config.hidden_size
    head = config.vocab_size * config.hidden_size / layer_weight  # in layers
    # the last stage takes so many layers less; the best whole number is tried out
    last = min(
        range(1, layers - stages + 2),
        key=lambda count: max(-(-(layers - count) // max(stages - 1, 1)), count + head),
    )
    if stages == 1:
        return [(0, layers)]
    counts = [(layers - last) * (s + 1) // (stages - 1) for s in range(stages - 1)]
    begins = [0, *counts]
    return [(a, b - a) for a, b in zip(begins, [*counts, layers], strict=True)]


def check_divisible(config: ModelConfig, tensor: int, pipeline: int) -> None:
    """Raise ValueError if the model cannot be divided over so many ranks and stages."""
    shard = Shard(ranks=tensor)
    shard.config(config)
    shard.inner(config.intermediate_size)
    stage_layers(config, pipeline)
