"""Bodies of /v1/completions and /v1/chat/completions: what is accepted, and what is said otherwise.

A field is used, or is one of those that mean nothing here, or is refused by name: a request is
never answered as if a setting had not been there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..engine.config import SamplingParams

_IGNORED = {  # about accounts, storage and routing: no effect on the text
    "user",
    "store",
    "metadata",
    "service_tier",
    "prompt_cache_key",
    "safety_identifier",
    "parallel_tool_calls",
    "request_id",
}
_PASSED = (  # same name and meaning in SamplingParams
    "n",
    "temperature",
    "top_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    # beyond the API, as in vLLM
    "top_k",
    "min_p",
    "repetition_penalty",
    "min_tokens",
    "ignore_eos",
    "stop_token_ids",
    "skip_special_tokens",
    "include_stop_str_in_output",
)
_SHARED = {
    *_PASSED,
    "model",
    "stream",
    "stream_options",
    "stop",
    "max_tokens",
    "return_token_ids",
    "priority",
}
_COMPLETION = _SHARED | {"prompt", "echo", "logprobs", "best_of", "suffix", "logit_bias"}
_CHAT = _SHARED | {
    "messages",
    "max_completion_tokens",
    "logprobs",
    "top_logprobs",
    "logit_bias",
    "response_format",
    "tools",
    "tool_choice",
    "modalities",
    "chat_template_kwargs",
    "add_generation_prompt",
}
_RESERVED = {  # arguments of the renderer that are no variables of the template
    "self",
    "tokenizer",
    "messages",
    "tools",
    "documents",
    "chat_template",
    "limits",
}
_BOOLEANS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")
MAX_N = 128
MAX_CHOICES = 512  # prompts times n
MAX_STOPS, MAX_STOP_LENGTH = 16, 1024  # strings, characters
MAX_STOP_IDS = 1024
MAX_PRIORITY = 1_000_000


class BadRequest(ValueError):
    """The body cannot be served; `param` is the field, `status` the HTTP status."""

    def __init__(self, message: str, param: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.status = status


@dataclass(slots=True)
class Ask:
    """What a body asks for."""

    prompts: list[Any] = field(default_factory=list)  # text or token ids; chat: messages
    params: SamplingParams = field(default_factory=SamplingParams)
    chat: bool = False
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    return_token_ids: bool = False
    priority: int = 0  # lower is served first
    template_options: dict[str, Any] = field(default_factory=dict)


def read_completion(body: Any, *, models: tuple[str, ...], max_prompts: int) -> Ask:
    """The body of /v1/completions.

    Raises:
        BadRequest: A field is missing, unknown or out of range.
    """
    given = _check(body, _COMPLETION, models)
    if "prompt" not in given:
        raise BadRequest("prompt is required", "prompt")
    ask = _shared(given)
    ask.prompts = _prompts(given["prompt"], max_prompts)
    ask.echo = _bool(given, "echo")
    logprobs = given.get("logprobs")
    if logprobs is not None and isinstance(logprobs, bool):
        raise BadRequest("logprobs must be an integer for completions, got a boolean", "logprobs")
    if given.get("best_of", given.get("n", 1)) != given.get("n", 1):
        raise BadRequest("best_of must equal n: choices are not ranked here", "best_of")
    if given.get("suffix"):
        raise BadRequest("suffix is not supported: the models here do not fill in", "suffix")
    if ask.echo and logprobs is not None:
        raise BadRequest("echo cannot be combined with logprobs: prompts have none here", "echo")
    ask.params = _sampling(given, given.get("max_tokens", 16), logprobs)
    choices = len(ask.prompts) * ask.params.n
    if choices > MAX_CHOICES:
        raise BadRequest(f"n times the prompts must be at most {MAX_CHOICES}, got {choices}", "n")
    return ask


def read_chat(body: Any, *, models: tuple[str, ...]) -> Ask:
    """The body of /v1/chat/completions.

    Raises:
        BadRequest: A field is missing, unknown or out of range.
    """
    given = _check(body, _CHAT, models)
    if "messages" not in given:
        raise BadRequest("messages is required", "messages")
    ask = _shared(given)
    ask.chat = True
    ask.prompts = [_messages(given["messages"])]
    for name in ("tools", "modalities"):
        if given.get(name) not in (None, [], ["text"]):
            raise BadRequest(f"{name} is not supported", name)
    if given.get("tool_choice") not in (None, "none", "auto"):
        raise BadRequest("tool_choice is not supported", "tool_choice")
    form = given.get("response_format") or {"type": "text"}
    if not isinstance(form, Mapping) or form.get("type") != "text":
        raise BadRequest("response_format must be {'type': 'text'}", "response_format")
    wants, top = _bool(given, "logprobs"), given.get("top_logprobs")
    if top is not None and not wants:
        raise BadRequest("top_logprobs needs logprobs to be true", "top_logprobs")
    options = given.get("chat_template_kwargs") or {}
    if not isinstance(options, Mapping) or not all(isinstance(key, str) for key in options):
        raise BadRequest("chat_template_kwargs must be an object", "chat_template_kwargs")
    reserved = _RESERVED & set(options)
    if reserved:
        raise BadRequest(
            f"chat_template_kwargs must not hold {', '.join(sorted(reserved))}",
            "chat_template_kwargs",
        )
    ask.template_options = dict(options)
    if "add_generation_prompt" in given:
        ask.template_options["add_generation_prompt"] = _bool(given, "add_generation_prompt")
    limit = given.get("max_completion_tokens", given.get("max_tokens"))
    ask.params = _sampling(given, limit, (top or 0) if wants else None, "top_logprobs")
    return ask


def _check(body: Any, known: set[str], models: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise BadRequest("the body must be a JSON object")
    unknown = sorted(set(body) - known - _IGNORED)
    if unknown:
        raise BadRequest(f"{unknown[0]:.80} is not a field that is supported here", unknown[0])
    given = {name: value for name, value in body.items() if value is not None}
    if given.get("logit_bias"):
        raise BadRequest("logit_bias is not supported", "logit_bias")
    model = given.get("model")
    if model is not None and model not in models:
        raise BadRequest(
            f"model must be one of {', '.join(models)}, got {model!r:.120}", "model", status=404
        )
    return given


def _shared(given: dict[str, Any]) -> Ask:
    ask = Ask(stream=_bool(given, "stream"))
    ask.return_token_ids = _bool(given, "return_token_ids")
    ask.priority = _priority(given.get("priority", 0))
    options = given.get("stream_options", {})
    if not isinstance(options, Mapping) or set(options) - {
        "include_usage",
        "include_obfuscation",
        "continuous_usage_stats",
    }:
        raise BadRequest("stream_options may hold include_usage", "stream_options")
    if options and not ask.stream:
        raise BadRequest("stream_options needs stream to be true", "stream_options")
    if options.get("continuous_usage_stats"):
        raise BadRequest("continuous_usage_stats is not supported", "stream_options")
    ask.include_usage = _bool(dict(options), "include_usage")
    return ask


def _bool(given: dict[str, Any], name: str) -> bool:
    value = given.get(name, False)
    if not isinstance(value, bool):
        raise BadRequest(f"{name} must be true or false, got {value!r:.80}", name)
    return value


def _priority(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or abs(value) > MAX_PRIORITY:
        raise BadRequest(
            f"priority must be a whole number of at most {MAX_PRIORITY} either way, lower is "
            f"served first, got {value!r:.80}",
            "priority",
        )
    return value


def _sampling(
    given: dict[str, Any], max_tokens: Any, logprobs: Any, logprobs_name: str = "logprobs"
) -> SamplingParams:
    for name in _BOOLEANS:
        _bool(given, name)
    n = given.get("n", 1)
    if isinstance(n, int) and n > MAX_N:
        raise BadRequest(f"n must be at most {MAX_N}, got {n}", "n")
    stop = given.get("stop")
    if isinstance(stop, list) and len(stop) > MAX_STOPS:
        raise BadRequest(f"stop must hold at most {MAX_STOPS} strings, got {len(stop)}", "stop")
    if not isinstance(stop, (str, list, type(None))):
        raise BadRequest(f"stop must be a string or a list of them, got {stop!r:.80}", "stop")
    stops = stop if isinstance(stop, list) else [stop or ""]
    longest = max((len(each) for each in stops if isinstance(each, str)), default=0)
    if longest > MAX_STOP_LENGTH:
        raise BadRequest(
            f"stop must hold strings of at most {MAX_STOP_LENGTH} characters, got {longest}", "stop"
        )
    ids = given.get("stop_token_ids")
    if isinstance(ids, (list, str, Mapping)) and len(ids) > MAX_STOP_IDS:
        raise BadRequest(
            f"stop_token_ids must hold at most {MAX_STOP_IDS} ids, got {len(ids)}",
            "stop_token_ids",
        )
    passed = {name: given[name] for name in _PASSED if name in given}
    try:
        return SamplingParams(**passed, stop=stop or None, max_tokens=max_tokens, logprobs=logprobs)
    except (ValueError, TypeError) as error:
        sentence = str(error).removeprefix("SamplingParams: ")
        name = sentence.split(" ", 1)[0]
        if name == "logprobs":
            sentence, name = sentence.replace("logprobs", logprobs_name, 1), logprobs_name
        raise BadRequest(sentence, name if name.isidentifier() else None) from None


def _prompts(prompt: Any, max_prompts: int) -> list[Any]:
    if isinstance(prompt, str) or _is_ids(prompt):
        return [prompt]
    if isinstance(prompt, list) and prompt:
        if len(prompt) > max_prompts:
            raise BadRequest(
                f"prompt must hold at most {max_prompts} prompts, got {len(prompt)}", "prompt"
            )
        if all(isinstance(each, str) for each in prompt) or all(map(_is_ids, prompt)):
            return prompt
    raise BadRequest(
        "prompt must be a string, a list of strings, a list of token ids or a list of such lists",
        "prompt",
    )


def _is_ids(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(token, int) and not isinstance(token, bool) for token in value)
    )


def _messages(messages: Any) -> list[dict[str, Any]]:
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list with at least one message", "messages")
    result = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise BadRequest(f"messages[{i}] must be an object with a role", "messages")
        result.append({**message, "content": _content(message.get("content"), i)})
    return result


def _content(content: Any, i: int) -> str:
    """Text, or the text of parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [
            part["text"]
            for part in content
            if isinstance(part, Mapping)
            and part.get("type") == "text"
            and isinstance(part.get("text"), str)
        ]
        if len(parts) == len(content):
            return "".join(parts)
    raise BadRequest(
        f"messages[{i}].content must be text or a list of parts of type text", "messages"
    )
