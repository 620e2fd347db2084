"""`fastinfer plan`: bytes against what an engine allocates, and what fits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from engine_checkpoint import save_checkpoint

from fastinfer import LLM
from fastinfer.cli.main import main
from fastinfer.cli.plan import as_text, parse_size, plan_memory

SEVEN_B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "float16",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
}


def config_folder(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SEVEN_B, **changes}))
    return folder


@pytest.mark.parametrize(
    ("kv_heads", "kind", "kv_cache_dtype", "expected"),
    [
        (32, "MHA, 32 heads of 128", "auto", 2 << 30),  # 7B MHA at 4096 tokens: about 2 GB
        (8, "GQA, 32 heads over 8 KV of 128", "auto", 512 << 20),
        (1, "MQA, 32 heads over 1 KV of 128", "auto", 64 << 20),
        (32, "MHA, 32 heads of 128", "int8", (2 << 30) * 132 // 256),
        (8, "GQA, 32 heads over 8 KV of 128", "fp8", (512 << 20) * 132 // 256),
    ],
)
def test_kv_cache_of_a_7b_model(
    tmp_path: Path, kv_heads: int, kind: str, kv_cache_dtype: str, expected: int
) -> None:
    folder = config_folder(tmp_path, num_key_value_heads=kv_heads)
    report = plan_memory(
        folder, context=4096, batch=8, memory=80 * 10**9, kv_cache_dtype=kv_cache_dtype
    )
    assert report["attention"] == kind
    assert report["kv_bytes_per_request"] == expected
    assert report["kv_bytes"] == 8 * expected
    assert report["fits"]
    room = 72 * 10**9 - report["weight_bytes"] - report["activation_bytes"]
    assert report["max_batch"] == room // expected
    if kv_heads == 32 and kv_cache_dtype == "auto":
        text = as_text(report)
        assert "8 x 2.15 GB for 4096 tokens, 524.29 kB per token in float16" in text
        assert "weights      13.4" in text


def test_weights_are_what_a_loaded_model_holds(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "plain", tokenizer=False)
    for dtype in ("auto", "bfloat16"):
        report = plan_memory(tmp_path / "plain", dtype=dtype, context=256, memory=10**9)
        with LLM(tmp_path / "plain", device="cpu", num_blocks=9, dtype=dtype) as llm:
            model = llm.core.runner.model
            held = sum(t.numel() * t.itemsize for t in [*model.parameters(), *model.buffers()])
            assert report["weight_bytes"] == held
            assert report["kv_bytes_per_token"] * 16 == llm.stats().kv_block_bytes


def test_quantised_weights_are_counted_packed(tmp_path: Path) -> None:
    plain = plan_memory(config_folder(tmp_path / "a"), memory=10**11)["weight_bytes"]
    quantization = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True}
    folder = config_folder(tmp_path / "b", quantization_config=quantization)
    packed = plan_memory(folder, memory=10**11)["weight_bytes"]
    linears = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
    assert packed == plain - linears * 2 + linears // 2 + linears // 128 * 2


def test_what_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", str(config_folder(tmp_path)), "--context", "4096"]
    assert main([*command, "--batch", "8", "--memory", "24GB"]) == 1
    shown = capsys.readouterr().out
    assert "fits         no" in shown and "3 requests of 4096 tokens, or 8 of" in shown
    assert main([*command, "--batch", "3", "--memory", "24GB", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["fits"] and report["max_batch"] == 3
    assert 3 * report["max_context"] * report["kv_bytes_per_token"] <= report["usable_bytes"]
    assert main([*command, "--memory", "8GB"]) == 1  # not even the weights
    assert "0 requests of 4096 tokens" in capsys.readouterr().out
    assert plan_memory(tmp_path, context=16)["memory_bytes"] > 0  # of this machine


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "0"], "--context must be at least 1"),
        (["--batch", "0"], "--batch must be at least 1"),
        (["--memory", "much"], "--memory must be a size such as 80GB"),
        (["--utilization", "2"], r"gpu_memory_utilization must be in (0, 1]"),
        (["--kv-cache-dtype", "fp4"], "kv_cache_dtype must be"),
        (["--block-size", "0"], "block_size must be an integer >= 1"),
    ],
)
def test_wrong_options(
    tmp_path: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", str(config_folder(tmp_path)), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_sizes() -> None:
    assert [parse_size(text) for text in ("80GB", "24 GiB", "512M", "1.5k", "1000")] == [
        80 * 10**9,
        24 << 30,
        512 * 10**6,
        1500,
        1000,
    ]
    for text in ("", "GB", "1.2.3G", "-5", "0"):
        with pytest.raises(ValueError, match="must be a size"):
            parse_size(text)


def test_a_draft_model_is_counted_as_the_engine_allocates_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny = Path(__file__).parents[2] / "examples" / "tiny"
    target, draft = tiny / "model", tiny / "draft"
    settings = {"context": 512, "batch": 2, "memory": 10**9, "dtype": "float32"}
    plain = plan_memory(target, **settings)
    alone = plan_memory(draft, **settings)
    both = plan_memory(target, speculative=draft, **settings)
    for name in ("weight_bytes", "kv_bytes_per_token", "kv_bytes_per_request", "kv_bytes"):
        assert both[name] == plain[name] + alone[name], name
    assert both["draft_weight_bytes"] == alone["weight_bytes"]
    assert both["draft_kv_bytes_per_request"] == alone["kv_bytes_per_request"]
    assert both["max_batch"] < plain["max_batch"]
    assert plan_memory(target, speculative="ngram", **settings) == plain
    with LLM(
        str(target), device="cpu", dtype="float32", num_blocks=40, speculative=str(draft)
    ) as llm:
        assert llm.core.runner.block_bytes == both["kv_bytes_per_token"] * 16
    assert main(["plan", "--model", str(target), "--speculative", str(draft)]) in (0, 1)
    assert capsys.readouterr().out.count("of it the draft model's") == 2
