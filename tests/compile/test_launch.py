"""Launches by the driver's own function: its parameters are those that the compiler gave a kernel. Needs no device.

The driver is a stand-in, which reads the parameters that it is given as a driver does: from as many places as the
kernel has parameters, as many bytes of each as the compiler says.
"""

import ctypes
import re
import sys
import types
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
from building import record_launches
from numba import cuda
from numba.cuda import dispatcher
from numba.cuda.cudadrv.driver import CudaAPIError
from test_compile import device_array

from kdcore.cuda import direct, groups, launch, plans, streams
from kdcore.cuda.libraries import Library
from kdcore.divergences import as_divergence
from kdcore.objective import Objective

#: A stream that needs no device to be made.
QUEUE = streams.Queue(77, None, Library(), 0)
#: An address as large as they are, and a number as small as they can be.
LARGE, SMALL = 2**62 + 12345, -(2**63)


class Driver:
    """What is used of ``cuda.bindings.driver``."""

    CUkernel = type("CUkernel", (), {})
    CUfunction = type("CUfunction", (), {})

    def __init__(self, sizes):
        self.sizes, self.context, self.result, self.launched = sizes, 10, 0, []
        self.while_launching = lambda: None

    def cuCtxGetCurrent(self):  # noqa: N802
        return 0, self.context

    def cuKernelGetFunction(self, kernel):  # noqa: N802
        assert isinstance(kernel, self.CUkernel)
        return 0, self.CUfunction()

    def cuFuncGetParamInfo(self, function, k):  # noqa: N802
        assert isinstance(function, self.CUfunction)
        return (0, 0, self.sizes[k]) if k < len(self.sizes) else (self._error("INVALID_VALUE"), None, None)

    def cuLaunchKernel(self, function, x, y, z, threads, y_threads, z_threads, shared, stream, places, extra):  # noqa: N802
        assert isinstance(function, self.CUfunction)
        assert (y, z, y_threads, z_threads, shared, extra) == (1, 1, 1, 1, 0, 0)
        places = (ctypes.c_void_p * len(self.sizes)).from_address(places)
        self.while_launching()
        parameters = [ctypes.string_at(place, size) for place, size in zip(places, self.sizes, strict=True)]
        self.launched.append((x, threads, stream, parameters))
        return (self.result,)

    @staticmethod
    def _error(name):
        return types.SimpleNamespace(name=f"CUDA_ERROR_{name}")


class Kernel:
    """A kernel of Numba's, for the types that it is launched with: what was compiled has the driver's ``handle``."""

    def __init__(self, kernel, handle):
        self.typeof_pyval, self.overloads, self.launched = kernel.typeof_pyval, {}, 0
        library = types.SimpleNamespace(get_cufunc=lambda: types.SimpleNamespace(handle=handle))
        self.compiled = types.SimpleNamespace(library=library, debug=False, cooperative=False, extensions=[])

    def __getitem__(self, configuration):
        def launched(*arguments):
            self.overloads[tuple(map(self.typeof_pyval, arguments))] = self.compiled
            self.launched += 1

        return launched


def compiled_sizes(kernel, arguments, capability=(9, 0)):
    """Bytes of each parameter of what the compiler makes of a kernel."""
    device = types.SimpleNamespace(compute_capability=capability)
    with mock.patch.object(dispatcher, "get_current_device", lambda: device):
        code, _ = cuda.compile(
            kernel.py_func, tuple(map(kernel.typeof_pyval, arguments)), device=False, abi="numba", output="ptx",
            cc=capability,
        )  # fmt: skip
    entry = re.search(r"\.entry\s.*?\((.*?)\)", code if isinstance(code, str) else code.decode(), re.DOTALL)[1]
    found = re.findall(r"\.param\s+\.[usfb](8|16|32|64)\s", entry)
    assert len(found) == entry.count(".param") > 0
    return [int(bits) // 8 for bits in found]


@pytest.fixture
def calls(monkeypatch):
    """What the launchers launch."""
    return record_launches(monkeypatch, device_array)


@pytest.fixture
def use(monkeypatch):
    """Put a driver in the place of the real one, and forget what has been launched by another."""

    def put(driver):
        monkeypatch.setattr(direct, "bindings", lambda: driver)
        monkeypatch.setattr(direct, "primary_context", lambda device: 10 + device)
        monkeypatch.setattr(streams, "_functions", {})
        streams._configured.cache_clear()
        return driver

    yield put
    streams._configured.cache_clear()


def kd(student, teacher, size, labels="int64", weights="float64", divergence="forward_kl"):
    of_rows = [device_array("float64", 2)] * 3
    objective = Objective(as_divergence(divergence), 2.5, 1.7, 0.3, 6.25, SMALL)
    launch.kd_rows(
        device_array(student, 2, size), device_array(teacher, 2, size), device_array(labels, 2),
        device_array(weights, 2), device_array("float64", 1), objective, device_array(student, 2, size), *of_rows,
        device_array("int64", 0, 2), None,
    )  # fmt: skip


LAUNCHES = {
    "row": lambda: kd("float16", "bfloat16", 1000, "int8", "float32"),
    "row, float64": lambda: kd("float64", "float32", 1000, "uint16", divergence="jsd"),
    "group": lambda: kd("bfloat16", "float16", 256_000, "uint64"),
    "sparse": lambda: launch.sparse_kd_rows(
        device_array("bfloat16", 2, 1000),
        device_array("uint16", 2, 8),
        device_array("float16", 2, 8),
        device_array("float32", 2),
        device_array("int8", 2),
        "bucket",
        device_array("int64", 2),
        device_array("float32", 2),
        device_array("float64", 1),
        Objective(as_divergence("forward_kl"), 2.5, 2.5, 0.3, 6.25, SMALL),
        device_array("float32", 2, 1000),
        *[device_array("float64", 2)] * 3,
        device_array("int64", 0, 2),
        None,
    ),
    "softmax": lambda: launch.softmax_rows(
        device_array("float32", 2, 9), 2.0, device_array("float64", 2, 9), device_array("int64", 2, 2), None
    ),
    "weight_sum": lambda: launch.weight_sum(
        device_array(np.longlong, 3), device_array("float32", 3), SMALL, 3, device_array("float64", 1), None
    ),
    "reduce": lambda: launch.reduce_rows(device_array("float64", 3, 5), device_array("float64", 3), None),
    "fill": lambda: launch.fill(device_array("int32", 5), -1, None),
}


def flattened(arguments):
    for argument in arguments:
        if isinstance(argument, tuple):
            yield from flattened(argument)
        else:
            yield argument


def as_bytes(value):
    """A number as C has it: a Python int is an int64, a float a double."""
    return np.array(value, {int: np.int64, float: np.float64}.get(type(value), type(value))).tobytes()


@pytest.mark.parametrize("name", LAUNCHES)
def test_parameters_are_those_of_the_compiler(calls, use, name):
    LAUNCHES[name]()
    kernel, blocks, threads, arguments, again = calls[-1]
    assert (name == "group") == (kernel.__wrapped__.__module__ == groups.__name__)
    driver = use(Driver(compiled_sizes(kernel, arguments)))
    ours = Kernel(kernel, driver.CUkernel())
    start = again(ours, QUEUE)
    for count in range(3):
        start()
        assert (ours.launched, len(driver.launched)) == (1, count)
    expected = blocks, threads, 77, [as_bytes(value) for value in flattened(arguments)]
    assert driver.launched == [expected] * 2
    # Other numbers of the same types, the next time.
    others = [np.float32(-0.5), 7, (LARGE, SMALL, np.uint16(65535)), -1e300]
    use(driver).sizes = [4, 8, 8, 8, 2, 8]
    ours = Kernel(kernel, driver.CUfunction())
    for arguments in [(np.float32(0), 0, (0, 0, np.uint16(0)), 0.0), others]:
        streams.launch(ours, 3, 32, 0, *arguments)
    assert driver.launched[2:] == [(3, 32, 0, [as_bytes(value) for value in flattened(others)])]


KERNEL = types.SimpleNamespace(typeof_pyval=cuda.jit(lambda x: None).typeof_pyval)


@pytest.fixture
def ready(use):
    """A driver, and a kernel of an int, a float32 and a pair, which has been launched once."""
    driver = use(Driver([8, 4, 8, 8]))
    kernel = Kernel(KERNEL, driver.CUfunction())
    streams.launch(kernel, 2, 32, QUEUE, 1, np.float32(2), (3, 4.0))
    assert not driver.launched
    return driver, kernel


def test_other_types_are_compiled_first(ready):
    driver, kernel = ready
    driver.sizes = [8, 8, 8, 8]
    for count in range(2):
        streams.launch(kernel, 2, 32, QUEUE, 1, 2.0, (3, 4.0))
        assert (kernel.launched, len(driver.launched)) == (2, count)


@pytest.mark.parametrize("sizes", [[8, 4, 8], [8, 4, 8, 8, 8], [8, 8, 8, 8], []], ids=str)
def test_another_layout_is_an_error(use, sizes):
    driver = use(Driver(sizes))
    with pytest.raises((RuntimeError, CudaAPIError)):
        streams.launch(Kernel(KERNEL, driver.CUfunction()), 2, 32, QUEUE, 1, np.float32(2), (3, 4.0))
    assert not driver.launched


def test_what_is_no_number_is_an_error(use):
    driver = use(Driver([1]))
    with pytest.raises(TypeError, match="numbers and tuples of numbers, got bool"):
        streams.launch(Kernel(KERNEL, driver.CUfunction()), 2, 32, QUEUE, True)


def test_errors_of_the_driver_are_raised(ready):
    driver, kernel = ready
    driver.result = driver._error("LAUNCH_FAILED")
    with pytest.raises(CudaAPIError, match="cuLaunchKernel results in CUDA_ERROR_LAUNCH_FAILED"):
        streams.launch(kernel, 2, 32, QUEUE, 1, np.float32(2), (3, 4.0))
    assert kernel.launched == 1


def test_no_blocks_are_no_launch(ready):
    driver, kernel = ready
    streams.launch(kernel, 0, 32, QUEUE, 1, np.float32(2), (3, 4.0))
    assert (kernel.launched, len(driver.launched)) == (1, 0)


def test_an_integer_that_is_no_int64_is_left_to_numba(ready):
    driver, kernel = ready
    for value in (2**63, -(2**63) - 1):
        kernel.typeof_pyval = lambda argument: type(argument)
        streams.launch(kernel, 2, 32, QUEUE, value, np.float32(2), (3, 4.0))
    assert (kernel.launched, len(driver.launched)) == (3, 0)
    streams.launch(kernel, 2, 32, QUEUE, 2**63 - 1, np.float32(2), (3, 4.0))
    assert (kernel.launched, len(driver.launched)) == (3, 1)


@pytest.mark.parametrize("name", ["debug", "cooperative", "extensions", "launch_config_sensitive"])
def test_what_only_numba_can_launch(use, name):
    driver = use(Driver([8]))
    kernel = Kernel(KERNEL, driver.CUfunction())
    setattr(kernel.compiled, name, True)
    for _ in range(2):
        streams.launch(kernel, 2, 32, QUEUE, 1)
    assert (kernel.launched, len(driver.launched)) == (2, 0)


def test_a_function_belongs_to_its_context(ready):
    driver, kernel = ready
    arguments = 1, np.float32(2), (3, 4.0)
    for context, by_numba, by_driver in [(11, 2, 0), (11, 2, 1), (10, 2, 2), (0, 3, 2), (11, 3, 3)]:
        driver.context = context
        streams.launch(kernel, 2, 32, QUEUE, *arguments)
        assert (kernel.launched, len(driver.launched)) == (by_numba, by_driver)


def test_the_device_of_a_queue_is_made_the_current_one(monkeypatch, ready):
    driver, kernel = ready
    entered = []

    class Device:
        def __init__(self, number):
            self.number = number

        def __enter__(self):
            entered.append(self.number)
            driver.context = 10 + self.number

        def __exit__(self, *error):
            driver.context = 10

    monkeypatch.setattr(streams.cuda, "gpus", [Device(0), Device(1)])
    for device in (0, 1, 1, 0):
        streams.launch(kernel, 2, 32, QUEUE._replace(device=device), 1, np.float32(2), (3, 4.0))
    assert entered == [1, 1]
    assert driver.context == 10
    assert (kernel.launched, len(driver.launched)) == (2, 3)  # by Numba once for each device
    with streams.on_device_of(QUEUE._replace(device=1)):
        streams.launch(kernel, 2, 32, QUEUE._replace(device=1), 1, np.float32(2), (3, 4.0))
    assert entered == [1, 1, 1]
    assert (kernel.launched, len(driver.launched)) == (2, 4)


def test_launches_at_the_same_time_have_parameters_of_their_own(ready):
    driver, kernel = ready

    def again():  # as another thread would, between what this one writes and what the driver reads
        driver.while_launching = lambda: None
        streams.launch(kernel, 2, 32, QUEUE, 5, np.float32(6), (7, 8.0))

    streams.launch(kernel, 2, 32, QUEUE, 0, np.float32(0), (0, 0.0))
    driver.while_launching = again
    streams.launch(kernel, 2, 32, QUEUE, 1, np.float32(2), (3, 4.0))
    _, (_, _, _, inner), (_, _, _, outer) = driver.launched
    assert inner == [as_bytes(value) for value in (5, np.float32(6), 7, 8.0)]
    assert outer == [as_bytes(value) for value in (1, np.float32(2), 3, 4.0)]


# --- launches that are prepared --------------------------------------------------------------------------------------


#: A parameter of two slots, one of them twice, among such that stay as they are.
PARTLY = (direct.Slot(1), np.float32(2), (direct.Slot(0), np.uint16(7), direct.Slot(1)), -1.5)


def prepared_for(driver, codes="dq", arguments=PARTLY):
    driver.sizes = [8, 4, 8, 2, 8, 8]
    return streams.Prepared(Kernel(KERNEL, driver.CUfunction()), 64, arguments, codes)


def parameters_of(number, address):
    return [as_bytes(value) for value in (address, np.float32(2), number, np.uint16(7), address, -1.5)]


def test_a_prepared_launch_brings_what_is_in_its_slots(use):
    driver = use(Driver([]))
    prepared = prepared_for(driver)
    for number, address in [(0.5, LARGE), (-1e300, SMALL), (0.25, 3)]:
        streams.launch_prepared(prepared, 5, QUEUE, number, address)
    expected = [(5, 64, 77, parameters_of(*of)) for of in ((-1e300, SMALL), (0.25, 3))]
    assert (prepared.kernel.launched, driver.launched) == (1, expected)
    streams.launch_prepared(prepared, 0, QUEUE, 1.0, 1)
    assert len(driver.launched) == 2
    streams.launch_prepared(prepared, 1, QUEUE, 1.0, 2**63)  # no int64: Numba says so
    assert (prepared.kernel.launched, len(driver.launched)) == (2, 2)


def test_numba_gets_the_same_numbers(use):
    given = []
    prepared = prepared_for(use(Driver([])))
    kernel = mock.MagicMock()
    kernel.__getitem__.side_effect = lambda configuration: lambda *arguments: given.append((configuration, arguments))
    kernel.overloads = {}
    prepared.kernel = kernel
    streams.launch_prepared(prepared, 5, QUEUE, 0.5, LARGE)
    assert given == [((5, 64, 0), (LARGE, np.float32(2), (0.5, np.uint16(7), LARGE), -1.5))]


def test_a_slot_has_the_type_of_its_parameter(use):
    driver = use(Driver([]))
    with pytest.raises(TypeError, match="cannot be numbers of the types qq"):
        streams.launch_prepared(prepared_for(driver, "qq"), 5, QUEUE, 0.5, 3)
    assert not driver.launched


def test_a_prepared_launch_belongs_to_its_context(use):
    driver = use(Driver([]))
    prepared = prepared_for(driver)
    for context, by_numba, by_driver in [(10, 1, 0), (11, 2, 0), (11, 2, 1), (10, 2, 2), (0, 3, 2), (10, 3, 3)]:
        driver.context = context
        streams.launch_prepared(prepared, 5, QUEUE, 0.5, 3)
        assert (prepared.kernel.launched, len(driver.launched)) == (by_numba, by_driver)
    driver.context = 0  # what a queue says of its context, is not asked again within a call
    streams.launch_prepared(prepared, 5, QUEUE._replace(context=11), 0.5, 3)
    assert (prepared.kernel.launched, len(driver.launched)) == (3, 4)


def test_prepared_launches_at_the_same_time_have_parameters_of_their_own(use):
    driver = use(Driver([]))
    prepared = prepared_for(driver)

    def again():
        driver.while_launching = lambda: None
        streams.launch_prepared(prepared, 5, QUEUE, 0.25, 4)

    streams.launch_prepared(prepared, 5, QUEUE, 0.0, 0)
    driver.while_launching = again
    streams.launch_prepared(prepared, 5, QUEUE, 0.5, 3)
    assert [parameters for *_, parameters in driver.launched] == [parameters_of(0.25, 4), parameters_of(0.5, 3)]


def test_words_are_set_by_the_driver(monkeypatch, use):
    driver, found = use(Driver([])), []
    driver.cuMemsetD32Async = lambda *of: found.append(of) or (driver.result,)
    assert direct.set_words(LARGE, 0xFFFFFFFF, 12, 77)
    assert found == [(LARGE, 0xFFFFFFFF, 12, 77)]
    driver.result = driver._error("INVALID_VALUE")
    with pytest.raises(CudaAPIError, match="cuMemsetD32Async results in CUDA_ERROR_INVALID_VALUE"):
        direct.set_words(0, 0, 1, 77)
    monkeypatch.setattr(direct, "bindings", lambda: None)
    assert not direct.set_words(LARGE, 0, 1, 77)


def test_the_word_of_blank_records():
    assert np.full(2, groups.BLANK & 0xFFFFFFFF, np.uint32).view(np.int64) == groups.BLANK


def test_what_a_call_queues(monkeypatch):
    """By reduction: launches, and the driver's memset. And how many functions of Python's a call goes through."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import host_time

    for library in ("CuPy", "Numba", "interface"):
        for kernel, size, reduction in host_time.CASES:
            with host_time.stand_ins(library) as (driver, array), plans.using(kernel=kernel):
                call = host_time.call_of(array, size, reduction)
                call()
                driver.counting = True
                call()
                driver.counting = False
                expected = {"cuCtxGetCurrent": 1, "cuLaunchKernel": 1 if reduction == "none" else 3}
                if kernel == "group":
                    expected["cuMemsetD32Async"] = 1
                assert driver.calls == expected
                functions = []
                sys.setprofile(lambda frame, event, of, to=functions: to.append(frame) if event == "call" else None)
                try:
                    call()
                finally:
                    sys.setprofile(None)
                ours = [frame for frame in functions if "kdcore" in frame.f_globals.get("__name__", "")]
                # Each takes a quarter of a microsecond or so; where layouts are not remembered there are twice as many.
                assert 50 < len(ours) < 140, f"{library}, {kernel}, {reduction}: {len(ours)}"


@pytest.mark.parametrize("by_driver", [True, False])
def test_records_and_counts_are_blank_before_a_group_looks(monkeypatch, by_driver):
    by_words, by_kernel, launched = [], [], []
    monkeypatch.setattr(launch, "set_words", lambda *of: by_words.append(of) or by_driver)
    monkeypatch.setattr(launch, "fill", lambda array, value, of: by_kernel.append((array.address, array.size, value)))
    monkeypatch.setattr(launch, "launch_prepared", lambda *of: launched.append(of))
    monkeypatch.setattr(launch, "current_context", lambda: 0)
    monkeypatch.setattr(launch, "on_device_of", lambda stream: streams._HERE)
    monkeypatch.setattr(launch, "scratch", lambda shape, dtype, stream: device_array(dtype, *shape))
    monkeypatch.setattr(plans, "_of_device", plans._SIMULATED.__getitem__)
    kd("float32", "float32", 256_000)
    ((_, blocks, _, *values),) = launched
    counts, records = values[12:14]
    of_records = blocks * groups.PUBLISHED  # of two rows
    size = of_records + 2 + 1
    assert counts == records + 8 * of_records
    assert by_words == [(records, 0xFFFFFFFF, 2 * size, 0)]
    assert by_kernel == ([] if by_driver else [(records, size, groups.BLANK)])


def test_what_is_prepared_is_for_one_plan_and_its_parts(monkeypatch):
    """By another kernel, or with other parts of the objective, it is another launch; with other numbers it is not."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    import host_time

    import kdcore

    with host_time.stand_ins("CuPy") as (driver, array):
        student, teacher, labels = array((8, 32768), "float32"), array((8, 32768), "float32"), array((8,), "int64")
        made, make = [], direct.Function.__init__

        def count(*arguments):
            made.append(1)
            make(*arguments)

        monkeypatch.setattr(direct.Function, "__init__", count)

        def counts(kernel, *options):
            driver.calls.clear()
            driver.counting = True
            made.clear()
            with plans.using(kernel=kernel):
                kdcore.kd_loss(student, teacher, labels, *options, reduction="none")
            return driver.calls.get("cuMemsetD32Async", 0), driver.calls.get("cuLaunchKernel", 0)

        for kernel, memsets in (("row", 0), ("group", 1)):
            assert counts(kernel, 2.0, 0.3) == (memsets, 0)  # the first launch is Numba's
            assert counts(kernel, 2.0, 0.3) == (memsets, 1)
        for options in ((3.0, 0.3), (2.0, 0.0)):
            assert counts("row", *options) == (0, 0)
            assert made == [1]
            assert counts("row", *options) == (0, 1)
        for options in ((2.0, 0.3), (2.0, 0.4), (3.5, 0.25), (7.0, 0.9), (1e-3, 0.5)):
            assert counts("row", *options) == (0, 1)
            assert not made


# --- what a launch needs ---------------------------------------------------------------------------------------------


def test_types_of_arguments():
    numbers = [
        "int8",
        "int16",
        "int32",
        "int64",
        "uint8",
        "uint16",
        "uint32",
        "uint64",
        "float16",
        "float32",
        "float64",
    ]
    for name in numbers:
        kind = np.dtype(name).type
        layout = direct.struct.Struct(f"@{direct._code(kind)}")
        for value in (kind(0), kind(100), kind(1.5)):
            assert layout.pack(value) == as_bytes(value)
    for kind in (bool, np.bool_, complex, np.complex64, ml_dtypes.bfloat16, str, type(None)):
        with pytest.raises(TypeError, match="numbers and tuples of numbers"):
            direct._code(kind)


def test_without_what_it_needs_launches_are_numbas(monkeypatch):
    from cuda.bindings import driver
    from numba.cuda.cudadrv import driver as of_numba

    decide = direct.bindings.__wrapped__
    for version, expected in [((0, 13000), driver), ((0, 12040), driver), ((0, 12030), None), ((100, None), None)]:
        monkeypatch.setattr(driver, "cuDriverGetVersion", lambda version=version: version)
        assert decide() is expected
    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (0, 13000))
    with monkeypatch.context() as patch:
        patch.delattr(driver, "cuFuncGetParamInfo")
        assert decide() is None
    with monkeypatch.context() as patch:
        patch.setattr(of_numba, "binding", object())
        assert decide() is None
    assert decide() is driver


def test_launches_are_numbas_then(monkeypatch):
    monkeypatch.setattr(direct, "bindings", lambda: None)
    kernel = Kernel(KERNEL, None)
    for _ in range(2):
        streams.launch(kernel, 2, 32, QUEUE, 1)
    assert kernel.launched == 2
