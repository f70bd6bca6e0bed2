"""DistillConfig: every field is checked by name, and every field does something."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from kdcore import (
    ArrayBatchSource,
    Callback,
    ConfigError,
    DegenerateTeacherError,
    DistillConfig,
    FixtureTeacher,
    LogitStudent,
    Pipeline,
    SyntheticBatchSource,
    TopKRows,
    VocabularyMismatchError,
)
from kdcore.divergences import NAMES, jsd
from kdcore.objective import TAILS

FIELDS = [field.name for field in dataclasses.fields(DistillConfig)]

OUT_OF_RANGE = [
    ("output_dir", ""),
    ("output_dir", 3),
    ("output_dir", None),
    ("output_dir", "a\0b"),
    ("temperature", 0),
    ("temperature", -1.0),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", "4"),
    ("temperature", True),
    ("alpha", -0.01),
    ("alpha", 1.01),
    ("alpha", float("nan")),
    ("alpha", "0.5"),
    ("alpha", None),
    ("divergence", "kl"),
    ("divergence", None),
    ("divergence", ["forward_kl"]),
    ("divergence", "JSD"),
    ("divergence", "jsd(0.3)"),
    ("divergence", jsd),
    ("divergence", jsd(0.3)),  # a checkpoint stores names
    ("tail", "buckets"),
    ("tail", None),
    ("batch_size", 0),
    ("batch_size", -1),
    ("batch_size", 2.0),
    ("batch_size", True),
    ("epochs", 0),
    ("epochs", 1.5),
    ("max_steps", 0),
    ("max_steps", -3),
    ("max_steps", "10"),
    ("per_position", 1),
    ("per_position", "true"),
    ("per_position", None),
    ("ignore_index", None),
    ("ignore_index", -100.0),
    ("validate_every", 0),
    ("validate_every", 0.5),
    ("checkpoint_every", 0),
    ("checkpoint_every", False),
    ("keep_checkpoints", 0),
    ("keep_checkpoints", None),
    ("vocabulary", "cut"),
    ("vocabulary", True),
    ("allow_degenerate", 0),
    ("allow_degenerate", "no"),
    ("log_every", 0),
    ("log_every", 2.5),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_a_bad_value_is_an_error_that_names_its_field(name, value):
    values = {"output_dir": "run", name: value}
    for make in (DistillConfig.from_mapping, lambda mapping: DistillConfig(**mapping)):
        with pytest.raises(ConfigError, match=rf"^{name} must be ") as caught:
            make(values)
        assert repr(value) in str(caught.value) or str(value) in str(caught.value)


def test_the_table_of_bad_values_misses_no_field():
    assert {name for name, _ in OUT_OF_RANGE} == set(FIELDS)


def test_d11_unknown_fields():
    for values in ({"output_dir": "run", "warmup": 3}, {"output_dir": "run", "alhpa": 0.5, "warmup": 3}):
        with pytest.raises(ConfigError, match="unknown field .*'warmup'; the fields are allow_degenerate, alpha"):
            DistillConfig.from_mapping(values)
    with pytest.raises(TypeError, match="learning_rate"):
        DistillConfig(output_dir="run", learning_rate=0.1)


def test_output_dir_has_no_default():
    with pytest.raises(ConfigError, match="output_dir is missing"):
        DistillConfig.from_mapping({})


def test_a_configuration_does_not_change():
    config = DistillConfig(output_dir="run")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.alpha = 0.5


def test_numpy_scalars_become_plain_numbers():
    config = DistillConfig(
        output_dir=Path("run"),
        temperature=np.float32(2),
        alpha=np.float64(0.25),
        batch_size=np.int64(4),
        max_steps=np.uint8(3),
        per_position=np.True_,
    )
    plain = {name: value for name, value in dataclasses.asdict(config).items() if name != "output_dir"}
    assert json.loads(json.dumps(plain)) == plain
    assert (plain["temperature"], plain["alpha"], plain["batch_size"], plain["max_steps"]) == (2.0, 0.25, 4, 3)
    assert plain["per_position"] is True


# --- TOML -----------------------------------------------------------------------------------------------------------


def toml(tmp_path, text):
    path = tmp_path / "run.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_from_toml(tmp_path):
    path = toml(
        tmp_path,
        """
        [distill]
        output_dir = "out/run"
        temperature = 2
        alpha = 0.25
        divergence = "reverse_kl"
        tail = "zero"
        batch_size = 8
        epochs = 3
        max_steps = 100
        per_position = true
        ignore_index = -1
        validate_every = 10
        checkpoint_every = 20
        keep_checkpoints = 5
        vocabulary = "truncate"
        allow_degenerate = true
        log_every = 7

        [teacher]
        kind = "elsewhere"
        """,
    )
    config = DistillConfig.from_toml(path)
    assert dataclasses.asdict(config) == {
        "output_dir": str(tmp_path / "out/run"),  # relative to the file, not to where the program runs
        "temperature": 2.0,
        "alpha": 0.25,
        "divergence": "reverse_kl",
        "tail": "zero",
        "batch_size": 8,
        "epochs": 3,
        "max_steps": 100,
        "per_position": True,
        "ignore_index": -1,
        "validate_every": 10,
        "checkpoint_every": 20,
        "keep_checkpoints": 5,
        "vocabulary": "truncate",
        "allow_degenerate": True,
        "log_every": 7,
    }
    assert all(
        getattr(config, name) != field.default for name, field in zip(FIELDS, dataclasses.fields(config), strict=True)
    )


def test_an_absolute_path_stays(tmp_path):
    path = toml(tmp_path, '[distill]\noutput_dir = "/somewhere/run"')
    assert DistillConfig.from_toml(path).output_dir == "/somewhere/run"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("[teacher]", r"run\.toml: the table \[distill\] is missing"),
        ("distill = 3", r"run\.toml: the table \[distill\] is missing"),
        ("[distill", r"run\.toml: not TOML: "),
        ('[distill]\noutput_dir = "a"\nalpha = 2', r"run\.toml: \[distill\] alpha must be in \[0, 1\], got 2"),
        ('[distill]\noutput_dir = "a"\nlr = 2', r"run\.toml: \[distill\] unknown field 'lr'"),
        ("[distill]\nalpha = 0.5", r"run\.toml: \[distill\] output_dir is missing"),
        ("[distill]\noutput_dir = 3", r"run\.toml: \[distill\] output_dir must be a path, got 3"),
    ],
)
def test_toml_that_cannot_be(tmp_path, text, sentence):
    with pytest.raises(ConfigError, match=sentence):
        DistillConfig.from_toml(toml(tmp_path, text))


def test_toml_without_a_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        DistillConfig.from_toml(tmp_path / "none.toml")


# --- the objective in words -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "0.30 · CE + 0.70 · T² · KL(teacher ‖ student), T = 4"),
        ({"alpha": 0}, "0.00 · CE + 1.00 · T² · KL(teacher ‖ student), T = 4"),
        ({"alpha": 1, "temperature": 1}, "1.00 · CE + 0.00 · T² · KL(teacher ‖ student), T = 1"),
        ({"divergence": "reverse_kl", "temperature": 2.5}, "0.30 · CE + 0.70 · T² · KL(student ‖ teacher), T = 2.5"),
        ({"divergence": "jsd"}, "0.30 · CE + 0.70 · T² · JSD(½)(teacher, student), T = 4"),
        (
            {"divergence": "skew_forward_kl"},
            "0.30 · CE + 0.70 · T² · KL(teacher ‖ 0.1 teacher + 0.9 student), T = 4",
        ),
        (
            {"divergence": "skew_reverse_kl"},
            "0.30 · CE + 0.70 · T² · KL(student ‖ 0.1 student + 0.9 teacher), T = 4",
        ),
        ({"divergence": "tvd"}, "0.30 · CE + 0.70 · T² · TVD(teacher, student), T = 4"),
        ({"divergence": "alpha"}, "0.30 · CE + 0.70 · T² · α-divergence(½)(teacher, student), T = 4"),
        ({"tail": "zero"}, "0.30 · CE + 0.70 · T² · KL(teacher ‖ student), T = 4, tail = zero"),
        # A weight that is there does not read as absent.
        ({"alpha": 0.999}, "0.999 · CE + 0.001 · T² · KL(teacher ‖ student), T = 4"),
    ],
)
def test_objective(values, words):
    assert DistillConfig(output_dir="run", **values).objective() == words


@pytest.mark.parametrize("divergence", NAMES)
def test_every_divergence_has_its_own_words(divergence):
    config = DistillConfig.from_mapping({"output_dir": "run", "divergence": divergence})
    others = {DistillConfig(output_dir="run", divergence=name).objective() for name in NAMES if name != divergence}
    assert config.divergence == divergence and config.objective() not in others


# --- every field does something -------------------------------------------------------------------------------------


class Steps(Callback):
    def __init__(self):
        self.losses, self.checkpoints, self.validations = [], [], []

    def on_step_end(self, state):
        self.losses.append(state.loss)
        self.validations.append(state.metrics["loss"])

    def on_checkpoint(self, state, path):
        self.checkpoints.append(state.step)


def observe(directory, *, classes=8, context=1, teacher=FixtureTeacher, **changes):
    """A short run, and everything of it that a field could show in."""
    per_position = changes.get("per_position", False)
    values = {
        "output_dir": str(directory / "run"), "alpha": 0.5, "batch_size": 4, "epochs": 2, "checkpoint_every": 5,
    } | changes  # fmt: skip
    config = DistillConfig(**values)
    seen = Steps()
    ids = np.random.default_rng(0).integers(0, 8, size=(48, 2))
    labels = ids if per_position else ids[:, 1]
    result = Pipeline(
        config,
        teacher=teacher(classes),
        student=LogitStudent(8, context=context, learning_rate=1.0),
        batches=ArrayBatchSource(ids, labels, seed=0, held_out=0.2),
        callbacks=[seen],
    ).execute()
    log = (Path(config.output_dir) / "run.log").read_text(encoding="utf-8")
    return {
        "path": result.output_path,
        "losses": seen.losses,
        "checkpoints": seen.checkpoints,
        "kept": sorted(path.name for path in (Path(config.output_dir) / "checkpoints").iterdir()),
        "validations": len(set(seen.validations)),
        "metrics": {name: value for name, value in result.metrics.items() if name != "throughput"},
        "log_lines": log.count(": loss "),
        "logits": LogitStudent.load(result.output_path).logits_for_batch([[token] for token in range(8)]).tolist(),
    }


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    return observe(tmp_path_factory.mktemp("usual"))


@pytest.mark.parametrize(
    ("field", "value", "shows_in"),
    [
        ("temperature", 2.0, "logits"),
        ("alpha", 0.25, "logits"),
        *(("divergence", name, "logits") for name in NAMES if name != "forward_kl"),
        ("batch_size", 5, "losses"),
        ("epochs", 3, "losses"),
        ("max_steps", 7, "losses"),
        ("per_position", True, "losses"),
        ("ignore_index", 3, "logits"),
        ("validate_every", 4, "validations"),
        ("checkpoint_every", 6, "checkpoints"),
        ("keep_checkpoints", 1, "kept"),
        ("log_every", 2, "log_lines"),
    ],
)
def test_d11_changing_a_field_changes_the_run(field, value, shows_in, usual, tmp_path):
    changed = observe(tmp_path, **{field: value})
    assert changed[shows_in] != usual[shows_in]


def test_d11_changing_the_tail_changes_a_run_from_rows(tmp_path):
    class Rows(FixtureTeacher):
        def logits_for_batch(self, input_ids):
            return TopKRows.from_logits(super().logits_for_batch(input_ids), 3, 4.0)

    runs = [observe(tmp_path / tail, teacher=Rows, tail=tail)["logits"] for tail in TAILS]
    assert all(runs.count(run) == 1 for run in runs)


def test_d11_the_same_configuration_gives_the_same_run(usual, tmp_path):
    again = observe(tmp_path)
    assert {**again, "path": None} == {**usual, "path": None}
    assert len(usual["losses"]) == 20
    assert usual["checkpoints"] == [5, 10, 15, 20]
    assert usual["kept"] == ["step-0000000015", "step-0000000020"]
    assert usual["path"].parent != again["path"].parent  # output_dir


def test_d11_vocabulary_and_allow_degenerate_decide_whether_there_is_a_run(tmp_path):
    with pytest.raises(VocabularyMismatchError):
        observe(tmp_path / "a", classes=9)
    assert "discarded_teacher_mass" in observe(tmp_path / "b", classes=9, vocabulary="truncate")["metrics"]

    class Uniform(FixtureTeacher):
        def logits_for_batch(self, input_ids):
            return np.zeros((len(input_ids), 8), np.float32)

    def run(name, **values):
        config = DistillConfig(output_dir=str(tmp_path / name), max_steps=1, **values)
        batches = SyntheticBatchSource(4)
        return Pipeline(config, teacher=Uniform(8), student=LogitStudent(8), batches=batches).execute()

    with pytest.raises(DegenerateTeacherError):
        run("c")
    assert run("d", allow_degenerate=True).metrics["steps"] == 1


def test_the_tables_above_miss_no_field():
    marks = test_d11_changing_a_field_changes_the_run.pytestmark
    changed = {field for field, _, _ in next(mark for mark in marks if mark.name == "parametrize").args[1]}
    assert changed | {"output_dir", "tail", "vocabulary", "allow_degenerate"} == set(FIELDS)
