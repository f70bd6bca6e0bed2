"""Mutants of a Python source: the same program with one small thing changed, which its tests should notice.

Only what functions compute is changed: operators, comparisons, constants, conditions. Docstrings, annotations, imports
and what errors say are left alone.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["Mutant", "mutants_of"]

_OPERATORS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip
_COMPARISONS = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}


class Mutant(NamedTuple):
    """A source with one change, the line that it is in, and what it is, in words."""

    source: str
    line: int
    change: str


def _changes(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
    """What may stand in a node's place."""
    if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _OPERATORS:
        other = copy.deepcopy(node)
        other.op = _OPERATORS[type(node.op)]()
        yield other, f"{type(node.op).__name__} to {type(other.op).__name__}"
    elif isinstance(node, ast.Compare):
        for k, operator in enumerate(node.ops):
            if type(operator) in _COMPARISONS:
                other = copy.deepcopy(node)
                other.ops[k] = _COMPARISONS[type(operator)]()
                yield other, f"{type(operator).__name__} to {type(other.ops[k]).__name__}"
    elif isinstance(node, ast.BoolOp):
        other = copy.deepcopy(node)
        other.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield other, f"{type(node.op).__name__} to {type(other.op).__name__}"
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand, f"without {type(node.op).__name__}"
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        value = not node.value if isinstance(node.value, bool) else node.value + 1
        yield ast.copy_location(ast.Constant(value), node), f"{node.value!r} to {value!r}"
    elif isinstance(node, ast.IfExp):
        yield ast.copy_location(ast.IfExp(node.test, node.orelse, node.body), node), "the branches of an if exchanged"
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _NAMES:
        other = copy.deepcopy(node)
        other.func = ast.copy_location(ast.Name(_NAMES[node.func.id], ast.Load()), node.func)
        yield other, f"{node.func.id} to {_NAMES[node.func.id]}"


def _places(node: ast.AST, inside: bool) -> Iterator[tuple[ast.AST, str, int | None, ast.AST]]:
    """(parent, field, index, child) of everything in functions that computes."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for index, child in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(child, ast.AST) or isinstance(
                child, ast.Raise | ast.JoinedStr | ast.Import | ast.ImportFrom
            ):
                continue
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):  # a docstring
                continue
            if inside and isinstance(child, ast.expr | ast.AugAssign):
                yield node, field, index, child
            yield from _places(child, inside or isinstance(child, ast.FunctionDef))


def mutants_of(source: str) -> Iterator[Mutant]:
    """All mutants of a source, in the order of its text."""
    tree = ast.parse(source)
    for parent, field, index, child in list(_places(tree, inside=False)):
        for other, change in _changes(child):
            _put(parent, field, index, ast.copy_location(other, child))
            yield Mutant(ast.unparse(ast.fix_missing_locations(tree)) + "\n", child.lineno, change)
            _put(parent, field, index, child)


def _put(parent: ast.AST, field: str, index: int | None, child: ast.AST) -> None:
    if index is None:
        setattr(parent, field, child)
    else:
        getattr(parent, field)[index] = child
