"""Logits from the host to a device, beside the work there: order, values, buffers, errors; on a GPU or simulated."""

import gc
import random
import threading
from collections import deque

import numpy as np
import pytest

import kdcore
from kdcore.cuda.presence import available
from kdcore.errors import DeviceMismatchError, DeviceUnavailableError, DomainError, DTypeError, MissingRowError
from kdcore.hdf5 import save_teacher_logits
from kdcore.teachers.cuda import CudaTeacher, device_batches
from kdcore.teachers.fixture import FixtureTeacher
from kdcore.teachers.hdf5 import HDF5Teacher
from kdcore.teachers.mlp import MLPTeacher, save_mlp
from kdcore.testing.bounds import gradient_error, kd_bounds, within

REASON = available()
needs_cuda = pytest.mark.skipif(REASON is not None, reason=str(REASON))
if REASON is None:
    from numba import cuda

    from kdcore import engines
    from kdcore.cuda import memory, transfers
    from kdcore.cuda.primitives import SIMULATOR
    from kdcore.cuda.streams import launch

N, V = 40, 7
#: Row numbers, ragged batches with empty ones among them: first, in the middle and last.
BATCHES = [[], [3], [1, 2, 3, 4], [5, 5], [], [0], [39, 38, 37, 36, 35], [7], [8, 9], [10, 11, 12], [13], []]


def cuda_tests(function):
    return pytest.mark.gpu(needs_cuda(function))


@pytest.mark.skipif(REASON is None, reason="CUDA can run here")
def test_without_a_device_nothing_is_streamed():
    with pytest.raises(DeviceUnavailableError, match=r"\w"):
        device_batches(FixtureTeacher(4), [[[1]]])


@pytest.fixture
def logits():
    return np.random.default_rng(0).normal(size=(N, V)).astype(np.float32) * 3


@pytest.fixture
def teacher(tmp_path, logits):
    save_teacher_logits(tmp_path / "teacher.h5", logits)
    with HDF5Teacher(tmp_path / "teacher.h5") as teacher:
        yield teacher


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert readers() == []


def readers():
    """Those of streams: the CPU engine keeps threads of its own, which other tests may have started."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("kdcore-teacher")]


def ids(batch):
    return [[row] for row in batch]


def host(array):
    return engines.to_host(array)


class Asked:
    """A teacher of one class, whose logit is the id; it keeps what it is asked, and in which threads."""

    vocab_size = 1

    def __init__(self, bad=None):
        self.bad, self.batches, self.threads = bad, [], set()

    def logits_for_batch(self, input_ids):
        self.threads.add(threading.get_ident())
        self.batches.append(input_ids)
        if input_ids == self.bad:
            raise ZeroDivisionError(f"asked for {input_ids}")
        return np.array(input_ids, np.float32).reshape(-1, 1)


# --- order and values ----------------------------------------------------------------------------------------------


@cuda_tests
@pytest.mark.parametrize("ahead", [1, 2, 5, 100])
def test_order_and_values(teacher, logits, ahead):
    given = [ids(batch) if i % 2 else np.array(ids(batch), np.int64).reshape(-1, 1) for i, batch in enumerate(BATCHES)]
    seen = []
    for batch, array in device_batches(teacher, given, ahead=ahead):
        seen.append(batch)
        assert engines.on_device(array)
        expected = logits[BATCHES[len(seen) - 1]]
        assert (tuple(array.shape), array.dtype) == (expected.shape, np.float32)
        np.testing.assert_array_equal(host(array), expected)
    assert len(seen) == len(given)
    assert all(x is y for x, y in zip(seen, given, strict=True))


@cuda_tests
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_logits_of_a_file_are_float32_whatever_it_stores(tmp_path, logits, dtype):
    if dtype == "bfloat16":
        pytest.importorskip("ml_dtypes")
    stored = logits.astype(dtype)
    save_teacher_logits(tmp_path / "stored.h5", stored)
    with HDF5Teacher(tmp_path / "stored.h5") as teacher:
        ((_, array),) = device_batches(teacher, [ids(range(N))])
    assert array.dtype == np.float32
    np.testing.assert_array_equal(host(array), stored.astype(np.float32))


@cuda_tests
def test_no_batches():
    assert list(device_batches(FixtureTeacher(4), [])) == []


@cuda_tests
def test_batches_with_labels(teacher, logits):
    by_ids = kdcore.Batch([[4], [6]], [0, 1])
    by_number = kdcore.Batch([[100, 200], [300, 400]], [2, 3], teacher_ids=[[8], [9]])
    (first, at_ids), (second, at_numbers) = device_batches(teacher, [by_ids, by_number])
    assert first is by_ids and second is by_number
    np.testing.assert_array_equal(host(at_ids), logits[[4, 6]])
    np.testing.assert_array_equal(host(at_numbers), logits[[8, 9]])


@cuda_tests
@pytest.mark.parametrize("on_a_stream", [False, True])
def test_from_a_file_to_the_gradient_as_on_the_host(teacher, logits, on_a_stream):
    rng = np.random.default_rng(1)
    batches = [kdcore.Batch(ids(rows), rng.integers(0, V, len(rows))) for rows in BATCHES if rows]
    student = rng.normal(size=(N, V)).astype(np.float32)
    stream = cuda.stream() if on_a_stream else None
    for batch, array in device_batches(teacher, batches, stream=stream):
        rows = np.concatenate(batch.input_ids)
        expected = kdcore.kd_loss_and_gradient(student[rows], logits[rows], batch.labels, 2.0, 0.3)
        given = cuda.to_device(student[rows]), array, cuda.to_device(batch.labels)
        result = kdcore.kd_loss_and_gradient(*given, 2.0, 0.3, stream=stream)
        assert engines.on_device(result.gradient) and engines.on_device(result.loss)
        kinds = {"temperature": 2.0, "alpha": 0.3, "scale": 1 / len(rows)}
        bounds = kd_bounds(student[rows], logits[rows], np.full(len(rows), expected.loss / len(rows)), **kinds)
        # Either engine is within its bound, so they are apart by at most two.
        error = gradient_error(host(result.gradient), expected.gradient, np.float32)
        assert (error <= 2 * bounds.gradient).all()
        assert within(host(result.loss), expected.loss, 2 * bounds.loss.sum())


# --- buffers -------------------------------------------------------------------------------------------------------


@cuda_tests
@pytest.mark.parametrize("ahead", [1, 2, 3])
def test_the_last_arrays_are_valid(ahead):
    rng = np.random.default_rng(2)
    batches = [rng.integers(0, 1000, rng.integers(1, 9)).tolist() for _ in range(30)]
    kept = deque(maxlen=ahead)
    for batch, array in device_batches(Asked(), batches, ahead=ahead):
        kept.append((batch, array))
        for ids, logits in kept:
            assert host(logits).ravel().tolist() == ids
    gc.collect()
    for ids, logits in kept:
        assert host(logits).ravel().tolist() == ids


@cuda_tests
@pytest.mark.parametrize("ahead", [1, 2])
def test_buffers_are_used_in_turn_and_grow_when_they_must(ahead, monkeypatch):
    made = {"pinned_array": [], "device_array": []}
    for name, sizes in made.items():
        allocate = getattr(cuda, name)
        monkeypatch.setattr(
            transfers.cuda, name, lambda n, dtype, f=allocate, sizes=sizes: (sizes.append(n), f(n, dtype))[1]
        )
    sizes = [3] * 10 + [2, 1] + [4] * (ahead + 1) + [3] * 10
    addresses = {
        int(memory.as_array(array).address)
        for _, array in device_batches(Asked(), [[1] * size for size in sizes], ahead=ahead)
    }
    buffers = ahead + 1
    assert made["pinned_array"] == made["device_array"] == [12] * buffers + [16] * buffers
    assert buffers <= len(addresses) <= 2 * buffers  # the allocator may give the freed memory again


@cuda_tests
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16", "int64"])
def test_arrays_of_any_dtype_and_layout(dtype):
    if dtype == "bfloat16":
        dtype = pytest.importorskip("ml_dtypes").bfloat16
    plain = np.arange(60).reshape(5, 12).astype(dtype)
    frozen = plain.copy()
    frozen.flags.writeable = False
    ring = transfers.TransferRing(1)
    for array in (plain, plain[::2, ::3], plain.T, plain[::-1, 4:], frozen, plain[:0], plain[2:, :0], plain[0]):
        expected, given = array.copy(), array.copy(order="K") if array is not frozen else array
        ring.send(given)
        if given is not frozen:
            given[...] = 77
        received = ring.receive()
        assert received.dtype == array.dtype
        np.testing.assert_array_equal(host(received), expected)
    ring.close()
    ring.close()


@cuda_tests
def test_one_array_is_under_way():
    ring = transfers.TransferRing(1)
    with pytest.raises(RuntimeError, match="no array was sent"):
        ring.receive()
    ring.send(np.zeros(3))
    with pytest.raises(RuntimeError, match="not been received"):
        ring.send(np.zeros(3))
    ring.close()


class Late:
    """A device whose streams run when they like: what is queued is done at random times, in the order of its stream.

    It stands for ``numba.cuda`` in :mod:`kdcore.cuda.transfers`: what the ring does not wait for, it gets too early.
    """

    def __init__(self, seed):
        self.random, self.streams = random.Random(seed), []

    def stream(self):
        self.streams.append(LateStream())
        return self.streams[-1]

    def event(self):
        return LateEvent(self)

    def device_array(self, shape, dtype):
        return LateArray(np.zeros(shape, dtype))

    @staticmethod
    def pinned_array(shape, dtype):
        return np.zeros(shape, dtype)

    def step(self):
        """Do what is first on some stream, unless that is to wait."""
        waiting = [stream for stream in self.streams if stream.operations]
        if waiting:
            operations = self.random.choice(waiting).operations
            if operations[0]() is not False:
                operations.popleft()
        return bool(waiting)

    def pause(self):
        for _ in range(self.random.choice([0, 0, 1, 5, 50])):
            self.step()


class LateStream:
    def __init__(self):
        self.operations = deque()

    def auto_synchronize(self):
        """By which Numba's streams are known."""


class LateEvent:
    def __init__(self, device):
        self.device, self.last = device, [True]

    def record(self, stream):
        self.last = done = []
        stream.operations.append(lambda: done.append(True))

    def wait(self, stream):
        done = self.last
        stream.operations.append(lambda: bool(done))

    def synchronize(self):
        while not self.last:
            self.device.step()


class LateArray:
    def __init__(self, values):
        self.values = values

    def __getitem__(self, key):
        return LateArray(self.values[key])

    def view(self, dtype):
        return LateArray(self.values.view(dtype))

    def reshape(self, shape):
        return LateArray(self.values.reshape(shape))

    def copy_to_device(self, host, stream):
        stream.operations.append(lambda: np.copyto(self.values, host))


@cuda_tests
@pytest.mark.parametrize("held", [1, 2, 3])
@pytest.mark.parametrize("seed", range(10))
def test_work_reads_what_was_sent_however_late_it_runs(monkeypatch, seed, held):
    device = Late(seed)
    for name, value in {"cuda": device, "_event": device.event, "_copy_stream": device.stream}.items():
        monkeypatch.setattr(transfers, name, value)
    work = device.stream()
    ring = transfers.TransferRing(held, work)
    rng = np.random.default_rng(seed)
    arrays = [rng.integers(0, 99, rng.integers(1, 9)) for _ in range(60)]
    kept, wrong, reads = deque(maxlen=held), [], []

    def read(number, array):
        reads.append(number)
        if not np.array_equal(array.values, arrays[number]):
            wrong.append(number)

    sent = 0

    def send():
        nonlocal sent
        given = arrays[sent].copy()
        ring.send(given)
        given[:] = -1  # which is the caller's right
        sent += 1

    for number in range(len(arrays)):
        if sent == number:
            send()
        device.pause()
        kept.append((number, ring.receive()))
        device.pause()
        if device.random.random() < 0.5 and sent < len(arrays):  # the next one early
            send()
        for pair in kept:
            work.operations.append(lambda pair=pair: read(*pair))
        device.pause()
    while device.step():
        pass
    assert len(reads) == sum(min(held, n + 1) for n in range(len(arrays)))
    assert wrong == []


@cuda_tests
@pytest.mark.skipif(REASON is not None or SIMULATOR, reason="Numba's simulator does one thing at a time")
def test_a_copy_ends_while_the_default_stream_is_at_work():
    @cuda.jit
    def rest():
        for _ in range(2000):
            cuda.nanosleep(1_000_000)

    ring, finished = transfers.TransferRing(1), cuda.event(timing=False)
    for _ in range(2):  # allocating would wait
        ring.send(np.arange(1000))
        ring.receive()
    launch(rest, 1, 1, None)
    finished.record()
    ring.send(np.arange(1000))
    ring._buffers[0].copied.synchronize()
    assert not finished.query()
    ring.close()
    cuda.synchronize()


# --- the thread ----------------------------------------------------------------------------------------------------


@cuda_tests
@pytest.mark.parametrize("ahead", [1, 3])
def test_the_teacher_is_asked_early_and_in_one_thread(ahead):
    teacher, drawn = Asked(), []

    def batches():
        for i in range(10):
            drawn.append(threading.get_ident())
            yield [i]

    stream = device_batches(teacher, batches(), ahead=ahead)
    assert not drawn and not readers()
    for i, (batch, _) in enumerate(stream):
        assert batch == [i]
        assert len(drawn) == min(10, i + 1 + ahead)
        assert len(readers()) == 1
    assert teacher.batches == [[i] for i in range(10)]
    assert len(teacher.threads) == 1
    assert threading.get_ident() not in teacher.threads
    assert set(drawn) == {threading.get_ident()}


@cuda_tests
def test_the_next_copy_starts_early_if_its_read_has_ended(monkeypatch):
    sends, may_go_on, at_the_last = [], threading.Event(), threading.Event()
    send = transfers.TransferRing.send
    monkeypatch.setattr(transfers.TransferRing, "send", lambda ring, array: (sends.append(1), send(ring, array)))
    teacher = Asked()

    def slow(input_ids):
        if input_ids == [1] and not may_go_on.wait(5):
            raise TimeoutError("the first batch waits for the second")
        if input_ids == [3]:
            at_the_last.set()
        return Asked.logits_for_batch(teacher, input_ids)

    teacher.logits_for_batch = slow
    stream = device_batches(teacher, [[i] for i in range(4)], ahead=3)
    next(stream)
    assert not may_go_on.is_set() and len(sends) == 1
    may_go_on.set()
    assert at_the_last.wait(10)
    assert next(stream)[0] == [1]
    assert len(sends) == 3
    assert [batch for batch, _ in stream] == [[2], [3]]
    assert len(sends) == 4


@cuda_tests
@pytest.mark.parametrize("bad", [0, 1, 4])
@pytest.mark.parametrize("ahead", [1, 2, 9])
def test_an_error_of_the_teacher_is_raised_where_it_belongs(bad, ahead):
    stream = device_batches(Asked(bad=[bad]), [[i] for i in range(6)], ahead=ahead)
    for i in range(bad):
        batch, logits = next(stream)
        assert (batch, host(logits).tolist()) == ([i], [[i]])
    with pytest.raises(ZeroDivisionError, match=rf"asked for \[{bad}\]"):
        next(stream)
    assert readers() == []
    with pytest.raises(StopIteration):
        next(stream)


@cuda_tests
def test_a_row_that_the_file_does_not_have(teacher):
    stream = device_batches(teacher, [[[0]], [[N]], [[1]]])
    next(stream)
    with pytest.raises(MissingRowError, match=f"none with the number {N}"):
        next(stream)


@cuda_tests
@pytest.mark.parametrize("bad", [0, 1, 4])
def test_an_error_of_the_batches_is_raised_where_it_belongs(bad):
    def batches():
        for i in range(bad):
            yield [i]
        raise ZeroDivisionError("no more")

    stream = device_batches(Asked(), batches(), ahead=3)
    for i in range(bad):
        assert next(stream)[0] == [i]
    with pytest.raises(ZeroDivisionError, match="no more"):
        next(stream)
    with pytest.raises(StopIteration):
        next(stream)


@cuda_tests
@pytest.mark.parametrize("end", ["close", "drop", "throw"])
def test_an_early_end_stops_the_thread(end):
    teacher, asked, closed = Asked(), threading.Event(), threading.Event()

    def slow(input_ids):
        if input_ids == [3]:
            asked.set()
            assert closed.wait(10)
        return Asked.logits_for_batch(teacher, input_ids)

    teacher.logits_for_batch = slow
    stream = device_batches(teacher, ([i] for i in range(1000)), ahead=5)
    next(stream)
    kept, logits = next(stream)
    assert asked.wait(10)  # a read is under way
    threading.Timer(0.05, closed.set).start()
    if end == "close":
        stream.close()
    elif end == "throw":
        with pytest.raises(KeyError):
            stream.throw(KeyError("by the caller"))
    del stream
    gc.collect()
    assert readers() == []
    assert teacher.batches == [[0], [1], [2], [3]]
    assert (kept, host(logits).tolist()) == ([1], [[1]])


@cuda_tests
def test_an_end_frees_the_buffers(monkeypatch):
    rings = []
    make = engines.transfer_ring
    monkeypatch.setattr(engines, "transfer_ring", lambda *given: rings.append(make(*given)) or rings[-1])
    stream = device_batches(Asked(), [[i] for i in range(9)])
    next(stream)
    assert len(rings[0]._buffers) == 3
    stream.close()
    assert rings[0]._buffers == []


# --- arguments -----------------------------------------------------------------------------------------------------


@cuda_tests
def test_arguments(tmp_path):
    with pytest.raises(DomainError, match="ahead"):
        device_batches(FixtureTeacher(4), [], ahead=0)
    with pytest.raises(DTypeError, match="stream must be"):
        next(device_batches(FixtureTeacher(4), [[[1]]], stream="stream"))
    save_mlp(tmp_path / "mlp", [(np.ones((3, 2)), np.zeros(3))])
    for teacher in (CudaTeacher(tmp_path / "mlp"), MLPTeacher(tmp_path / "mlp", device="cuda")):
        with pytest.raises(DeviceMismatchError, match="device_logits_for_batch"):
            device_batches(teacher, [])
    ((_, array),) = device_batches(MLPTeacher(tmp_path / "mlp"), [np.array([[1.0, 2.0]])])
    np.testing.assert_array_equal(host(array), [[3, 3, 3]])
