"""The `fastinfer` command: one file per subcommand, imported only when it runs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .._version import __version__
from ..read_ahead import read_ahead
from . import ablate, bench, chat, env, generate, inspect, plan, quantize, serve, tune

COMMANDS = (generate, chat, serve, bench, ablate, tune, plan, quantize, inspect, env)
USAGE_ERROR, FAILURE, INTERRUPTED = 2, 1, 130


def build_parser() -> argparse.ArgumentParser:
    """The command line, without importing anything heavy."""
    parser = argparse.ArgumentParser(
        prog="fastinfer", description="LLM inference on hand-written CUDA and C++ kernels."
    )
    parser.add_argument("--version", action="version", version=f"fastinfer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: Arguments without the program's name; None takes those of the process.

    Returns:
        Exit code: 0, 2 for wrong arguments or input, 1 for anything else that failed. Errors are
        one sentence on stderr; FASTINFER_DEBUG=1 shows the traceback.
    """
    args = build_parser().parse_args(argv)
    if getattr(args, "load_format", "dummy") in (None, "auto") and args.model is not None:
        read_ahead(args.model)  # while torch is being imported
    if os.environ.get("FASTINFER_DEBUG", "") not in ("", "0"):
        return args.run(args)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # whoever read our output has left; keep the interpreter from flushing into the void
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILURE
    except Exception as error:
        sentence = str(error).strip() or type(error).__name__
        print(f"fastinfer {args.command}: {sentence}", file=sys.stderr)
        usage = (
            ValueError,
            FileExistsError,
            FileNotFoundError,
            NotADirectoryError,
            IsADirectoryError,
        )
        return USAGE_ERROR if isinstance(error, usage) else FAILURE


if __name__ == "__main__":
    sys.exit(main())
