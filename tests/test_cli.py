"""The command kdcore, as a user meets it."""

import json
import os
import re
import signal
import subprocess
import sys

import numpy as np
import pytest

import kdcore
import kdcore.demo.run as demo
from kdcore.cli import main

RUN = """
[distill]
output_dir = "run"
temperature = 2.0
alpha = 0.25
batch_size = 8
epochs = 2
{distill}

[teacher]
kind = "hdf5"
path = "teacher.h5"
{teacher}

[student]
kind = "logit"
vocab_size = 11
context = 1
learning_rate = 4.0
{student}

[batches]
kind = "shards"
directory = "tokens"
sequence_length = 4
{batches}
"""


@pytest.fixture
def folder(tmp_path):
    """A user's own teacher and shards: token v is followed by (v + 1) mod 11, and the teacher nearly knows it."""
    tokens = np.arange(600) % 11
    (tmp_path / "tokens").mkdir()
    tokens[:330].astype("<u4").tofile(tmp_path / "tokens" / "a.bin")
    tokens[330:].astype("<u4").tofile(tmp_path / "tokens" / "b.bin")
    logits = np.full((600, 11), -1.0, np.float32)
    logits[np.arange(600), (tokens + 1) % 11] = 4
    kdcore.save_teacher_logits(tmp_path / "teacher.h5", logits)

    def write(**tables):
        path = tmp_path / "run.toml"
        filled = {name: tables.get(name, "") for name in ("distill", "teacher", "student", "batches")}
        path.write_text(RUN.format(**filled), encoding="utf-8")
        return path

    write.path = tmp_path
    return write


def test_distill_learns_and_saves(folder, capsys):
    assert main(["distill", "--config", str(folder())]) == 0
    printed = capsys.readouterr().out
    metrics = json.loads(printed[: printed.rindex("}") + 1])
    assert metrics["objective"] == "0.25 · CE + 0.75 · T² · KL(teacher ‖ student), T = 2"
    assert metrics["final_loss"] < 0.2 * metrics["initial_loss"]
    student = kdcore.LogitStudent.load(folder.path / "run" / "student.h5")
    assert student.logits_for_batch([[3], [10]]).argmax(axis=1).tolist() == [4, 0]
    assert json.loads((folder.path / "run" / "metrics.json").read_text(encoding="utf-8")) == metrics


def test_distill_resumes(folder, capsys):
    assert main(["distill", "--config", str(folder(distill="max_steps = 5"))]) == 0
    assert main(["distill", "--config", str(folder())]) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert main(["distill", "--config", str(folder()), "--resume"]) == 0
    resumed = (folder.path / "run" / "student.h5").read_bytes()
    (folder.path / "run").rename(folder.path / "first")
    assert main(["distill", "--config", str(folder())]) == 0
    assert (folder.path / "run" / "student.h5").read_bytes() == resumed


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"distill": "alfa = 0.5"}, r"unknown field 'alfa'"),
        ({"distill": 'divergence = "l2"'}, r"divergence must be one of 'forward_kl', .* got 'l2'"),
        ({"teacher": "rows = 3"}, r"unknown field 'rows' in \[teacher\]"),
        ({"teacher": 'address = "name"'}, r"address must be .* 'name'"),
        ({"student": "momentum = 0.5"}, r"unknown field 'momentum' in \[student\]"),
        ({"batches": "held_out = 1.5"}, r"held_out must be in \[0, 1\), got 1.5\n  in \[batches\]"),
        ({"batches": "teacher_rows = true"}, r"unknown field 'teacher_rows'"),
        ({"batches": 'wrap = "false"'}, r"wrap must be True or False, got 'false'"),
        ({"student": "initial_value = 1e39"}, r"initial_value .* 1e\+?39"),
    ],
)
def test_mistakes_in_the_file_are_named(folder, capsys, tables, message):
    assert main(["distill", "--config", str(folder(**tables))]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert not (folder.path / "run").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('kind = "hdf5"', 'kind = ["hdf5"]', r"kind of \[teacher\] must be one of 'hdf5', 'mlp', got \['hdf5'\]"),
        ('path = "teacher.h5"', "path = 5", r"path must be a path, got 5"),
        ('directory = "tokens"', "directory = 5", r"directory must be a path, got 5"),
        ("context = 1", "context = 30", r"context"),
        ("[teacher]", "[teachers]", r"unknown table \[teachers\]"),
        ("temperature = 2.0", "temperature = \udcff", r"not TOML"),
    ],
)
def test_mistakes_of_type_are_named(folder, capsys, old, new, message):
    path = folder()
    path.write_bytes(path.read_text(encoding="utf-8").replace(old, new).encode("utf-8", "surrogateescape"))
    assert main(["distill", "--config", str(path)]) == 1
    assert re.search(message, capsys.readouterr().err)


def test_a_teacher_with_too_few_rows_is_found_before_the_run(folder, capsys):
    kdcore.save_teacher_logits(folder.path / "teacher.h5", 5 * np.eye(590, 11, dtype=np.float32))
    assert main(["distill", "--config", str(folder())]) == 1
    assert re.search("has 590 rows for the 600 tokens of the shards", capsys.readouterr().err)


def test_missing_files_are_named(tmp_path, capsys):
    assert main(["distill", "--config", str(tmp_path / "none.toml")]) == 1
    assert "none.toml" in capsys.readouterr().err


def test_a_reader_that_has_read_enough_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    try:
        command = [sys.executable, "-m", "kdcore", "info"]
        run = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writer)
    assert run.returncode == 128 + signal.SIGPIPE
    assert run.stderr == ""


def test_another_broken_pipe_is_an_error(monkeypatch, capsys):
    def broken(_):
        raise BrokenPipeError("a worker has gone")

    monkeypatch.setattr("kdcore.cli._info", broken)
    assert main(["info"]) == 1
    assert "BrokenPipeError: a worker has gone" in capsys.readouterr().err


def test_info_names_both_engines():
    shown = subprocess.run([sys.executable, "-m", "kdcore", "info"], capture_output=True, text=True, check=True).stdout
    assert f"kdcore {kdcore.__version__}" in shown
    assert re.search(r"^CPU engine: \d+ threads", shown, re.MULTILINE)
    assert re.search(r"^CUDA engine: (runs|not available: .)", shown, re.MULTILINE)


@pytest.fixture
def small_demo(monkeypatch):
    monkeypatch.setattr(demo, "BUDGETS", {3_000: 16})
    monkeypatch.setattr(demo, "RATES", (0.5, 2.0))
    monkeypatch.setattr(demo, "HELD_OUT_POSITIONS", 5_000)
    monkeypatch.setattr(demo, "TUNE_POSITIONS", 1_000)


def test_demo(small_demo, tmp_path, capsys):
    assert main(["demo", "--output", str(tmp_path / "demo")]) == 0
    report = json.loads((tmp_path / "demo" / "demo.json").read_text(encoding="utf-8"))
    (row,) = report["budgets"]
    assert report["uniform_bits_per_byte"] == 8
    assert 1 < report["teacher_bits_per_byte"] < row["distilled"]["bits_per_byte"]
    assert row["distilled"]["bits_per_byte"] + 0.2 < row["hard"]["bits_per_byte"] < 8
    with kdcore.LogitStore(tmp_path / "demo" / "teacher.h5") as store:  # 120 passages to learn from, 40 to tune by
        store.verify()
        assert (store.kind, store.sequences, len(store)) == ("topk", 160, 160 * 26)
    assert report["store"] == {"kind": "topk", "k": 32, "rows": 4160, "bytes": store.path.stat().st_size}
    assert (tmp_path / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")

    capsys.readouterr()
    checkpoint = tmp_path / "demo" / row["distilled"]["checkpoint"]
    assert main(["demo", "--evaluate", str(checkpoint)]) == 0
    assert float(capsys.readouterr().out.split()[0]) == pytest.approx(row["distilled"]["bits_per_byte"], abs=1e-6)


@pytest.mark.parametrize("files", [["thesis.tex"], ["demo.json", "thesis.tex"], ["demo.json"]])
def test_demo_leaves_other_folders_alone(tmp_path, capsys, files):
    for name in files:
        (tmp_path / name).write_text('{"mine": 1}', encoding="utf-8")
    assert main(["demo", "--output", str(tmp_path)]) == 1
    assert "is not from an earlier demo" in capsys.readouterr().err
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == dict.fromkeys(
        files, '{"mine": 1}'
    )


def test_demo_replaces_an_earlier_one(tmp_path):
    (tmp_path / "demo.json").write_text('{"demo": "kdcore", "status": "running"}', encoding="utf-8")
    (tmp_path / "hard-3000-rate-0.5").mkdir()
    demo._own(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.json"]
