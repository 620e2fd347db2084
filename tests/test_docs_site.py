"""The pages as a whole: links and anchors, a page per operator, outputs that are those of the
result files, pictures that are there; and the site builds without a warning.
"""

from __future__ import annotations

import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastinfer import ops
from test_docs_snippets import PAGES, blocks

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "docs/site"), str(ROOT / "bench")]

import guide_blocks  # noqa: E402
import ops_pages  # noqa: E402
import readme_results  # noqa: E402

ALL_PAGES = [*PAGES, ROOT / "CHANGELOG.md"]
LINK = re.compile(r"\[[^\]\n]*\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Of the headings of a page, as GitHub and mkdocs make them."""
    found = set()
    for heading in re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        found.add(re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", text)))
    return found


@pytest.mark.parametrize("page", [str(page.relative_to(ROOT)) for page in ALL_PAGES])
def test_links_and_anchors(page: str) -> None:
    text = CODE.sub("", (ROOT / page).read_text(encoding="utf-8"))
    for link in LINK.findall(text):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (ROOT / page).parent / target if target else ROOT / page
        assert file.exists(), f"{page}: {link}"
        if anchor:
            assert file.suffix == ".md" and anchor in anchors(file), f"{page}: {link}"


PARTS = ("Shapes and arguments", "Semantics", "Limits", "Accuracy", "Speed", "Source")


@pytest.mark.parametrize("name", ops_pages.operators())
def test_page_of_an_operator(name: str) -> None:
    """Six parts in order, each with what it is for."""
    text = ops_pages.render(name)
    found = dict(re.findall(r"^## (.+)\n+((?:(?!^## ).*\n)*)", text, re.MULTILINE))
    assert [title for title in found if title in PARTS] == list(PARTS)
    assert all(len(found[title].strip()) > 12 for title in PARTS), found
    # shapes of tensors in square brackets, dtypes, and every argument
    assert re.search(r"\[[A-Zn.].*?\]", found["Shapes and arguments"] + found.get("Result", ""))
    arguments = inspect.signature(getattr(ops, name)).parameters
    missing = [each for each in arguments if not re.search(rf"\b{each}\b", text.split("## ", 1)[1])]
    assert not missing
    assert "Error`" in found["Limits"] and "gradient" in found["Limits"]
    row = r"^\| \S.* \| [\d.,]+ \| [\d.,]* \| [\d.,]* \|$"
    assert re.search(row, found["Speed"], re.MULTILINE), found["Speed"]
    assert re.search(r"commit \w+: .* rows of `bench/results/\w+/\w+\.json`", found["Speed"])
    for _, path in ops_pages.sources(ops_pages.PAGES[name]):
        assert (ROOT / path).exists() and f"`{path}`" in found["Source"], path
    stem = ops_pages.PAGES[name].stem
    assert (ROOT / f"docs/kernels/{stem}.md").is_file()


def test_every_operator_has_a_page() -> None:
    functions = {name for name in ops.__all__ if name[0].islower()}
    assert functions == set(ops_pages.operators())


SHOWN = {
    "docs/guide.md": 12,
    "docs/guide.zh.md": 12,
    "docs/speculative.md": 2,
    "docs/serving.md": 1,
}


@pytest.mark.parametrize("page", SHOWN)
def test_outputs_on_pages_are_those_of_the_files(page: str) -> None:
    """`make report` writes them."""
    text = (ROOT / page).read_text(encoding="utf-8")
    assert guide_blocks.fill(text, ROOT / "bench/results") == text
    shown = guide_blocks.BLOCK.findall(text)
    assert len(shown) >= SHOWN[page]
    for _, file, _, _ in shown:
        assert guide_blocks.path_of(file, ROOT / "bench/results").is_file(), file


def test_results_of_the_readme_are_those_of_the_files() -> None:
    """`make report` writes them."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme_results.fill(text, ROOT / "bench/results") == text
    assert text.count("<!-- results -->") == 1 and "| `flash_attn_func` | 1 x 8192" in text


def test_a_figure_of_the_readme_is_one_row(tmp_path: Path) -> None:
    rows = [{"peer": "fastinfer", "m": 1, "us": 2.0}, {"peer": "fastinfer", "m": 1, "plan": True}]
    rows.append({"peer": "torch", "m": 1, "us": 5.0, "commit": "def"})
    (tmp_path / "h200").mkdir()
    (tmp_path / "h200/x.json").write_text(json.dumps({"commit": "abc", "rows": rows}))
    pick = readme_results.gpu("x", "us", "{:.1f}", m=1)
    assert pick.value(tmp_path) == ("2.0", "abc")
    assert readme_results.gpu("x", "us", "{:.0f}", m=1, peer="torch").value(tmp_path)[1] == "def"
    with pytest.raises(ValueError, match="has 0 rows"):
        readme_results.gpu("x", "us", "{}", m=2).value(tmp_path)


def test_both_guides_show_the_same() -> None:
    first, second = ((ROOT / f"docs/guide{end}.md").read_text() for end in ("", ".zh"))
    commands = [blocks(ROOT / f"docs/guide{end}.md", "") for end in ("", ".zh")]
    assert commands[0] == commands[1]
    shown = [[block[1:3] for block in guide_blocks.BLOCK.findall(text)] for text in (first, second)]
    assert shown[0] == shown[1]
    named = re.compile(r"`((?:csrc|python|engine|models)/[\w./]+)`")
    files = [set(named.findall(text)) for text in (first, second)]
    assert files[0] == files[1]


TECHNIQUE = {
    "docs/guide.md": ("**What.**", "**Why it helps.**", "**Where.**", "**Paper", "**Source"),
    "docs/guide.zh.md": ("**做什么。**", "**为什么有用。**", "**在哪里。**", "**论文", "**来源"),
}
# What the guide that this one grew from names.
NAMED = (
    "TTFT TPOT GPTQ AWQ FlashAttention MHA MQA GQA PagedAttention vLLM TensorRT-LLM bitsandbytes"
)
NAMED += " transformers Baichuan2-7B INT8 INT4 FP16 Llama"


@pytest.mark.parametrize("page", TECHNIQUE)
def test_each_technique_has_its_parts(page: str) -> None:
    """What, why, where, a command, the output that was seen, and the paper."""
    text = (ROOT / page).read_text(encoding="utf-8")
    part = re.split(r"^## ", text, flags=re.MULTILINE)[2]
    sections = re.split(r"^### ", part, flags=re.MULTILINE)[1:]
    assert len(sections) == 12
    for section in sections:
        title = section.splitlines()[0]
        *parts, paper, source = TECHNIQUE[page]
        assert all(each in section for each in parts), title
        assert paper in section or source in section, title
        assert re.search(r"^```\nfastinfer ", section, re.MULTILINE), title
        assert guide_blocks.BLOCK.search(section), title
        assert re.search(r"`(csrc|python|models|engine)/|`Scheduler", section), title
    missing = [name for name in NAMED.split() if name.lower() not in text.lower()]
    assert not missing


@pytest.mark.parametrize("page", ["docs/guide.md", "docs/adding_a_kernel.md"])
def test_files_named_by_a_page_are_there(page: str) -> None:
    named = set(re.findall(r"`([\w./]+/[\w.]+\.\w+)`", (ROOT / page).read_text()))
    roots = (ROOT, ROOT / "python/fastinfer", ROOT / "docs")
    missing = [name for name in named if not any((root / name).exists() for root in roots)]
    assert not missing


def test_every_page_is_in_the_navigation() -> None:
    text = (ROOT / "mkdocs.yml").read_text()
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert not [page for page in pages if f": {page}\n" not in text]


def test_lengths_of_files_in_the_guide() -> None:
    """The column says about how long a file is."""
    text = (ROOT / "docs/guide.md").read_text()
    rows = re.findall(r"^\| `([\w./]+)` \| (\d+) \|", text, re.MULTILINE)
    assert len(rows) > 10
    for name, told in rows:
        file = next(f for f in (ROOT / name, ROOT / "python/fastinfer" / name) if f.is_file())
        lines = len(file.read_text().splitlines())
        assert abs(lines - int(told)) <= 0.2 * lines, (name, lines)


def test_pictures_of_the_report_are_there() -> None:
    page = ROOT / "docs/performance.md"
    shown = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text())
    assert shown
    for picture in shown:
        assert (page.parent / picture).is_file(), picture
        assert (page.parent / picture).with_suffix(".svg").is_file(), picture


@pytest.mark.full
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT / "python"), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "ops/rms_norm/index.html").is_file()
    assert "指南" in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_outputs_are_written_from_a_file(tmp_path: Path) -> None:
    """Only the rows that a block names; a block whose file is not there stays as it is."""
    row = {"row": "flash", "title": "FlashAttention", "at_once": 1, "out_tok_s": 12.0}
    worse = {**row, "row": "gqa", "title": "GQA", "worse": ["TTFT x 2"], "why_worse": "noise"}
    document = {"device": "Some GPU", "date": "2026-01-02", "commit": "abc", "rows": [row, worse]}
    document["workload"] = {"prompt_lens": [8], "output_len": 4, "requests": 2, "at_once": 1}
    (tmp_path / "x").mkdir()
    (tmp_path / "x/ablate.json").write_text(json.dumps(document))
    page = "a\n<!-- shown: x/ablate gqa -->\nold\n<!-- end -->\nb\n"
    page += "<!-- shown: y/z -->\nc\n<!-- end -->"
    filled = guide_blocks.fill(page, tmp_path)
    assert "GQA *" in filled and "FlashAttention" not in filled and "old" not in filled
    assert "* GQA: TTFT x 2. noise." in filled
    assert "`bench/results/x/ablate.json`: Some GPU, 2026-01-02, commit abc" in filled
    assert filled.endswith("b\n<!-- shown: y/z -->\nc\n<!-- end -->")
    assert guide_blocks.fill(filled, tmp_path) == filled
    asked = {
        "case": "pair",
        "off_us": 90.0,
        "on_us": 45.0,
        "speedup": 2.0,
        "bar": 1.5,
        "stretch": 3,
    }
    check = {
        "case": "check",
        "off_us": 100.0,
        "on_us": 110.0,
        "ratio": 1.1,
        "bar": 1.2,
        "stretch": 1,
    }
    document["rows"] = [asked, {**asked, "case": "other", "bar": 1}, check, {"case": "free"}]
    del document["rows"][1]["bar"]
    (tmp_path / "x/asked.json").write_text(json.dumps(document))
    filled = guide_blocks.fill("<!-- shown: x/asked bars -->\nold\n<!-- end -->", tmp_path)
    assert "| pair | 2.00x (90.0 / 45.0 us per token) | at least 1.5x | at least 3x |" in filled
    assert "| check | 1.100x (110 / 100 us) | at most 1.2x | at most 1x |" in filled
    assert "other" not in filled
    (tmp_path.parent / "engines/x").mkdir(parents=True, exist_ok=True)
    test = {"date": "20260102-101112", "device": "Some GPU", "commit": "abc", "command": "bench it"}
    rates = ("request_throughput", "output_throughput", "median_ttft_ms", "p99_ttft_ms")
    test |= dict.fromkeys((*rates, "median_tpot_ms", "p99_tpot_ms"), 12.5)
    test |= {"goodput_limits": {}, "request_goodput": 0.0}
    tests = [{**test, "request_rate": rate} for rate in (2.0, "inf")]
    (tmp_path.parent / "engines/x/load.json").write_text(json.dumps(tests))
    filled = guide_blocks.fill("<!-- shown: engines/x/load -->\n<!-- end -->", tmp_path)
    assert "rate      req/s" in filled and "inf      12.50" in filled
    assert "Some GPU, 2026-01-02, commit abc: `bench it`" in filled
    row = {"case": "ngram k4 b1 list", "off_us": 90.0, "on_us": 45.0, "speedup": 2.0}
    row |= {"acceptance": 0.75, "accepted_length": 3.9}
    head = {"device": "Some GPU", "date": "2026-01-02", "commit": "abc"}
    (tmp_path / "x/speculative.json").write_text(json.dumps({**head, "rows": [row]}))
    filled = guide_blocks.fill("<!-- shown: x/speculative ngram_k4 -->\n<!-- end -->", tmp_path)
    assert "2.00" in filled and "75%" in filled and "3.90\n" in filled
    with pytest.raises(ValueError, match="has no rows of draft"):
        guide_blocks.fill("<!-- shown: x/speculative draft -->\n<!-- end -->", tmp_path)
    with pytest.raises(ValueError, match="has no rows paging"):
        guide_blocks.fill(page.replace("ablate gqa", "ablate paging"), tmp_path)
