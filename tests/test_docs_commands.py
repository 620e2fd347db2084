"""Every command of the README and the docs is run, at small sizes, in a folder with the bundled
checkpoint. What is not run is listed here with the reason.
"""

from __future__ import annotations

import importlib.metadata
import io
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fastinfer.cli.main import main
from test_docs_snippets import PAGES, PROGRAMS, lines

ROOT = Path(__file__).parents[1]
MODEL = "examples/tiny/model"
# Names that stand for the reader's own files.
STANDS_FOR = {
    "DIR": MODEL,
    "OUT": "quantised",
    "NEW": "quantised",
    "text.txt": "examples/tiny/heldout.txt",
    "calib.txt": "examples/tiny/heldout.txt",
    "heldout.txt": "short.txt",
    "examples/tiny/heldout.txt": "examples/tiny/heldout.txt",
}
# Of a command that begins so; the last value of an option counts, so these make it small.
SMALL = {
    "ablate": "--prompt-lens 8,16 --output-len 3 --requests 4 --at-once 2 --repeats 1 "
    "--eval-tokens 128 --device cpu",
    "bench latency": "--input-len 8 --output-len 3 --iters 1 --warmup 0 --device cpu",
    "bench throughput": "--num-prompts 2 --input-len 8 --output-len 3 --device cpu",
    "bench serve": "--num-prompts 2 --input-len 8 --output-len 3 --prefix-len 16 --turns 2 "
    "--device cpu",
    "generate": "--max-tokens 3 --device cpu",
    "chat": "--max-tokens 3 --device cpu",
    "quantize": "--group-size 64 --samples 2 --seqlen 32",
    "tune": "--max-trials 1 --num-prompts 2 --input-len 8 --output-len 3 --device cpu",
}
# Each of these runs in a test of its own.
NOT_RUN = {
    "cmake ": "tests/integrations/test_aot_cpp.py builds it",
    "build/cpp/generate ": "tests/integrations/test_aot_cpp.py runs it",
    "python examples/cpp/export.py": "tests/integrations/test_aot_cpp.py runs it",
    "python -m fastinfer.integrations.transformers": "test_transformers_serve.py runs it",
}
GPU_ONLY = ("--device cuda", "tests/gpu/")
SLOW = ("fastinfer quantize", "fastinfer ablate", "python bench/")  # each has tests of its own
SERVED = ("fastinfer serve", "curl ", "fastinfer bench serve --url", "torchrun ")  # test_server
TRAINING = ("train.py", "corpus.py")  # of examples/tiny, in a copy of that folder


def all_commands() -> dict[str, str]:
    """Command -> the page it is on first."""
    found: dict[str, str] = {}
    for page in PAGES:
        for line in lines(page):
            found.setdefault(line.split("  #")[0].split(" # ")[0].strip(), page.name)
    return found


def parameters() -> Iterator[object]:
    for line, page in all_commands().items():
        if line.startswith(SERVED):
            continue
        marks: list[pytest.MarkDecorator] = []
        reason = next((why for start, why in NOT_RUN.items() if line.startswith(start)), None)
        if reason:
            marks.append(pytest.mark.skip(reason=reason))
        elif any(word in line for word in GPU_ONLY):
            marks.append(pytest.mark.gpu)
            marks.append(
                pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
            )
        if page != "README.md" or line.startswith(SLOW):
            marks.append(pytest.mark.full)
        yield pytest.param(line, id=f"{page}: {line[:70]}", marks=marks)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("examples", "bench", "tests", "Makefile"):
        os.symlink(ROOT / name, tmp_path / name)
    text = (ROOT / "examples/tiny/heldout.txt").read_text(encoding="utf-8")
    (tmp_path / "short.txt").write_text(text[:2000], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "python"))
    return tmp_path


def needs(words: list[str]) -> None:
    """What a command takes for granted."""
    if words[:2] == ["bench", "compare"]:
        for name in words[2:4]:
            sizes = f"--model {MODEL} {SMALL['bench throughput']} --output {name}"
            assert main(["bench", "throughput", *sizes.split()]) == 0
    if words[0] == "generate" and "quantised" in words:
        options = ["--method", "rtn", "--group-size", "64", "--format", "native"]
        assert main(["quantize", "--model", MODEL, *options, "--out", "quantised"]) == 0


@pytest.mark.parametrize("line", parameters())
def test_command(line: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, *words = shlex.split(line)
    if program == "make":
        make(words[0])
        return
    if program == "pip":
        pip(words)
        return
    if program == "fastinfer":
        words = [STANDS_FOR.get(word, word).removeprefix("/tmp/") for word in words]
        small = next((s for start, s in SMALL.items() if " ".join(words).startswith(start)), "")
        needs(words)
        if "--device" in words and "cuda" in words:
            small = small.replace("--device cpu", "--device cuda")
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n"))
        code = main([*words, *small.split()])
        assert code == 0 or words[0] == "tune", line  # 1: nothing met the limits on this machine
        return
    assert program == "python", line
    if words[0].startswith("bench/bench_"):  # the results of the repository are not written
        words += ["--seconds", "0.001", "--json", str(folder / "rows.json")]
    if words[0] == "bench/run_all.py":
        only = [] if "--only" in words else ["--only", "norm"]
        words += ["--out", str(folder / "bench_out/cpu"), "--short", *only]
    if words[0] == "bench/report.py" and "build/bench" in words:
        shutil.copytree(ROOT / "bench/results/cpu", folder / "build/bench/cpu")
    if words[:2] == ["-m", "pytest"]:
        words.append("--collect-only")
    if words[0] in TRAINING:
        words = training(words, folder)
    if ">" in words:
        words = [*words[: words.index(">")], "--bytes", "2000"]
    run([sys.executable, *words], 280)


def run(command: list[str], seconds: float, cwd: Path | None = None) -> str:
    """What a command printed; it has to end well."""
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=cwd)
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout


def make(target: str) -> None:
    """What a target would run; of the demo also its last line, which prints text. The targets that
    build and test are what CI is made of.
    """
    lines = run(["make", "-n", target, f"PYTHON={sys.executable}"], 60, ROOT).splitlines()
    assert lines
    if target == "demo":
        words = shlex.split(next(line for line in lines if " generate " in line))
        assert "Once upon a time" in run([*words, "--max-tokens", "3", "--device", "cpu"], 120)


def pip(words: list[str]) -> None:
    """What pip would install: this folder without its dependencies, or what is installed anyway."""
    if "." in words:
        options = ["--no-deps", "--no-build-isolation"]
    else:
        options = ["--no-index"]
        for name in (word for word in words[1:] if not word.startswith("-")):
            name = re.split(r"[\[<>=]", name)[0]
            if not name.endswith(".txt") and not installed(name):
                pytest.skip(f"{name} is not installed here, and nothing is downloaded")
    run([sys.executable, "-m", "pip", *words, "--dry-run", "-q", *options], 120, ROOT)


def installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def training(words: list[str], folder: Path) -> list[str]:
    """In a copy of examples/tiny, with few steps; the corpus may run out after a page."""
    tiny = folder / "tiny"
    shutil.copytree(
        ROOT / "examples/tiny", tiny, ignore=shutil.ignore_patterns("draft", "__pycache__")
    )
    os.chdir(tiny)  # monkeypatch undoes it
    if words[0] == "corpus.py":
        return words
    words = [word for word in words if word != "--compile"]
    return [*words, "--steps", "2", "--batch", "2", "--length", "64", "--eval-every", "1"]


@pytest.mark.full
def test_server(folder: Path) -> None:
    """`fastinfer serve` as the pages start it, and every command that is given to it."""
    commands = [line for line in all_commands() if line.startswith(SERVED)]
    servers = [line for line in commands if line.startswith(("fastinfer serve", "torchrun"))]
    clients = [line for line in commands if line not in servers]
    assert servers and clients
    tuned = f"tune --model {MODEL} --ttft-ms 9999 --output tuned.json {SMALL['tune']}"
    assert main(tuned.split()) == 0
    for number, server in enumerate(servers):
        port = free_port()
        words = [STANDS_FOR.get(word, word) for word in shlex.split(server)[1:]]
        command = [sys.executable, "-m", "fastinfer", *words]
        if server.startswith("torchrun"):
            command = [sys.executable, "-m", "torch.distributed.run", *words]
            replaced = {"HOST:PORT": f"127.0.0.1:{free_port()}", "8": "2", "4": "2", "2": "1"}
            command = [replaced.get(word, word) for word in command]
        command += ["--port", str(port), "--device", "cpu"]
        with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
            try:
                wait_for(f"http://127.0.0.1:{port}/health", process)
                for line in clients if number == 0 else ():
                    ask(line.replace(":8000", f":{port}"))
            finally:
                process.terminate()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert process.poll() is None, process.stderr.read().decode()[-2000:]  # type: ignore[union-attr]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"{url} does not answer")


def ask(line: str) -> None:
    program, *words = shlex.split(line)
    if program == "curl":
        if shutil.which("curl"):
            done = subprocess.run([program, "-s", *words], capture_output=True, text=True)
            assert '"text"' in done.stdout, done.stdout + done.stderr
        return
    small = SMALL["bench serve"].replace("--device cpu", "")
    assert main([*words, *small.split()]) == 0, line


def test_all_commands_are_known() -> None:
    """A program that no rule above is about would be a command nobody runs."""
    programs = {line.split()[0] for line in all_commands()}
    assert programs <= {*PROGRAMS}
    assert len(all_commands()) > 50
