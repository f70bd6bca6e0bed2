"""Arrays of other libraries on the CUDA engine: in without a copy, out as arrays of their own.

The simulator's device is the host, so that there a stand-in with a library's attributes, and memory of NumPy's, is as
good as the library. On a device the libraries themselves are tried by ``benchmarks/gpu.py``.
"""

import ctypes
import dataclasses
import sys
from functools import partial
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

import kdcore
from kdcore.cuda import libraries, memory
from kdcore.cuda.presence import available, owns
from kdcore.errors import AliasError, DeviceMismatchError, DTypeError, ShapeError

REASON = available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
if REASON is None:
    from numba import cuda

    from kdcore.cuda import streams
    from kdcore.cuda.primitives import SIMULATOR

    if not SIMULATOR:
        pytestmark = [pytest.mark.gpu, pytest.mark.skip(reason="stand-ins have the memory of the host")]

BF16 = np.dtype(ml_dtypes.bfloat16)


class Tensor:
    """PyTorch's."""

    __module__ = "torch"

    def __init__(self, array, device=0):
        self.array = array
        self.device = SimpleNamespace(index=device)
        self.dtype = f"torch.{array.dtype.name}"
        self.shape = array.shape
        self.recorded = []

    is_cuda = True

    @property
    def __cuda_array_interface__(self):
        raise RuntimeError("refused of a tensor that requires a gradient")

    def data_ptr(self):
        return self.array.ctypes.data

    def stride(self):
        return tuple(stride // self.array.itemsize for stride in self.array.strides)

    def element_size(self):
        return self.array.itemsize

    def dim(self):
        return self.array.ndim

    def __getitem__(self, key):
        return Tensor(self.array[key, ...])

    def as_strided(self, shape, strides, offset):
        flat = self.array.reshape(-1)[offset:]
        return Tensor(np.lib.stride_tricks.as_strided(flat, shape, [s * self.array.itemsize for s in strides]))

    def view(self, shape):
        return Tensor(self.array.reshape(shape))

    def record_stream(self, stream):
        self.recorded.append(stream)


@pytest.fixture
def torch(monkeypatch):
    """A stand-in for the module, whose current stream is 77."""
    module = SimpleNamespace(
        cuda=SimpleNamespace(
            current_stream=lambda device: SimpleNamespace(cuda_stream=77),
            ExternalStream=lambda handle, device: ("stream", handle),
        ),
        device=lambda kind, index: SimpleNamespace(index=index),
        float32="float32", float64="float64", bfloat16="bfloat16", float16="float16", int32="int32", int64="int64",
        empty=lambda shape, dtype, device: Tensor(
            np.empty(shape, BF16 if dtype == "bfloat16" else dtype), device.index
        ),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", module)
    yield module
    libraries._dtype_of_torch.cache_clear()


class Cupy:
    """CuPy's ndarray."""

    __module__ = "cupy._core.core"

    def __init__(self, array):
        self.array, self.__cuda_array_interface__ = array, {}
        self.dtype, self.shape, self.strides = array.dtype, array.shape, array.strides
        self.data = Place(array.ctypes.data)
        self.device = SimpleNamespace(id=0)


class Place:
    def __init__(self, ptr):
        self.ptr = ptr

    def __add__(self, offset):
        return Place(self.ptr + offset)


class Interface:
    """Any library's, by the CUDA array interface alone."""

    def __init__(self, array, typestr=None, readonly=False, stream=None):
        self.array, self.dtype = array, array.dtype
        self.__cuda_array_interface__ = {
            "data": (array.ctypes.data, readonly), "shape": array.shape, "strides": array.strides,
            "typestr": typestr or array.dtype.str, "version": 3, "stream": stream,
        }  # fmt: skip


class Capsule:
    """Any library's, by DLPack alone: of bfloat16, which NumPy's own DLPack does not know."""

    def __init__(self, array, device=(2, 0), code=None, contiguous=False):
        self.array, self.dtype, self.where, self.streams = array, array.dtype, device, []
        codes = {"f": (2, array.itemsize * 8), "i": (0, array.itemsize * 8), "V": (4, 16)}
        kind, bits = (code, 16) if code is not None else codes[array.dtype.kind]
        self.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        self.strides = (ctypes.c_int64 * array.ndim)(*(s // array.itemsize for s in array.strides))
        self.tensor = libraries._Tensor(
            array.ctypes.data - 8, *device, array.ndim, kind, bits, 1, self.shape,
            None if contiguous else self.strides, 8,
        )  # fmt: skip

    def __dlpack_device__(self):
        return self.where

    def __dlpack__(self, *, stream):
        self.streams.append(stream)
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
        return new(ctypes.addressof(self.tensor), b"dltensor", None)


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 3, 40)).astype(np.float32)
    return student, teacher, np.array([0, 39, -100])


def call(function, *arrays):
    return function(*map(cuda.to_device, arrays), 2.0, 0.3)


def expected(student, teacher, labels):
    return call(kdcore.kd_loss_and_gradient, student, teacher, labels)


def raw(array):
    return memory.to_host(memory.as_array(array))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_pytorch(torch, rows, dtype):
    student, teacher, labels = rows[0].astype(dtype), rows[1].astype(dtype), rows[2]
    s, t, y = Tensor(student.repeat(2, axis=1)[:, ::2]), Tensor(teacher), Tensor(labels)
    result = kdcore.kd_loss_and_gradient(s, t, y, 2.0, 0.3)
    assert all(type(part).__module__ == "torch" for part in result)
    assert result.gradient.dtype == f"torch.{np.dtype(dtype).name}"
    assert (result.loss.shape, result.loss.dtype) == ((), "torch.float64")
    for ours, other in zip(expected(student, teacher, labels), result, strict=True):
        assert raw(ours).tobytes() == other.array.tobytes()
    assert not result.gradient.recorded  # allocated on the stream that it is written on
    out = Tensor(np.empty_like(student))
    assert kdcore.kd_logit_gradient(s, t, y, 2.0, 0.3, out=out) is out
    assert out.array.tobytes() == result.gradient.array.tobytes()


def test_variants_of_pytorch(torch, rows):
    student, teacher, labels = rows
    shares = np.array([[0.25, 0.75], [1.0, 0.0], [0.5, 0.5]])
    mix = partial(kdcore.mixture_kd_loss_and_gradient, temperature=2.0, alpha=0.3)
    for ours, theirs in [
        (call(kdcore.dkd_loss_and_gradient, student, teacher, labels),
         kdcore.dkd_loss_and_gradient(*map(Tensor, rows), 2.0, 0.3)),
        (call(kdcore.standardized_kd_loss_and_gradient, student, teacher, labels),
         kdcore.standardized_kd_loss_and_gradient(*map(Tensor, rows), 2.0, 0.3)),
        (mix(cuda.to_device(student), [cuda.to_device(x) for x in (teacher, student)], cuda.to_device(labels),
             teacher_weights=cuda.to_device(shares)),
         mix(Tensor(student), [Tensor(teacher), Tensor(student)], Tensor(labels), teacher_weights=Tensor(shares))),
    ]:  # fmt: skip
        assert all(type(part).__module__ == "torch" for part in theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert raw(a).tobytes() == b.array.tobytes()


def test_the_stream_that_pytorch_is_on(torch, rows):
    s = Tensor(rows[0])
    assert streams.queue_of({"s": s}, None).handle == 77
    assert streams.queue_of({"s": s}, 5).handle == 5
    assert kdcore.softmax(s, stream=5).recorded == [("stream", 5)]
    assert not kdcore.softmax(s).recorded


def test_arrays_on_two_devices(torch, rows):
    with pytest.raises(DeviceMismatchError, match="student_logits on device 0, teacher_logits on device 1"):
        kdcore.kd_loss(Tensor(rows[0]), Tensor(rows[1], device=1), None, 2.0, 0.0)


def test_cupy(monkeypatch, rows):
    module = SimpleNamespace(
        cuda=SimpleNamespace(
            get_current_stream=lambda device: SimpleNamespace(ptr=0),
            Device=lambda device: Nothing(), ExternalStream=lambda handle: Nothing(),
            Stream=SimpleNamespace(null=Nothing()),
        ),
        empty=lambda shape, dtype: Cupy(np.empty(shape, dtype)),
        ndarray=lambda shape, dtype, place, strides: (shape, dtype, place.ptr, strides),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "cupy", module)
    result = kdcore.kd_loss_and_gradient(*map(Cupy, rows), 2.0, 0.3)
    assert raw(expected(*rows).gradient).tobytes() == result.gradient.array.tobytes()
    shape, dtype, address, strides = result.kl  # the third of three numbers, as a view
    assert (shape, dtype, strides) == ((), np.float64, ())
    assert result.loss[2] == address - 16


class Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *error):
        return None


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_the_cuda_array_interface(rows, dtype):
    student, teacher, labels = rows[0].astype(dtype), rows[1].astype(dtype), rows[2]
    result = kdcore.kd_loss_and_gradient(*map(Interface, (student, teacher, labels)), 2.0, 0.3)
    for ours, other in zip(expected(student, teacher, labels), result, strict=True):
        assert type(other) is type(ours)  # Numba's
        assert raw(ours).tobytes() == raw(other).tobytes()


@pytest.mark.parametrize("kind", ["<V2", "<f2", "<u2"])
def test_bfloat16_whatever_it_is_exported_as(rows, kind):
    x = rows[0].astype(BF16)
    assert memory.as_array(Interface(x, kind)).dtype == BF16
    ours, other = kdcore.softmax(cuda.to_device(x)), kdcore.softmax(Interface(x, kind))
    assert raw(ours).tobytes() == raw(other).tobytes()


def test_a_read_only_array_is_no_output(rows):
    with pytest.raises(AliasError, match="out must be writable"):
        kdcore.softmax(Interface(rows[0]), out=Interface(np.empty_like(rows[0]), readonly=True))


def test_what_is_remembered_of_arrays_is_not_where_they_are(rows):
    """Calls with arrays of the same layouts: other values, other places, other rights."""
    student, teacher, labels = rows

    def call(out, s=student, t=teacher, y=labels, **options):
        return kdcore.kd_loss_and_gradient(Interface(s), Interface(t), Interface(y), 2.0, 0.3, out=out, **options)

    apart = np.empty_like(student)
    for k in range(3):
        s, t, y = student * (k + 1), teacher - k * student, (labels + 100 + k) % 40
        result = call(Interface(apart), s.astype(np.float32), t, y)
        other = expected(s.astype(np.float32), t, y)
        assert apart.tobytes() == raw(other.gradient).tobytes()
        assert raw(result.loss).tobytes() == raw(other.loss).tobytes()
    for out, words in (
        (Interface(teacher), "out overlaps teacher_logits"),
        (Interface(apart, readonly=True), "writable"),
    ):
        with pytest.raises(AliasError, match=words):
            call(out)
    both = np.empty((4, 40), np.float32)
    both[:3] = student
    with pytest.raises(AliasError, match="out overlaps student_logits"):
        call(Interface(both[1:]), both[:3])
    call(Interface(both[:3]), both[:3])  # in place
    assert both[:3].tobytes() == raw(expected(*rows).gradient).tobytes()
    with pytest.raises(ShapeError, match="labels must have shape"):
        call(Interface(apart), y=labels[:2])
    with pytest.raises(ShapeError, match="labels must have shape"):  # an error is not remembered as none
        call(Interface(apart), y=labels[:2])
    with pytest.raises(DTypeError, match="labels must be integers"):
        call(Interface(apart), y=labels.astype(np.float32))
    with pytest.raises(ShapeError, match="out must have shape"):
        call(Interface(apart[:2]))
    for weights in (np.array([1.0, 0.0, 2.0]), np.array([3.0, 1.0, 1.0], np.float32)):
        result = call(Interface(apart), weights=Interface(weights))
        other = kdcore.kd_loss_and_gradient(*rows, 2.0, 0.3, weights=weights)
        np.testing.assert_allclose(float(raw(result.loss)), float(other.loss), rtol=1e-6)


def test_a_number_that_the_program_knows(rows):
    """It goes to a kernel as it is, and, to one that takes an address, by an array that is made once."""
    number = memory.Number(4.0, None)
    out = memory.empty((3,), np.float64, None)
    nothing = memory.nothing(np.int64), memory.nothing(np.float64)
    kdcore.cuda.scale_rows(*nothing, -100, number, out, None)
    assert memory.to_host(out).tolist() == [0.25] * 3
    assert number.address is number.address
    on_device = [cuda.to_device(array) for array in rows]
    for options in ({"reduction": "sum"}, {"reduction": "none"}, {"denominator": 2.5}, {"denominator": 0.1}):
        ours = kdcore.kd_loss_and_gradient(*on_device, 2.0, 0.3, **options)
        host = kdcore.kd_loss_and_gradient(*rows, 2.0, 0.3, **options)
        np.testing.assert_allclose(raw(ours.loss), host.loss, rtol=1e-6)
        np.testing.assert_allclose(raw(ours.gradient), host.gradient, rtol=1e-5, atol=1e-7)
    ours = kdcore.kl_divergence(*on_device[:2], 2.0)  # whose rows count, without a mask
    np.testing.assert_allclose(float(raw(ours)), float(kdcore.kl_divergence(*rows[:2], 2.0)), rtol=1e-6)


def test_layouts_are_the_same_objects():
    x = np.zeros((3, 4, 5), np.float32)
    layouts = [memory.as_array(Interface(array)).layout for array in (x, x + 1, x[:2], x[:, 1:3], x.astype(np.float64))]
    assert layouts[0] is layouts[1]
    assert len(set(map(id, layouts))) == 4
    assert layouts[0].access is layouts[2].access is not layouts[4].access
    assert layouts[0].mergeable and layouts[0].rows.shape == (12, 5) and not layouts[3].mergeable
    assert layouts[0].rows.access is not layouts[4].rows.access


def test_parts_of_results_in_any_shape(torch, rows):
    student, teacher, labels = (np.stack([array, array]) for array in rows)
    for make in (Interface, cuda.to_device, Tensor):
        result = kdcore.kd_loss_and_gradient(*map(make, (student, teacher, labels)), 2.0, 0.3, reduction="none")
        for part in (result.loss, result.ce, result.kl):
            assert part.shape == (2, 3) and (raw(part)[0] == raw(part)[1]).all()
    assert (raw(result.loss) > 0).tolist() == [[True, True, False]] * 2


@pytest.mark.parametrize("turned", ["indices", "log_probs", "tail_logmass", "n_valid"])
def test_rows_of_a_sparse_teacher_that_are_not_contiguous(rows, turned):
    student, teacher, labels = (np.stack([array, array]) for array in rows)
    of_host = kdcore.TopKRows.from_logits(teacher, 4, 2.0)
    fields = {name: Cupy(array) for name, array in of_host.arrays().items()}
    given = [Interface(student), dataclasses.replace(of_host, **fields), Interface(labels), 2.0, 0.3]
    loss = kdcore.kd_loss(*given)
    np.testing.assert_allclose(float(raw(loss)), float(kdcore.kd_loss(student, of_host, labels, 2.0, 0.3)), rtol=1e-6)
    fields[turned] = Cupy(np.asfortranarray(fields[turned].array))
    given[1] = dataclasses.replace(of_host, **fields)
    with pytest.raises(ShapeError, match=rf"teacher_logits\.{turned} must be contiguous, got strides"):
        kdcore.kd_loss(*given)


def test_the_stream_that_an_array_was_made_on(rows):
    assert streams.queue_of({"x": Interface(rows[0], stream=2)}, None).handle == 2
    assert streams.queue_of({"x": Interface(rows[0], stream=2)}, 3).handle == 3
    assert streams.queue_of({"x": Interface(rows[0])}, None).handle == 0


def test_dtypes_that_are_no_numbers_of_ours(rows):
    swapped = np.dtype(np.float32).newbyteorder()
    for kind in ("<V4", ">f4", "<c8"):
        with pytest.raises(DTypeError, match="is not supported"):
            memory.as_array(Interface(rows[0], kind))
    with pytest.raises(DTypeError, match="is not supported"):
        memory.as_array(Capsule(rows[0].astype(BF16), code=5))
    with pytest.raises(DTypeError, match="logits must be float32"):
        kdcore.softmax(Interface(rows[2].reshape(1, 3)))
    with pytest.raises(DTypeError, match=f"^logits: .* in the order of this machine, got dtype {swapped.str}"):
        kdcore.softmax(cuda.to_device(np.ones((2, 3), swapped)))
    with pytest.raises(DTypeError, match=r"^teacher_logits: the dtype .* is not supported"):
        kdcore.kl_divergence(cuda.to_device(np.ones((2, 3), np.float32)), Interface(rows[0], "<c8"))


@pytest.mark.parametrize("name", ["labels", "weights"])
def test_arrays_of_rows_that_are_not_contiguous(name):
    logits = cuda.to_device(np.zeros((2, 3, 4), np.float32))
    given = {"labels": np.zeros((2, 3), np.int64), "weights": np.ones((2, 3))}
    given = {name: cuda.to_device(array) for name, array in given.items()}
    given[name] = cuda.to_device(np.ones((3, 2), given[name].dtype)).T
    with pytest.raises(ShapeError, match=f"^{name}: expected contiguous elements, got shape"):
        kdcore.kd_loss(logits, logits, given["labels"], 1.0, 0.5, weights=given["weights"])


@pytest.mark.parametrize("contiguous", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, BF16])
def test_dlpack(rows, dtype, contiguous):
    student, teacher, labels = rows[0].astype(dtype), rows[1].astype(dtype), rows[2]
    given = [Capsule(array, contiguous=contiguous) for array in (student, teacher, labels)]
    result = kdcore.kd_loss_and_gradient(*given, 2.0, 0.3)
    for ours, other in zip(expected(student, teacher, labels), result, strict=True):
        assert raw(ours).tobytes() == raw(other).tobytes()
    assert given[0].streams == [1]  # exported once; the legacy default stream is not 0 there
    array = memory.as_array(Capsule(student[:, ::2].T))
    assert (array.shape, array.strides) == ((20, 3), (2 * student.itemsize, 40 * student.itemsize))


def test_dlpack_of_the_host_is_the_hosts(rows):
    assert not owns(Capsule(rows[0], device=(1, 0)))
    assert owns(Capsule(rows[0], device=(13, 0)))


@pytest.mark.parametrize("x64", [True, False])
def test_jax(monkeypatch, rows, x64):
    """Arrays that cannot be written by others, and results that are there when they are handed over.

    Without float64, JAX makes float32 of it, without a word: the losses are then Numba's.
    """

    class Array(Capsule):
        __module__ = "jaxlib._jax"

        def __getitem__(self, key):
            return Array(self.array[key])

        def reshape(self, *shape):
            return Array(self.array.reshape(*shape))

        def block_until_ready(self):
            return self

    def zeros(shape, dtype):
        return Array(np.zeros(shape, np.float32 if dtype == np.float64 and not x64 else dtype))

    module = SimpleNamespace(numpy=SimpleNamespace(zeros=zeros))
    monkeypatch.setitem(sys.modules, "jax", module)
    waited = []
    monkeypatch.setattr(streams, "synchronize", waited.append)
    result = kdcore.kd_loss_and_gradient(*map(Array, rows), 2.0, 0.3)
    for name, ours, other in zip(result._fields, expected(*rows), result, strict=True):
        assert (type(other) is Array) == (x64 or name == "gradient")
        assert raw(ours).tobytes() == raw(other).tobytes()
    assert waited
    waited.clear()
    kdcore.kd_loss(*map(Array, rows), 2.0, 0.3)  # whose result may be Numba's
    assert waited
    made = memory.scratch((3,), np.int32, streams.queue_of({"x": Array(rows[0])}, None)).owner
    assert type(made) is not Array  # which JAX would use again too soon
    with pytest.raises(AliasError, match="out must be writable"):
        kdcore.softmax(Array(rows[0]), out=Array(np.zeros_like(rows[0])))


def test_labels_with_gaps(rows):
    student, teacher, labels = rows
    gaps = np.full((3, 2), 1000)
    gaps[:, 0] = labels
    apart = kdcore.kd_loss(Interface(student), Interface(teacher), Interface(gaps[:, 0]), 2.0, 0.3)
    assert raw(apart).tobytes() == raw(expected(*rows).loss).tobytes()


def test_views():
    x = np.arange(120.0).reshape(4, 5, 6)
    array = memory.as_array(Interface(x))
    for key in (
        1,
        -1,
        slice(1, 3),
        slice(None, None, -2),
        (2, 3),
        (slice(0, 0), 1),
        (1, slice(2, None), slice(0, 6, 5)),
    ):
        view = array[key]
        assert (view.shape, view.size) == (x[key].shape, x[key].size)
        np.testing.assert_array_equal(memory.to_host(view), x[key])
    with pytest.raises(IndexError):
        array[4]
    np.testing.assert_array_equal(memory.to_host(array.reshape((20, 6))), x.reshape(20, 6))

    with pytest.raises(ShapeError, match="contiguous"):
        array[:, 1:3].reshape(-1)
