"""CudaTeacher: a callable's results, what is refused of them, and checkpoints; on a GPU or in the simulator."""

import numpy as np
import pytest

from kdcore.cuda.presence import available
from kdcore.errors import (
    DeviceMismatchError,
    DeviceUnavailableError,
    DomainError,
    DTypeError,
    EmptyForwardError,
    ShapeError,
    VocabularyMismatchError,
)
from kdcore.teachers.base import TeacherLogitsProvider
from kdcore.teachers.cuda import CudaTeacher
from kdcore.teachers.mlp import MLPTeacher, save_mlp

REASON = available()
needs_cuda = pytest.mark.skipif(REASON is not None, reason=str(REASON))


def cuda_tests(function):
    return pytest.mark.gpu(needs_cuda(function))


@pytest.mark.skipif(REASON is None, reason="CUDA can run here")
def test_without_a_device_there_is_no_teacher():
    with pytest.raises(DeviceUnavailableError, match=r"\w"):
        CudaTeacher(lambda rows: None, 4)


def put(array):
    from kdcore import engines

    return engines.to_device(array)


def table(rows, dtype=np.float32):
    """[B, L, 6]: what a model says after each token, here the token's own row of a table; NaN in the padding."""
    logits = np.full((len(rows), max(row.size for row in rows), 6), np.nan, dtype)
    for i, row in enumerate(rows):
        logits[i, : row.size] = np.arange(6) * 10 + row[:, None]
    return logits


def last(rows):
    return np.stack([np.arange(6) * 10 + row[-1] for row in rows]).astype(np.float32)


ROWS = [[1, 2, 3], [4], [5, 0]]


@cuda_tests
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, "bfloat16"])
@pytest.mark.parametrize("forward", [table, last])
def test_a_callable(forward, dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    seen = []

    def on_device(rows):
        seen.append(rows)
        return put(forward(rows).astype(dtype))

    teacher = CudaTeacher(on_device, 6)
    assert isinstance(teacher, TeacherLogitsProvider)
    assert teacher.vocab_size == 6
    expected = last([np.array(row) for row in ROWS])
    got = teacher.logits_for_batch(ROWS)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, expected)
    assert [row.tolist() for row in seen[0]] == ROWS

    logits, mask = teacher.logits_per_position(ROWS)
    assert mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    np.testing.assert_array_equal(logits[mask], np.arange(6) * 10 + np.concatenate(ROWS)[:, None])
    assert not logits[~mask].any()


@cuda_tests
def test_device_logits_are_what_the_forward_returned():
    array = put(np.zeros((3, 6), np.float32))
    assert CudaTeacher(lambda rows: array, 6).device_logits_for_batch(ROWS) is array


@cuda_tests
def test_no_rows():
    teacher = CudaTeacher(lambda rows: put(np.zeros((len(rows), 6), np.float32)), 6)
    assert teacher.logits_for_batch([]).shape == (0, 6)
    logits, mask = teacher.logits_per_position([[], []])
    assert logits.shape == (2, 0, 6)
    assert mask.shape == (2, 0)


@cuda_tests
@pytest.mark.parametrize(
    ("result", "error", "words"),
    [
        (None, EmptyForwardError, "returned None for 3 rows"),
        (np.zeros((0, 6), np.float32), EmptyForwardError, "nothing for 3 rows"),
        (np.zeros((3, 0), np.float32), EmptyForwardError, "nothing for 3 rows"),
        (np.zeros((3, 7), np.float32), VocabularyMismatchError, "7 classes.*6.*drifted apart"),
        (np.zeros((2, 6), np.float32), ShapeError, "2 rows for 3"),
        (np.zeros((3, 4, 6), np.float32), ShapeError, "4 positions; the longest row has 3"),
        (np.zeros(6, np.float32), ShapeError, r"got shape \(6,\)"),
        (np.zeros((3, 6), np.int64), DTypeError, "int64"),
    ],
)
def test_results_that_do_not_fit(result, error, words):
    teacher = CudaTeacher(lambda rows: None if result is None else put(result), 6)
    for method in (teacher.logits_for_batch, teacher.device_logits_for_batch, teacher.logits_per_position):
        with pytest.raises(error, match=words):
            method(ROWS)


@cuda_tests
def test_a_host_array():
    teacher = CudaTeacher(lambda rows: np.zeros((3, 6), np.float32), 6)
    with pytest.raises(DeviceMismatchError, match="ndarray on the host"):
        teacher.logits_for_batch(ROWS)


@cuda_tests
def test_a_number_beyond_float32():
    teacher = CudaTeacher(lambda rows: put(np.full((3, 6), 1e300)), 6)
    with pytest.raises(DomainError, match=r"1e\+300, which does not fit"):
        teacher.logits_for_batch(ROWS)


@cuda_tests
def test_an_empty_row_has_no_last_position():
    teacher = CudaTeacher(lambda rows: put(np.zeros((2, 1, 6), np.float32)), 6)
    with pytest.raises(ShapeError, match=r"input_ids\[1\] is empty"):
        teacher.logits_for_batch([[1], []])


@cuda_tests
def test_arguments_that_do_not_go_together():
    with pytest.raises(DomainError, match="vocab_size is needed"):
        CudaTeacher(lambda rows: None)
    with pytest.raises(DomainError, match="for a path"):
        CudaTeacher(lambda rows: None, 6, activation="relu")
    with pytest.raises(DTypeError, match="callable or a path, got int"):
        CudaTeacher(7, 6)


@cuda_tests
def test_a_checkpoint_is_an_mlp_on_the_device(tmp_path):
    rng = np.random.default_rng(0)
    layers = [(rng.normal(size=(5, 4)), rng.normal(size=5)), (rng.normal(size=(6, 5)), rng.normal(size=6))]
    save_mlp(tmp_path / "mlp", layers, activation="gelu", embedding=rng.normal(size=(6, 2)))
    on_device, on_host = CudaTeacher(tmp_path / "mlp"), MLPTeacher(tmp_path / "mlp")
    assert on_device.vocab_size == 6
    np.testing.assert_allclose(on_device.logits_for_batch(ROWS), on_host.logits_for_batch(ROWS), rtol=1e-5, atol=1e-6)
    for x, y in zip(on_device.logits_per_position(ROWS), on_host.logits_per_position(ROWS), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
    assert not isinstance(on_device.device_logits_for_batch(ROWS), np.ndarray)
    with pytest.raises(VocabularyMismatchError, match="drifted apart"):
        CudaTeacher(str(tmp_path / "mlp"), 7)
    with pytest.raises(FileNotFoundError):
        CudaTeacher(tmp_path / "missing")
