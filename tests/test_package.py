"""The front door: names, import cost, the environment report, messages when the library is
missing.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastinfer
from fastinfer import _lib, env

PACKAGE = Path(fastinfer.__file__).parent


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    merged = {**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=merged)


def test_every_public_name_resolves_and_is_documented() -> None:
    for name in fastinfer.__all__:
        value = getattr(fastinfer, name)
        if callable(value):
            assert inspect.getdoc(value), f"{name} has no docstring"


OPERATORS = sorted(
    name for module, names in fastinfer._OPS.items() if module.startswith("ops.") for name in names
)


@pytest.mark.parametrize("name", [n for n in OPERATORS if n[0].islower()])
def test_operator_docstrings_give_shapes_and_errors(name: str) -> None:
    doc = inspect.getdoc(getattr(fastinfer, name)) or ""
    for part in ("Args:", "Raises:"):
        assert part in doc, f"{name}: no {part} section"


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'flash'"):
        fastinfer.flash  # noqa: B018


def test_import_is_cheap() -> None:
    code = (
        "import torch, time; t = time.perf_counter(); import fastinfer; fastinfer.cpu_isa(); "
        "print(time.perf_counter() - t)"
    )
    best = min(float(python(code).stdout) for _ in range(3))
    assert best <= 0.3, f"import fastinfer added {best:.2f} s to import torch"


def test_environment_report() -> None:
    report = env.collect()
    json.dumps(report)
    assert report["library"]["error"] is None
    assert report["library"]["cpu_isa"] == _lib.cpu_isa()
    text = env.render(report)
    assert torch.__version__ in text and "CPU kernels" in text


def test_the_report_names_every_switch_of_a_run() -> None:
    readme = (PACKAGE.parents[1] / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(FASTINFER_\w+?)(?:=\S*)?` \| (?:run|command line): ", readme, re.M)
    assert set(env.SWITCHES) == set(rows)


def test_environment_report_commands() -> None:
    merged = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    for command in (["-m", "fastinfer.env", "--json"], ["-m", "fastinfer", "env", "--json"]):
        done = subprocess.run(
            [sys.executable, *command], capture_output=True, text=True, env=merged
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["fastinfer"] == fastinfer.__version__


def copy_without_library(tmp_path: Path) -> Path:
    shutil.copytree(
        PACKAGE, tmp_path / "fastinfer", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    return tmp_path


def test_missing_library_is_explained(tmp_path: Path) -> None:
    path = str(copy_without_library(tmp_path))
    done = python(
        "import torch, fastinfer; fastinfer.rms_norm(torch.ones(2, 4), torch.ones(4))",
        PYTHONPATH=path,
    )
    assert done.returncode != 0
    assert (
        "ImportError: fastinfer: _ops.so is missing" in done.stderr and "pip install" in done.stderr
    )
    done = python(
        "import sys; from fastinfer import env; sys.exit(env.main(['--json']))", PYTHONPATH=path
    )
    assert done.returncode == 0, done.stderr
    assert "is missing" in json.loads(done.stdout)["library"]["error"]


def test_broken_library_is_explained(tmp_path: Path) -> None:
    path = copy_without_library(tmp_path)
    (path / "fastinfer/_ops.so").write_bytes(b"not a library")
    done = python(
        "import sys; from fastinfer import env; sys.exit(env.main([]))", PYTHONPATH=str(path)
    )
    assert done.returncode == 0, done.stderr
    assert "could not be loaded" in done.stdout


def test_isa_level_can_only_be_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    best = _lib.cpu_isa()
    monkeypatch.setenv("FASTINFER_CPU_ISA", "generic")
    assert _lib.cpu_isa() == "generic"
    monkeypatch.setenv("FASTINFER_CPU_ISA", "nonsense")
    with pytest.warns(UserWarning, match="must be one of generic, avx2, .* got 'nonsense'"):
        assert _lib.cpu_isa() == best


@pytest.mark.gpu
def test_cuda_probe_runs_both_code_paths() -> None:
    out = torch.zeros(2, dtype=torch.int32, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.ops.fastinfer.cuda_probe(out)
    stream.synchronize()
    major, minor = torch.cuda.get_device_capability()
    assert out[0].item() >= 800
    assert out[1].item() == (900 if (major, minor) == (9, 0) else 0)
    graph, captured = torch.cuda.CUDAGraph(), torch.zeros_like(out)
    with torch.cuda.graph(graph):
        torch.ops.fastinfer.cuda_probe(captured)
    graph.replay()
    torch.cuda.synchronize()
    assert captured.tolist() == out.tolist()
