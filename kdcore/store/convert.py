"""Stores from other files: the archive form of a shard, and what other programs wrote."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcore.checks import as_int64, file_path, integer
from kdcore.errors import DomainError, FileFormatError, MissingDependencyError, NonFiniteError, ShardExistsError
from kdcore.hdf5 import FLOATS, INTEGERS, SafeFile, widen_logit_rows, write_compressed
from kdcore.sparse import TopKRows
from kdcore.store.encoding import ids_of
from kdcore.store.schema import PART, Commit, crc32_of
from kdcore.store.shard import Shard
from kdcore.store.writer import LogitStoreWriter

__all__ = ["import_axolotl", "import_dense", "import_distillkit", "repack"]

#: Rows of a chunk, and of a block, of the archive form: about a sequence, so that reading one decompresses little else.
_CHUNK_ROWS = 512
#: A derived tail is log(1 - head), and the head's rounding may carry it over 1 by so much.
_OVER_ONE = 5e-3


# --- the archive form ------------------------------------------------------------------------------------------------


def repack(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> Path:
    """Write the compressed archive form of a finished shard: the same rows, in two thirds of the bytes.

    Ids are plain integers, which compress better than packed ones and every HDF5 library reads; arrays are trimmed
    to their rows, byte-shuffled and deflated. :class:`~kdcore.LogitStore` reads it, slower. All rows are checked on
    the way. A target that is there already is a :class:`~kdcore.ShardExistsError`.
    """
    path = file_path(target, "target").absolute()
    if path.name.endswith(PART):
        raise DomainError(f"target must be the name of a finished shard, without {PART!r}, got {str(target)!r}")
    with Shard(source) as shard:
        if path == shard.path:
            raise DomainError(f"target must be another file than the source, got {path} for both")
        if path.exists():
            raise ShardExistsError(f"{path} is there already")
        old = shard.header
        blocks = old.block_rows if old.kind in ("dense", "hidden") else _CHUNK_ROWS
        encoding = old.index_encoding if old.index_encoding != "packed" else "uint32"
        header = replace(old, block_rows=blocks, index_encoding=encoding)
        columns = header.columns()
        crcs = np.zeros((-(-shard.rows // blocks), len(columns)), "<u4")

        def rows_of(c: int) -> Iterator[NDArray[Any]]:
            for block in range(len(crcs)):
                start, stop = block * blocks, min((block + 1) * blocks, shard.rows)
                shard.check_blocks(start // old.block_rows, (stop - 1) // old.block_rows)
                data = shard.run(columns[c].name, start, stop)
                if columns[c].name == "rows/indices" and encoding != old.index_encoding:
                    slots = len(old.temperatures) if old.kind == "sampled" else 1
                    data = np.concatenate([ids_of(data, old, slot) for slot in range(slots)], axis=1).astype("<u4")
                crcs[block, c] = crc32_of(data)
                yield data

        def crc_table() -> Iterator[NDArray[Any]]:  # asked for when all columns are written
            yield crcs

        def commits() -> Iterator[NDArray[Any]]:
            last_is_open = shard.rows % blocks != 0
            open_crcs = tuple(crcs[-1].tolist()) if last_is_open else (0,) * len(columns)
            commit = Commit(1, shard.rows, shard.sequences, shard.commit.offsets_crc, shard.commit.ids_crc, open_crcs)
            yield np.stack([replace(commit, counter=n).words(header.store_uuid) for n in (2, 1)])

        arrays: dict[str, Any] = {
            column.name: (column.dtype, column.shape(shard.rows), rows_of(c)) for c, column in enumerate(columns)
        }
        arrays["seq/offsets"] = ("<u8", (shard.sequences + 1,), [shard.starts])
        arrays["seq/id"] = ("<u8", (shard.sequences,), [shard.keys()])
        arrays["blocks/crc32"] = ("<u4", crcs.shape, crc_table())
        arrays["commit"] = ("<u8", (2, 64), commits())
        write_compressed(path, arrays, header.attributes(), _CHUNK_ROWS)
    return path


# --- dense HDF5 ------------------------------------------------------------------------------------------------------


def import_dense(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dataset: str = "logits",
    tokens: str = "input_ids",
    offsets: str | None = None,
    **options: Any,
) -> Path:
    """A store of a dense HDF5 file of logits (or log-probabilities), by anyone's hand.

    Parameters
    ----------
    source, target
        The file, which need not be trusted, and the shard.
    dataset : str
        Logits [S, L, V] of S sequences, or [N, V] of all their rows; float16, float32, float64, or uint16 with the
        attribute ``dtype="bfloat16"``. Row t is about token t + 1.
    tokens : str
        The dataset of token ids [S, L], or [N].
    offsets : str, optional
        Of rows [N, V]: the dataset [S + 1] of where sequences begin and end. Without, all rows are one sequence.
    options
        Of :class:`~kdcore.LogitStoreWriter`, but for vocab_size and capacity.
    """
    with SafeFile(source) as file:
        logits = file.dataset(dataset, dtypes=(*FLOATS, "<u2"))
        where = f"{file.path}: {dataset!r}"
        if len(logits.shape) not in (2, 3) or 0 in logits.shape:
            raise FileFormatError(f"{where} has the shape {logits.shape}; expected [rows, V] or [sequences, L, V]")
        tag = file.attribute(dataset, "dtype", str)
        if (logits.dtype == np.uint16) != (tag == "bfloat16"):
            raise FileFormatError(f"{where} has the dtype {logits.dtype} and the attribute dtype={tag!r}")
        ids = file.dataset(tokens, dtypes=INTEGERS)
        if ids.shape != logits.shape[:-1]:
            raise FileFormatError(
                f"{file.path}: {tokens!r} has the shape {ids.shape}; expected {logits.shape[:-1]} by {dataset!r}"
            )
        if len(logits.shape) == 3:
            if offsets is not None:
                raise DomainError(f"offsets={offsets!r} is for logits [rows, V], and {where} is {logits.shape}")
            bounds = np.arange(logits.shape[0] + 1)
        elif offsets is None:
            bounds = np.array([0, logits.shape[0]])
        else:
            bounds = file.dataset(offsets, dtypes=INTEGERS, ndim=1).read().astype(np.int64)
            if bounds.size < 2 or bounds[0] != 0 or bounds[-1] != logits.shape[0] or (np.diff(bounds) < 1).any():
                raise FileFormatError(
                    f"{file.path}: {offsets!r} must ascend from 0 to the {logits.shape[0]} rows of {dataset!r}"
                )
        rows = math.prod(logits.shape[:-1])
        with _imported(target, vocab_size=logits.shape[-1], capacity=rows, **options) as writer:
            for start, stop in zip(bounds.tolist(), bounds[1:].tolist(), strict=False):
                block, sequence = logits.run(start, stop), ids.run(start, stop)
                if len(logits.shape) == 3:
                    block, sequence = block[0], sequence[0]
                if block.dtype == np.uint16:
                    block = widen_logit_rows(block)
                with _named(f"{where}, from row {start} on"):
                    writer.append(sequence, block)
                _commit_at_times(writer)
            return writer.path


@contextmanager
def _imported(target: str | os.PathLike[str], **options: Any) -> Iterator[LogitStoreWriter]:
    """The writer of an import. One that fails leaves nothing: nobody can go on with it, but it can be run again."""
    writer = LogitStoreWriter(target, **options)
    try:
        yield writer
        writer.close()
    except BaseException:
        writer.abandon()
        writer.path.with_name(writer.path.name + PART).unlink(missing_ok=True)
        raise


def _commit_at_times(writer: LogitStoreWriter) -> None:
    if writer.rows - writer.committed_rows >= 1 << 16:
        writer.commit()


class _named:  # noqa: N801  a context manager in the manner of a function
    """What goes wrong inside is of this source."""

    def __init__(self, source: str) -> None:
        self.source = source

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is not None:
            error.add_note(f"in {self.source}")


# --- Parquet ---------------------------------------------------------------------------------------------------------


def import_distillkit(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    config: Mapping[str, Any] | str | os.PathLike[str],
    *,
    vocab_size: int | None = None,
    **options: Any,
) -> Path:
    """A store of DistillKit's compressed log-probabilities (Parquet, or a directory of them; extra ``parquet``).

    The file does not say how it was compressed: ``config`` is its ``compression_config.yaml`` (or .json, or the mapping
    in it). Nothing says what the teacher had beyond its k classes: tails are derived, as 1 minus the head. The last
    token of a sequence has no row there, and is left out. ``vocab_size`` is the config's d, if it is not given.

    Raises
    ------
    FileFormatError
        A row that is no probability: the fit of the less likely values has no bound, and may give more than 1.
    """
    layout = _DistillKit.parse(config)
    size = layout.d if vocab_size is None else integer(vocab_size, "vocab_size", least=1)

    def sequences() -> Iterator[_Sequence]:
        names = ("input_ids", "compressed_logprobs", "bytepacked_indices")
        for where, (tokens, values, packed) in _parquet(source, names):
            answers = len(values)
            yield _Sequence(where, tokens[:answers], layout.indices(packed, where), layout.log_probs(values, where))

    return _write_derived(target, sequences, size, min(layout.k, size), options)


def import_axolotl(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    vocab_size: int,
    k: int = 64,
    skip_incomplete: bool = False,
    **options: Any,
) -> Path:
    """A store of axolotl's top-k log-probabilities (Parquet, or a directory of them; extra ``parquet``).

    Columns ``input_ids`` with ``target_token_ids`` and ``target_logprobs`` (or ``logprobs``), or ``input_ids`` with
    ``logprobs`` of ``{"token": "token_id:17", "logprob": -0.5}``. Entry p is about token p there, as vLLM has it, so it
    is row p - 1 of the store, and the last token has none. Tails are derived, as 1 minus the head: log-probabilities
    that were renormalised among the k come out without one. Of longer rows the likeliest ``k`` are kept.

    A sequence with positions without entries (a prompt that was not asked for) is an error, or left out with
    ``skip_incomplete``: a store has an answer to every token of a sequence.
    """

    vocab_size = integer(vocab_size, "vocab_size", least=1)
    k = integer(k, "k", least=1)

    def sequences() -> Iterator[_Sequence]:
        for where, tokens, ids, values in _axolotl_rows(source):
            count = len(values)
            offset = len(tokens) - count  # entries belong to the last tokens
            if offset < 0:
                raise FileFormatError(f"{where}: {count} entries for {len(tokens)} input_ids")
            rows = list(zip(ids, values, strict=True))[1 if offset == 0 else 0 :]
            given = [not (row == -np.inf).all() for _, row in rows]
            if offset > 1 or not all(given):
                if skip_incomplete:
                    continue
                missing = given.index(False) + max(offset, 1) if not all(given) else 1
                raise FileFormatError(
                    f"{where}: token {missing} has no entries: use skip_incomplete, or the whole prompt"
                )
            indices = np.zeros((len(rows), k), np.int64)
            log_probs = np.full((len(rows), k), -np.inf, np.float32)
            for r, (classes, row) in enumerate(rows):
                if row.shape != classes.shape:
                    raise FileFormatError(f"{where}: entry {r} has {classes.size} ids and {row.size} log-probabilities")
                best = np.argsort(-row, kind="stable")[:k]
                indices[r, : best.size], log_probs[r, : best.size] = classes[best], row[best]
            if len(rows):
                yield _Sequence(where, tokens[: len(rows)], indices, log_probs)

    return _write_derived(target, sequences, vocab_size, min(k, vocab_size), options)


@dataclass
class _Sequence:
    """Answers as another program has them: log-probabilities in any order, -inf where there is no class."""

    where: str
    tokens: NDArray[Any]
    indices: NDArray[np.int64]
    log_probs: NDArray[np.float32]


def _write_derived(
    target: str | os.PathLike[str], sequences: Any, vocab_size: int, k: int, options: dict[str, Any]
) -> Path:
    """Write a store of sequences, which are read twice: first to count their rows."""
    rows = sum(len(sequence.tokens) for sequence in sequences())
    if rows == 0:
        raise FileFormatError(f"there is no row to be written to {target}")
    with _imported(target, vocab_size=vocab_size, k=k, capacity=rows, tail_source="derived", **options) as writer:
        for sequence in sequences():
            with _named(sequence.where):
                writer.append_rows(sequence.tokens, _derived(sequence, k, vocab_size))
            _commit_at_times(writer)
        return writer.path


def _derived(sequence: _Sequence, k: int, vocab_size: int) -> TopKRows:
    """Rows in order, and their tails as 1 minus the head, in float64."""
    values = sequence.log_probs.astype(np.float64)
    if np.isnan(values).any():
        row, column = np.argwhere(np.isnan(values))[0]
        raise NonFiniteError(f"row {row}, entry {column} is nan: log-probabilities must be numbers")
    order = np.argsort(-values, axis=1, kind="stable")[:, :k]
    values = np.take_along_axis(values, order, 1)
    indices = np.where(values > -np.inf, np.take_along_axis(sequence.indices, order, 1), 0)
    head = np.exp(values).sum(axis=1)
    over = np.flatnonzero(head > 1 + _OVER_ONE)
    if over.size:
        raise FileFormatError(f"row {over[0]} holds {head[over[0]]:.4f} of the probability among its classes")
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(1 - head, 0))  # 0 where rounding carried the head over 1
    n_valid = (values > -np.inf).sum(axis=1).astype(np.int32)
    return TopKRows(indices, values.astype(np.float32), tail.astype(np.float32), n_valid, vocab_size)


def _parquet_files(source: str | os.PathLike[str]) -> tuple[Any, list[Path]]:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("Parquet files are read with pyarrow: pip install 'kdcore[parquet]'") from error
    path = file_path(source, "source")
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(f"{path} has no Parquet files (*.parquet)")
    return pyarrow, files


def _batches(source: str | os.PathLike[str]) -> Iterator[tuple[Path, int, Any]]:
    """(file, first row, batch) of Parquet files."""
    arrow, files = _parquet_files(source)
    for path in files:
        done = 0
        try:
            with arrow.parquet.ParquetFile(path) as file:
                for batch in file.iter_batches(batch_size=64):
                    yield path, done, batch
                    done += batch.num_rows
        except arrow.ArrowException as error:
            raise FileFormatError(f"{path} cannot be read as Parquet: {error}") from error


def _column(batch: Any, name: str, path: Path) -> Any:
    if name not in batch.schema.names:
        raise FileFormatError(f"{path} has no column {name!r}; it has {', '.join(batch.schema.names)}")
    return batch.column(name)


def _parquet(
    source: str | os.PathLike[str], names: tuple[str, ...]
) -> Iterator[tuple[str, tuple[NDArray[Any], NDArray[Any], NDArray[Any]]]]:
    """Rows of a token column and two of bytes by position, as arrays [L], [L', bytes], [L', bytes]."""
    for path, first, batch in _batches(source):
        columns = [_column(batch, name, path) for name in names]
        for i in range(batch.num_rows):
            where = f"{path}, row {first + i}"
            tokens = _integers(columns[0][i].as_py() or [], f"{where}: {names[0]!r}")
            arrays = []
            for name, column in zip(names[1:], columns[1:], strict=True):
                rows = [_integers(row or [], f"{where}: {name!r}") for row in column[i].as_py() or []]
                if len({row.size for row in rows}) > 1 or len(rows) > tokens.size:
                    raise FileFormatError(f"{where}: {name!r} has rows of different sizes, or more than input_ids")
                octets = np.array(rows, np.int64).reshape(len(rows), -1)
                if ((octets < 0) | (octets > 255)).any():
                    raise FileFormatError(f"{where}: {name!r} must be bytes, got {octets.min()} to {octets.max()}")
                arrays.append(octets.astype(np.uint8))
            if len(arrays[0]) != len(arrays[1]):
                raise FileFormatError(f"{where}: {names[1]!r} has {len(arrays[0])} rows, {names[2]!r} {len(arrays[1])}")
            yield where, (tokens, arrays[0], arrays[1])


def _integers(values: Any, what: str) -> NDArray[np.int64]:
    """Integers of a Parquet file; nothing is rounded to one."""
    array = np.asarray(values)
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise FileFormatError(f"{what} must be integers, got {array.ndim} dimensions of {array.dtype}")
    return as_int64(array, what)


def _numbers(values: Any, what: str) -> NDArray[np.float64]:
    try:
        array = np.array(values, np.float64)
    except (TypeError, ValueError):
        raise FileFormatError(f"{what} must be numbers, got {values!r:.60}") from None
    return array.reshape(-1)


def _axolotl_rows(
    source: str | os.PathLike[str],
) -> Iterator[tuple[str, NDArray[np.int64], list[NDArray[np.int64]], list[NDArray[np.float64]]]]:
    """(where, tokens, classes of each entry, their log-probabilities) of each sequence."""
    for path, first, batch in _batches(source):
        tokens = _column(batch, "input_ids", path)
        split = "target_token_ids" in batch.schema.names
        values = _column(batch, "target_logprobs" if "target_logprobs" in batch.schema.names else "logprobs", path)
        ids = _column(batch, "target_token_ids", path) if split else values
        for i in range(batch.num_rows):
            where = f"{path}, row {first + i}"
            entries, classes = values[i].as_py() or [], ids[i].as_py() or []
            if not split:
                classes = [None if row is None else [_token_id(entry, where) for entry in row] for row in entries]
                entries = [None if row is None else [entry.get("logprob") for entry in row] for row in entries]
            if len(entries) != len(classes):
                raise FileFormatError(f"{where}: {len(classes)} rows of ids, {len(entries)} of log-probabilities")
            yield (
                where,
                _integers(tokens[i].as_py() or [], f"{where}: 'input_ids'"),
                [_integers(row or [], f"{where}: ids of entry {e}") for e, row in enumerate(classes)],
                [_numbers(row or [], f"{where}: log-probabilities of entry {e}") for e, row in enumerate(entries)],
            )


def _token_id(entry: Any, where: str) -> int:
    prefix, _, digits = str(entry.get("token") if isinstance(entry, dict) else None).partition(":")
    if prefix != "token_id" or not digits.isdecimal():
        raise FileFormatError(f"{where}: the token of an entry must be like 'token_id:17', got {entry!r}")
    return int(digits)


_TERM_DTYPES = {"float16": "<f2", "bfloat16": "<u2", "float32": "<f4", "float64": "<f8"}


@dataclass(frozen=True)
class _DistillKit:
    """How DistillKit compressed a row (its ``DistributionQuantizationConfig``).

    The bytes of a row: ``exact_k`` values; coefficients of a sum of terms in the rank, for the others; then bins of
    what that leaves, each a scale and integers of so many bits, the highest bit first. With ``delta_encoding`` all of
    that is differences of neighbours.
    """

    d: int
    k: int
    exact_k: int
    exact_dtype: str
    polynomial_terms: tuple[int | str, ...]
    term_dtype: str
    residual_bins: tuple[tuple[str, int, int], ...]
    delta_encoding: bool
    normalize_t: bool

    @classmethod
    def parse(cls, config: Mapping[str, Any] | str | os.PathLike[str]) -> _DistillKit:
        values = config if isinstance(config, Mapping) else _read_config(config)
        try:
            layout = cls(
                d=int(values["d"]),
                k=int(values["k"]),
                exact_k=int(values["exact_k"]),
                exact_dtype=values.get("exact_dtype", "float32"),
                polynomial_terms=tuple(values.get("polynomial_terms") or ()),
                term_dtype=values.get("term_dtype", "float32"),
                residual_bins=tuple(
                    (item["scale_dtype"], int(item["element_bits"]), int(item["num_elements"]))
                    for item in values["residual_bins"]
                ),
                delta_encoding=bool(values.get("delta_encoding", True)),
                normalize_t=bool(values.get("normalize_t", False)),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(f"the compression config is not DistillKit's: {error!r}") from error
        dtypes = {layout.exact_dtype, layout.term_dtype, *(dtype for dtype, _, _ in layout.residual_bins)}
        terms = all(term in ("sqrt", "exp") or type(term) is int for term in layout.polynomial_terms)
        bins = sum(count for _, _, count in layout.residual_bins)
        if (
            not 1 <= layout.d <= 1 << 31
            or not 1 <= layout.k <= 65_535
            or not 0 <= layout.exact_k <= layout.k
            or bins > layout.k - layout.exact_k
            or not dtypes <= _TERM_DTYPES.keys()
            or not terms
            or not all(1 <= bits <= 32 for _, bits, _ in layout.residual_bins)
        ):
            raise FileFormatError(f"the compression config is not one that is known here: {values!r}")
        return layout

    def indices(self, packed: NDArray[np.uint8], where: str) -> NDArray[np.int64]:
        # As DistillKit computes it, in float32.
        bits = int(np.ceil(np.log2(np.float32(self.d))))
        return _big_endian(packed, bits, self.k, where)

    def log_probs(self, data: NDArray[np.uint8], where: str) -> NDArray[np.float32]:
        at = 0

        def take(count: int) -> NDArray[np.uint8]:
            nonlocal at
            if at + count > data.shape[1]:
                raise FileFormatError(
                    f"{where}: rows of {data.shape[1]} bytes; the config needs more than {at + count - 1}"
                )
            at += count
            return np.ascontiguousarray(data[:, at - count : at])

        def numbers(dtype: str, count: int) -> NDArray[Any]:
            size = np.dtype(_TERM_DTYPES[dtype]).itemsize
            found = take(size * count).view(_TERM_DTYPES[dtype])
            return (widen_logit_rows(found) if dtype == "bfloat16" else found).astype(np.float64)

        exact = numbers(self.exact_dtype, self.exact_k)
        others = self.k - self.exact_k
        fitted = np.zeros((len(data), others))
        if self.polynomial_terms:
            ranks = np.linspace(0, 1, others) if self.normalize_t else np.arange(others, dtype=np.float64)
            powers = [
                {"sqrt": np.sqrt, "exp": np.exp}[term](ranks) if isinstance(term, str) else ranks**term
                for term in self.polynomial_terms
            ]
            fitted += numbers(self.term_dtype, len(powers)) @ np.array(powers).reshape(len(powers), others)
        begin = 0
        for dtype, bits, count in self.residual_bins:
            scale = numbers(dtype, 1)
            levels = _big_endian(take((bits * count + 7) // 8), bits, count, where).astype(np.float64)
            levels = levels * 2 - 1 if bits == 1 else levels - 2 ** (bits - 1)
            fitted[:, begin : begin + count] += levels * scale
            begin += count
        if at != data.shape[1]:
            raise FileFormatError(f"{where}: rows of {data.shape[1]} bytes; the config needs {at}")
        values = np.concatenate([exact, fitted], axis=1)
        if self.delta_encoding:
            values = np.cumsum(values, axis=1)
        return values.astype(np.float32)


def _read_config(path: str | os.PathLike[str]) -> Any:
    file = file_path(path, "config")
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".json":
        try:
            return json.loads(text)
        except ValueError as error:
            raise FileFormatError(f"{file} is not JSON: {error}") from error
    try:
        import yaml
    except ImportError as error:
        raise MissingDependencyError(f"{file} is read with PyYAML: pip install 'kdcore[parquet]'") from error
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise FileFormatError(f"{file} is not YAML: {error}") from error


def _big_endian(packed: NDArray[np.uint8], bits: int, count: int, where: str) -> NDArray[np.int64]:
    """Integers [B, count] of so many bits each, the highest bit first."""
    if packed.shape[1] * 8 < bits * count:
        raise FileFormatError(f"{where}: rows of {packed.shape[1]} bytes, too few for {count} integers of {bits} bits")
    stream = np.unpackbits(packed, axis=1)[:, : bits * count].reshape(len(packed), count, bits)
    return stream @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))
