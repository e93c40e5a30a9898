"""Typed parameters of notebooks: read from the ``parameters`` cell, enforced before anything runs.

papermill itself only warns about unknown names and does not check types. Its own inspection also
skips every line with two ``=`` signs, so the cell is parsed as Python here.
"""

from __future__ import annotations

import ast
import difflib
import io
import re
import tokenize
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from nbformat import NotebookNode

_SCALARS = {"bool": bool, "int": int, "float": (int, float), "str": str, "dict": dict}
_TYPE = r"(?:list\[(?:bool|int|float|str)\]|list|bool|int|float|str|dict)"
_COMMENT = re.compile(
    rf"^#\s*(?:(?P<type>{_TYPE}(?:\s*\|\s*None)?)(?![\w\[])[\s:,;.-]*)?(?P<help>.*)$"
)
_TYPE_ONLY = re.compile(rf"^{_TYPE}(?:\s*\|\s*None)?$")


class ParameterError(ValueError):
    """A parameter that does not exist, has the wrong type, or is no plain literal."""


@dataclass(frozen=True)
class Parameter:
    """One line of a ``parameters`` cell, such as ``steps = 60  # int: optimizer steps``."""

    name: str
    type: str
    """``bool``, ``int``, ``float``, ``str``, ``dict``, ``list``, ``list[<scalar>]``, each
    optionally followed by ``| None``."""
    default: Any
    help: str


def read_parameters(notebook: NotebookNode) -> dict[str, Parameter]:
    """The parameters of a notebook by name, in the order of the cell.

    The type of a parameter is its annotation, else the type at the start of its comment, else the
    type of the literal. A notebook without a ``parameters`` cell has none.

    Raises:
        ParameterError: a line is not ``name = literal``, or the literal contradicts its type.
    """
    for cell in notebook.cells:
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", []):
            return {parameter.name: parameter for parameter in _parse(cell.source)}
    return {}


def check(
    declared: Mapping[str, Parameter], given: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """``given`` with each value checked against its declaration; integers become floats if asked.

    Raises:
        ParameterError: unknown name (with the known ones) or wrong type; starts with ``where``.
    """
    unknown = [name for name in given if name not in declared]
    if unknown:
        raise ParameterError(f"{where}: {describe_unknown('parameter', unknown[0], declared)}")
    return {name: _checked(declared[name], value, where) for name, value in given.items()}


def parse_text(parameter: Parameter, text: str) -> Any:
    """A value typed on the command line: taken literally for ``str``, else read as YAML."""
    return text if parameter.type == "str" else yaml.safe_load(text)


def describe_unknown(kind: str, name: str, known: Iterable[str]) -> str:
    """``unknown <kind> 'x' (did you mean 'y'?); known: ...`` for error messages."""
    names = list(known)
    close = difflib.get_close_matches(name, names, n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    return f"unknown {kind} {name!r}{hint}; known: {', '.join(names) or 'none'}"


def _parse(source: str) -> Iterable[Parameter]:
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        raise ParameterError(f"parameters cell is not valid Python: {error}") from error
    comments = {
        token.start[0]: token.string
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    for node in statements:
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        comment = _COMMENT.match(comments.get(node.end_lineno or node.lineno, "#"))
        assert comment is not None  # the pattern accepts every comment
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            name, type_ = node.target.id, ast.unparse(node.annotation)
        elif (
            isinstance(node, ast.Assign)
            and len(node.targets) == 1
            and isinstance(node.targets[0], ast.Name)
        ):
            name, type_ = node.targets[0].id, comment["type"]
        else:
            raise ParameterError(f"parameters cell, line {node.lineno}: expected name = literal")
        assert node.value is not None
        try:
            default = ast.literal_eval(node.value)
        except ValueError:
            raise ParameterError(
                f"parameters cell: {name} is computed; expected a plain literal, compute it in "
                "the next cell"
            ) from None
        type_ = re.sub(r"\s*\|\s*", " | ", type_) if type_ else _infer(name, default)
        if not _TYPE_ONLY.match(type_):
            raise ParameterError(f"parameters cell: {name} has type {type_!r}; expected {_TYPE}")
        parameter = Parameter(name, type_, default, comment["help"].strip())
        _checked(parameter, default, "parameters cell")
        yield parameter


def _infer(name: str, default: object) -> str:
    if isinstance(default, list):
        kinds = {_infer(name, item) for item in default}
        if kinds == {"int", "float"}:
            kinds = {"float"}
        return f"list[{kinds.pop()}]" if len(kinds) == 1 and kinds < set(_SCALARS) else "list"
    kind = type(default).__name__
    if kind not in _SCALARS:
        raise ParameterError(
            f"parameters cell: {name}={default!r} has type {kind}; write the type in its comment "
            "(such as '# str | None: ...') and use lists for sequences"
        )
    return kind


def _checked(parameter: Parameter, value: Any, where: str) -> Any:
    kind, _, none = parameter.type.partition(" | ")
    if value is None and none:
        return None
    inner = kind[5:-1] if kind.startswith("list[") else ""
    try:
        if kind == "list" or inner:
            if not isinstance(value, list):
                raise TypeError
            return [_scalar(item, inner) for item in value] if inner else value
        return _scalar(value, kind)
    except TypeError:
        raise ParameterError(
            f"{where}: {parameter.name}={value!r} is {type(value).__name__}; "
            f"expected {parameter.type}, such as {parameter.default!r}"
        ) from None


def _scalar(value: Any, kind: str) -> Any:
    if kind == "float" and isinstance(value, str):
        try:
            return float(value)  # YAML 1.1 reads 1e-4 (no point) as text
        except ValueError:
            raise TypeError from None
    if not isinstance(value, _SCALARS[kind]) or (isinstance(value, bool) and kind != "bool"):  # type: ignore[arg-type]
        raise TypeError
    return float(value) if kind == "float" else value
