"""Print SGLang's server arguments as JSON: {"version": ..., "args": {name in snake case: kind of value}}.

Executed by the server's own Python (`make sglang-cpu`). The parser is the one that the server itself uses,
so a name that is not in the table is one that the server would refuse.
"""

import argparse
import contextlib
import json
import os
import sys
from importlib.metadata import version

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

import cpu_server  # noqa: F401  (stands in for CUDA)


def kind(action: argparse.Action) -> str:
    """The kind of value, in the words of `miles.config.fields.Kind`."""
    if action.nargs == 0:
        return "bool"
    if action.nargs not in (None, "?"):
        return "integers" if action.type is int else "strings"
    if action.type in (int, float):
        return action.type.__name__
    # A reader of SGLang's own: what it makes of a table or of a number says what it reads.
    for text, made, name in (("{}", dict, "table"), ("1024", int, "int")):
        with contextlib.suppress(Exception):
            if callable(action.type) and type(action.type(text)) is made:
                return name
    return "str"


def main() -> None:
    """Read the parser."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    args = {
        option.removeprefix("--").replace("-", "_"): kind(action)
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--") and action.help != argparse.SUPPRESS
    }
    table = {"version": version("sglang"), "args": dict(sorted(args.items()))}
    print(json.dumps(table, indent=0))


if __name__ == "__main__":
    main()
