"""Nothing happens to transformers, nor to flash_attn's name, before `enable` and `install`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import fastinfer

CODE = """
import sys
import transformers
from transformers import modeling_flash_attention_utils as loader
from transformers.generation.continuous_batching import ContinuousBatchingManager, input_outputs
from transformers.quantizers import auto

def look():
    functions = (
        loader._lazy_imports,
        ContinuousBatchingManager.switch_to_cb_friendly_attn,
        input_outputs.ContinuousBatchingIOs.get_model_kwargs,
        input_outputs.ContinuousBatchingAsyncIOs.get_model_kwargs,
    )
    names = [
        sorted(transformers.AttentionInterface().valid_keys()),
        sorted(transformers.AttentionMaskInterface().valid_keys()),
        sorted(auto.AUTO_QUANTIZER_MAPPING),
        sorted(auto.AUTO_QUANTIZATION_CONFIG_MAPPING),
    ]
    return functions, names

before = look()
import fastinfer, fastinfer.quant
import fastinfer.integrations.flash_attn
from fastinfer.integrations.transformers import FastinferInt4Config, enable
fastinfer.flash_attn_func
assert look() == before and "flash_attn" not in sys.modules
enable()
functions, names = look()
assert all(a is not b for a, b in zip(functions, before[0]))
assert all("fastinfer" in group or "fastinfer_int4" in group for group in names)
assert [set(new) >= set(old) for new, old in zip(names, before[1])] == [True] * 4
after = look()
enable()
assert look() == after
"""


def test_nothing_before_enable() -> None:
    package = str(Path(fastinfer.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([package, os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
