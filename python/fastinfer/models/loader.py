"""Builds a model from a checkpoint folder.

The model is built on the meta device, checked against the file headers, then given memory once;
each tensor is copied from its (memory-mapped) file straight into its place, converting the dtype on
the way.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from .checkpoint import Checkpoint
from .config import ModelConfig, load_config
from .decoder import CausalLM
from .layers import Layer, RMSNorm
from .weights import EMBEDDING, HEAD, check_tensors

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
) -> CausalLM:
    """Load a checkpoint folder in Hugging Face layout.

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

    Returns:
        The model, ready to run; its `config.dtype` is the dtype of its parameters.

    Raises:
        FileNotFoundError: the folder, `config.json`, the weights or a shard is not there.
        ValueError: the configuration is not supported, the weights do not match it, or an argument
            is wrong.
        RuntimeError: a CUDA device was asked for and there is none.
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
    target = _device(device)
    config = load_config(path)
    checkpoint = Checkpoint(Path(path)) if load_format == "auto" else None
    config = dataclasses.replace(config, dtype=_resolve_dtype(dtype, config, checkpoint))
    with torch.device("meta"):
        model = CausalLM(config, dtype=config.dtype, max_model_len=max_model_len)
    with torch.no_grad():
        if checkpoint is None:
            model.to_empty(device=target)
            _fill_random(model)
        else:
            _fill(model, config, checkpoint, target, progress=progress)
        model.finish_loading()
    return model.eval()


def _fill(
    model: CausalLM,
    config: ModelConfig,
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    progress: bool,
) -> None:
    infos = checkpoint.tensors
    targets = check_tensors(
        model,
        config,
        {name: info.shape for name, info in infos.items()},
        {name: info.dtype for name, info in infos.items()},
    )
    _check_complete(model, {(t.module, t.param) for t in targets.values()})
    model.to_empty(device=device)
    with tqdm(
        total=len(targets),
        desc="loading weights",
        unit="tensor",
        disable=not (progress and sys.stderr.isatty()),
    ) as bar:
        for name, tensor in checkpoint.read(set(targets)):
            where = targets[name]
            layer = model.get_submodule(where.module)
            assert isinstance(layer, Layer)
            layer.load(where.param, where.parts, tensor)
            bar.update()
    if config.tie_word_embeddings and HEAD in infos:
        _check_tied(model, checkpoint)


def _check_complete(model: CausalLM, filled: set[tuple[str, str]]) -> None:
    """A parameter that no tensor of the map fills would keep the garbage of `to_empty`."""
    names = {f"{module}.{param}" for module, param in filled}
    left = [name for name, _ in model.named_parameters() if name not in names]
    if left:
        raise RuntimeError(
            "load_model: every parameter must have a checkpoint tensor, got none for "
            f"{', '.join(left)}; the weight map of this architecture is incomplete, please report "
            "it"
        )


def _check_tied(model: CausalLM, checkpoint: Checkpoint) -> None:
    head = next(tensor for _, tensor in checkpoint.read({HEAD}))
    embedding = model.embed_tokens.weight
    if head.shape != embedding.shape or not torch.equal(head.to(embedding), embedding):
        raise ValueError(
            f"load_model: {HEAD} must equal {EMBEDDING} when tie_word_embeddings is true, got "
            "another tensor; set tie_word_embeddings to false in config.json to use it"
        )


def _fill_random(model: CausalLM) -> None:
    generator = torch.Generator(device=model.device).manual_seed(0)
    for module in model.modules():
        for param in module.parameters(recurse=False):
            if isinstance(module, RMSNorm):
                param.fill_(1.0)
            else:
                param.normal_(std=0.02, generator=generator)


def _resolve_dtype(
    dtype: str | torch.dtype, config: ModelConfig, checkpoint: Checkpoint | None
) -> torch.dtype:
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
