"""What a load test asks for, and when: synthetic workloads, trace files, arrival times. No tensors.

Every request is a conversation; most have a single turn. A later turn's prompt is everything before
it, the engine's answer included, and arrives when that answer is complete.
"""

from __future__ import annotations

import json
import math
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# name -> (prompt tokens, output tokens, what it stands for)
SHAPES: dict[str, tuple[int, int, str]] = {
    "random": (1024, 128, "prompts and outputs of one length"),
    "decode": (128, 2048, "short prompts, long outputs"),
    "balanced": (1000, 1000, "as many tokens in as out"),
    "uniform": (1024, 1024, "lengths evenly between 100 and these"),
    "lognormal": (380, 100, "lengths spread as in chat logs; these are the medians"),
    "prefix": (128, 128, "prompts that begin alike: prefix-len tokens of num-prefixes texts"),
    "chat": (128, 128, "conversations of several turns, each with the whole past in its prompt"),
}
_SIGMA_IN, _SIGMA_OUT = 1.1, 0.85  # of the logarithms: means about 1.8 and 1.4 times the medians
_SHORTEST = 100  # of "uniform"


@dataclass(slots=True)
class Turn:
    """What is added to a prompt, and how many tokens answer it."""

    tokens: list[int]
    max_tokens: int


@dataclass(slots=True)
class Conversation:
    """Turns in order. `arrival` is in seconds from the start; None lets the arrival model say."""

    turns: list[Turn] = field(default_factory=list)
    arrival: float | None = None

    @property
    def total_tokens(self) -> int:
        """Longest prompt + output."""
        return sum(len(turn.tokens) + turn.max_tokens for turn in self.turns)


def make_workload(
    name: str,
    *,
    num_requests: int,
    vocab_size: int,
    seed: int = 0,
    input_len: int | None = None,
    output_len: int | None = None,
    max_len: int | None = None,
    num_prefixes: int = 8,
    prefix_len: int = 512,
    turns: int = 4,
) -> list[Conversation]:
    """Conversations of random token ids, the same ones for the same arguments.

    Args:
        name: One of `SHAPES`.
        num_requests: Conversations; "chat" makes `turns` requests of each.
        vocab_size: Token ids are below this.
        seed: Of all random choices.
        input_len: Prompt tokens (per turn); None is the shape's own.
        output_len: Output tokens (per turn); None is the shape's own.
        max_len: No conversation is longer; "uniform" and "lognormal" are cut, others refused.
        num_prefixes: Of "prefix".
        prefix_len: Of "prefix".
        turns: Of "chat".

    Raises:
        ValueError: The name is unknown, a number is out of range, or requests are too long.
    """
    if name not in SHAPES:
        raise ValueError(f"bench: workload must be one of {', '.join(SHAPES)}, got {name!r}")
    inputs = SHAPES[name][0] if input_len is None else input_len
    outputs = SHAPES[name][1] if output_len is None else output_len
    numbers = {"num-requests": num_requests, "input-len": inputs, "output-len": outputs}
    numbers |= {"num-prefixes": num_prefixes, "prefix-len": prefix_len, "turns": turns}
    for option, value in numbers.items():
        if value < 1:
            raise ValueError(f"bench: --{option} must be at least 1, got {value}")
    rng = random.Random(seed)

    def ids(count: int) -> list[int]:
        return rng.choices(range(vocab_size), k=count)

    def lengths() -> tuple[int, int]:
        if name == "uniform":
            low = (min(_SHORTEST, inputs), min(_SHORTEST, outputs))
            pair = (rng.randint(low[0], inputs), rng.randint(low[1], outputs))
        elif name == "lognormal":
            pair = (
                max(1, round(rng.lognormvariate(math.log(inputs), _SIGMA_IN))),
                max(1, round(rng.lognormvariate(math.log(outputs), _SIGMA_OUT))),
            )
        else:
            return inputs, outputs
        if max_len is None:
            return pair
        prompt = max(1, min(pair[0], max_len - 1))
        return prompt, max(1, min(pair[1], max_len - prompt))

    prefixes = [ids(prefix_len) for _ in range(num_prefixes)] if name == "prefix" else []
    made = []
    for index in range(num_requests):
        conversation = Conversation()
        for _ in range(turns if name == "chat" else 1):
            prompt, answer = lengths()
            begin = prefixes[index % num_prefixes] if prefixes else []
            conversation.turns.append(Turn(begin + ids(prompt), answer))
        made.append(conversation)
    if prefixes:
        rng.shuffle(made)
    _check_lengths(made, max_len)
    return made


def read_trace(
    path: str | Path, *, vocab_size: int, seed: int = 0, max_len: int | None = None
) -> list[Conversation]:
    """Requests of a file with one JSON object per line.

    Keys: `arrival` in seconds (or `timestamp` in milliseconds); the prompt as `prompt_token_ids` or
    as a number of random tokens in `input_length`; the number of output tokens in `output_length`.

    Args:
        path: The file.
        vocab_size: Of the random tokens.
        seed: Of the random tokens.
        max_len: Longest prompt + output that can run.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is not such an object, or a request is too long.
    """
    rng = random.Random(seed)
    made = []
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row: dict[str, Any] = json.loads(line)
            ids = row.get("prompt_token_ids")
            if ids is None:
                ids = rng.choices(range(vocab_size), k=int(row["input_length"]))
            seconds = row["arrival"] if "arrival" in row else row.get("timestamp", 0) / 1000
            answer = int(row["output_length"])
            if not ids or answer < 1 or not 0 <= seconds < math.inf:
                raise ValueError(row)
            made.append(Conversation([Turn([int(i) for i in ids], answer)], float(seconds)))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ValueError(
                f"bench: line {number} of {path} must be a JSON object with arrival (seconds), "
                f"input_length or prompt_token_ids, and output_length, got {line:.80}"
            ) from None
    if not made:
        raise ValueError(f"bench: {path} must hold at least one request, got none")
    _check_lengths(made, max_len)
    return sorted(made, key=lambda each: each.arrival or 0.0)


def _check_lengths(made: list[Conversation], max_len: int | None) -> None:
    longest = max(each.total_tokens for each in made)
    if max_len is not None and longest > max_len:
        raise ValueError(
            f"bench: requests must fit into {max_len} tokens, prompt and output together, got "
            f"{longest}; lower --input-len or --output-len, or raise --max-model-len or "
            "--num-blocks"
        )


def arrival_times(
    count: int, *, rate: float = math.inf, burstiness: float = 1.0, seed: int = 0
) -> list[float]:
    """Seconds from the start at which requests arrive.

    Args:
        count: Of requests.
        rate: Requests per second on average; infinite is all at once.
        burstiness: Shape of the gamma distribution of the gaps: 1 is a Poisson process, less comes
            in bursts, more is steadier.
        seed: Of the gaps.

    Raises:
        ValueError: The rate or the burstiness is not positive.
    """
    for name, value in (("request-rate", rate), ("burstiness", burstiness)):
        if not value > 0:
            raise ValueError(f"bench: --{name} must be > 0, got {value}")
    if math.isinf(rate):
        return [0.0] * count
    rng = random.Random(seed)
    now, times = 0.0, []
    for _ in range(count):
        now += rng.gammavariate(burstiness, 1 / (rate * burstiness))
        times.append(now)
    return times
