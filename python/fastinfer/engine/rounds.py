"""One round of speculation between two model calls, where the model is: see csrc/cuda/common/
speculate.cu, which this calls while a step is captured, and whose twin it holds for machines
without a GPU.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .. import _lib

PREPARE, ADVANCE, ROWS = range(3)
_NUMBERS = (
    "rows",
    "drafts",
    "block_size",
    "vocab_size",
    "min_n",
    "max_n",
    "table_width",
    "history_width",
    "max_rounds",
)
_TENSORS: dict[str, torch.dtype] = {
    "length": torch.int32,
    "capacity": torch.int32,
    "num_prompt": torch.int32,
    "round": torch.int32,
    "tail": torch.int64,
    "tables": torch.int32,
    "history_row": torch.int32,
    "history": torch.int32,
    "count": torch.int32,
    "input_ids": torch.int64,
    "positions": torch.int64,
    "slots": torch.int64,
    "steps": torch.int64,
    "seq_lens": torch.int32,
    "drawn": torch.int64,
    "draft_positions": torch.int64,
    "draft_slots": torch.int64,
    "draft_steps": torch.int64,
    "draft_seq_lens": torch.int32,
    "draft_drawn": torch.int64,
    "out": torch.int32,
}


class _Speculation(ctypes.Structure):
    """`FastinferSpeculation` of speculate.cu."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _NUMBERS),
        *((name, ctypes.c_void_p) for name in _TENSORS),
    ]


@functools.cache
def _library_function() -> Callable[..., int]:
    function = ctypes.CDLL(str(_lib.LIBRARY)).fastinfer_speculate
    function.restype = ctypes.c_int
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p]
    return function


class Rounds:
    """The three functions over one set of tensors.

    Args:
        tensors: By the names of the struct; those of the draft model are left out for n-grams,
            `history` for a draft model.
        numbers: By the names of the struct.
    """

    def __init__(self, tensors: Mapping[str, Tensor], **numbers: int) -> None:
        for name, tensor in tensors.items():
            assert tensor.dtype == _TENSORS[name] and tensor.is_contiguous(), name
        self._tensors, self._numbers = dict(tensors), numbers
        self._device = tensors["length"].device
        if self._device.type == "cuda":
            addresses = {name: tensor.data_ptr() for name, tensor in tensors.items()}
            self._struct = _Speculation(**numbers, **addresses)

    def __call__(self, what: int) -> None:
        """Run one of them: on a GPU on the current stream.

        Raises:
            RuntimeError: CUDA reports an error.
        """
        if self._device.type != "cuda":
            _Twin(self._tensors, self._numbers).run(what)
            return
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream(self._device).cuda_stream
            error = _library_function()(ctypes.addressof(self._struct), what, stream)
        if error:
            torch.cuda.check_error(error)


class _Twin:
    """The same in Python, one request after the other."""

    def __init__(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, int]) -> None:
        self.t: Any = {name: tensor.flatten().numpy() for name, tensor in tensors.items()}
        self.n = numbers
        self.rows, self.k, self.width = numbers["rows"], numbers["drafts"], numbers["drafts"] + 1

    def run(self, what: int) -> None:
        for row in range(self.rows):
            if what == ADVANCE:
                self._accept(row)
            if what == ROWS:
                self._check_drafts(row)
            elif "history" in self.t:
                self._look_up(row)
            else:
                self._prepare_drafts(row)

    def _runs(self, row: int) -> bool:
        return bool(self.t["length"][row] <= self.t["capacity"][row])

    def _most(self, row: int) -> int:
        left = int(self.t["capacity"][row]) - int(self.t["length"][row])
        return min(max(left, 0), self.k)

    def _slot(self, row: int, position: int) -> int:
        size = self.n["block_size"]
        block = int(self.t["tables"][row * self.n["table_width"] + position // size])
        return block * size + position % size

    def _accept(self, row: int) -> None:
        t, first = self.t, row * self.width
        now = int(t["round"][row])
        at = (now * self.rows + row) * (self.k + 3)
        t["round"][row] = (now + 1) % self.n["max_rounds"]
        t["out"][at : at + 2] = 0
        if not self._runs(row):
            return
        count = int(t["count"][row])
        last = first + self.width - 1 - count
        drafts = t["input_ids"][last + 1 : last + 1 + count]
        drawn = t["drawn"][last : last + 1 + count]
        accepted = 0
        while accepted < count and drawn[accepted] == drafts[accepted]:
            accepted += 1
        stand = drawn[: accepted + 1]
        t["out"][at : at + 2] = count, len(stand)
        t["out"][at + 2 : at + 2 + len(stand)] = stand
        if "history" in t:
            begin = int(t["history_row"][row]) * self.n["history_width"] + int(t["length"][row])
            t["history"][begin : begin + len(stand)] = stand
        tail = [*t["tail"][2 * row : 2 * row + 2], *stand]
        t["tail"][2 * row : 2 * row + 2] = tail[-2:]
        t["length"][row] += len(stand)

    def _look_up(self, row: int) -> None:
        length, most = int(self.t["length"][row]), self._most(row)
        begin = int(self.t["history_row"][row]) * self.n["history_width"]
        tokens = self.t["history"][begin : begin + length].tolist()
        best, after = 0, 0
        for end in range(length - 1, 0, -1) if most else ():
            n = 0
            while n < self.n["max_n"] and n < end and tokens[end - 1 - n] == tokens[-1 - n]:
                n += 1
            if n > best:
                best, after = n, end
        drafts = []
        if best >= self.n["min_n"]:
            drafts = [tokens[after + i % (length - after)] for i in range(most)]
        self._write_rows(row, drafts)

    def _check_drafts(self, row: int) -> None:
        drawn = self.t["draft_drawn"][row :: self.rows][: self._most(row)].tolist()
        valid = [0 <= token < self.n["vocab_size"] for token in drawn]
        self._write_rows(row, drawn[: valid.index(False)] if False in valid else drawn)

    def _write_rows(self, row: int, drafts: list[int]) -> None:
        t, runs, length = self.t, self._runs(row), int(self.t["length"][row])
        for place in range(self.width):
            at, ahead = row * self.width + place, place - self.k + len(drafts)
            real = runs and ahead >= 0
            token = drafts[ahead - 1] if ahead > 0 else int(t["tail"][2 * row + 1])
            t["input_ids"][at] = token if real else 0
            t["positions"][at] = length - 1 + ahead if real else 0
            t["slots"][at] = self._slot(row, length - 1 + ahead) if real else -1
            t["steps"][at] = length - int(t["num_prompt"][row]) + max(ahead, 0) if runs else 0
        t["count"][row] = len(drafts)
        t["seq_lens"][row] = length + len(drafts) if runs else 0

    def _prepare_drafts(self, row: int) -> None:
        t, runs, length = self.t, self._runs(row), int(self.t["length"][row])
        count = self._most(row)
        for place in range(self.width):  # 0: the token before the last one
            position = length - 2 + place
            live = runs and position >= 0 and (place <= 1 or place - 1 < count)
            at = 2 * row + place if place <= 1 else place * self.rows + row
            t["draft_positions"][at] = position if live else 0
            t["draft_slots"][at] = self._slot(row, position) if live else -1
        for step in range(self.k):
            at = step * self.rows + row
            t["draft_seq_lens"][at] = length + min(step, max(count - 1, 0)) if runs else 0
            t["draft_steps"][at] = length - int(t["num_prompt"][row]) + step if runs else 0
