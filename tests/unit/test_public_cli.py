"""The public command line: options and keys of JSON and CSV, as tests/data/cli_options.txt lists them.

What is listed goes on working. Who adds something records it: python tests/unit/test_public_cli.py; a line
leaves the list only together with an entry in the changelog.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import pytest

from bitgen.cli import COMMANDS, parser
from bitgen.cli.options import add_isa_cap
from bitgen.formats.inspect import facts as model_facts

LISTED = Path(__file__).parents[1] / "data" / "cli_options.txt"


def option(action: argparse.Action) -> str:
    """An option with what it takes and what it is without it, on one line."""
    parts = [", ".join(action.option_strings) or action.dest]
    if action.choices is not None:
        parts.append("{" + ",".join(map(str, action.choices)) + "}")
    elif action.nargs != 0 and action.option_strings:
        parts.append(getattr(action.type, "__name__", "text"))
    if isinstance(action.default, list):
        parts.append("(any number)")
    elif action.nargs != 0 and action.default not in (None, argparse.SUPPRESS):
        parts.append(f"= {action.default}")
    elif action.required:
        parts.append("(required)")
    return " ".join(parts)


def options(of: argparse.ArgumentParser) -> list[str]:
    return [option(action) for action in of._actions if not isinstance(action, argparse._SubParsersAction)]


def keys(module: ModuleType) -> Iterator[str]:
    """The [tables] of a command and the keys of their rows; what is filled in stands as {}."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.args:
            called, first, last = node.func.id, node.args[0], node.args[-1]
            if called == "Table" and isinstance(first, ast.Constant):
                yield f"[{first.value!s}]"
            elif called == "Column":
                yield re.sub(r"{.*?}", "{}", ast.unparse(first).lstrip("f").strip("'\""))
            elif called == "render_tables" and isinstance(last, ast.Dict):
                yield from facts(last)


def facts(literal: ast.AST) -> Iterator[str]:
    """The keys of a dict that only JSON carries."""
    for node in ast.walk(literal):
        if isinstance(node, ast.Dict):
            yield from (f"{key.value!s}:" for key in node.keys if isinstance(key, ast.Constant))


def blocks_of(name: str, of: argparse.ArgumentParser) -> Iterator[list[str]]:
    """A parser's options, then those of its actions."""
    yield [name, *options(of)]
    for nested in (a for a in of._actions if isinstance(a, argparse._SubParsersAction)):
        for action, child in nested.choices.items():
            yield from blocks_of(f"{name} {action}", child)


def listing() -> str:
    blocks = [["bitgen", *options(parser())]]
    for name in COMMANDS:
        module = import_module(f"bitgen.cli.{name}")
        command = argparse.ArgumentParser()
        module.add_arguments(command)
        add_isa_cap(command)
        found = {*keys(module)}
        if name == "inspect":
            found |= {*facts(ast.parse(inspect.getsource(model_facts)))}
        own = list(blocks_of(f"bitgen {name}", command))
        own[0] += textwrap.wrap(", ".join(sorted(found)), 100)
        blocks += own
    return "\n\n".join("\n    ".join(block) for block in blocks) + "\n"


def test_the_command_line_is_the_listed_one() -> None:
    assert listing() == LISTED.read_text(encoding="utf-8")


def test_an_option_that_is_gone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitgen.cli.tune.add_output", lambda _: None)
    gone = set(LISTED.read_text(encoding="utf-8").split("\n\n")) - set(listing().split("\n\n"))
    assert [block.partition("\n")[0] for block in gone] == ["bitgen tune"]


if __name__ == "__main__":
    LISTED.write_text(listing(), encoding="utf-8")
