"""Every `bench/results/<gpu>/*.json` as `docs/performance.md`, with plots beside the peers.

    python bench/report.py                     (or `make report`)
    python bench/report.py --engines DIR       also load tests of other engines (vLLM's JSON)

Rows of ours are matched with rows of the same case in the same file (peers that ran in the same
process) and in `bench/peers/<gpu>.json` (other engines and libraries, measured on another card of
that model; the file says how). Ratios are peer's time / ours, or the inverse for rates: above 1 we
are faster. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

import guide_blocks
import readme_results

Row = dict[str, Any]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
# What a case is; everything else in a row was measured or says how.
KEYS = (
    *("op", "kind", "case", "batch", "seqlen", "q", "context", "total_context", "prefix"),
    *("q_len", "lengths", "hq", "hkv", "d", "page", "kv", "scales", "causal", "window", "layer"),
    *("n", "k", "bits", "m", "inner", "dim", "tokens", "vocab", "dtype", "shape"),
    *("overlapped", "batch_invariant", "plan", "workspace"),
    *("kib", "hidden", "gpus", "link", "model", "weights", "tp", "pp", "requests"),
)
TITLES = {
    "prefill": "Prefill attention",
    "decode": "Paged decode attention",
    "gemm": "Linear layers",
    "kvcopy": "KV cache: copies, writes, swaps",
    "norm": "Norms and int8 rows",
    "rotary": "Rotary embedding",
    "activation": "Activations",
    "sampling": "Sampling",
    "preparation": "Once per step or per checkpoint",
    "e2e": "Whole models",
    "host": "Host time of a call",
    "speculative": "Speculative decoding",
    "parallel": "More than one GPU",
}
NOT_ROWS = ("ablate",)  # files with a section of their own
# which of a file's rows compete with which peers
INT4 = ("marlin_int4", "machete_int4", "tinygemm_int4", "gemlite_int4")
INT8 = ("marlin_int8", "machete_int8", "gemlite_int8", "torch_int8pack_mm")
KINDS: dict[str, tuple[str, ...]] = {
    "fastinfer_int4": INT4,
    "fastinfer_int4_fp32_scales": INT4,
    "fastinfer_int8": INT8,
    "fastinfer_int4_batch_invariant": INT4,
    "fastinfer_int8_batch_invariant": INT8,
    "fastinfer_w8a8": ("torch_int_mm_w8a8", "bnb_int8_w8a8"),
    "fastinfer_portable": ("sdpa_flash",),
    "shared prefix": ("fastinfer",),  # the same rows read once per request
    "fastinfer bf16": ("vLLM 0.26 bf16",),
    "fastinfer int4 g128": ("vLLM 0.26 int4 g128 (Machete)",),
}
RATES = ("out_tok_s",)  # larger is better; everything else is a time
TIMES = ("us", "tpot_ms", "ttft_ms", "total_s")


@dataclass
class Result:
    """One row of ours with the fastest peers of its case."""

    row: Row
    commit: str
    same_run: Row | None = None
    elsewhere: Row | None = None

    @property
    def name(self) -> str:
        return describe(self.row)

    def ratio(self, peer: Row | None) -> float | None:
        if peer is None:
            return None
        for key in (*TIMES, *RATES):
            if self.row.get(key) and peer.get(key):
                ratio = peer[key] / self.row[key]
                return 1 / ratio if key in RATES else ratio
        return None


@dataclass
class Section:
    """The results of one op on one GPU."""

    op: str
    gpu: str
    results: list[Result] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)  # where each file comes from


def case_of(row: Row) -> tuple[tuple[str, Any], ...]:
    return tuple((key, row[key]) for key in KEYS if row.get(key) is not None and key != "shape")


def describe(row: Row) -> str:
    told = [
        f"{key}={row[key]}" if key not in ("case", "kind", "layer") else str(row[key])
        for key in KEYS
        if row.get(key) is not None and key not in ("op", "total_context", "shape")
    ]
    peer = row["peer"].removeprefix("fastinfer").strip(" _")
    return " ".join(told + ([peer] if peer else []))


def is_ours(row: Row) -> bool:
    return row["peer"].startswith("fastinfer") or row["peer"] == "shared prefix"


def rivals(row: Row) -> Callable[[Row], bool]:
    """Which rows of a case a row of ours is to be compared with."""
    names = KINDS.get(row["peer"])
    if row["op"] == "gemm" and row["peer"] == "fastinfer":
        names = ("cublas_bf16",)
    if names is None:
        return lambda peer: not is_ours(peer)
    return lambda peer: (
        peer["peer"] in names or (not is_ours(peer) and peer.get("ratio_to") == row["peer"])
    )


def best(rows: Iterable[Row]) -> Row | None:
    def cost(row: Row) -> float:
        for key in TIMES:
            if row.get(key):
                return float(row[key])
        return 1 / row["out_tok_s"] if row.get("out_tok_s") else math.inf

    return min(rows, key=cost, default=None)


def load(folder: Path, peers: list[Row]) -> list[Section]:
    """The sections of one GPU, in the order of `TITLES`."""
    by_case: dict[Any, list[Row]] = {}
    for peer in peers:
        by_case.setdefault(case_of(peer), []).append(peer)
    sections: dict[str, Section] = {}
    for path in sorted(folder.glob("*.json")):
        if path.stem.startswith(NOT_ROWS):
            continue
        document = json.loads(path.read_text())
        rows: list[Row] = document["rows"]
        for row in rows:
            row.setdefault("peer", "fastinfer")
        here: dict[Any, list[Row]] = {}
        for row in rows:
            here.setdefault(case_of(row), []).append(row)
        for row in rows:
            if not is_ours(row):
                continue
            op = row["op"] if row["op"] in TITLES else title_of(path.stem)
            section = sections.setdefault(op, Section(op, folder.name))
            wanted, case = rivals(row), case_of(row)
            section.results.append(
                Result(
                    row,
                    row.get("commit", document["commit"]),
                    best(filter(wanted, here[case])),
                    best(filter(wanted, by_case.get(case, []))),
                )
            )
            head = f"`{path.name}`: {document['device']}, {document['date']}, "
            head += (
                f"commit {document['commit']}, torch {document['torch']}: `{document['command']}`"
            )
            if head not in section.heads:
                section.heads.append(head)
    return [sections[op] for op in TITLES if op in sections]


def title_of(stem: str) -> str:
    """The section of a file whose rows name none; one of its own where no title fits."""
    found = next((op for op in TITLES if op in stem), stem)
    TITLES.setdefault(found, found.replace("_", " ").capitalize())
    return found


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(section: Section) -> list[str]:
    lines = []
    for label, pick in (
        ("peers in the same process", lambda r: r.same_run),
        ("the best peer on another card of this model", lambda r: r.elsewhere),
    ):
        for kind in sorted({result.row["peer"] for result in section.results}):
            pairs = [
                (ratio, result)
                for result in section.results
                if result.row["peer"] == kind and (ratio := result.ratio(pick(result)))
            ]
            if pairs:
                ratios = [ratio for ratio, _ in pairs]
                worst, where = min(pairs, key=lambda pair: pair[0])
                lines.append(
                    f"- `{kind}` against {label}: geometric mean {geometric_mean(ratios):.2f} over "
                    f"{len(ratios)} rows, worst {worst:.2f} ({where.name})"
                )
    return lines


def figure(row: Row) -> str:
    parts = []
    for key, unit, digits in (
        ("us", "us", 2),
        ("ttft_ms", "ms TTFT", 2),
        ("tpot_ms", "ms TPOT", 2),
        ("out_tok_s", "tok/s", 0),
        ("host_us", "us host", 0),
        ("speedup", "x without drafts", 2),
        ("ratio", "x its base", 2),
        ("overhead", "more than the engine alone", 3),
    ):
        if row.get(key):
            parts.append(f"{row[key]:,.{digits}f} {unit}")
    return ", ".join(parts)


def rate(row: Row) -> str:
    if row.get("of_matmul", 0) > row.get("of_bandwidth", 0):
        return in_units(row["tflops"] * 1e3, "FLOP/s")
    return in_units(row["gbs"], "B/s") if row.get("gbs") else ""


def in_units(giga: float, unit: str) -> str:
    """Three digits, with the prefix that fits: a CPU is a thousand times slower than a GPU."""
    prefix, value = ("T", giga / 1e3) if giga >= 1e3 else ("G", giga)
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} {prefix}{unit}"


def table(section: Section) -> list[str]:
    lines = ["| case | ours | rate | same process | ratio | elsewhere | ratio |"]
    lines.append("|---|---|---|---|---|---|---|")
    for result in section.results:
        cells = [result.name, figure(result.row), rate(result.row)]
        for peer in (result.same_run, result.elsewhere):
            ratio = result.ratio(peer)
            cells += [
                f"{peer['peer']} {figure(peer)}" if peer and ratio else "",
                f"{ratio:.2f}" if ratio else "",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def gemm_table(section: Section) -> list[str]:
    """Layers by tokens: microseconds, and in brackets the ratio to the best peer elsewhere."""
    lines = []
    for kind in sorted({result.row["peer"] for result in section.results}):
        own = [r for r in section.results if r.row["peer"] == kind and "n" in r.row]
        if not own:
            continue
        tokens = sorted({result.row["m"] for result in own})
        lines += ["", f"`{kind}`, us (ratio to the best of its peers elsewhere):", ""]
        lines.append("| N x K \\ M | " + " | ".join(map(str, tokens)) + " |")
        lines.append("|---" * (len(tokens) + 1) + "|")
        layers = {(r.row["n"], r.row["k"]): None for r in own}
        for n, k in layers:
            cells = [f"{n} x {k}"]
            for m in tokens:
                found = [r for r in own if (r.row["n"], r.row["k"], r.row["m"]) == (n, k, m)]
                if not found:
                    cells.append("")
                    continue
                ratio = found[0].ratio(found[0].elsewhere)
                told = f"{found[0].row['us']:,.1f}"
                cells.append(told + (f" ({ratio:.2f})" if ratio else ""))
            lines.append("| " + " | ".join(cells) + " |")
    chains = [result for result in section.results if "n" not in result.row]
    return ["", *table(Section(section.op, section.gpu, chains)), *lines] if chains else lines


def write(results: Path, peers: Path, page: Path, engines: Path | None = None) -> int:
    """Write the page and its plots; returns the number of sections."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "fastinfer"  # the same plot, the same bytes
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: a third of the size
    import matplotlib.pyplot as pyplot
    import report_extras as extras
    import report_plots as plots

    pictures = page.with_suffix("")
    lines = ["# Performance", "", (__doc__ or "").split("\n\n")[2].replace("\n", " "), ""]
    lines.append("Written by `python bench/report.py`; each section names the runs it comes from.")
    count = 0
    for folder in sorted((f for f in results.iterdir() if f.is_dir()), reverse=True):
        rows: list[Row] = []
        other = peers / f"{folder.name}.json"
        lines += ["", f"## {folder.name.upper()}", ""]
        if other.is_file():
            document = json.loads(other.read_text())
            rows = document["rows"]
            lines.append(f"Peers: {document['about']}. {document['gpu']}, {document['date']}.")
        for section in load(folder, rows):
            count += 1
            ceilings = ceilings_of(folder, section.op)
            lines += ["", f"### {TITLES[section.op]}", ""]
            lines += [*summary(section), ""]
            for plotted in (
                plots.plot_ratios(section, TITLES[section.op], pictures, pyplot),
                plots.plot_roofline(section, TITLES[section.op], pictures, ceilings, pyplot),
            ):
                if plotted:
                    lines.append(f"![{plotted}]({pictures.name}/{plotted}.png)")
            body = gemm_table(section) if section.op == "gemm" else table(section)
            lines += ["", "<details><summary>Rows</summary>", "", *body, "", "</details>", ""]
            lines += ["Runs: " + "; ".join(section.heads) + "."]
        for path in sorted(folder.glob("ablate*.json")):
            count += 1
            lines += extras.ablation(path, pictures, pyplot)
        if engines is not None:
            lines += extras.load_tests(engines / folder.name)
    page.write_text("\n".join(lines) + "\n")
    return count


def ceilings_of(folder: Path, op: str) -> Row:
    for path in sorted(folder.glob("*.json")):
        document = json.loads(path.read_text())
        if any(row["op"] == op for row in document["rows"]):
            return document.get("ceilings", {})
    return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--peers", type=Path, default=HERE / "peers")
    parser.add_argument(
        "--engines", type=Path, default=HERE / "engines", help="DIR/<gpu>/*.json: load tests"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "performance.md")
    args = parser.parse_args()
    page, results = args.output.resolve(), args.results.resolve()
    count = write(args.results, args.peers, args.output, args.engines)
    print(f"wrote {args.output} ({count} sections)")
    if results != HERE / "results" or page.parent != ROOT / "docs":
        return
    readme = ROOT / "README.md"
    readme.write_text(readme_results.fill(readme.read_text(), results))
    print(f"wrote {readme}: its results")
    for shown in sorted(page.parent.glob("*.md")):
        text = shown.read_text()
        if guide_blocks.BLOCK.search(text):
            shown.write_text(guide_blocks.fill(text, results))
            print(f"wrote {shown}: its outputs")


if __name__ == "__main__":
    main()
