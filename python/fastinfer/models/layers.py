"""The leaf layers of the decoder: linear, norm, embedding.

A checkpoint stores q, k, v (and gate, up) as separate tensors while the decoder multiplies them as
one matrix. Each layer here says which parts it is made of and places a checkpoint tensor into them,
so the loader needs no knowledge of fusing. A quantised linear is a class with the same methods
(`part_shape`, `cut`, `place`, `load`, `forward`) that keeps other parameters (see `quantized.py`).

Where a model is divided (`shard.py`), a layer has a `Span` of its rows or columns instead of all of
them; `cut` says what it takes of a checkpoint tensor. Only `ParallelRMSNorm` and
`ParallelEmbedding` know of other ranks.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fastinfer import ops

from ..checkpoint import Cut
from ..distributed.group import Communicator
from ..distributed.span import Span
from ..distributed.tensor_parallel import reduce_add_norm


class Layer(nn.Module):
    """A module whose parameters are filled from checkpoint tensors.

    Attributes:
        batch_invariant: a row's bits must not depend on the other rows; see
            `CausalLM.set_batch_invariant`.
    """

    batch_invariant = False

    def part_shape(self, param: str, parts: tuple[str, ...]) -> tuple[int, ...]:
        """Shape of the checkpoint tensor that fills `parts` of a parameter; no parts: all of it."""
        return tuple(getattr(self, param).shape)

    def cut(self, param: str, parts: tuple[str, ...]) -> Cut | None:
        """What this layer takes of the checkpoint tensor that fills `parts`; None: all of it."""
        return None

    def place(self, param: str, parts: tuple[str, ...]) -> Tensor | None:
        """The contiguous memory that `load` would copy what it takes to; None: not one, or what it
        takes are not whole neighbouring rows.
        """
        return getattr(self, param).data

    def load(self, param: str, parts: tuple[str, ...], tensor: Tensor) -> None:
        """Copy what `cut` says of a checkpoint tensor (any dtype or device) into `parts` of a
        parameter.
        """
        getattr(self, param).data.copy_(tensor)


class RowParts(Layer):
    """A linear layer whose weight [N, K] and bias [N] are made of named row blocks.

    Args:
        in_features: K; a `Span` of it where the columns are cut. The bias then counts on the rank
            that has the first ones.
        parts: name -> rows (a number, or a `Span`), in the order in which they are stacked. A plain
            linear has one part.
        bias: whether there is a bias [N].
        dtype: of the bias.
    """

    def __init__(
        self,
        in_features: int | Span,
        parts: Mapping[str, int | Span],
        *,
        bias: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.columns = _span(in_features)
        self.in_features = self.columns.size
        self.spans = {name: _span(rows) for name, rows in parts.items()}
        self.parts = {name: span.size for name, span in self.spans.items()}
        self.out_features = sum(self.parts.values())
        self.bias = _parameter(self.out_features, dtype=dtype) if bias else None

    def part_shape(self, param: str, parts: tuple[str, ...]) -> tuple[int, ...]:
        rows = sum(self.spans[p].total for p in parts or self.parts)
        return (rows, self.columns.total) if param == "weight" else (rows,)

    def local_shape(self, parts: tuple[str, ...]) -> tuple[int, int]:
        """Shape of the memory of `parts` of the weight."""
        return sum(self.parts[p] for p in parts or self.parts), self.in_features

    def cut(self, param: str, parts: tuple[str, ...]) -> Cut | None:
        names = parts or tuple(self.parts)
        columns = None if param == "bias" or self.columns.is_whole else self.columns
        if columns is None and all(self.spans[name].is_whole for name in names):
            return None
        rows, begin = [], 0
        for name in names:
            span = self.spans[name]
            rows.append((begin + span.begin, begin + span.end))
            begin += span.total
        return Cut(tuple(rows), None if columns is None else (columns.begin, columns.end))

    def place(self, param: str, parts: tuple[str, ...]) -> Tensor | None:
        names = list(self.parts)
        parts = parts or tuple(names)
        first = names.index(parts[0])
        if parts != tuple(names[first : first + len(parts)]):
            return None
        cut = self.cut(param, parts)
        if cut is not None and (cut.columns is not None or len(parts) > 1):
            return None
        if param == "bias" and self.columns.begin:
            return None
        begin = sum(self.parts[name] for name in names[:first])
        return getattr(self, param).data[begin : begin + sum(self.spans[p].count for p in parts)]

    def load(self, param: str, parts: tuple[str, ...], tensor: Tensor) -> None:
        target = getattr(self, param).data
        begins = dict(zip(self.parts, _begins(self.parts.values()), strict=True))
        taken = 0
        for part in parts or self.parts:
            rows, begin = self.spans[part].count, begins[part]
            target[begin : begin + rows].copy_(tensor[taken : taken + rows])
            target[begin + rows : begin + self.parts[part]].zero_()
            taken += rows
        if param == "bias" and self.columns.begin:
            target.zero_()  # the sum over ranks has it once


class Linear(RowParts):
    """y = x @ weight.T + bias. Arguments as those of `RowParts`."""

    def __init__(
        self,
        in_features: int | Span,
        parts: Mapping[str, int | Span],
        *,
        bias: bool,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(in_features, parts, bias=bias, dtype=dtype)
        self.weight = _parameter(self.out_features, self.in_features, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias, batch_invariant=self.batch_invariant)


class RMSNorm(Layer):
    """y = x / rms(x) * weight over the last dimension."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.eps = eps
        self.weight = _parameter(size, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        """In place: residual += x, x = norm(residual). Returns x."""
        return ops.fused_add_rms_norm(x, residual, self.weight, self.eps)[0]


class Embedding(Layer):
    """Rows of weight [V, H]."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _parameter(vocab_size, hidden_size, dtype=dtype)

    def forward(self, input_ids: Tensor) -> Tensor:
        return torch.nn.functional.embedding(input_ids, self.weight)

    @property
    def rows(self) -> Tensor:
        """The weight as that of an output head."""
        return self.weight


class ParallelRMSNorm(RMSNorm):
    """A norm whose input in `add` is a sum that still has to be taken over the ranks."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, group: Communicator) -> None:
        super().__init__(size, eps, dtype=dtype)
        self.group = group

    def add(self, x: Tensor, residual: Tensor) -> Tensor:
        return reduce_add_norm(self.group, x, residual, self.weight, self.eps)


class ParallelEmbedding(Layer):
    """Some rows of an embedding; the others come from other ranks.

    Args:
        span: which rows, with one row of padding at least: it stands for all that are elsewhere.
        hidden_size: H.
        dtype: of the weight.
        group: of all ranks that have rows.
    """

    row_of: Tensor  # int64 [V]: where the row of a token is

    def __init__(
        self, span: Span, hidden_size: int, *, dtype: torch.dtype, group: Communicator
    ) -> None:
        super().__init__()
        self.span, self.group = span, group
        self.weight = _parameter(span.size, hidden_size, dtype=dtype)
        self.register_buffer("row_of", torch.empty(span.total, dtype=torch.int64), persistent=False)

    def part_shape(self, param: str, parts: tuple[str, ...]) -> tuple[int, ...]:
        return (self.span.total, self.weight.shape[1])

    def cut(self, param: str, parts: tuple[str, ...]) -> Cut | None:
        return Cut(((self.span.begin, self.span.end),))

    def place(self, param: str, parts: tuple[str, ...]) -> Tensor | None:
        return self.weight.data[: self.span.count]  # what lies beyond is zero before

    def load(self, param: str, parts: tuple[str, ...], tensor: Tensor) -> None:
        self.weight.data[: self.span.count].copy_(tensor)
        self.clear_padding()

    def clear_padding(self) -> None:
        """Make the rows that are not of the vocabulary zero."""
        self.weight.data[self.span.count :].zero_()

    def fill_table(self) -> None:
        """Compute `row_of`."""
        self.row_of.fill_(self.span.size - 1)
        here = torch.arange(self.span.count, device=self.row_of.device)
        self.row_of[self.span.begin : self.span.end] = here

    def forward(self, input_ids: Tensor) -> Tensor:
        rows = self.row_of.index_select(0, input_ids)
        return self.group.all_reduce_(self.weight.index_select(0, rows))

    @property
    def rows(self) -> Tensor:
        """The weight as that of an output head: the rows of this rank's piece."""
        return self.weight[:-1]


def give_memory(model: nn.Module, device: torch.device) -> None:
    """Uninitialised memory for every parameter and buffer of a model on the meta device.

    `Module.to_empty` does the same, but first imports some 500 modules, sympy among them: one to
    two and a half seconds.
    """
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            module.register_parameter(name, nn.Parameter(memory, requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype, device=device))


def _span(size: int | Span) -> Span:
    return size if isinstance(size, Span) else Span.whole(size)


def _parameter(*shape: int, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)


def _begins(sizes: object) -> list[int]:
    begins, total = [], 0
    for size in sizes:  # type: ignore[attr-defined]
        begins.append(total)
        total += size
    return begins
