"""What users pass as prompts, brought into one form: text if known, token ids, parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from .config import EngineConfig, SamplingParams

Prompt = str | Sequence[int] | Mapping[str, Any]
_BYTES = (bytes, bytearray, memoryview)  # sequences of integers, but neither text nor token ids
ParsedPrompt = tuple[str | None, list[int], SamplingParams]


def parse_prompts(
    prompts: Prompt | Sequence[Prompt],
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    tokenizer: Any,
    folder: str,
) -> list[ParsedPrompt]:
    """One entry per prompt, with its own checked copy of the parameters.

    Args:
        prompts: Text, token ids (list, array or tensor), {"prompt": text},
            {"prompt_token_ids": ids}; or a list of these.
        sampling_params: One for all, one per prompt, or None for the defaults.
        tokenizer: For text; None when there is none.
        folder: The model, for messages.

    Raises:
        ValueError: A prompt is none of these, or is text without a tokenizer; or the numbers of
            prompts and parameters differ.
    """
    if hasattr(prompts, "tolist"):
        prompts = prompts.tolist()
    if not isinstance(prompts, (str, Mapping, Sequence)) or isinstance(prompts, _BYTES):
        raise ValueError(
            "LLM: prompts must be text, a list of token ids, or a list of these, got "
            f"{type(prompts).__name__}"
        )
    single = isinstance(prompts, (str, Mapping)) or (
        len(prompts) > 0 and all(isinstance(item, Integral) for item in prompts)
    )
    many: list[Any] = [prompts] if single else list(prompts)
    if sampling_params is None:
        sampling_params = SamplingParams()
    if isinstance(sampling_params, SamplingParams):
        params = [sampling_params.copy()] * len(many)
    elif not isinstance(sampling_params, Sequence) or not all(
        isinstance(each, SamplingParams) for each in sampling_params
    ):
        raise ValueError(
            "LLM: sampling_params must be a SamplingParams or a list of them, got "
            f"{sampling_params!r:.80}"
        )
    else:
        params = [each.copy() for each in sampling_params]
    if len(params) != len(many):
        raise ValueError(
            f"LLM: sampling_params must be one or one per prompt, got {len(params)} for "
            f"{len(many)} prompts"
        )
    parsed = [_tokenize(prompt, tokenizer, folder) for prompt in many]
    return [(text, ids, each) for (text, ids), each in zip(parsed, params, strict=True)]


def _tokenize(prompt: Any, tokenizer: Any, folder: str) -> tuple[str | None, list[int]]:
    text: str | None = None
    if isinstance(prompt, Mapping):
        text = prompt.get("prompt")
        prompt = prompt.get("prompt_token_ids", text)
    if isinstance(prompt, str):
        if tokenizer is None:
            raise ValueError(
                f"LLM: prompt must be token ids, because {folder!r} holds no tokenizer; pass a "
                "list of ids, or tokenizer='folder with one'"
            )
        return prompt, list(tokenizer.encode(prompt))
    ids = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if (
        not isinstance(ids, Sequence)
        or isinstance(ids, _BYTES)
        or not all(isinstance(token, Integral) for token in ids)
    ):
        raise ValueError(
            "LLM: prompt must be text, a list of token ids, {'prompt': text} or "
            f"{{'prompt_token_ids': ids}}, got {prompt!r:.80}"
        )
    return text, [int(token) for token in ids]


def find_tokenizer(config: EngineConfig) -> Any:
    """The tokenizer of `config.tokenizer`, or else of the model; None when the model has none."""
    from ..text import load_tokenizer

    folder = Path(config.tokenizer or config.model)
    files = ("tokenizer.json", "tokenizer.model")
    if config.tokenizer is None and not any((folder / name).is_file() for name in files):
        return None
    return load_tokenizer(folder)
