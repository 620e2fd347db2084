"""Files we write, read by vLLM itself: its model and its loader, run on CPU up to the point where
kernels take over. Where vLLM is installed; seen with 0.33.0, its version marked `+cpu` so that it
picks its CPU platform.

Its kernels for the CPU know no 8-bit codes, so the choice of kernel, which has no part in loading,
is answered for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from quantizing import calibration_text, quantized
from safetensors.torch import load_file
from torch import nn

vllm = pytest.importorskip("vllm", reason="vLLM is not installed")

FUSED = {
    ".q_proj.": ".qkv_proj.",
    ".k_proj.": ".qkv_proj.",
    ".v_proj.": ".qkv_proj.",
    ".gate_proj.": ".gate_up_proj.",
    ".up_proj.": ".gate_up_proj.",
}


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """vLLM's layers ask for their rank among one."""
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    meeting = tmp_path_factory.mktemp("group") / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{meeting}", 0, "gloo")
        initialize_model_parallel(1, 1)
    yield
    cleanup_dist_env_and_memory()


@pytest.fixture
def any_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.kernels.linear.mixed_precision.marlin import MarlinLinearKernel
    from vllm.model_executor.layers.quantization import auto_gptq
    from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
        compressed_tensors_wNa16,
    )

    monkeypatch.setattr(auto_gptq, "verify_marlin_supported", lambda *_, **__: None)
    for module in (auto_gptq, compressed_tensors_wNa16):
        monkeypatch.setattr(module, "choose_mp_linear_kernel", lambda _: MarlinLinearKernel)


def loaded_by_vllm(folder: Path, dtype: str) -> nn.Module:
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = EngineArgs(
        model=str(folder), dtype=dtype, skip_tokenizer_init=True, max_model_len=256
    ).create_engine_config()
    with set_current_vllm_config(config):
        loader = get_model_loader(config.load_config)
        with set_default_torch_dtype(config.model_config.dtype):
            model = initialize_model(config)
        loader.load_weights(model, config.model_config)
    return model


def holds(parameter: torch.Tensor, part: torch.Tensor) -> bool:
    """`part` is a run of rows or columns of the fused parameter, in its dtype."""
    part = part.to(parameter.dtype)
    if parameter.shape == part.shape:
        return torch.equal(parameter, part)
    (dim,) = (i for i, size in enumerate(part.shape) if size != parameter.shape[i])
    starts = range(parameter.shape[dim] - part.shape[dim] + 1)
    return any(torch.equal(parameter.narrow(dim, at, part.shape[dim]), part) for at in starts)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "rtn", "format": "gptq"},
        {"method": "rtn", "format": "gptq", "bits": 8},
        {"method": "gptq", "format": "gptq", "act_order": True},
        {"method": "rtn", "format": "gptq_v2"},
        {"method": "rtn", "format": "awq", "symmetric": False},
        {"method": "rtn"},
        {"method": "rtn", "bits": 8, "group_size": -1},
        {"method": "rtn", "symmetric": False},
        {"method": "gptq", "format": "compressed-tensors", "act_order": True},
        {"method": "smoothquant"},
    ],
    ids=str,
)
@pytest.mark.usefixtures("group", "any_kernel")
def test_vllm_holds_every_tensor(options: dict[str, Any], tmp_path: Path) -> None:
    calib = tmp_path / "calib.txt"
    calib.write_text(calibration_text(20_000), encoding="utf-8")
    out = tmp_path / "out"
    needs_text = options["method"] != "rtn"
    quantized(out, calib if needs_text else None, **({"samples": 4, "seqlen": 64} | options))
    dtype = "float16" if options.get("format") == "awq" else "bfloat16"
    parameters = dict(loaded_by_vllm(out, dtype).named_parameters())
    for name, tensor in load_file(out / "model.safetensors").items():
        # Shapes are for the reader; without desc_act vLLM keeps no g_idx.
        if name.endswith(("weight_shape", "g_idx")):
            continue
        fused = name
        for part, whole in FUSED.items():
            fused = fused.replace(part, whole)
        assert holds(parameters[fused].data, tensor), name


@pytest.mark.usefixtures("group", "any_kernel")
def test_vllm_refuses_groups_permuted_at_run_time(tmp_path: Path) -> None:
    """Said in docs/quantization.md: the default, static groups, is what it reads (above)."""
    calib = tmp_path / "calib.txt"
    calib.write_text(calibration_text(20_000), encoding="utf-8")
    quantized(
        tmp_path / "out", calib, method="gptq", format="gptq", act_order=True,
        static_groups=False, samples=4, seqlen=64,
    )  # fmt: skip
    with pytest.raises(ValueError, match="desc_act=True"):
        loaded_by_vllm(tmp_path / "out", "bfloat16")
