"""What `parallel_cost` knows of a machine: times measured on one GPU and on one link, read from the
JSON files that bench/ writes.

    linear     us = start + weights * slope, per format and number of rows: a line through the
               layers of gemm.json
    decode     us = start + bytes of keys and values / rate, through decode.json
    prefill    us = start + operations / rate, through the causal rows of prefill.json
    elementwise  us = start + bytes / rate, through norm.json
    overlap    what a kernel of a captured step costs less than alone,
    step       what an eager step costs on top, and
    busy       the share of the time that is computed with many requests, and
    host       what the host does between the tokens of a step and the launch of the next: from rows
               of e2e.json, an 8B model on one GPU
    reduce, nccl, send   tables of parallel.json: KiB -> us between two GPUs

Nothing here is measured on more than one GPU but the last line, which knows no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

Table = tuple[tuple[float, float], ...]  # (x, y), x rising
Line = tuple[float, float]  # (start, slope)

# Format of the weights -> rows of gemm.json. bf16 above 32 rows is cuBLAS's.
_PEERS = {
    "bf16": ("fastinfer", "cublas_bf16"),
    "int4": ("fastinfer_int4",),
    "int8": ("fastinfer_int8",),
    "w8a8": ("fastinfer_w8a8",),
}


@dataclass(frozen=True, slots=True)
class Calibration:
    """See the top of this file. Times in us, sizes in bytes, rates per us.

    Attributes:
        name: of the GPU.
        linear: format -> ((rows, start, us per weight), ...).
        decode, elementwise: (start, us per byte).
        prefill: (start, us per operation).
        sampling: ((rows, us), ...), greedy.
        overlap_us: per kernel of a captured step.
        step_us: per step that is not captured.
        busy: computed time over time, with many requests.
        host_us: of a step, on the CPU.
        reduce: ((bytes, us), ...), all-reduce with residual addition and RMS norm, two ranks.
        nccl: the same by NCCL and the norm kernel.
        send: ((bytes, us), ...), from one GPU to the other.
    """

    name: str
    linear: dict[str, tuple[tuple[int, float, float], ...]]
    decode: Line
    prefill: Line
    elementwise: Line
    sampling: Table
    reduce: Table
    nccl: Table
    send: Table
    overlap_us: float = 0.0
    step_us: float = 0.0
    busy: float = 1.0
    host_us: float = 0.0


def read_results(folder: str | Path) -> Calibration:
    """The calibration of bench/results/<gpu>.

    Args:
        folder: holds gemm, decode, prefill, norm, sampling, e2e and parallel .json.

    Raises:
        FileNotFoundError: A file is missing.
        ValueError: A file lacks the rows that are needed.
    """
    from .parallel_cost import SHAPES, Cluster, decode_us, predict, prefill_us

    folder = Path(folder)
    files = ("gemm", "decode", "prefill", "norm", "sampling", "e2e", "parallel")
    rows = {name: _rows(folder / f"{name}.json") for name in files}
    decode = [
        r
        for r in rows["decode"]
        if (r["op"], r["peer"], r.get("kv"), r.get("d"), r.get("page"))
        == ("decode", "fastinfer", "bf16", 128, 16)
        and r.get("context")
        and r.get("hkv") == 8
        and r.get("hq") == 32
    ]
    prefill = [
        r
        for r in rows["prefill"]
        if r["peer"] == "fastinfer" and r.get("causal") and r.get("tflops") and r.get("d") == 128
    ]
    norm = [
        r
        for r in rows["norm"]
        if r["peer"] == "fastinfer" and r["case"] == "fused_add_rms_norm" and r["dim"] <= 8192
    ]
    bare = Calibration(
        name=json.loads((folder / "gemm.json").read_text())["device"].removeprefix("NVIDIA "),
        linear={name: _linear(rows["gemm"], peers) for name, peers in _PEERS.items()},
        decode=fit_line(
            (r["batch"] * r["context"] * r["hkv"] * r["d"] * 4, r["us"]) for r in decode
        ),
        prefill=fit_line((r["tflops"] * r["us"] * 1e6, r["us"]) for r in prefill),
        elementwise=fit_line((r["m"] * r["dim"] * 8, r["us"]) for r in norm),
        sampling=_table(
            (r["batch"], r["us"])
            for r in rows["sampling"]
            if r["peer"] == "fastinfer" and r["case"] == "greedy" and r.get("dtype") == "bf16"
        ),
        reduce=_best(rows["parallel"], "all_reduce_norm", "fastinfer"),
        nccl=_best(rows["parallel"], "all_reduce_norm", "nccl"),
        send=_best(rows["parallel"], "send", "nccl"),
    )
    one, shape = Cluster(), SHAPES["llama3-8b"]
    measured = {r["case"]: r for r in rows["e2e"] if r["peer"] == "fastinfer bf16"}
    alone, many = "b1 prompt512 new128", "256 req 512/128"
    running = "host 256 running"
    for case in (alone, many, running):
        if case not in measured:
            raise ValueError(f"{folder}/e2e.json has no row {case!r} of fastinfer bf16")
    whole = decode_us(shape, bare, one, 1, 576)
    kernels = 8 * shape.layers + 2
    overlap = max((whole.total - measured[alone]["tpot_ms"] * 1e3) / kernels, 0.0)
    prompt = prefill_us(shape, bare, one, 512, 0).total
    step = max(measured[alone]["ttft_ms"] * 1e3 - prompt, 0.0)
    almost = replace(bare, overlap_us=overlap, step_us=step)
    rate = predict(shape, almost, one, chunk=8192)["out_tok_s"]
    host = measured[running]["host_us_min"]
    return replace(almost, busy=min(measured[many]["out_tok_s"] / rate, 1.0), host_us=host)


def fit_line(points: Iterable[tuple[float, float]]) -> Line:
    """(start, slope) of the line with the least squares of relative errors; start >= 0.

    Args:
        points: (x, y), y > 0.
    """
    sums = [0.0] * 5
    for x, y in points:
        w = 1 / (y * y)
        for i, term in enumerate((w, w * x, w * x * x, w * y, w * x * y)):
            sums[i] += term
    one, x1, x2, y1, xy = sums
    if one == 0:
        raise ValueError("parallel_calibration: no rows to fit")
    det = one * x2 - x1 * x1
    start = (x2 * y1 - x1 * xy) / det if det > 1e-12 * one * x2 else 0.0
    if start <= 0:
        return (0.0, xy / x2)
    return (start, (one * xy - x1 * y1) / det)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [row for row in json.loads(path.read_text())["rows"] if "peer" in row]


def _linear(
    rows: Sequence[dict[str, Any]], peers: tuple[str, ...]
) -> tuple[tuple[int, float, float], ...]:
    """A line per number of rows, from the first peer that has it."""
    lines = []
    for m in sorted({r["m"] for r in rows if r["peer"] in peers and "n" in r}):
        for peer in peers:
            at = [r for r in rows if r["peer"] == peer and r.get("m") == m and "n" in r]
            if at:
                lines.append((m, *fit_line((r["n"] * r["k"], r["us"]) for r in at)))
                break
    return tuple(lines)


def _table(points: Iterable[tuple[float, float]]) -> Table:
    return tuple(sorted(dict(points).items()))


def _best(rows: Sequence[dict[str, Any]], op: str, peer: str) -> Table:
    """bytes -> us of the fastest row of each size whose peer begins so."""
    best: dict[float, float] = {}
    for r in rows:
        if r["op"] == op and r["peer"].startswith(peer) and r.get("gpus") == 2:
            size = r["kib"] * 1024
            best[size] = min(r["us"], best.get(size, r["us"]))
    if not best:
        raise ValueError(f"parallel.json has no rows of {op} by {peer} on two GPUs")
    return tuple(sorted(best.items()))


def _as_module(calibration: Calibration, folder: str) -> str:
    """Source of a module that holds the calibration, four digits of each number."""

    def digits(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.4g}")
        if isinstance(value, (list, tuple)):
            return tuple(digits(each) for each in value)
        if isinstance(value, dict):
            return {key: digits(each) for key, each in value.items()}
        return value

    fields = {f.name: digits(getattr(calibration, f.name)) for f in dataclass_fields(calibration)}
    body = "".join(f"    {name}={value!r},\n" for name, value in fields.items())
    name = calibration.name.upper().split()[0]
    return (
        f'"""Times of kernels and of a link on {calibration.name}s, from {folder} by\n'
        f"`python -m fastinfer.engine.parallel_calibration {folder}`.\n"
        '"""\n\nfrom __future__ import annotations\n\n'
        "from .parallel_calibration import Calibration\n\n"
        f"{name} = Calibration(\n{body})\n"
    )


if __name__ == "__main__":
    import sys

    print(_as_module(read_results(sys.argv[1]), sys.argv[1]), end="")
