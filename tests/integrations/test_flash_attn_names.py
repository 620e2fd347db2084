"""Code written for flash-attn, unchanged: names, packed forms, bert_padding; and `install`."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastinfer
from fastinfer.integrations import flash_attn as names
from helpers import randn, refuses


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(fastinfer.__file__).parents[1])}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


# Positional order and defaults of flash-attn 2.8.
COMMON = ["dropout_p", "softmax_scale", "causal", "window_size", "softcap", "alibi_slopes"]
COMMON += ["deterministic", "return_attn_probs"]
DEFAULTS = [0.0, None, False, (-1, -1), 0.0, None, False, False]
VARLEN = ["cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"]
POSITIONAL = {
    "flash_attn_func": ["q", "k", "v", *COMMON],
    "flash_attn_kvpacked_func": ["q", "kv", *COMMON],
    "flash_attn_qkvpacked_func": ["qkv", *COMMON],
    "flash_attn_varlen_func": ["q", "k", "v", *VARLEN, *COMMON, "block_table"],
    "flash_attn_varlen_kvpacked_func": ["q", "kv", *VARLEN, *COMMON],
    "flash_attn_varlen_qkvpacked_func": ["qkv", "cu_seqlens", "max_seqlen", *COMMON],
}


@pytest.fixture
def installed():
    yield names.install()
    names.uninstall()


@pytest.mark.parametrize("name", POSITIONAL)
def test_signatures(name: str, installed) -> None:
    parameters = inspect.signature(getattr(installed, name)).parameters.values()
    positional = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
    assert [p.name for p in positional] == POSITIONAL[name]
    given = {p.name: p.default for p in positional}
    assert [given[n] for n in COMMON] == DEFAULTS


def test_code_that_imports_it(installed) -> None:
    import flash_attn
    from flash_attn import flash_attn_func
    from flash_attn.bert_padding import pad_input, unpad_input
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    assert flash_attn_func is fastinfer.flash_attn_func
    assert flash_attn.__version__.startswith("2.8.3+fastinfer")
    x = randn(3, 5, 4, 16, seed=1)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])
    rows, indices, starts, longest, used = unpad_input(x, mask)
    assert starts.tolist() == [0, 3, 8, 9] and longest == 5 and used.tolist() == [3, 5, 1]
    out = flash_attn_varlen_func(rows, rows, rows, starts, starts, longest, longest, causal=True)
    padded = pad_input(out, indices, 3, 5)
    want = flash_attn_func(x, x, x, causal=True)
    assert (padded[~mask.bool()] == 0).all()
    assert torch.equal(padded[mask.bool()], want[mask.bool()])


def test_unused_rows() -> None:
    x = torch.arange(10.0).view(2, 5, 1)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]])
    unused = torch.tensor([[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]])
    rows, indices, starts, longest, used = names.unpad_input(x, mask, unused)
    assert rows.flatten().tolist() == [0, 1, 2, 5, 9] and indices.tolist() == [0, 1, 2, 5, 9]
    assert starts.tolist() == [0, 3, 5] and longest == 3 and used.tolist() == [2, 1]
    back = names.pad_input(rows, indices, 2, 5)
    assert back.shape == x.shape and back.sum() == rows.sum()
    assert torch.equal(names.index_first_axis(back.flatten(0, 1), indices), rows)


OPTIONS = [
    {},
    {"causal": True},
    {"causal": True, "window_size": (3, 0), "softcap": 5.0},
    {"softmax_scale": 0.3, "alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4])},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_forms(options) -> None:
    qkv = randn(2, 9, 3, 4, 32, seed=2)
    q, k, v = qkv.unbind(2)
    want, lse, _ = fastinfer.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    got = names.flash_attn_qkvpacked_func(qkv, return_attn_probs=True, **options)
    assert torch.equal(got[0], want) and torch.equal(got[1], lse) and got[2] is None
    assert torch.equal(names.flash_attn_kvpacked_func(q, qkv[:, :, 1:], **options), want)

    starts = torch.tensor([0, 9, 18], dtype=torch.int32)
    flat = qkv.flatten(0, 1)
    packed = names.flash_attn_varlen_qkvpacked_func(flat, starts, 9, **options)
    assert torch.equal(packed.view_as(want), want)
    packed = names.flash_attn_varlen_kvpacked_func(
        flat[:, 0], flat[:, 1:], starts, starts, 9, 9, **options
    )
    assert torch.equal(packed.view_as(want), want)


def test_errors(installed) -> None:
    x = randn(2, 9, 4, 32, seed=1)
    refuses(lambda: names.flash_attn_qkvpacked_func(x), "qkv", "5 dimensions")
    refuses(lambda: names.flash_attn_kvpacked_func(x, x[:, :, None]), "kv", "size 2")
    refuses(lambda: names.flash_attn_varlen_qkvpacked_func(x, None, 9), "qkv", "size 3")
    refuses(lambda: names.flash_attn_varlen_kvpacked_func(x, None, None, None, 1, 1), "kv")
    refuses(lambda: names.flash_attn_qkvpacked_func(randn(1, 2, 3, 1, 16, seed=0), 0.1), "dropout")
    with pytest.raises(AttributeError, match="flash_attn_bwd is not part of fastinfer"):
        installed.flash_attn_bwd  # noqa: B018
    with pytest.raises(ImportError):
        from flash_attn.layers import rotary  # noqa: F401


def test_another_flash_attn_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    other = type(sys)("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", other)
    refuses(names.install, "flash_attn.install", "must not be imported yet")
    names.uninstall()
    assert sys.modules["flash_attn"] is other
    assert names.install(replace=True) is sys.modules["flash_attn"] is not other
    assert names.install() is sys.modules["flash_attn"]
    names.uninstall()
    assert "flash_attn" not in sys.modules


def test_nothing_happens_by_itself() -> None:
    """Neither the package nor the integrations install anything or import transformers."""
    code = (
        "import sys, fastinfer, fastinfer.integrations, fastinfer.integrations.flash_attn, "
        "fastinfer.integrations.transformers, fastinfer.ops\n"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('transformers', 'flash_attn')]\n"
        "assert not bad, bad"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
