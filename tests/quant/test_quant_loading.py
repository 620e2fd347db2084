"""Loading whole checkpoints: fusing, exceptions, remarks, damage; dummy weights; any nn.Module."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from quant_checkpoints import CASES, new_model, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn

from fastinfer.models import load_model
from fastinfer.models.quantized import QuantizedLinear
from fastinfer.quant import QuantError, QuantLinear, W8A8Linear, load_quantized
from models._model_harness import PagedRun

IDS = [5, 77, 3, 120, 9]
UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory):
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            write_checkpoint(CASES[name], folders[name])
        return folders[name]

    return get


@pytest.fixture
def copy(made, tmp_path: Path):
    """Name -> a folder that may be changed."""

    def get(name: str) -> Path:
        return Path(shutil.copytree(made(name), tmp_path / name))

    return get


def edit(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Change (None: drop) tensors; names have _ for the dots of UP."""
    file = folder / "model.safetensors"
    state = load_file(file) | {k.replace("UP_", f"{UP}."): t for k, t in tensors.items()}
    save_file({k: t.contiguous() for k, t in state.items() if t is not None}, file)


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes.pop("quant", {})
    file.write_text(json.dumps(config | changes))


def segments(model: nn.Module, name: str) -> list[str]:
    layer = model.get_submodule(name)
    assert isinstance(layer, QuantizedLinear)
    return [type(linear).__name__ for linear in layer.fused.linears]


def test_equal_columns_are_fused_and_others_are_not(made) -> None:
    model = load_model(made("gptq"), progress=False)
    assert segments(model, "layers.0.attn.qkv_proj") == ["QuantLinear"]
    assert segments(model, "layers.0.mlp.gate_up_proj") == ["QuantLinear"]
    assert not isinstance(model.lm_head, QuantizedLinear)
    model = load_model(made("gptq_shared_act_order"), progress=False)
    assert segments(model, "layers.0.attn.qkv_proj") == ["QuantLinear"]
    assert model.layers[0].attn.qkv_proj.fused.linears[0].perm is not None
    model = load_model(made("gptq_v2_act_order"), progress=False)
    assert segments(model, "layers.0.attn.qkv_proj") == ["QuantLinear"] * 3
    assert segments(model, "layers.0.mlp.gate_up_proj") == ["QuantLinear"] * 2
    model = load_model(made("gptq_mixed"), progress=False)
    assert segments(model, "layers.0.attn.qkv_proj") == ["QuantLinear"] * 3
    assert segments(model, "layers.1.mlp.gate_up_proj") == ["QuantLinear", "DenseLinear"]
    assert isinstance(load_model(made("gptq_head"), progress=False).lm_head, QuantizedLinear)
    model = load_model(made("ct_w8a8"), progress=False)
    assert segments(model, "layers.0.attn.qkv_proj") == ["W8A8Linear"]
    model = load_model(made("awq_skips"), progress=False)
    assert not isinstance(model.layers[0].attn.qkv_proj, QuantizedLinear)
    assert isinstance(model.layers[1].attn.qkv_proj, QuantizedLinear)


def test_conversions_are_said_once(made, caplog: pytest.LogCaptureFixture) -> None:
    load_model(made("bnb_nf4"), progress=False)
    assert len(caplog.messages) == 1
    assert "and 13 more: bitsandbytes nf4" in caplog.messages[0]
    caplog.clear()
    load_quantized(new_model("Llama"), made("gptq_odd_group"))
    assert len(caplog.messages) == 1 and "12" in caplog.messages[0]
    caplog.clear()
    load_model(made("gptq"), progress=False)
    assert caplog.messages == []


def test_requantising_what_has_no_kernel(made) -> None:
    folder = made("bnb_nf4")
    dense = load_model(folder, progress=False)
    assert segments(dense, "layers.0.attn.o_proj") == ["DenseLinear"]
    eight = load_model(folder, progress=False, requantize=8)
    assert segments(eight, "layers.0.attn.o_proj") == ["QuantLinear"]
    runs = [PagedRun(model, 1, block_size=4).step([(0, IDS)])[0] for model in (dense, eight)]
    assert 0 < (runs[0] - runs[1]).norm() / runs[0].norm() < 0.05
    theirs = load_quantized(new_model("Llama"), folder, requantize=4)
    assert theirs.model.layers[0].self_attn.o_proj.bits == 4
    with pytest.raises(ValueError, match=r"load_model: requantize must be None, 4 or 8.*got 3"):
        load_model(folder, requantize=3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(made, dtype: torch.dtype) -> None:
    full = load_model(made("gptq_v2_act_order"), progress=False)
    half = load_model(made("gptq_v2_act_order"), progress=False, dtype=dtype)
    assert half.dtype == dtype
    expected, logits = (
        PagedRun(model, 1, block_size=4).step([(0, IDS)])[0].float() for model in (full, half)
    )
    assert (logits - expected).norm() / expected.norm() < 0.03


@pytest.mark.parametrize("name", ["gptq", "ct_w8a8", "awq_skips", "bnb_nf4", "gptq_mixed"])
def test_dummy_weights(made, name: str) -> None:
    model = load_model(made(name), progress=False, load_format="dummy")
    (logits,) = PagedRun(model, 1, block_size=4).step([(0, IDS)])
    assert logits.isfinite().all()
    real = load_model(made(name), progress=False)
    assert (
        segments(model, "layers.1.attn.qkv_proj")[0] == segments(real, "layers.1.attn.qkv_proj")[0]
    )


def test_state_dict_of_a_loaded_model(made) -> None:
    folder = made("gptq_v2_act_order")
    first, second = (load_quantized(new_model("Llama"), folder) for _ in range(2))
    state = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    assert f"{UP}.qweight" in state and f"{UP}.perm" in state
    with torch.no_grad():
        expected = second(torch.tensor([IDS])).logits
        second.get_submodule(UP).packed_qweight.zero_()
        assert not torch.equal(second(torch.tensor([IDS])).logits, expected)
        second.load_state_dict(state)
        assert torch.equal(second(torch.tensor([IDS])).logits, expected)
    assert all(torch.equal(t, state[name]) for name, t in second.state_dict().items())


def test_zero_biases_of_old_packers(copy) -> None:
    folder = copy("gptq")
    edit(folder, UP_bias=torch.zeros(96))
    load_model(folder, progress=False)
    load_quantized(new_model("Llama"), folder)
    edit(folder, UP_bias=torch.ones(96))
    with pytest.raises(ValueError, match=rf"^load_model: {UP}\.bias must be zero"):
        load_model(folder, progress=False)
    with pytest.raises(QuantError, match=rf"^load_quantized: {UP}\.bias: must be zero"):
        load_quantized(new_model("Llama"), folder)


def test_layers_left_plain_without_being_listed(copy, caplog: pytest.LogCaptureFixture) -> None:
    folder = copy("gptq")
    dropped = dict.fromkeys(("UP_qweight", "UP_qzeros", "UP_scales", "UP_g_idx"))
    edit(folder, **dropped, UP_weight=torch.randn(96, 64))
    model = load_model(folder, progress=False)
    assert segments(model, "layers.1.mlp.gate_up_proj") == ["QuantLinear", "DenseLinear"]
    assert f"{UP}: stored in floating point" in caplog.text
    theirs = load_quantized(new_model("Llama"), folder)
    assert type(theirs.get_submodule(UP)) is nn.Linear


DAMAGE = {
    "missing scales": ({"UP_scales": None}, {}, [f"missing {UP}.scales"]),
    "unused": ({"UP_extra": torch.ones(1)}, {}, [f"{UP}.extra"]),
    "wrong shape": (
        {"UP_qweight": torch.zeros(9, 96, dtype=torch.int32)},
        {},
        [f"{UP}.qweight", "[8, 96]", "[9, 96]"],
    ),
    "group count": ({"UP_scales": torch.ones(5, 96)}, {}, [f"{UP}.scales", "[4, 96]", "[5, 96]"]),
    "g_idx": (
        {"UP_g_idx": torch.arange(64, dtype=torch.int32)},
        {},
        [f"{UP}.g_idx", "0..3", "0..63"],
    ),
    "other group size": ({}, {"group_size": 32}, [".scales", "group_size 32", "[4, 64]"]),
    "other bits": ({}, {"bits": 8}, [".qweight", "[16, 64]", "[8, 64]"]),
    "other method": ({}, {"quant_method": "bitsandbytes", "load_in_8bit": True}, [".SCB"]),
    "unknown method": ({}, {"quant_method": "hqq"}, ["quant_method", "'hqq'", "gptq, awq"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_names_the_tensor(copy, case: str) -> None:
    folder = copy("gptq")
    tensors, quant, words = DAMAGE[case]
    edit(folder, **tensors)
    edit_config(folder, quant=quant)
    for who, load in (
        ("load_model", lambda: load_model(folder, progress=False)),
        ("load_quantized", lambda: load_quantized(new_model("Llama"), folder)),
    ):
        with pytest.raises(ValueError, match=rf"^{who}: ") as caught:
            load()
        message = str(caught.value)
        assert all(word in message for word in words), message
        assert "\n" not in message


@pytest.mark.parametrize(
    "name", ["gptq", "awq", "ct_symmetric", "ct_w8a8", "bnb_int8", "bnb_nf4", "native"]
)
def test_truncated_files(copy, name: str) -> None:
    folder = copy(name)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(ValueError, match=r"^load_model: .*model\.safetensors.*truncated"):
        load_model(folder, progress=False)
    with pytest.raises(ValueError, match=r"^load_quantized: .*model\.safetensors.*truncated"):
        load_quantized(new_model("Llama"), folder)


def pack_qkv(folder: Path) -> None:
    """Rewrite a Llama checkpoint as Baichuan2 writes it: one W_pack instead of q, k and v."""
    state = load_file(folder / "model.safetensors")
    for name in [n for n in state if "q_proj" in n]:
        parts = [state.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        packed = parts[0] if name.endswith("g_idx") else torch.cat(parts, dim=1)
        state[name.replace("q_proj", "W_pack")] = packed
    save_file(state, folder / "model.safetensors")
    edit_config(folder, architectures=["BaichuanForCausalLM"], model_type="baichuan")


def test_quantised_packed_qkv(tmp_path: Path) -> None:
    write_checkpoint(CASES["gptq"], tmp_path, num_key_value_heads=4)
    head = load_file(tmp_path / "model.safetensors")["lm_head.weight"]
    edit(tmp_path, **{"lm_head.weight": nn.functional.normalize(head)})
    llama = load_model(tmp_path, progress=False)
    pack_qkv(tmp_path)
    model = load_model(tmp_path, progress=False)
    assert segments(model, "layers.0.attn.qkv_proj") == ["QuantLinear"]
    runs = [PagedRun(m, 1, block_size=4).step([(0, IDS)])[0] for m in (llama, model)]
    torch.testing.assert_close(*runs)


def test_quantised_head_of_normalised_heads_is_refused(tmp_path: Path) -> None:
    write_checkpoint(CASES["gptq_head"], tmp_path, num_key_value_heads=4)
    pack_qkv(tmp_path)
    with pytest.raises(ValueError, match="lm_head of BaichuanForCausalLM must be in floating"):
        load_model(tmp_path, progress=False)


def test_shards_may_part_the_tensors_of_a_layer(copy) -> None:
    folder = copy("gptq_v2_act_order")
    expected = load_model(folder, progress=False)
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    for i in range(3):
        part = {name: state[name] for name in names[i::3]}
        save_file(part, folder / f"model-{i + 1:05d}-of-00003.safetensors")
    model = load_model(folder, progress=False)
    runs = [PagedRun(m, 1, block_size=4).step([(0, IDS)])[0] for m in (expected, model)]
    assert torch.equal(*runs)


# load_quantized on models of other makers


def test_models_on_meta_and_chosen_dtype(made) -> None:
    folder = made("gptq_asymmetric")
    config = new_model("Qwen2").config
    with torch.device("meta"):
        model = type(new_model("Qwen2"))(config)
    for name, module in model.named_modules():
        if "rotary" in name:  # its buffers are computed, not stored
            for key, value in new_model("Qwen2").get_submodule(name)._buffers.items():
                module._buffers[key] = value
    model = load_quantized(model, folder, dtype=torch.bfloat16)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    assert model.get_submodule(UP).in_features == 64
    assert model.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16
    with torch.no_grad():
        full = load_quantized(new_model("Qwen2"), folder)(torch.tensor([IDS])).logits
        half = model(torch.tensor([IDS])).logits
    assert (full - half.float()).norm() / full.norm() < 0.05
    with torch.device("meta"):
        model = type(model)(config)
    with pytest.raises(QuantError, match=r"inv_freq.*meta device"):
        load_quantized(model, folder)


def test_tied_weights(tmp_path: Path) -> None:
    twin = write_checkpoint(CASES["gptq"], tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load_quantized(new_model("Llama", tie_word_embeddings=True), tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ours = load_model(tmp_path, progress=False)
    with torch.no_grad():
        expected = twin(torch.tensor([IDS])).logits[0]
        torch.testing.assert_close(model(torch.tensor([IDS])).logits[0], expected)
    torch.testing.assert_close(PagedRun(ours, 1, block_size=4).step([(0, IDS)])[0], expected)
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    edit(tmp_path, **{"lm_head.weight": embedding.clone()})
    load_quantized(new_model("Llama", tie_word_embeddings=True), tmp_path)
    edit(tmp_path, **{"lm_head.weight": embedding + 1})
    with pytest.raises(
        QuantError, match=r"must equal lm_head\.weight, with which|lm_head\.weight: must eq"
    ):
        load_quantized(new_model("Llama", tie_word_embeddings=True), tmp_path)


def test_generate_of_transformers(made) -> None:
    model = load_quantized(new_model("Qwen2"), made("awq"))
    assert isinstance(model.get_submodule(UP), QuantLinear)
    assert isinstance(
        load_quantized(new_model("Qwen2"), made("ct_w8a8")).get_submodule(UP), W8A8Linear
    )
    assert not any(p.requires_grad for p in model.parameters())
    out = model.generate(torch.tensor([IDS]), max_new_tokens=4, do_sample=False)
    assert out.shape == (1, len(IDS) + 4)


def test_any_module_will_do(copy) -> None:
    """Names decide, not classes."""
    folder = copy("gptq")
    state = load_file(folder / "model.safetensors")
    wanted = f"{UP}."
    state = {n.removeprefix("model."): t for n, t in state.items() if n.startswith(wanted)}
    save_file(state, folder / "model.safetensors")
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Module(), nn.Module()])
    model.layers[1].mlp = nn.Module()
    model.layers[1].mlp.up_proj = nn.Linear(64, 96, bias=False)
    load_quantized(model, folder)
    assert isinstance(model.layers[1].mlp.up_proj, QuantLinear)
    model.layers[1].mlp.more = nn.Parameter(torch.zeros(2))
    model.layers[1].mlp.up_proj = nn.Linear(64, 96, bias=False)
    with pytest.raises(QuantError, match=r"missing layers\.1\.mlp\.more"):
        load_quantized(model, folder)


def test_wrong_calls(made, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"^load_quantized: path must be"):
        load_quantized(new_model("Llama"), tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(QuantError, match=r"^load_quantized: .*quantization_config, got none"):
        load_quantized(new_model("Llama"), tmp_path)
    with pytest.raises(QuantError, match=r"weight: must be \[140, 64\], got \[136, 64\]"):
        load_quantized(new_model("Llama", vocab_size=140), made("gptq"))
    with pytest.raises(QuantError, match=r"without a place in the model model\.layers\.1"):
        load_quantized(new_model("Llama", num_hidden_layers=1), made("gptq"))
