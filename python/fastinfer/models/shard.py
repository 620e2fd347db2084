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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..distributed.span import Span, even, in_units
from ..distributed.stages import StageCosts

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


def divide(config: ModelConfig, groups: ParallelGroups, counts: Sequence[int]) -> Shard:
    """The part of a model for a place among the processes.

    Args:
        config: of the whole model.
        groups: of the process.
        counts: layers of each stage.

    Raises:
        ValueError: the model cannot be divided like that.
    """
    check_stages(config, groups.stages, counts)
    tensor = groups.tensor
    return Shard(
        rank=0 if tensor is None else tensor.rank,
        ranks=1 if tensor is None else tensor.size,
        group=tensor,
        first_layer=sum(counts[: groups.stage]),
        num_layers=counts[groups.stage],
        is_first=groups.stage == 0,
        is_last=groups.stage == groups.stages - 1,
    )


def weight_costs(config: ModelConfig) -> StageCosts:
    """What a decode step costs where nothing was measured: what the weights weigh that it reads;
    of the embedding it reads next to nothing.
    """
    projections = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    layer = (projections + 3 * config.intermediate_size) * config.hidden_size
    head = config.vocab_size * config.hidden_size
    return StageCosts((float(layer),) * config.num_layers, 0.0, float(head))


def check_stages(config: ModelConfig, stages: int, counts: Sequence[int] | None = None) -> None:
    """Raise ValueError if the layers cannot be dealt to so many stages, or not like that."""
    layers = config.num_layers
    if layers < stages:
        raise ValueError(
            f"LLM: pipeline_parallel_size must be at most the {layers} layers of the model, got "
            f"{stages}"
        )
    if counts is not None and (len(counts) != stages or sum(counts) != layers):
        raise ValueError(
            f"LLM: pipeline_stages must be {stages} numbers that add up to the {layers} layers of "
            f"the model, got {list(counts)}"
        )


def check_divisible(
    config: ModelConfig, tensor: int, pipeline: int, counts: Sequence[int] | None = None
) -> None:
    """Raise ValueError if the model cannot be divided over so many ranks and stages.

    Args:
        config: of the whole model.
        tensor: ranks that share a layer.
        pipeline: stages.
        counts: layers of each, where the user says.
    """
    shard = Shard(ranks=tensor)
    shard.config(config)
    shard.inner(config.intermediate_size)
    check_stages(config, pipeline, counts)
