"""The rules of the house as functions from source text to what is wrong with it."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator

MAX_MODULE_LINES = 400
MAX_FUNCTION_LINES = 60

_BROAD = {"Exception", "BaseException"}


def imported_roots(source: str) -> set[str]:
    """First parts of all imported names, wherever in the module the import stands."""
    return {name.partition(".")[0] for name in imported_modules(source)}


def imported_modules(source: str) -> set[str]:
    """Full names of imported modules; relative ones start with a dot."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def foreign_imports(source: str, *, allowed: set[str]) -> set[str]:
    """Imported roots that are neither allowed nor in the standard library."""
    return imported_roots(source) - allowed - set(sys.stdlib_module_names)


def broad_handlers(source: str) -> list[int]:
    """Lines of handlers that catch everything: bare, `Exception` or `BaseException`, alone or in a tuple."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ExceptHandler) and (node.type is None or _names(node.type) & _BROAD)
    ]


def _names(node: ast.expr) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def oversized(source: str) -> list[str]:
    """Functions over 60 lines, and the module when it has over 400."""
    num_lines = len(source.splitlines())
    found = [f"module: {num_lines} lines"] if num_lines > MAX_MODULE_LINES else []
    for function in _functions(source):
        length = (function.end_lineno or function.lineno) - function.lineno + 1
        if length > MAX_FUNCTION_LINES:
            found.append(f"{function.name}: {length} lines")
    return found


def _functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def unexplained_ignores(source: str) -> list[int]:
    """Lines with `type: ignore` that do not say which error."""
    ignore = re.compile(r"#\s*type:\s*ignore(?!\[)")
    return [number for number, line in enumerate(source.splitlines(), 1) if ignore.search(line)]


def has_docstring(source: str) -> bool:
    return ast.get_docstring(ast.parse(source)) is not None
