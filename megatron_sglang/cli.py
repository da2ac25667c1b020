"""`megatron-sglang COMMAND ...`: what is done beside a training run.

Nothing of a command is imported before it is asked for.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_sglang.errors import MegatronSglangError

Command = tuple[Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int | None]]
"""How its arguments are declared, and how it runs (the exit status; None is 0)."""


def _bench() -> Command:
    from megatron_sglang import host

    host.prepare(os.environ)  # as a run does, before torch is imported

    from megatron_sglang.bench import sync

    return sync.add_arguments, sync.run


def _convert() -> Command:
    from megatron_sglang.weights import convert

    return convert.add_arguments, convert.run


def _doctor() -> Command:
    from megatron_sglang import doctor

    return lambda _parser: None, lambda _args: doctor.run()


def _plan() -> Command:
    from megatron_sglang.plan import command

    return command.add_arguments, command.run


def _report() -> Command:
    from megatron_sglang.report import write_report

    def add_arguments(parser: argparse.ArgumentParser) -> None:
        parser.add_argument("run_folder", type=Path, help="folder of a run (log.run_dir), finished or not")

    def run(args: argparse.Namespace) -> None:
        print(write_report(args.run_folder))

    return add_arguments, run


def _serve() -> Command:
    from megatron_sglang.serve import command

    return command.add_arguments, command.run


COMMANDS: dict[str, tuple[str, Callable[[], Command]]] = {
    "bench": ("measure weight updates, path against path", _bench),
    "convert": ("write a checkpoint's merged weights or adapters as a Hugging Face folder", _convert),
    "doctor": ("say what of this machine and environment will not work, and what to do", _doctor),
    "plan": ("say what a weight update will move, its extra memory and its time; needs no GPU and no weights", _plan),
    "report": ("write report.html for a run folder", _report),
    "serve": ("serve a model, or a live run, through an OpenAI-compatible endpoint", _serve),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status. Errors of this package are one line on stderr and status 1."""
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="megatron-sglang", description="What is done beside a training run.")
    commands = parser.add_subparsers(dest="command", required=True)
    try:
        for name, (text, load) in COMMANDS.items():
            command = commands.add_parser(name, help=text, description=text)
            if words[:1] == [name]:
                add_arguments, run = load()
                add_arguments(command)
                command.set_defaults(run=run)
        args = parser.parse_args(words)
        return args.run(args) or 0
    except MegatronSglangError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
