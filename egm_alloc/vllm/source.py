"""Functions in the source text of vLLM, found without importing it."""

from __future__ import annotations

import ast
import functools
import hashlib
import textwrap
from dataclasses import dataclass


@dataclass(frozen=True)
class Function:
    """A function or class as it stands in a source file.

    Parameters
    ----------
    parameters : tuple of str
        The names of a function's parameters, with ``*`` before those that take any number; of a
        class, those of its ``__init__``.
    names : frozenset of str
        Every name, attribute and keyword that occurs in it; of a class, with its methods' names.
    sha256 : str
        Of its text, decorators included, dedented.
    """

    parameters: tuple[str, ...]
    names: frozenset[str]
    sha256: str


@functools.lru_cache(maxsize=16)  # one module is asked for many functions, one after the other
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def find(text: str, path: str) -> Function | None:
    """Return what a dotted path leads to in the text of a module.

    Parameters
    ----------
    text : str
        The source of the module.
    path : str
        Such as ``"Worker.load_model"``.

    Returns
    -------
    Function or None
        None if it is not there.

    Raises
    ------
    SyntaxError
        If the text is not Python.
    """
    node: ast.AST = _parsed(text)
    for part in path.split("."):
        found = [n for n in _definitions(node) if n.name == part]
        if not found:
            return None
        node = found[-1]
    assert isinstance(node, _Definition)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    lines = text.splitlines(keepends=True)[first - 1 : node.end_lineno]
    source = textwrap.dedent("".join(lines))
    return Function(_parameters(node), _names(node), hashlib.sha256(source.encode()).hexdigest())


_Definition = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def _definitions(node: ast.AST) -> list[ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef]:
    return [n for n in ast.iter_child_nodes(node) if isinstance(n, _Definition)]


def _parameters(node: ast.AST) -> tuple[str, ...]:
    if isinstance(node, ast.ClassDef):
        inits = [n for n in _definitions(node) if n.name == "__init__"]
        return _parameters(inits[0]) if inits else ()
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    arguments = node.args
    names = [a.arg for a in (*arguments.posonlyargs, *arguments.args)]
    names += ["*" + arguments.vararg.arg] if arguments.vararg else []
    names += [a.arg for a in arguments.kwonlyargs]
    names += ["**" + arguments.kwarg.arg] if arguments.kwarg else []
    return tuple(names)


def _names(node: ast.AST) -> frozenset[str]:
    names: set[str] = set()
    for child in ast.walk(node):
        if isinstance(child, ast.Name):
            names.add(child.id)
        elif isinstance(child, ast.Attribute):
            names.add(child.attr)
        elif isinstance(child, ast.keyword) and child.arg:
            names.add(child.arg)
        elif isinstance(child, _Definition):
            names.add(child.name)
    return frozenset(names)
