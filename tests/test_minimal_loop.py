"""examples/minimal_loop.py: greedy tokens as transformers has them, and a command that runs."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

import fastinfer

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "examples" / "minimal_loop.py"
VOCAB = 97


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("minimal_loop", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["minimal_loop"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def make(folder: Path, **changes: object) -> LlamaForCausalLM:
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.15,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    torch.manual_seed(3)
    model = LlamaForCausalLM(LlamaConfig(**{**settings, **changes})).eval()
    model.save_pretrained(folder)
    vocab = {f"w{i}": i for i in range(VOCAB)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    return model


def expected(model: LlamaForCausalLM, prompt: list[int], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
    return out[0, len(prompt) :].tolist()


PROMPTS = [[5, 9, 33, 2, 71, 60, 8], [44], list(range(20, 41))]

VARIANTS = {
    "plain": {},
    "tied, own head_dim": {"tie_word_embeddings": True, "head_dim": 24},
    "llama3 rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
}


@pytest.mark.parametrize("block_size", [1, 16])
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_equals_transformers(
    example: ModuleType, tmp_path: Path, variant: str, block_size: int
) -> None:
    reference = make(tmp_path, **VARIANTS[variant])
    model = example.Llama(tmp_path, "cpu")
    outputs = example.generate(model, PROMPTS, 12, block_size=block_size)
    assert outputs == [expected(reference, prompt, 12) for prompt in PROMPTS]


def test_stops_at_eos_and_at_the_trained_length(example: ModuleType, tmp_path: Path) -> None:
    reference = make(tmp_path)
    continuation = expected(reference, PROMPTS[0], 12)
    model = example.Llama(tmp_path, "cpu")
    model.eos = {continuation[4]}
    first = continuation.index(continuation[4])
    stopped, other = example.generate(model, [PROMPTS[0], PROMPTS[2]], 60)
    assert stopped == continuation[: first + 1]
    assert len(other) == 64 - len(PROMPTS[2]) or other[-1] in model.eos


def test_sampling_is_seeded(example: ModuleType, tmp_path: Path) -> None:
    make(tmp_path)
    model = example.Llama(tmp_path, "cpu")
    runs = [example.generate(model, PROMPTS, 12, 1.0, 0.9, seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    alone = example.generate(model, PROMPTS[:1], 12, 1.0, 0.9, 1)
    assert alone == runs[0][:1]


@pytest.mark.parametrize("prompts", [[[]], [[1], []], [[1] * 64]])
def test_refuses_impossible_prompts(
    example: ModuleType, tmp_path: Path, prompts: list[list[int]]
) -> None:
    make(tmp_path)
    with pytest.raises(SystemExit, match="prompts must have 1 to 63 tokens"):
        example.generate(example.Llama(tmp_path, "cpu"), prompts, 4)


def test_refuses_other_models(example: ModuleType, tmp_path: Path) -> None:
    make(tmp_path, attention_bias=True)
    with pytest.raises(SystemExit, match="plain Llama"):
        example.Llama(tmp_path, "cpu")
    make(tmp_path, rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    with pytest.raises(SystemExit, match="rope type linear"):
        example.Llama(tmp_path, "cpu")


def run(*options: str) -> str:
    """What the script prints, run as a user runs it."""
    package = str(Path(fastinfer.__file__).parents[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": package}
    command = [sys.executable, str(SCRIPT), *options]
    result = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert result.returncode == 0, result.stderr
    assert "tokens/s" in result.stdout
    return result.stdout


def test_command_line(tmp_path: Path) -> None:
    reference = make(tmp_path)
    options = ("--prompt", "w5 w9", "w44", "--max-tokens", "5")
    out = run("--model", str(tmp_path), *options)
    tokens = expected(reference, [5, 9], 5)
    assert " ".join(f"w{t}" for t in [5, 9, *tokens]) in out


def test_default_is_the_tiny_checkpoint_of_the_repository() -> None:
    """Three tokens: here the best logit leads by 8; later ones are ties within bf16 rounding."""
    folder = ROOT / "examples" / "tiny" / "model"
    reference = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    prompt = tokenizer.encode("Once upon a time, Anna").ids
    text = tokenizer.decode(prompt + expected(reference, prompt, 3))
    assert text in run("--prompt", "Once upon a time, Anna", "--max-tokens", "3")


def test_is_short_and_stands_on_the_operators_alone() -> None:
    text = SCRIPT.read_text()
    assert len(text.splitlines()) <= 200
    imports = [line for line in text.splitlines() if "import" in line and "fastinfer" in line]
    assert imports == ["from fastinfer import ops"]
