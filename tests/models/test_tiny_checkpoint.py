"""The shipped tiny checkpoint, its draft and the grammar that made their text."""

from __future__ import annotations

import importlib
import json
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

TINY = Path(__file__).resolve().parents[2] / "examples" / "tiny"
FOLDERS = {"main": TINY / "model", "draft": TINY / "draft"}
LIMITS = {"main": 4_000_000, "draft": 1_000_000}  # bytes, the whole folder
# measured on that part of heldout.txt: 0.3296 and 0.5389 nats per token, agreement 0.875
LOSS_BOUNDS = {"main": 0.335, "draft": 0.545}
AGREEMENT_BOUND = 0.87
PART = 20_000  # characters of heldout.txt that the loss tests read

BOTH = pytest.mark.parametrize("size", ["main", "draft"])


def load_module(name: str) -> ModuleType:
    """A module of examples/tiny, which is a folder of scripts and not a package."""
    if str(TINY) not in sys.path:
        sys.path.insert(0, str(TINY))
    return importlib.import_module(name)


corpus = load_module("corpus")
llama = load_module("llama")
measure = load_module("measure")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The matrices are too small for two threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def heldout() -> str:
    return (TINY / "heldout.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def part(heldout: str) -> str:
    """The first whole documents of the held-out text."""
    return heldout[: heldout.index(corpus.BEGIN, PART)]


@pytest.fixture(scope="module")
def loaded() -> dict[str, tuple[torch.nn.Module, Tokenizer]]:
    return {size: measure.load(folder) for size, folder in FOLDERS.items()}


def read_json(size: str, name: str) -> dict:
    return json.loads((FOLDERS[size] / name).read_text(encoding="utf-8"))


# the files


@BOTH
def test_folder_is_complete_and_small(size: str) -> None:
    files = {p.name: p.stat().st_size for p in FOLDERS[size].iterdir()}
    assert set(files) == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) <= LIMITS[size]


@BOTH
def test_config_describes_the_tensors(size: str) -> None:
    config = read_json(size, "config.json")
    d, kv = config["head_dim"], config["num_key_value_heads"] * config["head_dim"]
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    q = config["num_attention_heads"] * d
    expected = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    expected["model.norm.weight"] = (hidden,)
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        expected[layer + "input_layernorm.weight"] = (hidden,)
        expected[layer + "post_attention_layernorm.weight"] = (hidden,)
        expected[layer + "self_attn.q_proj.weight"] = (q, hidden)
        expected[layer + "self_attn.k_proj.weight"] = (kv, hidden)
        expected[layer + "self_attn.v_proj.weight"] = (kv, hidden)
        expected[layer + "self_attn.o_proj.weight"] = (hidden, q)
        expected[layer + "mlp.gate_proj.weight"] = (wide, hidden)
        expected[layer + "mlp.up_proj.weight"] = (wide, hidden)
        expected[layer + "mlp.down_proj.weight"] = (hidden, wide)
    with safe_open(FOLDERS[size] / "model.safetensors", framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    assert {name: tuple(t.shape) for name, t in tensors.items()} == expected
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.bfloat16, name
        assert torch.isfinite(tensor).all(), name
        assert all(n % 64 == 0 for n in tensor.shape), name  # groups of 32 and 64 fit
    assert config["tie_word_embeddings"] is True
    assert config["num_attention_heads"] > config["num_key_value_heads"]  # real GQA
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]


# the tokenizer


def test_draft_has_the_same_vocabulary() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (FOLDERS["main"] / name).read_bytes() == (FOLDERS["draft"] / name).read_bytes()
    assert read_json("main", "config.json")["vocab_size"] == 1024
    assert read_json("draft", "config.json")["vocab_size"] == 1024


def test_tokenizer_round_trip(heldout: str) -> None:
    tokenizer = Tokenizer.from_file(str(FOLDERS["main"] / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == 1024
    texts = corpus.split_documents(heldout)[:50]
    texts += [
        "",
        " two  spaces\n\n\ttab",
        "na\u00efve caf\u00e9 \u4f60\u597d \U0001f642",
        "\x00\x7f",
    ]
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    # text of the grammar is about four characters to the token
    ids = tokenizer.encode(heldout, add_special_tokens=False).ids
    assert len(heldout) / len(ids) > 3.0


def test_special_tokens_are_where_the_configs_say() -> None:
    tokenizer = Tokenizer.from_file(str(FOLDERS["main"] / "tokenizer.json"))
    config, generation = (
        read_json("main", "config.json"),
        read_json("main", "generation_config.json"),
    )
    names = read_json("main", "tokenizer_config.json")
    for key, token in (("bos", "<|begin|>"), ("eos", "<|end|>"), ("pad", "<|pad|>")):
        assert names[f"{key}_token"] == token
        assert config[f"{key}_token_id"] == tokenizer.token_to_id(token)
        assert generation[f"{key}_token_id"] == tokenizer.token_to_id(token)
    begin = tokenizer.token_to_id("<|begin|>")
    assert tokenizer.encode("Hello").ids[0] == begin
    chat = "<|user|>Hello!<|end|><|assistant|>"
    ids = tokenizer.encode(chat, add_special_tokens=False).ids
    assert ids[0] == tokenizer.token_to_id("<|user|>")
    assert ids[-2:] == [tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<|assistant|>")]


def test_chat_template() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(FOLDERS["main"])
    messages = [
        {"role": "user", "content": " Hello! "},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Bye."},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin|><|user|>Hello!<|end|><|assistant|>Hi!<|end|><|user|>Bye.<|end|><|assistant|>"
    )
    with pytest.raises(Exception, match="roles must be user or assistant, got system"):
        tokenizer.apply_chat_template([{"role": "system", "content": "x"}], tokenize=False)


# the models


@BOTH
def test_transformers_loads_it_and_agrees(size: str, loaded: dict, part: str) -> None:
    transformers = pytest.importorskip("transformers")
    hf = transformers.AutoModelForCausalLM.from_pretrained(FOLDERS[size], dtype=torch.float32)
    model, tokenizer = loaded[size]
    x, _ = measure.batches(tokenizer, part)[-1]
    with torch.no_grad():
        torch.testing.assert_close(hf(x).logits, model(x), atol=1e-3, rtol=1e-4)


@BOTH
def test_heldout_loss(size: str, loaded: dict, part: str) -> None:
    model, tokenizer = loaded[size]
    assert measure.heldout_loss(model, tokenizer, part) < LOSS_BOUNDS[size]


def test_draft_agrees_with_main(loaded: dict, part: str) -> None:
    (main, tokenizer), (draft, _) = loaded["main"], loaded["draft"]
    assert measure.agreement(main, draft, tokenizer, part) > AGREEMENT_BOUND
    assert measure.agreement(main, main, tokenizer, part[: part.index(corpus.BEGIN, 500)]) == 1.0


def test_text_reads_as_english(loaded: dict) -> None:
    """A greedy story is made of words that the grammar knows, in sentences that end."""
    model, tokenizer = loaded["main"]
    known = set(re.findall(r"[A-Za-z]+", " ".join(corpus.document(3, i) for i in range(3000))))
    story = measure.generate(model, tokenizer, corpus.BEGIN + "Once upon a time", max_tokens=90)
    words = re.findall(r"[A-Za-z]+", story)[:-1]  # the last word may be cut
    assert 50 < len(words) <= 90
    assert [w for w in words if w not in known] == []
    assert len(re.findall(r"[.!?]", story)) >= 4
    assert len(set(words)) > 25


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What color is snow?", "Snow is white."),
        ("What day comes after Monday?", "Tuesday comes after Monday."),
        ("My name is Zoe.", "Zoe!"),
        ("Count from three to seven.", "Three, four, five, six, seven."),
    ],
)
def test_chat_answers(loaded: dict, question: str, answer: str) -> None:
    model, tokenizer = loaded["main"]
    prompt = f"{corpus.BEGIN}{corpus.USER}{question}{corpus.END}{corpus.ASSISTANT}"
    assert answer in measure.generate(model, tokenizer, prompt, max_tokens=40)


# the grammar


def test_corpus_is_deterministic(heldout: str) -> None:
    assert corpus.document(3, 17) == corpus.document(3, 17)
    assert len({corpus.document(3, i) for i in range(200)} | {corpus.document(4, 1)}) > 150
    assert corpus.heldout_text() == heldout
    assert 50_000 <= len(heldout) <= 100_000


def test_documents_are_well_formed() -> None:
    for i in range(1500):
        text = corpus.document(11, i)
        assert text.isascii()
        assert text.startswith(corpus.BEGIN) and text.endswith(corpus.END)
        assert text.count(corpus.BEGIN) == 1
        assert text.count(corpus.USER) == text.count(corpus.ASSISTANT)
        bare = re.sub(r"<\|\w+\|>", "\n", text)
        assert not re.search(r"[\[\]{}<>|]|  |\ba [aeiou](?!ne)|[.!?] [a-z]", bare), bare


def test_heldout_is_not_training_text(heldout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long held-out documents do not occur in training text, and no seed of train.py makes them."""
    trained = {corpus.document(100, i) for i in range(5000)}
    long = [d for d in corpus.split_documents(heldout) if len(d) > 400]
    assert len(long) > 50
    assert not trained.intersection(long)
    train = load_module("train")
    bad = ["train.py", "--out", "unused", "--seed", str(corpus.HELDOUT_SEED)]
    monkeypatch.setattr(sys, "argv", bad)
    with pytest.raises(SystemExit):
        train.main()


def test_template_language() -> None:
    teller = load_module("tinytext.teller")
    story = teller.Story(random.Random(0), o=teller.Thing("umbrella", "orange"))
    assert story.expand("there was a {o.full}, a {o} and a one. she smiled.") == (
        "There was an orange umbrella, an umbrella and a one. She smiled."
    )
    assert story.expand('[["|"]]hello," said a man. "yes," said a owl.') == (
        '"Hello," said a man. "Yes," said an owl.'
    )
    with pytest.raises(KeyError):
        story.expand("{nobody} came.")


def test_split_documents_refuses_other_text() -> None:
    with pytest.raises(ValueError, match="text must start with"):
        corpus.split_documents("Once upon a time")


def test_learning_rate_warms_up_and_cools_down() -> None:
    train = load_module("train")
    rates = [train.learning_rate(1.0, i / 100) for i in range(101)]
    assert rates[0] < 0.01
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.01)
