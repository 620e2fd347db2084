"""Loading: sharded and single files, dtypes, dummy weights, and each thing that can be wrong."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from _model_harness import Tiny, random_ids, run_schedule
from safetensors.torch import load_file, save_file

from fastinfer.models import CausalLM, load_model

GetTiny = Callable[[str], Tiny]
NORM = "model.layers.1.input_layernorm.weight"
GATE = "model.layers.0.mlp.gate_proj.weight"


@pytest.fixture
def folder(tiny: GetTiny, tmp_path: Path) -> Path:
    """A copy of the tiny Llama that a test may damage."""
    copy = tmp_path / "model"
    shutil.copytree(tiny("llama").folder, copy)
    return copy


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    raw = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in raw.items() if v is not ...}))


def shard(folder: Path, count: int, *, index: bool = True) -> list[Path]:
    """Split model.safetensors, in a way that separates the parts of fused layers."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map, files = {}, []
    for i in range(count):
        file = folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        mine = names[i::count]
        save_file({name: tensors[name] for name in mine}, file)
        weight_map |= dict.fromkeys(mine, file.name)
        files.append(file)
    if index:
        text = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / "model.safetensors.index.json").write_text(text)
    return files


def same(a: CausalLM, b: CausalLM) -> bool:
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def load(folder: Path, **options: object) -> CausalLM:
    return load_model(folder, progress=False, **options)


def refuses(folder: Path, *words: str, error: type[Exception] = ValueError, **options: object):
    with pytest.raises(error, match=r"^load_model: ") as caught:
        load(folder, **options)
    for word in words:
        assert word in str(caught.value), f"{word!r} not in: {caught.value}"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [True, False])
def test_shards_equal_the_single_file(tiny: GetTiny, folder: Path, index: bool) -> None:
    shard(folder, 3, index=index)
    assert same(load(folder), tiny("llama").model)


def test_index_decides_which_files_are_read(tiny: GetTiny, folder: Path) -> None:
    """Folders often hold the same weights twice, in another layout."""
    shard(folder, 2)
    save_file({"other.weight": torch.ones(1)}, folder / "consolidated.safetensors")
    assert same(load(folder), tiny("llama").model)


def test_fused_layers_hold_their_parts(tiny: GetTiny) -> None:
    pair = tiny("llama_biases")
    theirs, ours = pair.reference.model.layers[1], pair.model.layers[1]
    for param in ("weight", "bias"):
        qkv = [getattr(getattr(theirs.self_attn, f"{p}_proj"), param) for p in "qkv"]
        assert torch.equal(getattr(ours.attn.qkv_proj, param), torch.cat(qkv))
        gate_up = [getattr(getattr(theirs.mlp, f"{p}_proj"), param) for p in ("gate", "up")]
        assert torch.equal(getattr(ours.mlp.gate_up_proj, param), torch.cat(gate_up))


def test_nothing_needs_gradients(tiny: GetTiny) -> None:
    model = tiny("qwen3").model
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert model.lm_head is None  # tied


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ("auto", torch.float32),
        ("bfloat16", torch.bfloat16),
        (torch.float16, torch.float16),
        ("half", torch.float16),
    ],
)
def test_dtype_is_converted_while_copying(
    tiny: GetTiny, asked: str | torch.dtype, expected: torch.dtype
) -> None:
    pair = tiny("llama")
    model = load(pair.folder, dtype=asked)
    assert {p.dtype for p in model.parameters()} == {expected}
    assert model.dtype == model.config.dtype == expected
    weight = pair.reference.model.layers[0].self_attn.o_proj.weight
    assert torch.equal(model.layers[0].attn.o_proj.weight, weight.to(expected))
    assert model.rotary[0].cos.dtype == torch.float32


def test_auto_dtype_without_one_in_config(folder: Path) -> None:
    edit_config(folder, dtype=...)
    assert load(folder).dtype == torch.float32
    edit_weights(folder, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    assert load(folder).dtype == torch.bfloat16


def test_max_model_len_sizes_the_tables(folder: Path) -> None:
    assert load(folder).rotary[0].cos.shape == (64, 8)
    model = load(folder, max_model_len=10)
    assert model.max_model_len == 10
    assert model.rotary[0].cos.shape == (10, 8)


def test_one_rotary_table_per_distinct_embedding(folder: Path) -> None:
    edit_config(
        folder,
        architectures=["Qwen3ForCausalLM"],
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_theta": 1e6},
            "sliding_attention": {"rope_theta": 1e4},
        },
    )
    model = load(folder, load_format="dummy")
    assert len(model.rotary) == 2
    used = [model.rotary[i].rope.theta for i in model._rotary_of_layer]
    assert used == [1e4, 1e6, 1e4]


def test_dummy_weights_need_only_the_config(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    edit_config(folder, dtype="bfloat16")
    model = load(folder, load_format="dummy")
    assert model.dtype == torch.bfloat16
    assert same(model, load(folder, load_format="dummy"))
    assert model.layers[0].mlp.gate_up_proj.weight.float().std() == pytest.approx(0.02, rel=0.1)
    assert torch.equal(model.norm.weight.float(), torch.ones(64))
    ids = random_ids(9, seed=0)
    (logits,) = run_schedule(model, [ids], [[(0, 9)]], block_size=4)
    assert logits.isfinite().all()
    assert load(folder, load_format="dummy", dtype="float32").dtype == torch.float32


def test_tied_head_may_be_stored_twice(folder: Path, tiny: GetTiny) -> None:
    shutil.rmtree(folder)
    shutil.copytree(tiny("qwen3").folder, folder)

    def duplicate(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_weights(folder, duplicate)
    assert same(load(folder), tiny("qwen3").model)
    edit_weights(folder, lambda t: t["lm_head.weight"].add_(0.1))
    refuses(folder, "lm_head.weight", "model.embed_tokens.weight", "tie_word_embeddings")


def test_saved_frequency_buffers_are_ignored(folder: Path, tiny: GetTiny) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_weights(folder, lambda t: t.update({name: torch.ones(8)}))
    assert same(load(folder), tiny("llama").model)


def test_missing_and_superfluous_tensors_are_named(folder: Path) -> None:
    edit_weights(folder, lambda t: t.pop(NORM))
    refuses(folder, f"missing {NORM}", "LlamaForCausalLM")
    edit_weights(folder, lambda t: t.update({"model.extra.weight": torch.ones(2)}))
    refuses(folder, f"missing {NORM}", "not used by the model model.extra.weight")


def test_biases_that_the_config_does_not_mention_are_named(folder: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    edit_weights(folder, lambda t: t.update({name: torch.ones(64)}))
    refuses(folder, f"not used by the model {name}")


def test_long_lists_of_names_are_cut(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=9)
    refuses(folder, "model.layers.3.self_attn.q_proj.weight", "and 46 more")


def test_wrong_shape_names_both(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({GATE: torch.ones(87, 64)}))
    refuses(folder, GATE, "[88, 64]", "[87, 64]")


def test_wrong_shape_of_packed_qkv(folder: Path, tiny: GetTiny) -> None:
    shutil.rmtree(folder)
    shutil.copytree(tiny("baichuan").folder, folder)
    name = "model.layers.2.self_attn.W_pack.weight"
    edit_weights(folder, lambda t: t.update({name: torch.ones(128, 64)}))
    refuses(folder, name, "[192, 64]", "[128, 64]")


def test_quantised_storage_is_refused(folder: Path) -> None:
    edit_weights(folder, lambda t: t.update({GATE: torch.ones(88, 64, dtype=torch.int8)}))
    refuses(folder, GATE, "I8", "BF16")


def test_truncated_shard(folder: Path) -> None:
    file = shard(folder, 2)[1]
    file.write_bytes(file.read_bytes()[:-100])
    refuses(folder, file.name, "truncated", "download the file again")
    file.write_bytes(b"\x10")
    refuses(folder, file.name, "truncated")


def test_git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    )
    refuses(folder, "git-lfs pointer", "git lfs pull")


@pytest.mark.parametrize("index", [True, False])
def test_missing_shard(folder: Path, index: bool) -> None:
    file = shard(folder, 3, index=index)[1]
    file.unlink()
    refuses(folder, "3 shards", file.name, error=FileNotFoundError)


@pytest.mark.parametrize(
    "text",
    [
        '{"metadata": {}}',
        "[]",
        "{",
        '{"weight_map": 5}',
        '{"weight_map": {"a": 5}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
    ],
)
def test_damaged_index(folder: Path, text: str) -> None:
    shard(folder, 2)
    (folder / "model.safetensors.index.json").write_text(text)
    refuses(folder, "model.safetensors.index.json", "weight_map")


def test_same_tensor_in_two_files(folder: Path) -> None:
    shard(folder, 2, index=False)
    save_file({NORM: torch.ones(64)}, folder / "extra.safetensors")
    refuses(folder, NORM, "extra.safetensors")


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    refuses(folder, "model.safetensors", "no weight files", error=FileNotFoundError)


@pytest.mark.parametrize("count", [1, 2])
def test_bin_weights_give_a_conversion_command_that_works(
    folder: Path, tiny: GetTiny, count: int
) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    for i in range(count):
        suffix = "" if count == 1 else f"-{i + 1:05d}-of-{count:05d}"
        part = {name: tensors[name] for name in names[i::count]}
        torch.save(part, folder / f"pytorch_model{suffix}.bin")
    with pytest.raises(FileNotFoundError, match=r"got only pytorch_model.*convert") as caught:
        load(folder)
    command = str(caught.value).split("once with:\n", 1)[1]
    words = shlex.split(command)
    assert words[0] == "python"
    subprocess.run([sys.executable, *words[1:]], check=True)
    assert same(load(folder), tiny("llama").model)


def test_a_name_that_announces_no_number_of_files(folder: Path, tiny: GetTiny) -> None:
    (folder / "model.safetensors").rename(folder / "x-1-of-99999999999.safetensors")
    assert same(load(folder), tiny("llama").model)


def test_wrong_arguments(folder: Path) -> None:
    refuses(folder, "load_format", "'dummy'", "'pt'", load_format="pt")
    refuses(folder, "dtype", "bfloat16", "'int8'", dtype="int8")
    refuses(folder, "dtype", "torch.float64", dtype=torch.float64)
    refuses(folder, "max_model_len", "0", max_model_len=0)
    refuses(folder, "device", "'gpu'", device="gpu")
    refuses(folder, "device", "'meta'", device="meta")
    count = torch.cuda.device_count()
    refuses(folder, "device", f"'cuda:{count}'", device=f"cuda:{count}", error=RuntimeError)


def test_progress_is_silent_without_a_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load_model(folder, progress=True)
    assert re.sub(r"\s", "", capsys.readouterr().err) == ""


def test_progress_bar_on_a_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load_model(folder, progress=True)
    assert "loading weights" in capsys.readouterr().err
    load_model(folder, progress=False)
    assert capsys.readouterr().err == ""
