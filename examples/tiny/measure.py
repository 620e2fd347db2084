"""Measures and samples the tiny checkpoints with plain torch, no other part of fastinfer needed.

    python measure.py                                      perplexity of both, agreement of the two
    python measure.py --prompt "Once upon a time"          greedy text of model/
    python measure.py --chat "What is 3 + 4?" --model draft

Agreement is what speculative decoding lives on: how often the draft's greedy token is the main
model's greedy token, over every position of the held-out text.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import ASSISTANT, BEGIN, END, USER, split_documents
from llama import Llama, Shape
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm

HERE = Path(__file__).parent
IGNORED = -100


def load(folder: Path) -> tuple[Llama, Tokenizer]:
    """The model in fp32 and its tokenizer."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    shape = Shape(
        hidden=config["hidden_size"],
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        head_dim=config["head_dim"],
        intermediate=config["intermediate_size"],
        vocab=config["vocab_size"],
        max_position=config["max_position_embeddings"],
        rope_theta=config["rope_parameters"]["rope_theta"],
        eps=config["rms_norm_eps"],
    )
    model = Llama(shape)
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))


def batches(tokenizer: Tokenizer, text: str, size: int = 16) -> list[tuple[Tensor, Tensor]]:
    """(inputs, targets) of the documents in a text, padded on the right, targets -100 there.

    Each document stands alone; <|begin|> is an input only.
    """
    ids = [tokenizer.encode(d, add_special_tokens=False).ids for d in split_documents(text)]
    ids.sort(key=len)
    out = []
    for i in range(0, len(ids), size):
        group = ids[i : i + size]
        width = max(map(len, group))
        x = torch.tensor([row + [0] * (width - len(row)) for row in group])
        y = torch.tensor([row[1:] + [IGNORED] * (width - len(row)) for row in group])
        out.append((x[:, :-1], y))
    return out


@torch.no_grad()
def heldout_loss(model: Llama, tokenizer: Tokenizer, text: str) -> float:
    """Mean negative log likelihood per token of a text."""
    total, count = 0.0, 0
    for x, y in batches(tokenizer, text):
        logits = model(x).float()
        loss = F.cross_entropy(
            logits.flatten(0, 1), y.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        total += loss.item()
        count += int((y != IGNORED).sum())
    return total / count


@torch.no_grad()
def agreement(main: Llama, draft: Llama, tokenizer: Tokenizer, text: str) -> float:
    """Share of positions at which both models have the same greedy token."""
    same, count = 0, 0
    for x, y in batches(tokenizer, text):
        scored = y != IGNORED
        same += int(((main(x).argmax(-1) == draft(x).argmax(-1)) & scored).sum())
        count += int(scored.sum())
    return same / count


@torch.no_grad()
def generate(
    model: Llama,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 200,
    temperature: float = 0.0,
    seed: int = 0,
) -> str:
    """Text after a prompt that holds its own special tokens; without a cache, so slow but plain."""
    generator = torch.Generator().manual_seed(seed)
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    end, start = tokenizer.token_to_id(END), len(ids)
    for _ in range(max_tokens):
        logits = model(torch.tensor([ids]))[0, -1].float()
        if temperature == 0.0:
            token = int(logits.argmax())
        else:
            p = torch.softmax(logits / temperature, dim=-1)
            token = int(torch.multinomial(p, 1, generator=generator))
        if token == end:
            break
        ids.append(token)
    return tokenizer.decode(ids[start:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="model", help="folder of the checkpoint to sample")
    parser.add_argument("--prompt", help="continue this text")
    parser.add_argument("--chat", help="answer this message")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-tokens", type=int, default=200)
    args = parser.parse_args()
    if args.prompt is not None or args.chat is not None:
        model, tokenizer = load(HERE / args.model)
        text = f"{USER}{args.chat}{END}{ASSISTANT}" if args.chat is not None else args.prompt
        answer = generate(
            model,
            tokenizer,
            BEGIN + text,
            max_tokens=args.max_tokens,
            temperature=args.temperature,
            seed=args.seed,
        )
        print(answer if args.chat is not None else text + answer)
        return
    text = (HERE / "heldout.txt").read_text(encoding="utf-8")
    loaded = {}
    for name in tqdm(("model", "draft"), desc="perplexity"):
        loaded[name], tokenizer = load(HERE / name)
        loss = heldout_loss(loaded[name], tokenizer, text)
        tqdm.write(f"{name}: held-out loss {loss:.4f}, perplexity {math.exp(loss):.3f}")
    share = agreement(loaded["model"], loaded["draft"], tokenizer, text)
    print(f"greedy agreement of draft and model: {100 * share:.1f} %")


if __name__ == "__main__":
    main()
