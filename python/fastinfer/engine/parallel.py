"""A `ModelRunner` over several processes.

Rank 0 schedules. It sends each plan to all others, then every rank runs the same step over its part
of the model; with `ModelRunner` the same code as one process. Tokens are drawn by all ranks of the
last stage together; those of a step before are on every one of them, so nothing is sent back but,
from a pipeline, the drawn tokens.
"""

from __future__ import annotations

import json
import os
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from ..distributed import launch
from ..distributed.control import BLOCKS, CLOSE, PLAN, REPORT, Hub, RankError
from ..models import load_config
from ..models.shard import check_divisible
from .config import EngineConfig
from .plan_wire import PlanReader, PlanWriter
from .request import Request
from .runner import ModelRunner
from .sampler import DrawnTokens, SampleResult
from .step_plan import SchedulePlan

_SPIN = 200  # looks at an event before the first pause


class LeadRunner(ModelRunner):
    """Rank 0's runner: takes the others along.

    Args:
        config: Of the engine; `tensor_parallel_size` x `pipeline_parallel_size` processes.
        device: "cpu" or "cuda".

    Raises:
        RankError: A rank could not start.
        ValueError: As `ModelRunner`.
    """

    def __init__(self, config: EngineConfig, device: torch.device) -> None:
        tensor, pipeline = config.tensor_parallel_size, config.pipeline_parallel_size
        check_divisible(load_config(config.model), tensor, pipeline, config.pipeline_stages)
        self._run = launch.Lead(
            tensor=tensor,
            pipeline=pipeline,
            device=device.type,
            timeout=config.distributed_timeout,
            settings=asdict(replace(config, progress=False)),
        )
        self._writer = PlanWriter(config.max_num_seqs)
        self._results: int | None = None  # the rank that sends drawn tokens, if it is another
        groups = self._run.groups
        if groups.stages > 1:
            self._results = groups.size - tensor
        self.stages = groups.stages
        try:
            super().__init__(config, groups.device, team=self._run)
            self._least("ready", 0)
            self._run.begin()
        except BaseException as error:
            interrupted = not isinstance(error, Exception)  # Ctrl-C: nobody has failed
            failure = None if interrupted else self._run.hub.failure
            if failure is None and not interrupted and not isinstance(error, ValueError | OSError):
                failure = str(self._run.hub.explain(error))
            self._run.stop()
            if failure is not None:
                raise RankError(failure) from error
            raise

    def step(self, plan: SchedulePlan) -> tuple[list[Request], Any]:
        hub = self._run.hub
        hub.check()
        hub.order(PLAN, self._writer.write(plan))
        try:
            sampling, drawn = super().step(plan)
        except Exception as error:
            raise hub.explain(error) from error
        if self._results is None:
            return sampling, _Watched(drawn, self._run)
        return sampling, _Sent(drawn, hub, self._results)

    def move_blocks(self, plan: SchedulePlan) -> None:
        if plan.swap_out or plan.swap_in:
            self._run.hub.check()
            self._run.hub.order(BLOCKS, self._writer.write(plan))
        super().move_blocks(plan)

    @property
    def failure(self) -> str | None:
        return self._run.hub.failure

    def pipeline_stats(self, *, reset: bool = False) -> list[dict[str, float]]:
        own = super().pipeline_stats(reset=reset)
        if not own:
            return []
        hub = self._run.hub
        hub.order(REPORT, json.dumps(reset).encode())
        others = hub.gather("a report")
        width = self._run.groups.size // self.stages
        return [*own, *(other["stage"] for other in others[width - 1 :: width])]

    def release(self) -> None:
        super().release()
        self._run.close()


class _Watched:
    """Tokens of a step whose other ranks may die or hang before it is done."""

    def __init__(self, drawn: DrawnTokens, run: launch.Lead) -> None:
        self._drawn, self._run = drawn, run
        self.first_rows = drawn.first_rows

    def wait(self) -> None:
        """As `DrawnTokens.wait`, but raises RankError instead of waiting for ever."""
        ready = self._drawn.ready
        if ready is not None:
            wait_for(ready.query, self._run.hub)

    def result(self) -> SampleResult:
        """As `DrawnTokens.result`."""
        self.wait()
        try:
            self._run.groups.check()
        except RuntimeError as error:
            raise self._run.hub.explain(error) from error
        return self._drawn.result()


class _Sent:
    """Tokens that another rank draws."""

    def __init__(self, here: DrawnTokens, hub: Hub, rank: int) -> None:
        self._hub, self._rank = hub, rank
        self.first_rows = here.first_rows
        self._result: SampleResult | None = None

    def wait(self) -> None:
        """Wait for the step."""
        self.result()

    def result(self) -> SampleResult:
        """What the rank says. Must be asked for in the order of the steps."""
        if self._result is None:
            self._result = unpack_result(self._hub.result(self._rank))
            self._result.first_rows = self.first_rows
        return self._result


def wait_for(done: Callable[[], bool], hub: Hub) -> None:
    """Look until it is done.

    Raises:
        RankError: A rank has failed, or it takes too long.
    """
    for _ in range(_SPIN):
        if done():
            return
    end = time.monotonic() + hub.timeout
    while not done():
        hub.check()
        if time.monotonic() > end:
            raise hub.late("a step")
        time.sleep(0)


def pack_result(result: SampleResult) -> bytes:
    """Token ids, log-probabilities, top ids, top log-probabilities: a length each, then 64-bit
    numbers; -1 for what was not asked for.
    """
    out: list[Any] = []
    columns = (result.token_ids, result.logprobs, result.top_ids, result.top_logprobs)
    for values, kind in zip(columns, (np.int64, np.float64) * 2, strict=True):
        array = None if values is None else np.array(values, dtype=kind).reshape(-1)
        out.append(np.array([-1 if array is None else len(array)], dtype=np.int64))
        if array is not None:
            out.append(array.view(np.int64))
    return np.concatenate(out).tobytes()


def unpack_result(data: bytes) -> SampleResult:
    """What `pack_result` packed."""
    numbers, at = np.frombuffer(data, dtype=np.int64), 0
    columns: list[Any] = []
    for kind in (np.int64, np.float64) * 2:
        count, at = int(numbers[at]), at + 1
        columns.append(None if count < 0 else numbers[at : at + count].view(kind))
        at += max(count, 0)
    ids, logprobs, top_ids, top_logprobs = columns
    result = SampleResult(ids.tolist(), None if logprobs is None else logprobs.tolist())
    if top_ids is not None:
        rows = (len(ids), -1)
        result.top_ids = top_ids.reshape(rows).tolist()
        result.top_logprobs = top_logprobs.reshape(rows).tolist()
    return result


def serve(member: launch.Member) -> int:
    """Run the steps that rank 0 orders, until it says that it is over.

    Returns:
        The exit code of this process.
    """
    spoke, groups = member.spoke, member.groups
    try:
        config = EngineConfig(**member.settings)
        runner = ModelRunner(config, groups.device, team=member)
        member.least("ready", 0)
        member.begin()
        reader = PlanReader(config.max_num_seqs)
        sends = groups.stages > 1 and groups.rank == groups.size - config.tensor_parallel_size
        sender = _Sender(member) if sends else None
        while True:
            kind, payload = spoke.receive()
            if kind == CLOSE:
                break
            if kind == REPORT:
                stats = runner.pipeline_stats(reset=json.loads(payload))
                spoke.say({"stage": stats[0]})
                continue
            plan = reader.read(payload)
            if kind == BLOCKS:
                runner.move_blocks(plan)
                continue
            member.groups.check()
            _, drawn = runner.step(plan)
            if sender is not None:
                sender.put(drawn)
        runner.release()
        member.close()
        return 0
    except SystemExit:
        raise
    except BaseException as error:
        spoke.fail(error)
        time.sleep(1.0)  # rank 0 hangs up, which ends this process
        return 1


def serve_under_torchrun(config: EngineConfig, device: torch.device) -> None:
    """Under torchrun, on any rank but 0: serve, then end the process.

    Raises:
        SystemExit: It was served.
        ValueError: There are other than the wanted number of processes.
    """
    if not launch.under_torchrun() or int(os.environ["RANK"]) == 0:
        return
    size = config.tensor_parallel_size * config.pipeline_parallel_size
    place = launch.torchrun_place(size, device.type, config.distributed_timeout)
    member = launch.Member(place)
    member.settings["model"] = config.model  # which may lie elsewhere on another host
    raise SystemExit(serve(member))


class _Sender:
    """Sends drawn tokens to rank 0, without holding up the next step."""

    def __init__(self, member: launch.Member) -> None:
        self._spoke = member.spoke
        self._queue: queue.SimpleQueue[DrawnTokens] = queue.SimpleQueue()
        self.put = self._queue.put
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        try:
            while True:
                self._spoke.answer(pack_result(self._queue.get().result()))
        except BaseException as error:
            self._spoke.fail(error)
