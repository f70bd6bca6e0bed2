"""The examples of the README and of the docstrings do what they show."""

import ast
import doctest
import importlib
import pkgutil
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

import kdcore
from kdcore.runfile import pipeline_from_toml
from kdcore.store.manifest import write_manifest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
#: Pages with examples in Python, and how many of their blocks have some.
PAGES = {
    README: 2,
    ROOT / "docs" / "quickstart.md": 4,
    ROOT / "docs" / "divergences.md": 1,
    ROOT / "docs" / "teachers.md": 1,
    ROOT / "docs" / "numerics.md": 1,
    ROOT / "docs" / "extending.md": 1,
    ROOT / "docs" / "falsifiers.md": 1,
}


def blocks(language, page=README):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_of_pages(page):
    examples = blocks("python", page)
    assert len(examples) == PAGES[page]
    test = doctest.DocTestParser().get_doctest("\n".join(examples), {}, page.name, str(page), 0)
    results = doctest.DocTestRunner().run(test)
    assert results.attempted > 3
    assert results.failed == 0


def test_all_pages_with_examples_are_run():
    assert {page for page in (ROOT / "docs").rglob("*.md") if blocks("python", page)} == PAGES.keys() - {README}


def test_readme_run_file(tmp_path):
    text, of_store = blocks("toml")
    tables = tomllib.loads(text)
    (tmp_path / "run.toml").write_text(text.replace("epochs = 3", "epochs = 1"), encoding="utf-8")
    tokens = np.random.default_rng(0).integers(0, 256, 3000)
    (tmp_path / "tokens").mkdir()
    tokens.astype("<u4").tofile(tmp_path / "tokens" / "part-0.bin")
    logits = np.zeros((3000, 256), np.float16)
    logits[np.arange(2999), tokens[1:]] = 8  # a teacher that knows the next token
    kdcore.save_teacher_logits(tmp_path / tables["teacher"]["path"], logits)

    result = pipeline_from_toml(tmp_path / "run.toml").execute()

    assert result.output_path == tmp_path / "run" / "student.h5"
    assert result.metrics["final_loss"] != result.metrics["initial_loss"]
    assert "T = 2" in (tmp_path / "run" / "run.log").read_text(encoding="utf-8")

    (tmp_path / "store").mkdir()
    with kdcore.LogitStoreWriter(tmp_path / "store" / "a.h5", vocab_size=256, k=4, capacity=3000) as writer:
        for start in range(0, 2992, 17):
            writer.append(tokens[start : start + 16], logits[start : start + 16])
    write_manifest(tmp_path / "store")
    text = re.sub(r"\[teacher\].*?\n\n", of_store + "\n", text, flags=re.DOTALL).replace('"run"', '"store-run"')
    (tmp_path / "store.toml").write_text(text.replace("epochs = 3", "epochs = 1"), encoding="utf-8")
    from_store = pipeline_from_toml(tmp_path / "store.toml").execute()
    assert from_store.metrics["final_ce"] == pytest.approx(result.metrics["final_ce"], rel=1e-3)


def test_readme_has_the_two_commands():
    first, second = (block.strip() for block in blocks("sh"))
    assert first.endswith("kdcore demo")
    assert second.endswith("tox")
    assert all("\n" not in command and " && " in command for command in (first, second))


MODULES = sorted(module.name for module in pkgutil.walk_packages(kdcore.__path__, "kdcore."))


@pytest.mark.parametrize("name", [name for name in MODULES if name != "kdcore.__main__"])
def test_docstring_examples(name):
    if name == "kdcore.torch":
        pytest.importorskip("torch", reason="torch is not installed")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_public_names_have_examples():
    without = [
        name
        for name in kdcore.__all__
        if callable(value := getattr(kdcore, name))
        and not (isinstance(value, type) and issubclass(value, Exception))
        and ">>>" not in (value.__doc__ or "")
        and not any(">>>" in (getattr(value, method).__doc__ or "") for method in vars(value))
    ]
    # Protocols, hooks and records have nothing to run, and what runs on a device needs one.
    assert set(without) == {
        "Batch",
        "BatchSource",
        "Callback",
        "CudaTeacher",
        "KDOutput",
        "PipelineResult",
        "StudentLogitsProvider",
        "TeacherLogitsProvider",
        "TeacherRowsProvider",
        "device_batches",
    }


def test_type_checkers_see_the_names_that_python_sees():
    tree = ast.parse(Path(kdcore.__file__).read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    typed = {alias.asname: statement.module for statement in block.body for alias in statement.names}
    assert typed == kdcore._MODULE_OF
