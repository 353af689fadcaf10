"""Help texts: the string below each field, read from the section's source when it is asked for.

Reading sources costs more than a whole resolution, so nothing on the way to a run does it.
"""

from __future__ import annotations

import ast
import inspect
from functools import cache
from itertools import pairwise


@cache
def docstrings(model: type) -> dict[str, str]:
    """The attribute docstrings of a class, each on one line."""
    definition = ast.parse(inspect.getsource(model)).body[0]
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, text in pairwise(definition.body):
        match field, text:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                found[name] = " ".join(words.split())
    return found
