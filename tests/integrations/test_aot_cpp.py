"""examples/cpp: export, compile ahead of time, build the C++ program, run it; its tokens are those
of the model in Python.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import fastinfer
from fastinfer import _lib
from fastinfer.integrations.transformers import FastinferInt4Config, enable

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "cpp"
PROMPT, WANTED = [10, 345, 12, 77], 12


def run(*command: str | Path, **environment: str) -> str:
    paths = {"PYTHONPATH": str(Path(fastinfer.__file__).parents[1])}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        env={**os.environ, **paths, **environment},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    "device",
    [pytest.param("cpu", marks=pytest.mark.full), pytest.param("cuda", marks=pytest.mark.gpu)],
)
def test_the_cpp_program(device: str, tmp_path: Path) -> None:
    package, build = tmp_path / "model.pt2", tmp_path / "build"
    checkpoint = ROOT / "examples/tiny/model"
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    # Inductor need not try out the instruction sets of a processor that computes nothing here: each
    # trial imports torch anew.
    trusted = {"TORCHINDUCTOR_VEC_ISA_OK": "1"} if device == "cuda" else {}

    def build_program() -> None:
        run("cmake", "-S", EXAMPLE, "-B", build, prefix, "-DCMAKE_BUILD_TYPE=Release")
        run("cmake", "--build", build)

    with ThreadPoolExecutor() as pool:
        built = pool.submit(build_program)
        exported = pool.submit(
            run, sys.executable, EXAMPLE / "export.py", checkpoint, package, device, **trusted
        )
        want = tokens_in_python(checkpoint, device)
        built.result()
    assert "fastinfer.flash_attn_kvcache.default" in exported.result()
    assert "fastinfer.int4_linear.default" in exported.result()
    program = build / "generate"
    printed = run(program, _lib.LIBRARY, package, str(WANTED), *map(str, PROMPT))
    assert [int(word) for word in printed.split()] == want
    failed = subprocess.run(
        [program, "nothing.so", package, "1", "1", "2"], capture_output=True, text=True
    )
    assert failed.returncode == 1 and "could not be loaded" in failed.stderr


def tokens_in_python(checkpoint: Path, device: str) -> list[int]:
    enable()
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint,
        attn_implementation="fastinfer",
        quantization_config=FastinferInt4Config(group_size=32),
        dtype=torch.float16 if device == "cuda" else torch.float32,
    )
    model = model.to(device).eval()
    ids = torch.tensor([PROMPT], device=device)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=WANTED,
        do_sample=False,
        eos_token_id=None,
    )
    return out[0].tolist()
