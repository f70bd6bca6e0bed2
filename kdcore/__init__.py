"""kdcore: the numeric core of knowledge distillation.

Softmax, divergences, the KD loss and its exact logit gradient on CPU and CUDA; teachers, students and the pipeline
that use them. Names load on first use: importing kdcore imports neither Numba nor CUDA.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kdcore._version import __version__

if TYPE_CHECKING:
    from kdcore.errors import KdcoreError as KdcoreError

_HOME = {
    "kdcore.batches": ("ArrayBatchSource", "Batch", "BatchSource", "ShardBatchSource", "SyntheticBatchSource"),
    "kdcore.callbacks": ("Callback", "RunState"),
    "kdcore.config": ("DistillConfig",),
    "kdcore.hdf5": ("save_teacher_logits",),
    "kdcore.pipeline": ("Pipeline", "PipelineResult"),
    "kdcore.steps": ("kd_step", "kd_step_per_position"),
    "kdcore.students.base": ("StudentLogitsProvider",),
    "kdcore.students.linear": ("LinearStudent",),
    "kdcore.students.logit": ("LogitStudent",),
    "kdcore.teachers.base": ("TeacherLogitsProvider",),
    "kdcore.teachers.cuda": ("CudaTeacher",),
    "kdcore.teachers.fixture": ("FixtureTeacher",),
    "kdcore.teachers.hdf5": ("HDF5Teacher",),
    "kdcore.teachers.mlp": ("MLPTeacher",),
    "kdcore.teachers.truncating": ("TruncatingTeacher",),
    "kdcore.ops": (
        "KDOutput",
        "cross_entropy",
        "kd_logit_gradient",
        "kd_loss",
        "kd_loss_and_gradient",
        "kl_divergence",
        "log_softmax",
        "logsumexp",
        "softmax",
    ),
    "kdcore.errors": (
        "AliasError",
        "CheckpointError",
        "ConfigError",
        "DegenerateTeacherError",
        "DeviceMismatchError",
        "DeviceUnavailableError",
        "DomainError",
        "DTypeError",
        "EmptyForwardError",
        "EndOfDataError",
        "FileFormatError",
        "GradientOrderError",
        "KdcoreError",
        "LabelError",
        "MissingDependencyError",
        "MissingRowError",
        "MissingSourceError",
        "NonFiniteError",
        "ProbabilitiesWarning",
        "ShapeError",
        "UndefinedGradientError",
        "UnsafeFileError",
        "VocabularyMismatchError",
    ),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__"]
__all__ += list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'kdcore' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
