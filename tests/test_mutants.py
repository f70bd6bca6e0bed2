"""The mutants of the mutation score are other programs, each by one change."""

import ast
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent / "mutation"))

from equivalent import EQUIVALENT
from mutants import mutants_of
from run import PARTS, ROOT, chance, drawn

SOURCE = '''
LIMIT = 3


def f(x: int = 2, *rest) -> int:
    """A docstring: 1 + 1."""
    if x < LIMIT and not rest:
        raise ValueError(f"{x + 1}")
    y = -x if x else 0
    y += max(x, 1)
    print(y)
    rest[0] = y
    return y
'''


def test_every_change_is_one_of_those_that_are_meant():
    found = {(mutant.line, mutant.after) for mutant in mutants_of(SOURCE)}
    assert found == {
        (5, "def f(x: int = (3), *rest) -> int:"),
        (7, "if (x < LIMIT or not rest):"),
        (7, "if (x <= LIMIT) and not rest:"),
        (7, "if x < LIMIT and (rest):"),
        (9, "y = (0 if x else -x)"),
        (9, "y = (x) if x else 0"),
        (9, "y = -x if x else (1)"),
        (10, "y -= max(x, 1)"),
        (10, "y += (min(x, 1))"),
        (10, "y += max(x, (2))"),
        (11, "pass"),
        (12, "pass"),
        (12, "rest[(1)] = y"),
    }


@pytest.mark.parametrize("module", ["students/forward.py", "runfile.py", "cuda/sweeps.py"])
def test_mutants_of_kdcore_are_programs_of_their_own(module):
    source = (ROOT / "kdcore" / module).read_text(encoding="utf-8")
    plain = ast.dump(ast.parse(source))
    mutants = list(mutants_of(source))
    assert len(mutants) >= 5
    assert all(ast.dump(ast.parse(mutant.source)) != plain for mutant in mutants)
    assert len({mutant.source for mutant in mutants}) == len(mutants)


def test_parts_have_modules_and_tests_that_there_are():
    for part in PARTS.values():
        for module, tests in part.tests.items():
            assert (ROOT / "kdcore" / module).exists()
            assert tests and all((ROOT / "tests" / name).exists() for name in tests)


def test_what_is_called_equivalent_is_still_a_mutant():
    for module in {module for module, _, _ in EQUIVALENT}:
        source = (ROOT / "kdcore" / module).read_text(encoding="utf-8")
        found = {(mutant.before, mutant.after) for mutant in mutants_of(source)}
        assert {(before, after) for name, before, after in EQUIVALENT if name == module} <= found


@pytest.mark.parametrize(
    ("killed", "tried", "aim", "is_chance"),
    [(0, 0, 0.95, 1.0), (0, 1, 0.95, 0.05), (1, 2, 0.5, 0.75), (5, 5, 0.9, 1.0)],
)
def test_the_chance_of_a_sample(killed, tried, aim, is_chance):
    assert chance(killed, tried, aim) == pytest.approx(is_chance)


def test_a_sample_takes_of_each_part_in_turn():
    first = drawn(["students", "formulas"], None)
    assert [name for name, _, _ in first[:6]] == ["students", "formulas"] * 3
    assert first == drawn(["students", "formulas"], None)
    assert sorted(first) == sorted(drawn(["students", "formulas"], 1)) and first != drawn(["students", "formulas"], 1)
    assert not {(module, m.before, m.after) for _, module, m in first} & set(EQUIVALENT)
