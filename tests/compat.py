"""One wheel under the oldest and the newest torch: `make compat` (not part of the test suite).

Builds a wheel, then, for each torch, makes an environment in a folder outside of this tree,
installs the wheel and runs `compat_smoke.py` there with an empty PATH, so that no compiler can be
found. An environment that cannot be had is printed as "not run" with the reason; a run that fails
makes the command fail.

    python tests/compat.py [--torch 2.11.0 --torch 2.13.0] [--wheel dist/x.whl] [--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OLDEST = "2.11.0"
NEEDS = ["numpy", "safetensors", "tokenizers", "jinja2", "tqdm"]
PIP = ["-m", "pip", "--disable-pip-version-check", "-q"]


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, **options
    )


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = (done.stderr.strip() or done.stdout.strip() or "no output").splitlines()
    errors = [line for line in lines if "ERROR" in line]
    return (errors or lines)[-1].strip()


def newest() -> str | None:
    """The newest release that pip would install here; it may be told not to take later ones."""
    report = ("--dry-run", "--ignore-installed", "--no-deps", "--report", "-")
    done = run(sys.executable, *PIP, "install", *report, "torch")
    if done.returncode:
        return None
    return json.loads(done.stdout)["install"][0]["metadata"]["version"]


def build_wheel(folder: Path) -> Path:
    print("== building the wheel", flush=True)
    done = run(
        sys.executable, *PIP, "wheel", "--no-build-isolation", "--no-deps", "-w", folder, ROOT
    )
    if done.returncode:
        sys.exit(f"compat: the wheel could not be built: {last_line(done)}")
    return next(folder.glob("fastinfer-*.whl"))


def environment(folder: Path, torch: str, wheel: Path) -> Path | str:
    """The interpreter of an environment with this torch and the wheel, or why there is none."""
    import torch as present

    if present.__version__.partition("+")[0] == torch:
        # What is installed here will do; the wheel comes first on the path.
        done = run(sys.executable, *PIP, "install", "--no-deps", "--target", folder / "site", wheel)
        return last_line(done) if done.returncode else Path(sys.executable)
    done = run(sys.executable, "-m", "venv", folder / "venv")
    if done.returncode:
        return f"no environment could be made: {last_line(done)}"
    python = folder / "venv/bin/python"
    done = run(python, *PIP, "install", f"torch=={torch}", *NEEDS)
    if done.returncode:
        return f"torch {torch} could not be installed: {last_line(done)}"
    done = run(python, *PIP, "install", "--no-deps", wheel)
    return f"the wheel could not be installed: {last_line(done)}" if done.returncode else python


def smoke(folder: Path, python: Path) -> subprocess.CompletedProcess[str]:
    """Runs from `folder`, which holds nothing of this tree, with no program on PATH."""
    work = folder / "work"
    (work / "empty").mkdir(parents=True)
    shutil.copy(ROOT / "tests/compat_smoke.py", work)
    shutil.copytree(ROOT / "examples/tiny/model", work / "model")
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("FASTINFER", "PYTHON"))}
    site = {"PYTHONPATH": str(folder / "site")} if (folder / "site").is_dir() else {}
    return run(
        python,
        "compat_smoke.py",
        cwd=work,
        env={**keep, **site, "PATH": str(work / "empty"), "CC": "", "CXX": ""},
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", action="append", help="release to try; may be repeated")
    parser.add_argument("--wheel", type=Path, help="take this wheel instead of building one")
    parser.add_argument("--keep", type=Path, help="work in this folder and leave it")
    arguments = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory(prefix="fastinfer-compat-") as temporary:
        folder = (arguments.keep or Path(temporary)).resolve()
        if folder.is_relative_to(ROOT):
            parser.error(f"--keep must be outside of {ROOT}, got {folder}")
        folder.mkdir(parents=True, exist_ok=True)
        wheel = arguments.wheel.resolve() if arguments.wheel else build_wheel(folder)
        print(f"== {wheel.name}")
        versions = arguments.torch or [OLDEST, newest()]
        seen: dict[str, str] = {}
        for torch in dict.fromkeys(versions):
            if torch is None:
                print("torch (newest): not run: the package index does not answer")
                continue
            home = folder / f"torch-{torch}"
            home.mkdir()
            python = environment(home, torch, wheel)
            if isinstance(python, str):
                print(f"torch {torch}: not run: {python}", flush=True)
                continue
            done = smoke(home, python)
            if done.returncode:
                failed = True
                print(f"torch {torch}: FAILED\n{done.stdout}{done.stderr}", flush=True)
                continue
            *report, result = done.stdout.strip().splitlines()
            seen[torch] = result
            print(f"torch {torch}: ok: {'; '.join(report)}", flush=True)
        if len(set(seen.values())) > 1:
            failed = True
            print(f"FAILED: results differ between releases of torch: {seen}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
