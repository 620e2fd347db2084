"""The outputs shown in docs/guide.md and docs/guide.zh.md, written from bench/results.

    <!-- shown: h200/ablate kv_cache flash -->    rows of bench/results/h200/ablate.json (none: all)
    ```text
    what `fastinfer ablate` printed for them
    ```
    <!-- end -->

`bench/report.py` fills them, so that a new run of the command renews the guide; a test holds that
the pages show what the files say.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "python"))

from fastinfer.bench import ablate_report

BLOCK = re.compile(r"(<!-- shown: (\S+)([^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(page: str, results: Path) -> str:
    """The page with every block as the results have it; blocks without a file stay."""

    def replace(match: re.Match[str]) -> str:
        path = results / f"{match[2]}.json"
        if not path.is_file():
            return match[0]
        return f"{match[1]}{block(path, match[3].split())}\n{match[4]}"

    return BLOCK.sub(replace, page)


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
