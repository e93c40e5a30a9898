"""Typed parameters of notebooks."""

import nbformat
import pytest
from notebook_factory import PARAMETERS, code, notebook
from papermill import inspect_notebook

from rlkit.parameters import ParameterError, check, parse_text, read_parameters


def declared(source: str = PARAMETERS):
    return read_parameters(notebook(parameters=source))


def test_names_types_defaults_and_help_are_read():
    found = declared()
    assert {name: parameter.type for name, parameter in found.items()} == {
        "steps": "int",
        "rate": "float",
        "label": "str",
        "seeds": "list[int]",
        "limit": "int | None",
    }
    assert found["rate"].default == 1e-4
    assert found["steps"].help == "how far to count"


@pytest.mark.parametrize(
    ("line", "type_"),
    [
        ("x = 1", "int"),
        ("x = True", "bool"),
        ("x = [1, 2.5]", "list[float]"),
        ("x = [1, 'a']", "list"),
        ("x = []", "list"),
        ("x: float = 1  # annotated", "float"),
        ("x = 'a=b'  # text with = signs", "str"),
        ("x = (\n    3\n)  # float: over lines", "float"),
        ("x = 2  # integer steps", "int"),
    ],
)
def test_types_come_from_annotation_comment_or_literal(line, type_):
    assert declared(line)["x"].type == type_


def test_papermill_finds_the_same_names(tmp_path):
    nbformat.write(notebook(), tmp_path / "a.ipynb")
    nb = nbformat.read(tmp_path / "a.ipynb", as_version=4)
    nb.metadata["language_info"] = {"name": "python"}
    nbformat.write(nb, tmp_path / "a.ipynb")
    assert set(inspect_notebook(str(tmp_path / "a.ipynb"))) == set(declared())


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("x = 1 + y", "computed"),
        ("import os", "name = literal"),
        ("x = y = 1", "name = literal"),
        ("x = None", "write the type"),
        ("x = (1, 2)", "use lists"),
        ("x = 'a'  # int: wrong", "expected int"),
        ("x: set = 1", "type 'set'"),
        ("x = = 1", "not valid Python"),
    ],
)
def test_a_cell_that_is_not_plain_literals_is_refused(line, complaint):
    with pytest.raises(ParameterError, match=complaint):
        declared(line)


def test_a_notebook_without_the_cell_has_no_parameters():
    assert read_parameters(nbformat.v4.new_notebook(cells=[code("a", "x = 1")])) == {}


def test_good_values_pass_and_become_floats_where_declared():
    values = check(declared(), {"rate": 1, "steps": 5, "limit": None, "seeds": [3]}, "here")
    assert values == {"rate": 1.0, "steps": 5, "limit": None, "seeds": [3]}
    assert isinstance(values["rate"], float)


def test_the_yaml_number_without_a_point_is_a_number():
    assert check(declared(), {"rate": "1e-4"}, "here") == {"rate": 1e-4}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 2.0),
        ("steps", "2"),
        ("steps", True),
        ("steps", None),
        ("rate", "fast"),
        ("rate", False),
        ("label", 7),
        ("seeds", 1),
        ("seeds", [1, "a"]),
        ("limit", "no"),
    ],
)
def test_a_wrong_type_names_value_and_expectation(name, value):
    with pytest.raises(ParameterError) as caught:
        check(declared(), {name: value}, "03_x")
    assert f"03_x: {name}={value!r}" in str(caught.value)
    assert f"expected {declared()[name].type}" in str(caught.value)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ParameterError, match=r"'step' \(did you mean 'steps'\?\); known: steps, r"):
        check(declared(), {"step": 2}, "03_x")


def test_text_on_the_command_line_stays_text_for_str():
    assert parse_text(declared()["label"], "007") == "007"
    assert parse_text(declared()["steps"], "007") == 7
    assert parse_text(declared()["seeds"], "[1, 2]") == [1, 2]
