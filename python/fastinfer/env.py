"""`python -m fastinfer.env` / `fastinfer env`: what was built, what runs, what is missing and what
to do about it. Never fails.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ._errors import first_line
from ._version import __version__

SWITCHES = (
    "FASTINFER_CPU_INT8_ACTIVATIONS",
    "FASTINFER_CPU_ISA",
    "FASTINFER_DEBUG",
    "FASTINFER_HOST",
    "FASTINFER_STRICT",
    "FASTINFER_VALIDATE",
)
MIN_TORCH = (2, 11)


def _guard(report: dict[str, Any], key: str, fill: Callable[[], Any]) -> None:
    """report[key] = fill(), or the reason why there is none: one broken part must not hide the
    others.
    """
    try:
        report[key] = fill()
    except Exception as error:
        report[key] = {"error": f"{type(error).__name__}: {error}"}


def _library() -> dict[str, Any]:
    from . import _lib

    info: dict[str, Any] = {"path": str(_lib.LIBRARY), "error": _lib.LOAD_ERROR}
    if _lib.LIBRARY.is_file():
        info["bytes"] = _lib.LIBRARY.stat().st_size
    if _lib.LOAD_ERROR is None:
        info |= _lib.build_info()
        info["cpu_isa"] = _lib.cpu_isa()
    return info


def _torch() -> dict[str, Any]:
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "cuda_available": torch.cuda.is_available(),
    }


def _host() -> dict[str, Any]:
    found = sorted(p.name for p in Path(__file__).parent.glob("_host*.so"))
    try:
        from . import _host  # type: ignore[attr-defined]

        return {"module": Path(_host.__file__).name, "fallback": False}
    except ImportError as error:
        return {"module": None, "fallback": True, "files": found, "reason": str(error)}


def _devices() -> list[dict[str, Any]]:
    import torch

    from . import _lib

    if not torch.cuda.is_available():
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        entry: dict[str, Any] = {
            "index": index,
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "multiprocessors": properties.multi_processor_count,
        }
        entry["status"], entry["ran"] = _probe(index, _lib)
        devices.append(entry)
    return devices


def _probe(index: int, lib: Any) -> tuple[str, list[int]]:
    """Launches one small kernel per code path: (status, [architecture of the portable code that
    ran, of the sm_90a code]).
    """
    import torch

    if lib.LOAD_ERROR:
        return "library not loaded", []
    if "cuda_archs" not in lib.build_info():
        return "not compiled: this is a CPU-only build", []
    try:
        out = torch.zeros(2, dtype=torch.int32, device=f"cuda:{index}")
        lib.ops.cuda_probe(out)
        ran = out.tolist()
    except RuntimeError as error:
        text = first_line(error)
        return ("too old driver" if "driver" in text else "not compiled for it") + f": {text}", []
    return "supported", ran


def collect() -> dict[str, Any]:
    """Everything the report shows, as plain data."""
    report: dict[str, Any] = {
        "fastinfer": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "glibc": " ".join(platform.libc_ver()),
        "cpu_count": os.cpu_count(),
        "environment": {name: os.environ[name] for name in SWITCHES if name in os.environ},
    }
    _guard(report, "torch", _torch)
    _guard(report, "library", _library)
    _guard(report, "host", _host)
    _guard(report, "devices", _devices)
    report["advice"] = advice(report)
    return report


def advice(report: dict[str, Any]) -> list[str]:
    """What is missing and what to do about it, one sentence each."""
    torch_, library, devices = report["torch"], report["library"], report["devices"]
    lines = []
    if "error" in torch_:
        lines.append(f"torch cannot be imported ({torch_['error']}): pip install 'torch>=2.11'.")
    elif tuple(int(n) for n in re.findall(r"\d+", torch_["version"])[:2]) < MIN_TORCH:
        lines.append(f"torch {torch_['version']} is too old: pip install -U 'torch>=2.11'.")
    if library.get("error"):
        lines.append(f"No operator works: {library['error']}.")
    elif "cuda_archs" not in library and torch_.get("cuda_available"):
        lines.append(
            "There is a GPU but this build is CPU-only: install a CUDA toolkit (12.8 or newer), "
            "set CUDA_HOME, reinstall."
        )
    elif "cuda_archs" in library and torch_.get("cuda") is None:
        lines.append(
            "The CUDA kernels were compiled, but this torch is a CPU build: they run once a CUDA "
            "build of torch is installed."
        )
    elif "cuda_archs" in library and not torch_.get("cuda_available"):
        lines.append(
            "torch sees no GPU: the CPU kernels are used (does nvidia-smi see the driver?)."
        )
    if isinstance(devices, list):
        for d in devices:
            if d["status"] != "supported":
                lines.append(f"cuda:{d['index']} ({d['name']}, {d['capability']}): {d['status']}.")
    if report["host"].get("fallback"):
        lines.append(
            "_host is not built for this Python: its slower pure-Python twin is used "
            "(install the Python headers and pybind11, then reinstall)."
        )
    return lines


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    torch_, library, host = report["torch"], report["library"], report["host"]
    system = f"Python {report['python']}, {report['platform']}, {report['glibc']}"
    rows = [("fastinfer", f"{report['fastinfer']} on {system}")]
    if "error" in torch_:
        rows.append(("torch", torch_["error"]))
    else:
        cuda = f"CUDA {torch_['cuda']}" if torch_["cuda"] else "CPU build"
        rows.append(("torch", f"{torch_['version']} ({cuda}), {torch_['threads']} threads"))
    if library.get("error"):
        rows.append(("_ops", library["error"]))
    else:
        headers = f"torch {library['torch']} headers, target {library['torch_target']}"
        rows.append(("_ops", f"{library['path']} ({library['bytes'] / 1e6:.1f} MB)"))
        rows.append(("built with", f"{library['compiler']}, {headers}"))
        rows.append(("CPU kernels", library["cpu_isa"]))
        rows.append(("CUDA kernels", _cuda_line(library)))
    rows.append(("_host", host.get("module") or "pure-Python twin"))
    devices = report["devices"]
    if isinstance(devices, list):
        rows += [(f"cuda:{d['index']}", _device_line(d)) for d in devices]
    else:
        rows.append(("devices", devices["error"]))
    if not devices:
        rows.append(("devices", "no CUDA device"))
    rows += report["environment"].items()
    text = "\n".join(f"{name:<14} {value}" for name, value in rows)
    return "\n- ".join([text + "\n", *report["advice"]]) if report["advice"] else text


def _cuda_line(library: dict[str, Any]) -> str:
    if "cuda_archs" not in library:
        return "not built"
    driver = int(library["cuda_driver"])
    version = f"{driver // 1000}.{driver % 1000 // 10}" if driver else "none"
    return f"{library['cuda_archs']} (toolkit {library['cuda_toolkit']}, driver for {version})"


def _device_line(d: dict[str, Any]) -> str:
    ran = ", ".join(str(a) for a in d["ran"] if a)
    line = f"{d['name']}, {d['capability']}, {d['memory_gib']} GiB: {d['status']}"
    return f"{line} (ran code for {ran})" if ran else line


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="fastinfer env", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    arguments = parser.parse_args(argv)
    report = collect()
    print(json.dumps(report, indent=2) if arguments.json else render(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
