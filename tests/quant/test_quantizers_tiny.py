"""Whole checkpoints from the shipped tiny one: perplexity, loading, resuming, refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from quantizing import MODEL, TINY, calibration_text, quality, quantized
from safetensors.torch import load_file, save_file

from fastinfer import LLM, SamplingParams
from fastinfer.checkpoint import Checkpoint
from fastinfer.models import CausalLM, load_config, load_model
from fastinfer.quant import QuantError, QuantizeOptions, quantize_checkpoint
from fastinfer.quant.blocks import Block
from fastinfer.quant.calibration import (
    Calibration,
    empty_cache,
    encode_text,
    pack_sequences,
)
from fastinfer.quant.methods import MethodOptions, quantize_block
from fastinfer.quant.perplexity import perplexity
from fastinfer.quant.rtn import GridOptions
from fastinfer.text import load_tokenizer


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("calib") / "calib.txt"
    file.write_text(calibration_text(), encoding="utf-8")
    return file


# One scale and zero point per channel: there the methods differ most.
COARSE = {"group_size": -1, "symmetric": False}
RUNS = {
    "rtn": {"method": "rtn"} | COARSE,
    "gptq": {"method": "gptq"} | COARSE,
    "awq": {"method": "awq"} | COARSE,
    "int8": {"method": "rtn", "bits": 8},
    "w8a8": {"method": "smoothquant"},
}


@pytest.fixture(scope="module")
def made(calib: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("made")
    for name, options in RUNS.items():
        quantized(root / name, calib, **options)
    return {name: root / name for name in RUNS}


@pytest.fixture(scope="module")
def perplexities(made: dict[str, Path]) -> dict[str, float]:
    return {"plain": quality(MODEL)} | {name: quality(path) for name, path in made.items()}


def test_perplexity_at_four_bits(perplexities: dict[str, float]) -> None:
    """With the same groups and symmetry, calibrated methods beat rounding to nearest."""
    assert perplexities["plain"] < perplexities["gptq"] < perplexities["rtn"]
    assert perplexities["plain"] < perplexities["awq"] < perplexities["rtn"]
    assert perplexities["rtn"] < 1.01 * perplexities["plain"]


def test_perplexity_at_eight_bits(perplexities: dict[str, float]) -> None:
    plain = perplexities["plain"]
    assert abs(perplexities["int8"] / plain - 1) < 0.005
    assert abs(perplexities["w8a8"] / plain - 1) < 0.005


@pytest.mark.full
@pytest.mark.parametrize("group_size", [64, -1])
@pytest.mark.parametrize("symmetric", [True, False])
def test_perplexity_on_more_calibration(group_size: int, symmetric: bool, tmp_path: Path) -> None:
    """With fine groups the methods are close: this takes all held-out text to tell them apart."""
    calib = tmp_path / "calib.txt"
    calib.write_text(calibration_text(200_000), encoding="utf-8")

    def run(method: str, **options: object) -> float:
        out = tmp_path / f"{method}{len(options)}"
        common = {"group_size": group_size, "symmetric": symmetric, "samples": 64}
        quantized(out, calib, method=method, format="native", **common, **options)
        return quality(out, None)

    rounded = run("rtn")
    assert run("gptq") < rounded
    assert run("gptq", act_order=True) < rounded
    assert run("awq") < rounded


@pytest.mark.parametrize("name", list(RUNS))
def test_generates(name: str, made: dict[str, Path]) -> None:
    with LLM(made[name], device="cpu", num_blocks=64, progress=False) as llm:
        out = llm.generate("Once upon a time", SamplingParams(temperature=0, max_tokens=20))
    assert len(out[0].text.split()) > 8


def test_speculation_gives_the_same_tokens(made: dict[str, Path]) -> None:
    prompts = ["Once upon a time", "Count from three to seven."]
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    settings = {"device": "cpu", "num_blocks": 64, "progress": False, "dtype": "float32"}
    for name in ("rtn", "int8", "w8a8"):
        with LLM(made[name], **settings) as llm:
            plain = [out.outputs[0].token_ids for out in llm.generate(prompts, params)]
        for drafter in ("ngram", made["int8"]):
            on = {"speculative": drafter, "adaptive_speculation": False}
            with LLM(made[name], **settings, **on) as llm:
                outputs = llm.generate(prompts, params)
                assert [out.outputs[0].token_ids for out in outputs] == plain, (name, drafter)
                assert llm.stats().num_accepted_tokens > 0


def test_folder_is_complete_and_smaller(made: dict[str, Path]) -> None:
    for name, path in made.items():
        files = {file.name for file in path.iterdir()}
        assert {"config.json", "model.safetensors", "quantize_report.json"} <= files
        assert {"tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= files
        assert ".quantize" not in files
        assert ("quantize_config.json" in files) == (name == "gptq")
        tensors = load_file(path / "model.safetensors")
        # The head is the embedding: stored once, in floating point.
        assert not any(tensor.startswith("lm_head") for tensor in tensors)
        original = load_file(MODEL / "model.safetensors")
        embedding = "model.embed_tokens.weight"
        assert torch.equal(tensors[embedding], original[embedding])
        report = json.loads((path / "quantize_report.json").read_text())
        assert len(report["layers"]) == 5 * 7
        assert report["bytes"]["after"] < 0.65 * report["bytes"]["before"]
        limit = 0.02 if report["options"]["bits"] == 8 else 0.25
        for row in report["layers"]:
            assert 0 < row["weight_error"] < limit
            assert (row["output_mse"] is None) == (report["options"]["method"] == "rtn")


def test_gptq_lowers_output_errors(made: dict[str, Path]) -> None:
    report = json.loads((made["gptq"] / "quantize_report.json").read_text())
    errors = [row["output_error"] for row in report["layers"]]
    assert sum(errors) / len(errors) < 0.08  # rounding to nearest is 0.107 off


@pytest.mark.parametrize(
    "options",
    [
        {"method": "gptq", "format": "gptq_v2", "symmetric": False},
        {"method": "gptq", "act_order": True, "static_groups": False},
        {"method": "gptq", "act_order": True, "static_groups": False, "format": "native"},
        {
            "method": "gptq",
            "act_order": True,
            "static_groups": False,
            "format": "compressed-tensors",
        },
        {"method": "smoothquant", "format": "native"},
        {"method": "rtn", "symmetric": False, "group_size": -1},
        {"method": "rtn", "bits": 8, "format": "gptq", "group_size": 128},  # a short last group
        {"method": "rtn", "skip": ("k_proj", "re:.*layers\\.2\\.", "lm_head")},
        {"method": "gptq", "skip": ("mlp", "layers.0"), "format": "native"},
        {"method": "awq", "skip": ("v_proj", "down_proj"), "format": "awq"},
        {"method": "rtn", "format": "gptq", "skip": ("o_proj",)},
    ],
    ids=lambda o: "-".join(str(v) for v in o.values() if isinstance(v, (str, int))),
)
def test_other_options_load_and_run(options: dict, calib: Path, tmp_path: Path) -> None:
    report = quantized(tmp_path / "out", calib, **{"samples": 4, "seqlen": 128} | options)
    model = load_model(tmp_path / "out", dtype="float32", progress=False)
    ids = torch.tensor(load_tokenizer(MODEL).encode("Once upon a time, there was a little cat."))
    plain = load_model(MODEL, dtype="float32", progress=False)
    assert perplexity(model, ids) < 1.3 * perplexity(plain, ids)
    names = {row["name"].rsplit(".", 1)[1] for row in report["layers"]}
    assert not names & set(options.get("skip", ()))


def test_untied_head_is_quantised_when_asked(calib: Path, tmp_path: Path) -> None:
    source = tmp_path / "untied"
    source.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (source / name).write_bytes((MODEL / name).read_bytes())
    config = json.loads((MODEL / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    tensors = load_file(MODEL / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    ids = torch.tensor(load_tokenizer(MODEL).encode("Once upon a time, there was a little cat."))
    expected = perplexity(load_model(source, dtype="float32", progress=False), ids)
    for method, form in (("rtn", None), ("gptq", None), ("rtn", "native"), ("smoothquant", None)):
        out = tmp_path / f"{method}{form}"
        group = None if method == "smoothquant" else 64
        options = QuantizeOptions(
            method, group_size=group, skip=(), format=form, samples=4, seqlen=128
        )
        report = quantize_checkpoint(source, out, options, calib=calib, progress=False)
        assert report["layers"][-1]["name"] == "lm_head"
        assert "lm_head.weight" not in load_file(out / "model.safetensors") or method[0] == "s"
        model = load_model(out, dtype="float32", progress=False)
        assert perplexity(model, ids) < 1.3 * expected
    with pytest.raises(ValueError, match="lm_head in floating point"):
        options = QuantizeOptions("awq", group_size=64, skip=())
        quantize_checkpoint(source, tmp_path / "x", options, calib=calib, progress=False)


def test_resuming_after_a_kill_gives_the_same_bytes(calib: Path, tmp_path: Path) -> None:
    options = {"samples": 16, "seqlen": 256, "method": "gptq"}
    quantized(tmp_path / "whole", calib, **options)
    out = tmp_path / "killed"
    arguments = ["--method", "gptq", "--samples", "16", "--seqlen", "256", "--group-size", "64"]
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "fastinfer.cli.main", "quantize", "--quiet"),
            *("--model", str(MODEL), "--out", str(out), "--calib", str(calib), *arguments),
        ],
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
    )
    marker, deadline = out / ".quantize" / "rows_0001.json", time.monotonic() + 60
    while not marker.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert marker.exists()
    assert not (out / "config.json").exists()
    block = out / ".quantize" / "block_0000.safetensors"
    written = block.stat().st_mtime_ns
    chosen = QuantizeOptions("gptq", group_size=64, samples=16, seqlen=256)
    with pytest.raises(FileExistsError, match="--overwrite"):
        quantize_checkpoint(MODEL, out, chosen, calib=calib)
    other = QuantizeOptions("gptq", group_size=32, samples=16, seqlen=256)
    with pytest.raises(ValueError, match="another group_size"):
        quantize_checkpoint(MODEL, out, other, calib=calib, resume=True)
    assert block.stat().st_mtime_ns == written
    report = quantize_checkpoint(MODEL, out, chosen, calib=calib, resume=True, progress=False)
    assert len(report["layers"]) == 35
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    with pytest.raises(FileExistsError, match="nothing to resume"):
        quantize_checkpoint(MODEL, out, chosen, calib=calib, resume=True)


def test_dead_channels_everywhere(calib: Path, tmp_path: Path) -> None:
    """Zero norm weights, rows and columns: no NaN from any method."""
    source = tmp_path / "dead"
    source.mkdir()
    for file in MODEL.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(MODEL / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("layernorm.weight"):
            tensor[::7] = 0
        elif name.endswith("_proj.weight"):
            tensor[5] = 0
            tensor[:, 11] = 0
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    for method in ("gptq", "awq", "smoothquant"):
        group = None if method == "smoothquant" else 64
        options = QuantizeOptions(method, group_size=group, samples=4, seqlen=128)
        report = quantize_checkpoint(source, tmp_path / method, options, calib=calib)
        assert all(row["output_error"] < 0.2 for row in report["layers"])
        assert quality_of_few(tmp_path / method) < 1.3 * quality_of_few(source)


def quality_of_few(folder: Path) -> float:
    text = (TINY / "heldout.txt").read_text(encoding="utf-8")[:2000]
    model = load_model(folder, dtype="float32", progress=False)
    return perplexity(model, encode_text(load_tokenizer(MODEL), text))


def test_refusals(calib: Path, tmp_path: Path, made: dict[str, Path]) -> None:
    def run(model: Path = MODEL, out: Path = tmp_path / "out", **options: object) -> None:
        text = options.pop("calib", calib)
        quantize_checkpoint(model, out, QuantizeOptions(**options), calib=text, progress=False)

    for match, options in (
        ("method must be", {"method": "magic"}),
        ("format must be one of", {"format": "gguf"}),
        ("group_size must divide the", {"group_size": 128}),
        ("multiple of 8", {"format": "native", "group_size": 12}),
        ("calib must be a text file", {"method": "gptq", "group_size": 64, "calib": None}),
        ("skip must leave a layer", {"group_size": 64, "skip": ("model",)}),
        ("must have 8 bits", {"method": "smoothquant", "bits": 4}),
        ("compressed-tensors or native", {"method": "smoothquant", "format": "gptq"}),
        ("act_order must be used with gptq", {"act_order": True}),
        ("damp must be", {"method": "gptq", "damp": 0.0}),
        ("alpha must be", {"method": "smoothquant", "alpha": 2.0}),
        ("needs 4 bits", {"format": "awq", "bits": 8, "group_size": 64}),
        ("samples must be", {"method": "gptq", "group_size": 64, "samples": 0}),
    ):
        with pytest.raises(ValueError, match=match):
            run(**options)
    with pytest.raises(QuantError, match="unquantised checkpoint"):
        run(made["rtn"], group_size=64)
    with pytest.raises(ValueError, match="own folder"):
        run(out=MODEL, group_size=64)
    with pytest.raises(FileNotFoundError, match="calib must be a text file"):
        run(method="gptq", group_size=64, calib=tmp_path / "absent.txt")
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "diary.txt").write_text("dear diary")
    with pytest.raises(FileExistsError, match="new or empty folder"):
        run(out=precious, group_size=64)
    quantize_checkpoint(
        MODEL, precious, QuantizeOptions(group_size=64), overwrite=True, progress=False
    )
    assert (precious / "diary.txt").read_text() == "dear diary"


def test_damaged_weights_are_named(tmp_path: Path, calib: Path) -> None:
    source = tmp_path / "nan"
    source.mkdir()
    for file in MODEL.iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    tensors = load_file(MODEL / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(QuantError, match=r"layers\.1\.mlp\.up_proj: .*finite"):
        quantize_checkpoint(source, tmp_path / "a", QuantizeOptions(group_size=64))
    options = QuantizeOptions("awq", group_size=64, samples=2, seqlen=64)
    with pytest.raises(QuantError, match="finite"):
        quantize_checkpoint(source, tmp_path / "b", options, calib=calib)


# ---- other families --------------------------------------------------------------------------


def save_random(folder: Path, family: str) -> None:
    """Biases everywhere (Llama) or on q, k, v (Qwen2), as many KV heads as heads, untied."""
    sizes = {
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    }
    if family == "Llama":
        sizes |= {"attention_bias": True, "mlp_bias": True}
    config = getattr(transformers, f"{family}Config")(**sizes)
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "norm.weight")):
            parameter.data += torch.randn_like(parameter) * 0.3
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((MODEL / name).read_bytes())


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_biases_survive_and_factors_cancel(family: str, calib: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    save_random(source, family)
    config, checkpoint = load_config(source), Checkpoint(source)
    ids = torch.randint(0, 1024, (300,))
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    for method in ("awq", "smoothquant"):
        block = Block(config, 0, checkpoint)
        before = {name: t.clone() for name, t in block.layer.state_dict().items()}
        calibration = Calibration(config, [ids[:200], ids[200:]], embedding)
        expected = calibration.run(block, 0)
        wanted = {part.name for part in block.parts}
        bits = 8 if method == "smoothquant" else 4
        grid = GridOptions(bits, -1 if bits == 8 else 32, bits == 8)
        with torch.no_grad():
            quantize_block(block, MethodOptions(method, grid), calibration, wanted, lambda _: None)
        assert torch.allclose(calibration.hidden[0], expected, atol=2e-5)
        changed = {n for n, t in block.layer.state_dict().items() if not torch.equal(t, before[n])}
        assert {"input_norm.weight", "post_norm.weight", "attn.qkv_proj.weight"} <= changed
        assert ("attn.o_proj.weight" in changed) == (method == "awq")
    model = load_model(source, dtype="float32", progress=False)
    for method in ("rtn", "gptq", "awq", "smoothquant"):
        options = QuantizeOptions(
            method,
            bits=None if method in ("awq", "smoothquant") else 8,
            group_size=None if method == "smoothquant" else 32,
            samples=4,
            seqlen=64,
        )
        out = tmp_path / method
        quantize_checkpoint(source, out, options, calib=calib, progress=False)
        made = load_model(out, dtype="float32", progress=False)
        error = (logits(made, ids) - logits(model, ids)).norm() / logits(model, ids).norm()
        assert error < (0.2 if method == "awq" else 0.03)


@torch.no_grad()
def logits(model: CausalLM, ids: torch.Tensor) -> torch.Tensor:
    packed = pack_sequences([ids])
    caches = [empty_cache(model.config, packed.blocks, torch.float32) for _ in model.layers]
    return model.compute_logits(model(ids, packed.meta, caches))
