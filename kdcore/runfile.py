"""A run as a TOML file: the tables [distill], [teacher], [student] and [batches].

Each of the last three names a ``kind`` and gives the keyword arguments of its class; relative paths are relative to
the file. Unknown names are errors.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from os import PathLike
from pathlib import Path
from typing import Any

from kdcore.batches import ShardBatchSource
from kdcore.config import DistillConfig, read_toml
from kdcore.errors import ConfigError, KdcoreError
from kdcore.pipeline import Pipeline
from kdcore.students.linear import LinearStudent
from kdcore.students.logit import LogitStudent
from kdcore.teachers.hdf5 import HDF5Teacher
from kdcore.teachers.mlp import MLPTeacher

__all__ = ["pipeline_from_toml"]

_KINDS: dict[str, dict[str, Callable[..., Any]]] = {
    "teacher": {"hdf5": HDF5Teacher, "mlp": MLPTeacher},
    "student": {"logit": LogitStudent, "linear": LinearStudent},
    "batches": {"shards": ShardBatchSource},
}
_PATHS = ("path", "directory")


def pipeline_from_toml(path: str | PathLike[str]) -> Pipeline:
    """The :class:`~kdcore.Pipeline` that a TOML file describes.

    ``per_position`` stands in [distill] alone. Batches ask a row-addressed HDF5 teacher with row numbers.
    """
    tables = read_toml(path)
    unknown = sorted(set(tables) - {"distill", *_KINDS})
    if unknown:
        raise ConfigError(f"{path}: unknown table {', '.join(f'[{name}]' for name in unknown)}")
    config = DistillConfig.from_toml(path)
    teacher = _build(path, tables, "teacher")
    student = _build(path, tables, "student")
    given = {
        "per_position": config.per_position,
        "teacher_rows": getattr(teacher, "address", None) == "row",
        "vocab_size": student.vocab_size,
    }
    batches = _build(path, tables, "batches", **given)
    if given["teacher_rows"] and len(teacher) < batches.token_count:
        raise ConfigError(
            f"{path}: the teacher {teacher.path} has {len(teacher)} rows for the {batches.token_count} tokens of the "
            'shards; with address = "row" it needs a row for each'
        )
    return Pipeline(config, teacher=teacher, student=student, batches=batches)


def _build(path: str | PathLike[str], tables: dict[str, Any], name: str, **given: Any) -> Any:
    """The object of table ``name``; ``given`` arguments come from elsewhere and may not be in the table."""
    table = tables.get(name)
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: the table [{name}] is missing")
    arguments = dict(table)
    kind = arguments.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS[name]:
        choices = ", ".join(map(repr, _KINDS[name]))
        raise ConfigError(f"{path}: kind of [{name}] must be one of {choices}, got {kind!r}")
    make = _KINDS[name][kind]
    parameters = inspect.signature(make).parameters
    known = [parameter for parameter in parameters if parameter not in given]
    unknown = sorted(set(arguments) - set(known))
    if unknown:
        raise ConfigError(
            f"{path}: unknown field {', '.join(map(repr, unknown))} in [{name}]; known are {', '.join(known)}"
        )
    missing = [key for key in known if parameters[key].default is inspect.Parameter.empty and key not in arguments]
    if missing:
        raise ConfigError(f"{path}: {', '.join(missing)} missing in [{name}]")
    for key in _PATHS:
        if isinstance(arguments.get(key), str):
            arguments[key] = Path(path).parent / arguments[key]
    try:
        return make(**arguments, **given)
    except KdcoreError as error:
        error.add_note(f"in [{name}] of {path}")
        raise
