"""The public operations on device arrays: the answers of the host, on a GPU or in Numba's simulator."""

import ml_dtypes
import numpy as np
import pytest

import kdcore
from kdcore import divergences
from kdcore.cuda.presence import available
from kdcore.engines import to_device

REASON = available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
if REASON is None:
    from numba import cuda

    from kdcore.cuda.primitives import SIMULATOR

#: Relative to the largest number: two engines within their bounds, and one rounding of 16-bit results.
TOLERANCE = {"float64": 1e-12, "float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}
DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16]


@pytest.fixture
def batch():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 2, 3, 17)) * 3
    student[0, 0, 3] = teacher[0, 0, 3] = teacher[1, 1, 5] = -np.inf
    labels = rng.integers(4, 17, (2, 3))
    labels[1, 2] = -100
    return student, teacher, labels, rng.random((2, 3))


def on_device(*arrays):
    return [to_device(array) for array in arrays]


def assert_same(host, device, dtype):
    result = device.copy_to_host()
    assert result.shape == np.shape(host)
    assert result.dtype == np.asarray(host).dtype
    host, result = np.asarray(host, np.float64), np.asarray(result, np.float64)
    np.testing.assert_array_equal(np.isfinite(result), np.isfinite(host))
    finite = np.isfinite(host)
    scale = np.abs(host[finite]).max()
    assert np.abs(result[finite] - host[finite]).max() <= TOLERANCE[np.dtype(dtype).name] * scale


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kd(batch, dtype, reduction):
    student, teacher, labels, weights = batch
    arrays = student.astype(dtype), teacher.astype(dtype), labels
    host = kdcore.kd_loss_and_gradient(*arrays, 2.0, 0.3, weights=weights, reduction=reduction)
    given = on_device(*arrays)
    device = kdcore.kd_loss_and_gradient(*given, 2.0, 0.3, weights=on_device(weights)[0], reduction=reduction)
    for ours, theirs in zip(host, device, strict=True):
        assert_same(ours, theirs, dtype)


def test_sums_of_rows_that_are_infinite(batch):
    """A row that the student rules out makes the mean infinite, not undefined."""
    student, teacher, labels, _ = batch
    student[0, 1, 2] = student[1, 1, labels[1, 1]] = -np.inf
    host = kdcore.kd_loss_and_gradient(student, teacher, labels, 2.0, 0.3)
    device = kdcore.kd_loss_and_gradient(*on_device(student, teacher, labels), 2.0, 0.3)
    assert [float(part.copy_to_host()) for part in (device.loss, device.ce, device.kl)] == [np.inf] * 3
    assert host.loss == host.ce == host.kl == np.inf
    assert_same(host.gradient, device.gradient, "float64")


def test_parts_of_the_objective(batch):
    student, teacher, labels, _ = batch
    s, t, y = on_device(student, teacher, labels)
    assert_same(kdcore.kd_loss(student, teacher, labels, 3.0, 0.5), kdcore.kd_loss(s, t, y, 3.0, 0.5), "float64")
    assert_same(kdcore.cross_entropy(student, labels), kdcore.cross_entropy(s, y), "float64")
    assert_same(kdcore.kl_divergence(student, teacher, 2.0), kdcore.kl_divergence(s, t, 2.0), "float64")
    only = kdcore.kd_loss_and_gradient(s, t, None, 3.0, 0.0, denominator=7.0)
    assert only.ce is None
    assert_same(kdcore.kd_loss(student, teacher, None, 3.0, 0.0, denominator=7.0), only.loss, "float64")


@pytest.mark.parametrize("divergence", [*divergences.NAMES, divergences.jsd(0.2)], ids=str)
def test_divergences(batch, divergence):
    student, teacher, labels, _ = batch
    teacher[1, 1, 5] = 0
    arrays = [array[:1].astype(np.float32) for array in (student, teacher)]
    options = {"divergence": divergence, "reduction": "none"}
    host = kdcore.kd_loss_and_gradient(*arrays, labels[:1], 2.0, 0.3, **options)
    device = kdcore.kd_loss_and_gradient(*on_device(*arrays, labels[:1]), 2.0, 0.3, **options)
    for ours, theirs in zip(host, device, strict=True):
        assert_same(ours, theirs, "float32")


def test_reverse_kl_without_a_gradient(batch):
    student, teacher, _, _ = batch
    s, t = on_device(student, teacher)
    host = kdcore.kd_loss_and_gradient(student, teacher, None, 2.0, 0.0, divergence="reverse_kl", reduction="none")
    device = kdcore.kd_loss_and_gradient(s, t, None, 2.0, 0.0, divergence="reverse_kl", reduction="none")
    assert np.isinf(host.loss[1, 1])
    assert np.isnan(host.gradient[1, 1]).all()
    assert_same(host.loss, device.loss, "float64")
    assert_same(host.gradient, device.gradient, "float64")
    with pytest.raises(kdcore.UndefinedGradientError, match=r"student_logits\[1, 1\]"):
        kdcore.kd_logit_gradient(s, t, None, 2.0, 0.0, divergence="reverse_kl", validate=True)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_row_operations(batch, dtype, name):
    logits = batch[1].astype(dtype)
    operation = getattr(kdcore, name)
    assert_same(operation(logits, 0.5), operation(*on_device(logits), 0.5), dtype)


def test_in_place_and_out(batch):
    student, teacher, labels, _ = batch
    s, t, y = on_device(student, teacher, labels)
    expected = kdcore.kd_logit_gradient(student, teacher, labels, 2.0, 0.3)
    out = cuda.device_array(student.shape, np.float64)
    assert kdcore.kd_logit_gradient(s, t, y, 2.0, 0.3, out=out) is out
    assert_same(expected, out, "float64")
    assert kdcore.kd_logit_gradient(s, t, y, 2.0, 0.3, out=s) is s
    np.testing.assert_array_equal(s.copy_to_host(), out.copy_to_host())
    with pytest.raises(kdcore.AliasError, match="out overlaps teacher_logits"):
        kdcore.kd_logit_gradient(out, t, y, 2.0, 0.3, out=t)


def test_a_stream(batch):
    student, teacher, labels, _ = batch
    stream = cuda.stream()
    s, t, y = (cuda.to_device(array, stream=stream) for array in (student, teacher, labels))
    loss = kdcore.kd_loss(s, t, y, 2.0, 0.3, stream=stream)
    stream.synchronize()
    assert_same(kdcore.kd_loss(student, teacher, labels, 2.0, 0.3), loss, "float64")
    with pytest.raises(kdcore.DomainError, match="threads=2 is for host arrays"):
        kdcore.kd_loss(s, t, y, 2.0, 0.3, threads=2)


def test_nothing_is_checked_unless_asked(batch):
    student, teacher, labels, _ = batch
    student[1, 0, 2] = np.nan
    labels[0, 1] = 17
    s, t, y = on_device(student, teacher, labels)
    result = kdcore.kd_loss_and_gradient(s, t, y, 2.0, 0.3, reduction="none")
    assert np.argwhere(np.isnan(result.loss.copy_to_host())).tolist() == [[0, 1], [1, 0]]
    assert np.isnan(result.gradient.copy_to_host()).all(axis=-1).sum() == 2
    with pytest.raises(kdcore.LabelError, match=r"labels\[0, 1\] is 17"):
        kdcore.kd_loss(s, t, y, 2.0, 0.3, validate=True)
    labels[0, 1] = 0
    with pytest.raises(kdcore.NonFiniteError, match=r"student_logits\[1, 0, 2\] is nan"):
        kdcore.kd_loss(s, t, *on_device(labels), 2.0, 0.3, validate=True)


def test_a_mix_of_host_and_device_is_an_error(batch):
    student, teacher, labels, weights = batch
    s, t, y = on_device(student, teacher, labels)
    with pytest.raises(kdcore.DeviceMismatchError, match="student_logits, labels on a device, teacher_logits not"):
        kdcore.kd_loss(s, teacher, y, 2.0, 0.3)
    with pytest.raises(kdcore.DeviceMismatchError, match="weights not"):
        kdcore.kd_loss(s, t, y, 2.0, 0.3, weights=weights)


class Foreign:
    """Another library's array, by the interface alone."""

    def __init__(self, array):
        self.array = array
        self.dtype = array.dtype
        self.__cuda_array_interface__ = array.__cuda_array_interface__


def test_any_array_with_the_cuda_array_interface(batch):
    if SIMULATOR:
        pytest.skip("the simulator's arrays have no address on a device")
    student, teacher, labels, _ = batch
    s, t, y = (Foreign(array) for array in on_device(student, teacher, labels))
    assert_same(
        kdcore.kd_logit_gradient(student, teacher, labels, 2.0, 0.3),
        kdcore.kd_logit_gradient(s, t, y, 2.0, 0.3),
        "float64",
    )
