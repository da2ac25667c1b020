#!/usr/bin/env python3
"""Write the option names of the installed Megatron and SGLang to the tables that the configuration is checked against.

Run it after a change of a pin, with the environment's Python; it takes a minute.
"""

from __future__ import annotations

import argparse
import dataclasses
import typing
from importlib.metadata import version
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "megatron_sglang"


def megatron_flags() -> dict[str, str]:
    """Flag without dashes -> number of values, "bool" where --x and --no-x are one option."""
    from megatron.training.arguments import add_megatron_arguments

    flags: dict[str, str] = {}
    for action in add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))._actions:
        names = [text.removeprefix("--") for text in action.option_strings if text.startswith("--") and "_" not in text]
        if isinstance(action, argparse.BooleanOptionalAction):
            flags.update({name: "bool" for name in names if not name.startswith("no-")})
        elif not isinstance(action, argparse._HelpAction):
            flags.update(dict.fromkeys(names, "1" if action.nargs is None else str(action.nargs)))
    return flags


def sglang_fields() -> dict[str, str]:
    """Field of ServerArgs -> number of values, and "str" where they are texts."""
    from sglang.srt.server_args import ServerArgs

    def count(annotation: str) -> str:
        declared = annotation.removeprefix("A[").split(",")[0]
        number = "0" if "bool" in declared else "*" if "List" in declared or "list" in declared else "1"
        bare = declared.removeprefix("Optional[").removeprefix("List[").strip("]")
        return f"{number} str" if bare == "str" or bare.startswith(("Literal['", "Literal[None")) else number

    return {item.name: count(str(item.type)) for item in dataclasses.fields(typing.cast("typing.Any", ServerArgs))}


def write(path: Path, origin: str, options: dict[str, str]) -> None:
    lines = [f"{name} {count}" for name, count in sorted(options.items())]
    path.write_text(
        "\n".join([f"# {origin}: name, number of values, kind of texts. Made by scripts/list_options.py", *lines, ""])
    )
    print(f"{path.name}: {len(lines)} options of {origin}")


if __name__ == "__main__":
    write(PACKAGE / "megatron_flags.txt", f"megatron-core {version('megatron-core')}", megatron_flags())
    write(PACKAGE / "sglang_fields.txt", f"sglang {version('sglang')}", sglang_fields())
