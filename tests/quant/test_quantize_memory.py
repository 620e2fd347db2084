"""Peak memory of `quantize_checkpoint`: at most one block, and what its largest layer needs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from quantizing import MODEL, calibration_text

HIDDEN, INTERMEDIATE, LAYERS, SAMPLES, SEQLEN = 768, 2048, 3, 8, 128
MB = 1_000_000
# What a run needs however small its model: the tokenizer and the text, the buffers of the matrix
# products, the temporary tensors of row chunks of 1 MB.
FIXED = 33 * MB

MEASURE = """
import json, sys, threading, time

def anonymous():
    with open("/proc/self/status") as status:
        line = next(line for line in status if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024

import torch
import fastinfer.quant.pipeline
from fastinfer.quant import QuantizeOptions, quantize_checkpoint

torch.ones(512, 512) @ torch.ones(512, 512)
begin = peak = anonymous()
over = False

def watch():
    global peak
    while not over:
        peak = max(peak, anonymous())
        time.sleep(0.001)

thread = threading.Thread(target=watch)
thread.start()
model, out, calib, options = sys.argv[1:]
try:
    quantize_checkpoint(
        model, out, QuantizeOptions(**json.loads(options)), calib=calib or None, progress=False
    )
finally:
    over = True
    thread.join()
print(peak - begin)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    config = transformers.LlamaConfig(
        vocab_size=1024,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN // 64,
        num_key_value_heads=HIDDEN // 64,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((MODEL / name).read_bytes())
    return folder


WEIGHTS = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * INTERMEDIATE
BLOCK = 4 * WEIGHTS  # in fp32
STEP = 16 * INTERMEDIATE * 512  # activations of one step of 512 tokens inside of a block
SAMPLED = min(SAMPLES * SEQLEN, 2048)
GATE_UP = 4 * 2 * HIDDEN * INTERMEDIATE
FACTOR = 2 * INTERMEDIATE * (INTERMEDIATE + 128)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("method", "options", "limit"),
    [
        # Finished layers.
        ("rtn", {}, WEIGHTS),
        # Finished layers, also as codes; the factor of the widest layer, that in fp32 and as codes.
        ("gptq", {}, 1.5 * WEIGHTS + STEP + FACTOR + 5 * HIDDEN * INTERMEDIATE),
        pytest.param(
            "gptq",
            {"act_order": True, "format": "gptq_v2"},
            1.5 * WEIGHTS + STEP + FACTOR + 5 * HIDDEN * INTERMEDIATE,
            marks=pytest.mark.full,
        ),
        # The sampled inputs, exact and rounded.
        pytest.param(
            "smoothquant",
            {},
            BLOCK + STEP + 2 * 4 * SAMPLED * INTERMEDIATE,
            marks=pytest.mark.full,
        ),
        # The layers that share an input once more, the sampled inputs, and twelve bytes per token
        # and channel for the attention module.
        pytest.param(
            "awq",
            {},
            BLOCK + STEP + GATE_UP + 4 * SAMPLED * INTERMEDIATE + 12 * SAMPLES * SEQLEN * HIDDEN,
            marks=pytest.mark.full,
        ),
    ],
)
def test_peak_memory(method: str, options: dict, limit: float, model: Path, tmp_path: Path) -> None:
    calib = tmp_path / "calib.txt"
    calib.write_text(calibration_text(40_000), encoding="utf-8")
    options = {"method": method, "samples": SAMPLES, "seqlen": SEQLEN, **options}
    arguments = [str(model), str(tmp_path / "out"), str(calib) if method != "rtn" else ""]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments, json.dumps(options)],
        env={"PYTHONPATH": ":".join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout)
    print(f"{method}: {peak / MB:.0f} MB; a block {BLOCK / MB:.0f}, limit {limit / MB:.0f} + fixed")
    assert peak < limit + FIXED
    if method == "rtn":
        assert peak < BLOCK
