"""The mutants of the mutation score are other programs, each by one change."""

import ast
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "mutation"))

from mutants import mutants_of
from run import PARTS, ROOT

SOURCE = '''
LIMIT = 3


def f(x: int = 2, *rest) -> int:
    """A docstring: 1 + 1."""
    if x < LIMIT and not rest:
        raise ValueError(f"{x + 1}")
    y = -x if x else 0
    y += max(x, 1)
    return y
'''


def test_every_change_is_one_of_those_that_are_meant():
    found = {(mutant.line, mutant.change) for mutant in mutants_of(SOURCE)}
    assert found == {
        (5, "2 to 3"),
        (7, "And to Or"),
        (7, "Lt to LtE"),
        (7, "without Not"),
        (9, "the branches of an if exchanged"),
        (9, "without USub"),
        (9, "0 to 1"),
        (10, "Add to Sub"),
        (10, "max to min"),
        (10, "1 to 2"),
    }


@pytest.mark.parametrize("module", ["students/forward.py", "runfile.py", "cuda/sweeps.py"])
def test_mutants_of_kdcore_are_programs_of_their_own(module):
    source = (ROOT / "kdcore" / module).read_text(encoding="utf-8")
    plain = ast.unparse(ast.parse(source))
    mutants = list(mutants_of(source))
    assert len(mutants) >= 5
    assert all(mutant.source.strip() != plain for mutant in mutants)
    assert len({mutant.source for mutant in mutants}) > 0.95 * len(mutants)


def test_parts_have_modules_and_tests_that_there_are():
    for part in PARTS.values():
        assert all((ROOT / "kdcore" / name).exists() for name in part.modules)
        assert all((ROOT / "tests" / name).exists() for name in part.tests)
