"""One rank of a run over many small models: `python grid_rank.py rank size port cases.json`.

cases.json: {"layouts": [[tp, pp], ...], "cases": {name: folder}, "out": folder, "device": "cpu" or
"cuda", "dtype": name}. For every case and layout the first rank of the last stage writes the logits
of `logits_of` to out/name-tp-pp.pt, or the error that came instead. Cases whose names end with
INVARIANT run in batch-invariant mode.
"""

from __future__ import annotations

import json
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _model_harness import random_ids, run_schedule

from fastinfer.distributed.group import ParallelGroups, make_groups
from fastinfer.distributed.stages import divide_layers
from fastinfer.engine.team import Stage
from fastinfer.models import load_config, load_model
from fastinfer.models.shard import WHOLE, divide, weight_costs

INVARIANT = "_invariant"
SEQUENCES = [random_ids(11, 1), random_ids(7, 2)]
SCHEDULE = [[(0, 5), (1, 6)], [(1, 1), (0, 5)], [(0, 1)]]


class Part:
    """A part of a model that runs like the whole; the last stage has the logits, others zeros."""

    def __init__(self, model: Any, groups: ParallelGroups) -> None:
        self.model, self.groups = model, groups
        self.config, self.dtype = model.config, model.dtype
        self.stage = None if groups.stages == 1 else Stage(groups, model)

    def __call__(self, ids: torch.Tensor, meta: Any, caches: Any) -> torch.Tensor:
        inputs = ids if self.stage is None else self.stage.receive(ids)
        hidden = self.model(inputs, meta, caches)
        if self.stage is not None and not self.stage.is_last:
            self.stage.send(hidden)
        return hidden

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        vocabulary = self.model.whole.vocab_size
        if self.stage is not None and not self.stage.is_last:
            return torch.zeros(len(hidden), vocabulary, device=hidden.device)
        logits = self.model.compute_logits(hidden)
        if self.groups.tensor is None:
            return logits
        piece = -(-vocabulary // self.groups.tensor.size)
        logits = torch.nn.functional.pad(logits, (0, piece - logits.shape[1]))
        return self.groups.tensor.all_gather(logits).transpose(0, 1).flatten(1)[:, :vocabulary]


def logits_of(
    folder: str,
    groups: ParallelGroups | None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    batch_invariant: bool = False,
) -> list[torch.Tensor]:
    """Of all tokens of SEQUENCES, on the CPU."""
    shard = WHOLE
    if groups is not None:
        config = load_config(folder)
        shard = divide(config, groups, divide_layers(weight_costs(config), groups.stages))
    model: Any = load_model(folder, dtype=dtype, device=device, shard=shard, progress=False)
    model.set_batch_invariant(batch_invariant)
    if groups is not None:
        model = Part(model, groups)
    with torch.device(device), torch.inference_mode():
        logits = run_schedule(model, SEQUENCES, SCHEDULE, block_size=4)
    return [each.float().cpu() for each in logits]


def main() -> None:
    rank, size, port = map(int, sys.argv[1:4])
    torch.set_num_threads(1)
    work = json.loads(Path(sys.argv[4]).read_text())
    limit = timedelta(seconds=300)
    store = dist.TCPStore("127.0.0.1", port, size, is_master=False, timeout=limit)
    device, dtype = torch.device(work["device"]), getattr(torch, work["dtype"])
    if device.type == "cuda":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=limit,
        device_id=device if device.type == "cuda" else None,
    )
    for tp, pp in work["layouts"]:
        groups = make_groups(tp, pp, device, timeout=300)
        for name, folder in work["cases"].items():
            try:
                invariant = name.endswith(INVARIANT)
                result: Any = logits_of(folder, groups, device, dtype, invariant)
            except ValueError as error:  # the same on every rank
                result = str(error)
            if rank == size - tp:
                torch.save(result, Path(work["out"]) / f"{name}-{tp}-{pp}.pt")
        groups.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
