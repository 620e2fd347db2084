"""The folder `.quantize` inside of the output: what an interrupted run leaves behind.

state.json             options and inputs; finished blocks are of use only under the same
before.json            perplexity of the original
hidden_0003/           inputs of block 3 for all calibration tokens, one file per step
block_0003.safetensors finished block
rows_0003.json         its errors; written last, says that the block is finished
outside.safetensors    embedding, final norm and head
"""

from __future__ import annotations

import json
import shutil
from collections.abc import MutableSequence
from pathlib import Path
from typing import Any, overload

from safetensors import safe_open
from torch import Tensor

from ..checkpoint import INDEX, SINGLE
from .save import save_atomically, write_json

WORK = ".quantize"
REPORT = "quantize_report.json"


class WorkFolder:
    """Paths and bookkeeping of one run.

    Args:
        out: the output folder.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.path = out, out / WORK
        self.before = self.path / "before.json"
        self.outside = self.path / "outside.safetensors"

    def prepare(self, mine: dict[str, Any], source: Path, *, resume: bool, overwrite: bool) -> None:
        """Make the folder, or check that it belongs to this run.

        Args:
            mine: what must be the same for finished blocks to be of use.
            source: folder of the model.
            resume: continue with what is there.
            overwrite: replace a checkpoint that is there.
        """
        out, state = self.out, self.path / "state.json"
        if out.exists() and not out.is_dir():
            raise FileExistsError(f"quantize: out must be a folder, got the file {out}")
        if out.exists() and out.resolve() == source.resolve():
            raise ValueError(f"quantize: out must not be the model's own folder, got {out}")
        if resume and state.is_file():
            found = json.loads(state.read_text(encoding="utf-8"))
            other = [key for key in mine if found.get(key) != mine[key]]
            if other:
                raise ValueError(
                    f"quantize: resume must have the options of the interrupted run, got another "
                    f"{', '.join(other)}; repeat them or use --overwrite"
                )
            return
        if out.is_dir() and any(out.iterdir()):
            if not overwrite:
                what = "nothing to resume there" if resume else "use --overwrite or another folder"
                raise FileExistsError(
                    f"quantize: out must be a new or empty folder, got {out} with files; {what}"
                )
            self._clear()
        self.path.mkdir(parents=True, exist_ok=True)
        write_json(mine, state)

    def _clear(self) -> None:
        """Remove an earlier checkpoint, and only what belongs to one."""
        if self.path.is_dir():
            self.remove()
        for name in (SINGLE, INDEX, "config.json", "quantize_config.json", REPORT):
            (self.out / name).unlink(missing_ok=True)
        for file in self.out.glob("model-*-of-*.safetensors"):
            file.unlink()

    def remove(self) -> None:
        """The run is over."""
        shutil.rmtree(self.path)

    def block(self, index: int) -> Path:
        """Where the tensors of a finished block are."""
        return self.path / f"block_{index:04d}.safetensors"

    def _rows(self, index: int) -> Path:
        return self.path / f"rows_{index:04d}.json"

    def finish(self, index: int, tensors: dict[str, Tensor], rows: list[dict[str, Any]]) -> None:
        """Save a block."""
        save_atomically(tensors, self.block(index))
        write_json(rows, self._rows(index))

    def finished(self) -> list[list[dict[str, Any]]]:
        """Rows of the finished blocks."""
        found: list[list[dict[str, Any]]] = []
        while (file := self._rows(len(found))).is_file():
            found.append(json.loads(file.read_text(encoding="utf-8")))
        return found

    def hidden(self, index: int) -> HiddenFiles:
        """Inputs of block `index`."""
        return HiddenFiles(self.path, index)


class HiddenFiles(MutableSequence[Tensor]):
    """Hidden states, one file per step, read when asked for.

    What is assigned is the input of the next block: it is seen after `forward`.

    Args:
        folder: to keep the files in.
        index: block whose inputs these are.
    """

    def __init__(self, folder: Path, index: int) -> None:
        self._folder, self._index = folder, index
        self._count = len(list(self._of(index).glob("*.safetensors")))

    def _of(self, index: int) -> Path:
        return self._folder / f"hidden_{index:04d}"

    def _file(self, index: int, step: int) -> Path:
        return self._of(index) / f"{step:06d}.safetensors"

    def _save(self, index: int, step: int, value: Tensor) -> None:
        self._of(index).mkdir(exist_ok=True)
        save_atomically({"hidden": value}, self._file(index, step))

    def forward(self) -> None:
        """All steps of the block are assigned, and the block is saved."""
        old = self._of(self._index)
        self._index += 1
        shutil.rmtree(old)

    def __len__(self) -> int:
        return self._count

    def insert(self, index: int, value: Tensor) -> None:
        """Only at the end."""
        assert index == self._count
        self._save(self._index, index, value)
        self._count += 1

    @overload
    def __getitem__(self, step: int) -> Tensor: ...
    @overload
    def __getitem__(self, step: slice) -> MutableSequence[Tensor]: ...
    def __getitem__(self, step: int | slice) -> Tensor | MutableSequence[Tensor]:
        assert isinstance(step, int)
        if step >= self._count:
            raise IndexError(step)
        with safe_open(self._file(self._index, step), framework="pt") as handle:
            return handle.get_tensor("hidden")

    def __setitem__(self, step: Any, value: Any) -> None:
        self._save(self._index + 1, step, value)

    def __delitem__(self, step: int | slice) -> None:
        raise TypeError("hidden states are not removed one by one")
