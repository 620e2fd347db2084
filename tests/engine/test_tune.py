"""`fastinfer tune`: the search on made-up engines, the files it writes, the command on the CPU."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fastinfer import LLM
from fastinfer.bench import tune
from fastinfer.bench.tune import Trial
from fastinfer.cli.main import main
from fastinfer.cli.tune import AXES as TUNED
from fastinfer.engine.settings_file import FILE_KEY, read_settings, write_settings

MODEL = Path(__file__).resolve().parents[2] / "examples/tiny/model"


def queue(capacity: float, limit: float) -> tuple[list[float], Any]:
    """A server with `capacity` requests per second; a request is in time below that rate."""
    asked: list[float] = []

    def offer(rate: float) -> dict[str, float]:
        asked.append(rate)
        served = min(rate, capacity)
        in_time = 1.0 if rate <= limit else min(1.0, (limit / served) ** 3)
        return {
            "request_throughput": served,
            "request_goodput": served * in_time,
            "output_throughput": 10 * served,
            "p90_ttft_ms": 5.0,
            "p90_tpot_ms": 1.0,
        }

    return asked, offer


def test_the_highest_rate_that_is_served_in_time_is_found():
    asked, offer = queue(100.0, 70.0)
    trial = tune.best_rate({}, offer, {"ttft": 5.0})
    assert trial.rate == pytest.approx(65.0) and trial.goodput == pytest.approx(65.0)
    assert asked[0] == math.inf and asked[1:] == pytest.approx([95.0, 80.0, 65.0])


def test_nothing_more_is_tried_once_every_request_is_in_time():
    asked, offer = queue(100.0, 1000.0)
    assert tune.best_rate({}, offer, {"ttft": 5.0}).goodput == pytest.approx(100.0)
    assert asked == [math.inf]


def test_limits_that_nothing_meets_give_no_goodput():
    asked, offer = queue(100.0, 1e-3)
    trial = tune.best_rate({}, offer, {"ttft": 5.0})
    assert trial.goodput < 1e-3 and len(asked) == 7


AXES = {"a": (1, 2, 4, 8, 16), "b": ("x", "y")}


def hill(settings: dict[str, Any]) -> Trial:
    height = 100 - 10 * abs(math.log2(settings["a"]) - 3) + (25 if settings["b"] == "y" else 0)
    return Trial(settings, goodput=height)


def test_the_search_climbs_to_the_top_from_anywhere():
    for a in AXES["a"]:
        trials = list(tune.climb({"a": a, "b": "x"}, AXES, hill, max_trials=50))
        assert max(trials, key=lambda t: t.goodput).settings == {"a": 8, "b": "y"}
        seen = [json.dumps(trial.settings) for trial in trials]
        assert len(seen) == len(set(seen)) and trials[0].settings == {"a": a, "b": "x"}


def test_every_value_of_an_axis_without_order_is_tried():
    height = {None: 3.0, "x": 1.0, "y": 2.0, "z": 4.0}

    def measure(settings: dict[str, Any]) -> Trial:
        return Trial(settings, goodput=height[settings["c"]] * (2 if settings["a"] == 2 else 1))

    axes = {"a": (1, 2), "c": tuple(height)}
    trials = list(tune.climb({"a": 1, "c": None}, axes, measure, max_trials=50, unordered=("c",)))
    assert max(trials, key=lambda t: t.goodput).settings == {"a": 2, "c": "z"}
    assert [t.settings["c"] for t in trials[:5]] == [None, None, "x", "y", "z"]


def test_speculation_is_searched(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "tuned.json"
    arguments = ["tune", "--model", str(MODEL), "--device", "cpu", "--num-blocks", "64"]
    arguments += ["--num-prompts", "2", "--input-len", "12", "--output-len", "4"]
    arguments += ["--ttft-ms", "60000", "--tpot-ms", "60000", "--output", str(out)]
    arguments += ["--max-num-seqs", "2", "--max-num-batched-tokens", "64"]
    arguments += ["--kv-cache-dtype", "auto"]
    draft = str(MODEL.with_name("draft"))
    assert main([*arguments, "--draft-model", draft]) == 0
    told = capsys.readouterr().err
    for value in ("None", "ngram", draft):
        assert f"speculative={value}: " in told and "requests/s within" in told
    assert read_settings(out)["speculative"] in (None, "ngram", draft)
    with LLM.from_config(str(MODEL), out, device="cpu", progress=False) as llm:
        assert llm.generate([1, 2, 3])[0].finished
    assert main([*arguments, "--speculative", "ngram", "--max-trials", "1"]) == 0
    assert read_settings(out)["speculative"] == "ngram"


def test_the_search_keeps_to_its_budget():
    for budget in (1, 2, 5):
        trials = list(tune.climb({"a": 1, "b": "x"}, AXES, hill, max_trials=budget))
        assert len(trials) == budget


def test_settings_that_cannot_run_are_stepped_around():
    def measure(settings: dict[str, Any]) -> Trial:
        if settings["b"] == "y":
            return Trial(settings, error="no kernel")
        return hill(settings)

    trials = list(tune.climb({"a": 4, "b": "x"}, AXES, measure, max_trials=50))
    best = tune.front(trials)
    assert best[0].settings == {"a": 8, "b": "x"} and all(t.error is None for t in best)


def test_without_any_goodput_throughput_leads():
    slow = Trial({}, figures={"output_throughput": 10.0})
    fast = Trial({}, figures={"output_throughput": 20.0})
    assert fast.beats(slow) and not slow.beats(fast)
    assert Trial({}, goodput=0.1).beats(fast)


def test_the_front_has_what_nothing_beats():
    def made(goodput: float, ttft: float, tpot: float) -> Trial:
        return Trial({}, goodput, figures={"p90_ttft_ms": ttft, "p90_tpot_ms": tpot})

    best, quick, bad = made(9, 50, 5), made(5, 10, 5), made(4, 60, 6)
    assert tune.front([bad, quick, best, Trial({}, error="x")]) == [best, quick]
    table = tune.front_table([Trial({"a": 3}, 9.0)], ["a"])
    assert "a=3" in table and "inf" in table


def test_settings_files(tmp_path: Path):
    path = tmp_path / "s.json"
    write_settings(path, {"max_num_seqs": 8, "kv_cache_dtype": "fp8"}, limits_ms={"ttft": 5})
    assert read_settings(path) == {"max_num_seqs": 8, "kv_cache_dtype": "fp8"}
    for text, sentence in (
        ("{", "JSON"),
        ("{}", FILE_KEY),
        (json.dumps({FILE_KEY: {"max_seqs": 1}}), "max_seqs"),
        (json.dumps({FILE_KEY: {"model": "/x"}}), "model"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=sentence):
            read_settings(path)


def test_the_command_writes_what_the_engine_reads(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out, plot = tmp_path / "tuned.json", tmp_path / "front.png"
    arguments = ["tune", "--model", str(MODEL), "--device", "cpu", "--num-blocks", "64"]
    arguments += ["--num-prompts", "6", "--input-len", "20", "--output-len", "4"]
    arguments += ["--ttft-ms", "60000", "--tpot-ms", "60000", "--max-trials", "4"]
    arguments += ["--max-num-seqs", "3", "--output", str(out)]
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        pass
    else:
        arguments += ["--plot", str(plot)]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert printed.err.count("requests/s within the limits") == 4
    assert "goodput/s" in printed.out
    settings = read_settings(out)
    assert settings["max_num_seqs"] == 3 and settings["num_blocks"] == 64  # fixed by the user
    assert settings["max_num_batched_tokens"] in TUNED["max_num_batched_tokens"]
    document = json.loads(out.read_text())
    assert document["measured"]["request_goodput"] > 0
    assert plot.exists() == ("--plot" in arguments)
    with LLM.from_config(str(MODEL), out, device="cpu", progress=False, num_blocks=32) as llm:
        assert llm.config.max_num_seqs == 3 and llm.config.num_blocks == 32
    generate = ["generate", "--model", str(MODEL), "--device", "cpu", "--prompt", "Once"]
    assert main([*generate, "--max-tokens", "3", "--config", str(out)]) == 0
    assert "of 64 blocks" in capsys.readouterr().out


def test_limits_out_of_reach_end_with_1(capsys: pytest.CaptureFixture[str]):
    arguments = ["tune", "--model", str(MODEL), "--device", "cpu", "--num-blocks", "64"]
    arguments += ["--num-prompts", "2", "--input-len", "20", "--output-len", "4"]
    assert main([*arguments, "--ttft-ms", "0.0001", "--max-trials", "1"]) == 1
    assert "no request met the limits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "--ttft-ms or --tpot-ms"),
        (["--ttft-ms", "0"], "must be > 0"),
        (["--ttft-ms", "5", "--max-trials", "0"], "at least 1"),
        (["--ttft-ms", "5", "--draft-model", "/no/such"], "--draft-model must be"),
        (["--ttft-ms", "5", "--draft-model", MODEL, "--speculative", "ngram"], "leaves out"),
        (["--ttft-ms", "5", "--output", "/no/such/folder/x.json"], "folder that is there"),
    ],
)
def test_wrong_options_are_said(
    options: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["tune", "--model", str(MODEL), *map(str, options)]) == 2
    assert sentence in capsys.readouterr().err
