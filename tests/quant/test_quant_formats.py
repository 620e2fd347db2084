"""Readers of single layers: worked words, sniffing of zeros, orders."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import quant_packers as qp
import torch

from fastinfer.quant import CanonicalWeight, Int8Weight, LinearScheme
from fastinfer.quant.bits import pack_words, unpack_words
from fastinfer.quant.formats import native, read_linear

GPTQ = LinearScheme("gptq", 4, 16, True, style="gptq")
AWQ = LinearScheme("awq", 4, 16, False, style="gemm")
CT = LinearScheme("compressed-tensors", 4, 16, True, style="pack-quantized")
BNB8 = LinearScheme("bitsandbytes", 8, -1, True, style="int8")
NF4 = LinearScheme("bitsandbytes", 4, 64, True, style="nf4")
NATIVE = LinearScheme("fastinfer", 4, 16, True)


def hexes(words: torch.Tensor) -> list[str]:
    return [f"{word & 0xFFFFFFFF:08X}" for word in words.tolist()]


# q[k][n] = (3k + 5n) mod 16 and eight zero points: the words that the formats give them.
CODES = torch.tensor([[(3 * k + 5 * n) % 16 for n in range(8)] for k in range(8)])
ZEROS = torch.tensor([[0, 1, 7, 8, 9, 14, 15, 3]])
GPTQ_WORDS = [
    "52FC9630",
    "A741EB85",
    "FC9630DA",
    "41EB852F",
    "9630DA74",
    "EB852FC9",
    "30DA741E",
    "852FC963",
]
AWQ_WORDS = [
    "39F5E4A0",
    "6C2817D3",
    "9F5B4A06",
    "C28E7D39",
    "F5B1A06C",
    "28E4D39F",
    "5B1706C2",
    "8E4A39F5",
]


def test_worked_words() -> None:
    codes = CODES.to(torch.uint8)
    assert hexes(pack_words(codes, 4, 0)[0]) == GPTQ_WORDS
    assert hexes(pack_words(codes, 4, 1, awq=True)[:, 0]) == AWQ_WORDS
    assert hexes(pack_words(codes.t(), 4, 1)[:, 0]) == GPTQ_WORDS  # compressed-tensors
    zeros = ZEROS.to(torch.uint8)
    assert hexes(pack_words(zeros, 4, 1)[0]) == ["3FE98710"]  # v2
    assert hexes(pack_words((zeros - 1) & 15, 4, 1)[0]) == ["2ED8760F"]  # v1
    assert hexes(pack_words(zeros, 4, 1, awq=True)[0]) == ["3E81F970"]
    eight = torch.tensor([[200, 1, 128, 255]], dtype=torch.uint8)
    assert hexes(pack_words(eight, 8, 1)[0]) == ["FF8001C8"]
    # The slow packer of these tests agrees, so that both can be wrong only together.
    assert hexes(qp.pack_rows(CODES.t(), 4)[:, 0]) == GPTQ_WORDS
    assert hexes(qp.pack_rows(CODES, 4, qp.AWQ_PLACES)[:, 0]) == AWQ_WORDS


@pytest.mark.parametrize("awq", [False, True])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("bits", "shape"), [(4, (24, 40)), (8, (8, 12))])
def test_bits_against_loops(bits: int, shape: tuple[int, int], dim: int, awq: bool) -> None:
    if awq and bits == 8:
        with pytest.raises(ValueError, match="4 bits only"):
            pack_words(torch.zeros(shape, dtype=torch.uint8), bits, dim, awq=True)
        return
    places = qp.AWQ_PLACES if awq else None
    words = torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)
    slow = qp.unpack_rows(words if dim == 1 else words.t(), bits, places)
    fast = unpack_words(words, bits, dim, awq=awq)
    assert fast.dtype == torch.uint8
    assert torch.equal(fast.long(), slow if dim == 1 else slow.t())
    assert torch.equal(pack_words(fast, bits, dim, awq=awq), words)


def test_bits_fill_the_last_word_with_zeros() -> None:
    codes = torch.full((3, 13), 15, dtype=torch.uint8)
    words = pack_words(codes, 4, 1)
    assert hexes(words[0]) == ["FFFFFFFF", "000FFFFF"]
    assert torch.equal(unpack_words(words, 4, 1, size=13), codes)
    assert torch.equal(pack_words(codes.t(), 4, 0), words.t())


def named(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {f"m.{name}": tensor for name, tensor in tensors.items()}


def read(tensors: dict[str, torch.Tensor], scheme: LinearScheme, k: int = 64, n: int = 24):
    return read_linear("m", named(tensors), scheme, k, n)


def assert_weight(stored: object, w: qp.Weight) -> None:
    assert isinstance(stored, CanonicalWeight)
    assert torch.equal(stored.dequantize(), w.dense())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [16, 40, -1])
def test_gptq(bits: int, version: int, symmetric: bool, act_order: bool, group_size: int) -> None:
    style = "gptq" if version == 1 else "gptq_v2"
    scheme = replace(GPTQ, bits=bits, symmetric=symmetric, group_size=group_size, style=style)
    w = qp.random_weight(
        24, 64, bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order
    )
    stored = read(qp.gptq(w, version=version), scheme)
    assert_weight(stored, w)
    assert (stored.perm is None) == (not act_order or group_size == -1)
    assert (stored.zeros is None) == symmetric
    if stored.perm is not None:
        assert torch.equal(w.group[stored.perm.long()], torch.arange(64) // group_size)
        assert torch.equal(stored.perm, torch.argsort(w.group, stable=True).int())


def test_gptq_zero_points_wrap_per_code() -> None:
    """A stored 15 is z = 0, and its increment must not reach the neighbour."""
    w = qp.random_weight(8, 16, symmetric=False)
    w = replace(w, zeros=ZEROS.t().clone())
    tensors = qp.gptq(w)
    assert hexes(tensors["qzeros"][0]) == ["2ED8760F"]
    stored = read(tensors, replace(GPTQ, symmetric=False), 16, 8)
    assert stored.zeros[:, 0].tolist() == ZEROS[0].tolist()
    assert_weight(stored, w)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("declared", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("written", [1, 2])
@pytest.mark.parametrize("sym", [True, None])
def test_gptq_symmetric_files_whatever_their_label(
    bits: int, declared: str, written: int, sym: bool | None
) -> None:
    w = qp.random_weight(24, 64, bits=bits)
    stored = read(
        qp.gptq(w, version=written), replace(GPTQ, bits=bits, symmetric=sym, style=declared)
    )
    assert stored.zeros is None
    assert_weight(stored, w)


@pytest.mark.parametrize("version", [1, 2])
def test_gptq_unlabelled_asymmetric_files_follow_the_declared_version(version: int) -> None:
    w = qp.random_weight(24, 64, symmetric=False)
    style = "gptq" if version == 1 else "gptq_v2"
    stored = read(qp.gptq(w, version=version), replace(GPTQ, symmetric=None, style=style))
    assert_weight(stored, w)


def test_gptq_stated_asymmetry_is_believed() -> None:
    """z = 9 everywhere is stored as 8 by v1: not a v2 file when the file says sym: false."""
    w = qp.random_weight(24, 64)
    w = replace(w, zeros=torch.full_like(w.zeros, 9))
    assert_weight(read(qp.gptq(w), replace(GPTQ, symmetric=False)), w)


def test_gptq_symmetric_with_strange_zeros_is_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    w = qp.random_weight(24, 64, symmetric=False)
    stored = read(qp.gptq(w), GPTQ)
    assert stored.zeros is None
    assert "sym: true" in caplog.text
    tensors = qp.gptq(w)
    del tensors["qzeros"]
    assert read(tensors, GPTQ).zeros is None


def test_gptq_carried_zero_points_are_said_aloud(caplog: pytest.LogCaptureFixture) -> None:
    """An old packer computed z - 1 on 32 bits: one z of 0 sets every place above it."""
    w = qp.random_weight(64, 64, symmetric=False, seed=1)
    tensors = qp.gptq(w)
    read(tensors, replace(GPTQ, symmetric=False), 64, 64)
    assert "implausibly" not in caplog.text
    stored = w.zeros.t() - 1
    stored[:, 1::8] = -1
    words = [
        [
            qp.signed(
                sum_or(value << 4 * place for place, value in enumerate(row[i : i + 8]))
                & 0xFFFFFFFF
            )
            for i in range(0, 64, 8)
        ]
        for row in stored.tolist()
    ]
    tensors["qzeros"] = torch.tensor(words, dtype=torch.int32)
    read(tensors, replace(GPTQ, symmetric=False), 64, 64)
    assert "implausibly many zero points of 0" in caplog.text
    caplog.clear()
    # Lone zeros of 0, as many as z spread over the range would give, are fine.
    stored = torch.randint(0, 16, (4, 64), generator=torch.Generator().manual_seed(0))
    tensors["qzeros"] = qp.pack_rows(stored, 4)
    read(tensors, replace(GPTQ, symmetric=False), 64, 64)
    assert caplog.text == ""


def sum_or(values) -> int:
    total = 0
    for value in values:
        total |= value
    return total


@pytest.mark.parametrize(
    "g_idx",
    [
        torch.empty(0, dtype=torch.int32),
        torch.zeros(64, dtype=torch.int32),
        torch.full((64,), -1, dtype=torch.int32),
        torch.full((64,), 3, dtype=torch.int32),
        (torch.arange(64) // 16).int(),
    ],
    ids=["empty", "zeros", "unset", "equal", "regular"],
)
def test_trivial_group_indices_are_dropped(g_idx: torch.Tensor) -> None:
    w = qp.random_weight(24, 64)
    stored = read(qp.gptq(w) | {"g_idx": g_idx}, GPTQ)
    assert stored.perm is None
    assert_weight(stored, w)
    stored = read(qp.pack_quantized(w, symmetric=True) | {"weight_g_idx": g_idx}, CT)
    assert stored.perm is None
    assert_weight(stored, w)


@pytest.mark.parametrize("symmetric", [True, False])
def test_irregular_groups_are_dequantised_aloud(
    symmetric: bool, caplog: pytest.LogCaptureFixture
) -> None:
    w = qp.random_weight(24, 64, symmetric=symmetric)
    w = w.with_group(torch.tensor([0] * 20 + [1] * 12 + [3] * 16 + [2] * 16))
    stored = read(qp.gptq(w), replace(GPTQ, symmetric=symmetric))
    assert isinstance(stored, torch.Tensor)
    assert torch.equal(stored, w.dense())
    assert "irregular" in caplog.text


@pytest.mark.parametrize("group_size", [16, 40, -1])
def test_awq(group_size: int) -> None:
    w = qp.random_weight(24, 64, group_size=group_size, symmetric=False)
    assert_weight(read(qp.awq(w), replace(AWQ, group_size=group_size)), w)
    symmetric = qp.random_weight(24, 64, group_size=group_size)
    tensors = qp.awq(symmetric)
    del tensors["qzeros"]
    scheme = replace(AWQ, group_size=group_size, symmetric=True)
    assert_weight(read(tensors, scheme), symmetric)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["symmetric", "packed", "unpacked"])
@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("group_size", [16, 40, -1])
@pytest.mark.parametrize(("n", "k"), [(24, 64), (13, 61)])
def test_pack_quantized(
    bits: int, kind: str, act_order: bool, group_size: int, n: int, k: int
) -> None:
    symmetric = kind == "symmetric"
    w = qp.random_weight(
        n, k, bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order
    )
    tensors = qp.pack_quantized(
        w, symmetric=symmetric, act_order=act_order, packed_zeros=kind == "packed"
    )
    scheme = replace(CT, bits=bits, symmetric=symmetric, group_size=group_size)
    assert_weight(read(tensors, scheme, k, n), w)


def test_int_quantized() -> None:
    scheme = replace(CT, bits=8, group_size=-1, style="int-quantized")
    w = qp.random_weight(24, 64, bits=8, group_size=-1)
    tensors = qp.int_quantized(w)
    assert_weight(read(tensors, scheme), w)
    flat = tensors | {"weight_scale": tensors["weight_scale"].flatten()}
    assert_weight(read(flat, scheme), w)
    one = replace(w, scales=w.scales[:1].expand(24, 1))
    assert_weight(read(tensors | {"weight_scale": w.scales[0]}, scheme), one)
    stored = read(tensors, replace(scheme, activations="int8_token"))
    assert isinstance(stored, Int8Weight)
    assert stored.scales.dtype == torch.float32
    assert torch.equal(stored.dequantize(), w.dense())
    packed = replace(scheme, style="pack-quantized", activations="int8_token")
    again = read(qp.pack_quantized(w, symmetric=True), packed)
    assert torch.equal(again.codes, stored.codes)
    four = qp.random_weight(24, 64)
    assert_weight(read(qp.int_quantized(four), replace(CT, style="int-quantized")), four)


def test_bitsandbytes_int8() -> None:
    tensors, dense = qp.bnb_int8(24, 64, 0)
    stored = read(tensors, BNB8)
    assert stored.bits == 8 and stored.zeros is None
    assert torch.equal(stored.dequantize(), dense)
    del tensors["weight_format"]
    assert torch.equal(read(tensors, BNB8).dequantize(), dense)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [64, 128])
def test_bitsandbytes_codebooks(
    kind: str, nested: bool, blocksize: int, caplog: pytest.LogCaptureFixture
) -> None:
    # 72 columns: blocks do not end with rows, and the last one is short.
    tensors, dense = qp.bnb_4bit(
        25, 72, 0, kind=kind, nested=nested, blocksize=blocksize, nested_blocksize=8
    )
    stored = read(tensors, replace(NF4, style=kind), 72, 25)
    torch.testing.assert_close(stored, dense, rtol=1e-6, atol=1e-7)
    assert "dequantised" in caplog.text and "requantize" in caplog.text


def test_byte_order_of_a_codebook_pair() -> None:
    tensors, _ = qp.bnb_4bit(1, 2, 0)
    tensors["weight"] = torch.tensor([[0x3C]], dtype=torch.uint8)  # 3, then 12
    tensors["weight.absmax"] = torch.ones(1)
    expected = torch.tensor([[qp.NF4[3], qp.NF4[12]]])
    assert torch.equal(read(tensors, NF4, 2, 1), expected)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zeros", ["none", "int", "float"])
@pytest.mark.parametrize("act_order", [True, False])
def test_native_round_trip(bits: int, zeros: str, act_order: bool) -> None:
    w = qp.random_weight(13, 61, bits=bits, symmetric=zeros == "none", act_order=act_order)
    scheme = replace(NATIVE, bits=bits)
    tensors = qp.native(w, symmetric=zeros == "none")
    stored = read(tensors, scheme, 61, 13)
    assert_weight(stored, w)
    if zeros == "float":
        stored.zeros = torch.randn(13, 4)
        tensors = native.write("", stored)
        stored = read(tensors, scheme, 61, 13)
    again = native.write("", stored)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensors[name]) for name in tensors)


def test_bias_is_passed_on() -> None:
    w = qp.random_weight(24, 64)
    bias = torch.randn(24)
    stored = read(qp.gptq(w) | {"bias": bias}, GPTQ)
    assert torch.equal(stored.bias, bias)
    assert torch.equal(native.write("m", stored)["m.bias"], bias)


def test_notes_outside_of_a_load_are_logged_at_once(caplog: pytest.LogCaptureFixture) -> None:
    from fastinfer.quant import notes

    with caplog.at_level(logging.WARNING, "fastinfer.quant"):
        notes.note("a", "odd")
        assert caplog.messages == ["a: odd"]
        caplog.clear()
        with notes.collecting():
            for name in "abc":
                notes.note(name, "odd")
            notes.note("b", "strange")
            assert caplog.messages == []
        assert caplog.messages == ["a and 2 more: odd", "b: strange"]


def test_words_of_one_group() -> None:
    """A [1, N] view may have strides that cannot be viewed as int32."""
    codes = torch.arange(24, dtype=torch.uint8)[:, None].t() % 16
    assert codes.shape == (1, 24) and codes.is_contiguous()
    for bits in (4, 8):
        words = pack_words(codes, bits, 1)
        assert torch.equal(unpack_words(words, bits, 1, size=24), codes)
