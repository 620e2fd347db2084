"""int4_linear and int8_linear: exact codes, every layout option, numerics, independence of rows."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from fastinfer.ops import quantization as Q
from fastinfer.ops._reference_linear import (
    dequantize_codes_reference,
    int4_linear_reference,
    int8_linear_reference,
)
from fastinfer.ops.linear import int4_linear, int8_linear
from helpers import (
    FLOATS,
    HALF,
    assert_linear_error,
    available_isa_levels,
    compiles,
    devices,
    generator,
    opcheck,
    poisoned,
    randn,
    refuses,
)

ZERO_MODES = ("none", "int", "float")
# Where a case runs: the instruction-set levels of the CPU; the GPU, also with the code for sm_80.
GPU_PLACES = ["cuda", "cuda sm_80"] if "cuda" in devices("int4_linear") else []
PLACES = [*available_isa_levels(), *GPU_PLACES]
M_VALUES = (1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33, 48, 63, 64, 65, 96, 127, 129, 257)


def _device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if not request.param.startswith("cuda"):
        monkeypatch.setenv("FASTINFER_CPU_ISA", request.param)
        return "cpu"
    if request.param != "cuda":
        monkeypatch.setenv("FASTINFER_FORCE_ARCH", "80")
    return "cuda"


@pytest.fixture(params=PLACES)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once per place; the value is the device of the tensors."""
    return _device(request, monkeypatch)


@pytest.fixture(params=GPU_PLACES)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    return _device(request, monkeypatch)


def dtypes(device: str) -> tuple[torch.dtype, ...]:
    return FLOATS if device == "cpu" else HALF


@dataclasses.dataclass(slots=True)
class Case:
    """A packed weight and the dense weight [N, K] (original column order) it stands for."""

    bits: int
    n: int
    k: int
    group_size: int
    packed: Q.PackedWeight
    perm: torch.Tensor | None
    dense: torch.Tensor

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None = None, **kw) -> torch.Tensor:
        fn = int4_linear if self.bits == 4 else int8_linear
        return fn(
            x,
            *self.packed,
            bias,
            group_size=self.group_size,
            out_features=self.n,
            perm=self.perm,
            **kw,
        )


def make(
    bits: int = 4,
    n: int = 64,
    k: int = 128,
    group_size: int = 32,
    zeros: str = "none",
    act_order: bool = False,
    seed: int = 0,
    exact_scales: bool = False,
    scale: float | None = None,
    scale_dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Case:
    g = generator(seed)
    groups = -(-k // group_size) if group_size > 0 else min(k, 1)
    codes = torch.randint(0, 2**bits, (n, k), generator=g, dtype=torch.uint8)
    if exact_scales:  # a different power of two times a small odd number everywhere
        scales = torch.ldexp(
            torch.randint(0, 4, (n, groups), generator=g) * 2.0 + 1.0,
            torch.randint(-6, 3, (n, groups), generator=g),
        )
    else:
        scales = torch.rand(n, groups, generator=g) * 0.02 + 0.001
    if scale is not None:
        scales = torch.full_like(scales, scale)
    packed_scales, scales = scales.to(scale_dtype), scales.to(scale_dtype).float()
    z = None
    if zeros == "int":
        z = torch.randint(0, 2**bits, (n, groups), generator=g, dtype=torch.uint8)
    elif zeros == "float":
        z = torch.randn(n, groups, generator=g) * 0.05
    perm = torch.randperm(k, generator=g).to(torch.int32) if act_order else None
    dense = torch.empty(n, k)
    if perm is None:
        dense = dequantize_codes_reference(codes, scales, z, bits, group_size)
    else:
        dense[:, perm.long()] = dequantize_codes_reference(
            codes[:, perm.long()], scales, z, bits, group_size
        )
    packed = Q.pack_weight(
        codes, packed_scales, z, bits=bits, group_size=group_size, perm=perm, layout=device
    )
    packed = Q.PackedWeight(*(None if t is None else t.to(device) for t in packed))
    perm = None if perm is None else perm.to(device)
    return Case(bits, n, k, group_size, packed, perm, dense.to(device))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", ZERO_MODES)
@pytest.mark.parametrize("group_size", [-1, 8, 16, 24, 32, 64, 96, 128, 192, 256])
def test_one_hot_inputs_give_the_dequantised_weight_bit_for_bit(
    device: str, bits: int, zeros: str, group_size: int
) -> None:
    rng = random.Random(f"{bits}{zeros}{group_size}")
    n, k = rng.choice([1, 8, 17, 40, 63, 66, 100]), rng.choice([8, 24, 77, 130, 257, 300])
    act_order = rng.random() < 0.5
    scale_dtype = rng.choice(FLOATS) if device == "cuda" else torch.float32
    case = make(
        bits,
        n,
        k,
        group_size,
        zeros,
        act_order,
        seed=group_size + 2,
        scale_dtype=scale_dtype,
        device=device,
    )
    for dtype in dtypes(device):
        eye = torch.eye(k, dtype=dtype, device=device)
        for batch_invariant in (False, True):
            y = case(eye, batch_invariant=batch_invariant)
            assert torch.equal(y, case.dense.t().to(dtype)), (n, k, act_order, dtype, scale_dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", ["none", "int"])
@pytest.mark.parametrize("group_size", [40, 64])
def test_integer_inputs_are_exact_for_every_m(
    device: str, bits: int, zeros: str, group_size: int
) -> None:
    n, k = 70, 200
    case = make(bits, n, k, group_size, zeros, seed=5, scale=0.25, device=device)
    for m in (1, 2, 3, 4, 6, 8, 11, 70):
        x = torch.randint(-3, 4, (m, k), generator=generator(m)).to(device)
        for dtype in dtypes(device):
            expected = (x.double() @ case.dense.double().t()).to(dtype)
            assert torch.equal(case(x.to(dtype)), expected), (m, dtype)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", ZERO_MODES)
def test_error_stays_at_the_rounding_of_the_output(device: str, bits: int, zeros: str) -> None:
    k = 1100
    case = make(bits, 96, k, 128, zeros, act_order=zeros == "int", seed=7, device=device)
    x = randn(9, k, seed=1, device=device)
    outlier = x.clone()
    outlier[:, 5] *= 100
    for dtype in dtypes(device):
        for inputs in (x, x + 10, outlier):
            inputs = inputs.to(dtype)
            reference = inputs.double() @ case.dense.double().t()
            assert_linear_error(case(inputs), reference, dtype)


def test_one_long_group_keeps_fp32_accuracy(device: str) -> None:
    case = make(4, 32, 14336, -1, seed=3, device=device)
    x = randn(2, 14336, seed=4, dtype=dtypes(device)[0], device=device)
    assert_linear_error(case(x), x.double() @ case.dense.double().t())


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("device", devices("int4_linear"))
def test_random_cases_against_the_reference(device: str, seed: int) -> None:
    rng = random.Random(seed)
    bits, m = rng.choice([4, 8]), rng.choice(M_VALUES)
    n, k = rng.choice([1, 8, 31, 100, 152]), rng.choice([8, 33, 136, 264, 608])
    options = rng.choice([-1, 16, 32, 128]), rng.choice(ZERO_MODES), rng.random() < 0.5, seed
    case, twin = (make(bits, n, k, *options, device=place) for place in (device, "cpu"))
    dtype = rng.choice(dtypes(device))
    x, bias = randn(m, k, seed=seed, dtype=dtype), randn(n, seed=seed + 1, dtype=dtype)
    reference = (int4_linear_reference if bits == 4 else int8_linear_reference)(
        x.double(),
        *twin.packed,
        bias.double(),
        group_size=twin.group_size,
        out_features=n,
        perm=twin.perm,
    )
    y = case(x.to(device), bias.to(device))
    assert_linear_error(y.cpu(), reference, bits, m, n, k)


# Real layers in one dimension, irregular in the other.
@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("n", "k"),
    [
        (4096, 4096),
        (264, 14336),
        (40, 4864),
        (1, 8960),
        (8, 10944),
        (100, 13824),
        (151, 18944),
        (72, 27648),
        (13824, 136),
        (200, 29568),
        (7392, 200),
        (151936, 72),
    ],
)
def test_real_shapes(gpu: str, bits: int, n: int, k: int) -> None:
    case = make(bits, n, k, 128, "int", seed=n, device=gpu)
    for m in (1, 5, 8, 16, 24, 33):
        x = randn(m, k, seed=m, dtype=torch.bfloat16, device=gpu)
        assert_linear_error(case(x), x.double() @ case.dense.double().t(), m)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 128])
def test_every_number_of_tokens(gpu: str, bits: int, group_size: int) -> None:
    case = make(bits, 330, 1096, group_size, "int", seed=bits, device=gpu)
    for m in (*M_VALUES, 32, 128, 1024):
        x = randn(m, 1096, seed=m, dtype=torch.float16, device=gpu)
        assert_linear_error(case(x), x.double() @ case.dense.double().t(), m)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, 64])
def test_rows_do_not_depend_on_each_other_nor_on_threads(
    device: str, bits: int, group_size: int
) -> None:
    case = make(bits, 200, 520, group_size, "int", seed=9, device=device)
    x = randn(67, 520, seed=2, dtype=torch.bfloat16, device=device)
    whole = case(x, batch_invariant=True)
    for m in (1, 2, 3, 5, 8, 13, 16, 17, 40):
        assert torch.equal(case(x[:m], batch_invariant=True), whole[:m])
        assert torch.equal(case(x[-m:], batch_invariant=True), whole[-m:])
    if device == "cuda":
        return
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert torch.equal(case(x), whole)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", ZERO_MODES)
def test_nan_in_padding_or_in_another_row_does_not_spread(
    device: str, bits: int, zeros: str
) -> None:
    case = make(bits, 37, 45, 16, zeros, seed=11, device=device)
    dtype = dtypes(device)[-1]
    x = randn(6, 45, seed=3, dtype=dtype, device=device)
    expected = case(x)
    row = torch.arange(case.packed.scales[0].numel(), device=device)  # of entry i of the scales
    if device == "cuda":
        row = row // 64 * 64 + row % 8 // 2 * 16 + row % 2 * 8 + row // 8 % 8
    case.packed.scales.view(case.packed.scales.shape[0], -1)[:, row >= 37] = float("nan")
    if zeros == "float":
        case.packed.zeros.view(case.packed.zeros.shape[0], -1)[:, row >= 37] = float("nan")
    if device == "cpu":
        codes = case.packed.qweight.view(torch.uint8)[-1].reshape(-1, 16, 4)
        codes[:, 37 % 16 :] = 0xFF
    storage = poisoned(6, 80, dtype=dtype, device=device)
    storage[:, :45] = x
    out = poisoned(6, 50, dtype=dtype, device=device)
    assert torch.equal(case(storage[:, :45], out=out[:, :37]), expected)
    assert out[:, 37:].isnan().all()
    x[2] = float("nan")
    x[4, 7] = float("inf")
    y = case(x)
    assert y[2].isnan().all() and not y[4].isfinite().any()
    rest = [0, 1, 3, 5]
    assert torch.equal(y[rest], expected[rest])


@pytest.mark.parametrize("m", [1, 2])
@pytest.mark.parametrize("group_size", [128, -1])
def test_one_or_two_tokens_of_any_values(device: str, group_size: int, m: int) -> None:
    """On Hopper x is fixed point there (direct_bytes.cuh)."""
    n, k = 200, 1024
    case = make(4, n, k, group_size, "int", seed=19, device=device)
    for dtype in dtypes(device):
        eye = torch.eye(k, dtype=dtype, device=device)
        for i in range(0, k - m, 37):
            assert torch.equal(case(eye[i : i + m]), case.dense.t()[i : i + m].to(dtype)), i
        assert not case(torch.zeros(m, k, dtype=dtype, device=device)).any()
        x = randn(m, k, seed=4, dtype=dtype, device=device)
        x[:, ::3] *= 1e-4
        x[:, 5::128] = 1e3
        assert_linear_error(case(x), x.double() @ case.dense.double().t(), m)
        alone = case(x)
        for value in (float("nan"), float("inf"), float("-inf")):
            bad = x.clone()
            bad[-1, 77] = value
            y = case(bad)
            assert not y[-1].isfinite().any() and torch.equal(y[:-1], alone[:-1])


@pytest.mark.parametrize("device", devices("int4_linear"))
def test_leading_dimensions_strides_bias_and_out(device: str) -> None:
    case = make(4, 24, 40, 8, seed=13, device=device)
    like = {"dtype": dtypes(device)[-1], "device": device}
    x, bias = randn(2, 3, 40, seed=5, **like), randn(24, seed=6, **like)
    flat = case(x.view(6, 40), bias)
    assert torch.equal(case(x, bias), flat.view(2, 3, 24))
    assert torch.equal(case(x[0, 0], bias), flat[0])
    wide = randn(6, 100, seed=7, **like)
    wide[:, 3:43] = x.view(6, 40)
    assert torch.equal(case(wide[:, 3:43], bias), flat)
    assert torch.equal(case(x.view(6, 40)[::2], bias), flat[::2])
    out = poisoned(2, 3, 24, **like)
    assert case(x, bias, out=out) is out
    assert torch.equal(out.view(6, 24), flat)


@pytest.mark.parametrize("device", devices("int4_linear"))
def test_empty_cases(device: str) -> None:
    case = make(4, 24, 40, 8, device=device)
    like = {"dtype": dtypes(device)[-1], "device": device}
    assert case(torch.empty(0, 40, **like)).shape == (0, 24)
    assert case(torch.empty(3, 0, 40, **like)).shape == (3, 0, 24)
    none = make(8, 24, 0, -1, device=device)
    bias = randn(24, seed=1, **like)
    assert torch.equal(none(torch.empty(2, 0, **like), bias), bias.expand(2, 24))
    assert make(4, 0, 16, 8, device=device)(torch.ones(2, 16, **like)).shape == (2, 0)


@pytest.mark.gpu
def test_cuda_workspace_and_refusals(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(4, 200, 4096, 128, seed=3, device=gpu)
    x = randn(3, 4096, seed=1, dtype=torch.float16, device=gpu)
    workspace = torch.zeros(1 << 20, dtype=torch.int32, device=gpu)
    expected = case(x)
    for _ in range(3):
        assert torch.equal(case(x, workspace=workspace), expected)
    assert not workspace[:16384].any()
    refuses(lambda: case(x, workspace=workspace[:8].cpu()), "workspace")
    refuses(lambda: case(x.cpu()), "int4_linear", "cpu")
    case.perm = torch.full((4096,), 4096, dtype=torch.int32, device=gpu)
    monkeypatch.setenv("FASTINFER_VALIDATE", "1")
    refuses(lambda: case(x), "perm must hold column numbers in [0, 4096), got 4096")


def _call(case: Case, name: str, value: object) -> None:
    args = {
        "x": torch.ones(2, case.k),
        "qweight": case.packed.qweight,
        "scales": case.packed.scales,
        "zeros": case.packed.zeros,
        "bias": None,
        "group_size": case.group_size,
        "out_features": case.n,
        "perm": None,
    }
    args[name] = value
    int4_linear(**args)


WRONG = {
    "x dtype": ("x", torch.ones(2, 128, dtype=torch.int32), "x must be"),
    "x columns": ("x", torch.ones(2, 64), "qweight must be 4-bit weights packed for 64 x 64"),
    "x scalar": ("x", torch.tensor(1.0), "x must have shape"),
    "x stride": ("x", torch.ones(128, 2).t(), "x must be contiguous in its last dimension"),
    "qweight dtype": ("qweight", torch.zeros(4, 16, 16), "qweight must be torch.int32"),
    "qweight dim": ("qweight", torch.zeros(4, 16, dtype=torch.int32), "qweight must have 3"),
    "scales dtype": ("scales", torch.ones(4, 64, dtype=torch.float16), "scales must be"),
    "scales shape": ("scales", torch.ones(5, 64), "scales must have shape [4, 64]"),
    "zeros dtype": ("zeros", torch.ones(4, 64, dtype=torch.int32), "zeros must be"),
    "zeros shape": ("zeros", torch.ones(4, 48), "zeros must have shape [4, 64]"),
    "bias dtype": ("bias", torch.ones(64, dtype=torch.float16), "bias must have the dtype of out"),
    "bias shape": ("bias", torch.ones(63), "bias must have shape [64]"),
    "group size": ("group_size", 12, "group_size must be -1"),
    "out features": ("out_features", 128, "qweight must be 4-bit weights packed for 128 x 128"),
    "perm dtype": ("perm", torch.arange(128), "perm must be torch.int32"),
    "perm shape": ("perm", torch.arange(64, dtype=torch.int32), "perm must have shape [128]"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_input_is_one_sentence(wrong: str) -> None:
    name, value, words = WRONG[wrong]
    refuses(lambda: _call(make(), name, value), "int4_linear", words)


def test_more_wrong_input() -> None:
    case = make()
    refuses(lambda: case(torch.ones(2, 128), out=torch.empty(2, 65)), "qweight must be")
    refuses(lambda: case(torch.ones(2, 128), out=torch.empty(3, 64)), "out must have shape [2, 64]")
    refuses(
        lambda: case(torch.ones(1, 2, 128), out=torch.empty(1, 64, 2).transpose(1, 2)),
        "out must be contiguous",
    )
    refuses(lambda: case(torch.ones(2, 128).half(), out=torch.empty(2, 64)), "out must have the")
    cuda = Q.pack_weight(
        torch.zeros(64, 128, dtype=torch.uint8), torch.ones(64, 4), group_size=32, layout="cuda"
    )
    refuses(
        lambda: int4_linear(torch.ones(2, 128), *cuda, group_size=32, out_features=64),
        "packed for CUDA",
        'layout="cpu"',
    )
    case.perm = torch.full((128,), 128, dtype=torch.int32)
    refuses(lambda: case(torch.ones(2, 128)), "perm must hold column numbers in [0, 128), got 128")


def test_grad_is_refused() -> None:
    case = make()
    refuses(lambda: case(torch.ones(2, 128, requires_grad=True)), "requires grad", "no_grad")
    with torch.no_grad():
        assert case(torch.ones(2, 128, requires_grad=True)).shape == (2, 64)


@pytest.mark.parametrize("bits", [4, 8])
def test_opcheck(bits: int) -> None:
    case = make(bits, 24, 40, 8, "int", act_order=True)
    op = torch.ops.fastinfer.int4_linear if bits == 4 else torch.ops.fastinfer.int8_linear
    kwargs = {
        "group_size": 8,
        "perm": case.perm,
        "batch_invariant": False,
        "out": torch.empty(3, 24),
        "workspace": None,
    }
    opcheck(op.default, (randn(3, 40, seed=1), *case.packed, randn(24, seed=2)), kwargs)


def test_compile() -> None:
    case = make(4, 24, 40, 8, "float")
    x = randn(2, 5, 40, seed=1)
    with torch.no_grad():
        expected = case(x) + 1

    def fn(x: torch.Tensor) -> torch.Tensor:
        return int4_linear(x, *case.packed, group_size=8, out_features=24) + 1

    assert torch.equal(compiles(fn, x), expected)
