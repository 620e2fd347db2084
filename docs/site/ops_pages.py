"""The page of every operator, made of its docstring, its files and the newest results.

Sections: signature, what it does, shapes, limits, accuracy, speed, source. Nothing is written by
hand here but which file and which rows of `bench/results` belong to which operator; a test holds
that every public operator has a page and that every file named on one exists.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
GPUS = ("h200", "h100", "cpu")
Row = dict[str, Any]
MOST_ROWS = 14

CLOSE = (
    "Reference: float64 from the same inputs. The largest error is at most twice that of the same "
    "maths in torch at the same dtype, plus rounding; [numerics](../numerics.md) has the rule."
)
EXACT = "Copies: every bit is as it was; 8-bit forms round once, to nearest even."
LINEAR = (
    "One-hot inputs give the dequantised weights bit for bit; relative Frobenius error at most "
    "5e-4 in fp16, 2.2e-3 in bf16 ([numerics](../numerics.md))."
)
CODES = "Codes and scales are the same bits on CPU and CUDA (IEEE division, nearest even)."
DRAWS = (
    "A draw depends on seed, step and token id only; CPU and CUDA draw the same token from the "
    "same logits ([numerics](../numerics.md))."
)


@dataclass(frozen=True)
class Page:
    """Where an operator lives, and which results are its."""

    stem: str  # of csrc/ops, csrc/cuda, python/fastinfer/ops, tests/ops
    accuracy: str
    results: str  # bench/results/<gpu>/<results>.json
    rows: Callable[[Row], bool] = lambda row: True
    module: str = ""  # of python/fastinfer/ops, where it is not the stem


def case(*names: str) -> Callable[[Row], bool]:
    return lambda row: str(row.get("case", "")).split(" T=")[0].startswith(names)


def peer(*names: str) -> Callable[[Row], bool]:
    return lambda row: row["peer"] in names and "n" in row


PAGES: dict[str, Page] = {
    "flash_attn_func": Page(
        "flash_attention", CLOSE, "prefill", lambda row: row.get("kind") == "dense"
    ),
    "flash_attn_varlen_func": Page(
        "flash_attention", CLOSE, "prefill", lambda row: row.get("kind") in ("varlen", "chunk")
    ),
    "flash_attn_with_kvcache": Page(
        "paged_attention", CLOSE, "decode", lambda row: row["op"] == "decode"
    ),
    "plan_decode": Page("paged_attention", "Integers: exact.", "preparation", case("plan_decode")),
    "merge_attn_states": Page("paged_attention", CLOSE, "preparation", case("merge_attn_states")),
    "repeat_kv": Page("kv_cache", EXACT, "kvcopy", case("repeat_kv")),
    "reshape_and_cache": Page("kv_cache", EXACT, "kvcopy", case("reshape_and_cache")),
    "gather_cache": Page("kv_cache", EXACT, "kvcopy", case("gather_cache")),
    "copy_blocks": Page("kv_cache", EXACT, "kvcopy", case("copy_blocks")),
    "swap_blocks": Page("kv_cache", EXACT, "kvcopy", case("swap ")),
    "linear": Page("linear", LINEAR, "gemm", peer("fastinfer")),
    "int4_linear": Page("linear", LINEAR, "gemm", peer("fastinfer_int4")),
    "int8_linear": Page("linear", LINEAR, "gemm", peer("fastinfer_int8")),
    "w8a8_linear": Page("linear", LINEAR, "gemm", peer("fastinfer_w8a8")),
    "quantize_per_token": Page("linear", CODES, "norm", case("quantize_per_token"), "quantization"),
    "quantize_weight": Page(
        "linear", CODES, "preparation", case("quantize_weight"), "quantization"
    ),
    "pack_weight": Page(
        "linear",
        "A permutation of codes: exact.",
        "preparation",
        case("pack_weight"),
        "quantization",
    ),
    "dequantize_weight": Page(
        "linear", LINEAR, "preparation", case("dequantize_weight"), "quantization"
    ),
    "rms_norm": Page(
        "norm", CLOSE, "norm", lambda row: str(row.get("case", "")).split(" per")[0] == "rms_norm"
    ),
    "fused_add_rms_norm": Page("norm", CLOSE, "norm", case("fused_add_rms_norm")),
    "rms_norm_quant": Page("norm", CODES, "norm", case("rms_norm_quant")),
    "apply_rotary": Page(
        "rotary",
        CLOSE,
        "rotary",
        lambda row: str(row.get("case", "")) in ("apply_rotary", "apply_rotary interleaved"),
    ),
    "apply_rotary_and_cache": Page("rotary", CLOSE, "rotary", case("apply_rotary_and_cache")),
    "silu_and_mul": Page("activation", CLOSE, "activation", lambda row: row.get("case") == "silu"),
    "gelu_and_mul": Page("activation", CLOSE, "activation", case("gelu")),
    "silu_and_mul_quant": Page("activation", CODES, "activation", case("silu_quant")),
    "sample": Page("sampling", DRAWS, "sampling"),
    "verify_draft": Page("sampling", DRAWS, "preparation", case("verify_draft")),
}
# Keys of a row that say what was measured, in the order in which they are told.
KEYS = (
    *(
        "kind",
        "case",
        "batch",
        "seqlen",
        "q",
        "context",
        "q_len",
        "lengths",
        "layer",
        "n",
        "k",
        "m",
    ),
    *(
        "bits",
        "dim",
        "inner",
        "tokens",
        "vocab",
        "hq",
        "hkv",
        "d",
        "page",
        "kv",
        "causal",
        "window",
    ),
)


def operators() -> list[str]:
    """The public operators in the order of the pages."""
    return list(PAGES)


def render(name: str) -> str:
    """The page of an operator, Markdown."""
    from fastinfer import ops

    page, function = PAGES[name], getattr(ops, name)
    text = inspect.getdoc(function) or ""
    head, sections = split_docstring(text)
    lines = [f"# `{name}`", "", "```python", f"fastinfer.{name}{signature(function)}", "```", ""]
    lines += [head, ""]
    for title, wanted in (("Shapes and arguments", "Args"), ("Result", "Returns")):
        if wanted in sections:
            lines += [f"## {title}", "", *items(sections[wanted]), ""]
    lines += ["## Semantics", "", "```text", module_text(function), "```", ""]
    lines += ["## Limits", ""]
    lines += items(sections.get("Raises", "")) or ["None of its own."]
    lines += [
        "",
        "Inference only: an input that requires a gradient is refused. Deterministic, capturable "
        "in CUDA graphs, and traceable by `torch.compile(fullgraph=True)`.",
        "",
        f"## Accuracy\n\n{page.accuracy}",
        "",
        "## Speed",
        "",
        *speed(page),
        "",
        "## Source",
        "",
        *(f"- {what}: `{path}`" for what, path in sources(page)),
        f"- design and every experiment: [docs/kernels/{page.stem}.md](../kernels/{page.stem}.md)",
    ]
    if "Reference" in sections:
        lines += ["", "## Paper", "", " ".join(sections["Reference"].split())]
    return "\n".join(lines) + "\n"


def signature(function: Any) -> str:
    text = str(inspect.signature(function)).replace("torch.", "").replace("'", "")
    if len(text) < 80:
        return text
    parts = inspect.signature(function).parameters.values()
    shown = [str(part).replace("'", "").replace("torch.", "") for part in parts]
    first = next((i for i, p in enumerate(parts) if p.kind is p.KEYWORD_ONLY), None)
    if first is not None:
        shown.insert(first, "*")
    returns = text.rsplit(" -> ", 1)[-1]
    return "(\n    " + ",\n    ".join(shown) + f",\n) -> {returns}"


def split_docstring(text: str) -> tuple[str, dict[str, str]]:
    """The text in front, and the sections of a docstring in Google's style."""
    names = "Args|Returns|Raises|Reference|References|Example"
    pieces = re.split(rf"^({names}):[ ]?", text, flags=re.MULTILINE)
    sections = {}
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        sections["Reference" if title.startswith("Ref") else title] = body.rstrip()
    return pieces[0].strip(), sections


def items(section: str) -> list[str]:
    """`name: text` entries as a list; other text as it is."""
    text = inspect.cleandoc("\n" + section)
    found: list[str] = []
    for line in text.splitlines():
        entry = re.match(r"^([\w, *.()]+):\s+(.*)$", line)
        if entry and not line.startswith(" "):
            found.append(f"- `{entry[1]}`: {entry[2]}")
        elif found and line.startswith(" "):
            found[-1] += " " + line.strip()
        elif line.strip():
            found.append(line.strip())
    return found


def module_text(function: Any) -> str:
    """What the head of its module says of the whole family."""
    return inspect.getdoc(inspect.getmodule(function)) or ""


def sources(page: Page) -> list[tuple[str, str]]:
    """(what, path from the root)."""
    stem = page.stem
    cpu = {"flash_attention": "attention.h", "paged_attention": "paged_attention.cpp"}
    found = [
        ("Python", f"python/fastinfer/ops/{page.module or stem}.py"),
        ("schema", "csrc/schemas.cpp"),
        ("checks and dispatch", f"csrc/ops/{stem}.cpp"),
        ("CPU kernels", f"csrc/cpu/{cpu.get(stem, stem + '.h')}"),
        ("CUDA kernels", f"csrc/cuda/{stem}"),
        ("tests", f"tests/ops/test_{page.module or stem}.py"),
    ]
    bench = "preparation" if page.results == "preparation" else stem
    found.append(("benchmark", f"bench/bench_{bench}.py"))
    return found


def speed(page: Page) -> list[str]:
    """Rows of the newest results, with the run they are from."""
    for gpu in GPUS:
        path = ROOT / f"bench/results/{gpu}/{page.results}.json"
        if not path.is_file():
            continue
        document = json.loads(path.read_text())
        rows = [row for row in document["rows"] if page.rows(row) and row.get("us")]
        ours = [row for row in rows if row["peer"].startswith("fastinfer")]
        if not ours:
            continue
        shown = ours[:: max(1, -(-len(ours) // MOST_ROWS))]
        lines = ["| case | us | GB/s | TFLOP/s |", "|---|---|---|---|"]
        for row in shown:
            told = " ".join(f"{k}={row[k]}" if k != "case" else row[k] for k in KEYS if k in row)
            rates = [f"{row[key]:,.0f}" if row.get(key) else "" for key in ("gbs", "tflops")]
            lines.append(f"| {told} | {row['us']:,.2f} | {rates[0]} | {rates[1]} |")
        where = f"{len(shown)} of {len(ours)} rows of `bench/results/{gpu}/{page.results}.json`"
        lines += [
            "",
            f"{document['device']}, {document['date']}, commit {document['commit']}: {where}, "
            f"`{document['command']}`. [Performance](../performance.md) has them all.",
        ]
        return lines
    return ["No results yet."]


def index() -> str:
    """The page that lists the operators."""
    from fastinfer import ops

    lines = ["# Operators", "", "| | |", "|---|---|"]
    for name in operators():
        first = (inspect.getdoc(getattr(ops, name)) or "").splitlines()[0]
        lines.append(f"| [`{name}`]({name}.md) | {first} |")
    return "\n".join(lines) + "\n"
