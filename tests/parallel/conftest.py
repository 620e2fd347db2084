"""Makes the helpers of the model and quantisation tests importable here."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("models", "quant", "engine"):
    path = str(Path(__file__).resolve().parents[1] / folder)
    if path not in sys.path:
        sys.path.insert(0, path)
