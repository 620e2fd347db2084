"""What a `ModelRunner` needs to know of the other processes that run its model."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..distributed.group import ParallelGroups


class Team(Protocol):
    """All processes of a run, from the place of one of them.

    Attributes:
        groups: Its collectives.
    """

    groups: ParallelGroups

    def least(self, what: str, value: int) -> int:
        """The smallest of all ranks' values, once all have come here."""
        ...


class Stage:
    """One part of a pipeline: hidden states come from the part before it and go to the next.

    Args:
        groups: Of this process.
        model: The part of the model.
    """

    def __init__(self, groups: ParallelGroups, model: Any) -> None:
        assert groups.pipeline is not None
        self._group, self._at = groups.pipeline, groups.stage
        self.is_first, self.is_last = groups.stage == 0, groups.stage == groups.stages - 1
        self._hidden = model.config.hidden_size
        self._dtype, self._device = model.dtype, groups.device

    def buffer(self, rows: int) -> Tensor:
        """Memory for the hidden states of so many tokens."""
        return torch.zeros(rows, self._hidden, dtype=self._dtype, device=self._device)

    def receive(self, input_ids: Tensor) -> Tensor:
        """What the model takes: the tokens, or the hidden states of as many."""
        if self.is_first:
            return input_ids
        hidden = torch.empty(len(input_ids), self._hidden, dtype=self._dtype, device=self._device)
        self._group.receive(hidden, self._at - 1)
        return hidden

    def send(self, hidden: Tensor) -> None:
        """Pass on what the model returned."""
        self._group.send(hidden, self._at + 1)

    def receive_into(self, hidden: Tensor | None) -> None:
        """Fill a buffer, but on the first stage."""
        if not self.is_first and hidden is not None:
            self._group.receive(hidden, self._at - 1)

    def send_from(self, hidden: Tensor | None) -> None:
        """Pass on a buffer, but on the last stage."""
        if not self.is_last and hidden is not None:
            self._group.send(hidden, self._at + 1)
