"""docs/serving.md: the tests that it names are there, and no case of a server is left out."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from outrider.runtime.serving.messages import CLIENT_TYPES, SERVER_TYPES, ErrorCode

ROOT = Path(__file__).parents[2]
DOCUMENT = (ROOT / "docs" / "serving.md").read_text()
CASES = {*range(1, 34), 47, 48}
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", DOCUMENT)))


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text())
    return {one.name for one in tree.body if isinstance(one, ast.FunctionDef)}


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_a_named_test_is_there(file, test):
    assert test in names_in(file)


def test_every_case_of_a_server_has_a_row_with_a_test():
    rows = re.findall(r"^\| ([\d, ]+) \| .* \| (.*) \|$", DOCUMENT, re.MULTILINE)
    found = {int(number): tests for numbers, tests in rows for number in numbers.split(",")}
    assert found.keys() == CASES
    assert all("::test_" in tests for tests in found.values())


def test_every_type_and_error_code_is_told():
    for code, kind in (CLIENT_TYPES | SERVER_TYPES).items():
        name = {"GetStats": "STATS"}.get(kind.__name__, kind.__name__.upper())
        assert f"| {code:#04x} | {name} |" in DOCUMENT
    for code in ErrorCode.__args__:
        assert f"`{code}`" in DOCUMENT
