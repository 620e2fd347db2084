"""Makes the training text of the tiny checkpoint: `python corpus.py --seed 7 --bytes 4000`.

A document is a story or a chat, written with the special tokens that the tokenizer knows:

    <|begin|>STORY<|end|>
    <|begin|><|user|>QUESTION<|end|><|assistant|>ANSWER<|end|><|user|>...

Document i of a seed depends on (seed, i) alone, so any slice of the corpus can be made anywhere.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

from tinytext.chats import chat
from tinytext.stories import tell

BEGIN, END, USER, ASSISTANT, PAD = "<|begin|>", "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"
HELDOUT_SEED, HELDOUT_BYTES = 20_000_003, 80_000  # training seeds stay below this seed


def document(seed: int, index: int) -> str:
    """The document of that number, special tokens included."""
    rng = random.Random(seed * 1_000_003 + index)
    if rng.random() < 0.5:
        return f"{BEGIN}{tell(rng, episodes=rng.choice((1, 1, 1, 2))).text()}{END}"
    turns = "".join(f"{USER}{ask}{END}{ASSISTANT}{say}{END}" for ask, say in chat(rng))
    return f"{BEGIN}{turns}"


def documents(seed: int, start: int = 0) -> Iterator[str]:
    """Documents start, start + 1, ... of a seed, without end."""
    index = start
    while True:
        yield document(seed, index)
        index += 1


def heldout_text() -> str:
    """The text of heldout.txt: documents one after the other, a line break between two."""
    records: list[str] = []
    size = 0
    for doc in documents(HELDOUT_SEED):
        records.append(doc + "\n")
        size += len(records[-1])
        if size >= HELDOUT_BYTES:
            break
    return "".join(records)


def split_documents(text: str) -> list[str]:
    """The documents of a text made by `heldout_text`."""
    head, *rest = text.rstrip("\n").split(BEGIN)
    if head:
        raise ValueError(f"corpus: text must start with {BEGIN}, got {head[:20]!r}; make it anew")
    return [BEGIN + part.rstrip("\n") for part in rest]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bytes", type=int, default=100_000, help="stop after this much text")
    parser.add_argument("--heldout", type=Path, help="write the held-out text to this file instead")
    args = parser.parse_args()
    if args.heldout:
        args.heldout.write_text(heldout_text(), encoding="utf-8")
        return
    size = 0
    for doc in documents(args.seed):
        sys.stdout.write(doc + "\n")
        size += len(doc) + 1
        if size >= args.bytes:
            return


if __name__ == "__main__":
    main()
