"""`LLM` on a tiny random Llama, against transformers and against itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from engine_checkpoint import save_checkpoint

from fastinfer import LLM, SamplingParams, ops

LENGTHS = [1, 2, 7, 16, 17, 33, 60]
COUNT = 20


class Reference(NamedTuple):
    folder: Path
    model: torch.nn.Module
    prompts: list[list[int]]
    greedy: list[list[int]]


def transformers_greedy(model: torch.nn.Module, prompt: list[int], count: int) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    folder = tmp_path_factory.mktemp("llama")
    model = save_checkpoint(folder)
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in LENGTHS]
    return Reference(
        folder, model, prompts, [transformers_greedy(model, p, COUNT) for p in prompts]
    )


def load(folder: Path, **settings: object) -> LLM:
    defaults = {"device": "cpu", "num_blocks": 64, "progress": False}
    return LLM(folder, **{**defaults, **settings})


@pytest.fixture(scope="module")
def llm(reference: Reference) -> Iterator[LLM]:
    with load(reference.folder) as llm:
        yield llm
        assert llm.stats().kv_blocks_used == 0


def greedy(count: int = COUNT, **more: object) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, **more)


def tokens_of(outputs: list) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in outputs]


def test_greedy_tokens_are_those_of_transformers(llm: LLM, reference: Reference) -> None:
    assert tokens_of(llm.generate(reference.prompts, greedy())) == reference.greedy
    for prompt, expected in zip(reference.prompts, reference.greedy, strict=True):
        assert tokens_of(llm.generate(prompt, greedy())) == [expected]  # now with a cached prefix


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 1, "num_blocks": 400},
        {"block_size": 4, "num_blocks": 128},
        {"block_size": 64},
        {"max_num_batched_tokens": 8},
        {"max_num_seqs": 2},
        {"enable_prefix_caching": False},
        {"block_size": 4, "num_blocks": 24},  # not enough for all: preemption
        {"block_size": 4, "num_blocks": 24, "enable_prefix_caching": False},
    ],
    ids=str,
)
def test_memory_and_scheduling_do_not_change_the_tokens(
    reference: Reference, settings: dict
) -> None:
    with load(reference.folder, **settings) as llm:
        llm._core.runner.cache.fill_(float("nan"))  # what was not written must not be read
        assert tokens_of(llm.generate(reference.prompts, greedy())) == reference.greedy
        if settings.get("num_blocks") == 24:
            assert llm.stats().num_preemptions > 0
        assert llm.stats().kv_blocks_used == 0


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_16_bit_batches_give_what_prompts_give_alone(
    reference: Reference, dtype: str | torch.dtype
) -> None:
    with load(reference.folder, dtype=dtype, enable_prefix_caching=False) as llm:
        together = tokens_of(llm.generate(reference.prompts, greedy()))
        assert together == [tokens_of(llm.generate(p, greedy()))[0] for p in reference.prompts]
        assert llm._core.runner.cache.dtype == getattr(torch, str(dtype).removeprefix("torch."))


def test_seeds_do_not_see_their_neighbours(llm: LLM, reference: Reference) -> None:
    params = SamplingParams(temperature=1.5, top_k=50, top_p=0.9, min_p=0.01, seed=7, max_tokens=15)
    alone = tokens_of(llm.generate(reference.prompts[2], params))[0]
    mixed = [greedy(5), SamplingParams(max_tokens=30), params, SamplingParams(top_k=3, seed=1)]
    for batch in (mixed, mixed[::-1]):
        outputs = llm.generate([reference.prompts[2]] * 4, batch)
        assert outputs[batch.index(params)].outputs[0].token_ids == alone
    other = SamplingParams(temperature=1.5, top_k=50, top_p=0.9, min_p=0.01, seed=8, max_tokens=15)
    assert tokens_of(llm.generate(reference.prompts[2], other))[0] != alone


def test_logprobs_are_those_of_transformers(llm: LLM, reference: Reference) -> None:
    prompt = reference.prompts[4]
    completion = llm.generate(prompt, greedy(logprobs=5))[0].outputs[0]
    tokens = torch.tensor([prompt + completion.token_ids])
    with torch.no_grad():
        logits = reference.model(tokens).logits[0, len(prompt) - 1 : -1]
    exact = logits.float().log_softmax(-1)
    for position, (token, entry) in enumerate(
        zip(completion.token_ids, completion.logprobs, strict=True)
    ):
        assert entry[token].rank == 1
        assert entry[token].logprob == pytest.approx(exact[position, token].item(), abs=1e-4)
        assert set(entry) == set(exact[position].topk(5).indices.tolist())
        for other, value in entry.items():
            assert value.logprob == pytest.approx(exact[position, other].item(), abs=1e-4)
            assert value.decoded_token == llm.tokenizer.decode([other], skip_special_tokens=False)
    assert completion.cumulative_logprob == pytest.approx(
        exact.gather(1, tokens[0, len(prompt) :, None]).sum().item(), abs=1e-3
    )


def test_text_and_ids_are_the_same_prompt(llm: LLM) -> None:
    text = "Ein Ärger & 日本"
    by_text = llm.generate(text, greedy())[0]
    by_dict = llm.generate({"prompt": text}, greedy())[0]
    by_ids = llm.generate(llm.tokenizer.encode(text), greedy())[0]
    assert by_text.prompt == by_dict.prompt == text and by_ids.prompt is None
    assert by_text.prompt_token_ids == by_ids.prompt_token_ids == llm.tokenizer.encode(text)
    assert by_text.outputs[0].token_ids == by_ids.outputs[0].token_ids
    assert by_text.text == by_dict.text == by_ids.text
    assert by_text.text == llm.tokenizer.decode(by_text.outputs[0].token_ids)


@pytest.mark.parametrize("temperature", [0.0, 1.0, 3.0])
def test_streamed_text_adds_up_to_the_generated_text(llm: LLM, temperature: float) -> None:
    """Random bytes: broken and whole characters of one to four bytes."""
    for seed in range(5):
        params = SamplingParams(temperature=temperature, seed=seed, max_tokens=40)
        whole = llm.generate("é", params)[0].outputs[0]
        pieces = list(llm.stream("é", params))
        assert "".join(piece.text for piece in pieces) == whole.text
        assert [t for p in pieces for c in p.outputs for t in c.token_ids] == whole.token_ids
        assert pieces[-1].outputs[0].finish_reason == whole.finish_reason
        assert pieces[-1].finished and not any(piece.finished for piece in pieces[:-1])


def ascii_text(llm: LLM) -> tuple[SamplingParams, str]:
    """Settings, and three printable characters that their text holds once, not at its start."""
    for seed in range(200):
        params = SamplingParams(temperature=2.0, seed=seed, max_tokens=60, ignore_eos=True)
        text = llm.generate("Hello", params)[0].text
        for start in range(len(text) - 3):
            piece = text[start : start + 3]
            if start > 5 and piece.isascii() and piece.isprintable() and text.count(piece) == 1:
                return params, piece
    raise AssertionError("no printable text in 200 seeds")


def test_stop_strings(llm: LLM) -> None:
    params, stop = ascii_text(llm)
    whole = llm.generate("Hello", params)[0].outputs[0]
    before = whole.text[: whole.text.index(stop)]

    def run(**more: object) -> tuple:
        params_ = SamplingParams(
            temperature=2.0, seed=params.seed, max_tokens=60, ignore_eos=True, **more
        )
        completion = llm.generate("Hello", params_)[0].outputs[0]
        streamed = "".join(piece.text for piece in llm.stream("Hello", params_))
        assert streamed == completion.text
        return completion.text, completion.finish_reason, completion.stop_reason

    assert run(stop=stop) == (before, "stop", stop)
    assert run(stop=["never seen", stop]) == (before, "stop", stop)
    assert run(stop=stop, include_stop_str_in_output=True) == (before + stop, "stop", stop)
    assert run(stop="never seen") == (whole.text, "length", None)
    last = llm.generate("Hello", params)[0].outputs[0].token_ids
    stopped = llm.generate("Hello", SamplingParams(**{**vars_of(params), "stop": stop}))[0]
    assert stopped.outputs[0].token_ids == last[: len(stopped.outputs[0].token_ids)]
    assert len(stopped.outputs[0].token_ids) < len(last)


def vars_of(params: SamplingParams) -> dict:
    return {name: getattr(params, name) for name in SamplingParams.__slots__}


def test_stop_string_complete_at_the_last_token_counts_as_stop(llm: LLM) -> None:
    params, stop = ascii_text(llm)
    tokens = llm.generate("Hello", SamplingParams(**{**vars_of(params), "stop": stop}))[0]
    count = len(tokens.outputs[0].token_ids)
    again = SamplingParams(**{**vars_of(params), "stop": stop, "max_tokens": count})
    completion = llm.generate("Hello", again)[0].outputs[0]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_stop_tokens_are_not_part_of_the_text(llm: LLM, reference: Reference) -> None:
    prompt, expected = reference.prompts[3], reference.greedy[3]
    stop = next(token for token in expected[3:] if token not in expected[:3])
    at = expected.index(stop)
    completion = llm.generate(prompt, greedy(stop_token_ids=[stop]))[0].outputs[0]
    assert completion.token_ids == expected[: at + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.text == llm.tokenizer.decode(expected[:at])
    kept = greedy(stop_token_ids=[stop], include_stop_str_in_output=True)
    text = llm.generate(prompt, kept)[0].text
    assert text == llm.tokenizer.decode(expected[: at + 1])


def test_end_of_sequence_comes_from_the_model_and_from_generation_config(
    reference: Reference, tmp_path: Path
) -> None:
    prompt, expected = reference.prompts[3], reference.greedy[3]
    eos = next(token for token in expected[3:] if token not in expected[:3])
    folder = tmp_path / "model"
    shutil.copytree(reference.folder, folder)
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": [{eos}, 257]}}')
    with load(folder) as llm:
        params = SamplingParams(temperature=0, max_tokens=COUNT)
        completion = llm.generate(prompt, params)[0].outputs[0]
        assert completion.token_ids == expected[: expected.index(eos) + 1]
        assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
        assert tokens_of(llm.generate(prompt, greedy())) == [expected]


def test_special_tokens_and_detokenize(llm: LLM) -> None:
    ids = llm.tokenizer.encode("</s>a")
    assert ids[0] == 257
    for seed in range(50):
        params = SamplingParams(temperature=9.0, seed=seed, max_tokens=60, ignore_eos=True)
        tokens = llm.generate("a", params)[0].outputs[0]
        if 257 in tokens.token_ids[:-1]:
            break
    assert "</s>" not in tokens.text
    shown = SamplingParams(**{**vars_of(params), "skip_special_tokens": False})
    assert "</s>" in llm.generate("a", shown)[0].text
    silent = SamplingParams(**{**vars_of(params), "detokenize": False})
    completion = llm.generate("a", silent)[0].outputs[0]
    assert completion.text == "" and completion.token_ids == tokens.token_ids


def test_chat_is_generate_on_the_rendered_template(llm: LLM) -> None:
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    rendered = "<|system|>be brief\n<|user|>hi\n<|assistant|>"
    (answer,) = llm.chat(talk, greedy())
    assert answer.prompt_token_ids == llm.tokenizer.encode(rendered, add_special_tokens=False)
    assert answer.text == llm.generate(answer.prompt_token_ids, greedy())[0].text
    assert len(llm.chat([talk, talk[1:]], greedy(2))) == 2
    open_ended = llm.chat(talk, greedy(2), add_generation_prompt=False)[0]
    assert open_ended.prompt_token_ids == answer.prompt_token_ids[: -len("<|assistant|>")]
    with pytest.raises(ValueError, match="role"):
        llm.chat([{"content": "nobody"}], greedy())


def test_two_models_live_side_by_side(llm: LLM, reference: Reference, tmp_path: Path) -> None:
    other_reference = save_checkpoint(tmp_path, seed=9)
    prompt = reference.prompts[2]
    other_greedy = transformers_greedy(other_reference, prompt, COUNT)
    assert other_greedy != reference.greedy[2]
    with load(tmp_path, block_size=4) as other:
        streams = [llm.stream(prompt, greedy()), other.stream(prompt, greedy())]
        tokens: list[list[int]] = [[], []]
        for pair in zip(*streams, strict=True):
            for got, output in zip(tokens, pair, strict=True):
                got += output.outputs[0].token_ids
        assert tokens == [reference.greedy[2], other_greedy]


def test_closing_lets_go(reference: Reference) -> None:
    llm = load(reference.folder)
    llm.generate([1, 2], greedy(1))
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate([1, 2])


def test_folder_without_a_tokenizer_takes_ids(reference: Reference, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, tokenizer=False)
    with load(tmp_path) as llm:
        assert llm.tokenizer is None
        assert tokens_of(llm.generate(reference.prompts, greedy())) == reference.greedy
        with pytest.raises(ValueError, match=r"prompt must be token ids, because .* no tokenizer"):
            llm.generate("text", greedy())
    with load(tmp_path, tokenizer=reference.folder) as llm:
        assert llm.generate("text", greedy())[0].text


def test_random_weights_need_only_a_config(reference: Reference, tmp_path: Path) -> None:
    shutil.copy(reference.folder / "config.json", tmp_path)
    with load(tmp_path, load_format="dummy") as llm:
        assert len(llm.generate([1, 2, 3], greedy())[0].outputs[0].token_ids) == COUNT
    with pytest.raises(FileNotFoundError):
        load(tmp_path)


def test_errors_are_one_sentence_and_leave_the_engine_usable(
    llm: LLM, reference: Reference, tmp_path: Path
) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        load(tmp_path / "no such folder")
    with pytest.raises(ValueError, match="device must be 'cpu', 'cuda' or 'cuda:N', got 'tpu'"):
        load(reference.folder, device="tpu")
    with pytest.raises(ValueError, match="dtype must be"):
        load(reference.folder, dtype="int4")
    with pytest.raises(FileNotFoundError):
        load(reference.folder, tokenizer=tmp_path)
    with pytest.raises(ValueError, match="shorter than max_model_len 256"):
        llm.generate([1] * 256, greedy())
    with load(reference.folder, num_blocks=2) as tiny:
        with pytest.raises(ValueError, match="fit into the KV cache of 32 tokens"):
            tiny.generate([[1], [1] * 33], greedy())
        assert tokens_of(tiny.generate(reference.prompts[1], greedy(5)))
    assert llm.max_model_len == 256
    assert tokens_of(llm.generate(reference.prompts, greedy())) == reference.greedy


def test_a_longer_context_than_trained_can_be_asked_for(reference: Reference) -> None:
    with load(reference.folder, max_model_len=300) as llm:
        output = llm.generate([1] * 290, greedy(None))[0].outputs[0]
        assert len(output.token_ids) == 10 and output.finish_reason == "length"
    with load(reference.folder, max_model_len=20) as llm:
        assert len(llm.generate([1] * 15, greedy(None))[0].outputs[0].token_ids) == 5


def test_a_huge_top_k_is_off_and_does_not_fail_the_step(llm: LLM) -> None:
    plain, huge = llm.generate(
        [[1, 2, 3]] * 2,
        [SamplingParams(seed=4, max_tokens=5), SamplingParams(seed=4, max_tokens=5, top_k=10**12)],
    )
    assert plain.outputs[0].token_ids == huge.outputs[0].token_ids


@pytest.mark.parametrize("arguments", [(None,), (5,), ([[1]], {"max_tokens": 1}), ([[1]], [None])])
def test_arguments_of_the_wrong_kind(llm: LLM, arguments: tuple) -> None:
    with pytest.raises(ValueError, match=r"LLM: (prompts|sampling_params) must be") as caught:
        llm.generate(*arguments)
    assert "\n" not in str(caught.value)


def logprobs_of(output: object) -> list:
    return [output.outputs[0].token_ids, output.outputs[0].logprobs]


@pytest.mark.parametrize(("name", "tolerance"), [("int8", 0.15), ("fp8", 0.6)])
def test_8_bit_caches(reference: Reference, llm: LLM, name: str, tolerance: float) -> None:
    """Half the memory and close to the model's own cache, whatever the blocks."""
    exact = llm.generate(reference.prompts, greedy(1, logprobs=3))
    for block_size in (1, 7, 16):
        with load(
            reference.folder, kv_cache_dtype=name, block_size=block_size, num_blocks=300
        ) as small:
            runner = small.core.runner
            assert runner.block_bytes == 2 * 3 * 2 * (16 + 4) * block_size
            runner.cache.view(torch.uint8).fill_(0x7F)  # NaN in fp8; never read
            for layer in runner.layers:
                layer.k_scale.fill_(float("nan"))
                layer.v_scale.fill_(float("nan"))
            # twins share a partly filled block by copy: its scales must come along
            twins = small.generate(reference.prompts[5][:30], greedy(8, n=2, logprobs=0))[0].outputs
            assert twins[0].token_ids == twins[1].token_ids
            assert max(t.cumulative_logprob for t in twins) < 0
            close = small.generate(reference.prompts, greedy(1, logprobs=3))
            errors = [
                abs(value.logprob - b.outputs[0].logprobs[0][token].logprob)
                for a, b in zip(exact, close, strict=True)
                for token, value in a.outputs[0].logprobs[0].items()
                if token in b.outputs[0].logprobs[0]
            ]
            assert len(errors) > 10 and 0 < max(errors) < tolerance
            assert small.stats().kv_blocks_used == 0


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_batch_invariant_to_the_last_bit(
    reference: Reference, dtype: str, kv_cache_dtype: str
) -> None:
    settings = {"dtype": dtype, "kv_cache_dtype": kv_cache_dtype, "batch_invariant": True}
    params = [
        greedy(logprobs=4) if i % 2 else SamplingParams(seed=i, max_tokens=COUNT, logprobs=4)
        for i in range(len(LENGTHS))
    ]
    with load(reference.folder, enable_prefix_caching=False, **settings) as llm:
        alone = [
            logprobs_of(llm.generate(prompt, each)[0])
            for prompt, each in zip(reference.prompts, params, strict=True)
        ]
        many = llm.generate(reference.prompts[4], greedy(logprobs=4, n=3))[0]
        single = llm.generate(reference.prompts[4], greedy(logprobs=4))[0].outputs[0]
        assert all(each.logprobs == single.logprobs for each in many.outputs)
    for more in (
        {},
        {"max_num_batched_tokens": 7},
        {"block_size": 5, "num_blocks": 24},
        {"block_size": 4, "num_blocks": 24, "enable_prefix_caching": False},
        {"async_scheduling": True},
    ):
        with load(reference.folder, **settings, **more) as llm:
            for _ in range(2):  # the second time with cached prefixes
                outputs = llm.generate(reference.prompts, params)
                assert [logprobs_of(output) for output in outputs] == alone, more
            if more.get("num_blocks") == 24:
                assert llm.stats().num_preemptions > 0


@pytest.mark.parametrize("on", [False, True])
@pytest.mark.parametrize("quantized", [None, "gptq", "w8a8"])
def test_batch_invariant_reaches_every_operator_that_has_it(
    reference: Reference,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    on: bool,
    quantized: str | None,
) -> None:
    raw = json.loads((reference.folder / "config.json").read_text())
    if quantized == "gptq":
        raw["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 16}
    elif quantized == "w8a8":
        raw["quantization_config"] = W8A8
    raw["tie_word_embeddings"] = quantized is None  # the head is then a linear over the embedding
    (tmp_path / "config.json").write_text(json.dumps(raw))
    seen: dict[str, set[bool]] = {}
    names = [n for n in dir(ops) if n.endswith("linear") or n.startswith("flash_attn_")]

    def spy(name: str, original: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            seen.setdefault(name, set()).add(bool(named.get("batch_invariant", False)))
            return original(*arguments, **named)

        return call

    for name in names:
        monkeypatch.setattr(ops, name, spy(name, getattr(ops, name)))
    with load(tmp_path, load_format="dummy", batch_invariant=on) as llm:
        llm.generate([[1, 2, 3], [4]], greedy(3))
    assert all(values == {on} for values in seen.values()), seen
    assert {"linear", "flash_attn_varlen_func"} <= set(seen)
    assert {None: "linear", "gptq": "int4_linear", "w8a8": "w8a8_linear"}[quantized] in seen
    # decodes go through the operator of the prompts, so that their bits cannot differ
    assert ("flash_attn_with_kvcache" in seen) is not on


W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "symmetric": True,
                "strategy": "token",
                "dynamic": True,
            },
        }
    },
}
