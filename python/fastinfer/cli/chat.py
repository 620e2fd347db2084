"""`fastinfer chat`: a conversation on the terminal, or on lines read from a pipe."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from .options import add_engine_options, add_sampling_options, make_llm, make_sampling_params

HELP = "/reset forgets the conversation, /exit (or end of input) leaves, /help shows this"


def add_parser(commands: Any) -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "chat",
        help="talk to a model that has a chat template",
        description="Talk to a model, turn by turn, with its chat template. " + HELP + ".",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message")
    add_sampling_options(parser, max_tokens=512)
    add_engine_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    params = make_sampling_params(args)
    start = [{"role": "system", "content": args.system}] if args.system else []
    with make_llm(args) as llm:
        history = list(start)
        llm.chat_prompt([*history, {"role": "user", "content": "?"}])  # no template: say so now
        if sys.stdin.isatty():
            print(HELP)
        while (line := read_line()) is not None:
            line = line.strip()
            if line == "/exit":
                break
            if line == "/reset":
                history = list(start)
            elif line == "/help":
                print(HELP)
            elif line.startswith("/"):
                print(f"unknown command {line}; {HELP}")
            elif line:
                turn = [*history, {"role": "user", "content": line}]
                reply = answer(llm, turn, params)
                if reply is not None:
                    history = [*turn, {"role": "assistant", "content": reply}]
    return 0


def read_line() -> str | None:
    """The next line of input, None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def answer(llm: Any, turn: list[dict[str, str]], params: Any) -> str | None:
    """Print the answer as it comes and return it; None when the turn could not be answered.

    Ctrl-C ends the answer, not the conversation.
    """
    pieces = []
    try:
        with llm.stream(llm.chat_prompt(turn), params) as stream:
            for output in stream:
                pieces.append(output.text)
                print(output.text, end="", flush=True)
    except KeyboardInterrupt:
        pass
    except ValueError as error:  # the conversation has outgrown the model
        print(f"{error}; /reset starts over", file=sys.stderr)
        return None
    print(flush=True)
    return "".join(pieces)
