from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from _model_harness import Tiny, build_reference, save

from fastinfer.models import load_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tiny]:
    """Name -> tiny checkpoint, made and loaded once per session. Treat the folders as read-only."""
    made: dict[str, Tiny] = {}

    def get(name: str) -> Tiny:
        if name not in made:
            folder: Path = tmp_path_factory.mktemp(name)
            reference = build_reference(name)
            save(name, reference, folder)
            made[name] = Tiny(folder, reference, load_model(folder, progress=False))
        return made[name]

    return get
