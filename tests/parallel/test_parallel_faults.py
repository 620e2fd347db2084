"""What goes wrong on one rank ends the run, soon, with one sentence and no process left behind."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from engine_checkpoint import save_checkpoint
from test_parallel_engine import GENERATE, OPTIONS, SETTINGS, start_ranks

from fastinfer import LLM, SamplingParams
from fastinfer.distributed.control import RankError
from fastinfer.engine import AsyncLLM

LONG = SamplingParams(max_tokens=200, ignore_eos=True, temperature=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    save_checkpoint(path)
    return path


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_rank_is_lost_in_the_middle(folder: Path, stop: signal.Signals) -> None:
    llm = LLM(str(folder), **SETTINGS | {"tensor_parallel_size": 2, "distributed_timeout": 3})
    (process,) = llm.core.runner._run._processes
    stream = llm.stream("hello", LONG)
    for _ in range(3):
        next(stream)
    os.kill(process.pid, stop)
    begin = time.monotonic()
    with pytest.raises(RuntimeError, match="rank 1"):
        for _ in stream:
            pass
    assert time.monotonic() - begin < 40
    with pytest.raises(RankError, match="rank 1"):  # and from now on
        llm.generate("again", LONG)
    llm.close()
    assert process.poll() is not None


def test_a_worker_ends_with_the_process_that_started_it(folder: Path) -> None:
    llm = LLM(str(folder), **SETTINGS | {"pipeline_parallel_size": 2})
    (process,) = llm.core.runner._run._processes
    llm.core.runner._run.hub.hang_up()  # as when this process is killed
    assert process.wait(60) == 1
    llm.close()


def test_sizes_that_do_not_fit(folder: Path) -> None:
    for options, message in [
        ({"tensor_parallel_size": 4}, "must divide the 6 attention heads"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size must be an integer >= 1"),
        ({"pipeline_parallel_size": 4}, "at most the 3 layers"),
        ({"pipeline_stages": 3}, "pipeline_stages must list the layers of each stage, got 3"),
        ({"distributed_timeout": 0}, "distributed_timeout must be > 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            LLM(str(folder), **SETTINGS | options)


def test_another_number_of_processes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for rank in ("0", "1"):
        for name, value in (environment | {"RANK": rank}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(ValueError, match="got 2 with WORLD_SIZE 3"):
            LLM(str(folder), **SETTINGS | {"tensor_parallel_size": 2})


def test_a_shard_is_missing_on_one_rank(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    index = {"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (other / "model.safetensors.index.json").write_text(json.dumps(index))
    ranks = start_ranks(2, [*GENERATE, *OPTIONS, "--tp", "2"], [folder, other])
    outputs = [rank.communicate(timeout=120) for rank in ranks]
    assert all(rank.returncode != 0 for rank in ranks)
    assert "rank 1 of 2: load_model" in outputs[0][1]
    assert "model-00002-of-00002.safetensors" in outputs[0][1]


FAULTY = str(Path(__file__).with_name("faulty_rank.py"))


@pytest.mark.parametrize(
    ("fault", "rank", "says"),
    [
        ("step-cuda", 1, "rank 1 of 2: CUDA out of memory. Tried to allocate 2.00 GiB"),
        pytest.param("step-host", 1, "rank 1 of 2: out of memory", marks=pytest.mark.full),
        pytest.param("step-cuda", 0, "rank 0 of 2: CUDA out of memory", marks=pytest.mark.full),
        pytest.param("load-cuda", 1, "rank 1 of 2: LLM: the weights of", marks=pytest.mark.full),
        ("load-host", 1, "must fit into the memory of cpu"),
    ],
)
def test_a_rank_runs_out_of_memory(folder: Path, fault: str, rank: int, says: str) -> None:
    """While it loads, or in its third step: the same sentence once, and both processes end."""
    begin = time.monotonic()
    arguments = [*GENERATE, *OPTIONS, "--tp", "2", "--distributed-timeout", "30"]
    program = [FAULTY, fault, str(rank)]
    ranks = start_ranks(2, arguments, [folder, folder], program)
    outputs = [each.communicate(timeout=120) for each in ranks]
    assert all(each.returncode != 0 for each in ranks)
    assert says in outputs[0][1] and outputs[0][1].count(says) == 1
    assert "Traceback" not in outputs[0][1]
    assert time.monotonic() - begin < 60


def test_a_collective_that_nobody_answers(folder: Path) -> None:
    """The other rank lives and says so, but does not come."""
    begin = time.monotonic()
    arguments = [*GENERATE, *OPTIONS, "--tp", "2", "--distributed-timeout", "3"]
    ranks = start_ranks(2, arguments, [folder, folder], [FAULTY, "step-wait", "1"])
    outputs = [each.communicate(timeout=120) for each in ranks]
    assert all(each.returncode != 0 for each in ranks)
    late = "LLM: a collective of 2 ranks took longer than distributed_timeout (3 s)"
    assert late in outputs[0][1] and "Traceback" not in outputs[0][1]
    assert time.monotonic() - begin < 60


def test_an_interrupt_while_loading(folder: Path, tmp_path: Path) -> None:
    """Ctrl-C is no fault of a rank: KeyboardInterrupt, and the other process goes too."""
    script = tmp_path / "start.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(Path(FAULTY).parent)!r})\n"
        "import os\n"
        "from fastinfer import LLM\n"
        "if __name__ == '__main__':\n"
        "    import faulty_rank\n"
        "    faulty_rank.plant('load-wait')\n"
        "    try:\n"
        f"        LLM({str(folder)!r}, **{SETTINGS | {'tensor_parallel_size': 2}!r})\n"
        "    except KeyboardInterrupt:\n"
        "        print('interrupted', 'GLOO_SOCKET_IFNAME' in os.environ)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p.endswith("python"))
    environment.pop("GLOO_SOCKET_IFNAME", None)
    process = subprocess.Popen(
        [sys.executable, str(script)], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "waiting\n"
    (worker,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    begin = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60)[0] == "interrupted False\n"
    assert time.monotonic() - begin < 15
    assert not Path(f"/proc/{worker}").exists()


def test_a_server_over_two_processes(folder: Path) -> None:
    """Answers, cancellation; then a rank is lost: everybody hears of it and health says so."""

    async def use() -> None:
        async with AsyncLLM(str(folder), **SETTINGS | {"tensor_parallel_size": 2}) as llm:
            short = SamplingParams(max_tokens=5, ignore_eos=True, temperature=0.0)
            gone = llm.generate("a", LONG)
            await anext(gone)
            await gone.aclose()
            outputs = [output async for output in llm.generate("hello", short)]
            assert sum(len(output.outputs[0].token_ids) for output in outputs) == 5
            assert llm.alive
            waiting = llm.generate("b", LONG)
            await anext(waiting)
            (process,) = llm.llm.core.runner._run._processes
            process.kill()
            with pytest.raises(RuntimeError, match="rank 1"):
                async for _ in waiting:
                    pass
            assert not llm.alive
            with pytest.raises(RuntimeError, match="rank 1"):
                llm.generate("c", short)

    asyncio.run(use())
