"""What a Python source says about itself: every documented function, class and module, read with `ast` and never executed."""

import ast
import warnings
from collections.abc import Iterator
from copy import copy
from typing import NamedTuple

Definition = ast.FunctionDef | ast.AsyncFunctionDef


class Documented(NamedTuple):
    """A documented object: its name, its signature line (functions only), and its docstring without indentation."""

    name: str
    signature: str | None
    docstring: str


def documented(source: str, *, module: str) -> Iterator[Documented]:
    """Every documented object of one source file: the module itself, then classes and functions, outermost first."""
    for node in ast.walk(_parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | Definition):
            docstring = ast.get_docstring(node)
            if docstring and docstring.strip():
                yield Documented(node.name if not isinstance(node, ast.Module) else module, _signature(node), docstring)


def first_paragraph(docstring: str) -> str:
    """The text before the first blank line, on one line."""
    return " ".join(docstring.strip().split("\n\n")[0].split())


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer Pythons warn of escapes that these pinned sources use
        return ast.parse(source)


def _signature(node: ast.AST) -> str | None:
    """`def name(args) -> result:` on one line, with neither decorators nor body."""
    if not isinstance(node, Definition):
        return None
    bare = copy(node)
    bare.body, bare.decorator_list = [ast.Pass()], []
    return ast.unparse(bare).split("\n", 1)[0]
