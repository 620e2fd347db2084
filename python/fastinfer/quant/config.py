"""Reads a checkpoint's `quantization_config` and answers, per module, how its weight is stored.

Sources: config.json (`quantization_config`, or `compression_config` of older compressed-tensors
files), else quantize_config.json (GPTQ) or quant_config.json (AWQ) beside it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .canonical import QuantError
from .notes import note

METHODS = ("gptq", "awq", "compressed-tensors", "bitsandbytes", "fastinfer")


@dataclass(frozen=True, slots=True)
class LinearScheme:
    """How one linear layer is stored.

    Attributes:
        method: one of METHODS.
        bits: bits per weight: 4 or 8.
        group_size: input channels per scale; -1: one scale per output channel.
        symmetric: True when zero points are the middle of the range and not stored (or to be
            ignored); None when the file does not say, so that the stored ones decide.
        act_order: columns may be in another order than the input channels (`g_idx`, `perm`).
        style: variant of the format, e.g. "gptq" or "gptq_v2" zeros, "gemm", "pack-quantized",
            "int-quantized", "int8", "nf4".
        activations: None, or "int8_token": the layer multiplies int8 activations quantised per
            token.
    """

    method: str
    bits: int
    group_size: int
    symmetric: bool | None
    act_order: bool = False
    style: str = ""
    activations: str | None = None


@dataclass(slots=True)
class QuantConfig:
    """A checkpoint's quantisation.

    Attributes:
        method: one of METHODS.
        scheme: of every linear layer that no rule below names.
        ignore: module names left in floating point: full names, suffixes of whole name parts, class
            names, or "re:" patterns.
        overrides: (pattern, scheme or None) pairs, first match wins; None leaves the module in
            floating point.
        raw: the configuration as it stood in the file.
    """

    method: str
    scheme: LinearScheme | None
    ignore: tuple[str, ...] = ()
    overrides: tuple[tuple[str, LinearScheme | None], ...] = ()
    raw: dict[str, Any] = field(default_factory=dict)

    def for_module(self, name: str) -> LinearScheme | None:
        """Scheme of the linear layer with this full checkpoint name, e.g.
        `model.layers.0.mlp.down_proj`; None: not quantised.
        """
        if any(matches(pattern, name) for pattern in self.ignore):
            return None
        for pattern, scheme in self.overrides:
            if matches(pattern, name):
                return scheme
        return self.scheme


def matches(pattern: str, name: str) -> bool:
    """Whether a rule of a quantisation config names this module.

    "re:..." is a regular expression from the start of the name; "Linear" stands for every linear
    layer; other patterns are a full name or whole dotted parts of it ("lm_head", "mlp.gate",
    "layers.0").
    """
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error as error:
            raise QuantError(
                f"quantization_config: {pattern!r} must be a regular expression, got one that does "
                f"not compile ({error}); fix config.json"
            ) from error
    pattern = pattern.rstrip(".")  # published files list "model.layers.0."
    return pattern == "Linear" or f".{pattern}." in f".{name}."


def read_quant_config(path: str | os.PathLike[str]) -> QuantConfig | None:
    """The quantisation of the checkpoint folder `path`, or None when its weights are plain.

    Raises:
        QuantError: the method, or an option of it, is not supported; the message lists what is.
    """
    folder = Path(path)
    raw: dict[str, Any] | None = None
    config = folder / "config.json"
    if config.is_file():
        content = _json_object(config)
        raw = content.get("quantization_config") or content.get("compression_config")
        if raw is not None and not isinstance(raw, Mapping):
            raise QuantError(
                f"{config}: quantization_config must be an object, got {raw!r}; fix config.json"
            )
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if raw is None and (folder / name).is_file():
            raw = {"quant_method": method, **_json_object(folder / name)}
    return None if raw is None else parse_quant_config(raw)


def _json_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise QuantError(
            f"{file}: must be valid JSON, got {error}; download the file again"
        ) from error
    if not isinstance(content, dict):
        raise QuantError(
            f"{file}: must hold a JSON object, got {type(content).__name__}; download the file "
            "again"
        )
    return content


def parse_quant_config(raw: Mapping[str, Any]) -> QuantConfig:
    """See `read_quant_config`; `raw` is the `quantization_config` dictionary."""
    raw = dict(raw)
    method = str(raw.get("quant_method") or _guess_method(raw))
    parsers = {
        "gptq": _gptq,
        "awq": _awq,
        "compressed-tensors": _compressed_tensors,
        "bitsandbytes": _bitsandbytes,
        "fastinfer": _native,
    }
    if method not in parsers:
        raise QuantError(
            f"quantization_config: quant_method must be one of {', '.join(METHODS)}, got "
            f"{method!r}; use a checkpoint in one of these formats or the unquantised one"
        )
    config = parsers[method](raw)
    config.raw = raw
    return config


def _guess_method(raw: Mapping[str, Any]) -> str:
    """Old files carry no quant_method."""
    if "config_groups" in raw:
        return "compressed-tensors"
    if "load_in_4bit" in raw or "load_in_8bit" in raw:
        return "bitsandbytes"
    if "desc_act" in raw:
        return "gptq"
    if "w_bit" in raw or "zero_point" in raw:
        return "awq"
    return "none"


def _bits(method: str, value: Any, allowed: tuple[int, ...]) -> int:
    if value not in allowed:
        raise QuantError(
            f"quantization_config: {method} bits must be {' or '.join(map(str, allowed))}, got "
            f"{value!r}; requantise the model at one of these"
        )
    return int(value)


def _group_size(where: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or (value < 1 and value != -1):
        raise QuantError(
            f"quantization_config: {where} group_size must be -1 or a positive integer, got "
            f"{value!r}; fix config.json"
        )
    return value


def _gptq(raw: Mapping[str, Any]) -> QuantConfig:
    style = str(raw.get("checkpoint_format") or raw.get("format") or "gptq")
    if raw.get("is_marlin_format"):
        style = "marlin"
    if style not in ("gptq", "gptq_v2"):
        raise QuantError(
            f"quantization_config: checkpoint_format must be gptq or gptq_v2, got {style!r}; that "
            "is the layout of one kernel, use the original GPTQ files"
        )
    scheme = LinearScheme(
        "gptq",
        _bits("gptq", raw.get("bits"), (4, 8)),
        _group_size("gptq", raw.get("group_size", -1)),
        None if raw.get("sym") is None else bool(raw["sym"]),
        act_order=bool(raw.get("desc_act", False)),
        style=style,
    )
    ignore = list(_names(raw, "modules_to_not_convert"))
    if not raw.get("lm_head", False):
        ignore.append("lm_head")
    overrides: list[tuple[str, LinearScheme | None]] = []
    # GPTQModel: {"-:regex": {}} skips, {"+:regex" or "regex": {"bits": 8, ...}} overrides; regexes
    # match from the start of the name.
    for pattern, options in _object(raw, "dynamic").items():
        if pattern.startswith("-:"):
            overrides.append(("re:" + pattern[2:], None))
            continue
        options = _object({pattern: options}, pattern, "dynamic.")
        sym = options.get("sym", scheme.symmetric)
        special = replace(
            scheme,
            bits=_bits("gptq", options.get("bits", scheme.bits), (4, 8)),
            group_size=_group_size("gptq", options.get("group_size", scheme.group_size)),
            symmetric=None if sym is None else bool(sym),
            act_order=bool(options.get("desc_act", scheme.act_order)),
        )
        overrides.append(("re:" + pattern.removeprefix("+:"), special))
    # [["self_attn.q_proj", ...], ...]: what is quantised inside each block, and nothing else.
    key = "modules_in_block_to_quantize"
    groups = raw.get(key) or []
    groups = groups if isinstance(groups, list) else [groups]
    inside = [name for group in groups for name in _names({key: group}, key)]
    overrides += [(module, scheme) for module in inside]
    return QuantConfig("gptq", None if inside else scheme, tuple(ignore), tuple(overrides))


def _names(raw: Mapping[str, Any], key: str, where: str = "") -> tuple[str, ...]:
    """The names under a key, a single one or a list; none where it is absent."""
    value = raw.get(key)
    names = [value] if isinstance(value, str) else () if value is None else value
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise QuantError(
            f"quantization_config: {where}{key} must be a list of names, got {value!r:.80}; fix "
            "config.json"
        )
    return tuple(names)


def _object(raw: Mapping[str, Any], key: str, where: str = "") -> Mapping[str, Any]:
    """The JSON object under a key; empty where it is absent."""
    value = raw.get(key) or {}
    if not isinstance(value, Mapping):
        raise QuantError(
            f"quantization_config: {where}{key} must be an object, got {value!r:.80}; fix "
            "config.json"
        )
    return value


def _awq(raw: Mapping[str, Any]) -> QuantConfig:
    style = str(raw.get("version", "gemm")).lower()
    if style != "gemm":
        raise QuantError(
            f"quantization_config: awq version must be gemm, got {style!r}; convert the "
            "checkpoint to the GEMM layout"
        )
    scheme = LinearScheme(
        "awq",
        _bits("awq", raw.get("bits", raw.get("w_bit", 4)), (4,)),
        _group_size("awq", raw.get("group_size", raw.get("q_group_size", 128))),
        not raw.get("zero_point", True),
        style=style,
    )
    return QuantConfig("awq", scheme, ("lm_head", *_names(raw, "modules_to_not_convert")))


def _compressed_tensors(raw: Mapping[str, Any]) -> QuantConfig:
    status = raw.get("quantization_status", "compressed")
    if status not in ("compressed", "frozen"):
        raise QuantError(
            f"quantization_config: quantization_status must be compressed, got {status!r}"
        )
    overrides: list[tuple[str, LinearScheme | None]] = []
    groups = _object(raw, "config_groups")
    for label in groups:
        group = _object(groups, label, "config_groups.")
        style = str(group.get("format") or raw.get("format", "pack-quantized"))
        scheme = _compressed_group(label, group, style)
        targets = _names({"targets": ["Linear"], **group}, "targets", f"config_groups.{label}.")
        overrides += [(target, scheme) for target in targets]
    if not overrides:
        raise QuantError(
            "quantization_config: config_groups is empty, so nothing says how weights are stored"
        )
    if raw.get("kv_cache_scheme"):
        note("kv_cache_scheme", "ignored, the KV cache has the dtype that the engine is given")
    # Specific targets before the class name, whatever the order in the file.
    overrides.sort(key=lambda rule: rule[0] == "Linear")
    return QuantConfig("compressed-tensors", None, _names(raw, "ignore"), tuple(overrides))


def _compressed_group(label: str, group: Mapping[str, Any], style: str) -> LinearScheme:
    where = f"quantization_config: config_groups.{label}"
    weights, inputs = (
        _object(group, key, f"config_groups.{label}.") for key in ("weights", "input_activations")
    )
    if style not in ("pack-quantized", "int-quantized", "naive-quantized"):
        raise QuantError(f"{where}: format must be pack-quantized or int-quantized, got {style!r}")
    if weights.get("type", "int") != "int":
        raise QuantError(f"{where}: weights.type must be int, got {weights.get('type')!r}")
    strategy = weights.get("strategy") or ("group" if weights.get("group_size") else "channel")
    if strategy not in ("group", "channel", "tensor"):
        raise QuantError(
            f"{where}: weights.strategy must be group, channel or tensor, got {strategy!r}"
        )
    bits = _bits("compressed-tensors", weights.get("num_bits"), (4, 8))
    activations = None
    if inputs:
        dynamic_int8 = inputs.get("num_bits") == 8 and inputs.get("type", "int") == "int"
        dynamic_int8 &= inputs.get("strategy") == "token" and bool(inputs.get("dynamic"))
        if (
            not dynamic_int8
            or not inputs.get("symmetric", True)
            or not weights.get("symmetric", True)
            or bits != 8
            or strategy == "group"
        ):
            raise QuantError(
                f"{where}: input_activations must be absent or dynamic symmetric 8-bit int per "
                f"token with symmetric 8-bit weights per channel, got {dict(inputs)}"
            )
        activations = "int8_token"
    return LinearScheme(
        "compressed-tensors",
        bits,
        _group_size(where, weights.get("group_size")) if strategy == "group" else -1,
        bool(weights.get("symmetric", True)),
        act_order=weights.get("actorder") in ("group", "dynamic", True),
        style="pack-quantized" if style == "pack-quantized" else "int-quantized",
        activations=activations,
    )


def _bitsandbytes(raw: Mapping[str, Any]) -> QuantConfig:
    if raw.get("load_in_8bit") or raw.get("_load_in_8bit"):
        scheme = LinearScheme("bitsandbytes", 8, -1, True, style="int8")
    elif raw.get("load_in_4bit") or raw.get("_load_in_4bit"):
        kind = str(raw.get("bnb_4bit_quant_type", "fp4"))
        scheme = LinearScheme("bitsandbytes", 4, 64, True, style=kind)
    else:
        raise QuantError(
            "quantization_config: bitsandbytes needs load_in_8bit or load_in_4bit set to true"
        )
    skipped = _names(raw, "llm_int8_skip_modules") or ("lm_head",)
    return QuantConfig("bitsandbytes", scheme, skipped)


def _native(raw: Mapping[str, Any]) -> QuantConfig:
    bits = _bits("fastinfer", raw.get("bits"), (4, 8))
    activations = raw.get("activations")
    if activations not in (None, "int8_token"):
        raise QuantError(
            f"quantization_config: activations must be absent or 'int8_token', got {activations!r}"
        )
    scheme = LinearScheme(
        "fastinfer",
        bits,
        _group_size("fastinfer", raw.get("group_size", -1)),
        bool(raw.get("symmetric", True)),
        act_order=bool(raw.get("act_order", False)),
        activations=activations,
    )
    # An empty list is an answer: the head may be quantised, too.
    return QuantConfig("fastinfer", scheme, _names({"ignore": ["lm_head"], **raw}, "ignore"))
