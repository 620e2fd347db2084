"""`fastinfer env`: what was built, what runs, what is missing."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "env",
        help="show what was built and what runs here",
        description="Show what was built, what runs here, what is missing and what to do about it.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ..env import main

    return main(["--json"] if args.json else []) or 0
