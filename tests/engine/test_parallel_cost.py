"""The arithmetic of `fastinfer plan --tp --pp`, and its distance from what one H200 measured."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from fastinfer.cli.main import main
from fastinfer.engine.calibration_h200 import H200
from fastinfer.engine.parallel_calibration import Calibration, fit_line, read_results
from fastinfer.engine.parallel_cost import (
    SHAPES,
    Cluster,
    Shape,
    all_reduce_norm_us,
    decode_us,
    linear_us,
    look_up,
    parse_link,
    predict,
    prefill_us,
    send_us,
)

RESULTS = Path(__file__).parents[2] / "bench/results/h200"
LLAMA = SHAPES["llama3-8b"]

PREDICTED = ("tpot", "load", "pipeline")


def read_rows(path: Path) -> list[dict[str, Any]]:
    document = json.loads(path.read_text())
    return document["rows"] if isinstance(document, dict) else document


# Numbers that can be added up by hand.
PLAIN = Calibration(
    name="plain",
    linear={"bf16": ((1, 2.0, 1e-6), (4, 2.0, 2e-6))},
    decode=(3.0, 1e-3),
    prefill=(5.0, 1e-6),
    elementwise=(1.0, 0.0),
    sampling=((1, 7.0),),
    reduce=((1024, 4.0), (4096, 4.0)),
    nccl=((1024, 20.0), (4096, 20.0)),
    send=((1024, 9.0),),
    overlap_us=0.5,
    step_us=100.0,
)
TINY = Shape(
    hidden=1000, intermediate=2000, layers=4, heads=4, kv_heads=2, head_dim=250, vocab=5000
)


def test_fit_line() -> None:
    assert fit_line([(0, 2), (10, 7), (20, 12)]) == pytest.approx((2, 0.5))
    assert fit_line([(10, 3), (20, 8)])[0] == 0, "no negative start"
    # Relative errors: the small point is met, although the large one is off by much.
    start, slope = fit_line([(1, 1), (2, 2), (1000, 1500)])
    assert start + slope == pytest.approx(1, rel=0.35)
    with pytest.raises(ValueError, match="no rows"):
        fit_line([])


def test_look_up() -> None:
    table = ((1.0, 10.0), (3.0, 20.0), (4.0, 40.0))
    assert [look_up(table, x) for x in (0, 1, 2, 3, 3.5, 5)] == [10, 10, 15, 20, 30, 60]
    assert look_up(((2.0, 6.0),), 9) == 6


def test_linear_between_and_beyond_the_rows_measured() -> None:
    assert linear_us(PLAIN, "bf16", 1, 1e6) == pytest.approx(3)
    assert linear_us(PLAIN, "bf16", 2, 1e6) == pytest.approx(3.5)
    assert linear_us(PLAIN, "bf16", 8, 1e6) == pytest.approx(2 + 2 * 2)


def test_decode_step_by_hand() -> None:
    # Weights of a layer in millions: qkv 2, o 1, gate and up 4, down 2; head 5.
    products = (2 + 2) + (2 + 1) + (2 + 4) + (2 + 2)
    attention = 3 + 2 * 10 * 2 * 250 * 2 * 1e-3
    layer = products + attention + 4 * 1.0 - 8 * 0.5
    head = 2 + 5 + 7 - 2 * 0.5
    step = decode_us(TINY, PLAIN, Cluster(), 1, 10)
    assert step.total == step.stage == pytest.approx(4 * layer + head)
    # Two GPUs: halves, and an all-reduce instead of each norm.
    halves = (2 + 1) + (2 + 0.5) + (2 + 2) + (2 + 1)
    layer = halves + 3 + 10 + 2 * 1.0 + 2 * 4.0 - 4
    two = decode_us(TINY, PLAIN, Cluster(tp=2), 1, 10)
    assert two.total == pytest.approx(4 * layer + (2 + 2.5 + 7 - 1))


def test_stages_are_whole_layers_and_one_has_the_head() -> None:
    one = decode_us(TINY, PLAIN, Cluster(), 1, 10)
    head = 2 + 5 + 7 - 1
    layer = (one.total - head) / 4
    two = decode_us(TINY, PLAIN, Cluster(pp=2), 1, 10)
    assert two.stage == pytest.approx(2 * layer + head + 9) and two.total == one.total + 9
    four = decode_us(TINY, PLAIN, Cluster(pp=4), 1, 10)
    assert four.stage == pytest.approx(layer + head + 9) and four.total == one.total + 27
    many = replace(TINY, layers=80)
    assert decode_us(many, PLAIN, Cluster(pp=2), 1, 10).stage == pytest.approx(
        min(max((80 - n) * layer, n * layer + head) for n in range(80)) + 9
    )


def test_prefill_counts_pairs_and_the_step() -> None:
    step = prefill_us(TINY, PLAIN, Cluster(), 4, 6)
    pairs = 7 + 8 + 9 + 10
    attention = 5 + 4 * pairs * 250 * 4 * 1e-6
    layer = 4 * 2 + 9 * 2 + attention + 4
    assert step.total == pytest.approx(4 * layer + (2 + 5) + 7 + 100)


def test_links() -> None:
    assert parse_link("pcie") == "pcie" and parse_link("50") == 50.0
    for text in ("", "x", "0", "-3", "inf", "nan"):
        with pytest.raises(ValueError, match="--link must be nvlink, pcie or"):
            parse_link(text)
    near, far = Cluster(tp=2), Cluster(tp=2, link="pcie")
    assert all_reduce_norm_us(H200, near, 1 << 20) < all_reduce_norm_us(H200, far, 1 << 20)
    assert send_us(H200, near, 1 << 20) < send_us(H200, far, 1 << 20)
    # Eight GPUs send seven times as much in one-shot: two-shot is taken.
    two, eight = (all_reduce_norm_us(H200, Cluster(tp=n), 1 << 20) for n in (2, 8))
    assert two < eight < two + 6 * (1 << 20) / 370e3


def test_predictions_move_the_right_way() -> None:
    shape = SHAPES["llama3-70b"]
    by_tp = [predict(shape, H200, Cluster(tp=n)) for n in (1, 2, 4, 8)]
    for before, after in pairwise(by_tp):
        assert after["tpot_ms"] < before["tpot_ms"] and after["ttft_ms"] < before["ttft_ms"]
        assert before["out_tok_s"] < after["out_tok_s"] < 2 * before["out_tok_s"]
    piped = predict(shape, H200, Cluster(pp=4))
    assert piped["tpot_ms"] > by_tp[0]["tpot_ms"], "stages do not make one request faster"
    assert piped["out_tok_s"] > 2 * by_tp[0]["out_tok_s"]
    slow = predict(shape, H200, Cluster(tp=4, link="pcie"))
    assert slow["out_tok_s"] < piped["out_tok_s"], "over a slow link, stages win"


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        ("bf16", "b1 prompt512 new128"),
        ("int4", "b1 prompt512 new128"),
        ("bf16", "256 req 512/128"),
        ("int4", "256 req 512/128"),
    ],
)
def test_within_a_fifth_of_one_gpu(kind: str, case: str) -> None:
    peer = {"bf16": "fastinfer bf16", "int4": "fastinfer int4 g128"}[kind]
    rows = json.loads((RESULTS / "e2e.json").read_text())["rows"]
    row = next(r for r in rows if r["case"] == case and r["peer"] == peer)
    got = predict(replace(LLAMA, format=kind), H200, Cluster())
    names = ("out_tok_s",) if "req" in case else ("tpot_ms", "ttft_ms")
    for name in names:
        assert got[name] == pytest.approx(row[name], rel=0.2), name


MEASURED = [
    row
    for row in read_rows(RESULTS / "parallel.json")
    if row["op"] in PREDICTED and row["tp"] * row["pp"] > 1
]


@pytest.mark.parametrize(
    "row",
    MEASURED,
    ids=lambda r: f"{r['op']}-{r['model']}-{r['weights'][:4]}-tp{r['tp']}-pp{r['pp']}",
)
def test_within_a_fifth_of_several_gpus(row: dict[str, Any]) -> None:
    """What bench/bench_parallel_engine.py measured; nothing of it is in the calibration. TTFT: of
    all but TP4 (below).
    """
    shape = replace(SHAPES[row["model"]], format=row["weights"].split()[0])
    cluster = Cluster(tp=row["tp"], pp=row["pp"])
    if row["op"] == "tpot":
        got = predict(shape, H200, cluster, prompt=row["prompt"], output=row["new"], chunk=512)
        for name in ("tpot_ms", "ttft_ms") if row["tp"] < 4 else ("tpot_ms",):
            assert got[name] == pytest.approx(row[name], rel=0.2), name
    elif row["op"] == "load":
        got = predict(shape, H200, cluster, chunk=8192)
        assert got["out_tok_s"] == pytest.approx(row["out_tok_s"], rel=0.2)
    else:
        each = row["requests"] // row["pp"]
        step = decode_us(shape, H200, cluster, each, 164)
        assert each / step.stage * H200.busy * 1e6 == pytest.approx(row["out_tok_s"], rel=0.2)


@pytest.mark.xfail(
    strict=True,
    reason="a prompt of 512 on four GPUs took 13.7 ms, 6.7 are predicted: docs/parallel.md",
)
def test_first_token_on_four_gpus() -> None:
    row = next(r for r in MEASURED if r["op"] == "tpot" and r["tp"] == 4)
    got = predict(SHAPES[row["model"]], H200, Cluster(tp=4), prompt=512, output=128, chunk=512)
    assert got["ttft_ms"] == pytest.approx(row["ttft_ms"], rel=0.2)


def test_the_module_is_what_the_results_say() -> None:
    again = read_results(RESULTS)
    assert set(again.linear) == set(H200.linear)
    for cluster in (Cluster(), Cluster(tp=2), Cluster(pp=2), Cluster(tp=4, pp=2)):
        for name, value in predict(LLAMA, again, cluster).items():
            assert predict(LLAMA, H200, cluster)[name] == pytest.approx(value, rel=0.1), name


def test_results_without_what_is_needed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_results(tmp_path)
    for path in RESULTS.glob("*.json"):
        (tmp_path / path.name).write_text(path.read_text())
    (tmp_path / "parallel.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="no rows of all_reduce_norm by fastinfer"):
        read_results(tmp_path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": 128256,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    def plan(*flags: str) -> tuple[int, str]:
        code = main(["plan", "--model", str(tmp_path), "--memory", "141GB", *flags])
        return code, capsys.readouterr().out

    code, text = plan("--json")
    one = json.loads(text)
    assert code == 1 and not one["fits"] and "speed" not in one
    code, text = plan("--tp", "2", "--json")
    two = json.loads(text)
    assert code == 0 and two["weight_bytes"] == pytest.approx(one["weight_bytes"] / 2, rel=0.01)
    assert 2 * two["kv_bytes_per_token"] == one["kv_bytes_per_token"]
    assert two["speed"]["tpot_ms"] == pytest.approx(
        predict(SHAPES["llama3-70b"], H200, Cluster(tp=2))["tpot_ms"], abs=1e-3
    )
    code, text = plan("--tp", "16", "--json")
    # Eight heads of keys for sixteen GPUs: each is on two of them.
    assert 8 * json.loads(text)["kv_bytes_per_token"] == one["kv_bytes_per_token"]
    code, text = plan("--pp", "3", "--link", "12.5", "--json")
    stages = json.loads(text)
    assert stages["kv_bytes_per_token"] == one["kv_bytes_per_token"] * 27 // 80
    assert stages["weight_bytes"] > one["weight_bytes"] / 3
    code, text = plan("--tp", "2", "--pp", "2", "--requests", "8")
    assert "4: TP 2 x PP 2" in text and "tokens/s of 8 (computed for H200 over nvlink)" in text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--tp", "3"), "tensor_parallel_size must divide the 32 attention heads"),
        (("--tp", "0"), "--tp must be at least 1"),
        (("--pp", "99"), "pipeline_parallel_size must be at most the 4 layers"),
        (("--link", "fast"), "--link must be nvlink"),
        (("--tp", "2", "--prompt", "0"), "--prompt must be at least 1"),
    ],
)
def test_command_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], words: str
) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "float16",
        "vocab_size": 320,
        "hidden_size": 512,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["plan", "--model", str(tmp_path), "--memory", "1GB", *flags]) != 0
    assert words in capsys.readouterr().err
