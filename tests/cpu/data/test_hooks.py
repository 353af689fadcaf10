"""User functions are found in files and modules, and their failures name their own file and line."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from miles.data.hooks import HookError, call_hook, call_sync, load_hook

FILE = """
import helper_beside_it

def double(x):
    return 2 * x

async def triple(x):
    return 3 * x

def breaks(x):
    return _inner(x)

def _inner(x):
    return helper_beside_it.fail(x)

THRESHOLD = 3
"""


@pytest.fixture
def hook_file(tmp_path: Path) -> Path:
    (tmp_path / "helper_beside_it.py").write_text("def fail(x):\n    raise KeyError('score')\n")
    path = tmp_path / "my_hooks.py"
    path.write_text(FILE)
    return path


def test_a_hook_comes_from_a_file_or_a_module(hook_file: Path) -> None:
    assert load_hook(f"{hook_file}:double", "--hook")(4) == 8
    assert load_hook("os.path:basename", "--hook")("a/b") == "b"
    assert load_hook("os.path.basename", "--hook")("a/b") == "b"


def test_sync_and_async_hooks_are_called_alike(hook_file: Path) -> None:
    for name, expected in (("double", 8), ("triple", 12)):
        hook = load_hook(f"{hook_file}:{name}", "--hook")
        assert asyncio.run(call_hook(hook, 4)) == expected


def test_a_failing_hook_names_its_own_line(hook_file: Path) -> None:
    hook = load_hook(f"{hook_file}:breaks", "--hook")
    with pytest.raises(HookError, match="the user function breaks failed") as error:
        asyncio.run(call_hook(hook, 1))
    line = FILE.splitlines().index("    return helper_beside_it.fail(x)") + 1
    assert error.value.where == f"{hook_file}:{line}, in _inner"
    assert error.value.why == "KeyError: 'score' at `return helper_beside_it.fail(x)`"
    assert isinstance(error.value.__cause__, KeyError)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{file}:duble", r"--hook .*my_hooks.py:double"),
        ("{file}:THRESHOLD", "no function but int"),
        ("{file}", "cannot read"),
        ("just_a_name", "cannot read"),
        ("nowhere.py:f", "no such file"),
        ("no_such_module_here:f", "put its folder on PYTHONPATH"),
        ("os.path:basenam", "os.path:basename"),
    ],
)
def test_a_hook_that_is_not_there_says_what_is(spec: str, message: str, hook_file: Path) -> None:
    with pytest.raises(HookError, match=message) as error:
        load_hook(spec.format(file=hook_file), "--hook")
    assert "--hook" in str(error.value)


def test_a_module_that_fails_to_import_names_the_line(tmp_path: Path) -> None:
    broken = tmp_path / "broken.py"
    broken.write_text("x = 1\ny = x / 0\n")
    with pytest.raises(HookError, match="importing the user module failed") as error:
        load_hook(f"{broken}:f", "--hook")
    assert error.value.where == f"{broken}:2, in <module>"
    assert "ZeroDivisionError" in error.value.why
    broken.write_text("def f(:\n")
    with pytest.raises(HookError, match="does not parse") as error:
        load_hook(f"{broken}:f", "--hook")
    assert error.value.where == f"{broken}:1"


def test_a_hook_that_cannot_be_called_so_is_named_by_its_definition(hook_file: Path) -> None:
    hook = load_hook(f"{hook_file}:double", "--hook")
    for call in (lambda: asyncio.run(call_hook(hook, 1, 2)), lambda: call_sync(hook, 1, 2)):
        with pytest.raises(HookError) as error:
            call()
        assert error.value.where == f"{hook_file}:{FILE.splitlines().index('def double(x):') + 1}"
        assert "it cannot be called so: double() takes 1 positional argument but 2" in error.value.why
