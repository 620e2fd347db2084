"""Continuous batching by the local kernel package: transformers whose loader cannot be wrapped, and
the `kernels` library in a release that this transformers asks for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils.import_utils import is_kernels_available

import fastinfer

# In a process of its own: what `enable` has made known stays known.
PROGRAM = """
import functools
import sys
import fastinfer
import torch
from fastinfer.integrations import _loader
_loader.install = lambda: "as if its form had changed"
steps = []
original = fastinfer.flash_attn_with_kvcache

@functools.wraps(original)  # transformers reads its signature
def counting(*args, **kwargs):
    steps.append(0)
    return original(*args, **kwargs)

fastinfer.flash_attn_with_kvcache = counting
from gpu.test_transformers import assert_greedy
from integrations.hf_models import tiny
from integrations.test_continuous_batching import NEW, batch, new_prompts
from transformers import modeling_flash_attention_utils as loader

assert not hasattr(loader._lazy_imports, "fastinfer_original")
device = sys.argv[1]
model = tiny("llama", torch.float16 if device == "cuda" else torch.float32).to(device)
model.set_attn_implementation("fastinfer/flash-attn2")
waiting = new_prompts()
made = batch(model, waiting, max_blocks_per_request=4, use_async_batching=device == "cuda")
assert [len(tokens) for tokens in made] == [NEW] * len(waiting)
for prompt, tokens in zip(waiting, made):
    ids = torch.tensor([prompt + tokens], device=device)
    assert_greedy(model, ids, torch.ones_like(ids), len(prompt))
assert bool(steps) == (device == "cuda"), len(steps)  # transformers has block tables on CUDA only
print("the tokens of generate")
"""


@pytest.mark.skipif(not is_kernels_available(), reason="needs the release of `kernels` it asks for")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_generate_batch(device: str) -> None:
    package, tests = Path(fastinfer.__file__).parents[1], Path(__file__).parents[1]
    paths = [str(package), str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-W", "error:fastinfer:UserWarning", "-c", PROGRAM, device],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "FASTINFER_STRICT": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "the tokens of generate" in done.stdout
