"""SamplingParams and EngineConfig: defaults as in vLLM, and one clear sentence per wrong value."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import pytest

from fastinfer.engine.config import EngineConfig, SamplingParams
from fastinfer.engine.metrics import RequestMetrics
from fastinfer.engine.outputs import CompletionOutput, RequestOutput


def test_defaults_are_those_of_vllm() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_p, params.top_k) == (1, 1.0, 1.0, 0)
    assert (params.min_p, params.seed, params.max_tokens, params.min_tokens) == (0.0, None, 16, 0)
    assert (params.logprobs, params.ignore_eos, params.detokenize) == (None, False, True)
    assert (params.skip_special_tokens, params.include_stop_str_in_output) == (True, False)
    assert (params.presence_penalty, params.frequency_penalty) == (0.0, 0.0)
    assert params.repetition_penalty == 1.0
    assert params.stop == [] and params.stop_token_ids == []


def test_accepted_forms() -> None:
    assert SamplingParams(stop="end").stop == ["end"]
    assert SamplingParams(stop=["a", "b"]).stop == ["a", "b"]
    assert SamplingParams(top_k=-1).top_k == -1
    assert SamplingParams(max_tokens=None).max_tokens is None
    assert SamplingParams(temperature=0).greedy and SamplingParams(temperature=1e-7).greedy
    assert not SamplingParams(temperature=1e-3).greedy
    assert SamplingParams(frequency_penalty=0.1).has_penalties
    assert not SamplingParams().has_penalties


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n": 0}, "n must be an integer >= 1"),
        ({"n": True}, "n must be an integer >= 1"),
        ({"temperature": -0.1}, "temperature must be >= 0"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"temperature": "hot"}, "temperature must be a finite number"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"top_p": 1.01}, r"top_p must be in \(0, 1\]"),
        ({"top_k": -2}, "top_k must be an integer >= -1"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\]"),
        ({"min_p": 1.1}, r"min_p must be in \[0, 1\]"),
        ({"presence_penalty": 2.1}, r"presence_penalty must be in \[-2, 2\]"),
        ({"frequency_penalty": -2.1}, r"frequency_penalty must be in \[-2, 2\]"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be > 0"),
        ({"seed": 2**63}, "seed must fit in 64 signed bits"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"max_tokens": 0}, "max_tokens must be an integer >= 1"),
        ({"min_tokens": -1}, "min_tokens must be an integer >= 0"),
        ({"min_tokens": 17}, "min_tokens must not exceed max_tokens"),
        ({"logprobs": -1}, "logprobs must be an integer >= 0"),
        ({"logprobs": 1000}, "logprobs must be at most"),
        ({"stop": [""]}, "stop must hold non-empty strings"),
        ({"stop": [3]}, "stop must hold non-empty strings"),
        ({"stop": 3}, "stop must be a list, got 3"),
        ({"stop": "x", "detokenize": False}, "stop needs the text"),
        ({"stop_token_ids": [-1]}, "stop_token_ids must be an integer >= 0"),
        ({"stop": 5}, "stop must be a list"),
        ({"stop_token_ids": 3}, "stop_token_ids must be a list"),
    ],
)
def test_wrong_sampling_params(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        SamplingParams(**values)
    assert str(caught.value).startswith("SamplingParams: ") and "\n" not in str(caught.value)


def test_a_copy_is_checked_again_and_independent() -> None:
    params = SamplingParams(stop="a", max_tokens=3)
    copy = params.copy()
    assert copy == params and copy is not params
    params.max_tokens = 5
    assert copy.max_tokens == 3
    params.top_p = 7.0
    with pytest.raises(ValueError, match="top_p"):
        params.copy()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_size": 0}, "block_size must be an integer >= 1"),
        ({"num_blocks": 0}, "num_blocks must be an integer >= 1"),
        ({"kv_cache_memory": -5}, "kv_cache_memory must be an integer >= 1"),
        ({"max_model_len": 0}, "max_model_len must be an integer >= 1"),
        ({"max_num_seqs": 0}, "max_num_seqs must be an integer >= 1"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens must be an integer >= 1"),
        ({"gpu_memory_utilization": 1.5}, r"gpu_memory_utilization must be in \(0, 1\]"),
        ({"load_format": "pt"}, "load_format must be 'auto' or 'dummy'"),
        ({"dtype": "int8"}, "dtype must be 'auto', 'float32', 'float16' or 'bfloat16'"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"mode": "fast"}, "mode must be 'balanced', 'latency' or 'throughput', got 'fast'"),
        ({"kv_cache_dtype": "fp4"}, "kv_cache_dtype must be 'auto', 'fp8' or 'int8', got 'fp4'"),
        ({"batch_invariant": 1}, "batch_invariant must be True or False, got 1"),
        ({"enable_prefix_caching": None}, "enable_prefix_caching must be True or False"),
        ({"async_scheduling": "yes"}, "async_scheduling must be True or False"),
    ],
)
def test_wrong_engine_config(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(model="m", **values)


def test_modes_only_set_defaults() -> None:
    def limits(**given: object) -> tuple[int, int]:
        config = EngineConfig(model="m", **given)
        return config.max_num_seqs, config.max_num_batched_tokens

    assert limits() == limits(mode="balanced") == (256, 2048)
    assert limits(mode="latency") == (64, 2048)
    assert limits(mode="throughput") == (512, 16384)
    assert limits(mode="throughput", max_num_seqs=3) == (3, 16384)
    assert limits(mode="latency", max_num_batched_tokens=7) == (64, 7)
    with pytest.raises(ValueError, match="max_num_seqs must be an integer >= 1, got 0"):
        limits(mode="latency", max_num_seqs=0)
    with_mode = EngineConfig(model="m", mode="latency")
    names = [field.name for field in dataclasses.fields(EngineConfig)]
    plain = EngineConfig(model="m", max_num_seqs=64, max_num_batched_tokens=2048)
    assert [n for n in names if getattr(plain, n) != getattr(with_mode, n)] == ["mode"]


def test_outputs_carry_vllm_names() -> None:
    completion = CompletionOutput(index=0, text="hi", token_ids=[1, 2], finish_reason="stop")
    output = RequestOutput(
        request_id="7",
        prompt="p",
        prompt_token_ids=[5],
        outputs=[completion],
        finished=True,
        metrics=RequestMetrics(arrival_time=0.0),
    )
    assert output.outputs[0].finished and output.text == str(output) == "hi"
    assert {"cumulative_logprob", "logprobs", "stop_reason"} <= set(CompletionOutput.__slots__)
    assert {"request_id", "prompt", "prompt_token_ids", "outputs", "finished", "metrics"} <= set(
        RequestOutput.__slots__
    )
    assert RequestOutput(request_id="8", prompt=None, prompt_token_ids=[1]).text == ""


def test_the_parts_without_tensors_do_not_import_torch() -> None:
    modules = ["config", "metrics", "outputs", "request", "scheduler"]
    code = "import sys\n" + "".join(f"import fastinfer.engine.{name}\n" for name in modules)
    code += "import fastinfer._host_py, fastinfer.engine\nprint('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "False", run.stderr
