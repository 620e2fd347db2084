"""The outputs shown in pages of docs/ (the guides above all), written from bench/results.

    <!-- shown: h200/ablate kv_cache flash -->    rows of bench/results/h200/ablate.json (none: all)
    ```text
    what `fastinfer ablate` printed for them
    ```
    <!-- end -->
    <!-- shown: engines/h200/chat -->             bench/engines/h200/chat.json, of `fastinfer bench`
    <!-- shown: h200/speculative ngram_k4 -->     rows whose case begins so, of bench_speculative.py
    <!-- shown: h200/e2e bars server chat -->     rows with a bar whose case begins so (none: all)

`bench/report.py` fills them, so that a new run of the command renews the page; a test holds that
the pages show what the files say.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

from fastinfer.bench import ablate_report, report

BLOCK = re.compile(r"(<!-- shown: (\S+)([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, results: Path) -> str:
    """The page with every block as the results have it; blocks without a file stay."""

    def replace(match: re.Match[str]) -> str:
        path = path_of(match[2], results)
        if not path.is_file():
            return match[0]
        keys = match[3].split()
        if path.parts[-3] == "engines":
            told = load_test(path)
        elif keys[:1] == ["bars"]:
            told = bars(path, keys[1:])
        else:
            told = speculation(path, keys) if path.stem == "speculative" else block(path, keys)
        return f"{match[1]}{told}\n{match[4]}"

    return BLOCK.sub(replace, page)


def path_of(name: str, results: Path) -> Path:
    """The file of a block; load tests lie beside the folder of results."""
    folder = results.parent if name.startswith("engines/") else results
    return folder / f"{name}.json"


def load_test(path: Path) -> str:
    """A load test as the command prints it, or its line per request rate."""
    tests = report.read_results(path)
    told = report.sweep_table(tests) if len(tests) > 1 else report.table(tests[0])
    first = tests[0]
    day = first["date"]
    return "\n".join(
        [
            "```text",
            *(line.rstrip() for line in told.splitlines()),
            "```",
            "",
            f"`bench/engines/{path.parent.name}/{path.name}`: {first['device']}, "
            f"{day[:4]}-{day[4:6]}-{day[6:8]}, commit {first['commit']}: `{first['command']}`.",
        ]
    )


# figure -> how it is told, with what it is a quotient of
_FIGURES = {
    "speedup": ("{speedup:.2f}x ({off_us:,.1f} / {on_us:,.1f} us per token)", "{:g}x", True),
    "overhead": (
        "{overhead:.1%} ({tpot_ms:.2f} ms per token, the engine alone {offline_tpot_ms:.2f})",
        "{:.0%}",
        False,
    ),
    "ttft": ("{ratio:.3f}x ({ttft_ms:.1f} / {ttft_ms_no_reuse:.1f} ms)", "{:g}x", False),
    "ratio": ("{ratio:.3f}x ({on_us:,.0f} / {off_us:,.0f} us)", "{:g}x", False),
}


def bars(path: Path, cases: list[str]) -> str:
    """The rows that something was asked of, as a table."""
    document = json.loads(path.read_text())
    begins = tuple(cases) or ("",)
    rows = [r for r in document["rows"] if "bar" in r and r["case"].startswith(begins)]
    if not rows:
        raise ValueError(f"{path} has no rows with a bar")
    lines = ["| | measured | wanted | better still |", "|---|---|---|---|"]
    for row in rows:
        kind = "ttft" if "ttft_ms_no_reuse" in row else next(k for k in _FIGURES if k in row)
        told, asked, more = _FIGURES[kind]
        at = "at least" if more else "at most"
        wanted = [f"{at} {asked.format(row[name])}" for name in ("bar", "stretch")]
        lines.append("| " + " | ".join([row["case"], told.format(**row), *wanted]) + " |")
    return "\n".join([*lines, "", _source(path, document, rows)])


def _source(path: Path, document: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    commits = ", ".join(sorted({row.get("commit", document["commit"]) for row in rows}))
    return (
        f"`bench/results/{path.parent.name}/{path.name}`: {document['device']}, "
        f"{document['date']}, commit {commits}."
    )


def speculation(path: Path, keys: list[str]) -> str:
    """Times per token without and with drafts."""
    document = json.loads(path.read_text())
    starts = tuple(key.replace("_", " ") for key in keys)
    rows = [row for row in document["rows"] if row["case"].startswith(starts)]
    if not rows or not all("speedup" in row for row in rows):
        raise ValueError(f"{path} has no rows of {', '.join(starts)}")
    titles = ("us/token", "with drafts", "x", "accepted", "tokens per check")
    lines = ["```text", f"{'':<28}" + "".join(f"{title:>18}" for title in titles)]
    for row in rows:
        cells = [f"{row['off_us']:,.1f}", f"{row['on_us']:,.1f}", f"{row['speedup']:.2f}"]
        cells.append(f"{row['acceptance']:.0%}")
        cells.append(f"{row['accepted_length']:.2f}" if row.get("accepted_length") else "")
        lines.append(f"{row['case']:<28}" + "".join(f"{cell:>18}" for cell in cells))
    lines = [line.rstrip() for line in lines]
    return "\n".join([*lines, "```", "", _source(path, document, rows)])


def block(path: Path, keys: list[str]) -> str:
    """The rows of a file as the command prints them, and where they are from."""
    document = json.loads(path.read_text())
    rows = [row for row in document["rows"] if not keys or row["row"] in keys]
    missing = set(keys) - {row["row"] for row in rows}
    if missing:
        raise ValueError(f"{path} has no rows {', '.join(sorted(missing))}")
    work = document["workload"]
    lens = ",".join(map(str, work["prompt_lens"]))
    lines = ["```text", ablate_report.header(), *map(ablate_report.line, rows)]
    if told := ablate_report.notes(rows):
        lines += ["", told]
    lines += ["```", ""]
    lines.append(
        f"`bench/results/{path.parent.name}/{path.name}`: {document['device']}, "
        f"{document['date']}, commit {document['commit']}; {work['requests']} requests of {lens} "
        f"+ up to {work['output_len']} tokens, {work['at_once']} at once."
    )
    return "\n".join(lines)
