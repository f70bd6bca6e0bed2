"""MLPTeacher: its two file formats, what it refuses, and its forward on both engines."""

import itertools
import json
import math
import re

import h5py
import numpy as np
import pytest

from kdcore import formulas
from kdcore.cuda.presence import available
from kdcore.errors import (
    CheckpointError,
    DeviceMismatchError,
    DeviceUnavailableError,
    DomainError,
    DTypeError,
    MissingDependencyError,
    NonFiniteError,
    ShapeError,
    VocabularyMismatchError,
)
from kdcore.hdf5 import write_arrays
from kdcore.teachers.base import TeacherLogitsProvider
from kdcore.teachers.mlp import ACTIVATIONS, MLPTeacher, save_mlp

REASON = available()
needs_cuda = pytest.mark.skipif(REASON is not None, reason=str(REASON))
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])]

FUNCTIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "gelu": np.vectorize(lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
}


def layers_of(*widths, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (rng.normal(size=(m, k)).astype(dtype), rng.normal(size=m).astype(dtype)) for k, m in itertools.pairwise(widths)
    ]


def forward(x, layers, activation):
    for i, (weight, bias) in enumerate(layers):
        x = x @ weight.astype(np.float64).T + bias
        x = FUNCTIONS[activation](x) if i < len(layers) - 1 else x
    return x


def named(layers, prefix=""):
    """As nn.Sequential numbers them, with an activation module after each layer."""
    tensors = {}
    for i, (weight, bias) in enumerate(layers):
        tensors[f"{prefix}{2 * i}.weight"], tensors[f"{prefix}{2 * i}.bias"] = weight, bias
    return tensors


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", FUNCTIONS)
def test_forward_of_features(tmp_path, activation, device):
    layers = layers_of(4, 6, 5, 7)
    save_mlp(tmp_path / "mlp", layers, activation=activation)
    teacher = MLPTeacher(tmp_path / "mlp", 7, device=device)
    x = np.random.default_rng(1).normal(size=(3, 4))
    got = teacher.logits_for_batch(x)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, forward(x, layers, activation), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(teacher.logits_for_batch(x.tolist()), got)
    assert teacher.logits_for_batch(np.empty((0, 4))).shape == (0, 7)
    assert teacher.logits_for_batch([]).shape == (0, 7)
    assert isinstance(teacher, TeacherLogitsProvider)
    assert teacher.vocab_size == 7


@pytest.mark.parametrize("device", DEVICES)
def test_forward_of_tokens(tmp_path, device):
    layers, embedding = layers_of(6, 5, 9), np.random.default_rng(2).normal(size=(9, 2)).astype(np.float32)
    save_mlp(tmp_path / "mlp", layers, activation="tanh", embedding=embedding)
    teacher = MLPTeacher(tmp_path / "mlp", device=device)
    rows = [[1, 2, 3, 8], [4], [], [0, 5]]
    zero = np.zeros(2)
    windows = [embedding[[2, 3, 8]], [zero, zero, embedding[4]], [zero] * 3, [zero, *embedding[[0, 5]]]]
    expected = forward(np.array([np.concatenate(window) for window in windows]), layers, "tanh")
    np.testing.assert_allclose(teacher.logits_for_batch(rows), expected, rtol=1e-5, atol=1e-5)

    logits, mask = teacher.logits_per_position(rows)
    assert mask.tolist() == [[True] * 4, [True] + [False] * 3, [False] * 4, [True, True, False, False]]
    assert logits.shape == (4, 4, 9)
    assert not logits[~mask].any()
    np.testing.assert_allclose(logits[0, 3], expected[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits[3, 0], teacher.logits_for_batch([[0]])[0], rtol=1e-6, atol=1e-6)
    assert teacher.logits_per_position([])[0].shape == (0, 0, 9)


@pytest.mark.parametrize("device", DEVICES)
def test_features_per_position(tmp_path, device):
    layers = layers_of(3, 4)
    save_mlp(tmp_path / "mlp", layers)
    teacher = MLPTeacher(tmp_path / "mlp", device=device)
    x = np.random.default_rng(3).normal(size=(3, 3))
    logits, mask = teacher.logits_per_position([x, x[:1]])
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    expected = forward(x, layers, None)
    np.testing.assert_allclose(logits[0], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(logits[1], [expected[0], np.zeros(4), np.zeros(4)], rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@needs_cuda
def test_device_logits(tmp_path):
    from kdcore import engines

    save_mlp(tmp_path / "mlp", layers_of(3, 4))
    teacher = MLPTeacher(tmp_path / "mlp", device="cuda")
    logits = teacher.device_logits_for_batch([[1.0, 2.0, 3.0]])
    assert not isinstance(logits, np.ndarray)
    np.testing.assert_array_equal(engines.to_host(logits), teacher.logits_for_batch([[1.0, 2.0, 3.0]]))


def test_a_cpu_teacher_has_no_device_logits(tmp_path):
    save_mlp(tmp_path / "mlp", layers_of(3, 4))
    teacher = MLPTeacher(tmp_path / "mlp")
    with pytest.raises(DeviceMismatchError, match="device='cuda'"):
        teacher.device_logits_for_batch([[1.0, 2.0, 3.0]])
    with pytest.raises(DomainError, match="stream"):
        MLPTeacher(tmp_path / "mlp", stream=1)
    with pytest.raises(DomainError, match="device must be"):
        MLPTeacher(tmp_path / "mlp", device="tpu")


@pytest.mark.skipif(REASON is None, reason="CUDA can run here")
def test_cuda_without_a_device_is_an_error(tmp_path):
    save_mlp(tmp_path / "mlp", layers_of(3, 4))
    for name in ("mlp", "absent"):  # before the file is read
        with pytest.raises(DeviceUnavailableError, match=r"\w"):
            MLPTeacher(tmp_path / name, device="cuda")


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("prefix", ["", "net.", "model.layers"])
def test_both_formats_whatever_the_suffix(tmp_path, dtype, prefix):
    safetensors_numpy = pytest.importorskip("safetensors.numpy")
    layers = layers_of(3, 12, 4, dtype=dtype)
    tensors = named(layers, prefix)
    write_arrays(tmp_path / "a.safetensors", tensors, {"activation": "relu"})
    safetensors_numpy.save_file(tensors, tmp_path / "a.h5", {"activation": "relu"})
    x = np.random.default_rng(4).normal(size=(2, 3))
    expected = forward(x, layers, "relu")
    for name in ("a.safetensors", "a.h5"):
        np.testing.assert_allclose(MLPTeacher(tmp_path / name).logits_for_batch(x), expected, rtol=1e-5, atol=1e-5)


def test_hdf5_by_anyone(tmp_path):
    layers = layers_of(4, 6, 5)
    with h5py.File(tmp_path / "mlp.h5", "w") as file:
        for name, tensor in named(layers).items():
            file.create_dataset(name, data=tensor, compression="gzip")
        file.attrs["activation"] = "tanh"
    x = np.ones((1, 4))
    got = MLPTeacher(tmp_path / "mlp.h5").logits_for_batch(x)
    np.testing.assert_allclose(got, forward(x, layers, "tanh"), rtol=1e-5, atol=1e-5)
    with h5py.File(tmp_path / "mlp.h5", "a") as file:
        del file["2.bias"]
        file["2.bias"] = h5py.ExternalLink("other.h5", "/2.bias")
    with pytest.raises(CheckpointError, match=r"'2\.bias' is an external link"):
        MLPTeacher(tmp_path / "mlp.h5")


def test_layers_are_in_numeric_order(tmp_path):
    layers = layers_of(*[3] * 12)
    save_mlp(tmp_path / "mlp", layers, activation="tanh")  # "10" sorts before "2" as a string
    x = np.random.default_rng(5).normal(size=(2, 3))
    np.testing.assert_allclose(
        MLPTeacher(tmp_path / "mlp").logits_for_batch(x), forward(x, layers, "tanh"), rtol=1e-4, atol=1e-4
    )


def test_bfloat16_safetensors(tmp_path):
    pytest.importorskip("safetensors")
    arrays = {
        "0.weight": np.array([[1.0, -2.5], [0.15625, 3.0], [0.0, 1.0]], np.float32),
        "0.bias": np.array([1.0, 2.0, -0.5], np.float32),
    }
    header, data = {}, b""
    for name, array in arrays.items():
        stored = (array.view(np.uint32) >> 16).astype("<u2").tobytes()
        header[name] = {"dtype": "BF16", "shape": array.shape, "data_offsets": [len(data), len(data) + len(stored)]}
        data += stored
    text = json.dumps(header).encode()
    (tmp_path / "mlp").write_bytes(len(text).to_bytes(8, "little") + text + data)
    got = MLPTeacher(tmp_path / "mlp").logits_for_batch([[1.0, 2.0]])
    np.testing.assert_array_equal(got, [[-3.0, 8.15625, 1.5]])


def test_safetensors_missing(tmp_path, monkeypatch):
    (tmp_path / "mlp").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    monkeypatch.setitem(__import__("sys").modules, "safetensors", None)
    with pytest.raises(MissingDependencyError, match=r"kdcore\[safetensors\]"):
        MLPTeacher(tmp_path / "mlp")


GOOD = named(layers_of(3, 5, 4))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"0.gamma": np.ones(3)}, CheckpointError, "'0.gamma' is unknown"),
        ({"weight": np.ones(3)}, CheckpointError, "'weight' is unknown"),
        ({"2.bias": None}, CheckpointError, "'2.weight' but no bias"),
        ({"2.weight": None}, CheckpointError, "'2.bias' but no weight"),
        ({"other.4.weight": np.ones((4, 4))}, CheckpointError, "different prefixes"),
        ({"00.weight": np.ones((4, 4))}, CheckpointError, "the same number"),
        ({"9" * 5000 + ".weight": np.ones((4, 4))}, CheckpointError, "9.weight' is unknown"),
        ({"\N{ARABIC-INDIC DIGIT FOUR}.weight": np.ones((4, 4))}, CheckpointError, "is unknown"),
        ({"0.weight": np.ones(5)}, CheckpointError, r"'0.weight' must have the shape \[out, in\], got \(5,\)"),
        ({"0.weight": np.ones((5, 0))}, CheckpointError, "'0.weight' must have the shape"),
        ({"0.bias": np.ones(4)}, CheckpointError, r"'0.bias' must have the shape \(5,\)"),
        ({"2.weight": np.ones((4, 6))}, CheckpointError, "'2.weight' reads 6 values, but the layer before it has 5"),
        ({"0.weight": np.ones((5, 3), np.int64)}, CheckpointError, "'0.weight' has the dtype int64"),
        ({"2.bias": np.array([0, 1, np.nan, 0])}, NonFiniteError, r"'2.bias' is nan at \(2,\)"),
        ({"2.bias": np.array([0, 1e300, 0, 0])}, NonFiniteError, r"'2.bias' is 1e\+300 at \(1,\)"),
        ({"embedding.weight": np.ones((9, 2))}, CheckpointError, "'embedding.weight' must have the shape"),
        ({name: None for name in GOOD}, CheckpointError, "has no layer"),
    ],
)
def test_tensors_that_do_not_fit(tmp_path, changes, error, words):
    tensors = {name: array for name, array in (GOOD | changes).items() if array is not None}
    write_arrays(tmp_path / "mlp", tensors, {"activation": "relu"})
    with pytest.raises(error, match=words) as caught:
        MLPTeacher(tmp_path / "mlp")
    assert str(tmp_path / "mlp") in str(caught.value)


def test_the_activation_must_be_known_and_agree(tmp_path):
    write_arrays(tmp_path / "unknown", GOOD, {"activation": "swish"})
    write_arrays(tmp_path / "none", GOOD, {})
    write_arrays(tmp_path / "relu", GOOD, {"activation": "relu"})
    with pytest.raises(CheckpointError, match="'swish' from the metadata"):
        MLPTeacher(tmp_path / "unknown")
    with pytest.raises(CheckpointError, match="2 layers and no metadata 'activation'"):
        MLPTeacher(tmp_path / "none")
    with pytest.raises(CheckpointError, match="'tanh', but .* says 'relu'"):
        MLPTeacher(tmp_path / "relu", activation="tanh")
    x = np.ones((1, 3))
    np.testing.assert_array_equal(
        MLPTeacher(tmp_path / "none", activation="relu").logits_for_batch(x),
        MLPTeacher(tmp_path / "relu", activation="relu").logits_for_batch(x),
    )
    with pytest.raises(CheckpointError, match="layers and no metadata"):
        save_mlp(tmp_path / "never", layers_of(3, 4, 5))
    assert not (tmp_path / "never").exists()


def test_files_that_are_no_checkpoint(tmp_path):
    (tmp_path / "text").write_text("hello world")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "broken").write_bytes(b"\xff\0\0\0\0\0\0\0{no json")
    (tmp_path / "truncated").write_bytes(b"\x89HDF\r\n\x1a\n")
    for name in ("text", "empty", "broken", "truncated"):
        if name == "broken":
            pytest.importorskip("safetensors")
        with pytest.raises(CheckpointError, match=name):
            MLPTeacher(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        MLPTeacher(tmp_path / "missing")


def test_another_vocabulary(tmp_path):
    save_mlp(tmp_path / "mlp", layers_of(3, 4))
    with pytest.raises(VocabularyMismatchError, match="4 outputs.*5.*checkpoint and configuration drifted apart"):
        MLPTeacher(tmp_path / "mlp", 5)


def test_inputs_that_do_not_fit(tmp_path):
    save_mlp(tmp_path / "vectors", layers_of(4, 3))
    save_mlp(tmp_path / "tokens", layers_of(4, 3), embedding=np.ones((5, 2)))
    vectors, tokens = MLPTeacher(tmp_path / "vectors"), MLPTeacher(tmp_path / "tokens")
    with pytest.raises(ShapeError, match=r"\[rows, 4\].*got shape \(1, 3\)"):
        vectors.logits_for_batch([[1.0, 2.0, 3.0]])
    with pytest.raises(DTypeError, match="numbers"):
        vectors.logits_for_batch([["a", "b", "c", "d"]])
    for bad in (5, -1):
        with pytest.raises(DomainError, match=rf"token id {bad} in row 1 is outside \[0, 5\)"):
            tokens.logits_for_batch([[1], [0, bad]])
    with pytest.raises(DTypeError):
        tokens.logits_for_batch([[1.5]])
    for value in (1e300, np.nan):
        with pytest.raises(NonFiniteError, match=re.escape(f"input_ids[0, 1] is {value}: features must be finite")):
            vectors.logits_for_batch([[1.0, value, 3.0, 4.0]])
        with pytest.raises(NonFiniteError, match=re.escape(f"input_ids[1][0, 1] is {value}")):
            vectors.logits_per_position([np.ones((2, 4)), [[1.0, value, 3.0, 4.0]]])


@pytest.mark.parametrize(
    ("bad", "error", "words"),
    [(5, DTypeError, "path must be a path, got 5"), ("a\0b", DomainError, "with a null byte")],
)
def test_what_is_no_path(bad, error, words):
    for use in (MLPTeacher, lambda path: save_mlp(path, layers_of(3, 4))):
        with pytest.raises(error, match=words):
            use(bad)


def test_activations_are_those_of_the_formulas():
    assert ("identity", *ACTIVATIONS) == tuple(formulas.ACTIVATIONS)
    assert set(ACTIVATIONS) == set(FUNCTIONS)
