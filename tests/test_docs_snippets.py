"""Every snippet of the README and the docs: Python is run, commands are checked against what
they name.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fastinfer
from fastinfer.cli.main import build_parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
PAGES += sorted(ROOT.glob("examples/**/*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [code for lang, code in FENCE.findall(page.read_text()) if lang == language]


def names(pages: list[Path]) -> list[str]:
    return [str(page.relative_to(ROOT)) for page in pages]


PYTHON = [page for page in PAGES if blocks(page, "python")]


def prepare(page: str, folder: Path) -> None:
    """What a page takes for granted."""
    if page == "docs/quantization.md":
        sys.path.insert(0, str(ROOT / "tests/quant"))
        from quant_checkpoints import CASES, write_checkpoint

        (folder / "my-gptq-checkpoint").mkdir()
        write_checkpoint(CASES["gptq"], folder / "my-gptq-checkpoint")


@pytest.mark.parametrize("page", names(PYTHON))
def test_python(page: str, tmp_path: Path) -> None:
    """The blocks of a page are one program, run in a folder that has the bundled checkpoint."""
    os.symlink(ROOT / "examples", tmp_path / "examples")
    prepare(page, tmp_path)
    code = "\n".join(blocks(ROOT / page, "python"))
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(fastinfer.__file__).parents[1]),
            "FASTINFER_STRICT": "1",
            "OMP_NUM_THREADS": "1",
        },
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]


PROGRAMS = ("make", "python", "pip", "fastinfer", "cmake", "build/cpp/generate", "curl")
PROGRAMS += ("torchrun",)


def lines(page: Path) -> list[str]:
    """The commands of a page: of its blocks without a language, and of indented blocks."""
    shown = blocks(page, "")
    shown += re.findall(r"(?:^    .*\S.*\n)+", page.read_text(), re.MULTILINE)
    found = "\n".join(shown).replace("\\\n", " ").splitlines()
    commands = [" ".join(line.split()) for line in found]
    return [line for line in commands if line.startswith(tuple(f"{p} " for p in PROGRAMS))]


@pytest.mark.parametrize("page", names([p for p in PAGES if lines(p)]))
def test_commands(page: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for line in lines(ROOT / page):
        program, *words = shlex.split(line, comments=True)
        if program == "make":
            assert words[0] in targets, line
        elif program == "fastinfer":
            check_fastinfer(words, line)
        elif program == "python" and words[:1] == ["-m"]:
            known = (ROOT / "python" / words[1].replace(".", "/")).with_suffix(".py")
            assert known.is_file() or words[1] in ("pip", "pytest", "build", "fastinfer"), line
            if words[1] == "fastinfer":
                check_fastinfer(words[2:], line)
        elif program == "python" and words[0] != "-c":
            assert any((base / words[0]).is_file() for base in (ROOT, (ROOT / page).parent)), line
        elif program == "pip" and "-r" in words:
            assert (ROOT / words[words.index("-r") + 1]).is_file(), line


INLINE = re.compile(r"`((?:fastinfer|python|make) [^`\n]+)`")


@pytest.mark.parametrize("page", names([p for p in PAGES if INLINE.search(p.read_text())]))
def test_commands_within_text(page: str) -> None:
    """Commands named in a sentence, whole or in part: what they name is there."""
    helps: dict[str, str] = {}
    for line in INLINE.findall((ROOT / page).read_text()):
        program, *words = line.split()
        options = [word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)]
        if program == "make":
            assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line
        elif program == "fastinfer":
            kind = [word for word in words[:2] if re.fullmatch(r"[a-z]+", word)]
            kind = kind[: 2 if words[0] == "bench" else 1]
            for option in options:
                assert option in known_options(kind, helps), f"{line}: {option}"
        elif words[0].endswith(".py"):
            script = next((b / words[0] for b in (ROOT, (ROOT / page).parent)), ROOT)
            text = script.read_text() + (ROOT / "bench/common.py").read_text()
            for option in options:
                assert f'"{option}"' in text, f"{line}: {option}"


def known_options(kind: list[str], helps: dict[str, str]) -> set[str]:
    """The options that the help of a command names."""
    name = " ".join(kind)
    if name not in helps:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
            build_parser().parse_args([*kind, "--help"])
        assert stop.value.code == 0, name
        helps[name] = out.getvalue()
    return set(re.findall(r"--?[a-z][\w-]*", helps[name]))


def check_fastinfer(words: list[str], line: str) -> None:
    """The command line is one that the program accepts."""
    try:
        build_parser().parse_args(words)
    except SystemExit as stop:
        assert stop.code in (0, None), line


def test_links() -> None:
    """Relative links of every page lead to a file."""
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page}: {target}"


def test_pages_are_there() -> None:
    assert {"README.md", "docs/quantization.md", "docs/integrations.md"} <= set(names(PYTHON))
    assert shutil.which("python") or sys.executable
