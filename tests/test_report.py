"""bench/report.py: rows find the peers of their case, the page names its runs, plots are drawn."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "bench"))


import merge  # noqa: E402
import report  # noqa: E402

HEAD = {
    "device": "Some GPU",
    "torch": "2.11",
    "date": "2026-01-02",
    "commit": "abc1234",
    "command": "python bench/bench_x.py",
    "ceilings": {"gbs": 4000.0, "tflops": 700.0},
}


def row(us: float, peer: str = "fastinfer", **keys: Any) -> dict[str, Any]:
    return {"op": "norm", "case": "rms_norm", "m": 8, "dim": 64, "peer": peer, "us": us, **keys}


def gemm(us: float, peer: str, m: int = 1) -> dict[str, Any]:
    return {"op": "gemm", "layer": "x", "n": 64, "k": 32, "m": m, "peer": peer, "us": us}


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    results, peers = tmp_path / "results/h200", tmp_path / "peers"
    results.mkdir(parents=True)
    peers.mkdir()
    norms = [row(2.0, gbs=100.0), row(5.0, "torch"), row(4.0, m=16, gbs=200.0)]
    norms += [row(8.0, m=m, gbs=400.0) for m in (32, 64)]
    (results / "norm.json").write_text(json.dumps({**HEAD, "rows": norms}))
    gemms = [gemm(3.0, "fastinfer_int4"), gemm(6.0, "fastinfer"), gemm(9.0, "cublas_bf16")]
    gemms.append({**gemm(20.0, "fastinfer", m=2), "commit": "def5678"})
    (results / "gemm.json").write_text(json.dumps({**HEAD, "rows": gemms}))
    other = [gemm(6.0, "marlin_int4"), gemm(4.5, "machete_int4"), gemm(1.0, "cublas_bf16")]
    other.append(gemm(10.0, "cublas_bf16", m=2))
    about = {"about": "built from somewhere", "gpu": "Some GPU", "date": "2026-01-01"}
    (peers / "h200.json").write_text(json.dumps({**about, "rows": other}))
    return tmp_path


def sections(folders: Path) -> dict[str, report.Section]:
    rows = json.loads((folders / "peers/h200.json").read_text())["rows"]
    return {each.op: each for each in report.load(folders / "results/h200", rows)}


def test_rows_meet_the_fastest_peer_of_their_own_case(folders: Path):
    found = sections(folders)
    norm = found["norm"].results
    assert norm[0].same_run["peer"] == "torch" and norm[0].ratio(norm[0].same_run) == 2.5
    assert all(each.same_run is None and each.elsewhere is None for each in norm[1:])
    int4, dense, two = found["gemm"].results
    assert int4.elsewhere["peer"] == "machete_int4" and int4.ratio(int4.elsewhere) == 1.5
    assert int4.same_run is None  # cuBLAS in 16 bits is not its rival
    assert dense.ratio(dense.same_run) == 1.5
    assert dense.ratio(dense.elsewhere) == pytest.approx(1 / 6)
    assert two.ratio(two.elsewhere) == 0.5 and two.commit == "def5678"


def test_rates_are_better_when_larger():
    ours = {"op": "e2e", "case": "256 req", "peer": "fastinfer bf16", "out_tok_s": 300.0}
    peer = {**ours, "peer": "vLLM 0.26 bf16", "out_tok_s": 200.0}
    assert report.Result(ours, "x").ratio(peer) == pytest.approx(1.5)


def test_the_summary_says_what_is_behind(folders: Path):
    lines = "\n".join(report.summary(sections(folders)["gemm"]))
    assert "worst 0.17 (x n=64 k=32 m=1)" in lines
    assert "geometric mean 1.50 over 1 rows" in lines


def test_page_and_plots(folders: Path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib, an optional dependency")
    page = folders / "docs/performance.md"
    page.parent.mkdir()
    assert report.write(folders / "results", folders / "peers", page) == 2
    text = page.read_text()
    assert "`norm.json`: Some GPU, 2026-01-02, commit abc1234" in text
    assert "built from somewhere" in text and "| 64 x 32 | 6.0 (0.17) | 20.0 (0.50) |" in text
    pictures = sorted(path.name for path in (folders / "docs/performance").iterdir())
    assert pictures == [
        "h200_gemm_ratio.png",
        "h200_gemm_ratio.svg",
        "h200_norm_ratio.png",
        "h200_norm_ratio.svg",
        "h200_norm_roofline.png",
        "h200_norm_roofline.svg",
    ]
    for name in pictures:
        if name.endswith("png"):
            assert f"performance/{name}" in text


def test_plots_can_be_read_in_grey_and_in_print(folders: Path, monkeypatch: pytest.MonkeyPatch):
    """Kinds differ in marker and line, no text is small, and the legend hides nothing."""
    pytest.importorskip("matplotlib", reason="plots need matplotlib, an optional dependency")
    import report_plots

    from fastinfer.bench import ablate_report
    from fastinfer.bench.report import LINES, require_matplotlib

    pyplot = require_matplotlib()
    assert len({marker for _, marker, _ in LINES}) == len({str(line) for *_, line in LINES}) == 6
    drawn: list[Any] = []

    def check(figure: Any, *_: Any) -> str:
        figure.tight_layout()
        figure.canvas.draw()
        drawn.append(figure)
        for axis in figure.axes:
            legend = axis.get_legend()
            texts = [axis.xaxis.label, *axis.get_xticklabels(), *legend.get_texts()]
            assert all(text.get_fontsize() >= 8 for text in texts)
            inside, outer = axis.get_window_extent(), legend.get_window_extent()
            assert not (outer.x0 < inside.x1 and outer.y0 < inside.y1), "the legend covers data"
            assert outer.x1 <= figure.bbox.x1 and outer.y1 <= figure.bbox.y1, "cut off"
        return "plot"

    monkeypatch.setattr(report_plots, "save", lambda figure, *_: check(figure))
    monkeypatch.setattr(ablate_report, "save_figure", check)
    for section in sections(folders).values():
        report_plots.plot_ratios(section, "Title", folders, pyplot)
        report_plots.plot_roofline(section, "Title", folders, HEAD["ceilings"], pyplot)
    rows = json.loads((ROOT / "bench/results/h200/ablate.json").read_text())["rows"]
    ablate_report.plot(rows, folders / "a.png", "caption")
    assert len(drawn) == 4
    speed = drawn[-1].axes[0]
    looks = {(bar.get_facecolor(), bar.get_hatch()) for bar in speed.patches}
    greys = sorted(sum(c * w for c, w in zip(f, (0.3, 0.59, 0.11), strict=False)) for f, _ in looks)
    assert all(b - a > 0.04 for a, b in itertools.pairwise(greys)) and len(looks) >= 3


def test_the_results_in_the_repository_can_be_read():
    for folder in (ROOT / "bench/results").iterdir():
        peers = ROOT / "bench/peers" / f"{folder.name}.json"
        rows = json.loads(peers.read_text())["rows"] if peers.is_file() else []
        found = report.load(folder, rows)
        assert found and all(section.results for section in found)
        for section in found:
            assert report.table(section) and (section.op != "gemm" or report.gemm_table(section))


def load_test(tok_s: float, **more: Any) -> dict[str, Any]:
    work = {"total_input_tokens": 100, "total_output_tokens": 50, "request_rate": "inf"}
    return {"output_throughput": tok_s, "median_ttft_ms": 12.0, "completed": 4, **work, **more}


def test_load_tests_of_other_engines(tmp_path: Path) -> None:
    """vLLM's files name no backend the way ours do; tests of other work are not compared."""
    import report_extras

    files = {
        "ours": load_test(300.0, backend="fastinfer", command="fastinfer bench serve"),
        "vllm": load_test(200.0),
        "hf": [load_test(50.0, backend="transformers", total_output_tokens=60)],
    }
    for name, result in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result))
    lines = report_extras.load_tests(tmp_path)
    rows = {line.split(" | ")[1]: line for line in lines if line.startswith("| `")}
    assert rows["vllm"].endswith("| 1.50 |")
    assert rows["transformers"].endswith("|  |") and rows["fastinfer"].endswith("|  |")
    assert lines[-1] == "Commands: `fastinfer bench serve`."
    assert report_extras.load_tests(tmp_path / "nothing") == []


def test_rows_of_a_run_are_merged_into_a_file() -> None:
    def of(case: str, speedup: float) -> dict[str, Any]:
        return {"op": "speculative", "case": case, "peer": "fastinfer", "speedup": speedup}

    into = {**HEAD, "rows": [{**of("ngram", 1.0), "op": "e2e"}, {**of("b1", 2.0), "op": "e2e"}]}
    run = {**HEAD, "commit": "def", "command": "run", "rows": [of("draft", 3.0), of("ngram", 4.0)]}
    assert merge.merge(run, into, "e2e", "ngram,draft") == (2, 1)
    told = [(r["op"], r["case"], r["speedup"], r.get("commit")) for r in into["rows"]]
    assert told == [
        ("e2e", "ngram", 4.0, "def"),
        ("e2e", "b1", 2.0, None),
        ("e2e", "draft", 3.0, "def"),
    ]
    assert merge.merge(run, into, "e2e", "nothing") == (0, 0)
    with pytest.raises(ValueError, match="Some GPU"):
        merge.merge({**run, "device": "another"}, into)
