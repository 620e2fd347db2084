"""Run by compat.py in a fresh environment, outside of the source tree: does the wheel work?
Prints what it ran on; the last line is a digest of results that must not depend on torch's release.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

import torch

import fastinfer
from fastinfer import LLM, SamplingParams, env

HERE = Path(__file__).resolve().parent
assert not any(shutil.which(name) for name in ("cc", "c++", "gcc", "g++", "clang", "nvcc", "ninja"))
# The wheel that was installed beside this folder, not a source tree.
assert Path(fastinfer.__file__).resolve().is_relative_to(HERE.parent), fastinfer.__file__

report = env.collect()
assert report["library"]["error"] is None, report["library"]["error"]
torch.manual_seed(0)
q, k, v = (torch.randn(2, 33, h, 64) for h in (8, 2, 2))
out = fastinfer.flash_attn_func(q, k, v, causal=True)
want = torch.nn.functional.scaled_dot_product_attention(
    *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
).transpose(1, 2)
torch.testing.assert_close(out, want, atol=1e-5, rtol=1e-5)

weight = torch.randn(96, 128)
codes = fastinfer.quantize_weight(weight, bits=4, group_size=32)
packed = fastinfer.pack_weight(*codes, bits=4, group_size=32)
x = torch.randn(3, 128)
y = fastinfer.int4_linear(x, *packed, group_size=32, out_features=96)
assert torch.nn.functional.cosine_similarity(y, x @ weight.t()).min() > 0.98

compiled = torch.compile(fastinfer.rms_norm, fullgraph=True, backend="aot_eager")
torch.testing.assert_close(compiled(x, weight[0]), fastinfer.rms_norm(x, weight[0]))

cache = fastinfer.PagedKVCache(1, 2, 64, num_blocks=8, dtype=torch.float32)
step = cache.append([cache.allocate()], 33)
paged = cache.attend(0, q[0], k[0], v[0], step)
torch.testing.assert_close(paged, out[0], atol=1e-6, rtol=1e-6)

with LLM(str(HERE / "model")) as llm:
    (output,) = llm.generate(["Once upon a time"], SamplingParams(temperature=0.0, max_tokens=24))
tokens = list(output.outputs[0].token_ids)

print(f"Python {sys.version.split()[0]}, torch {torch.__version__}")
print(f"CPU kernels {report['library']['cpu_isa']}, host {report['host']['module']}")
print(f"{len(tokens)} tokens generated")
print(hashlib.sha256(repr(tokens).encode()).hexdigest())
