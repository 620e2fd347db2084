"""Trains the tiny checkpoint (`--size main`) or its draft (`--size draft`) on the made text.

    python train.py --size main --minutes 30 --out model
    python train.py --size draft --minutes 10 --out draft

Rows hold documents one after the other and start with <|begin|>; no text is seen twice. Rows of
half the length come first (attention is what costs on a CPU), the full length at the end.
The folder written is a Hugging Face checkpoint in bf16. Progress is the larger of step / steps and
time / minutes; the learning rate follows a cosine over it, so a run always ends cooled down.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from corpus import ASSISTANT, BEGIN, END, HELDOUT_SEED, PAD, USER, document, documents
from llama import SHAPES, Llama
from measure import heldout_loss
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm

HERE = Path(__file__).parent
SPECIAL = (PAD, BEGIN, END, USER, ASSISTANT)  # ids 0..4
TOKENIZER_SEED, TOKENIZER_DOCUMENTS = 1, 30_000
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '<|user|>' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% else %}{{ raise_exception('roles must be user or assistant, got ' + message['role']) }}"
    "{% endif %}{{ message['content'] | trim }}{{ '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(vocab: int) -> Tokenizer:
    """Byte-level BPE on the made text; `encode(text)` puts <|begin|> in front."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = (
        part
        for i in range(TOKENIZER_DOCUMENTS)
        for part in _without_special(document(TOKENIZER_SEED, i))
    )
    tokenizer.train_from_iterator(texts, trainer)
    begin = tokenizer.token_to_id(BEGIN)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A $B", special_tokens=[(BEGIN, begin)]
    )
    return tokenizer


def _without_special(text: str) -> list[str]:
    for token in SPECIAL:
        text = text.replace(token, "\0")
    return [part for part in text.split("\0") if part]


def rows(tokenizer: Tokenizer, seed: int, length: int) -> Iterator[list[int]]:
    """Rows of `length` tokens, each starting with a document; its last document is cut."""
    source, row = documents(seed), []
    while True:
        batch = [next(source) for _ in range(2000)]
        for encoding in tokenizer.encode_batch(batch, add_special_tokens=False):
            row += encoding.ids
            if len(row) >= length:
                yield row[:length]
                row = []


def rounded(model: Llama) -> Llama:
    """A copy in fp32 whose weights went through bf16, as the checkpoint's do."""
    copy = Llama(model.s)
    copy.load_state_dict({k: v.bfloat16().float() for k, v in model.state_dict().items()})
    return copy.eval()


def save(model: Llama, tokenizer: Tokenizer, out: Path) -> None:
    """Writes the checkpoint folder."""
    out.mkdir(parents=True, exist_ok=True)
    ids = {
        "pad": tokenizer.token_to_id(PAD),
        "bos": tokenizer.token_to_id(BEGIN),
        "eos": tokenizer.token_to_id(END),
    }
    tensors = {k: v.detach().bfloat16().contiguous() for k, v in model.state_dict().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    _write(out / "config.json", model.s.config(ids))
    generation = {f"{name}_token_id": i for name, i in ids.items()}
    _write(out / "generation_config.json", {**generation, "do_sample": False})
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    _write(
        out / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "pad_token": PAD,
            "additional_special_tokens": [USER, ASSISTANT],
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.s.max_position,
            "chat_template": CHAT_TEMPLATE,
        },
    )


def _write(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def learning_rate(peak: float, progress: float, warmup: float = 0.02) -> float:
    if progress < warmup:
        return peak * (progress / warmup + 1e-3)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))))


def train(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    shape = SHAPES[args.size]
    tokenizer_file = args.tokenizer or args.out / "tokenizer.json"
    if tokenizer_file.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_file))
    else:
        tokenizer = train_tokenizer(shape.vocab)
    heldout = (HERE / "heldout.txt").read_text(encoding="utf-8")
    model = Llama(shape)
    print(f"{args.size}: {sum(p.numel() for p in model.parameters()):,} parameters")
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() != 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}],
        lr=args.lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    forward = torch.compile(model) if args.compile else model
    short = rows(tokenizer, args.seed + 100, args.length // 2 + 1)
    long = rows(tokenizer, args.seed + 101, args.length + 1)
    best, start = math.inf, time.monotonic()
    bar = tqdm(total=args.steps, mininterval=5, desc=args.size)
    for step in range(args.steps + 1):
        progress = max(step / args.steps, (time.monotonic() - start) / (60 * args.minutes))
        done = progress >= 1.0
        if done or (step % args.eval_every == 0 and step > 0):
            loss = heldout_loss(rounded(model), tokenizer, heldout)
            if loss < best:
                best = loss
                save(model, tokenizer, args.out)
            minutes = (time.monotonic() - start) / 60
            tqdm.write(
                f"step {step} ({minutes:.1f} min): held-out loss {loss:.4f}, "
                f"perplexity {math.exp(loss):.3f}"
            )
        if done:
            break
        source, count = (short, 2 * args.batch) if progress < args.long_from else (long, args.batch)
        batch = torch.tensor([next(source) for _ in range(count)])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args.lr, progress)
        with torch.autocast("cpu", torch.bfloat16, enabled=not args.fp32):
            logits = forward(batch[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        bar.update()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", progress=f"{progress:.3f}")
    bar.close()
    print(f"best held-out perplexity {math.exp(best):.3f}, checkpoint in {args.out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=sorted(SHAPES), default="main")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, help="use this tokenizer.json")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--length", type=int, default=512, help="tokens per row")
    parser.add_argument(
        "--long-from", type=float, default=0.75, help="progress up to which rows are half as long"
    )
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fp32", action="store_true", help="no bf16 autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    args = parser.parse_args()
    if not 0 <= args.seed < HELDOUT_SEED - 100:
        parser.error(f"--seed must be in [0, {HELDOUT_SEED - 100}), got {args.seed}")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    train(args)


if __name__ == "__main__":
    main()
