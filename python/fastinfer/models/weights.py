"""Which checkpoint tensor fills which parameter, for each family, and the check that all match.

The expected tensors are enumerated from the configuration, so "every parameter filled, every tensor
used" is a comparison of two sets of names, made from the file headers before any data is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..quant.config import LinearScheme, QuantConfig
from ..quant.formats import check_headers, is_plain, tensor_names
from ..quant.notes import note
from .config import ModelConfig
from .decoder import CausalLM
from .layers import Layer
from .shard import Shard

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
KV_SCALES = (".k_scale", ".v_scale", ".k_zero_point", ".v_zero_point", ".output_scale")


@dataclass(frozen=True, slots=True)
class Target:
    """Where one checkpoint tensor goes."""

    module: str  # dotted path of a `Layer` in the model
    param: str  # "weight" or "bias"
    parts: tuple[str, ...] = ()  # row blocks of a fused layer, in the tensor's order; (): all

    @property
    def is_linear_weight(self) -> bool:
        """Whether it may be stored quantised."""
        linear = self.module.endswith("_proj") or self.module == "lm_head"
        return linear and self.param == "weight"


@dataclass(frozen=True, slots=True)
class QuantizedTarget:
    """Where the weight of one quantised linear layer goes."""

    module: str
    parts: tuple[str, ...]
    scheme: LinearScheme
    tensors: frozenset[str]  # the tensors that hold it


@dataclass(slots=True)
class TensorPlan:
    """What becomes of every tensor of a checkpoint."""

    plain: dict[str, Target]  # tensor name -> parameter
    quantized: dict[str, QuantizedTarget]  # name of a linear layer in the checkpoint -> layer
    zero_biases: frozenset[str]  # biases that the model does not have and that must be zero


def weight_targets(config: ModelConfig) -> dict[str, Target]:
    """Checkpoint tensor name -> target, for every tensor such a checkpoint must hold."""
    targets = {EMBEDDING: Target("embed_tokens", "weight")}
    for i in range(config.num_layers):
        targets.update(_layer_targets(config, f"model.layers.{i}.", f"layers.{i}."))
    targets["model.norm.weight"] = Target("norm", "weight")
    if not config.tie_word_embeddings:
        targets[HEAD] = Target("lm_head", "weight")
    return targets


def targets_here(targets: Mapping[str, Target], shard: Shard, tied: bool) -> dict[str, Target]:
    """Those of a part of the model, with the paths of its modules.

    Args:
        targets: of the whole model.
        shard: which part.
        tied: whether the embedding is the output head too.
    """
    if shard.num_layers is None:
        return dict(targets)
    here = {}
    for name, target in targets.items():
        kind, _, rest = target.module.partition(".")
        if kind == "layers":
            number, _, path = rest.partition(".")
            at = int(number) - shard.first_layer
            if 0 <= at < shard.num_layers:
                here[name] = replace(target, module=f"layers.{at}.{path}")
        elif (
            shard.is_last if kind != "embed_tokens" else shard.is_first or (tied and shard.is_last)
        ):
            here[name] = target
    return here


def _layer_targets(config: ModelConfig, theirs: str, ours: str) -> dict[str, Target]:
    attn, mlp = theirs + "self_attn.", theirs + "mlp."
    if config.packed_qkv:
        fused = [(attn + "W_pack", "attn.qkv_proj", ("q", "k", "v"), config.qkv_bias)]
    else:
        fused = [
            (f"{attn}{part}_proj", "attn.qkv_proj", (part,), config.qkv_bias) for part in "qkv"
        ]
    linears = [
        *fused,
        (attn + "o_proj", "attn.o_proj", (), config.o_bias),
        (mlp + "gate_proj", "mlp.gate_up_proj", ("gate",), config.mlp_bias),
        (mlp + "up_proj", "mlp.gate_up_proj", ("up",), config.mlp_bias),
        (mlp + "down_proj", "mlp.down_proj", (), config.mlp_bias),
    ]
    targets = {}
    for name, module, parts, bias in linears:
        for param in ("weight", "bias") if bias else ("weight",):
            targets[f"{name}.{param}"] = Target(ours + module, param, parts)
    norms = {"input_layernorm": "input_norm", "post_attention_layernorm": "post_norm"}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"}
    for name, module in norms.items():
        targets[f"{theirs}{name}.weight"] = Target(ours + module, "weight")
    return targets


def plan_tensors(
    model: CausalLM,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
    quant: QuantConfig | None = None,
) -> TensorPlan:
    """Match the tensors of a checkpoint with the parameters of a model.

    Args:
        model: the whole or a part, on any device including meta.
        config: of the whole model.
        shapes: tensor name -> shape, for all tensors in the files.
        dtypes: tensor name -> dtype as safetensors spells it.
        quant: how the linear layers are stored; None: in floating point.

    Returns:
        What to do with each tensor that goes into this part.

    Raises:
        ValueError: a tensor is missing, superfluous, of another shape, or not stored as floating
            point nor as quantization_config says.
    """
    plain = weight_targets(config)
    quantized = {} if quant is None else _quantized_targets(plain, quant, dtypes)
    required = set()
    for name, target in quantized.items():
        del plain[f"{name}.weight"]
        required |= {n for n, must in tensor_names(name, target.scheme).items() if must}
    used = {*plain, *(name for target in quantized.values() for name in target.tensors)}
    # GPTQ packers write a bias for every layer, all zero where the model has none.
    zero_biases = frozenset(
        bias
        for bias in (f"{name}.bias" for name in quantized)
        if bias in shapes and bias not in used
    )
    missing = [name for name in (*plain, *sorted(required)) if name not in shapes]
    unused = [
        name
        for name in shapes
        if name not in used and name not in zero_biases and not _harmless(name, config, quant)
    ]
    if missing or unused:
        found = "; ".join(
            f"{what} {_listed(names)}"
            for what, names in (("missing", missing), ("not used by the model", unused))
            if names
        )
        how = "" if quant is None else f" and quantization_config ({quant.method})"
        raise ValueError(
            f"load_model: the checkpoint must hold exactly the tensors of {config.architecture} as "
            f"config.json{how} describes it, got {found}; check that config.json belongs to these "
            "weights and that no shard is missing"
        )
    here = targets_here(weight_targets(config), model.shard, config.tie_word_embeddings)
    plain = {name: here[name] for name in plain if name in here}
    quantized = {
        name: replace(target, module=here[f"{name}.weight"].module)
        for name, target in quantized.items()
        if f"{name}.weight" in here
    }
    _check_plain(model, plain, shapes, dtypes)
    for name, target in quantized.items():
        layer = model.get_submodule(target.module)
        assert isinstance(layer, Layer)
        rows, columns = layer.part_shape("weight", target.parts)
        check_headers(name, target.scheme, shapes, dtypes, columns, rows)
    return TensorPlan(plain, quantized, zero_biases)


def _quantized_targets(
    targets: Mapping[str, Target], quant: QuantConfig, dtypes: Mapping[str, str]
) -> dict[str, QuantizedTarget]:
    found = {}
    for tensor, target in targets.items():
        name = tensor.removesuffix(".weight")
        if not target.is_linear_weight:
            continue
        scheme = quant.for_module(name)
        if scheme is None:
            continue
        if is_plain(name, scheme, dtypes):
            note(name, "stored in floating point although quantization_config does not except it")
            continue
        names = frozenset(n for n in tensor_names(name, scheme) if n in dtypes)
        found[name] = QuantizedTarget(target.module, target.parts, scheme, names)
    return found


def _check_plain(
    model: CausalLM,
    targets: Mapping[str, Target],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, str],
) -> None:
    for name, target in targets.items():
        layer = model.get_submodule(target.module)
        assert isinstance(layer, Layer)
        expected = layer.part_shape(target.param, target.parts)
        if shapes[name] != expected:
            raise ValueError(
                f"load_model: {name} must have shape {list(expected)}, got {list(shapes[name])}; "
                "check that config.json belongs to these weights"
            )
        if dtypes[name] not in ("F16", "BF16", "F32", "F64"):
            raise ValueError(
                f"load_model: {name} must be stored as F16, BF16, F32 or F64, got {dtypes[name]}; "
                "quantised weights need a quantization_config that describes them"
            )


def _harmless(name: str, config: ModelConfig, quant: QuantConfig | None) -> bool:
    """What files carry and nobody needs: frequency buffers, a copy of tied weights, scales of an
    8-bit KV cache that this engine does not build.
    """
    if name.endswith("rotary_emb.inv_freq"):
        return True
    if quant is not None and quant.raw.get("kv_cache_scheme") and name.endswith(KV_SCALES):
        return True
    return name == HEAD and config.tie_word_embeddings


def _listed(names: list[str], limit: int = 8) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
