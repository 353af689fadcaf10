"""SGLang's server arguments by name: a table for one version, and how it is read from SGLang's source.

Regenerate: `python -m miles.config.sglang_table SGLANG_SOURCE > miles/config/sglang_args.json`, where
SGLANG_SOURCE is the unpacked `sglang` package; its source is read, never imported.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

from miles.config.fields import Kind

TABLE = Path(__file__).with_name("sglang_args.json")

_KINDS = {
    "bool": Kind.BOOL,
    "int": Kind.INT,
    "float": Kind.FLOAT,
    "List[str]": Kind.STRINGS,
    "list[str]": Kind.STRINGS,
    "List[int]": Kind.INTEGERS,
    "list[int]": Kind.INTEGERS,
    "Dict[str, Any]": Kind.TABLE,
    "Dict[str, str]": Kind.TABLE,
}


@cache
def server_args() -> dict[str, Kind]:
    """Every argument of the supported SGLang version, in snake case."""
    return {name: Kind[kind.upper()] for name, kind in json.loads(TABLE.read_text())["args"].items()}


@cache
def version() -> str:
    """The SGLang version that the table was read from."""
    return str(json.loads(TABLE.read_text())["version"])


def read_source(package: Path) -> dict[str, Kind]:
    """Read the arguments out of an unpacked `sglang` package (0.5.2x: `srt/arg_groups/fields`)."""
    found: dict[str, Kind] = {}
    for path in sorted((package / "srt/arg_groups/fields").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found |= _argument(node.target.id, node.annotation)
    registered = (package / "srt/server_args.py").read_text()
    for flag, rest in re.findall(r'add_argument\(\s*"--([a-z0-9-]+)",(.*?)\n        \)', registered, re.S):
        found.setdefault(flag.replace("-", "_"), Kind.BOOL if "action=" in rest else Kind.STR)
    return dict(sorted(found.items()))


def _argument(name: str, annotation: ast.expr) -> dict[str, Kind]:
    """Spellings and kind of one `name: A[type, help or Arg(...)]`; nothing where it is not an argument."""
    match annotation:
        case ast.Subscript(value=ast.Name(id="A"), slice=ast.Tuple(elts=[declared, about, *_])):
            metadata = _keywords(about)
        case _:
            return {}
    if metadata.get("no_cli"):
        return {}
    text = re.sub(r"^Optional\[(.*)\]$", r"\1", ast.unparse(declared)).removesuffix(" | None")
    kind = _KINDS.get(text, Kind.STR)
    spellings = [metadata.get("cli_name") or name, *(metadata.get("aliases") or [])]
    return {spelling.lstrip("-").replace("-", "_"): kind for spelling in spellings}


def _keywords(about: ast.expr) -> dict[str, Any]:
    """The keyword arguments of `Arg(...)`: literals as they are, anything computed as True."""
    found: dict[str, Any] = {}
    for keyword in about.keywords if isinstance(about, ast.Call) else []:
        if keyword.arg:
            literal = isinstance(keyword.value, ast.Constant | ast.List)
            found[keyword.arg] = ast.literal_eval(keyword.value) if literal else True
    return found


if __name__ == "__main__":
    source = Path(sys.argv[1])
    made_from = re.search(r"version = '([^']+)'", (source / "_version.py").read_text())
    assert made_from, "no version in _version.py"
    table = {"version": made_from[1], "args": {k: v.name.lower() for k, v in read_source(source).items()}}
    print(json.dumps(table, indent=0))
