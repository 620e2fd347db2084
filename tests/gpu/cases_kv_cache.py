"""Launches of the KV cache operators, for the generic GPU tests."""

from __future__ import annotations

import torch
from gpu_case import Case, Made
from torch import Tensor

import fastinfer
from helpers import generator

FP8 = torch.float8_e4m3fn


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: str, g: torch.Generator) -> Tensor:
    x = 2 * torch.randn(shape, generator=g)
    return (30 * x if dtype == torch.int8 else x).to(dtype).to(device)


def _bytes(t: Tensor) -> Tensor:
    return t.view(torch.uint8) if t.element_size() == 1 else t


def _restore(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for work, pristine in pairs:
        _bytes(work).copy_(_bytes(pristine))


def write(
    tokens: int,
    heads: int,
    dim: int,
    block: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    dynamic: bool = False,
    index: torch.dtype = torch.int64,
) -> Case:
    def make(device: str, seed: int) -> Made:
        g = generator(seed)
        blocks = 2 + tokens // block
        k, v = (_random((tokens, heads, dim), dtype, device, g) for _ in "kv")
        before = [_random((blocks, block, heads, dim), cache_dtype, device, g) for _ in "kv"]
        work = [t.clone() for t in before]
        slots = torch.randperm(blocks * block, generator=g)[:tokens].to(index)
        slots[tokens // 2] = -1
        slots = slots.to(device)
        scales: list[Tensor | None] = [None, None]
        outputs = list(work)
        pairs = list(zip(work, before, strict=True))
        if cache_dtype != dtype:
            shape = (blocks, block, heads) if dynamic else (heads,)
            scales = [(torch.rand(shape, generator=g) * 0.03 + 0.01).to(device) for _ in "kv"]
            if dynamic:
                start = [s.clone() for s in scales if s is not None]
                outputs += [s for s in scales if s is not None]
                pairs += list(zip(outputs[2:], start, strict=True))

        def run() -> None:
            _restore(pairs)
            fastinfer.reshape_and_cache(k, v, *work, slots, k_scale=scales[0], v_scale=scales[1])

        return run, outputs

    names = [str(d).removeprefix("torch.") for d in (dtype, cache_dtype)]
    kind = "dynamic" if dynamic else "static"
    return Case(f"reshape_and_cache {tokens}x{heads}x{dim} {' '.join(names)} {kind}", make)


def gather(heads: int, dim: int, block: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> Case:
    def make(device: str, seed: int) -> Made:
        g = generator(seed)
        lengths = torch.tensor([13, 0, 70, 1, 40])
        cu = torch.cat((torch.zeros(1, dtype=torch.long), lengths.cumsum(0))).to(device)
        starts = torch.tensor([3, 0, 0, 5, 2], device=device)
        columns = 90 // block + 2
        table = torch.randperm(5 * columns, generator=g).view(5, columns).int().to(device)
        caches = [_random((5 * columns, block, heads, dim), cache_dtype, device, g) for _ in "kv"]
        n = int(lengths.sum()) + 3
        out = tuple(
            torch.full((n, heads, dim), torch.nan, dtype=dtype, device=device) for _ in "kv"
        )
        scale = None
        if cache_dtype in (FP8, torch.int8):
            scale = (torch.rand(5 * columns, block, heads, generator=g) * 0.05).to(device)

        def run() -> None:
            fastinfer.gather_cache(
                *caches, table, cu, n, seq_starts=starts, k_scale=scale, v_scale=scale, out=out
            )

        return run, list(out)

    names = [str(d).removeprefix("torch.") for d in (cache_dtype, dtype)]
    return Case(f"gather_cache {heads}x{dim} {' '.join(names)}", make)


def copy(shape: tuple[int, ...], dtype: torch.dtype, layers: int, cut: int = 0) -> Case:
    def make(device: str, seed: int) -> Made:
        g = generator(seed)
        before = [_random((12, *shape), dtype, device, g) for _ in range(layers)]
        work = [t.clone() for t in before]
        ids = torch.randperm(12, generator=g).view(-1, 2).to(device)
        views = [t[..., cut:] for t in work]

        def run() -> None:
            _restore(list(zip(work, before, strict=True)))
            fastinfer.copy_blocks(views, [], ids)

        return run, work

    return Case(f"copy_blocks {layers} of {list(shape)} {str(dtype)[6:]} from {cut}", make)


def swap(shape: tuple[int, ...], dtype: torch.dtype, into_host: bool) -> Case:
    def make(device: str, seed: int) -> Made:
        g = generator(seed)
        here = _random((9, *shape), dtype, device, g)
        host = _random((7, *shape), dtype, "cpu", g).pin_memory()
        out = torch.zeros(7 if into_host else 9, *shape, dtype=dtype, device=device)
        ids = torch.stack([torch.randperm(n, generator=g)[:6] for n in (9, 7)], 1)

        def run() -> None:
            if into_host:
                fastinfer.swap_blocks(here, host, ids)
                _bytes(out).copy_(_bytes(host), non_blocking=True)
            else:
                _bytes(out).zero_()
                fastinfer.swap_blocks(host, out, ids.flip(1))

        return run, [out]

    return Case(f"swap_blocks {'to' if into_host else 'from'} host {list(shape)}", make)


def repeat(shape: tuple[int, ...], dtype: torch.dtype, n_rep: int, dim: int, cut: int = 0) -> Case:
    def make(device: str, seed: int) -> Made:
        x = _random(shape, dtype, device, generator(seed))[..., cut:]
        like = x.repeat_interleave(n_rep, dim) if x.element_size() > 1 else x
        out = torch.empty_like(like).contiguous()

        def run() -> None:
            fastinfer.repeat_kv(x, n_rep, dim=dim, out=out)

        return run, [out]

    return Case(f"repeat_kv {list(shape)} {str(dtype)[6:]} x{n_rep} from {cut}", make)


F32, F16, BF16, INT8 = torch.float32, torch.float16, torch.bfloat16, torch.int8
CASES = [
    write(37, 8, 128, 16, BF16, BF16),
    write(5, 3, 33, 7, F16, F16, index=torch.int32),
    write(9, 2, 17, 5, F32, F32),
    write(37, 8, 128, 16, BF16, FP8),
    write(37, 8, 128, 16, BF16, FP8, dynamic=True),
    write(19, 3, 96, 5, F16, INT8, dynamic=True, index=torch.int32),
    write(1200, 8, 256, 16, BF16, FP8, dynamic=True),
    write(2900, 12, 64, 5, F16, INT8, index=torch.int32),
    write(4600, 8, 64, 16, F16, INT8, index=torch.int32),
    write(4600, 8, 64, 16, BF16, FP8, dynamic=True),
    write(2501, 8, 128, 16, BF16, FP8),
    write(11, 2, 576, 3, F32, INT8, dynamic=True),
    write(11, 2, 21, 3, F32, FP8),
    gather(8, 128, 16, BF16, BF16),
    gather(2, 33, 7, F16, F16),
    gather(8, 128, 16, BF16, FP8),
    gather(3, 80, 5, F16, INT8),
    gather(1, 576, 16, F32, FP8),
    gather(2, 64, 16, F32, BF16),
    copy((16, 2, 64), BF16, 3),
    copy((5, 3, 17), F16, 2, cut=1),
    copy((7, 9), INT8, 1, cut=2),
    swap((16, 2, 64), BF16, True),
    swap((16, 2, 64), BF16, False),
    swap((3, 5), INT8, True),
    repeat((2, 17, 8, 128), BF16, 4, -2),
    repeat((3, 5, 33), F32, 3, 0, cut=1),
]
