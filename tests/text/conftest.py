"""Tiny tokenizers of every kind, trained here and written as checkpoint folders."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

CORPUS = [
    "the quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "tiny models read tiny text; a small vocabulary is enough for a test.",
    "café, naïve, façade, Zürich: words with accents in them",
    "日本語のテキストと中文文本",
    "numbers 1 2 3 14 159 2653 and (brackets) [too] {here}",
    "def f(x):\n    return x  # two  spaces\n",
] * 10
SPECIALS = ["<|bos|>", "<|eos|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte-level BPE with a BOS template, as Llama 3 and Qwen ship it."""
    folder = tmp_path_factory.mktemp("byte_level")
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(CORPUS, trainer)
    tok.add_tokens([tokenizers.AddedToken("<tool>", special=False), "naïveté"])
    tok.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", tok.token_to_id("<|bos|>"))]
    )
    tok.enable_truncation(8)
    tok.enable_padding(length=12, pad_id=tok.token_to_id("<|pad|>"), pad_token="<|pad|>")
    tok.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "special": True},
        "pad_token": "<|pad|>",
        "additional_special_tokens": ["<|im_start|>"],
        "add_bos_token": True,
    }
    write_json(folder / "tokenizer_config.json", config)
    return folder


SpFactory = Callable[..., Path]


@pytest.fixture(scope="session")
def make_sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> SpFactory:
    """make(config=..., added=..., **trainer options) -> folder with a tokenizer.model."""
    spm = pytest.importorskip("sentencepiece")

    def make(
        config: dict[str, Any] | None = None, added: dict[str, int] | None = None, **options: Any
    ) -> Path:
        folder = tmp_path_factory.mktemp("sentencepiece")
        model = io.BytesIO()
        arguments = {
            "vocab_size": 420,
            "model_type": "bpe",
            "byte_fallback": True,
            "remove_extra_whitespaces": False,
            "normalization_rule_name": "identity",
            "character_coverage": 0.98,
            **options,
        }
        spm.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=model,
            minloglevel=2,
            num_threads=1,
            **arguments,
        )
        (folder / "tokenizer.model").write_bytes(model.getvalue())
        if config is not None:
            write_json(folder / "tokenizer_config.json", config)
        if added is not None:
            write_json(folder / "added_tokens.json", added)
        return folder

    return make


LLAMA_CONFIG = {
    "tokenizer_class": "LlamaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "legacy": False,
    "bos_token": {"__type": "AddedToken", "content": "<s>", "normalized": False},
    "eos_token": "</s>",
    "unk_token": "<unk>",
}


@pytest.fixture(scope="session")
def sentencepiece_folder(make_sentencepiece: SpFactory) -> Path:
    """A Llama 2 style folder: tokenizer.model and tokenizer_config.json."""
    return make_sentencepiece(LLAMA_CONFIG)


@pytest.fixture(scope="session")
def llama_json(sentencepiece_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tokenizer as transformers converts it to tokenizer.json (byte fallback)."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("llama_json")
    AutoTokenizer.from_pretrained(sentencepiece_folder).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unigram with a Metaspace decoder: no byte tokens, decoded through a window."""
    folder = tmp_path_factory.mktemp("metaspace")
    tok = tokenizers.Tokenizer(models.Unigram())
    tok.pre_tokenizer = pre_tokenizers.Metaspace()
    tok.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tok.train_from_iterator(CORPUS, trainer)
    tok.save(str(folder / "tokenizer.json"))
    write_json(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>"})
    return folder


@pytest.fixture(scope="session")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """WordPiece: a decoder that joins with spaces."""
    folder = tmp_path_factory.mktemp("wordpiece")
    tok = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(
        vocab_size=200, special_tokens=["[UNK]"], show_progress=False
    )
    tok.train_from_iterator(CORPUS, trainer)
    tok.save(str(folder / "tokenizer.json"))
    return folder
