"""How fast a model would run on a cluster: a sum of kernel times, no run.

A decode step of a stage is, per layer, four products, attention, rotary, activation and two norms;
the times come from `parallel_calibration`. Tensor parallel divides the weights, heads and keys, and
puts an all-reduce in front of each norm. Pipeline parallel divides the layers and adds a transfer
between stages, and the host's time, which nothing overlaps there. What is left out: the same on one
stage (hidden by overlap), padding of batches to captured sizes, and unequal lengths.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..distributed.stages import StageCosts, divide_layers

if TYPE_CHECKING:
    from .parallel_calibration import Calibration, Line, Table

NVLINK_GBS = 370.0  # one way, as the all-reduce of two H200s sees it
PCIE_GBS = 22.0  # gen 4 x16, or half of gen 5 x16
PCIE_TRIP_US = 6.0  # more than over NVLink


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a model costs time."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    format: str = "bf16"  # of the weights: bf16, int4, int8, w8a8
    kv_bytes: int = 2  # per element of the cache


SHAPES = {
    "llama3-8b": Shape(4096, 14336, 32, 32, 8, 128, 128256),
    "llama3-70b": Shape(8192, 28672, 80, 64, 8, 128, 128256),
}


@dataclass(frozen=True, slots=True)
class Cluster:
    """How the GPUs are used.

    Attributes:
        tp: GPUs that share a layer.
        pp: stages.
        link: "nvlink" (as measured), "pcie", or one-way GB/s between two GPUs.
    """

    tp: int = 1
    pp: int = 1
    link: str | float = "nvlink"

    @property
    def gbs(self) -> float:
        """One-way bandwidth between two GPUs."""
        return {"nvlink": NVLINK_GBS, "pcie": PCIE_GBS}.get(str(self.link)) or float(self.link)


def parse_link(text: str) -> str | float:
    """ "nvlink", "pcie" or GB/s.

    Raises:
        ValueError: It is none of these.
    """
    if text in ("nvlink", "pcie"):
        return text
    try:
        gbs = float(text)
    except ValueError:
        gbs = 0.0
    if not 0 < gbs < math.inf:
        raise ValueError(f"plan: --link must be nvlink, pcie or one-way GB/s, got {text!r}")
    return gbs


@dataclass(frozen=True, slots=True)
class Step:
    """Times of one step in us.

    Attributes:
        stage: of the slowest stage, what it sends included.
        total: from the first stage's start to the last one's end.
    """

    stage: float
    total: float


def look_up(table: Table, x: float) -> float:
    """Linear between the points; flat below the first, straight on above the last two."""
    xs = [point[0] for point in table]
    i = bisect_left(xs, x)
    if i == 0 or len(table) == 1:
        return table[0][1]
    (x0, y0), (x1, y1) = table[i - 1 : i + 1] if i < len(table) else table[-2:]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def linear_us(cal: Calibration, kind: str, rows: int, weights: float) -> float:
    """A product of `rows` rows with that many weights."""
    lines = cal.linear[kind]
    # What a weight costs grows smoothly with the rows; so does the start.
    start = look_up(tuple((math.log2(m), a) for m, a, _ in lines), math.log2(rows))
    if rows > lines[-1][0]:
        return lines[-1][1] + lines[-1][2] * weights * rows / lines[-1][0]
    points = tuple((math.log2(m), b) for m, _, b in lines)
    return start + look_up(points, math.log2(rows)) * weights


def all_reduce_norm_us(cal: Calibration, cluster: Cluster, nbytes: int) -> float:
    """Sum over the ranks, residual addition and norm. Two ranks over NVLink as measured; else what
    the bytes take longer, or further trips, is added.
    """
    fastest = cal.reduce if nbytes <= cal.reduce[-1][0] else cal.nccl
    us = look_up(fastest, nbytes)
    one_shot: float = (cluster.tp - 1) * nbytes
    sent = one_shot
    two_shot = 2 * (cluster.tp - 1) * nbytes / cluster.tp
    trip = 1.5 + (PCIE_TRIP_US if cluster.link == "pcie" else 0.0)
    if two_shot / cluster.gbs / 1e3 + trip < one_shot / cluster.gbs / 1e3:
        sent, us = two_shot, us + trip
    elif cluster.link == "pcie":
        us += PCIE_TRIP_US
    return us + max(sent / (cluster.gbs * 1e3) - nbytes / (NVLINK_GBS * 1e3), 0.0)


def send_us(cal: Calibration, cluster: Cluster, nbytes: int) -> float:
    """Hidden states from stage to stage."""
    extra = nbytes / (cluster.gbs * 1e3) - nbytes / (NVLINK_GBS * 1e3)
    trip = PCIE_TRIP_US if cluster.link == "pcie" else 0.0
    return look_up(cal.send, nbytes) + trip + max(extra, 0.0)


def decode_us(shape: Shape, cal: Calibration, cluster: Cluster, batch: int, context: int) -> Step:
    """One token for each of `batch` requests in flight together, `context` tokens long."""
    kv_heads = max(shape.kv_heads / cluster.tp, 1)
    read = 2 * batch * context * kv_heads * shape.head_dim * shape.kv_bytes
    step = _step(shape, cal, cluster, batch, _line(cal.decode, read), batch, cal.overlap_us)
    if cluster.pp == 1:
        return step
    # tokens come back over the host before their requests are planned again, and as many steps are
    # in flight as there are stages: nothing hides it
    return Step(step.stage + cal.host_us, step.total + cal.host_us)


def prefill_us(shape: Shape, cal: Calibration, cluster: Cluster, tokens: int, before: int) -> Step:
    """`tokens` tokens of one prompt behind `before` cached ones."""
    pairs = tokens * (before + (tokens + 1) / 2)
    operations = 4 * pairs * shape.head_dim * shape.heads / cluster.tp
    step = _step(shape, cal, cluster, tokens, _line(cal.prefill, operations), 1, 0.0)
    return Step(step.stage + cal.step_us, step.total + cal.step_us)


def predict(
    shape: Shape,
    cal: Calibration,
    cluster: Cluster,
    *,
    prompt: int = 512,
    output: int = 128,
    requests: int = 256,
    max_batch: int = 256,
    chunk: int = 2048,
) -> dict[str, float]:
    """Latency of one request alone, and throughput of many that arrive together.

    Args:
        shape: of the model.
        cal: of the machine.
        cluster: how many GPUs, used how.
        prompt, output: tokens of a request.
        requests: of the throughput.
        max_batch: requests that run at once.
        chunk: token budget of a step.

    Returns:
        ttft_ms, tpot_ms of one request; out_tok_s, batch_tpot_ms of the many.
    """
    context = prompt + output // 2
    ttft = 0.0
    for first in range(0, prompt, chunk):
        step = prefill_us(shape, cal, cluster, min(chunk, prompt - first), first)
        ttft += step.stage if first + chunk < prompt else step.total
    alone = decode_us(shape, cal, cluster, 1, context)

    # As many batches in flight as stages; prompts first, in chunks that mix several.
    running = min(requests, max_batch)
    each = max(running // cluster.pp, 1)
    rows = min(chunk, requests * prompt)
    dense = prefill_us(shape, cal, cluster, rows, 0).stage
    attended = _line(
        cal.prefill, 4 * rows * min(rows, prompt) / 2 * shape.head_dim * shape.heads / cluster.tp
    )
    whole = _line(cal.prefill, 4 * rows * rows / 2 * shape.head_dim * shape.heads / cluster.tp)
    layers = math.ceil(shape.layers / cluster.pp)
    prompts = requests * prompt / rows * (dense + layers * (attended - whole))
    step = decode_us(shape, cal, cluster, each, context)
    tokens_us = requests * output / each * step.stage
    return {
        "ttft_ms": ttft / 1e3,
        "tpot_ms": alone.total / 1e3,
        "out_tok_s": requests * output / (prompts + tokens_us) * cal.busy * 1e6,
        "batch_tpot_ms": max(step.total, cluster.pp * step.stage) / cal.busy / 1e3,
    }


def _line(line: Line, x: float) -> float:
    return line[0] + line[1] * x


def _step(
    shape: Shape,
    cal: Calibration,
    cluster: Cluster,
    rows: int,
    attention: float,
    sampled: int,
    overlap: float,
) -> Step:
    """A step of `rows` tokens, with `attention` us per layer; `overlap` is saved per kernel."""
    tp, hidden = cluster.tp, shape.hidden
    kv_heads = max(shape.kv_heads / tp, 1)
    q = shape.heads * shape.head_dim / tp
    inner = shape.intermediate / tp
    weights = (
        hidden * (q + 2 * kv_heads * shape.head_dim),
        hidden * q,
        2 * hidden * inner,
        hidden * inner,
    )
    layer = sum(linear_us(cal, shape.format, rows, each) for each in weights) + attention
    layer += _line(cal.elementwise, rows * (q + kv_heads * shape.head_dim) * 4)  # rotary
    layer += _line(cal.elementwise, rows * 3 * inner * 2)  # activation
    if tp == 1:
        layer += 2 * _line(cal.elementwise, rows * hidden * 8)
    else:
        layer += 2 * all_reduce_norm_us(cal, cluster, rows * hidden * 2)
    layer -= 8 * overlap
    head = linear_us(cal, "bf16", sampled, hidden * shape.vocab / tp) - 2 * overlap
    head += look_up(cal.sampling, sampled)
    costs = StageCosts((layer,) * shape.layers, 0.0, head)
    stage = max(costs.of_stages(divide_layers(costs, cluster.pp)))
    send = send_us(cal, cluster, rows * hidden * 2) if cluster.pp > 1 else 0.0
    total = shape.layers * layer + head + (cluster.pp - 1) * send
    return Step(stage + send, total)
