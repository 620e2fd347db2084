"""`fastinfer tune`: the settings that serve most requests per second inside latency limits."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .bench import add_workload_options, make_warmup, workload
from .options import add_engine_options, engine_options

if TYPE_CHECKING:
    from ..bench.tune import Figures, Settings, Trial

# In this order: what matters most to the two latencies first.
AXES: dict[str, tuple[Any, ...]] = {
    "max_num_batched_tokens": (256, 512, 1024, 2048, 4096, 8192, 16384),
    "max_num_seqs": (4, 8, 16, 32, 64, 128, 256, 512),
    "speculative": (None, "ngram"),  # and the draft model that is offered
    "kv_cache_dtype": ("auto", "fp8", "int8"),
}
UNORDERED = ("speculative", "kv_cache_dtype")


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "tune",
        help="search for settings that meet latency limits",
        description="Search token budget, requests at once, speculation and cache type for the "
        "most requests per second inside both limits, under a workload. Prints what was tried and "
        "the front that was found, and writes a file for --config of the other commands. Settings "
        "given as engine options are fixed, not searched.",
    )
    goal = parser.add_argument_group("goal")
    goal.add_argument("--ttft-ms", type=float, metavar="MS", help="limit, time to first token")
    goal.add_argument("--tpot-ms", type=float, metavar="MS", help="limit, time per output token")
    add_workload_options(parser, goodput=False)
    search = parser.add_argument_group("search")
    search.add_argument(
        "--max-trials", type=int, default=24, metavar="N", help="engines tried (default: 24)"
    )
    search.add_argument(
        "--draft-model", metavar="DIR", help="also try speculation with this draft model"
    )
    search.add_argument("--seed-workload", type=int, default=0, metavar="N", help="default: 0")
    output = parser.add_argument_group("output")
    output.add_argument("--output", metavar="FILE", help="write the best settings there")
    output.add_argument("--plot", metavar="FILE", help="goodput against latency (needs matplotlib)")
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 when nothing met the limits."""
    from ..bench import report, tune
    from ..engine.settings_file import write_settings

    limits = {name: value for name in ("ttft", "tpot") if (value := getattr(args, f"{name}_ms"))}
    for name in ("ttft_ms", "tpot_ms"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"tune: --{name.replace('_', '-')} must be > 0, got {value}")
    if not limits:
        raise ValueError("tune: --ttft-ms or --tpot-ms must be given, or both")
    if args.max_trials < 1:
        raise ValueError(f"tune: --max-trials must be at least 1, got {args.max_trials}")
    if args.draft_model and not Path(args.draft_model, "config.json").is_file():
        raise ValueError(
            f"tune: --draft-model must be a checkpoint folder, got {args.draft_model!r}"
        )
    if args.draft_model and args.speculative:
        raise ValueError("tune: --draft-model is for a search, which --speculative leaves out")
    if args.output and not Path(args.output).resolve().parent.is_dir():
        raise ValueError(f"tune: --output must be in a folder that is there, got {args.output!r}")
    if args.plot:
        report.require_matplotlib()
    bench = TuningBench(args, limits)
    trials: list[Trial] = []
    start, axes = bench.space()
    for trial in tune.climb(
        start, axes, bench.measure, max_trials=args.max_trials, unordered=UNORDERED
    ):
        trials.append(trial)
        print(_progress(len(trials), args.max_trials, trial, axes), file=sys.stderr, flush=True)
    best = tune.front(trials)
    if not best:
        raise ValueError(f"tune: no setting could run; the first: {trials[0].error}")
    print(tune.front_table(best, list(axes)))
    if args.plot:
        tune.plot_front(trials, args.plot, limits)
    chosen = best[0]
    if args.output:
        write_settings(
            args.output,
            {**bench.fixed, **chosen.settings},
            limits_ms=limits,
            workload=args.trace or args.workload,
            measured={"request_rate": report.json_rate(chosen.rate), **chosen.figures},
        )
        print(f"wrote {args.output}: use it with --config, or LLM.from_config(model, file)")
    if not chosen.goodput:
        print("tune: no request met the limits with any setting that was tried", file=sys.stderr)
        return 1
    return 0


def _progress(count: int, total: int, trial: Trial, axes: dict[str, Any]) -> str:
    told = ", ".join(f"{name}={trial.settings[name]}" for name in axes)
    if trial.error is not None:
        return f"[{count}/{total}] {told}: {trial.error}"
    return (
        f"[{count}/{total}] {told}: {trial.goodput:.2f} requests/s within the limits, "
        f"TTFT p90 {trial.ttft:.1f} ms, TPOT p90 {trial.tpot:.2f} ms"
    )


class TuningBench:
    """Runs trials: one model in memory, a new engine around it for every set of settings."""

    def __init__(self, args: argparse.Namespace, limits: dict[str, float]) -> None:
        from ..engine.config import EngineConfig
        from ..engine.device import choose_device

        self.args = args
        self.limits = limits
        self.given = engine_options(args)
        self.defaults = EngineConfig(model=args.model, **self.given)
        self.device = choose_device(self.defaults.device)
        self.model: Any = None
        not_kept = ("model", "tokenizer", "device", "load_format", "progress")
        names = [each.name for each in fields(EngineConfig) if each.name not in not_kept]
        self.fixed = {name: self.given[name] for name in names if name in self.given}

    def space(self) -> tuple[Settings, dict[str, tuple[Any, ...]]]:
        """Where the search starts, and the axes that the user has not fixed."""
        axes = {name: values for name, values in AXES.items() if name not in self.given}
        if self.args.draft_model and "speculative" in axes:
            axes["speculative"] += (self.args.draft_model,)
        start = {name: getattr(self.defaults, name) for name in axes}
        for name, value in start.items():
            if value not in axes[name]:
                axes[name] = tuple(sorted({*axes[name], value}))
        return start, axes

    def measure(self, settings: Settings) -> Trial:
        """A trial; settings that cannot run (memory, head size) are one with an error."""
        from ..bench import tune
        from ..engine import LLM
        from ..engine.config import EngineConfig
        from ..engine.runner import ModelRunner

        try:
            config = EngineConfig(model=self.args.model, **{**self.given, **settings})
            runner = ModelRunner(config, self.device, self.model)
            self.model = runner.model
            with LLM.from_runner(config, runner) as llm:
                return tune.best_rate(settings, lambda rate: self._offer(llm, rate), self.limits)
        except (ValueError, RuntimeError, MemoryError) as error:
            if self.model is None:
                raise  # the model itself cannot be loaded
            return tune.Trial(settings, error=str(error))

    def _offer(self, llm: Any, rate: float) -> Figures:
        from ..bench.drive import Progress, run_load
        from ..bench.report import describe_load
        from ..bench.workloads import arrival_times

        args = self.args
        run_load(llm.core, make_warmup(llm), [0.0])
        vocab_size = llm.core.runner.vocab_size
        work = workload(args, vocab_size, llm.max_model_len, args.seed_workload)
        times = arrival_times(len(work), rate=rate, seed=args.seed_workload)
        progress = Progress(sum(len(each.turns) for each in work), f"rate {rate:.3g}: ")
        load = run_load(llm.core, work, times, progress=progress)
        return describe_load(load, goodput=self.limits)
