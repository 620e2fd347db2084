"""How many layers each stage of a pipeline has, so that the slowest stage is as fast as can be.

No tensors: what layers and the two ends of a model cost is given, by `engine/stage_cost.py`, which
measures it, or by whoever computes it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

_SLACK = 1 + 1e-9  # of sums in floating point


@dataclass(frozen=True, slots=True)
class StageCosts:
    """What a step costs, in any one unit.

    Attributes:
        layers: of each layer.
        first: of what only the first stage does: the embedding.
        last: of what only the last one does: final norm, output head, drawing the tokens.
    """

    layers: tuple[float, ...]
    first: float
    last: float

    def of_stages(self, counts: Sequence[int]) -> list[float]:
        """The cost of each stage when they have so many layers."""
        ends = list(accumulate(counts))
        costs = [
            sum(self.layers[end - count : end]) for end, count in zip(ends, counts, strict=True)
        ]
        costs[0] += self.first
        costs[-1] += self.last
        return costs


def divide_layers(costs: StageCosts, stages: int) -> list[int]:
    """Layers of each stage, at least one: the most expensive stage is as cheap as can be, and of
    the divisions that do that, it is the one whose stages are most alike.

    Args:
        costs: of a model with at least `stages` layers.
        stages: how many.

    Raises:
        ValueError: There are more stages than layers.
    """
    layers = len(costs.layers)
    if stages > layers:
        raise ValueError(f"{stages} stages must be at most the {layers} layers of the model")
    sums = [0.0, *accumulate(costs.layers)]

    def cost(stage: int, begin: int, end: int) -> float:
        ends = (costs.first if stage == 0 else 0.0) + (costs.last if stage == stages - 1 else 0.0)
        return sums[end] - sums[begin] + ends

    # best[n]: the most expensive of the stages so far, when they have n layers
    best = [cost(0, 0, n) if n else float("inf") for n in range(layers + 1)]
    for stage in range(1, stages):
        best = [
            min(
                (max(best[begin], cost(stage, begin, end)) for begin in range(stage, end)),
                default=float("inf"),
            )
            for end in range(layers + 1)
        ]
    limit = best[layers] * _SLACK
    # then the least sum of squares among the divisions in which no stage costs more
    found: list[tuple[float, tuple[int, ...]] | None] = [
        (cost(0, 0, n) ** 2, (n,)) if n and cost(0, 0, n) <= limit else None
        for n in range(layers + 1)
    ]
    for stage in range(1, stages):
        step: list[tuple[float, tuple[int, ...]] | None] = [None] * (layers + 1)
        for end in range(stage + 1, layers + 1):
            for begin in range(stage, end):
                before, here = found[begin], cost(stage, begin, end)
                if before is not None and here <= limit:
                    way = (before[0] + here**2, (*before[1], end - begin))
                    step[end] = way if step[end] is None else min(step[end], way)
        found = step
    assert found[layers] is not None
    return list(found[layers][1])
