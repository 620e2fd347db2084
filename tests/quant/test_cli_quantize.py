"""`fastinfer quantize`: output, files, errors; and `generate` on what it made."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
from quantizing import MODEL, TINY, calibration_text

from fastinfer.cli.main import main


def test_quantize_then_generate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calib, heldout, out = tmp_path / "calib.txt", tmp_path / "heldout.txt", tmp_path / "out"
    calib.write_text(calibration_text(20_000), encoding="utf-8")
    heldout.write_text((TINY / "heldout.txt").read_text(encoding="utf-8")[:6000])
    arguments = [
        *("quantize", "--model", str(MODEL), "--out", str(out), "--method", "gptq"),
        *("--group-size", "32", "--calib", str(calib), "--samples", "8", "--seqlen", "128"),
        *("--eval", str(heldout), "--eval-window", "256", "--act-order"),
    ]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert re.sub(" +", " ", lines[0]) == "layer shape weight error output error output MSE"
    assert lines[1].startswith("model.layers.0.self_attn.q_proj        192x192  ")
    assert "gptq, 4 bits, groups of 32, written as gptq" in printed
    report = json.loads((out / "quantize_report.json").read_text())
    before, after = report["perplexity"]["before"], report["perplexity"]["after"]
    assert before > 1.2
    assert abs(after / before - 1) < 0.02
    assert f"perplexity: {before:.4f} -> {after:.4f}" in printed
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "gptq"
    assert config["desc_act"] is False  # static groups: nothing to permute
    generate = ["generate", "--model", str(out), "--prompt", "Once upon a time", "--device", "cpu"]
    assert main([*generate, "--max-tokens", "12", "--temperature", "0", "--quiet"]) == 0
    assert len(capsys.readouterr().out.split()) > 5

    assert main(arguments) == 2  # not empty
    assert "use --overwrite or another folder" in capsys.readouterr().err
    assert (
        main([*arguments[:5], "--method", "rtn", "--group-size", "64", "--overwrite", "--quiet"])
        == 0
    )
    assert capsys.readouterr().out == ""
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    assert not (out / "quantize_config.json").exists()


def test_progress_bar_on_a_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    arguments = ["quantize", "--model", str(MODEL), "--group-size", "64"]
    assert main([*arguments, "--out", str(tmp_path / "loud")]) == 0
    error = capsys.readouterr().err
    assert "quantizing (rtn)" in error and "35/35" in error
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert main([*arguments, "--out", str(tmp_path / "quiet"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group-size", "100"], "use --group-size 64 or --format native"),
        (["--method", "awq"], "group_size must divide"),
        (["--method", "gptq"], "calib must be a text file for gptq"),
        (["--group-size", "64", "--eval", "/nowhere.txt"], "eval must be a text file"),
    ],
)
def test_mistakes_are_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["quantize", "--model", str(MODEL), "--out", str(out), *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastinfer quantize: ")
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()
