"""A teacher that is a multilayer perceptron, from a checkpoint file, on the CPU or on a CUDA device."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kdcore import engines, formulas, ops
from kdcore.checks import choice, file_path
from kdcore.errors import (
    CheckpointError,
    DeviceMismatchError,
    DomainError,
    MissingDependencyError,
    NonFiniteError,
    VocabularyMismatchError,
)
from kdcore.hdf5 import read_tensors, write_arrays
from kdcore.sequences import as_rows, as_vectors, pad_rows, prefixes
from kdcore.teachers.base import InputIds

__all__ = ["MLPTeacher", "save_mlp"]

ACTIVATIONS = tuple(name for name in formulas.ACTIVATIONS if name != "identity")  # that is the output layer's

_EMBEDDING = "embedding.weight"
#: Prefix, number and kind. Python does not convert numbers of thousands of digits, and no network has 10**9 layers.
_LAYER_TENSOR = re.compile(r"(.*?)(?<![0-9])([0-9]{1,9})\.(weight|bias)", re.DOTALL)
_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"


class _Checkpoint(NamedTuple):
    """float32 tensors: weight [out, in] and bias [out] of each layer, and the embedding [n_tokens, d], if any."""

    layers: list[tuple[NDArray[np.float32], NDArray[np.float32]]]
    embedding: NDArray[np.float32] | None
    activation: str | None


def save_mlp(
    path: str | os.PathLike[str],
    layers: Sequence[tuple[Any, Any]],
    *,
    activation: str | None = None,
    embedding: Any = None,
) -> None:
    """Write a checkpoint (HDF5) that :class:`MLPTeacher` reads.

    Parameters
    ----------
    path
        The file, which appears whole or not at all.
    layers : sequence of (weight [out, in], bias [out])
        In the order in which they are applied.
    activation : {"relu", "tanh", "gelu"}, optional
        After every layer but the last; needed if there is more than one.
    embedding : array [n_tokens, d], optional
        Makes the inputs token ids.

    Raises
    ------
    CheckpointError, NonFiniteError
        As :class:`MLPTeacher` would raise for the file.

    Examples
    --------
    >>> import tempfile, numpy as np, kdcore
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     kdcore.save_mlp(f"{folder}/mlp.h5", [(np.eye(3, 2), np.zeros(3))])
    ...     kdcore.MLPTeacher(f"{folder}/mlp.h5").logits_for_batch(np.array([[1.0, 2.0]]))
    array([[1., 2., 0.]], dtype=float32)
    """
    path = file_path(path, "path")
    arrays = {}
    for i, (weight, bias) in enumerate(layers):
        arrays[f"{i}.weight"], arrays[f"{i}.bias"] = np.asarray(weight), np.asarray(bias)
    if embedding is not None:
        arrays[_EMBEDDING] = np.asarray(embedding)
    metadata = {} if activation is None else {"activation": activation}
    _checkpoint(path, arrays, metadata, None)
    write_arrays(path, arrays, metadata)


class MLPTeacher:
    """Logits of a multilayer perceptron: linear layers with an activation between them, computed in float32.

    Parameters
    ----------
    path
        A checkpoint; the file's first bytes tell its format: HDF5, as :func:`save_mlp` writes it or with float
        datasets at the root and perhaps a text attribute ``activation``, or safetensors. Its tensors are named as
        PyTorch's ``nn.Sequential`` names them, under at most one prefix: ``<prefix><int>.weight`` [out, in] and
        ``<prefix><int>.bias`` [out], applied in numeric order. ``embedding.weight`` [n_tokens, d], if there is one,
        makes the inputs token ids: the first layer then reads the embeddings of the last n = in / d tokens, one after
        another, zeros where a row is shorter (Bengio et al. 2003, "A neural probabilistic language model"). Without
        it, a row of ``input_ids`` is the vector [in] of the features. float16, bfloat16 (safetensors), float32 or
        float64.
    vocab_size : int, optional
        V, if the width of the last layer is to be checked against it.
    activation : {"relu", "tanh", "gelu"}, optional
        After every layer but the last. By default, and never against, the checkpoint's metadata ``activation``.
        gelu is the exact one, with the error function.
    device : {"cpu", "cuda"}
        Where the forward runs. "cuda" without a usable device is an error, not a fallback.
    stream : optional
        CUDA stream of the forward.

    Raises
    ------
    FileNotFoundError
    CheckpointError
        A file of neither format, a tensor that is unknown, missing or of a wrong dtype or shape, no activation.
    NonFiniteError
        A weight that is NaN or infinite in float32.
    VocabularyMismatchError
        ``vocab_size`` is not the width of the last layer.
    DeviceUnavailableError
        ``device="cuda"`` and CUDA cannot run here.

    Examples
    --------
    >>> import tempfile
    >>> from kdcore.teachers.mlp import save_mlp
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_mlp(f"{folder}/teacher.h5", [(np.array([[1.0], [2.0]]), np.zeros(2))], embedding=[[1.0], [3.0]])
    ...     MLPTeacher(f"{folder}/teacher.h5").logits_for_batch([[0, 1], [0]])
    array([[3., 6.],
           [1., 2.]], dtype=float32)
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        vocab_size: int | None = None,
        *,
        activation: str | None = None,
        device: Literal["cpu", "cuda"] = "cpu",
        stream: Any = None,
    ) -> None:
        choice(device, "device", ("cpu", "cuda"))
        if device == "cpu" and stream is not None:
            raise DomainError(f"stream={stream!r} is for device='cuda'")
        if device == "cuda":
            engines.require_cuda()
        self.path = path = file_path(path, "path")
        self.device = device
        self._stream = stream
        layers, self._embedding, self.activation = _checkpoint(path, *_read(path), activation)
        self._n_inputs = int(layers[0][0].shape[1])
        self._vocab_size = int(layers[-1][0].shape[0])
        if vocab_size is not None and vocab_size != self._vocab_size:
            raise VocabularyMismatchError(
                f"the last layer of {path} has {self._vocab_size} outputs, but vocab_size is {vocab_size}: "
                "checkpoint and configuration drifted apart"
            )
        self._layers: list[tuple[Any, Any]] = layers
        if device == "cuda":
            self._layers = [(engines.to_device(w, stream), engines.to_device(b, stream)) for w, b in layers]

    @property
    def vocab_size(self) -> int:
        """V, the width of the last layer."""
        return self._vocab_size

    def logits_for_batch(self, input_ids: InputIds) -> NDArray[np.float32]:
        """Logits float32 [B, V] of the token that follows each row, or for each feature vector.

        Raises ShapeError, DTypeError, DomainError (a token without embedding) and NonFiniteError (features).
        """
        return self._forward(self._features(input_ids))

    def device_logits_for_batch(self, input_ids: InputIds) -> Any:
        """Logits [B, V] as a device array, with ``device="cuda"``; nothing waits for the device."""
        if self.device != "cuda":
            raise DeviceMismatchError(f"the teacher from {self.path} runs on the CPU; build it with device='cuda'")
        return self._outputs(self._features(input_ids))

    def logits_per_position(self, input_ids: InputIds) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Logits [B, L, V] and the mask [B, L] of positions that exist; logits are 0 where none does.

        Position l sees the first l + 1 tokens of its row. With features, a row is [L, in] and each position one vector.
        """
        if self._embedding is None:
            vectors = [self._vectors(row, f"input_ids[{i}]") for i, row in enumerate(input_ids)]
            mask = pad_rows([np.zeros(len(row), np.int64) for row in vectors])[1]
            x = np.concatenate([np.empty((0, self._n_inputs), np.float32), *vectors])
        else:
            rows = as_rows(input_ids)
            mask = pad_rows(rows)[1]
            x = self._embedded(prefixes(rows), self._embedding)
        logits = np.zeros((*mask.shape, self._vocab_size), np.float32)
        logits[mask] = self._forward(x)
        return logits, mask

    def _features(self, input_ids: Any) -> NDArray[np.float32]:
        """The input [B, in] of the first layer."""
        if self._embedding is None:
            return self._vectors(input_ids, "input_ids")
        return self._embedded(as_rows(input_ids), self._embedding)

    def _vectors(self, values: Any, name: str) -> NDArray[np.float32]:
        return as_vectors(values, self._n_inputs, name, f", since {self.path} has no {_EMBEDDING!r}")

    def _embedded(self, rows: list[NDArray[np.int64]], embedding: NDArray[np.float32]) -> NDArray[np.float32]:
        n_tokens, d = embedding.shape
        window = self._n_inputs // d
        x = np.zeros((len(rows), window, d), np.float32)
        for i, row in enumerate(rows):
            last = row[-window:]
            outside = last[(last < 0) | (last >= n_tokens)]
            if outside.size:
                raise DomainError(
                    f"the token id {outside[0]} in row {i} is outside [0, {n_tokens}), the embedding of {self.path}"
                )
            x[i, window - last.size :] = embedding[last]
        return x.reshape(len(rows), self._n_inputs)

    def _outputs(self, x: NDArray[np.float32]) -> Any:
        """The forward of x [B, in], where it runs."""
        hidden: Any = x if self.device == "cpu" else engines.to_device(x, self._stream)
        for i, (weight, bias) in enumerate(self._layers):
            last = i == len(self._layers) - 1
            activation = self.activation if not last and self.activation is not None else "identity"
            hidden = ops.linear(hidden, weight, bias, activation, stream=self._stream)
        return hidden

    def _forward(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        outputs: NDArray[np.float32] = engines.to_host(self._outputs(x))
        return outputs


def _checkpoint(
    path: str | os.PathLike[str], arrays: dict[str, NDArray[Any]], metadata: Any, activation: str | None
) -> _Checkpoint:
    """The layers among the tensors of a file, checked."""
    found: dict[int, dict[str, str]] = {}
    names_prefix: dict[str, str] = {}
    for name in arrays:
        match = _LAYER_TENSOR.fullmatch(name)
        if name == _EMBEDDING:
            continue
        if match is None:
            raise CheckpointError(
                f"{path}: the tensor {name!r} is unknown; expected {_EMBEDDING!r}, '<int>.weight' or '<int>.bias'"
            )
        prefix, number, kind = match.groups()
        names_prefix.setdefault(prefix, name)
        if len(names_prefix) > 1:
            first, second = list(names_prefix.values())[:2]
            raise CheckpointError(f"{path}: the tensors {first!r} and {second!r} have different prefixes")
        kinds = found.setdefault(int(number), {})
        if kind in kinds:
            raise CheckpointError(f"{path}: the tensors {kinds[kind]!r} and {name!r} have the same number")
        kinds[kind] = name
    if not found:
        raise CheckpointError(f"{path} has no layer: no tensor named '<int>.weight'")

    layers: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
    width = None
    for number in sorted(found):
        kinds = found[number]
        for kind, other in (("weight", "bias"), ("bias", "weight")):
            if kind not in kinds:
                raise CheckpointError(f"{path} has the tensor {kinds[other]!r} but no {kind} of that layer")
        weight, bias = (_float32(path, kinds[kind], arrays[kinds[kind]]) for kind in ("weight", "bias"))
        if weight.ndim != 2 or 0 in weight.shape:
            raise CheckpointError(f"{path}: {kinds['weight']!r} must have the shape [out, in], got {weight.shape}")
        if bias.shape != weight.shape[:1]:
            raise CheckpointError(
                f"{path}: {kinds['bias']!r} must have the shape {weight.shape[:1]}, the rows of its weight, "
                f"got {bias.shape}"
            )
        if width not in (None, weight.shape[1]):
            raise CheckpointError(
                f"{path}: {kinds['weight']!r} reads {weight.shape[1]} values, but the layer before it has {width}"
            )
        width = weight.shape[0]
        layers.append((weight, bias))

    embedding = None
    if _EMBEDDING in arrays:
        embedding = _float32(path, _EMBEDDING, arrays[_EMBEDDING])
        n_inputs = layers[0][0].shape[1]
        if embedding.ndim != 2 or 0 in embedding.shape or n_inputs % embedding.shape[1]:
            raise CheckpointError(
                f"{path}: {_EMBEDDING!r} must have the shape [n_tokens, d] with d a divisor of the {n_inputs} inputs "
                f"of {found[min(found)]['weight']!r}, got {embedding.shape}"
            )
    return _Checkpoint(layers, embedding, _activation(path, metadata.get("activation"), activation, len(layers)))


def _activation(path: str | os.PathLike[str], stored: Any, given: str | None, n_layers: int) -> str | None:
    for name, source in ((stored, f"the metadata of {path}"), (given, "the argument")):
        if name is not None and name not in ACTIVATIONS:
            raise CheckpointError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {name!r} from {source}")
    if stored is not None and given is not None and stored != given:
        raise CheckpointError(f"activation is {given!r}, but {path} says {stored!r}")
    activation = stored if given is None else given
    if activation is None and n_layers > 1:
        raise CheckpointError(
            f"{path} has {n_layers} layers and no metadata 'activation'; give one of {', '.join(ACTIVATIONS)}"
        )
    return activation


def _float32(path: str | os.PathLike[str], name: str, values: NDArray[Any]) -> NDArray[np.float32]:
    if values.dtype.name not in ("float16", "float32", "float64"):
        raise CheckpointError(f"{path}: {name!r} has the dtype {values.dtype}; expected a float")
    with np.errstate(over="ignore"):
        narrowed = np.ascontiguousarray(values, np.float32)
    if not np.isfinite(narrowed).all():
        place = tuple(int(i) for i in np.argwhere(~np.isfinite(narrowed))[0])
        raise NonFiniteError(f"{path}: {name!r} is {values[place]} at {place}; weights must be finite in float32")
    return narrowed


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, NDArray[Any]], Any]:
    """The tensors and metadata of a file of either format."""
    with open(path, "rb") as file:
        start = file.read(9)
    if start.startswith(_HDF5_SIGNATURE):
        return read_tensors(path)
    if start[8:] == b"{":  # after the length of the header, in 8 bytes
        return _read_safetensors(path)
    raise CheckpointError(f"{path} is neither HDF5 nor safetensors: it begins with {start!r}")


def _read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, NDArray[Any]], Any]:
    try:
        import safetensors
    except ImportError as error:
        raise MissingDependencyError(
            f"reading {path} needs the package safetensors: pip install kdcore[safetensors]"
        ) from error
    dtypes = {"F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2"}
    arrays: dict[str, NDArray[Any]] = {}
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
        tensors = safetensors.deserialize(Path(path).read_bytes())
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
    for name, tensor in tensors:
        if tensor["dtype"] not in dtypes:
            raise CheckpointError(
                f"{path}: {name!r} has the dtype {tensor['dtype']}; expected one of {', '.join(dtypes)}"
            )
        values = np.frombuffer(tensor["data"], dtypes[tensor["dtype"]]).reshape(tensor["shape"])
        if tensor["dtype"] == "BF16":  # the upper half of a float32
            values = (values.astype(np.uint32) << 16).view(np.float32)
        arrays[name] = values
    return arrays, metadata
