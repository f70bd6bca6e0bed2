"""The house: which module may import which, what is public, and that the engines are twins. Read from the source."""

from __future__ import annotations

import ast
import inspect
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

import kdcore

ROOT = Path(kdcore.__file__).parent
MODULES = {
    ".".join(("kdcore", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(ROOT.rglob("*.py"))
}

#: Floors of the house. A unit is a module or subpackage directly under kdcore; it imports from lower floors and itself.
FLOORS = [
    {"_version", "errors"},
    {"checks"},
    {"rowstatus", "formulas", "sequences", "sparse"},
    {"divergences"},
    {"objective"},
    {"cpu", "cuda", "hdf5"},
    {"engines"},
    {"arguments"},
    {"ops", "variants", "states"},
    {"store"},
    {"students", "teachers"},
]
FLOOR = {unit: floor for floor, units in enumerate(FLOORS) for unit in units}
#: The pipeline and what belongs to it: units that are named nowhere above, over which only the entry points stand.
ROOF = len(FLOORS)
#: kdcore's own __init__ names everything, lazily; testing, demo and bench are users of the house.
OUTSIDE = {"", "__main__", "cli", "testing", "demo", "bench"}


def unit(module):
    """The part of kdcore's house that a module belongs to: "" for kdcore itself, None for what is not kdcore's."""
    top, _, rest = module.partition(".")
    return rest.partition(".")[0] if top == "kdcore" else None


def floor(name):
    return FLOOR.get(name, ROOF)


def tree(module):
    return ast.parse(MODULES[module].read_text(), str(MODULES[module]))


def imports(module):
    """Full names of what a module imports, at any depth and by import_module too."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], base]).rstrip(".")
            names = [f"{base}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else base for name in names)
        elif isinstance(node, ast.Call) and _name(node.func) in ("import_module", "__import__") and node.args:
            yield from _module_names(node.args[0])


def _name(node):
    return getattr(node, "attr", getattr(node, "id", None))


def _module_names(argument):
    if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
        yield argument.value
    elif isinstance(argument, ast.JoinedStr):  # f"kdcore.{engine}": any of the engines
        text = "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in argument.values)
        yield from (text.replace("{}", engine) for engine in ("cpu", "cuda"))


def test_the_reader_of_imports_sees_every_form(monkeypatch, tmp_path):
    path = tmp_path / "sample.py"
    path.write_text(
        "import h5py\n"
        "from kdcore.ops import softmax\n"
        "from kdcore import errors\n"
        "from . import formulas\n"
        "from .cpu import rows\n"
        "def f(name):\n"
        "    from kdcore.hdf5 import x\n"
        "    import_module('kdcore.cuda')\n"
        "    importlib.import_module(f'kdcore.{name}.memory')\n"
    )
    monkeypatch.setitem(MODULES, "kdcore.sample", path)
    assert set(imports("kdcore.sample")) == {
        "h5py", "kdcore.ops", "kdcore.errors", "kdcore.formulas", "kdcore.cpu.rows", "kdcore.hdf5", "kdcore.cuda",
        "kdcore.cpu.memory", "kdcore.cuda.memory",
    }  # fmt: skip


@pytest.mark.parametrize("module", [module for module in MODULES if unit(module) not in OUTSIDE])
def test_nothing_points_upward(module):
    mine = unit(module)
    for name in imports(module):
        theirs = unit(name)
        if theirs is None or theirs == mine:
            continue
        assert theirs not in OUTSIDE, f"{module} imports {name}, which is a user of the house"
        if floor(mine) == floor(theirs) == ROOF:
            continue  # beneath the roof the test of cycles holds
        assert floor(theirs) < floor(mine), f"{module} imports {name}"


def test_units_do_not_import_one_another_in_a_circle():
    edges = {}
    for module in MODULES:
        if module != "kdcore":
            edges.setdefault(unit(module), set()).update(
                unit(name) for name in imports(module) if unit(name) not in (None, unit(module))
            )
    assert edges["engines"] >= {"cpu", "cuda", "errors"}
    while edges:
        leaves = [name for name, targets in edges.items() if not targets & edges.keys()]
        assert leaves, f"a circle among {sorted(edges)}"
        for name in leaves:
            del edges[name]


@pytest.mark.parametrize("engine", ["cpu", "cuda"])
def test_an_engine_knows_the_formulas_and_not_the_other_engine(engine):
    mine = [module for module in MODULES if unit(module) == engine]
    reached = {unit(name) for module in mine for name in imports(module) if name.startswith("kdcore")}
    assert f"kdcore.{engine}.memory" in mine
    assert "formulas" in reached
    # checks: of what kdcore.cuda.plans is told, not of arrays.
    assert reached <= {engine, "formulas", "rowstatus", "objective", "errors", "checks", ""}
    if engine == "cpu":
        assert not any(name.startswith(("numba.cuda", "cuda", "cupy")) for module in mine for name in imports(module))


@pytest.mark.parametrize("module", MODULES)
def test_only_one_module_opens_hdf5(module):
    opens = any(name.split(".")[0] == "h5py" for name in imports(module))
    assert opens == (module == "kdcore.hdf5")


def test_one_module_chooses_an_engine():
    # Operations that one engine has alone.
    alone = {"states": {"cpu"}, "store": {"cpu"}}
    for module in MODULES:
        if unit(module) in {"engines", "cpu", "cuda", *OUTSIDE}:
            continue
        engines = {unit(name) for name in imports(module)} & {"cpu", "cuda"}
        assert engines <= alone.get(unit(module), set()), f"{module} imports {engines}: engines.py chooses"


# --- formulas ------------------------------------------------------------------------------------------------------


#: Functions of formulas for which each engine puts its own.
ENGINES_OWN = {"where", "fma", "log", "exp", "exprel", "reciprocal"}


def test_formulas_are_undecorated_leaves_that_need_math_alone():
    source = tree("kdcore.formulas")
    assert set(imports("kdcore.formulas")) == {"math"}
    functions = [node for node in source.body if isinstance(node, ast.FunctionDef)]
    names = {function.name for function in functions} - ENGINES_OWN
    assert len(names) > 10
    for function in functions:
        assert not function.decorator_list, function.name
        assert ast.get_docstring(function), function.name
        used = {_name(node) for node in ast.walk(function) if isinstance(node, ast.Name)}
        assert not used & names, f"{function.name} refers to another formula"
        if function.name in ("exp", "shift_factor"):
            continue  # the plain one, and one of numbers that belong to a block of a row
        assert not any(isinstance(node, ast.Attribute) and node.attr == "exp" for node in ast.walk(function)), (
            f"{function.name}: each engine brings its own exponential"
        )
    assert not [node for node in source.body if isinstance(node, ast.ClassDef)]


def test_formulas_are_listed():
    formulas = import_module("kdcore.formulas")
    functions = {name for name, value in vars(formulas).items() if inspect.isfunction(value)}
    assert functions | {"ACTIVATIONS", "HEADROOM"} == set(formulas.__all__)


# --- public names --------------------------------------------------------------------------------------------------

OPERATIONS = {
    "softmax", "log_softmax", "logsumexp", "kl_divergence", "cross_entropy", "kd_loss", "kd_logit_gradient",
    "kd_loss_and_gradient", "KDOutput",
}  # fmt: skip
VARIANTS = {"dkd_loss_and_gradient", "mixture_kd_loss_and_gradient", "standardized_kd_loss_and_gradient"}


def test_every_public_name_is_there_and_documented():
    assert set(kdcore.__all__) >= VARIANTS | OPERATIONS | {"KdcoreError", "__version__"}
    assert len(kdcore.__all__) == len(set(kdcore.__all__))
    for name in kdcore.__all__:
        value = getattr(kdcore, name)
        assert name in dir(kdcore)
        assert isinstance(value, str) if name == "__version__" else value.__doc__, name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = kdcore.no_such_name


def test_every_error_is_a_builtin_too():
    errors = import_module("kdcore.errors")
    for name in errors.__all__:
        error = getattr(errors, name)
        if error is errors.KdcoreError or issubclass(error, Warning):
            continue
        assert issubclass(error, errors.KdcoreError)
        builtin = [base for base in error.__mro__ if base.__module__ == "builtins"]
        assert builtin[0] is not Exception, name
        assert getattr(kdcore, name) is error


def test_public_signatures():
    def names(function):
        return list(inspect.signature(function).parameters)

    engine = ["validate", "threads", "stream"]
    rows = ["logits", "temperature", "out", *engine]
    assert names(kdcore.softmax) == names(kdcore.log_softmax) == names(kdcore.logsumexp) == rows
    options = ["divergence", "teacher_temperature", "scale_t2", "ignore_index", "weights", "reduction", "denominator"]
    kd = ["student_logits", "teacher_logits", "labels", "temperature", "alpha", *options]
    kd.append("tail")
    assert names(kdcore.kd_loss) == [*kd, *engine]
    for function in (kdcore.kd_logit_gradient, kdcore.kd_loss_and_gradient):
        assert names(function) == [*kd, "out", *engine]
    assert names(kdcore.kl_divergence) == [
        "student_logits",
        "teacher_logits",
        "temperature",
        "divergence",
        "reduction",
        *engine,
    ]
    assert names(kdcore.cross_entropy) == ["student_logits", "labels", "ignore_index", "reduction", *engine]
    for name in VARIANTS:
        assert names(getattr(kdcore, name))[-4:] == ["out", *engine]
    assert kdcore.KDOutput._fields == ("loss", "gradient", "ce", "kl")
    for name in VARIANTS | OPERATIONS - {"KDOutput"}:
        for parameter in inspect.signature(getattr(kdcore, name)).parameters.values():
            if parameter.name in ("out", "reduction", "tail", *options, *engine):
                assert parameter.kind is inspect.Parameter.KEYWORD_ONLY, (name, parameter.name)
        if "alpha" in names(getattr(kdcore, name)):
            text = " ".join(getattr(kdcore, name).__doc__.replace("*", "").split())
            assert "alpha is the weight of the" in text, name


def test_options_have_the_same_default_everywhere():
    defaults = {
        "teacher_temperature": None, "scale_t2": True, "ignore_index": -100, "weights": None, "reduction": "mean",
        "denominator": None, "tail": "bucket", "out": None, "validate": None, "threads": None, "stream": None,
        "divergence": "forward_kl", "start": 0, "target_weight": 1.0, "nontarget_weight": 8.0,
    }  # fmt: skip
    found = [
        (name, parameter)
        for name in kdcore.__all__
        if inspect.isfunction(getattr(kdcore, name))
        for parameter in inspect.signature(getattr(kdcore, name)).parameters.values()
        if parameter.name in defaults and parameter.default is not parameter.empty
    ]
    assert {parameter.name for _, parameter in found} == set(defaults)
    for name, parameter in found:
        assert (type(parameter.default), parameter.default) == (
            type(defaults[parameter.name]),
            defaults[parameter.name],
        ), f"{name}({parameter})"


# --- twins ---------------------------------------------------------------------------------------------------------


def listed(module):
    """__all__ of a module, from its source: the CUDA engine need not be importable here."""
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and any(_name(target) == "__all__" for target in node.targets):
            return set(ast.literal_eval(node.value))
    raise AssertionError(f"{module} has no __all__")


def launcher(engine, name):
    """The module of an engine that defines a function of it."""
    modules = [f"kdcore.{engine}.{part}" for part in ("launch", "variants")]
    return next(module for module in modules if name in listed(module))


def parameters(module, name):
    """Names of a function's parameters, from its definition."""
    for node in tree(module).body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            assert not (node.args.vararg or node.args.kwarg or node.args.kwonlyargs), (module, name)
            return [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
    raise AssertionError(f"{module} does not define {name} as a plain function")


def test_engines_have_the_same_functions():
    twins = listed("kdcore.cpu")
    assert twins >= {"kd_rows", "softmax_rows", "log_softmax_rows", "logsumexp_rows", "reduce_rows", "weight_sum"}
    assert twins >= {"sparse_kd_rows", "dkd_rows", "mixture_rows", "standardized_rows"}
    # Whether CUDA is there, and whether an array is CUDA's, are questions that only that engine can answer.
    assert listed("kdcore.cuda") == twins
    assert twins <= listed("kdcore.cuda")


@pytest.mark.parametrize("name", sorted(listed("kdcore.cpu")))
def test_engines_have_the_same_signatures(name):
    cpu, cuda = (parameters(launcher(engine, name), name) for engine in ("cpu", "cuda"))
    assert (cpu[-1], cuda[-1]) == ("threads", "stream")
    assert cpu[:-1] == cuda[:-1]
    assert list(inspect.signature(getattr(import_module("kdcore.cpu"), name)).parameters) == cpu


@pytest.mark.parametrize("name", ["empty", "full", "to_host", "as_array", "same", "overlapping"])
def test_memories_have_the_same_signatures(name):
    cpu, cuda = parameters("kdcore.cpu.memory", name), parameters("kdcore.cuda.memory", name)
    assert name in listed("kdcore.cpu.memory") & listed("kdcore.cuda.memory")
    where = {"threads": "where", "stream": "where"}
    assert [where.get(parameter, parameter) for parameter in cpu] == [
        where.get(parameter, parameter) for parameter in cuda
    ]
    if name in ("empty", "full"):
        assert (cpu[-1], cuda[-1]) == ("threads", "stream")
    assert list(inspect.signature(getattr(import_module("kdcore.cpu.memory"), name)).parameters) == cpu


def test_memory_of_the_host():
    memory = import_module("kdcore.cpu.memory")
    x = np.arange(12.0).reshape(3, 4)
    assert memory.as_array(x) is x and memory.to_host(x) is x
    assert memory.same(x, x[:]) and not memory.same(x, x[:, ::-1]) and not memory.same(x, x.copy())
    assert memory.overlapping(x[:, ::2], [None, x[:, 1::2], x, x.copy(), x[1:, 1:]]) == [2, 4]
    full = memory.full((2, 3), np.float32, 7, 1)
    assert (full.dtype, full.tolist()) == (np.float32, [[7.0] * 3] * 2)
    empty = memory.empty((2, 0), np.float64, 1)
    assert (empty.dtype, empty.shape) == (np.float64, (2, 0))
