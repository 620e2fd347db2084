"""Every stem's cases, found by file name."""

from __future__ import annotations

import importlib
from pathlib import Path

from gpu_case import Case


def all_cases() -> list[Case]:
    stems = sorted(path.stem for path in Path(__file__).parent.glob("cases_*.py"))
    return [case for stem in stems for case in importlib.import_module(stem).CASES]
