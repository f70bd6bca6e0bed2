"""The two KD kernels of the CUDA engine, each forced upon calls that may have chosen the other; and the choice."""

import runpy
from functools import reduce
from itertools import pairwise
from pathlib import Path

import numpy as np
import oracle
import pytest
from cuda_engines import BF16, F16, F32, F64, INF, NAN, Device, assert_kd, dtype_name, kd, logits

from kdcore import rowstatus
from kdcore.cuda.presence import available
from kdcore.engines import to_device, to_host
from kdcore.errors import DomainError, DTypeError

REASON = available()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]
if REASON is None:
    from numba import cuda, float64

    import kdcore.cuda
    from kdcore.cuda import groups, memory, plans, rows
    from kdcore.cuda.arrays import layout_of
    from kdcore.cuda.primitives import SIMULATOR
    from kdcore.cuda.rows import SCRATCH
    from kdcore.divergences import forward_kl
    from kdcore.objective import Objective

#: By the kernel: options of ``plans.using``. A device has room for thousands of classes in one block.
KERNELS = {"row": {"kernel": "row"}, "group": {"kernel": "group"}, "3 blocks": {"kernel": "group", "blocks": 3}}


@pytest.fixture(params=KERNELS, ids=lambda name: name.replace(" ", ""))
def using(request):
    """Calls are worked by one of the kernels, or by both in turn."""
    with plans.using(**KERNELS[request.param]):
        yield request.param


def sizes(*others):
    """Classes that leave every kind of rest, with one and several octets a thread and blocks without any class."""
    return pytest.mark.parametrize("V", [1, 2, 9, 100, 255, 256, 257, 1000, *others])


@sizes(1003)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_name)
def test_every_class_counts(using, dtype, V):
    rng = np.random.default_rng(V)
    s, t = logits(rng, 2, V, dtype), logits(rng, 2, V, dtype)
    assert_kd(s, t, np.array([V - 1, V // 2]), np.array([2.0, 1.0]), 3.0)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [(F32, F32), (F16, F16), (BF16, BF16), (F32, BF16), (BF16, F32), (F16, BF16)],
    ids=dtype_name,
)
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0])
def test_dtypes_and_temperatures(using, student, teacher, temperature):
    """1, 2 and 4 have the exponentials of cross-entropy as powers of the others."""
    rng = np.random.default_rng(1)
    s, t = logits(rng, 2, 333, student), logits(rng, 2, 333, teacher)
    assert_kd(s, t, np.array([332, 5]), temperature=temperature)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("dtype", "out"), [(F32, None), (F32, BF16), (BF16, F32), (F16, F64)], ids=dtype_name)
def test_parts_and_gradients_of_another_dtype(using, alpha, dtype, out):
    rng = np.random.default_rng(2)
    s, t, labels = logits(rng, 2, 300, dtype), logits(rng, 2, 300, dtype), np.array([299, 0])
    assert_kd(s, t, labels, alpha=alpha)
    given, wide = (kd(Device, s, t, labels, alpha=alpha, out=d) for d in (out, F64))
    assert given[3].dtype == (out or dtype)
    np.testing.assert_array_equal(given[3], wide[3].astype(np.float32).astype(out or dtype))
    for x, y in zip(given[:3], kd(Device, s, t, labels, alpha=alpha, with_gradient=False)[:3], strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=dtype_name)
def test_in_place(using, dtype):
    rng = np.random.default_rng(3)
    s, t, labels = logits(rng, 4, 700, dtype), logits(rng, 4, 700, dtype), np.array([0, 699, 300, 1])
    s[2, 600], t[3, 1] = NAN, INF
    apart, in_place = (kd(Device, s, t, labels, in_place=in_place) for in_place in (False, True))
    for x, y in zip(apart, in_place, strict=True):
        assert x.tobytes() == y.tobytes()
    assert apart[4].tolist() == [
        [rowstatus.OK, 0],
        [rowstatus.OK, 0],
        [rowstatus.STUDENT + rowstatus.NAN, 600],
        [rowstatus.TEACHER + rowstatus.POSITIVE_INF, 1],
    ]


def test_rows_that_are_masked_or_cannot_be_used(using):
    rng = np.random.default_rng(4)
    s, t = logits(rng, 8, 500, F32), logits(rng, 8, 500, F32)
    labels, weights = rng.integers(500, size=8), np.ones(8)
    s[0, 499], s[0, 100] = NAN, INF
    s[1] = -INF
    t[2, 37], t[2, 400] = INF, NAN
    t[3] = -INF
    labels[4], weights[5], labels[6], s[6], weights[7], t[7] = 500, NAN, -100, NAN, 0.0, INF
    loss, ce, kl, gradient, status = kd(Device, s, t, labels, weights=weights)
    assert status.tolist() == [
        [rowstatus.STUDENT + rowstatus.POSITIVE_INF, 100],
        [rowstatus.STUDENT + rowstatus.NO_SUPPORT, 0],
        [rowstatus.TEACHER + rowstatus.POSITIVE_INF, 37],
        [rowstatus.TEACHER + rowstatus.NO_SUPPORT, 0],
        [rowstatus.LABEL, 500],
        [rowstatus.WEIGHT, 0],
        [rowstatus.OK, 0],
        [rowstatus.OK, 0],
    ]
    assert np.isnan(np.stack([loss, ce, kl])[:, :6]).all() and np.isnan(gradient[:6]).all()
    assert not np.stack([loss, ce, kl])[:, 6:].any() and not gradient[6:].any()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_name)
def test_classes_that_are_ruled_out(using, dtype):
    rng = np.random.default_rng(5)
    s, t = logits(rng, 4, 400, dtype), logits(rng, 4, 400, dtype)
    s[0, ::3] = t[0, ::3] = -INF
    s[1, :390] = t[1, :390] = -INF
    s[2, 7] = -INF  # by the student alone: forward KL is +inf, with a gradient
    t[3, 100:] = -INF
    labels = np.array([1, 399, 0, 5])
    assert_kd(s, t, labels)
    assert np.isposinf(kd(Device, s, t, labels)[0]).tolist() == [False, False, True, False]


@pytest.mark.parametrize(("temperature", "scale"), [(0.05, 1.0), (0.5, 30.0), (20.0, 0.1), (1.0, 1e4), (1.0, 1e37)])
def test_temperatures_and_scales(using, temperature, scale):
    rng = np.random.default_rng(6)
    s, t = logits(rng, 2, 300, F32, scale), logits(rng, 2, 300, F32, scale)
    assert_kd(s, t, np.array([0, 299]), temperature=temperature)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_name)
def test_much_of_little(using, dtype):
    """Half of what a row adds up to lies in one class, half in classes far below: errors of theirs are alike."""
    s, t = np.full((2, 4096), -8.25, F32), np.full((2, 4096), -8.375, F32)
    s[0, 17], t[0, 1000], s[1, 5], t[1, 5] = 0.0, 0.0, 0.0, 0.0
    s[1, ::2] += 0.125
    assert_kd(s.astype(dtype), t.astype(dtype), np.array([17, 9]), temperature=1.0)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_name)
@pytest.mark.parametrize(("of_student", "of_teacher"), [(3e6, 0.0), (0.0, -7e6), (5e6, 1e4), (1e30, -1e33), (2.0, 1e5)])
def test_logits_far_from_0(using, of_student, of_teacher, dtype):
    """So far that the rounding of a maximum's exponent would show, or that none but the largest logit counts."""
    rng = np.random.default_rng(15)
    steps = rng.integers(-3, 3, size=(2, 2, 300))
    s, t = (
        (offset + float(np.spacing(dtype.type(abs(offset) + 4))) * of_row).astype(dtype)
        for offset, of_row in zip((of_student, of_teacher), steps, strict=True)
    )
    assert_kd(s, t, np.array([299, 7]), temperature=1.0)
    assert_kd(s, t, np.array([299, 7]), temperature=3.0)


def test_classes_masked_by_a_number(using):
    """By the smallest one, as some do: differences overflow that the loss needs, if the teacher rules nothing out."""
    rng = np.random.default_rng(16)
    s, t = logits(rng, 3, 300, F32), logits(rng, 3, 300, F32)
    s[:2, 5::7] = np.finfo(F32).min
    t[1, 5::7] = np.finfo(F32).min
    t[2, 100:200] = np.finfo(F32).min
    assert_kd(s, t, np.array([299, 7, 0]), temperature=1.0)
    loss = kd(Device, s, t, np.array([299, 7, 0]), temperature=1.0)[0]
    assert loss[0] > 1e36 and (loss[1:] < 100).all()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_name)
@pytest.mark.parametrize("masked", [-1e6, -1e10, -1e13, -1e30])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0, 8.0])
def test_most_classes_masked_by_a_number(using, temperature, masked, dtype):
    """So that threads, and blocks, have none but those, whose exponents no multiply-add holds."""
    rng = np.random.default_rng(17)
    s, t = logits(rng, 1, 900, dtype), logits(rng, 1, 900, dtype)
    s[:, :800], t[:, :800] = masked, masked
    assert_kd(s, t, np.array([850]), temperature=temperature)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_a_class_that_the_student_rules_out_is_in_the_teachers_support(using, temperature):
    """However small its probability."""
    rng = np.random.default_rng(18)
    s, t = logits(rng, 1, 300, F32), logits(rng, 1, 300, F32)
    s[0, 5], t[0, 5] = -INF, np.finfo(F32).min
    loss, _, kl, gradient, _ = kd(Device, s, t, np.array([7]), temperature=temperature)
    assert loss[0] == kl[0] == INF
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize(("temperature", "scale"), [(1e14, 1e14), (1e14, 1e16), (1e-10, 1e-10), (1e19, 3e19)])
def test_logits_as_large_as_the_temperature(using, temperature, scale):
    rng = np.random.default_rng(19)
    for shift in (0.0, -60 * scale):
        s, t = (logits(rng, 2, 200, F32, scale) + F32.type(shift) for _ in range(2))
        assert_kd(s, t, np.array([7, 100]), temperature=temperature, alpha=0.0)


def test_a_maximum_that_rises_all_the_time(using):
    rising = np.arange(600, dtype=F32)[None] / 4
    assert_kd(rising, rising[:, ::-1].copy(), np.array([599]), temperature=2.0)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_name)
def test_results_do_not_depend_on_where_rows_lie(using, dtype):
    """By 16 bytes, and by elements where rows are not aligned, lie backwards or have gaps."""
    rng = np.random.default_rng(7)
    V, labels = 337, np.array([0, 336, 20])
    s, t = logits(rng, 3, V, dtype), logits(rng, 3, V, dtype)
    expected = kd(Device, s, t, labels)
    objective = Objective(forward_kl(), 2.0, 2.0, 0.3, 4.0, -100)
    for offset, step, stride in ((0, 344, 1), (1, 344, 1), (3, 337, 1), (8, 352, 1), (0, 700, 2), (337, 352, -1)):
        places = []
        for x in (s, t, np.zeros_like(s)):
            host = np.full(400 + 3 * step + V * abs(stride), 7, x.dtype)
            start = offset + (V if stride < 0 else 0)
            view = np.lib.stride_tricks.as_strided(
                host[start:], (3, V), (step * x.dtype.itemsize, stride * x.dtype.itemsize)
            )
            view[...] = x
            whole = memory.to_device(host, None)
            out = whole.view(whole[start:].address, layout_of(view.shape, view.strides, whole.dtype))
            places.append((whole, out, view, host))
        (_, d_s, _, _), (_, d_t, _, _), (whole, out, view, host) = places
        loss, ce, kl = (memory.empty((3,), np.float64, None) for _ in range(3))
        kdcore.cuda.kd_rows(
            d_s, d_t, memory.to_device(labels, None), memory.nothing(np.float64),
            memory.full((1,), np.float64, 1.0, None), objective, out, loss, ce, kl, memory.nothing(np.int64, (0, 2)),
            None,
        )  # fmt: skip
        assert memory.to_host(loss).tobytes() == expected[0].tobytes()
        view[...] = expected[3]  # and nothing beside the gradient is written
        assert memory.to_host(whole).tobytes() == host.tobytes()


@pytest.mark.parametrize("dtype", [F32, BF16], ids=dtype_name)
def test_results_do_not_depend_on_other_rows(using, dtype):
    rng = np.random.default_rng(8)
    s, t, labels = logits(rng, 5, 411, dtype), logits(rng, 5, 411, dtype), rng.integers(411, size=5)
    together = kd(Device, s, t, labels)
    for i in range(5):
        alone = kd(Device, s[i : i + 1], t[i : i + 1], labels[i : i + 1])
        for x, y in zip(together, alone, strict=True):
            assert x[i : i + 1].tobytes() == y.tobytes()


@pytest.mark.parametrize("threads", [32, 96, 128])
@pytest.mark.parametrize("kernel", ["row", "group"])
def test_numbers_of_threads(kernel, threads):
    rng = np.random.default_rng(9)
    s, t = logits(rng, 2, 1001, F32), logits(rng, 2, 1001, F32)
    with plans.using(kernel=kernel, threads=threads):
        assert_kd(s, t, np.array([1000, 500]))


def test_many_blocks(monkeypatch):
    """More than a warp has lanes, each with some classes."""
    if SIMULATOR:
        monkeypatch.setattr("simulator.RESIDENT", 64)
    rng = np.random.default_rng(10)
    s, t = logits(rng, 1, 509, BF16), logits(rng, 1, 509, BF16)
    with plans.using(kernel="group", blocks=64):
        assert_kd(s, t, np.array([500]))


def test_blocks_of_a_row_need_no_more_room_than_they_take(monkeypatch):
    """No block waits for one that cannot start before others have ended, whatever the order in which they start."""
    if not SIMULATOR:
        pytest.skip("a device's room and order are its own")
    monkeypatch.setattr("simulator.RESIDENT", 3)
    rng = np.random.default_rng(14)
    s, t = logits(rng, 6, 90, F32), logits(rng, 6, 90, F32)
    with plans.using(kernel="group", blocks=3):
        assert_kd(s, t, np.arange(6))


# --- the choice ----------------------------------------------------------------------------------------------------


def test_the_choice_is_explained():
    if not SIMULATOR:
        pytest.skip("the numbers are those of the simulator's device")
    assert plans.explain(32768) == (
        "group kernel, 8 blocks of 32 threads a row: each logit is read once, 6 blocks share a multiprocessor"
    )
    assert plans.explain(100_000, "bfloat16").startswith("group kernel, 13 blocks of 32 threads a row")
    assert plans.explain(4000) == "row kernel, 1 block of 64 threads a row: there are fewer than 4096 classes"
    assert plans.explain(100_000, "float64").endswith("the group kernel is for float32 work, from 8.0 on")
    assert "more classes than the group kernel can keep" in plans.explain(10_000_000)
    with pytest.MonkeyPatch.context() as patch:  # a small device, on which so many blocks might wait for each other
        patch.setitem(plans._SIMULATED, "MULTIPROCESSOR_COUNT", 16)
        assert plans.explain(32_000).startswith("group kernel, 8 blocks")
        assert "more classes than the group kernel can keep" in plans.explain(50_000)
    with pytest.MonkeyPatch.context() as patch:  # one with room for few blocks, where the cache does as well
        patch.setitem(plans._SIMULATED, "MAX_SHARED_MEMORY_PER_MULTIPROCESSOR", 100 << 10)
        assert plans.explain(32768).endswith(
            "the second read comes from the cache: all multiprocessors' rows, 33 MiB at a time, of a cache of 50 MiB"
        )
        assert plans.explain(100_000).startswith("group kernel")
    with plans.using(kernel="row", threads=128):
        assert plans.explain(100_000) == "row kernel, 1 block of 128 threads a row: as was asked for"


def test_large_rows_are_worked_by_the_group_kernel(monkeypatch):
    """What is chosen is what runs."""
    rng = np.random.default_rng(11)
    s, t, labels = logits(rng, 1, 800, F32), logits(rng, 1, 800, F32), np.array([3])
    with plans.using(kernel="group"):
        by_group = kd(Device, s, t, labels)
    ran = []
    original = groups.group_kernel
    monkeypatch.setattr("kdcore.cuda.launch.group_kernel", lambda *key: ran.append(key) or original(*key))
    by_row = kd(Device, s, t, labels)
    assert not ran
    monkeypatch.setattr(plans, "_GROUP_FROM", 800)
    chosen = kd(Device, s, t, labels)
    assert len(ran) == 1
    for x, y, z in zip(chosen, by_group, by_row, strict=True):
        assert x.tobytes() == y.tobytes()
        np.testing.assert_allclose(x, z, rtol=2e-6, atol=1e-8)


def test_what_cannot_be_asked_for():
    x = np.zeros((1, 6000), F32)
    for options, words in [
        ({"kernel": "group", "threads": 256}, "threads=256, but a block of the group kernel has at most 128"),
        ({"kernel": "group", "threads": 32, "blocks": 1}, "needs 2 blocks of 32 threads for 6000 classes"),
        ({"kernel": "group", "blocks": 65}, "can have 64: got blocks=65"),
        ({"kernel": "row", "threads": 1024}, "threads=1024, but a block of this kernel has at most 512"),
    ]:
        with plans.using(**options), pytest.raises(DomainError, match=words):
            kd(Device, x, x, alpha=0.0)
    with plans.using(kernel="group"), pytest.raises(DomainError, match="worked in float32"):
        kd(Device, x.astype(F64), x.astype(F64), alpha=0.0)
    with plans.using(kernel="group"), pytest.raises(DomainError, match="forward KL"):
        kd(Device, x, x, alpha=0.0, divergence="jsd")
    for options, words in [
        ({"kernel": "fast"}, "kernel must be"),
        ({"threads": 48}, "multiple of 32, got 48"),
        ({"blocks": 0}, "blocks"),
    ]:
        with pytest.raises(DomainError, match=words), plans.using(**options):
            pass
    with pytest.raises(DTypeError, match="float8"):
        plans.explain(100, "float8")


def test_the_example(capsys):
    """A kernel of a user's own, of row functions; it checks itself against the host."""
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "cuda_kernel.py"), run_name="__main__")
    assert "confidence: [0." in capsys.readouterr().out


def test_reductions_one_after_another():
    """Each leaves its scratch as the next one needs it, whichever thread comes first."""

    @cuda.jit
    def reductions(out):
        shared = cuda.shared.array(SCRATCH, float64)
        i = np.float64(cuda.threadIdx.x)
        for k in range(4):
            low, high = rows.block_maxima(-i - k, i * k, shared)
            a, b, c, d = rows.block_sums(i + k, 1.5, i * k, -i, shared)
            e, _, _, f = rows.block_sums(i, 0.0, 1.0, k, shared)
            g, h = rows.block_total(i, shared), rows.block_total(k, shared)
            for n, value in enumerate((low, high, a, b, c, d, e, f, g, h)):
                out[cuda.blockIdx.x, cuda.threadIdx.x, k, n] = value

    out = cuda.device_array((8, 96, 4, 10), np.float64)
    reductions[8, 96](out)
    sum_ = 95 * 48
    expected = [
        [-k, 95 * k, sum_ + 96 * k, 144, sum_ * k, -sum_, sum_, 96 * k, sum_, 96 * k] for k in map(float, range(4))
    ]
    np.testing.assert_array_equal(out.copy_to_host(), np.broadcast_to(expected, (8, 96, 4, 10)))


# --- mergeable states ----------------------------------------------------------------------------------------------


def in_slices(arrays, cuts, temperature, alpha, **options):
    """Loss and gradient by way of the states of slices, merged from the last to the first."""
    student, teacher, labels = arrays
    bounds = list(pairwise((0, *cuts, student.shape[1])))
    slices = [(start, student[:, start:end], teacher[:, start:end]) for start, end in bounds]
    parts = [kdcore.kd_state(s, t, labels, temperature, start=start) for start, s, t in slices]
    state = reduce(kdcore.merge_states, reversed(parts))
    result = kdcore.kd_loss_from_state(state, labels, alpha, **options)
    gradients = [
        kdcore.kd_gradient_from_state(state, s, t, labels, alpha, start=start, **options) for start, s, t in slices
    ]
    return state, result, gradients


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=dtype_name)
@pytest.mark.parametrize(("alpha", "temperature"), [(0.3, 2.0), (0.0, 3.0), (1.0, 1.0)])
def test_states_are_the_hosts(dtype, alpha, temperature):
    rng = np.random.default_rng(12)
    s, t, labels = logits(rng, 4, 90, dtype), logits(rng, 4, 90, dtype), np.array([0, 89, -100, 50])
    s[0, :40] = t[0, :40] = -INF  # a slice without support
    t[1, 3] = -INF
    weights = np.array([1.0, 2.0, 1.0, 0.5])
    cuts = (40, 60)
    host_state, host, host_gradients = in_slices((s, t, labels), cuts, temperature, alpha, weights=weights)
    arrays = [to_device(array) for array in (s, t, labels)]
    device_state, device, gradients = in_slices(arrays, cuts, temperature, alpha, weights=cuda.to_device(weights))
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == F64 else {"rtol": 2e-6, "atol": 2e-6}
    read = labels >= 0
    np.testing.assert_allclose(device_state.values.copy_to_host()[read], host_state.values[read], **tolerance)
    for ours, other in zip((host.loss, host.ce, host.kl), (device.loss, device.ce, device.kl), strict=True):
        assert (ours is None) == (other is None)
        if ours is not None:
            np.testing.assert_allclose(other.copy_to_host(), ours, **tolerance)
    rounding = {"rtol": 0, "atol": 5e-3} if dtype == BF16 else tolerance
    for ours, other in zip(host_gradients, gradients, strict=True):
        np.testing.assert_allclose(to_host(other).astype(F64), ours.astype(F64), **rounding)


@pytest.mark.parametrize("out", [F32, F16, BF16], ids=dtype_name)
@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=dtype_name)
def test_gradients_of_states_in_another_dtype(dtype, out):
    rng = np.random.default_rng(14)
    s, t, labels = logits(rng, 2, 600, dtype), logits(rng, 2, 600, dtype), np.array([599, 3])
    student, teacher, classes = to_device(s), to_device(t), to_device(labels)
    gradient = to_device(np.full(s.shape, NAN, out))
    state = kdcore.kd_state(student, teacher, classes, 2.0)
    kdcore.kd_gradient_from_state(state, student, teacher, classes, 0.3, out=gradient)
    exact = oracle.kd(s.astype(F64), t.astype(F64), labels, 2.0, 0.3).gradient
    digits = {F32: 1e-6, F16: 1e-3, BF16: 8e-3}[out]
    np.testing.assert_allclose(to_host(gradient).astype(F64), exact.astype(F64), rtol=digits, atol=digits / 100)


def test_states_merge_alike_either_way():
    rng = np.random.default_rng(13)
    s, t = logits(rng, 3, 80, F32), logits(rng, 3, 80, F32)
    s[1, :40] = -INF
    a, b = (
        kdcore.kd_state(*(cuda.to_device(np.ascontiguousarray(x[:, part])) for x in (s, t)), None, 2.0)
        for part in (slice(0, 40), slice(40, 80))
    )
    one, other = kdcore.merge_states(a, b).values, kdcore.merge_states(b, a).values
    assert one.copy_to_host().tobytes() == other.copy_to_host().tobytes()


def test_states_with_gaps_are_refused():
    values = cuda.to_device(np.zeros((3, 14)))
    state = kdcore.KDState(values[:, ::2], 1.0, 1.0)
    with pytest.raises(kdcore.ShapeError, match="contiguous on a device"):
        kdcore.kd_loss_from_state(state, None, 0.0)


def test_states_of_rows_that_cannot_be_used():
    """Nothing waits for the device, so nothing raises: they are NaN."""
    s, t = np.zeros((3, 20), F32), np.zeros((3, 20), F32)
    s[0, 3], t[1] = NAN, -INF
    s, t = cuda.to_device(s), cuda.to_device(t)
    state = kdcore.kd_state(s, t, None, 2.0)
    loss = kdcore.kd_loss_from_state(state, None, 0.0, reduction="none").loss.copy_to_host()
    assert np.isnan(loss).tolist() == [True, True, False]
    gradient = kdcore.kd_gradient_from_state(state, s, t, None, 0.0, reduction="none").copy_to_host()
    assert np.isnan(gradient).all(axis=1).tolist() == [True, True, False]
