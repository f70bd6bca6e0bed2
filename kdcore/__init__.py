"""kdcore: the numeric core of knowledge distillation.

Softmax, divergences, the KD loss and its exact logit gradient on CPU and CUDA; teachers, students and the pipeline
that use them. Names load on first use: importing kdcore imports neither Numba nor CUDA.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kdcore._version import __version__

if TYPE_CHECKING:  # the same names as below, for type checkers
    from kdcore.arguments import (
        KDOutput as KDOutput,
    )
    from kdcore.batches import (
        ArrayBatchSource as ArrayBatchSource,
        Batch as Batch,
        BatchSource as BatchSource,
        ShardBatchSource as ShardBatchSource,
        SyntheticBatchSource as SyntheticBatchSource,
    )
    from kdcore.callbacks import (
        Callback as Callback,
        RunState as RunState,
    )
    from kdcore.config import (
        DistillConfig as DistillConfig,
    )
    from kdcore.errors import (
        AliasError as AliasError,
        CapacityError as CapacityError,
        CheckpointError as CheckpointError,
        ChecksumError as ChecksumError,
        ClosedShardError as ClosedShardError,
        ConfigError as ConfigError,
        DegenerateTeacherError as DegenerateTeacherError,
        DeviceMismatchError as DeviceMismatchError,
        DeviceUnavailableError as DeviceUnavailableError,
        DiskFullError as DiskFullError,
        DomainError as DomainError,
        DTypeError as DTypeError,
        EmptyForwardError as EmptyForwardError,
        EndOfDataError as EndOfDataError,
        FileFormatError as FileFormatError,
        GradientOrderError as GradientOrderError,
        KdcoreError as KdcoreError,
        LabelError as LabelError,
        MisalignedRowsError as MisalignedRowsError,
        MissingDependencyError as MissingDependencyError,
        MissingRowError as MissingRowError,
        MissingSourceError as MissingSourceError,
        NonFiniteError as NonFiniteError,
        ProbabilitiesWarning as ProbabilitiesWarning,
        ProvenanceError as ProvenanceError,
        RepeatedSequenceError as RepeatedSequenceError,
        ShapeError as ShapeError,
        ShardBusyError as ShardBusyError,
        ShardExistsError as ShardExistsError,
        UndefinedGradientError as UndefinedGradientError,
        UnsafeFileError as UnsafeFileError,
        VocabularyMismatchError as VocabularyMismatchError,
    )
    from kdcore.hdf5 import (
        save_teacher_logits as save_teacher_logits,
    )
    from kdcore.ops import (
        cross_entropy as cross_entropy,
        kd_logit_gradient as kd_logit_gradient,
        kd_loss as kd_loss,
        kd_loss_and_gradient as kd_loss_and_gradient,
        kl_divergence as kl_divergence,
        log_softmax as log_softmax,
        logsumexp as logsumexp,
        softmax as softmax,
    )
    from kdcore.pipeline import (
        Pipeline as Pipeline,
        PipelineResult as PipelineResult,
    )
    from kdcore.sparse import (
        SampledRows as SampledRows,
        TopKRows as TopKRows,
    )
    from kdcore.states import (
        KDState as KDState,
        kd_gradient_from_state as kd_gradient_from_state,
        kd_loss_from_state as kd_loss_from_state,
        kd_state as kd_state,
        merge_states as merge_states,
    )
    from kdcore.steps import (
        kd_step as kd_step,
        kd_step_per_position as kd_step_per_position,
    )
    from kdcore.store.reader import (
        LogitStore as LogitStore,
    )
    from kdcore.store.writer import (
        LogitStoreWriter as LogitStoreWriter,
    )
    from kdcore.students.base import (
        StudentLogitsProvider as StudentLogitsProvider,
    )
    from kdcore.students.linear import (
        LinearStudent as LinearStudent,
    )
    from kdcore.students.logit import (
        LogitStudent as LogitStudent,
    )
    from kdcore.teachers.base import (
        TeacherLogitsProvider as TeacherLogitsProvider,
        TeacherRowsProvider as TeacherRowsProvider,
    )
    from kdcore.teachers.cuda import (
        CudaTeacher as CudaTeacher,
        device_batches as device_batches,
    )
    from kdcore.teachers.fixture import (
        FixtureTeacher as FixtureTeacher,
    )
    from kdcore.teachers.hdf5 import (
        HDF5Teacher as HDF5Teacher,
    )
    from kdcore.teachers.mlp import (
        MLPTeacher as MLPTeacher,
        save_mlp as save_mlp,
    )
    from kdcore.teachers.truncating import (
        TruncatingTeacher as TruncatingTeacher,
    )
    from kdcore.variants import (
        dkd_loss_and_gradient as dkd_loss_and_gradient,
        mixture_kd_loss_and_gradient as mixture_kd_loss_and_gradient,
        standardized_kd_loss_and_gradient as standardized_kd_loss_and_gradient,
    )

_HOME = {
    "kdcore.arguments": ("KDOutput",),
    "kdcore.batches": ("ArrayBatchSource", "Batch", "BatchSource", "ShardBatchSource", "SyntheticBatchSource"),
    "kdcore.callbacks": ("Callback", "RunState"),
    "kdcore.config": ("DistillConfig",),
    "kdcore.hdf5": ("save_teacher_logits",),
    "kdcore.pipeline": ("Pipeline", "PipelineResult"),
    "kdcore.sparse": ("SampledRows", "TopKRows"),
    "kdcore.states": ("KDState", "kd_gradient_from_state", "kd_loss_from_state", "kd_state", "merge_states"),
    "kdcore.steps": ("kd_step", "kd_step_per_position"),
    "kdcore.store.reader": ("LogitStore",),
    "kdcore.store.writer": ("LogitStoreWriter",),
    "kdcore.students.base": ("StudentLogitsProvider",),
    "kdcore.students.linear": ("LinearStudent",),
    "kdcore.students.logit": ("LogitStudent",),
    "kdcore.teachers.base": ("TeacherLogitsProvider", "TeacherRowsProvider"),
    "kdcore.teachers.cuda": ("CudaTeacher", "device_batches"),
    "kdcore.teachers.fixture": ("FixtureTeacher",),
    "kdcore.teachers.hdf5": ("HDF5Teacher",),
    "kdcore.teachers.mlp": ("MLPTeacher", "save_mlp"),
    "kdcore.teachers.truncating": ("TruncatingTeacher",),
    "kdcore.variants": (
        "dkd_loss_and_gradient",
        "mixture_kd_loss_and_gradient",
        "standardized_kd_loss_and_gradient",
    ),
    "kdcore.ops": (
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
    ),
}
#: Modules that are attributes without an import of their own.
_SUBMODULES = ("divergences", "torch")
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = ["__version__"]
__all__ += list(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _SUBMODULES:
        return import_module(f"kdcore.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'kdcore' has no attribute {name!r}")
    value = getattr(import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
