"""Runs every case once, for compute-sanitizer: python tests/gpu/sanitize.py [words in the
name; a,b: either]."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1] / "python")]

import torch  # noqa: E402
from all_cases import all_cases  # noqa: E402


def main() -> None:
    words = sys.argv[1:]
    cases = [
        case
        for case in all_cases()
        if all(any(part in case.name for part in word.split(",")) for word in words)
    ]
    for case in cases:
        run, outputs = case.make("cuda", 3)
        run()
        torch.cuda.synchronize()
        assert outputs
    print(f"{len(cases)} cases ran")


if __name__ == "__main__":
    main()
