"""The command ``kdcore``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from kdcore._version import __version__
from kdcore.bench import PARTS
from kdcore.errors import KdcoreError

__all__ = ["main"]

_PACKAGES = ("numpy", "numba", "h5py", "numba-cuda", "cuda-python", "cupy-cuda13x", "ml_dtypes", "safetensors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 1 when what was asked for cannot be done, 2 for a wrong command line."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
    except (KdcoreError, OSError) as error:
        print(f"kdcore: {type(error).__name__}: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(f"  {note}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("kdcore: interrupted", file=sys.stderr)
        return 130
    return 0


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
