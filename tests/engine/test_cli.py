"""The `fastinfer` command: output, JSON, several prompts, chat through a pipe, errors."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from engine_checkpoint import save_checkpoint

from fastinfer import LLM, SamplingParams, __version__
from fastinfer.cli.main import build_parser, main
from fastinfer.cli.options import engine_options


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_checkpoint(path)
    return path


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        *("generate", "--model", str(folder), "--device", "cpu", "--num-blocks", "64"),
        *("--max-tokens", "12", "--temperature", "0", *more),
    ]


def expected_text(folder: Path, prompt: str) -> str:
    with LLM(folder, device="cpu", num_blocks=64, progress=False) as llm:
        return llm.generate(prompt, SamplingParams(temperature=0, max_tokens=12))[0].text


FIGURES = re.compile(
    r"TTFT [\d.]+ ms \| TPOT [\d.]+ ms \| [\d.]+ tokens/s \| \d+ tokens in, 12 out\n"
    r"KV cache: \d+ of 64 blocks used \([\d.]+ of [\d.]+ MB\)\n$"
)


def test_generate_prints_the_text_then_the_figures(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(folder, "--prompt", "Once", "--ignore-eos")) == 0
    out = capsys.readouterr().out
    text, figures = out.rsplit("\n\n", 1)
    assert text == expected_text(folder, "Once")
    assert FIGURES.search(figures), figures
    assert main(arguments(folder, "--prompt", "Once", "--quiet")) == 0
    assert capsys.readouterr().out == text + "\n"


def test_one_token_has_no_tpot(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, "--prompt", "Once", "--max-tokens", "1")) == 0
    assert "TPOT - |" in capsys.readouterr().out


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--prompt", "A", "--prompt", "B", "--n", "2", "--logprobs", "1", "--json")
    assert main(arguments(folder, *more)) == 0
    result = json.loads(capsys.readouterr().out)
    assert [output["prompt"] for output in result["outputs"]] == ["A", "B"]
    completion = result["outputs"][0]["completions"][1]
    assert completion["index"] == 1 and len(completion["token_ids"]) == 12
    assert completion["finish_reason"] == "length"
    assert len(completion["logprobs"]) == 12
    assert completion["metrics"]["ttft_ms"] > 0
    assert result["metrics"]["completed"] == 4
    assert result["kv_cache"]["blocks_total"] == 64 and result["kv_cache"]["used_mb"] > 0


def test_impossible_alternatives_are_null_in_json(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--prompt", "A", "--temperature", "1", "--top-k", "1", "--logprobs", "3", "--json")
    assert main(arguments(folder, *more)) == 0
    out = capsys.readouterr().out
    assert "Infinity" not in out
    values = json.loads(out)["outputs"][0]["completions"][0]["logprobs"][0].values()
    assert sorted(str(value["logprob"]) for value in values) == ["0.0", "None", "None"]


def test_several_prompts_from_everywhere(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("second\n\nthird\n")
    more = ("--prompt", "first", "--prompt-file", str(file), "--token-ids", "1,2,3")
    assert main(arguments(folder, *more)) == 0
    out = capsys.readouterr().out
    headers = [line for line in out.splitlines() if line.startswith("--- ")]
    assert headers == ["--- first", "--- second", "--- third", "--- 1 2 3"]
    assert "mean TTFT" in out and "mean TPOT" in out
    monkeypatch.setattr(sys, "stdin", io.StringIO("from the pipe\n"))
    assert main(arguments(folder, "--prompt-file", "-", "--quiet")) == 0
    assert capsys.readouterr().out.rstrip("\n") == expected_text(folder, "from the pipe")


def test_options_reach_the_engine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stop = expected_text(folder, "Once")[3:5]
    more = ("--prompt", "Once", "--stop", stop, "--block-size", "4", "--no-prefix-caching")
    assert main(arguments(folder, *more, "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    completion = result["outputs"][0]["completions"][0]
    assert (completion["finish_reason"], completion["stop_reason"]) == ("stop", stop)


def test_settings_of_memory_and_of_long_prompts(folder: Path) -> None:
    given = ("--gpu-memory-utilization", "0.5", "--long-prefill-token-threshold", "64")
    args = build_parser().parse_args(arguments(folder, "--prompt", "x", *given))
    options = engine_options(args)
    assert options["gpu_memory_utilization"] == 0.5
    assert options["long_prefill_token_threshold"] == 64


def test_chat_through_a_pipe(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["Hello", "", "again", "/reset", "Hello", "/nonsense", "/help", "/exit", "unread"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    command = ["chat", "--model", str(folder), "--device", "cpu", "--num-blocks", "64"]
    more = ["--max-tokens", "8", "--temperature", "0", "--system", "be brief"]
    assert main([*command, *more]) == 0
    out = capsys.readouterr().out

    params = SamplingParams(temperature=0, max_tokens=8)
    talk = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "Hello"}]
    with LLM(folder, device="cpu", num_blocks=64, progress=False) as llm:
        first = llm.chat(talk, params)[0].text
        follow_up = [{"role": "assistant", "content": first}, {"role": "user", "content": "again"}]
        second = llm.chat([*talk, *follow_up], params)[0].text
    assert out.startswith(f"{first}\n{second}\n{first}\nunknown command /nonsense; /reset")
    assert out.count("/reset forgets the conversation") == 2


def test_chat_goes_on_after_a_turn_that_is_too_long(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 400 + "\nhi\n"))
    command = ["chat", "--model", str(folder), "--device", "cpu", "--max-tokens", "2"]
    assert main(command) == 0
    captured = capsys.readouterr()
    assert "shorter than max_model_len 256" in captured.err and "/reset starts over" in captured.err
    assert captured.out.strip()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--prompt", "a", "--model", "/no/such/folder"], 2, "no/such/folder"),
        ([], 2, "no prompt given; use --prompt"),
        (["--prompt", "a", "--top-p", "3"], 2, r"top_p must be in \(0, 1\]"),
        (["--prompt", "a" * 300], 2, "shorter than max_model_len 256"),
        (["--prompt-file", "/no/such/file"], 2, "No such file"),
        (["--token-ids", "1,x"], 2, "must be numbers separated by commas, got '1,x'"),
        (["--prompt", "a", "--device", "tpu"], 2, "device must be"),
    ],
)
def test_errors_are_one_sentence_on_stderr(
    folder: Path, capsys: pytest.CaptureFixture[str], more: list[str], code: int, message: str
) -> None:
    assert main(arguments(folder, *more)) == code
    captured = capsys.readouterr()
    assert re.match(rf"fastinfer generate: .*{message}.*\n$", captured.err), captured.err
    assert captured.out == ""


def test_debug_shows_the_traceback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTINFER_DEBUG", "1")
    with pytest.raises(ValueError, match="no prompt given"):
        main(arguments(folder))


def test_wrong_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ([], ["nonsense"], ["generate"], ["generate", "--model", "x", "--top-k", "many"]):
        with pytest.raises(SystemExit) as exit_:
            main(argv)
        assert exit_.value.code == 2
    with pytest.raises(SystemExit) as exit_:
        main(["--version"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out == f"fastinfer {__version__}\n"


def test_help_does_not_load_torch() -> None:
    code = (
        "import sys\nfrom fastinfer.cli.main import main\n"
        "try:\n    main(['generate', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout.strip().endswith("False"), run.stderr
    assert "--max-tokens N" in run.stdout


def test_env(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out), dict)
    assert main(["env"]) == 0
    assert __version__ in capsys.readouterr().out
