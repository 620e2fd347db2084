"""`fastinfer quantize`: reads a checkpoint block by block, quantises each, writes a new folder.

Only one block is in memory at a time. Finished blocks, and with calibration the hidden states of
the calibration tokens, go into the folder `.quantize` inside of the output, from where an
interrupted run continues bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import ops
from .._version import __version__
from ..checkpoint import Checkpoint
from ..models.config import ModelConfig, load_config
from ..models.decoder import CausalLM
from ..models.loader import load_model
from ..models.weights import EMBEDDING, HEAD, plan_tensors
from ..text import load_tokenizer
from . import notes
from .blocks import Block
from .calibration import Calibration, calibration_tokens, encode_text, read_text
from .canonical import QuantError
from .config import matches, read_quant_config
from .memory import trim_heap
from .methods import Result, quantize_block, quantize_head
from .options import FORMAT_OF, QuantizeOptions, method_options
from .perplexity import perplexity
from .save import (
    FORMATS,
    MAX_SHARD_BYTES,
    check_format,
    format_config,
    save_atomically,
    write_checkpoint,
    write_json,
    write_linear,
)
from .work import REPORT, WorkFolder

_NORM = "model.norm.weight"


def quantize_checkpoint(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    options: QuantizeOptions | None = None,
    *,
    calib: str | os.PathLike[str] | None = None,
    eval_text: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> dict[str, Any]:
    """Quantise a checkpoint folder into another one.

    Args:
        model: unquantised checkpoint folder in Hugging Face layout.
        out: folder to write; must be new or empty.
        options: method and format; None: RTN, 4 bits, groups of 128.
        calib: text file that AWQ, GPTQ and SmoothQuant calibrate on.
        eval_text: held-out text file; perplexity is measured on it before and after.
        resume: continue an interrupted run with the same options.
        overwrite: replace a checkpoint that is in `out`.
        progress: show a progress bar when stderr is a terminal.
        max_shard_bytes: split weight files larger than this.

    Returns:
        The content of `quantize_report.json`.

    Raises:
        FileNotFoundError: a folder or file is missing.
        FileExistsError: `out` is not empty and neither `resume` nor `overwrite` was given.
        ValueError: an option does not fit the model or the format.
    """
    options = options or QuantizeOptions()
    with notes.collecting(), torch.no_grad():
        run = _Run(Path(model), Path(out), options, calib, eval_text, progress)
        run.work.prepare(run.fingerprint(), run.source, resume=resume, overwrite=overwrite)
        return run.go(max_shard_bytes)


class _Run:
    """One run of `quantize_checkpoint`."""

    def __init__(
        self,
        model: Path,
        out: Path,
        options: QuantizeOptions,
        calib: str | os.PathLike[str] | None,
        eval_text: str | os.PathLike[str] | None,
        progress: bool,
    ) -> None:
        self.source, self.out, self.options = model, out, options
        self.work = WorkFolder(out)
        self.progress = progress and sys.stderr.isatty()
        self.method = method_options(options)
        self.format = options.format or FORMAT_OF[options.method]
        if self.format not in FORMATS:
            raise ValueError(
                f"quantize: format must be one of {', '.join(FORMATS)}, got {self.format!r}"
            )
        self.int8 = options.method == "smoothquant"
        self.permuted = self.method.act_order and not self.method.static_groups
        self.config: ModelConfig = load_config(model)
        if read_quant_config(model) is not None:
            raise QuantError(
                f"quantize: model must be an unquantised checkpoint, got {model}, which has a "
                "quantization_config; start from the original weights"
            )
        self.checkpoint = Checkpoint(model, who="quantize")
        self.shapes = {name: info.shape for name, info in self.checkpoint.tensors.items()}
        dtypes = {name: info.dtype for name, info in self.checkpoint.tensors.items()}
        with torch.device("meta"):
            skeleton = CausalLM(self.config, dtype=torch.float32)
        plan_tensors(skeleton, self.config, self.shapes, dtypes)
        self._choose_layers()
        self.calib = None
        if options.method != "rtn":
            if calib is None:
                raise ValueError(
                    f"quantize: calib must be a text file for {options.method}, got none; give "
                    "some text like that the model will see (rtn needs none)"
                )
            self.calib = read_text(calib, "calib")
        self.eval_text = None if eval_text is None else read_text(eval_text, "eval")

    def _choose_layers(self) -> None:
        options, self.layers, self.skipped = self.options, [], []
        common = math.gcd(
            self.config.hidden_size,
            self.config.intermediate_size,
            self.config.num_heads * self.config.head_dim,
        )
        for name, shape in self.shapes.items():
            layer = name.removesuffix(".weight")
            in_block = layer.endswith(("_proj", "W_pack")) and layer.startswith("model.layers.")
            head = name == HEAD and not self.config.tie_word_embeddings
            if not name.endswith(".weight") or not (in_block or head):
                continue
            if any(matches(pattern, layer) for pattern in options.skip):
                self.skipped.append(layer)
                continue
            if head and self.config.normalized_head:
                raise ValueError(
                    f"quantize: lm_head of {self.config.architecture} must stay in floating "
                    "point, because its rows are normalised while loading; skip lm_head"
                )
            check_format(
                self.format,
                layer,
                (shape[0], shape[1]),
                bits=self.method.grid.bits,
                group_size=self.method.grid.group_size,
                int8=self.int8,
                permuted=self.permuted,
                common=common,
            )
            self.layers.append(layer)
        if not self.layers:
            raise ValueError(
                f"quantize: skip must leave a layer to quantise, got {', '.join(options.skip)}"
            )
        if self.config.tie_word_embeddings:
            self.skipped.append("lm_head")  # it is the embedding

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for finished blocks to be of use."""

        def digest(text: str | None) -> str | None:
            return None if text is None else hashlib.sha256(text.encode()).hexdigest()

        files = sorted({info.file for info in self.checkpoint.tensors.values()})
        state = asdict(self.options)
        state.pop("eval_window")
        state |= {
            "version": __version__,
            "calib": digest(self.calib),
            "config": digest((self.source / "config.json").read_text(encoding="utf-8")),
            "weights": [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in files],
        }
        return json.loads(json.dumps(state))

    # ---- the run -----------------------------------------------------------------------------

    def go(self, max_shard_bytes: int) -> dict[str, Any]:
        begin = time.perf_counter()
        before = self._perplexity_before()
        rows: list[dict[str, Any]] = []
        with tqdm(
            total=len(self.layers),
            desc=f"quantizing ({self.options.method})",
            unit="layer",
            disable=not self.progress,
        ) as bar:
            self.bar = bar
            rows = self._blocks()
        config = format_config(
            self.format,
            bits=self.method.grid.bits,
            group_size=self.method.grid.group_size,
            symmetric=self.method.grid.symmetric,
            permuted=self.permuted,
            int8=self.int8,
            ignore=self.skipped,
            lm_head="lm_head" in self.layers,
        )
        files = [self.work.outside]
        files += [self.work.block(i) for i in range(self.config.num_layers)]
        write_checkpoint(self.source, self.out, files, config, max_shard_bytes=max_shard_bytes)
        report = {
            "fastinfer": __version__,
            "options": asdict(self.options)
            | {
                "bits": self.method.grid.bits,
                "group_size": self.method.grid.group_size,
                "symmetric": self.method.grid.symmetric,
                "format": self.format,
            },
            "perplexity": {"before": before, "after": self._perplexity(self.out)},
            "bytes": {"before": _size(self.source), "after": _size(self.out)},
            "seconds": round(time.perf_counter() - begin, 1),
            "skipped": self.skipped,
            "layers": rows,
        }
        write_json(_finite(report), self.out / REPORT)
        self.work.remove()
        return report

    def _blocks(self) -> list[dict[str, Any]]:
        finished = self.work.finished()
        rows = [row for block in finished for row in block]
        self.bar.update(len(rows))
        calibration = self._calibration(len(finished))
        for index in range(len(finished), self.config.num_layers):
            new = self._block(index, calibration)
            if calibration is not None:
                calibration.hidden.forward()
            rows += new
            trim_heap()
        return rows + self._outside(calibration)

    def _block(self, index: int, calibration: Calibration | None) -> list[dict[str, Any]]:
        streamed = self.method.method in ("rtn", "gptq")
        block = Block(self.config, index, self.checkpoint, streamed=streamed)
        tensors: dict[str, Tensor] = {}
        rows: dict[str, dict[str, Any]] = {}

        def done(result: Result) -> None:
            tensors.update(self._written(result))
            rows[result.name] = _row(result)
            trim_heap()
            self._tick(result.name)

        quantize_block(block, self.method, calibration, set(self.layers), done)
        tensors = block.plain_tensors(set(rows)) | tensors
        ordered = [rows[part.name] for part in block.parts if part.name in rows]
        self.work.finish(index, tensors, ordered)
        return ordered

    def _calibration(self, done: int) -> Calibration | None:
        if self.calib is None:
            return None
        tokens = calibration_tokens(
            load_tokenizer(self.source),
            self.calib,
            samples=self.options.samples,
            seqlen=min(self.options.seqlen, self.config.max_position),
        )
        embedding = next(t for _, t in self.checkpoint.read({EMBEDDING}))
        return Calibration(self.config, tokens, embedding, self.work.hidden(done))

    def _outside(self, calibration: Calibration | None) -> list[dict[str, Any]]:
        """Embedding, final norm and head."""
        names = {EMBEDDING, _NORM}
        if not self.config.tie_word_embeddings:
            names.add(HEAD)
        tensors = dict(self.checkpoint.read(names))
        rows: list[dict[str, Any]] = []
        if "lm_head" in self.layers:
            norm, eps = tensors[_NORM].float(), self.config.rms_norm_eps

            def inputs() -> Iterator[Tensor]:
                assert calibration is not None
                return (ops.rms_norm(hidden, norm, eps) for hidden in calibration.hidden)

            head = tensors.pop(HEAD)
            result = quantize_head(head, self.method, None if calibration is None else inputs)
            tensors |= self._written(result)
            rows = [_row(result)]
            self._tick("lm_head")
        save_atomically(tensors, self.work.outside)
        return rows

    def _written(self, result: Result) -> dict[str, Tensor]:
        return write_linear(self.format, result.name, result.weight)

    def _tick(self, name: str) -> None:
        self.bar.set_postfix_str(name.removeprefix("model.layers."), refresh=False)
        self.bar.update()

    # ---- perplexity --------------------------------------------------------------------------

    def _perplexity_before(self) -> float | None:
        """Measured once, however often the run is resumed."""
        text, window = self.eval_text, self.options.eval_window
        if text is None:
            return None
        key = hashlib.sha256(f"{window} {text}".encode()).hexdigest()
        file = self.work.before
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            if found["key"] == key:
                return found["perplexity"]
        value = self._perplexity(self.source)
        write_json(_finite({"key": key, "perplexity": value}), file)
        return value

    def _perplexity(self, folder: Path) -> float | None:
        if self.eval_text is None:
            return None
        model = load_model(folder, progress=self.progress)
        tokens = encode_text(load_tokenizer(folder), self.eval_text)
        with tqdm(
            total=tokens.numel() - 1, desc="perplexity", unit="token", disable=not self.progress
        ) as bar:
            window = self.options.eval_window or 2048
            return perplexity(model, tokens, window=window, on_tokens=bar.update)


def _row(result: Result) -> dict[str, Any]:
    return {
        "name": result.name,
        "shape": [result.weight.out_features, result.weight.in_features],
        "weight_error": result.weight_error,
        "output_mse": result.output_mse,
        "output_error": result.output_error,
    }


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    if isinstance(value, dict):
        return {key: _finite(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
