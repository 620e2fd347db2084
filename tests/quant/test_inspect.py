"""`fastinfer inspect`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quant_checkpoints import CASES, new_model, write_checkpoint

from fastinfer.cli.main import main


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory):
    folders: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            if name == "plain":
                new_model("Qwen2").save_pretrained(folders[name])
            else:
                write_checkpoint(CASES[name], folders[name])
        return folders[name]

    return get


def inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict, str]:
    """Exit code, the JSON report, the text report."""
    code = main(["inspect", str(folder), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert main(["inspect", str(folder)]) == code
    return code, report, capsys.readouterr().out


def test_plain(made, capsys: pytest.CaptureFixture[str]) -> None:
    code, report, text = inspect(made("plain"), capsys)
    assert code == 0 and report["runs"]
    assert report["family"] == "Qwen2ForCausalLM"
    assert report["quantization"] is None
    assert report["sizes"]["layers"] == 2 and report["sizes"]["kv_heads"] == 2
    assert report["dtype"] == "float32"
    assert report["kv_cache_bytes_per_token"] == 2 * 2 * 2 * 16 * 4
    assert report["total_bytes"] == (made("plain") / "model.safetensors").stat().st_size
    assert report["how"] == ["15 linear layers in float32"]
    assert "4 heads (2 KV) of 16" in text and "512 B per token" in text
    assert "quantised    no" in text and "runs         yes" in text


@pytest.mark.parametrize(
    ("name", "scheme", "how"),
    [
        ("gptq", {"bits": 4, "group_size": 16, "zeros": "symmetric", "act_order": False}, "W4A16"),
        ("gptq_v2_act_order", {"style": "gptq_v2", "act_order": True}, "W4A16 in groups of 16"),
        ("gptq_per_channel", {"group_size": -1}, "W4A16 per channel"),
        ("awq", {"style": "gemm", "zeros": "asymmetric (0..15)"}, "W4A16"),
        ("ct_8bit", {"style": "pack-quantized", "bits": 8}, "W8A16"),
        ("ct_w8a8", {"activations": "int8_token"}, "W8A8"),
        ("bnb_int8", {"style": "int8"}, "W8A16"),
        ("bnb_nf4", {"style": "nf4"}, "dequantised to float32"),
        ("native", {"style": "fastinfer"}, "W4A16"),
    ],
)
def test_formats(
    made, name: str, scheme: dict[str, object], how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, report, text = inspect(made(name), capsys)
    assert code == 0 and report["why_not"] is None
    quant = report["quantization"]
    assert quant["format"] == CASES[name].config["quant_method"]
    assert quant["plain_linears"] == ["lm_head"]
    assert [s["layers"] for s in quant["schemes"]] == [14]
    assert scheme.items() <= quant["schemes"][0].items()
    assert any(how in line for line in report["how"])
    assert how in text and quant["format"] in text
    assert bool(report["remarks"]) == (name == "bnb_nf4")


def test_mixed_schemes(made, capsys: pytest.CaptureFixture[str]) -> None:
    _, report, text = inspect(made("gptq_mixed"), capsys)
    assert {(s["bits"], s["layers"]) for s in report["quantization"]["schemes"]} == {
        (4, 11),
        (8, 2),
    }
    assert report["quantization"]["plain_linears"] == ["lm_head", "model.layers.1.mlp.up_proj"]
    assert "not quantised: lm_head, model.layers.1.mlp.up_proj" in text


def change(folder: Path, target: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps(config))
    (target / "model.safetensors").symlink_to(folder / "model.safetensors")
    return target


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, ["MixtralForCausalLM", "LlamaForCausalLM"]),
        ({"quantization_config": {"quant_method": "fp8"}}, ["quant_method", "'fp8'"]),
        ({"num_hidden_layers": 3}, ["missing model.layers.2"]),
        ({"intermediate_size": 128}, ["qweight", "got torch.int32"]),
    ],
)
def test_what_will_not_run(
    made,
    tmp_path: Path,
    changes: dict[str, object],
    words: list[str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    code, report, text = inspect(change(made("gptq"), tmp_path, **changes), capsys)
    assert code == 1 and not report["runs"]
    assert all(word in report["why_not"] for word in words), report["why_not"]
    assert report["total_bytes"] > 0
    assert "runs         no: " in text


def test_no_weights_and_no_folder(made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text((made("gptq") / "config.json").read_text())
    code, report, text = inspect(tmp_path, capsys)
    assert code == 1 and "no weight files" in report["why_not"]
    assert report["sizes"]["layers"] == 2 and "files        none" in text
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "DIR must be" in capsys.readouterr().err
    (tmp_path / "config.json").write_text("{")
    assert main(["inspect", str(tmp_path)]) == 1
    (tmp_path / "config.json").write_text('{"architectures": 1}')
    assert main(["inspect", str(tmp_path)]) == 1
    assert "architectures must name one of" in capsys.readouterr().out
