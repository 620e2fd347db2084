"""Builds a model from a checkpoint folder.

The model is built on the meta device, checked against the file headers, then given memory once;
tensors are then put into their places (`filling.py`), to a GPU in the background where there is
nothing to convert (`start_loading`). Linear layers that the checkpoint holds quantised are
exchanged for `QuantizedLinear` before.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..checkpoint import Checkpoint
from ..quant import notes
from ..quant.canonical import QuantError
from ..quant.config import QuantConfig, read_quant_config
from .config import ModelConfig, load_config
from .decoder import CausalLM
from .dummy import fill_random
from .filling import Filler, exchange
from .shard import WHOLE, Shard
from .weights import EMBEDDING, weight_targets

_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "half": torch.float16,
    "bfloat16": torch.bfloat16,
}
_STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def load_model(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    load_format: str = "auto",
    progress: bool = True,
    max_model_len: int | None = None,
    requantize: int | None = None,
    shard: Shard = WHOLE,
) -> CausalLM:
    """Load a checkpoint folder in Hugging Face layout, plain or quantised.

    Args:
        path: folder with `config.json` and safetensors weights, single or sharded.
        dtype: of the parameters: a torch dtype, its name, or "auto" for what `config.json` states
            and, where it states nothing, what the embedding is stored as.
        device: where the model lives.
        load_format: "auto" reads the weights; "dummy" draws small random ones from a fixed seed and
            needs only `config.json` (for benchmarks).
        progress: show a progress bar while reading, when stderr is a terminal.
        max_model_len: longest sequence to run, in tokens; sizes the rotary tables. None: what the
            checkpoint declares. With dynamic NTK a longer length also changes the frequencies, see
            `rotary.py`.
        requantize: 4 or 8: quantise again what no kernel reads as it is stored (bitsandbytes nf4
            and fp4, GPTQ with irregular groups), rounding to nearest in groups of 64. None:
            dequantise it to `dtype`. Either is logged.
        shard: which part of the model to build; only its bytes are read of plain tensors.

    Returns:
        The model, ready to run; its `config.dtype` is the dtype of its parameters.

    Raises:
        FileNotFoundError: the folder, `config.json`, the weights or a shard is not there.
        ValueError: the configuration is not supported, the weights do not match it, or an argument
            is wrong. Damaged quantised tensors are named.
        RuntimeError: a CUDA device was asked for and there is none.
    """
    with start_loading(
        path,
        dtype=dtype,
        device=device,
        load_format=load_format,
        progress=progress,
        max_model_len=max_model_len,
        requantize=requantize,
        shard=shard,
    ) as loading:
        return loading.finish()


class Loading:
    """A model some of whose weights may still be on their way.

    Leaving the scope stops what has not been finished.

    Attributes:
        model: complete but for values: its memory is there, so that steps can be measured and
            captured. What it computes before `finish` means nothing.
    """

    def __init__(self, model: CausalLM) -> None:
        self.model = model
        self.filler: Filler | None = None

    def finish(self) -> CausalLM:
        """Wait for the weights; returns the model, ready to run. Raises what `load_model` does."""
        with torch.no_grad():
            if self.filler is not None:
                self.filler.finish()
            self.model.finish_loading()
        return self.model

    def close(self) -> None:
        """Stop reading. May be called twice."""
        if self.filler is not None:
            self.filler.close()

    def __enter__(self) -> Loading:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def start_loading(
    path: str | os.PathLike[str],
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    load_format: str = "auto",
    progress: bool = True,
    max_model_len: int | None = None,
    requantize: int | None = None,
    shard: Shard = WHOLE,
) -> Loading:
    """Like `load_model`, but tensors for a GPU that need no conversion are read in the background.

    Returns:
        The model, to be finished; its parameters are zero where nothing has arrived yet.
    """
    if load_format not in ("auto", "dummy"):
        raise ValueError(
            f"load_model: load_format must be 'auto' or 'dummy', got {load_format!r}; 'auto' reads "
            "safetensors, 'dummy' draws random weights"
        )
    if max_model_len is not None and (not isinstance(max_model_len, int) or max_model_len < 1):
        raise ValueError(
            "load_model: max_model_len must be a positive number of tokens, got "
            f"{max_model_len!r}; leave it out to use the checkpoint's length"
        )
    if requantize not in (None, 4, 8):
        raise ValueError(
            f"load_model: requantize must be None, 4 or 8 bits, got {requantize!r}; leave it out "
            "to dequantise"
        )
    target = _device(device)
    config = load_config(path)
    with notes.collecting(), _named(), torch.no_grad():
        quant = read_quant_config(path)
        checkpoint = Checkpoint(Path(path)) if load_format == "auto" else None
        config = dataclasses.replace(config, dtype=resolve_dtype(dtype, config, checkpoint))
        shard = dataclasses.replace(shard, unit=_unit(config, quant)) if shard != WHOLE else shard
        with torch.device("meta"):
            model = CausalLM(config, dtype=config.dtype, max_model_len=max_model_len, shard=shard)
        model.eval()
        loading = Loading(model)
        if checkpoint is None:
            fill_random(model, config, quant, target, exchange=exchange, requantize=requantize)
        else:
            loading.filler = Filler(model, config, checkpoint, quant, target, requantize)
            loading.filler.start(progress=progress)
        model.fill_tables()
    return loading


@contextmanager
def _named() -> Iterator[None]:
    """Errors of the quantised formats name the tensor; the caller wants to know who complains."""
    try:
        yield
    except QuantError as error:
        raise QuantError(f"load_model: {error}") from error


def _unit(config: ModelConfig, quant: QuantConfig | None) -> int:
    """Feed-forward channels that must stay together: the quantisation groups of the down layers."""
    sizes = {1}
    for tensor, target in weight_targets(config).items() if quant is not None else ():
        if target.is_linear_weight and target.module.endswith("down_proj"):
            scheme = quant.for_module(tensor.removesuffix(".weight"))
            if scheme is not None and scheme.group_size > 0:
                sizes.add(scheme.group_size)
    return math.lcm(*sizes)


def resolve_dtype(
    dtype: str | torch.dtype, config: ModelConfig, checkpoint: Checkpoint | None
) -> torch.dtype:
    """The dtype of parameters that `load_model(dtype=...)` stands for."""
    if isinstance(dtype, str) and dtype == "auto":
        if config.dtype is not None:
            return config.dtype
        stored = checkpoint.tensors.get(EMBEDDING) if checkpoint is not None else None
        return _STORED.get(stored.dtype, torch.float32) if stored is not None else torch.float32
    resolved = _DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if resolved not in _STORED.values():
        raise ValueError(
            f"load_model: dtype must be 'auto', float32, float16 or bfloat16, got {dtype!r}; "
            "activations of other dtypes are not supported"
        )
    return resolved


def _device(device: str | torch.device) -> torch.device:
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"load_model: device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}; name a device"
        ) from error
    if resolved.type not in ("cpu", "cuda"):
        raise ValueError(
            f"load_model: device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}; the operators "
            "run on these"
        )
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise RuntimeError(
            f"load_model: device must exist, got {device!r} with {torch.cuda.device_count()} CUDA "
            "devices visible; use device='cpu' or check the driver"
        )
    return resolved
