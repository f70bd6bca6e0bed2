"""The errors of kdcore. Each is a :class:`KdcoreError` and also the builtin that a caller would expect."""

from __future__ import annotations

__all__ = [
    "AliasError",
    "CapacityError",
    "CheckpointError",
    "ChecksumError",
    "ClosedShardError",
    "ConfigError",
    "DegenerateTeacherError",
    "DeviceMismatchError",
    "DeviceUnavailableError",
    "DiskFullError",
    "DomainError",
    "DTypeError",
    "EmptyForwardError",
    "EndOfDataError",
    "FileFormatError",
    "GradientOrderError",
    "KdcoreError",
    "LabelError",
    "MisalignedRowsError",
    "MissingDependencyError",
    "MissingRowError",
    "MissingSourceError",
    "NonFiniteError",
    "ProbabilitiesWarning",
    "ProvenanceError",
    "RepeatedSequenceError",
    "ShapeError",
    "ShardBusyError",
    "ShardExistsError",
    "UndefinedGradientError",
    "UnsafeFileError",
    "VocabularyMismatchError",
]


class KdcoreError(Exception):
    """Base of every error that kdcore raises on purpose."""


class ShapeError(KdcoreError, ValueError):
    """Shapes disagree, a dimension is missing, or a vocabulary is empty."""


class DTypeError(KdcoreError, TypeError):
    """An array has a dtype (or a value a type) that the argument does not take."""


class DomainError(KdcoreError, ValueError):
    """A number lies outside the domain of its argument."""


class LabelError(KdcoreError, ValueError):
    """A label is neither a class nor ``ignore_index``."""


class NonFiniteError(KdcoreError, ValueError):
    """A row that is read holds NaN or +inf, or nothing but -inf."""


class UndefinedGradientError(KdcoreError, ArithmeticError):
    """The divergence of a row is +inf, so that its gradient is not defined (``validate=True``)."""


class AliasError(KdcoreError, ValueError):
    """``out`` is read-only, or overlaps an input without being ``student_logits`` itself."""


class DeviceMismatchError(KdcoreError, TypeError):
    """Some arrays are on the host and some on a device."""


class DeviceUnavailableError(KdcoreError, RuntimeError):
    """CUDA is asked for and cannot run here."""


class MissingDependencyError(KdcoreError, ImportError):
    """An optional package is needed; the message names the extra that installs it."""


class MissingSourceError(KdcoreError, FileNotFoundError):
    """The demo's text, the standard library's source files, is not installed."""


class MissingRowError(KdcoreError, KeyError):
    """A teacher file has no row under the asked row number or content."""

    def __str__(self) -> str:  # KeyError would print the repr of the sentence
        return str(self.args[0]) if self.args else ""


class UnsafeFileError(KdcoreError, ValueError):
    """A file uses a feature that the allow-list for untrusted files refuses."""


class FileFormatError(KdcoreError, ValueError):
    """A file is not what the reader expects: not HDF5, a missing dataset, a wrong dtype or rank."""


class CapacityError(KdcoreError, ValueError):
    """A shard has no room for the rows that are to be appended."""


class ClosedShardError(KdcoreError, ValueError):
    """Rows are appended to a shard that is finished or whose writer is closed."""


class DiskFullError(KdcoreError, OSError):
    """There is no room on disk for what is to be written."""


class MisalignedRowsError(KdcoreError, ValueError):
    """Rows belong to other tokens than the caller expects."""


class ProvenanceError(KdcoreError, ValueError):
    """A store belongs to another tokenizer, corpus or output layer, or shards of one store disagree."""


class RepeatedSequenceError(KdcoreError, ValueError):
    """A sequence is appended that the shard has already."""


class ShardBusyError(KdcoreError, BlockingIOError):
    """Another writer has the shard."""


class ShardExistsError(KdcoreError, FileExistsError):
    """A shard is to be created where there is one, finished or not."""


class ChecksumError(FileFormatError):
    """Bytes of a file differ from those that were written."""


class CheckpointError(KdcoreError, ValueError):
    """A checkpoint cannot be read, belongs to something else, or did not survive its round trip."""


class ConfigError(KdcoreError, ValueError):
    """A configuration has an unknown field or a value outside its domain; the message names the field."""


class VocabularyMismatchError(KdcoreError, ValueError):
    """Teacher and student (or a forward and its declared vocabulary) differ in width."""


class EmptyForwardError(KdcoreError, RuntimeError):
    """A teacher's forward returned nothing."""


class EndOfDataError(KdcoreError, EOFError):
    """A batch source that does not wrap around has given every row of its pass."""


class GradientOrderError(KdcoreError, RuntimeError):
    """A gradient was applied that does not belong to the last forward."""


class DegenerateTeacherError(KdcoreError, ValueError):
    """Teacher and student agree from the start, so that there is nothing to distil."""


class ProbabilitiesWarning(UserWarning):
    """Rows that should be logits look like probabilities."""
