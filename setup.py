"""Builds `_ops.so` and `_host` with CMake + ninja and puts them into the package; metadata is in
pyproject.toml.

Environment: FASTINFER_CUDA=auto|on|off, FASTINFER_CUDA_ARCHS ("8.0 9.0a"; else
    TORCH_CUDA_ARCH_LIST), CUDA_HOME, CUDACXX, MAX_JOBS,
FASTINFER_TORCH_DIR (folder of the torch package to build against), FASTINFER_BUILD_DIR (kept
between builds; default build/).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MIN_TORCH = (2, 11)
COMPILERS = ("CC", "CXX", "CXXFLAGS", "LDFLAGS", "CUDACXX", "CUDAFLAGS", "CUDA_HOME", "CUDA_PATH")


def fail(message: str) -> None:
    raise SystemExit(f"fastinfer: {message}")


def find_torch() -> Path:
    """The installed torch, located without importing it (an isolated build environment has none of
    its own).
    """
    candidates = []
    if os.environ.get("FASTINFER_TORCH_DIR"):
        candidates.append(Path(os.environ["FASTINFER_TORCH_DIR"]))
    else:
        spec = importlib.util.find_spec("torch")
        if spec and spec.origin:
            candidates.append(Path(spec.origin).parent)
        candidates += [Path(sysconfig.get_paths()[key]) / "torch" for key in ("platlib", "purelib")]
        # pip's isolated build runs the target interpreter with its own paths in front; its prefix
        # still names the environment.
        candidates.append(
            Path(sys.prefix)
            / "lib"
            / f"python{sys.version_info[0]}.{sys.version_info[1]}"
            / "site-packages/torch"
        )
    for path in candidates:
        if (path / "version.py").is_file():
            return path
    fail(
        "no torch found; install torch >= 2.11 first, or set FASTINFER_TORCH_DIR to the folder of "
        "the torch package"
    )
    raise AssertionError


def torch_version(torch_dir: Path) -> str:
    text = (torch_dir / "version.py").read_text()
    match = re.search(r"__version__\s*=\s*['\"]([^'\"]+)['\"]", text)
    version = match.group(1) if match else "0.0"
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_TORCH:
        fail(f"torch {version} is too old; torch >= {'.'.join(map(str, MIN_TORCH))} is needed")
    return version


def cuda_archs() -> str:
    """FASTINFER_CUDA_ARCHS, else TORCH_CUDA_ARCH_LIST in the same spelling (parts older than 8.0
    are left out), else the default.
    """
    given = re.split(r"[ ;,]+", os.environ.get("FASTINFER_CUDA_ARCHS", "").strip(" ;,"))
    if given != [""]:
        return " ".join(given)
    archs = []
    for arch in re.split(r"[ ;,]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "")):
        match = re.fullmatch(r"(\d+\.\d)(a?)f?(\+PTX)?", arch)  # no code here is family-specific
        if match and float(match[1]) >= 8.0:
            suffix = "a" if match[1] == "9.0" else match[2]
            archs.append(match[1] + suffix + (match[3] or ""))
    return " ".join(archs) or "8.0 9.0a"


def tool(name: str) -> str:
    """cmake or ninja of the running environment before the system's (which may be too old)."""
    beside = Path(sys.executable).parent / name
    if beside.is_file():
        return str(beside)
    found = shutil.which(name)
    if not found:
        fail(f"{name} is missing; pip install -r requirements/build.txt")
    return found


class CMakeBuild(build_ext):
    """Configures, builds and installs with CMake; the build folder is keyed by every option that
    changes objects.
    """

    def run(self) -> None:
        in_place = self.inplace or getattr(self, "editable_mode", False)
        torch_dir = find_torch()
        cuda = (os.environ.get("FASTINFER_CUDA") or "auto").lower()
        if cuda not in ("auto", "on", "off", "1", "0"):
            fail(f"FASTINFER_CUDA must be auto, on or off, got {cuda!r}")
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "FASTINFER_TORCH_DIR": str(torch_dir),
            "FASTINFER_TORCH_VERSION": torch_version(torch_dir),
            "FASTINFER_VERSION": self.distribution.get_version(),
            "FASTINFER_CUDA": {"1": "on", "0": "off"}.get(cuda, cuda),
            "FASTINFER_CUDA_ARCHS": cuda_archs(),
            "Python_EXECUTABLE": sys.executable,
        }
        if shutil.which("ccache"):
            options["CMAKE_CXX_COMPILER_LAUNCHER"] = options["CMAKE_CUDA_COMPILER_LAUNCHER"] = (
                "ccache"
            )
        # CMake looks at these once, when a build folder is new.
        tools = {name: os.environ[name] for name in COMPILERS if os.environ.get(name)}
        key = hashlib.sha256(repr(sorted((options | tools).items())).encode()).hexdigest()[:8]
        root = Path(os.environ.get("FASTINFER_BUILD_DIR") or ROOT / "build")
        build = (
            root / f"cmake-{sys.implementation.cache_tag}-cuda_{options['FASTINFER_CUDA']}-{key}"
        )
        target = (
            ROOT / "python/fastinfer" if in_place else Path(self.build_lib).resolve() / "fastinfer"
        )
        self.announce(
            f"fastinfer: torch {options['FASTINFER_TORCH_VERSION']}, build folder {build}", level=2
        )

        cmake, ninja = tool("cmake"), tool("ninja")
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
        ]
        configure += [f"-D{k}={v}" for k, v in options.items()]
        compile_ = [cmake, "--build", str(build)]
        if os.environ.get("MAX_JOBS"):
            compile_ += ["-j", os.environ["MAX_JOBS"]]
        for command in (
            configure,
            compile_,
            [cmake, "--install", str(build), "--prefix", str(target)],
        ):
            if subprocess.run(command, cwd=ROOT).returncode != 0:
                fail(f"the build failed at: {' '.join(command[:2])} (output above)")

    def get_outputs(self) -> list[str]:
        return [str(p) for p in (Path(self.build_lib) / "fastinfer").glob("*.so")]


setup(ext_modules=[Extension("fastinfer._ops", sources=[])], cmdclass={"build_ext": CMakeBuild})
