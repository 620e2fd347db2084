"""The server, driven by the client library of the API it speaks."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from server_helpers import Running, make_llm, serving, wait_until_idle

from fastinfer import SamplingParams

PROMPT = "Once upon a time"
MESSAGES = [{"role": "user", "content": "Tell me a story about a cat."}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(api_keys=("sesame",)) as running:
        yield running
        wait_until_idle(running.llm)


@pytest.fixture
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="sesame", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI):
    (model,) = client.models.list().data
    assert model.id == "tiny" and model.owned_by == "fastinfer"
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("huge")


def test_completion_is_what_the_engine_says(client: openai.OpenAI):
    with make_llm() as llm:
        (wanted,) = llm.generate(PROMPT, SamplingParams(temperature=0.0, max_tokens=12))
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=12, temperature=0)
    assert answer.choices[0].text == wanted.text
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 12
    assert answer.usage.prompt_tokens == len(wanted.prompt_token_ids)
    by_ids = client.completions.create(
        model="tiny", prompt=wanted.prompt_token_ids, max_tokens=12, temperature=0
    )
    assert by_ids.choices[0].text == wanted.text


def test_several_prompts_with_several_choices_keep_their_order(client: openai.OpenAI):
    prompts = [PROMPT, "The dog"]
    arguments = {"model": "tiny", "prompt": prompts, "n": 2, "seed": 3, "max_tokens": 8}
    answer = client.completions.create(**arguments)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = dict.fromkeys(range(4), "")
    for chunk in client.completions.create(**arguments, stream=True):
        for choice in chunk.choices:
            texts[choice.index] += choice.text
    assert [texts[i] for i in range(4)] == [choice.text for choice in answer.choices]
    assert client.completions.create(**arguments).choices == answer.choices  # the seed


def test_echo(client: openai.OpenAI):
    arguments = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, "echo": True}
    answer = client.completions.create(**arguments)
    assert answer.choices[0].text.startswith(PROMPT)
    chunks = client.completions.create(**arguments, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == answer.choices[0].text


def test_chat_whole_and_streamed(client: openai.OpenAI):
    arguments = {"model": "tiny", "messages": MESSAGES, "max_completion_tokens": 16}
    answer = client.chat.completions.create(**arguments, temperature=0)
    assert answer.choices[0].message.role == "assistant"
    chunks = list(
        client.chat.completions.create(
            **arguments, temperature=0, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == answer.choices[0].message.content
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 16
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].usage.prompt_tokens == answer.usage.prompt_tokens


def test_content_in_parts(client: openai.OpenAI):
    parts = [{"type": "text", "text": "Tell me a story "}, {"type": "text", "text": "about a cat."}]
    answers = [
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": content}],
            max_tokens=8,
            temperature=0,
        )
        for content in (parts, MESSAGES[0]["content"])
    ]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content
    assert answers[1].usage.prompt_tokens == answers[0].usage.prompt_tokens


def test_stop_string(client: openai.OpenAI):
    free = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=40, temperature=0)
    stop = free.choices[0].text.split()[5]
    cut = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=40, temperature=0, stop=[stop]
    )
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == free.choices[0].text.split(stop)[0]


def test_log_probabilities(client: openai.OpenAI):
    answer = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=5, temperature=1, logprobs=3, seed=1
    )
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == 5
    assert "".join(found.tokens) == answer.choices[0].text
    assert all(value <= 0 for value in found.token_logprobs)
    chat = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=2, seed=1
    )
    positions = chat.choices[0].logprobs.content
    assert len(positions) == 4
    for position in positions:
        assert len(position.top_logprobs) == 2
        assert position.top_logprobs[0].logprob >= position.top_logprobs[1].logprob
        assert bytes(position.bytes).decode() == position.token


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "end"}, "suffix"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"extra_body": {"temprature": 0.5}}, "temprature"),
        ({"extra_body": {"ignore_eos": "yes"}}, "ignore_eos"),
        ({"extra_body": {"stop": 5}}, "stop"),
    ],
)
def test_bad_arguments_are_named(client: openai.OpenAI, arguments: dict, param: str):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=PROMPT, **arguments)
    assert caught.value.param == param and param in caught.value.message


def test_bad_chats_are_refused(client: openai.OpenAI):
    for more in (
        {"messages": []},
        {"messages": [{"content": "no role"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
        {"messages": MESSAGES, "response_format": {"type": "json_object"}},
        {"messages": MESSAGES, "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": MESSAGES, "top_logprobs": 2},
        {
            "messages": MESSAGES,
            "extra_body": {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        },
    ):
        with pytest.raises(openai.BadRequestError):
            client.chat.completions.create(model="tiny", **more)


def test_prompts_that_cannot_run_are_refused_without_paths(client: openai.OpenAI, server: Running):
    folder = server.llm.llm.config.model
    for prompt in ([10**9], [1] * 5000, []):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(model="tiny", prompt=prompt)
        assert folder not in caught.value.message
    with pytest.raises(openai.NotFoundError, match="tiny"):
        client.completions.create(model="huge", prompt=PROMPT)


def test_a_key_is_needed(server: Running):
    for key in ("wrong", "Sesame"):
        with (
            openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0) as stranger,
            pytest.raises(openai.AuthenticationError),
        ):
            stranger.models.list()
