"""The command ``kdcore``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kdcore._version import __version__
from kdcore.bench import PARTS
from kdcore.errors import KdcoreError

__all__ = ["main"]

_PACKAGES = ("numpy", "numba", "h5py", "numba-cuda", "cuda-python", "cupy-cuda13x", "ml_dtypes", "safetensors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 1 when what was asked for cannot be done, 2 for a wrong command line.

    ``kdcore falsify`` returns 1 when the implementation is falsified.
    """
    options = _parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except _UsageError as error:
        print(f"kdcore: {error}", file=sys.stderr)
        return 2
    except (KdcoreError, OSError) as error:
        print(f"kdcore: {type(error).__name__}: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(f"  {note}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("kdcore: interrupted", file=sys.stderr)
        return 130


class _UsageError(Exception):
    """A wrong command line that the parser cannot see."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kdcore", description="Knowledge distillation: kernels, teachers, students.")
    parser.add_argument("--version", action="version", version=f"kdcore {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser(
        "demo",
        help="distil a byte model of the standard library's source into a table, in about a minute",
        description="Distil a byte n-gram model of the Python standard library's source into a table of two-byte "
        "contexts, and compare it with the same student trained on hard labels.",
    )
    demo.add_argument("--output", default="kdcore-demo", metavar="DIR", help="where results go (default: %(default)s)")
    demo.add_argument("--evaluate", metavar="STUDENT", help="only evaluate a student.h5 that the demo saved")
    demo.set_defaults(run=_demo)

    distill = commands.add_parser(
        "distill",
        help="run a distillation from a TOML file",
        description="Run the pipeline that a TOML file describes by its tables [distill], [teacher], [student] and "
        "[batches]: a teacher in HDF5, a student, and a directory of token shards.",
    )
    distill.add_argument("--config", required=True, metavar="FILE", help="the TOML file")
    distill.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    distill.set_defaults(run=_distill)

    bench = commands.add_parser(
        "bench",
        help="verify the CPU engine, then time it beside the limit of the memory and other libraries",
        description="Verify results against a float64 textbook, then time them beside the limit that the memory sets, "
        "and beside PyTorch and SciPy where they are installed. Writes results.json, table.md and plots.",
    )
    bench.add_argument("--quick", action="store_true", help="smaller shapes and fewer repetitions, half a minute")
    bench.add_argument(
        "--output", default="kdcore-bench", metavar="DIR", help="where results go (default: %(default)s)"
    )
    bench.add_argument(
        "--only", action="append", default=[], choices=PARTS, metavar="PART", help=f"a part alone: {', '.join(PARTS)}"
    )
    bench.set_defaults(run=_bench)

    falsify = commands.add_parser(
        "falsify",
        help="try to refute an implementation of the KD loss and its gradient",
        description="Try the falsifiers of kdcore.testing on an implementation, loss_and_gradient(student, teacher, "
        "labels, temperature, alpha) -> (loss [B], gradient [B, V]) on NumPy arrays, alpha the weight of the "
        "cross-entropy. Exit status 1 when it is falsified, 0 when it is not, 2 when there is nothing to try.",
    )
    falsify.add_argument("implementation", metavar="MODULE:FUNCTION", help="package.module:function")
    falsify.add_argument("--divergence", default="forward_kl", metavar="NAME", help="default: %(default)s")
    falsify.add_argument(
        "--features", metavar="A,B,...", help="what is claimed; by default all but ignore_index. -NAME: all but NAME"
    )
    falsify.add_argument(
        "--adapter",
        metavar="NAME",
        help="scalar, torch, torch-mean, jax, jax-mean or keras: see kdcore.testing.adapters",
    )
    falsify.add_argument(
        "--max-examples", type=int, default=20, metavar="N", help="drawn for each (default: %(default)s)"
    )
    falsify.add_argument("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: %(default)s)")
    falsify.add_argument("--json", action="store_true", help="print the report as JSON")
    falsify.add_argument("--failures", action="store_true", help="list what failed alone")
    falsify.set_defaults(run=_falsify)

    info = commands.add_parser("info", help="show versions, devices, threads, and the engine that would run")
    info.set_defaults(run=_info)
    return parser


def _demo(options: argparse.Namespace) -> None:
    from kdcore.demo.run import evaluate_checkpoint, run_demo

    if options.evaluate is not None:
        print(f"{evaluate_checkpoint(options.evaluate):.6f} held-out bits per byte")
    else:
        run_demo(options.output)


def _distill(options: argparse.Namespace) -> None:
    from kdcore.runfile import pipeline_from_toml

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    result = pipeline_from_toml(options.config).execute(resume=options.resume)
    print(json.dumps(result.metrics, indent=2, ensure_ascii=False))
    print(f"student: {result.output_path} ({result.duration_seconds:.1f} s)")


def _bench(options: argparse.Namespace) -> None:
    from kdcore.bench.run import run_bench

    run_bench(options.output, quick=options.quick, only=options.only)


def _falsify(options: argparse.Namespace) -> int:
    from kdcore.testing import FEATURES
    from kdcore.testing.runner import falsify

    features: list[str] | None = None
    if options.features is not None:
        names = [name.strip() for name in options.features.split(",") if name.strip()]
        without = {name[1:] for name in names if name.startswith("-")}
        unknown = without - FEATURES.keys()
        if unknown:
            raise _UsageError(
                f"--features: no feature is called {', '.join(sorted(unknown))}; there are {', '.join(FEATURES)}"
            )
        features = [name for name in names if not name.startswith("-")]
        if without:
            features += [name for name in FEATURES if name not in without]
    function = _imported(options.implementation)
    try:
        if options.adapter is not None:
            from kdcore.checks import choice
            from kdcore.testing.adapters import ADAPTERS

            function = ADAPTERS[choice(options.adapter, "--adapter", ADAPTERS)](function)
        report = falsify(
            function,
            divergence=options.divergence,
            features=features,
            max_examples=options.max_examples,
            seed=options.seed,
        )
    except KdcoreError as error:  # whatever the implementation does is in the report: the arguments are wrong
        raise _UsageError(str(error)) from error
    if options.json:
        print(report.to_json())
    else:
        color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print(report.text(color=color, passed=not options.failures))
    return 0 if report.passed else 1


def _imported(place: str) -> Any:
    """What ``package.module:name`` names; the current folder is looked in first, as by ``python -m``."""
    module_name, colon, name = place.partition(":")
    if not (module_name and colon and name):
        raise _UsageError(f"MODULE:FUNCTION must be like package.module:function, got {place!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        found: Any = import_module(module_name)
    except Exception as error:
        raise _UsageError(f"{module_name} cannot be imported: {type(error).__name__}: {error}") from error
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError as error:
        raise _UsageError(f"{place}: {error}") from error
    if not callable(found):
        raise _UsageError(f"{place} must be a function, got {type(found).__name__}")
    return found


def _info(options: argparse.Namespace) -> None:
    from kdcore.cuda.presence import available, devices
    from kdcore.engines import resolve_threads

    print(f"kdcore {__version__}, Python {platform.python_version()} on {platform.machine()} {platform.system()}")
    for package in _PACKAGES:
        try:
            print(f"  {package:<14}{version(package)}")
        except PackageNotFoundError:
            print(f"  {package:<14}not installed")
    source = "KDCORE_NUM_THREADS" if "KDCORE_NUM_THREADS" in os.environ else "the CPUs of this process"
    print(f"CPU engine: {resolve_threads(None)} threads (from {source}); runs on NumPy arrays")
    reason = available()
    print(f"CUDA engine: {'runs on device arrays' if reason is None else f'not available: {reason}'}")
    for device in devices():
        print(f"  device {device}")
