"""Tokens from logits whose vocabulary is cut over ranks; no rank ever has all logits of a step.

Greedy rows: each rank takes the argmax of its piece, the ranks compare (value, id), in one kernel
where they reach each other's memory. Of equal values the lower id wins, as in one process.

Other rows: the ranks exchange pieces, so that each has the whole vocabulary of its share of the
rows (B / ranks of them), draws those with the ordinary operator and tells the others. Filters,
penalties, random numbers and log-probabilities are thus exactly those of one process, and a rank
receives 1 / ranks of what gathering would bring it.

    [B, V / ranks]  --exchange-->  [B / ranks, V]  --sample-->  [B / ranks]  --gather-->  [B]

All ranks know all tokens afterwards. Nothing waits for the host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import ops
from .group import Communicator

_INF = float("inf")


class ShardedSample:
    """Stands in for `ops.sample` where this rank's logits are columns of the vocabulary.

    Args:
        group: of the ranks that share the vocabulary, in equal pieces but for the last ones.
        vocab_size: of the model.
    """

    def __init__(self, group: Communicator, vocab_size: int) -> None:
        self.group, self.vocab_size = group, vocab_size
        self.piece = -(-vocab_size // group.size)
        self.begin = min(group.rank * self.piece, vocab_size)
        self.count = min(self.piece, vocab_size - self.begin)

    def __call__(self, logits: Tensor, *, out: Tensor | None = None, **options: Any) -> Any:
        """Arguments and result as those of `ops.sample`; rows without `seeds` must be greedy.

        Args:
            logits: [B, piece]; what is beyond the vocabulary is ignored.
            out: int64 [B] to write the tokens to.
            **options: Of all B rows; masks and counts over the whole vocabulary.
        """
        if options.keys() <= {"temperature"}:
            zeros, peer = options["temperature"], self.group.peer
            if peer is not None and peer.supports(16 * len(logits)):
                if out is None:
                    out = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
                mine = logits[:, : self.count]
                ids = ops.sample(mine, temperature=zeros).token_ids if self.count else out
                peer.argmax(mine, ids, self.begin, out)
                return ops.SampleOutput(out, None, None, None)
            ids = self._greedy(logits, zeros)
            if out is None:
                return ops.SampleOutput(ids.long(), None, None, None)
            return ops.SampleOutput(out.copy_(ids), None, None, None)
        drawn = self._draw(logits, options)
        ids, *others = (None if t is None else self._gather(t, logits.shape[0]) for t in drawn)
        return ops.SampleOutput(ids if out is None else out.copy_(ids), *others)

    def _greedy(self, logits: Tensor, zeros: Tensor) -> Tensor:
        rows, ranks = logits.shape[0], self.group.size
        # Zero but for this rank's numbers, so that the sum over ranks is what they all say.
        said = logits.new_zeros((2, ranks, rows), dtype=torch.float32)
        value, token = said[0, self.group.rank], said[1, self.group.rank]
        if self.count > 0:
            mine = logits[:, : self.count]
            ids = ops.sample(mine, temperature=zeros).token_ids
            value.copy_(mine.gather(1, ids[:, None])[:, 0])
            value.nan_to_num_(nan=-_INF, posinf=_INF, neginf=-_INF)
            torch.add(ids, self.begin, out=token)  # exact in fp32: ids are below 2^23
        else:
            value.fill_(-_INF)
        self.group.all_reduce_(said.view(2 * ranks, rows))
        winner = said[0].argmax(dim=0, keepdim=True)  # the first of equal ones
        return said[1].gather(0, winner)[0]

    def _draw(self, logits: Tensor, options: dict[str, Any]) -> Any:
        """The rows of this rank, ceil(B / ranks) of them; the last ones may be padding."""
        ranks, rows = self.group.size, logits.shape[0]
        share = -(-rows // ranks)
        missing = self.piece - logits.shape[1]
        padded = torch.nn.functional.pad(logits, (0, missing, 0, share * ranks - rows))
        pieces = self.group.exchange(padded.view(ranks, share, self.piece))
        whole = pieces.transpose(0, 1).reshape(share, ranks * self.piece)[:, : self.vocab_size]
        return ops.sample(
            whole,
            **{
                name: self._share(value, share) if isinstance(value, Tensor) else value
                for name, value in options.items()
            },
        )

    def _share(self, column: Tensor, share: int) -> Tensor:
        """This rank's rows of an option; padding repeats a row."""
        begin = self.group.rank * share
        rows = column[begin : begin + share]
        if len(rows) == share:
            return rows
        missing = column[:1].expand(share - len(rows), *column.shape[1:])
        return torch.cat((rows, missing))

    def _gather(self, mine: Tensor, rows: int) -> Tensor:
        return self.group.all_gather(mine).flatten(0, 1)[:rows]
