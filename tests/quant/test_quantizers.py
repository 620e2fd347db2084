"""The quantizers on single weights: grids, GPTQ, AWQ, SmoothQuant, and quantize_model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fastinfer.quant import CanonicalWeight, QuantError, QuantLinear, W8A8Linear, quantize_model
from fastinfer.quant import awq as awq_module
from fastinfer.quant.folding import fold_into_norm, fold_into_rows
from fastinfer.quant.gptq import Factor, Moments, factorize, gptq, output_loss, strip_width
from fastinfer.quant.rtn import GridOptions, find_grid, on_grid, rtn, rtn_int8, weight_error
from fastinfer.quant.smoothquant import fake_quantize_tokens, smooth_factors


def options(bits: int = 4, group_size: int = 128, symmetric: bool = True) -> GridOptions:
    return GridOptions(bits, group_size, symmetric, torch.float32)


# Expected relative errors on Gaussian weights, from an independent simulation.
GAUSSIAN = [
    (4, 32, True, 0.097),
    (4, 64, True, 0.108),
    (4, 128, True, 0.117),
    (4, -1, True, 0.157),
    (4, 32, False, 0.081),
    (4, 64, False, 0.091),
    (4, 128, False, 0.101),
    (4, -1, False, 0.140),
    (8, 32, True, 0.0053),
    (8, -1, True, 0.0087),
]


@pytest.mark.parametrize(("bits", "group_size", "symmetric", "expected"), GAUSSIAN)
def test_rtn_error_on_gaussian_weights(
    bits: int, group_size: int, symmetric: bool, expected: float
) -> None:
    weight = torch.randn(128, 4096)
    stored = rtn(weight, options(bits, group_size, symmetric)).validate("w")
    assert weight_error(weight, stored.dequantize()) == pytest.approx(expected, rel=0.03)


def test_int8_weights_and_activations_on_gaussian_values() -> None:
    weight = torch.randn(64, 4096)
    assert weight_error(weight, rtn_int8(weight).dequantize()) == pytest.approx(0.0087, rel=0.03)
    assert weight_error(weight, fake_quantize_tokens(weight)) == pytest.approx(0.0087, rel=0.03)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_rtn_is_half_a_step_off_at_most(bits: int, symmetric: bool) -> None:
    weight = torch.randn(17, 90) * torch.logspace(-3, 3, 17)[:, None]
    opt = options(bits, 32, symmetric)  # the last group is short
    stored = rtn(weight, opt).validate("w")
    step = stored.scales.repeat_interleave(32, 1)[:, :90]
    # An asymmetric zero point is rounded, which can clip the ends by half a step.
    assert ((stored.dequantize() - weight).abs() <= step * (0.5001 if symmetric else 1.0001)).all()


def test_rounding_uses_the_scale_as_stored() -> None:
    """With fp16 scales the codes are the nearest ones for the fp16 value, not the fp32 one."""
    weight = torch.randn(8, 128)
    stored = rtn(weight, GridOptions(8, -1, True, torch.bfloat16))
    nearest = (weight / stored.scales.float()).round().clamp(-128, 127) + 128
    assert stored.scales.dtype == torch.bfloat16
    assert torch.equal(stored.codes, nearest.to(torch.uint8))


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_groups_and_vanishing_scales(symmetric: bool) -> None:
    weight = torch.zeros(3, 64)
    weight[1, :32] = 1e-12  # its scale is 0 in fp16
    stored = rtn(weight, GridOptions(4, 32, symmetric, torch.float16)).validate("w")
    assert (stored.scales == 1).all()
    assert torch.equal(stored.dequantize(), torch.zeros(3, 64))


def test_clip_search_lowers_the_error() -> None:
    weight = torch.randn(16, 256)
    opt = options()
    plain, clipped = rtn(weight, opt).dequantize(), rtn(weight, opt, clip=True).dequantize()
    assert weight_error(weight, clipped) < 0.97 * weight_error(weight, plain)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_weights_are_refused(bad: float) -> None:
    weight = torch.ones(4, 32)
    weight[2, 3] = bad
    for run in (lambda: rtn(weight, options()), lambda: rtn_int8(weight)):
        with pytest.raises(QuantError, match="weights must be finite"):
            run()
    with pytest.raises(QuantError, match="inputs must be finite"):
        Moments(32).add(weight)
    with pytest.raises(QuantError, match="scales below"):
        rtn(torch.full((1, 32), 1e7), GridOptions(4, 32, True, torch.float16))


@pytest.mark.parametrize(
    "wrong", [{"bits": 3}, {"group_size": 0}, {"scale_dtype": torch.float64}], ids=str
)
def test_bad_options_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"quantize: {next(iter(wrong))} must be"):
        GridOptions(**wrong)


# ---- GPTQ ------------------------------------------------------------------------------------


def correlated(rows: int, k: int, rank: int = 8) -> Tensor:
    return torch.randn(rows, rank) @ torch.randn(rank, k) + 0.3 * torch.randn(rows, k)


def loss_of(weight: Tensor, rounded: Tensor, moments: Tensor) -> float:
    wrong = (weight - rounded).double()
    return float(((wrong @ moments.double()) * wrong).sum())


def moments_of(x: Tensor) -> Tensor:
    return 2 * x.t() @ x / x.shape[0]


def strips_of(x: Tensor, width: int = 128, order: Tensor | None = None) -> Moments:
    moments = Moments(x.shape[1], width=width, order=order)
    for part in x.split(100):
        moments.add(part)
    return moments


def factor_of(
    x: Tensor, opt: GridOptions | None = None, *, act_order: bool = False, static=False, damp=0.01
) -> Factor:
    order = torch.argsort(x.square().sum(0), descending=True) if act_order else None
    width = strip_width(x.shape[1], opt, static_groups=static) if opt else 128

    def refill() -> None:
        moments.clear()
        moments.add(x)

    moments = strips_of(x, width, order)
    return factorize(moments, refill, damp=damp)


def whole(strips: list[Tensor]) -> Tensor:
    """[K, K], upper triangular."""
    out = torch.zeros(strips[-1].shape[0], strips[-1].shape[0])
    for strip in strips:
        out[: strip.shape[0], strip.shape[0] - strip.shape[1] : strip.shape[0]] = strip
    return out.triu()


@pytest.mark.parametrize("width", [5, 6, 128])
@pytest.mark.parametrize("reordered", [False, True])
def test_moments_are_the_running_mean(width: int, reordered: bool) -> None:
    x = torch.randn(257, 12)
    order = torch.randperm(12) if reordered else None
    moments = strips_of(x, width, order)
    want = moments_of(x if order is None else x[:, order])
    assert [s.shape[0] for s in moments.strips] == {5: [5, 10, 12], 6: [6, 12], 128: [12]}[width]
    assert torch.allclose(whole(moments.strips), want.triu(), atol=1e-5)
    for part in (torch.randn(5, 12), x):
        moments.clear()
        moments.add(part)
    assert torch.allclose(whole(moments.strips), want.triu(), atol=1e-5) and moments.count == 257


@pytest.mark.parametrize("width", [32, 48, 128])
def test_the_factor_is_the_root_of_the_moments(width: int) -> None:
    x = correlated(300, 100)
    moments = strips_of(x, width)
    factor = factorize(moments, lambda: None, damp=0.05)
    root = whole(factor.strips)
    want = moments_of(x) + factor.added * torch.eye(100)
    torch.testing.assert_close(root @ root.t(), want, atol=1e-3, rtol=1e-4)
    assert all(a is b for a, b in zip(factor.strips, moments.strips, strict=True))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
def test_gptq_beats_rounding_on_correlated_inputs(
    symmetric: bool, act_order: bool, static: bool
) -> None:
    weight, x = torch.randn(48, 64), correlated(1000, 64)
    opt, moments = options(4, 16, symmetric), moments_of(x)
    factor = factor_of(x, opt, act_order=act_order, static=static)
    stored = gptq(weight, factor, opt, static_groups=static)
    stored.validate("w")
    assert (stored.perm is not None) == (act_order and not static)
    ours = loss_of(weight, stored.dequantize(), moments)
    theirs = loss_of(weight, rtn(weight, opt).dequantize(), moments)
    assert ours < 0.8 * theirs


def slow_gptq(weight: Tensor, moments: Tensor, opt: GridOptions, damp: float) -> Tensor:
    """Column by column with the whole remaining inverse, fp64, no blocks: the published form."""
    w, h = weight.double().clone(), moments.double().clone()
    h.diagonal().add_(damp * h.diagonal().mean())
    inverse = torch.linalg.inv(h)
    out = torch.empty_like(w)
    k, size = w.shape[1], opt.size(w.shape[1])
    whole = GridOptions(opt.bits, -1, opt.symmetric, opt.scale_dtype)
    for i in range(k):
        if i % size == 0:
            grid = find_grid(w[:, i : i + size].float(), whole)
        out[:, i] = on_grid(w[:, i : i + 1].float(), grid, whole).dequantize()[:, 0].double()
        error = (w[:, i] - out[:, i]) / inverse[i, i]
        w -= error[:, None] * inverse[i]
        # Remove the column from the problem (one step of Gaussian elimination).
        inverse -= torch.outer(inverse[:, i], inverse[i]) / inverse[i, i]
    return out.float()


@pytest.mark.parametrize("group_size", [48, 136, -1])
def test_gptq_in_blocks_is_gptq(group_size: int) -> None:
    """Groups that straddle the blocks of 128 columns see all earlier errors."""
    weight, x = torch.randn(8, 200), correlated(1000, 200, rank=30)
    opt, moments = options(4, group_size, False), moments_of(x)
    fast = gptq(weight, factor_of(x, opt), opt).dequantize()
    slow = slow_gptq(weight, moments, opt, 0.01)
    # fp32 and fp64 may round a tie differently, which later columns then follow.
    assert ((fast - slow).abs() < 1e-4).float().mean() > 0.97
    ratio = loss_of(weight, fast, moments) / loss_of(weight, slow, moments)
    assert ratio == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("act_order", [False, True])
def test_output_loss_is_that_of_the_moments(act_order: bool) -> None:
    x, wrong = correlated(300, 40), torch.randn(9, 40)
    x[:, 4] = 0
    factor = factor_of(x, act_order=act_order, damp=0.1)
    expected = 2 * (x @ wrong.t()).square().sum() / 300
    assert output_loss(wrong, factor) == pytest.approx(float(expected), rel=1e-4)


def test_gptq_dead_inputs_and_retries() -> None:
    x = correlated(50, 40)  # fewer rows than a full rank needs once columns repeat
    x[:, 7] = 0
    x[:, 8] = x[:, 9]
    moments = strips_of(x)
    factor = factorize(moments, lambda: (moments.clear(), moments.add(x)), damp=1e-12, retries=12)
    assert factor.dead.nonzero().flatten().tolist() == [7]
    weight = torch.randn(6, 40)
    stored = gptq(weight, factor, options(4, 8, False))
    assert (stored.dequantize()[:, 7] == 0).all()
    assert torch.isfinite(stored.dequantize()).all()
    all_dead = gptq(weight, factorize(Moments(40), lambda: None), options(4, 8))
    assert torch.equal(all_dead.dequantize(), torch.zeros(6, 40))


def test_gptq_damping_grows_until_it_helps() -> None:
    bad = -0.05 * torch.ones(4, 4) + 0.1 * torch.eye(4)  # one eigenvalue is -0.1
    moments = Moments(4)

    def refill() -> None:
        moments.strips[0].copy_(bad)

    refill()
    factor = factorize(moments, refill, damp=0.01)
    assert factor.damp > 1
    refill()
    with pytest.raises(QuantError, match="positive definite"):
        factorize(moments, refill, damp=0.01, retries=1)
    moments.strips[0][1, 2] = float("nan")
    with pytest.raises(QuantError, match="finite"):
        factorize(moments, refill)


# ---- AWQ, SmoothQuant ------------------------------------------------------------------------


def outliers(rows: int, k: int) -> Tensor:
    x = torch.randn(rows, k)
    x[:, ::16] *= 30
    return x


def test_awq_factors_help_where_channels_differ() -> None:
    x, weight, opt = outliers(400, 128), torch.randn(32, 128), options(4, 64, False)
    factors = awq_module.search_factors(weight, x.abs().mean(0), lambda w: x @ w.t(), opt)
    plain = rtn(weight, opt).dequantize()
    scaled = rtn(weight * factors, opt).dequantize() / factors
    assert (x @ (scaled - weight).t()).norm() < 0.7 * (x @ (plain - weight).t()).norm()


def test_awq_survives_dead_channels() -> None:
    x, weight, opt = outliers(100, 64), torch.randn(16, 64), options(4, 32, False)
    x[:, 5], weight[:, 9] = 0, 0
    factors = awq_module.search_factors(weight, x.abs().mean(0), lambda w: x @ w.t(), opt)
    assert torch.isfinite(factors).all()
    assert (factors > 0).all()
    assert factors[5] == 1
    nothing = torch.zeros(64)
    assert (awq_module.search_factors(weight, nothing, lambda w: w, opt) == 1).all()
    share = awq_module.clip_factors(weight, torch.zeros(10, 64), opt)
    assert share.shape == (16, 2)
    assert (share == 1).all()


def test_awq_clip_lowers_the_error_of_outputs() -> None:
    x, weight, opt = torch.randn(300, 96), torch.randn(24, 96), options(4, 32, False)
    weight[:, ::32] *= 6
    share = awq_module.clip_factors(weight, x, opt)
    clipped = on_grid(weight, find_grid(weight, opt, shrink=share), opt).dequantize()
    plain = rtn(weight, opt).dequantize()
    assert (x @ (clipped - weight).t()).norm() < (x @ (plain - weight).t()).norm()


def test_smoothing_makes_w8a8_more_exact_and_survives_dead_channels() -> None:
    x, weight = outliers(400, 128), torch.randn(32, 128)
    x[:, 3], weight[:, 4] = 0, 0
    factors = smooth_factors(weight, x.abs().amax(0))
    assert torch.isfinite(factors).all()
    assert factors[3] == factors[4] == 1

    def error(x: Tensor, weight: Tensor) -> float:
        rounded = fake_quantize_tokens(x) @ rtn_int8(weight).dequantize().t()
        return float((rounded - x @ weight.t()).norm())

    assert error(x / factors, weight * factors) < 0.7 * error(x, weight)


def test_folding_cancels() -> None:
    norm, factors = torch.randn(40).bfloat16().float(), torch.rand(40) + 0.1
    norm[3], factors[5] = 0, 1e-45
    weight, x = torch.randn(8, 40), torch.randn(5, 40)
    before = (x * norm) @ weight.t()
    folded = norm.clone()
    applied = fold_into_norm(folded, factors, torch.bfloat16)
    assert torch.equal(folded, folded.bfloat16().float())
    assert torch.allclose((x * folded) @ (weight * applied).t(), before, atol=1e-4)
    rows, bias = torch.randn(40, 6), torch.randn(40)
    outputs, safe = torch.randn(3, 6) @ rows.t() + bias, factors.clamp(min=0.1)
    divided_rows, divided_bias = rows.clone(), bias.clone()
    fold_into_rows(divided_rows, divided_bias, safe)
    assert torch.allclose(divided_rows * safe[:, None], rows, atol=1e-5)
    assert torch.allclose(divided_bias * safe, bias, atol=1e-5)
    assert outputs.shape == (3, 40)


# ---- quantize_model --------------------------------------------------------------------------


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.lm_head = nn.Linear(64, 50, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.lm_head(self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize("activations", [None, "int8_token"])
def test_quantize_model_swaps_linears_in_place(activations: str | None) -> None:
    model, ids = Toy().eval(), torch.arange(20)[None]
    with torch.no_grad():
        before = model(ids)
        plain = [layer.weight.clone() for layer in model.layers]
        assert quantize_model(model, 8, 32, skip=(), activations=activations) is model
        after = model(ids)
    kind = QuantLinear if activations is None else W8A8Linear
    assert all(isinstance(layer, kind) for layer in model.layers)
    assert type(model.lm_head) is nn.Linear  # tied
    assert type(model.attention.out_proj) is not kind  # a subclass whose weight others read
    assert weight_error(before[0], after[0]) < 0.05
    for weight, layer in zip(plain, model.layers, strict=True):
        stored = layer.canonical()
        expected = (
            rtn(weight, options(8, 32)) if isinstance(stored, CanonicalWeight) else rtn_int8(weight)
        )
        assert torch.equal(stored.codes, expected.codes)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_quantize_model_scale_dtype(scale_dtype: torch.dtype, symmetric: bool) -> None:
    model = Toy()
    weight = model.layers[0].weight.clone()
    quantize_model(model, 4, 16, symmetric, scale_dtype=scale_dtype)
    stored = model.layers[0].canonical()
    expected = rtn(weight, GridOptions(4, 16, symmetric, scale_dtype))
    assert stored.scales.dtype == scale_dtype
    assert torch.equal(stored.scales, expected.scales)
    assert torch.equal(stored.codes, expected.codes)
    assert symmetric or torch.equal(stored.zeros, expected.zeros)


def test_quantize_model_skips_and_refuses() -> None:
    model = Toy()
    quantize_model(model, 4, 64, skip=("layers.1",))
    assert isinstance(model.layers[0], QuantLinear)
    assert type(model.layers[1]) is nn.Linear
    model.layers[1].weight.data[0, 0] = float("nan")
    with pytest.raises(QuantError, match=r"layers\.1: .*finite"):
        quantize_model(model)
    for wrong, match in (
        ({"bits": 5}, "bits"),
        ({"group_size": 12}, "group_size"),
        ({"activations": "fp8"}, "activations"),
        ({"scale_dtype": torch.float64}, "scale_dtype"),
        ({"activations": "int8_token"}, "bits=8"),
    ):
        with pytest.raises(ValueError, match=match):
            quantize_model(Toy(), **wrong)
    with pytest.raises(ValueError, match="linear layer itself"):
        quantize_model(nn.Linear(8, 8))
    with torch.device("meta"):
        meta = Toy()
    with pytest.raises(QuantError, match="meta device"):
        quantize_model(meta)
