"""What the built library promises: loads under every torch >= 2.11, hides its insides, shows no
build path, few instances.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import fastinfer.ops  # noqa: F401  (registers the fake kernels)
from fastinfer import _lib

ROOT = Path(__file__).resolve().parents[1]
OPS = _lib.LIBRARY
# Exported C names of libtorch_cpu 2.11.0, the oldest supported torch.
OLDEST = ROOT / "tests/data/torch_2.11_c_symbols.txt"

pytestmark = pytest.mark.skipif(not OPS.is_file(), reason="needs the built library")


def run(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} (binutils) is not installed")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_every_torch_symbol_exists_in_the_oldest_torch() -> None:
    undefined = {
        line.split()[-1].split("@")[0]
        for line in run("nm", "-D", "--undefined-only", str(OPS)).splitlines()
    }
    wanted = {name for name in undefined if re.match(r"(aoti_)?torch_", name)}
    assert wanted, "the library uses no torch symbol at all?"
    missing = wanted - set(OLDEST.read_text().split())
    assert not missing, f"not in torch 2.11: {sorted(missing)}"
    mangled = [name for name in undefined if re.match(r"_ZN?K?(2at|3c10|5torch)", name)]
    assert not mangled, f"C++ symbols of torch are not ABI stable: {mangled}"


def test_needs_only_the_stable_libraries() -> None:
    dynamic = run("readelf", "-d", str(OPS))
    needed = set(re.findall(r"NEEDED.*\[(.*?)\]", dynamic))
    allowed = {
        "libtorch_cpu.so",
        "libstdc++.so.6",
        "libgcc_s.so.1",
        "libc.so.6",
        "libm.so.6",
        "ld-linux-x86-64.so.2",
    }
    assert needed <= allowed, needed - allowed
    assert "RPATH" not in dynamic and "RUNPATH" not in dynamic


def test_exports_nothing_of_cuda_or_of_its_own() -> None:
    defined = run("nm", "-D", "--defined-only", str(OPS))
    leaked = [
        line
        for line in defined.splitlines()
        if re.search(r"\b(cuda[A-Z]|__cuda|_ZN9fastinfer)", line)
    ]
    assert not leaked, leaked[:5]


def test_shows_no_build_path() -> None:
    data = OPS.read_bytes()
    for path in (str(ROOT), str(Path(torch.__file__).parent)):
        assert path.encode() not in data, f"{path} is embedded in {OPS.name}"


def test_glibc_floor() -> None:
    versions = {
        tuple(map(int, v.split(".")))
        for v in re.findall(r"GLIBC_([\d.]+)", run("objdump", "-T", str(OPS)))
    }
    assert max(versions) <= (2, 34), max(versions)


def test_isa_objects_hold_no_shared_inline_functions() -> None:
    """An inline function emitted by an AVX-512 object could be the copy that the linker keeps for
    every level.
    """
    objects = sorted((ROOT / "build").glob("cmake-*/CMakeFiles/cpu_*.dir/csrc/cpu/*.o"))
    if not objects:
        pytest.skip("no build folder here (the library was built elsewhere)")
    for obj in objects:
        weak = [line for line in run("nm", str(obj)).splitlines() if re.search(r" [WVu] ", line)]
        assert not weak, f"{obj.parts[-4]}/{obj.name}: {weak[:3]}"


def test_no_torch_header_in_kernel_sources() -> None:
    for path in [
        *ROOT.glob("csrc/cuda/**/*.cu*"),
        *ROOT.glob("csrc/cpu/**/*"),
        *ROOT.glob("csrc/host/*"),
    ]:
        if path.is_file():
            assert not re.search(r'#include *[<"](torch|ATen|c10)/', path.read_text()), path


def test_every_operator_has_a_fake_kernel_and_both_device_kernels() -> None:
    schemas = (ROOT / "csrc/schemas.cpp").read_text()
    names = re.findall(r'm\.def\(\s*"(\w+)\(', schemas)
    assert len(names) >= 30
    queries = {"cpu_isa", "build_info", "set_programmatic_launch"}  # no tensor argument
    for name in names:
        assert hasattr(torch.ops.fastinfer, name), name
        if name in queries:
            continue
        for key in ("CPU", "CUDA"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"fastinfer::{name}", key), (
                name,
                key,
            )
        entry = torch._library.simple_registry.singleton.find(f"fastinfer::{name}")
        assert entry.fake_impl.kernel is not None, f"{name} has no fake kernel"


def test_library_size() -> None:
    assert OPS.stat().st_size <= 30e6
