"""The safetensors files of a checkpoint folder: finding them, their headers, their tensors."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

# Converts every torch file of a folder without building the model, so it also serves architectures
# whose code is not in transformers. `clone` because safetensors refuses tensors that share memory.
_CONVERT = """\
import glob, sys, torch
from safetensors.torch import save_file
for f in glob.glob(sys.argv[1] + "/*.bin") + glob.glob(sys.argv[1] + "/*.pt*"):
    tensors = torch.load(f, map_location="cpu", weights_only=True)
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, f.rsplit(".", 1)[0] + ".safetensors")"""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file header says about one tensor."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors spells it: "BF16", "F32", ...


class Checkpoint:
    """All tensors of a folder, by name. Headers are read at once, data only on request.

    Args:
        folder: checkpoint folder.
        who: the public function that asked, for error messages.

    Raises:
        FileNotFoundError: there are no safetensors files, or a shard is missing.
        ValueError: a file is truncated or malformed, or two files hold the same tensor.
    """

    def __init__(self, folder: Path, *, who: str = "load_model") -> None:
        self._who = who
        self.tensors: dict[str, TensorInfo] = {}
        self.files = _find_files(folder, who)
        for file in self.files:
            with _open(file, who) as handle:
                for name in handle.keys():  # noqa: SIM118 (a safetensors handle is no mapping)
                    if name in self.tensors:
                        raise ValueError(
                            f"{who}: each tensor must be in one file only, got {name} in "
                            f"{self.tensors[name].file.name} and {file.name}; remove the file that "
                            "does not belong to the checkpoint"
                        )
                    header = handle.get_slice(name)
                    self.tensors[name] = TensorInfo(
                        file, tuple(header.get_shape()), header.get_dtype()
                    )

    def read(
        self, names: set[str], cuts: Mapping[str, Cut] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """The named tensors, file by file, on the CPU.

        Args:
            names: which.
            cuts: of these tensors only the rows and columns that are said, and no other bytes.
        """
        for file in self.files:
            with _open(file, self._who) as handle:
                for name in handle.keys():  # noqa: SIM118
                    if name in names:
                        cut = None if cuts is None else cuts.get(name)
                        if cut is None:
                            yield name, handle.get_tensor(name)
                        else:
                            yield name, _read_cut(handle.get_slice(name), cut)


class Cut(NamedTuple):
    """A piece of a tensor: these ranges of rows, one after the other, of these columns."""

    rows: tuple[tuple[int, int], ...]
    columns: tuple[int, int] | None = None  # None: all

    def of(self, tensor: Tensor) -> Tensor:
        """The piece of a tensor that is in memory."""
        if self.columns is not None:
            tensor = tensor[:, slice(*self.columns)]
        taken = [tensor[slice(*rows)] for rows in self.rows]
        return taken[0] if len(taken) == 1 else torch.cat(taken)

    def back(self, piece: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A whole tensor with one piece in its place and zeros elsewhere."""
        whole = torch.zeros(shape, dtype=piece.dtype)
        (rows,) = self.rows
        columns = slice(None) if self.columns is None else slice(*self.columns)
        whole[slice(*rows), columns] = piece
        return whole


def _read_cut(stored: Any, cut: Cut) -> Tensor:
    """`stored`: a slice of safetensors, which reads what it is indexed with."""
    taken = []
    for begin, end in cut.rows:
        if begin == end:
            continue
        if cut.columns is None:
            taken.append(stored[begin:end])
        else:
            taken.append(stored[begin:end, slice(*cut.columns)])
    if not taken:
        return stored[:1][:0]
    return taken[0] if len(taken) == 1 else torch.cat(taken)


def _find_files(folder: Path, who: str) -> list[Path]:
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted({*json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
            if any(Path(name).name != name for name in names):
                raise ValueError("a shard outside the folder")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{who}: {index} must hold a weight_map object, got {error!r}; download the "
                "file again"
            ) from error
        files = [folder / name for name in names]
    elif (folder / SINGLE).is_file():
        files = [folder / SINGLE]
    else:
        files = sorted(folder.glob("*.safetensors"))
        files += [f for f in _rest_of_series(files) if f not in files]
    if not files:
        raise FileNotFoundError(_no_safetensors(folder, who))
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise FileNotFoundError(
            f"{who}: {folder} must contain all {len(files)} shards, got no "
            f"{', '.join(absent)}; download the missing files"
        )
    return files


def _rest_of_series(files: list[Path]) -> list[Path]:
    """All files of the series that names such as x-00002-of-00003 announce."""
    series = []
    for file in files:
        match = re.fullmatch(r"(.+-)(\d+)(-of-)(\d+)", file.stem)
        if match and len(match[4]) <= 5:  # more is no number of files
            head, number, middle, count = match.groups()
            series += [
                file.with_name(f"{head}{i:0{len(number)}d}{middle}{count}.safetensors")
                for i in range(1, int(count) + 1)
            ]
    return sorted(set(series))


def _no_safetensors(folder: Path, who: str) -> str:
    others = sorted(f.name for suffix in ("bin", "pt", "pth") for f in folder.glob(f"*.{suffix}"))
    if not others:
        return (
            f"{who}: {folder} must contain {SINGLE} or {INDEX}, got no weight files; download "
            "the checkpoint's weights"
        )
    command = f"python -c {shlex.quote(_CONVERT)} {shlex.quote(str(folder))}"
    return (
        f"{who}: {folder} must contain .safetensors files, got only {', '.join(others[:4])}; "
        f"convert them once with:\n{command}"
    )


def _open(file: Path, who: str) -> safe_open:
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        with open(file, "rb") as stream:
            is_pointer = stream.read(40).startswith(b"version https://git-lfs")
        what = "a git-lfs pointer" if is_pointer else f"a truncated or damaged one ({error})"
        remedy = "run `git lfs pull`" if is_pointer else "download the file again"
        raise ValueError(
            f"{who}: {file} must be a complete safetensors file, got {what}; {remedy}"
        ) from error
