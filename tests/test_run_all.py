"""bench/run_all.py: every script once, what fails is said, what is done is not run again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))

import report  # noqa: E402
import run_all  # noqa: E402

WRITES = """
import pathlib, sys
pathlib.Path(sys.argv[-1]).write_text('{"rows": [1, 2]}')
print("fine")
"""
CODES = {
    "norm": "import sys; print('first'); sys.exit('not today')",
    "rotary": WRITES,
    "host": "while True: pass",
    "gemm": "import pathlib, sys; pathlib.Path(sys.argv[-1]).write_text('{\"rows\": []}')",
}


def start(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["run_all.py", *arguments])
    return run_all.main()


def test_every_script_is_a_job(tmp_path: Path) -> None:
    scripts = {path.name for path in (ROOT / "bench").glob("bench_*.py")}
    scripts = {name for name in scripts if not name.startswith("bench_parallel")}
    assert {job.script for job in run_all.JOBS.values()} == scripts
    for device, names in run_all.EVERYTHING.items():
        for name in names:
            for short in (False, True):
                line = run_all.command(name, device, 0.01, tmp_path, short)
                assert line[-2:] == ["--json", str(tmp_path / f"{name}.json")]
                assert line[line.index("--device") + 1] == device


def test_failures_are_said_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = dict(CODES)
    monkeypatch.setattr(
        run_all,
        "command",
        lambda name, device, seconds, out, short: [
            *(sys.executable, "-c", codes[name], str(out / f"{name}.json"))
        ],
    )
    options = ["--only", *codes, "--out", str(tmp_path), "--limit", "4"]
    assert start(monkeypatch, *options) == 1
    said = capsys.readouterr()
    assert "not finished: norm, host, gemm; --resume" in said.err
    lines = {line.split()[0]: line for line in said.out.splitlines() if line.strip()}
    assert "failed (1)" in lines["norm"] and lines["norm"].endswith("norm.txt: not today")
    assert "ok" in lines["rotary"] and "2 rows" in lines["rotary"]
    assert "too slow" in lines["host"] and "no rows" in lines["gemm"]
    assert (tmp_path / "logs/rotary.txt").read_text() == "fine\n"
    ends = {
        n: s["ended"] for n, s in json.loads((tmp_path / "logs/state.json").read_text()).items()
    }
    assert ends == {"norm": "failed (1)", "rotary": "ok", "host": "too slow", "gemm": "no rows"}

    codes |= {"norm": WRITES, "host": WRITES, "gemm": WRITES}
    assert start(monkeypatch, *options, "--resume") == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "done before" in lines["rotary"]
    assert all("2 rows" in lines[name] for name in ("norm", "host", "gemm"))

    codes["rotary"] += "  # another command line"
    assert start(monkeypatch, *options, "--resume") == 0
    assert capsys.readouterr().out.count("done before") == 3


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        start(monkeypatch, "--only", "ablate_tiny")  # of a GPU


def run_and_report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *only: str) -> str:
    """--short, and the page that the report makes of it."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib, an optional dependency")
    pytest.importorskip("tqdm")
    out = tmp_path / "bench" / "cpu"
    chosen = ["--only", *only] if only else []
    assert start(monkeypatch, "--short", "--out", str(out), "--limit", "300", *chosen) == 0
    page = tmp_path / "performance.md"
    assert report.write(tmp_path / "bench", ROOT / "bench/peers", page) > 0
    return page.read_text()


def test_some_scripts_for_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds: an operator and the ablation, and their page."""
    page = run_and_report(monkeypatch, tmp_path, "norm", "ablate")
    for title in ("### Norms and int8 rows", "### One technique after the other"):
        assert title in page
    assert "`python bench/bench_norm.py --device cpu --seconds 0.001 --filter 'm=1 '" in page
    assert str(tmp_path) not in page and str(ROOT) not in page
    assert len(list((tmp_path / "performance").glob("*.png"))) >= 2


@pytest.mark.full
def test_all_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One or two minutes."""
    pytest.importorskip("transformers")
    page = run_and_report(monkeypatch, tmp_path)
    state = json.loads((tmp_path / "bench/cpu/logs/state.json").read_text())
    assert list(state) == run_all.EVERYTHING["cpu"]
    assert page.count("\n### ") >= 11
