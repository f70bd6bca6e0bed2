"""Bad arguments: a typed error at entry that names the argument, the value (or its place) and what was expected."""

from __future__ import annotations

import builtins
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import kdcore
from kdcore import errors
from kdcore.ops import multiply_rows

INF, NAN = np.inf, np.nan


def logits(shape=(2, 3), dtype=np.float32):
    return np.zeros(shape, dtype)


def holding(value, place, shape=(2, 2, 3)):
    x = logits(shape)
    x[place] = value
    return x


def read_only(shape=(2, 3)):
    x = logits(shape)
    x.flags.writeable = False
    return x


def kd(**changes):
    """A good call but for ``changes``; a callable is a value made from the student."""
    arguments = {
        "student_logits": logits(),
        "teacher_logits": logits(),
        "labels": [0, 1],
        "temperature": 2.0,
        "alpha": 0.5,
        **changes,
    }
    for name, value in arguments.items():
        if callable(value):
            arguments[name] = value(arguments["student_logits"])
    return kdcore.kd_loss_and_gradient(**arguments)


def kd_deep(**changes):
    """The same on logits [2, 2, 3]."""
    shapes = {"student_logits": logits((2, 2, 3)), "teacher_logits": logits((2, 2, 3)), "labels": [[0, 1], [2, 0]]}
    return kd(**{**shapes, **changes})


# Arguments of kd that are wrong: changes, error, builtin that it also is, fragments of the sentence.
BAD = {
    # temperature
    "T zero": ({"temperature": 0}, "DomainError", "ValueError", ["temperature", "positive", "got 0"]),
    "T negative": ({"temperature": -1.5}, "DomainError", "ValueError", ["temperature", "-1.5"]),
    "T nan": ({"temperature": NAN}, "DomainError", "ValueError", ["temperature", "nan"]),
    "T inf": ({"temperature": INF}, "DomainError", "ValueError", ["temperature", "inf"]),
    "T string": ({"temperature": "2"}, "DTypeError", "TypeError", ["temperature", "'2'"]),
    "T none": ({"temperature": None}, "DTypeError", "TypeError", ["temperature", "None"]),
    "T bool": ({"temperature": True}, "DTypeError", "TypeError", ["temperature", "True"]),
    "T complex": ({"temperature": 2j}, "DTypeError", "TypeError", ["temperature", "2j"]),
    "T out of float64": ({"temperature": 10**400}, "DomainError", "ValueError", ["temperature"]),
    "T squared underflows": ({"temperature": 1e-200}, "DomainError", "ValueError", ["temperature", "1e-200"]),
    "T teacher": ({"teacher_temperature": 0.0}, "DomainError", "ValueError", ["teacher_temperature", "0.0"]),
    # alpha
    "alpha above": ({"alpha": 1.5}, "DomainError", "ValueError", ["alpha", "[0, 1]", "1.5"]),
    "alpha below": ({"alpha": -1e-9}, "DomainError", "ValueError", ["alpha", "-1e-09"]),
    "alpha nan": ({"alpha": NAN}, "DomainError", "ValueError", ["alpha", "nan"]),
    "alpha list": ({"alpha": [0.5]}, "DTypeError", "TypeError", ["alpha", "[0.5]"]),
    # labels
    "label V": ({"labels": [0, 3]}, "LabelError", "ValueError", ["labels[1] is 3", "[0, 3)", "-100"]),
    "label negative": ({"labels": [-1, 0]}, "LabelError", "ValueError", ["labels[0] is -1"]),
    "label V, alpha 0": ({"labels": [0, 3], "alpha": 0.0}, "LabelError", "ValueError", ["labels[1] is 3"]),
    "label -100 is not ignore_index": (
        {"labels": [-100, 0], "ignore_index": -1},
        "LabelError",
        "ValueError",
        ["labels[0] is -100", "ignore_index=-1"],
    ),
    "labels float": ({"labels": [0.0, 1.0]}, "DTypeError", "TypeError", ["labels", "float64"]),
    "labels bool": ({"labels": [True, False]}, "DTypeError", "TypeError", ["labels", "bool"]),
    "labels one short": ({"labels": [0]}, "ShapeError", "ValueError", ["labels", "(2,)", "(1,)"]),
    "labels a column": ({"labels": [[0], [1]]}, "ShapeError", "ValueError", ["labels", "(2, 1)"]),
    "labels none": ({"labels": None}, "LabelError", "ValueError", ["labels", "alpha", "0.5"]),
    "labels uint64": ({"labels": np.array([2**64 - 100, 0], "u8")}, "LabelError", "ValueError", [str(2**64 - 100)]),
    "labels ragged": ({"labels": [[0], [1, 2]]}, "ShapeError", "ValueError", ["labels"]),
    "ignore_index float": ({"ignore_index": -100.0}, "DTypeError", "TypeError", ["ignore_index", "-100.0"]),
    "ignore_index beyond int64": ({"ignore_index": 2**70}, "DomainError", "ValueError", ["ignore_index", str(2**70)]),
    # weights
    "weight negative": ({"weights": [1, -2.5]}, "DomainError", "ValueError", ["weights[1] is -2.5"]),
    "weight nan": ({"weights": [NAN, 1]}, "DomainError", "ValueError", ["weights[0] is nan"]),
    "weight inf": ({"weights": [INF, 1]}, "DomainError", "ValueError", ["weights[0] is inf"]),
    "weights complex": ({"weights": [1j, 1]}, "DTypeError", "TypeError", ["weights", "complex128"]),
    "weights shape": ({"weights": [1, 1, 1]}, "ShapeError", "ValueError", ["weights", "(2,)", "(3,)"]),
    "weights a number": ({"weights": 1.0}, "ShapeError", "ValueError", ["weights", "()"]),
    # reduction, denominator
    "reduction": ({"reduction": "batchmean"}, "DomainError", "ValueError", ["reduction", "'mean'", "'batchmean'"]),
    "reduction none": ({"reduction": None}, "DomainError", "ValueError", ["reduction", "None"]),
    "denominator zero": ({"denominator": 0}, "DomainError", "ValueError", ["denominator", "0"]),
    "denominator inf": ({"denominator": INF}, "DomainError", "ValueError", ["denominator", "inf"]),
    "denominator nan": ({"denominator": NAN}, "DomainError", "ValueError", ["denominator", "nan"]),
    "denominator negative": ({"denominator": -3.5}, "DomainError", "ValueError", ["denominator", "-3.5"]),
    "denominator string": ({"denominator": "4"}, "DTypeError", "TypeError", ["denominator", "'4'"]),
    "denominator, sum": ({"denominator": 4, "reduction": "sum"}, "DomainError", "ValueError", ["denominator", "sum"]),
    "denominator, none": ({"denominator": 4, "reduction": "none"}, "DomainError", "ValueError", ["4", "'none'"]),
    # other options
    "divergence": ({"divergence": "kl"}, "DomainError", "ValueError", ["divergence", "'forward_kl'", "'kl'"]),
    "divergence list": ({"divergence": ["kl"]}, "DomainError", "ValueError", ["divergence", "['kl']"]),
    "scale_t2": ({"scale_t2": 1}, "DTypeError", "TypeError", ["scale_t2", "got 1"]),
    "validate": ({"validate": "yes"}, "DTypeError", "TypeError", ["validate", "'yes'"]),
    "threads zero": ({"threads": 0}, "DomainError", "ValueError", ["threads", "got 0"]),
    "threads negative": ({"threads": -2}, "DomainError", "ValueError", ["threads", "-2"]),
    "threads float": ({"threads": 1.5}, "DTypeError", "TypeError", ["threads", "1.5"]),
    "threads bool": ({"threads": True}, "DTypeError", "TypeError", ["threads", "True"]),
    "stream on the host": ({"stream": 7}, "DomainError", "ValueError", ["stream", "7", "device"]),
    # logits
    "V = 0": ({"student_logits": logits((2, 0))}, "ShapeError", "ValueError", ["student_logits", "(2, 0)"]),
    "0-d": ({"student_logits": np.float32(1)}, "ShapeError", "ValueError", ["student_logits", "0-d"]),
    "student int": ({"student_logits": logits(dtype=int)}, "DTypeError", "TypeError", ["student_logits", "int64"]),
    "student complex": ({"student_logits": logits(dtype="c8")}, "DTypeError", "TypeError", ["student_", "complex64"]),
    "student object": ({"student_logits": logits(dtype=object)}, "DTypeError", "TypeError", ["student_", "object"]),
    "student bool": ({"student_logits": logits(dtype=bool)}, "DTypeError", "TypeError", ["student_logits", "bool"]),
    "student none": ({"student_logits": None}, "DTypeError", "TypeError", ["student_logits", "object"]),
    "student ragged": ({"student_logits": [[0.0], [1.0, 2.0]]}, "ShapeError", "ValueError", ["student_logits"]),
    "teacher int": ({"teacher_logits": logits(dtype=np.int32)}, "DTypeError", "TypeError", ["teacher_", "int32"]),
    "teacher longdouble": (
        {"teacher_logits": logits(dtype=np.longdouble)},
        "DTypeError",
        "TypeError",
        ["teacher_logits", np.dtype(np.longdouble).name],
    ),
    "teacher none": ({"teacher_logits": None}, "DTypeError", "TypeError", ["teacher_logits"]),
    "teacher none, alpha 0": ({"teacher_logits": None, "alpha": 0.0}, "DTypeError", "TypeError", ["teacher_logits"]),
    "teacher wider": ({"teacher_logits": logits((2, 4))}, "ShapeError", "ValueError", ["teacher_", "(2, 3)", "(2, 4)"]),
    "teacher shorter": ({"teacher_logits": logits((1, 3))}, "ShapeError", "ValueError", ["teacher_logits", "(1, 3)"]),
    "student masked": ({"student_logits": np.ma.zeros((2, 3))}, "DTypeError", "TypeError", ["student_", "masked"]),
    "labels masked": ({"labels": np.ma.array([0, 1])}, "DTypeError", "TypeError", ["labels", "masked"]),
    "student big-endian": ({"student_logits": logits(dtype=">f4")}, "DTypeError", "TypeError", ["student_", ">f4"]),
    "labels big-endian": ({"labels": np.array([0, 1], ">i4")}, "DTypeError", "TypeError", ["labels", ">i4"]),
    # out
    "out read-only": ({"out": read_only()}, "AliasError", "ValueError", ["out", "read-only"]),
    "out shape": ({"out": logits((3, 2))}, "ShapeError", "ValueError", ["out", "(2, 3)", "(3, 2)"]),
    "out int": ({"out": logits(dtype=int)}, "DTypeError", "TypeError", ["out", "int64"]),
    "out list": ({"out": [[0.0] * 3] * 2}, "DTypeError", "TypeError", ["out", "list"]),
    "out reversed student": ({"out": lambda s: s[:, ::-1]}, "AliasError", "ValueError", ["out", "student_logits"]),
    "out half of the student": (
        {"student_logits": logits(4)[:3], "teacher_logits": logits(3), "labels": 0, "out": lambda s: s.base[1:]},
        "AliasError",
        "ValueError",
        ["out", "student_logits"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    changes, error, builtin, fragments = BAD[case]
    with pytest.raises(getattr(errors, error)) as caught:
        kd(**changes)
    assert isinstance(caught.value, errors.KdcoreError)
    assert isinstance(caught.value, getattr(builtins, builtin))
    for fragment in fragments:
        assert fragment in str(caught.value)


def test_out_may_not_be_another_input():
    teacher = logits()
    with pytest.raises(kdcore.AliasError, match="teacher_logits"):
        kd(teacher_logits=teacher, out=teacher)
    weights = np.ones(6)
    with pytest.raises(kdcore.AliasError, match="weights"):
        kd(student_logits=logits((3, 2)), teacher_logits=logits((3, 2)), labels=[0, 1, 1], weights=weights[::2],
           out=weights.reshape(3, 2))  # fmt: skip


def test_out_may_not_overlap_itself():
    cells = np.zeros(4, np.float32)
    out = np.lib.stride_tricks.as_strided(cells, (2, 3), (4, 4))
    with pytest.raises(kdcore.AliasError, match="out"):
        kd(out=out)


PLACES = [
    ("student_logits", (1, 0, 2), NAN, "student_logits[1, 0, 2] is nan"),
    ("teacher_logits", (0, 1, 0), NAN, "teacher_logits[0, 1, 0] is nan"),
    ("student_logits", (1, 1, 1), INF, "student_logits[1, 1, 1] is +inf"),
    ("teacher_logits", (0, 0, 2), INF, "teacher_logits[0, 0, 2] is +inf"),
    ("student_logits", (1, 0), -INF, "student_logits[1, 0] is -inf in every class"),
    ("teacher_logits", (0, 1), -INF, "teacher_logits[0, 1] is -inf in every class"),
]


@pytest.mark.parametrize(("name", "place", "value", "sentence"), PLACES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("validate", [None, True])
def test_unusable_rows_are_named_by_their_whole_index(name, place, value, sentence, dtype, validate):
    changes = {key: logits((2, 2, 3), dtype) for key in ("student_logits", "teacher_logits")}
    changes[name] = holding(value, place).astype(dtype)
    with pytest.raises(kdcore.NonFiniteError) as caught:
        kd_deep(validate=validate, **changes)
    assert sentence in str(caught.value)
    assert isinstance(caught.value, ValueError)


def test_the_first_unusable_position_of_three_dimensions():
    x = logits((2, 3, 5))
    x[1, 2, 3] = NAN
    with pytest.raises(kdcore.NonFiniteError, match=r"logits\[1, 2, 3\] is nan"):
        kdcore.softmax(x)
    x[0, 2, 4] = NAN
    with pytest.raises(kdcore.NonFiniteError, match=r"logits\[0, 2, 4\] is nan"):
        kdcore.logsumexp(x)
    with pytest.raises(kdcore.NonFiniteError, match=r"^logits\[4\] is nan"):
        kdcore.log_softmax(x[0, 2])
    # A transposed batch is worked in several blocks; its index is still that of the caller's array.
    with pytest.raises(kdcore.NonFiniteError, match=r"logits\[2, 0, 4\] is nan"):
        kdcore.softmax(x.transpose(1, 0, 2))


def test_labels_and_weights_are_named_by_their_whole_index():
    with pytest.raises(kdcore.LabelError, match=r"labels\[1, 0\] is 7"):
        kd_deep(labels=[[0, 1], [7, 9]])
    with pytest.raises(kdcore.DomainError, match=r"weights\[0, 1\] is -1.0"):
        kd_deep(weights=[[1, -1], [1, 1]])
    with pytest.raises(kdcore.LabelError, match=r"^labels is 3"):
        kd(student_logits=logits(3), teacher_logits=logits(3), labels=3)


@pytest.mark.parametrize("operation", ["softmax", "log_softmax", "logsumexp"])
@pytest.mark.parametrize(
    ("arguments", "options", "error", "fragment"),
    [
        ([logits((2, 0))], {}, "ShapeError", "(2, 0)"),
        ([np.float64(1)], {}, "ShapeError", "0-d"),
        ([logits(dtype=np.int64)], {}, "DTypeError", "int64"),
        ([logits(), 0.0], {}, "DomainError", "0.0"),
        ([logits(), NAN], {}, "DomainError", "nan"),
        ([logits()], {"threads": 0}, "DomainError", "got 0"),
        ([logits()], {"stream": 1}, "DomainError", "stream"),
        ([logits()], {"validate": 1}, "DTypeError", "got 1"),
        ([logits()], {"out": logits((2, 2))}, "ShapeError", "(2, 2)"),
        ([np.ma.zeros((2, 3))], {}, "DTypeError", "masked"),
        ([holding(NAN, (1, 1), (2, 3))], {}, "NonFiniteError", "logits[1, 1] is nan"),
    ],
)
def test_bad_arguments_of_row_operations(operation, arguments, options, error, fragment):
    with pytest.raises(getattr(errors, error)) as caught:
        getattr(kdcore, operation)(*arguments, **options)
    assert fragment in str(caught.value)


@pytest.mark.parametrize("entry", ["kd_loss", "kd_logit_gradient", "kl_divergence", "cross_entropy"])
def test_every_entry_validates(entry):
    x = holding(NAN, (1, 2), (2, 3))
    arguments = {
        "kd_loss": (x, logits(), [0, 1], 2.0, 0.5),
        "kd_logit_gradient": (x, logits(), [0, 1], 2.0, 0.5),
        "kl_divergence": (x, logits(), 2.0),
        "cross_entropy": (x, [0, 1]),
    }[entry]
    with pytest.raises(kdcore.NonFiniteError, match=r"student_logits\[1, 2\] is nan"):
        getattr(kdcore, entry)(*arguments)
    with pytest.raises(kdcore.DomainError, match="reduction"):
        getattr(kdcore, entry)(logits(), *arguments[1:], reduction="average")


@pytest.mark.parametrize("teacher", [None, "absent"])
def test_kl_divergence_needs_a_teacher(teacher):
    with pytest.raises(kdcore.DTypeError, match="teacher_logits"):
        kdcore.kl_divergence(logits(), teacher)


def test_cross_entropy_needs_labels():
    with pytest.raises(kdcore.LabelError, match="labels"):
        kdcore.cross_entropy(logits(), None)


@pytest.mark.parametrize("value", ["abc", "0", "-3", "2.5", "9" * 70])
def test_environment_variable_of_threads(monkeypatch, value):
    monkeypatch.setenv("KDCORE_NUM_THREADS", value)
    with pytest.raises(kdcore.DomainError) as caught:
        kd()
    assert "KDCORE_NUM_THREADS" in str(caught.value) and value in str(caught.value)
    assert kd(threads=1).loss > 0  # an explicit argument does not ask the environment
    monkeypatch.setenv("KDCORE_NUM_THREADS", "3")
    assert kd().loss > 0


def test_numbers_of_other_kinds_are_taken():
    expected = kd(temperature=0.5, alpha=0.5)
    for kind in (Fraction, np.float32, np.float16):
        actual = kd(temperature=kind(0.5), alpha=kind(0.5))
        assert actual.loss == expected.loss > 0


def test_overflow_of_the_denominator_is_not_hidden():
    # Neither a loss of 0 nor NaN for rows that are finite: an error, or the right number.
    with pytest.raises(kdcore.DomainError):
        kd(denominator=1e-320)
    with pytest.raises(kdcore.DomainError):
        kd(weights=[1e308, 1e308])


class OnDevice:
    """What an array on a CUDA device shows of itself."""

    __cuda_array_interface__ = {  # noqa: RUF012
        "shape": (2, 3), "typestr": "<f4", "data": (0, False), "version": 3
    }  # fmt: skip


@pytest.mark.parametrize("name", ["student_logits", "teacher_logits", "labels", "weights", "out"])
def test_a_mixture_of_host_and_device_is_an_error(name):
    with pytest.raises(kdcore.DeviceMismatchError, match=rf"{name} on a device") as caught:
        kd(**{name: OnDevice()})
    assert isinstance(caught.value, TypeError)


def test_threads_are_for_host_arrays():
    with pytest.raises(kdcore.DomainError, match="threads=2"):
        kdcore.softmax(OnDevice(), threads=2)


def test_inputs_are_left_alone_by_an_error():
    student, out = logits(), np.full((2, 3), 5.0, np.float32)
    with pytest.raises(kdcore.LabelError):
        kd(student_logits=student, labels=[0, 3], out=out)
    np.testing.assert_array_equal(out, 5.0)  # labels are checked before anything is written
    np.testing.assert_array_equal(student, 0.0)


def test_rows_times_factors():
    rows, factors = np.arange(12.0).reshape(2, 2, 3), np.array([[1.0, 2.0], [0.5, -1.0]])
    expected = rows * factors[..., None]
    assert multiply_rows(rows, factors) is None
    np.testing.assert_array_equal(rows, expected)
    turned = np.asfortranarray(rows)
    multiply_rows(turned, factors.T.copy().T)
    np.testing.assert_array_equal(turned, expected * factors[..., None])
    row = np.ones(3, np.float16)
    multiply_rows(row, np.float32(1 / 3))
    assert row.tolist() == [float(np.float16(1 / 3))] * 3
    with pytest.raises(kdcore.ShapeError, match=r"factors must have shape \(2, 2\) like rows without their classes"):
        multiply_rows(rows, factors[0])
    with pytest.raises(kdcore.DTypeError, match="factors must be floating-point numbers, got dtype int64"):
        multiply_rows(rows, np.ones((2, 2), np.int64))
    with pytest.raises(kdcore.DTypeError, match="rows must be float32"):
        multiply_rows(np.ones((2, 3), np.int64), np.ones(2))
    with pytest.raises(kdcore.AliasError, match="out overlaps factors"):
        multiply_rows(rows, rows[..., 0])
    rows.flags.writeable = False
    with pytest.raises(kdcore.AliasError, match="writable"):
        multiply_rows(rows, factors)
