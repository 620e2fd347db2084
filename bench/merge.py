"""Put the rows of a run into a results file: `python bench/merge.py RUN.json results/gpu/e2e.json`.

A row takes the place of the one with the same case, peer and shape, or comes last. It carries the
commit and the command of its run, and with `--as OP` another `op`: what the file is about.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def key(row: Row) -> tuple[Any, ...]:
    return row["op"], row.get("case"), row["peer"], row.get("shape")


def merge(run: Row, into: Row, op: str | None = None, only: str = "") -> tuple[int, int]:
    """Merge two documents: how many rows, and how many of them were there before.

    Args:
        run, into: The documents; `into` is changed.
        op: Replaces that of the rows.
        only: Rows whose case contains one of these (a,b,c).
    """
    if run["device"] != into["device"]:
        raise ValueError(f"merge: expected a run on {into['device']}, got {run['device']}")
    places = {key(row): at for at, row in enumerate(into["rows"])}
    count = replaced = 0
    for row in run["rows"]:
        if not any(text in row.get("case", "") for text in only.split(",")):
            continue
        count += 1
        new = {**row, "op": op or row["op"], "commit": run["commit"], "command": run["command"]}
        at = places.get(key(new))
        if at is None:
            into["rows"].append(new)
        else:
            into["rows"][at] = new
            replaced += 1
    return count, replaced


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, nargs="+")
    parser.add_argument("into", type=Path)
    parser.add_argument("--as", dest="op", metavar="OP")
    parser.add_argument("--only", default="", metavar="A,B", help="cases that contain one of these")
    args = parser.parse_args()
    document = json.loads(args.into.read_text())
    for path in args.run:
        run = json.loads(path.read_text())
        count, replaced = merge(run, document, args.op, args.only)
        print(f"{path}: {count} rows, {replaced} of them there before")
    args.into.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
