"""Quantised linear modules: forward, bias, state dict, layouts, fusing."""

from __future__ import annotations

import copy

import pytest
import quant_packers as qp
import torch
from torch import nn

from fastinfer.quant import (
    CanonicalWeight,
    Int8Weight,
    LinearScheme,
    QuantError,
    QuantLinear,
    W8A8Linear,
)
from fastinfer.quant.canonical import concat, concat_int8, same_columns
from fastinfer.quant.formats import read_linear
from fastinfer.quant.fused import DenseLinear, FusedLinear, runnable, stack
from fastinfer.quant.packed import pack, unpack


def canonical(n: int = 40, k: int = 72, **options: object) -> CanonicalWeight:
    group_size = options.get("group_size", 16)
    symmetric = options.get("symmetric", True)
    w = qp.random_weight(n, k, **options)
    scheme = LinearScheme("fastinfer", w.bits, group_size, symmetric)
    tensors = {f"m.{name}": t for name, t in qp.native(w, symmetric=symmetric).items()}
    return read_linear("m", tensors, scheme, k, n)


def int8(n: int = 40, k: int = 72, seed: int = 0) -> Int8Weight:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (n, k), dtype=torch.int8, generator=g)
    return Int8Weight(codes, torch.rand(n, generator=g) * 0.01)


KINDS = [
    {"bits": bits, "symmetric": symmetric, "act_order": act_order, "group_size": group_size}
    for bits in (4, 8)
    for symmetric in (True, False)
    for act_order, group_size in ((False, 16), (True, 16), (False, 40), (False, -1))
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_one_hot_inputs_give_the_weights(kind: dict[str, object]) -> None:
    weight = canonical(**kind)
    layer = QuantLinear.from_canonical(weight)
    assert torch.equal(layer(torch.eye(72)).t(), weight.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(72,), (5, 72), (2, 3, 72), (0, 72)])
def test_forward_like_nn_linear(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    weight = canonical(act_order=True, symmetric=False)
    weight.bias = torch.randn(40)
    layer = QuantLinear.from_canonical(weight)
    x = torch.randn(shape).to(dtype)
    out = layer(x)
    expected = nn.functional.linear(x.float(), weight.dequantize(), weight.bias.to(dtype).float())
    assert out.dtype == dtype and out.shape == expected.shape
    torch.testing.assert_close(
        out.float(), expected, rtol=1e-2, atol=2e-2 if dtype != x.float().dtype else 1e-4
    )
    assert (layer.in_features, layer.out_features) == (72, 40)
    assert "bits=4, group_size=16, act_order=True" in repr(layer)


def test_w8a8_forward() -> None:
    weight = int8()
    weight.bias = torch.randn(40)
    layer = W8A8Linear.from_canonical(weight)
    x = torch.randn(2, 5, 72)
    expected = nn.functional.linear(x, weight.dequantize(), weight.bias)
    assert (layer(x) - expected).norm() / expected.norm() < 0.02
    assert not torch.equal(layer(x), expected)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("layout", ["cpu", "cuda"])
def test_unpacking_gives_back_every_bit(
    kind: dict[str, object], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastinfer.quant.packed.layout_of", lambda device: layout)
    monkeypatch.setattr("fastinfer.quant.packed._ROWS_AT_ONCE", 64)
    weight = canonical(n=200, **kind)
    packed = pack(weight, torch.device("cpu"))
    back = unpack(
        packed,
        bits=weight.bits,
        group_size=weight.group_size,
        out_features=200,
        in_features=72,
        scale_dtype=weight.scales.dtype,
        zero_dtype=None if weight.zeros is None else weight.zeros.dtype,
    )
    assert torch.equal(back.codes, weight.codes)
    assert back.scales.dtype == torch.float16 and torch.equal(back.scales, weight.scales)
    if weight.zeros is not None:
        assert back.zeros.dtype == torch.uint8 and torch.equal(back.zeros, weight.zeros)


def same_state(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        left[k].dtype == right[k].dtype and torch.equal(left[k], right[k]) for k in left
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_state_dict_is_the_native_format(kind: dict[str, object]) -> None:
    w = qp.random_weight(40, 72, seed=3, **kind)
    weight = canonical(seed=3, **kind)
    weight.bias = torch.randn(40)
    layer = nn.Sequential(QuantLinear.from_canonical(weight))
    state = layer.state_dict()
    expected = qp.native(w, symmetric=kind["symmetric"]) | {"bias": weight.bias}
    assert state.keys() == {f"0.{name}" for name in expected}
    assert all(torch.equal(state[f"0.{name}"], t) for name, t in expected.items())
    empty = QuantLinear(72, 40, bits=w.bits, group_size=kind["group_size"], bias=True)
    other = nn.Sequential(empty)
    other.load_state_dict(state)
    assert same_state(layer, other)
    x = torch.randn(3, 72)
    assert torch.equal(layer(x), other(x))


def test_w8a8_state_dict() -> None:
    layer = W8A8Linear.from_canonical(int8())
    other = W8A8Linear(72, 40)
    other.load_state_dict(layer.state_dict())
    assert layer.state_dict().keys() == {"weight", "weight_scale"}
    assert same_state(layer, other)


def test_float_zeros_survive() -> None:
    weight = canonical()
    weight.zeros = torch.randn(40, 5).bfloat16()
    layer = QuantLinear.from_canonical(weight)
    state = layer.state_dict()
    assert state["zeros"].dtype == torch.bfloat16
    other = QuantLinear(72, 40, group_size=16)
    other.load_state_dict(state)
    assert same_state(layer, other)
    assert torch.equal(other(torch.eye(72)).t(), weight.dequantize())


def test_reloading_may_change_the_kind_of_weight() -> None:
    layer = QuantLinear.from_canonical(canonical(symmetric=False, act_order=True))
    other = QuantLinear.from_canonical(canonical(seed=1))
    layer.load_state_dict(other.state_dict())
    assert layer.perm is None and same_state(layer, other)


def test_wrong_state_dicts() -> None:
    layer = QuantLinear(72, 40, group_size=16)
    state = QuantLinear.from_canonical(canonical()).state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*scales"):
        layer.load_state_dict({"qweight": state["qweight"]})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        layer.load_state_dict(state | {"bias": torch.zeros(40)})
    with pytest.raises(RuntimeError, match=r"qweight: must be torch.int32 \[9, 40\].*\[8, 40\]"):
        layer.load_state_dict(state | {"qweight": state["qweight"][:8]})
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        QuantLinear(72, 40, group_size=16, bias=True).load_state_dict(state)


def test_empty_layers_say_so() -> None:
    for layer in (QuantLinear(72, 40), W8A8Linear(72, 40)):
        with pytest.raises(RuntimeError, match="weights must be loaded first"):
            layer(torch.randn(1, 72))
        with pytest.raises(RuntimeError, match="weights must be loaded first"):
            layer.state_dict()


def test_wrong_options() -> None:
    with pytest.raises(QuantError, match="bits must be 4 or 8, got 3"):
        QuantLinear(72, 40, bits=3)
    with pytest.raises(QuantError, match=r"group_size must be .* got 12"):
        QuantLinear(72, 40, group_size=12)


@pytest.mark.parametrize("kind", ["w4", "w8a8"])
def test_dtype_changes_leave_the_scales_alone(kind: str) -> None:
    weight = canonical(scale_dtype=torch.float32) if kind == "w4" else int8()
    weight.bias = torch.randn(40).bfloat16()
    cls = QuantLinear if kind == "w4" else W8A8Linear
    layer = cls.from_canonical(weight)
    before = copy.deepcopy(layer)
    layer.half().bfloat16()
    assert same_state(layer, before)
    assert layer.bias.dtype == torch.bfloat16


def test_moving_to_another_layout_packs_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with the other layout, played by the CPU itself."""
    weight = canonical(symmetric=False, act_order=True, seed=2)
    layer = QuantLinear.from_canonical(weight)
    before = layer.state_dict()
    layouts = iter(["cpu", "cuda"])
    monkeypatch.setattr("fastinfer.quant.layers.layout_of", lambda device: next(layouts))
    monkeypatch.setattr("fastinfer.quant.packed.layout_of", lambda device: "cuda")
    layer.to("cpu")
    assert layer.packed_qweight.shape[-1] == 512
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_state_on_meta() -> None:
    layer = QuantLinear.from_canonical(canonical()).to("meta")
    assert layer.packed_qweight.is_meta
    with torch.device("meta"):
        empty = QuantLinear(72, 40, group_size=16, bias=True)
    empty.to_empty(device="cpu")
    weight = canonical()
    weight.bias = torch.randn(40)
    empty.load_state_dict(QuantLinear.from_canonical(weight).state_dict())
    torch.testing.assert_close(
        empty(torch.eye(72)).t(), weight.dequantize() + weight.bias[:, None], rtol=0, atol=1e-6
    )


def test_canonical_rows_and_stacking() -> None:
    parts = [canonical(symmetric=False), canonical(seed=1), canonical(n=8, seed=2)]
    whole = concat(parts)
    expected = torch.cat([w.dequantize() for w in parts])
    assert torch.equal(whole.dequantize(), expected)
    assert torch.equal(whole.rows(30, 50).dequantize(), expected[30:50])
    assert same_columns(parts)
    assert not same_columns([parts[0], canonical(group_size=24)])
    assert not same_columns([parts[0], canonical(bits=8)])
    assert not same_columns([parts[0], canonical(act_order=True)])
    assert not same_columns([canonical(act_order=True), canonical(act_order=True, seed=1)])
    with_float = canonical()
    with_float.zeros = torch.randn(40, 5)
    assert not same_columns([parts[1], with_float])
    with pytest.raises(QuantError, match="differ"):
        concat([parts[0], with_float])
    parts[1].bias = torch.randn(40)
    bias = concat(parts).bias
    assert torch.equal(bias, torch.cat([torch.zeros(40), parts[1].bias, torch.zeros(8)]))
    stacked = concat_int8([int8(), int8(seed=1)])
    assert torch.equal(stacked.rows(40, 80).dequantize(), int8(seed=1).dequantize())


def fused(weights: list[object]) -> FusedLinear:
    return FusedLinear(weights, dtype=torch.float32, device=torch.device("cpu"))


def test_equal_columns_become_one_weight() -> None:
    shared = [canonical(act_order=True), canonical(symmetric=False)]
    shared[1].perm = shared[0].perm
    assert len(fused(shared).linears) == 1
    assert len(fused([int8(), int8(seed=1)]).linears) == 1
    assert len(fused([torch.randn(3, 72), torch.randn(5, 72)]).linears) == 1
    mixed = [canonical(), canonical(seed=1), canonical(bits=8), int8(), torch.randn(3, 72)]
    assert [type(w) for w in stack(mixed)] == [
        CanonicalWeight,
        CanonicalWeight,
        Int8Weight,
        torch.Tensor,
    ]


@pytest.mark.parametrize("shape", [(72,), (5, 72), (2, 3, 72), (0, 72)])
def test_different_orders_write_slices_of_one_output(shape: tuple[int, ...]) -> None:
    weights = [
        canonical(n=24, act_order=True),
        canonical(n=13, act_order=True, seed=1),
        canonical(n=9, bits=8, group_size=-1),
        torch.randn(7, 72),
    ]
    layer = fused(weights)
    assert [type(m) for m in layer.linears] == [QuantLinear] * 3 + [DenseLinear]
    assert (layer.in_features, layer.out_features) == (72, 53)
    dense = torch.cat([w if isinstance(w, torch.Tensor) else w.dequantize() for w in weights])
    x, bias = torch.randn(shape), torch.randn(53)
    for b in (None, bias):
        torch.testing.assert_close(
            layer(x, b), nn.functional.linear(x, dense, b), rtol=1e-5, atol=1e-4
        )


def test_what_no_kernel_reads(caplog: pytest.LogCaptureFixture) -> None:
    odd = canonical(group_size=12)
    dense = runnable("m", odd)
    assert isinstance(dense, torch.Tensor) and torch.equal(dense, odd.dequantize())
    assert "m: dequantised" in caplog.text and "12" in caplog.text
    again = runnable("m", dense, 8)
    assert (again.bits, again.group_size) == (8, 64)
    assert (again.dequantize() - dense).norm() / dense.norm() < 0.02
    fine = canonical()
    assert runnable("m", fine, 4) is fine


def test_forward_compiles() -> None:
    weight = canonical(act_order=True)
    layer = QuantLinear.from_canonical(weight)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for m in (1, 3):
            x = torch.randn(m, 72)
            assert torch.equal(compiled(x), layer(x))
