"""Which rows or columns of a tensor one rank has."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Span:
    """Indices [begin, end) of a dimension of `total`, kept in memory of `size` >= end - begin.

    What lies beyond end - begin is padding, and zero.
    """

    total: int
    begin: int
    end: int
    size: int

    @classmethod
    def whole(cls, total: int) -> Span:
        """All of it."""
        return cls(total, 0, total, total)

    @property
    def count(self) -> int:
        """Indices, padding not counted."""
        return self.end - self.begin

    @property
    def is_whole(self) -> bool:
        """Whether nothing is left to other ranks."""
        return self.count == self.total


def even(total: int, rank: int, ranks: int, *, padding: int = 0) -> Span:
    """Pieces of equal size, as for a vocabulary: the last ones may be short, or empty.

    Args:
        total: to divide.
        rank: whose piece.
        ranks: how many pieces.
        padding: more memory behind each piece.
    """
    size = -(-total // ranks)
    begin = min(rank * size, total)
    return Span(total, begin, min(begin + size, total), size + padding)


def in_units(total: int, rank: int, ranks: int, unit: int) -> Span:
    """Pieces that begin at multiples of `unit` and differ by at most one of it.

    Raises:
        ValueError: there are fewer units than ranks.
    """
    units = -(-total // unit)
    if units < ranks:
        raise ValueError(
            f"LLM: tensor_parallel_size must be at most {units}, because {total} channels come in "
            f"units of {unit}, got {ranks}"
        )
    begin = rank * units // ranks * unit
    end = min((rank + 1) * units // ranks * unit, total)
    return Span(total, begin, end, end - begin)
