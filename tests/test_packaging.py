"""What setup.cfg requires, and that the tox environment ``lowest`` tests it. Read from the two files."""

import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).parents[1]


def read(name):
    parser = ConfigParser(interpolation=None)
    parser.read_string((ROOT / name).read_text(encoding="utf-8"), name)
    return parser


SETUP, TOX = read("setup.cfg"), read("tox.ini")
LOWEST = TOX["testenv:lowest"]


def requirements(section, option):
    """Names and ranges of requirements, each of which has a lower and an upper bound."""
    for line in SETUP[section][option].split():
        name, low, high = re.fullmatch(r"([\w\[\]-]+)>=([\d.]+),<([\d.]+)", line).groups()
        yield name, low, high


def test_lowest_pins_the_lower_bounds():
    required = [*requirements("options", "install_requires"), *requirements("options.extras_require", LOWEST["extras"])]
    assert len(required) == 10
    assert sorted(LOWEST["deps"].split()) == sorted(f"{name}=={low}" for name, low, _ in required)
    assert SETUP["options"]["python_requires"] == LOWEST["base_python"].replace("python", ">=")


def test_lowest_runs_the_tests_of_cpu_by_default():
    assert "lowest" in TOX["tox"]["env_list"].split(", ")
    (command,) = (line for line in LOWEST["commands"].replace("\\\n", "").splitlines() if line and line[0] != "#")
    first, *rest = command.split(" --")
    assert first == TOX["testenv:cpu"]["commands"].split("\n")[1] == "{[tests]cpu} {posargs}"
    assert all(re.match("ignore=tests/test_", option) for option in rest)
    assert LOWEST["extras"] == TOX["testenv:cpu"]["extras"]


def test_extras_agree_with_the_tests():
    tested = {}
    for extra in ("test", *SETUP["options.extras_require"]):
        for name, *bounds in requirements("options.extras_require", extra):
            assert tested.setdefault(name, bounds) == bounds, f"{name}, in the extra {extra}"
