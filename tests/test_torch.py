"""kdcore.torch: the same numbers as kdcore's, with the gradient where PyTorch's users look for it."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import ml_dtypes
import numpy as np
import pytest

import kdcore
from kdcore.divergences import NAMES

torch = pytest.importorskip("torch", reason="torch is not installed")

from kdcore.torch import KDLoss, kd_loss  # noqa: E402 (not without torch)

functional = torch.nn.functional
IGNORE = -100


def tensors(dtype=torch.float64, shape=(2, 3), classes=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (3 * torch.randn(2, *shape, classes, generator=generator, dtype=torch.float64)).to(dtype)
    labels = torch.randint(classes, shape, generator=generator)
    labels.view(-1)[1] = IGNORE
    return student.requires_grad_(), teacher, labels


def arrays(*given):
    """Tensors as NumPy arrays of their own memory; bfloat16 by its bits."""
    for tensor in given:
        tensor = tensor.detach()
        if tensor.dtype == torch.bfloat16:
            yield tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        else:
            yield tensor.numpy()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_gradcheck(alpha, reduction):
    student, teacher, labels = tensors()
    weights = torch.tensor([[1.0, 2.0, 0.5], [0.0, 1.0, 3.0]])
    for given in (None, weights):
        criterion = KDLoss(2.0, alpha, reduction=reduction)
        assert torch.autograd.gradcheck(lambda s, w=given, f=criterion: f(s, teacher, labels, weights=w), (student,))


@pytest.mark.parametrize("divergence", [name for name in NAMES if name != "tvd"])
def test_gradcheck_of_divergences(divergence):
    student, teacher, labels = tensors()
    criterion = KDLoss(2.0, 0.3, divergence=divergence, teacher_temperature=1.5)
    assert torch.autograd.gradcheck(lambda s: criterion(s, teacher, labels), (student,))


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "zero", "uniform"])
def test_teachers_without_every_class(tail):
    """Rows of tensors or of arrays, whose loss has the gradient that PyTorch finds."""
    student, teacher, labels = tensors()
    rows = kdcore.TopKRows.from_logits(teacher.numpy(), 3, 2.0)
    criterion = KDLoss(2.0, 0.3, tail=tail)
    of_tensors = rows.map(torch.from_numpy)
    assert torch.autograd.gradcheck(lambda s: criterion(s, of_tensors, labels), (student,))
    expected = kdcore.kd_loss(student.detach().numpy(), rows, labels.numpy(), 2.0, 0.3, tail=tail)
    for given in (rows, of_tensors):
        assert float(criterion(student, given, labels).detach()) == expected
    samples = kdcore.SampledRows.from_logits(teacher.numpy(), 3, 2.0, seed=0).map(torch.from_numpy)
    assert torch.autograd.gradcheck(lambda s: kd_loss(s, samples, labels, 2.0, 0.3), (student,))


def test_a_policy_that_there_is_not():
    with pytest.raises(kdcore.DomainError, match="tail must be one of"):
        KDLoss(2.0, 0.3, tail="none")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_same_bits_as_kdcore(dtype):
    student, teacher, labels = tensors(dtype, (2, 5), 1031)
    loss = KDLoss(2.0, 0.3)(student, teacher, labels)
    loss.backward()
    expected = kdcore.kd_loss_and_gradient(*arrays(student, teacher, labels), 2.0, 0.3)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert loss.dtype == wide and loss.item() == torch.tensor(expected.loss, dtype=wide).item()
    assert student.grad.dtype == dtype
    assert next(arrays(student.grad)).tobytes() == expected.gradient.tobytes()


def test_the_textbook_in_torch():
    student, teacher, labels = tensors(torch.float64, (6,), 33)
    T, alpha = 2.0, 0.3
    hard = functional.cross_entropy(student, labels, ignore_index=IGNORE)
    log_q, log_p = functional.log_softmax(student / T, -1), functional.log_softmax(teacher / T, -1)
    rows = functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    expected = alpha * hard + (1 - alpha) * T**2 * rows[labels != IGNORE].mean()
    (gradient,) = torch.autograd.grad(expected, student)
    actual = KDLoss(T, alpha)(student, teacher, labels)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.autograd.grad(actual, student)[0], gradient, rtol=1e-12, atol=1e-15)


def test_a_scaled_loss_keeps_small_gradients_in_float16():
    student, teacher, labels = tensors(torch.float16, (4096,), 64)
    scale = 65536.0
    (KDLoss(2.0, 0.3)(student, teacher, labels) * scale).backward()
    exact = kdcore.kd_logit_gradient(*arrays(student.double(), teacher.double(), labels), 2.0, 0.3)
    assert (np.abs(exact) < 2.0**-25).mean() > 0.005  # unscaled, they would be 0 or twice as large
    error = np.abs(student.grad.double().numpy() / scale - exact)
    assert (error <= 1e-3 * np.abs(exact) + 1e-9 * np.abs(exact).max() + 2.0**-25 / scale).all()


def test_backward():
    student, teacher, labels = tensors()
    loss = KDLoss(2.0, 0.3)(student, teacher, labels)
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    (again,) = torch.autograd.grad(loss, student, retain_graph=True)
    (tripled,) = torch.autograd.grad(3 * loss, student, retain_graph=True)
    assert once.equal(again) and tripled.equal(3 * once)
    rows = KDLoss(2.0, 0.3, reduction="none")(student, teacher, labels)
    factors = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
    (weighted,) = torch.autograd.grad((factors * rows).sum(), student)
    torch.testing.assert_close(weighted / factors[..., None].clamp(min=1), once * 5 * (factors[..., None] > 0))


def test_a_second_derivative_is_refused():
    student, teacher, labels = tensors()
    loss = KDLoss(2.0, 0.3)(student, teacher, labels)
    with pytest.raises(RuntimeError, match="can be differentiated once"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_without_a_gradient():
    student, teacher, labels = tensors()
    criterion = KDLoss(2.0, 0.3)
    loss = criterion(student, teacher, labels)
    with torch.no_grad():
        assert criterion(student, teacher, labels).equal(loss) and not criterion(student, teacher, labels).requires_grad
    assert not criterion(student.detach(), teacher.requires_grad_(), labels).requires_grad  # the teacher is a constant
    loss = criterion(student, teacher, labels)
    loss.backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize(
    "layout",
    [lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x.repeat_interleave(2, -1)[..., ::2]],
    ids=["transposed", "strided"],
)
def test_layouts(layout):
    student, teacher, labels = tensors(torch.float32, (3, 4), 37)
    expected = KDLoss(2.0, 0.3)(student, teacher, labels)
    (gradient,) = torch.autograd.grad(expected, student)
    other = layout(student.detach()).requires_grad_()
    assert not other.is_contiguous()
    loss = KDLoss(2.0, 0.3)(other, layout(teacher), labels)
    assert loss.equal(expected) and torch.autograd.grad(loss, other)[0].equal(gradient)


def test_training():
    torch.manual_seed(0)
    features, teacher = torch.randn(64, 8, dtype=torch.float64), torch.randn(64, 5, dtype=torch.float64)
    labels = torch.randint(5, (64,))

    def trained(criterion):
        torch.manual_seed(1)
        head = torch.nn.Linear(8, 5, dtype=torch.float64)
        optimizer = torch.optim.SGD(head.parameters(), lr=0.5)
        for _ in range(20):
            optimizer.zero_grad()
            loss = criterion(head(features), teacher, labels)
            loss.backward()
            optimizer.step()
        return loss, head.weight

    def by_hand(student, teacher, labels):
        log_q, log_p = functional.log_softmax(student / 2, -1), functional.log_softmax(teacher / 2, -1)
        soft = functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        return 0.3 * functional.cross_entropy(student, labels) + 0.7 * 4 * soft

    for actual, expected in zip(trained(KDLoss(2.0, 0.3)), trained(by_hand), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-13)


def test_denominator_and_weights():
    student, teacher, labels = tensors()
    whole = KDLoss(2.0, 0.3)(student, teacher, labels)
    counted = int((labels != IGNORE).sum())
    parts = [KDLoss(2.0, 0.3)(student[i], teacher[i], labels[i], denominator=counted) for i in range(2)]
    torch.testing.assert_close(sum(parts), whole)
    masked = KDLoss(2.0, 0.3)(student, teacher, labels.clamp(min=0), weights=(labels != IGNORE).double())
    torch.testing.assert_close(masked, whole)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # which the compiler looks at
def test_a_compiled_model_leaves_the_loss_alone():
    student, teacher, labels = tensors()
    criterion = KDLoss(2.0, 0.3)
    compiled = torch.compile(lambda s: criterion(2 * s, teacher, labels), backend="eager")
    assert compiled(student).equal(criterion(2 * student, teacher, labels))


def test_arguments():
    student, teacher, labels = tensors()
    with pytest.raises(kdcore.DomainError, match="temperature must be a positive finite number, got 0"):
        KDLoss(0, 0.3)
    with pytest.raises(kdcore.DomainError, match="alpha"):
        KDLoss(2.0, 1.5)
    with pytest.raises(kdcore.DTypeError, match="student_logits must be a tensor, got ndarray"):
        kd_loss(student.detach().numpy(), teacher, labels, 2.0, 0.3)
    with pytest.raises(kdcore.DTypeError, match="teacher_logits must be on the CPU or on a CUDA device"):
        kd_loss(student, teacher.to("meta"), labels, 2.0, 0.3)
    with pytest.raises(kdcore.LabelError, match=r"labels\[0, 0\] is 7"):
        kd_loss(student, teacher, torch.full((2, 3), 7), 2.0, 0.3)
    with pytest.raises(kdcore.NonFiniteError, match=r"student_logits\[1, 2, 3\] is nan"):
        broken = student.detach().clone()
        broken[1, 2, 3] = torch.nan
        kd_loss(broken.requires_grad_(), teacher, labels, 2.0, 0.3)
    assert "temperature=2.0, alpha=0.3, divergence='forward_kl'" in repr(KDLoss(2.0, 0.3))


def test_kdcore_alone_does_not_import_torch():
    code = """
        import sys
        import kdcore
        kdcore.softmax([[0.0, 1.0]])
        assert "torch" not in sys.modules
        assert kdcore.torch.KDLoss.__name__ == "KDLoss"
        assert "torch" in sys.modules
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=True)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["topk", "dense", "hidden"])
def test_a_store_of_torch_tensors_on_a_device(tmp_path, monkeypatch, dtype, kind):
    """What PyTorch selects is what the CPU kernels select; on a CUDA device if there is one, else as if on one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        monkeypatch.setattr("kdcore.store.writer.on_device", lambda obj: isinstance(obj, torch.Tensor))
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(7, 700, generator=generator) * 4).to(getattr(torch, dtype))
    if kind == "topk":
        logits[2, 9:] = -np.inf
        logits[3] = torch.arange(700)  # all different in every dtype but bfloat16
    monkeypatch.setattr("kdcore.store.device._ELEMENTS", 1500)
    extra = {"topk": {"k": 8, "temperatures": (1.0, 2.0, 0.5)}, "dense": {}, "hidden": {"head": np.ones((700, 700))}}[
        kind
    ]
    options = {"vocab_size": 700, "kind": kind, "capacity": 7, "value_dtype": "float32"} | extra
    stores = []
    host = logits.float() if dtype == "bfloat16" else logits
    for name, rows in (("torch.h5", logits.to(device)), ("cpu.h5", host.numpy())):
        with kdcore.LogitStoreWriter(tmp_path / name, **options) as writer:
            writer.append(np.arange(7), rows)
        stores.append(kdcore.LogitStore(tmp_path / name, head=extra.get("head")))
        stores[-1].verify()
    for temperature in stores[0].temperatures:
        a, b = (store.read(slice(None), temperature) for store in stores)
        if kind != "topk":
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
            continue
        np.testing.assert_array_equal(a.n_valid, b.n_valid)
        np.testing.assert_allclose(a.log_probs, b.log_probs, rtol=1e-6, atol=2e-6)
        np.testing.assert_allclose(a.tail_logmass, b.tail_logmass, rtol=1e-6, atol=2e-6)
        if dtype in (
            "float32",
            "float64",
        ):  # others have equals at the last place, of which PyTorch keeps which it likes
            np.testing.assert_array_equal(a.indices, b.indices)
    with kdcore.LogitStoreWriter(tmp_path / "bad.h5", **options) as writer:
        for value, words in ((np.nan, r"logits\[4, 5\] is nan"), (np.inf, r"logits\[4, 5\] is inf")):
            bad = logits.clone()
            bad[4, 5] = value
            with pytest.raises(kdcore.NonFiniteError, match=words):
                writer.append(np.arange(7), bad.to(device))
        with pytest.raises(kdcore.VocabularyMismatchError):
            writer.append(np.arange(7), logits[:, 1:].to(device))
        if kind != "hidden":
            with pytest.raises(kdcore.NonFiniteError, match=r"logits\[6\] is -inf in every class"):
                writer.append(np.arange(7), torch.cat([logits[:6], torch.full_like(logits[:1], -np.inf)]).to(device))


# --- the backward pass ---------------------------------------------------------------------------------------------


def product(student, teacher, labels, reduction, grad_output):
    """What a backward pass is to give, bit by bit: the loss's own gradient times that of its result, rounded once."""
    out = torch.empty_like(student, dtype=torch.float32 if student.dtype == torch.float16 else student.dtype)
    result = kdcore.kd_loss_and_gradient(
        *arrays(student, teacher, labels), 2.0, 0.3, reduction=reduction, out=next(arrays(out))
    )
    assert result.gradient is not None
    factors = grad_output[..., None] if grad_output.ndim else grad_output
    return (out * factors).to(student.dtype)


def same_bits(a, b):
    return a.dtype == b.dtype and next(arrays(a)).tobytes() == next(arrays(b)).tobytes()


FACTORS = [1.0, 3.0, 1 / 3, 65536.0, float("inf"), float("nan")]


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_bits_of_a_backward_pass(dtype, reduction):
    """With a graph that is kept, and with one that is not; whatever comes from above, and in whatever layout."""
    student, teacher, labels = tensors(dtype, (2, 3), 37)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = [torch.tensor(factor, dtype=wide) for factor in FACTORS]
    if reduction == "none":
        rows = torch.tensor([[1.0, 0.0, -2.0], [1 / 3, 1.0, 65536.0]], dtype=wide)
        given = [rows, rows.T.contiguous().T, *[factor.expand(2, 3) for factor in given[:3]]]
    criterion = KDLoss(2.0, 0.3, reduction=reduction)
    for grad_output in given:
        expected = product(student, teacher, labels, reduction, grad_output)
        loss = criterion(student, teacher, labels)
        for keep in (True, True, False):
            (gradient,) = torch.autograd.grad(loss, student, grad_output, retain_graph=keep)
            assert same_bits(gradient, expected)
            gradient.zero_()  # whoever gets it may do with it what they like
        with pytest.raises(RuntimeError, match="backward through the graph a second time"):
            torch.autograd.grad(loss, student, grad_output)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_the_gradient_is_given_away_once(monkeypatch, factor, keep):
    """What has been kept for the backward pass, if that is the result, and the graph cannot ask for it again."""
    student, teacher, labels = tensors(torch.float32, (4,), 37)

    def is_given_away():
        loss = KDLoss(2.0, 0.3)(student, teacher, labels)
        (gradient,) = torch.autograd.grad(loss, student, torch.tensor(factor), retain_graph=keep)
        return gradient.data_ptr() == loss.grad_fn.address

    assert is_given_away() == (factor == 1.0 and not keep)
    monkeypatch.delattr(torch._C._autograd, "_get_current_graph_task_keep_graph")
    assert not is_given_away()  # whether it is kept is not known


@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_what_hooks_hold_is_theirs(monkeypatch, factor):
    """Hooks that save tensors elsewhere may bring back what somebody else has, or what cannot be written."""
    student, teacher, labels = tensors(torch.float32, (4,), 37)
    held = []

    def pack(tensor):
        held.append(tensor)
        return tensor

    monkeypatch.setattr(kdcore.torch, "_LARGE", 1)
    for unpack in (lambda tensor: tensor, lambda tensor: tensor[:, :1].expand(tensor.shape)):
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            loss = KDLoss(2.0, 0.3)(student, teacher, labels)
        before = held[-1].clone()
        (gradient,) = torch.autograd.grad(loss, student, torch.tensor(factor))
        assert same_bits(gradient, unpack(before) * factor)
        gradient.zero_()
        assert same_bits(held[-1], before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_batched_backward_passes(dtype):
    """As vectorised Jacobians make them: a gradient for each of a batch of what comes from above."""
    student, teacher, labels = tensors(dtype, (4,), 7)
    criterion = KDLoss(2.0, 0.3, reduction="none")
    loss = criterion(student, teacher, labels)
    for keep in (True, False):
        (found,) = torch.autograd.grad(
            loss, student, torch.eye(4, dtype=loss.dtype), is_grads_batched=True, retain_graph=keep
        )
        for row in range(4):
            (one,) = torch.autograd.grad(criterion(student, teacher, labels)[row], student)
            assert same_bits(found[row], one)
    loss = KDLoss(2.0, 0.3)(student, teacher, labels)
    (found,) = torch.autograd.grad(loss, student, torch.tensor([1.0, 2.0], dtype=loss.dtype), is_grads_batched=True)
    assert same_bits(found[1], found[0] * 2)


def test_a_loss_is_no_part_of_another_tensor():
    """On a device it comes as one of three numbers; of a view autograd refuses what is done in place."""
    student, _, _ = tensors(torch.float64, (4,), 5)
    parts = torch.arange(3.0, dtype=torch.float64)
    loss = kdcore.torch._tensor(parts[1], student)
    loss += 1
    assert loss == 2 and parts.tolist() == [0, 1, 2] and not loss._is_view()


def test_gradients_add_up():
    """Three passes through one graph, and through three, into one leaf; and through a graph of two losses."""
    student, teacher, labels = tensors(torch.float32, (4,), 37)
    criterion = KDLoss(2.0, 0.3)
    (once,) = torch.autograd.grad(criterion(student, teacher, labels), student)
    loss = criterion(student, teacher, labels)
    for k in range(3):
        loss.backward(retain_graph=k < 2)
    assert same_bits(student.grad, once + once + once)
    student.grad = None
    for _ in range(3):
        criterion(student, teacher, labels).backward()
    assert same_bits(student.grad, once + once + once)
    student.grad = None
    twice = criterion(student, teacher, labels) * 2
    (twice + criterion(student, teacher, labels)).backward()
    assert same_bits(student.grad, 2 * once + once)


def test_a_scaler_and_its_scaled_loss():
    """What torch.amp.GradScaler does: scaled losses, gradients that are unscaled in place, infinite ones found."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        student, teacher, labels = tensors(dtype, (8,), 33)
        weight = torch.eye(33, dtype=torch.float32, requires_grad=True)
        for scale in (1.0, 2.0**16):
            logits = (student.detach().float() @ weight).to(dtype)
            loss = KDLoss(2.0, 0.3)(logits, teacher, labels)
            (gradient,) = torch.autograd.grad(loss * scale, weight)
            exact = student.detach().double().T @ torch.from_numpy(
                kdcore.kd_logit_gradient(*arrays(logits.double(), teacher.double(), labels), 2.0, 0.3)
            )
            error = (gradient.double() / scale - exact).abs().max() / exact.abs().max()
            assert error < {torch.float32: 1e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]


def test_on_a_device_no_value_is_asked_for(monkeypatch):
    """The tensors are on the CPU and say that they are on CUDA: then the factor goes to the engine, which looks."""

    class OnCuda(torch.Tensor):
        is_cuda = True
        __torch_function__ = torch._C._disabled_torch_function_impl

        def item(self):
            raise AssertionError("the host waits for the device")

    def scaled(gradient, factors, is_own=True):
        return kdcore.torch._scaled(gradient.as_subclass(OnCuda), factors.as_subclass(OnCuda), gradient.dtype, is_own)

    monkeypatch.setattr("kdcore.torch._graph_is_kept", lambda: False)
    small = torch.ones(3, 5)
    assert (scaled(small, torch.tensor(3.0)) == 3).all() and (small == 1).all()
    given = []
    monkeypatch.setattr(kdcore.torch, "_LARGE", 15)
    monkeypatch.setattr("kdcore.torch.ops.multiply_rows", lambda rows, factors: given.append((rows, factors)))
    third = torch.tensor(1 / 3)
    for dtype, expected in ((torch.float32, third), (torch.bfloat16, third.bfloat16().float())):
        for shape in ((2, 3, 5), (15,)):
            gradient = torch.ones(shape, dtype=dtype)
            assert scaled(gradient, third).data_ptr() == gradient.data_ptr()
            (rows, factors) = given.pop()
            assert rows.shape == (gradient.numel() // shape[-1], shape[-1]) and rows.data_ptr() == gradient.data_ptr()
            assert factors.shape == rows.shape[:1] and (factors == expected).all() and factors.dtype == torch.float32
    of_rows = torch.arange(6.0).reshape(2, 3)
    scaled(torch.ones(2, 3, 5, dtype=torch.bfloat16), of_rows)
    assert given.pop()[1].tolist() == [0, 1, 2, 3, 4, 5]
    gradient = torch.ones(3, 5)
    assert (scaled(gradient, third, is_own=False) == third).all() and (gradient == 1).all() and not given
    monkeypatch.setattr("kdcore.torch._graph_is_kept", lambda: True)
    assert (scaled(gradient, third) == third).all() and (gradient == 1).all() and not given
    gradient, factors = torch.rand(6, 5), torch.rand(6)
    expected = gradient * factors[:, None]
    monkeypatch.undo()
    kdcore.ops.multiply_rows(gradient.numpy(), factors.numpy())
    assert same_bits(gradient, expected)
