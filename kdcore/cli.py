"""The command ``kdcore``."""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import select
import signal
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kdcore._version import __version__
from kdcore.bench import PARTS
from kdcore.errors import DomainError, KdcoreError

__all__ = ["main"]

_PACKAGES = ("numpy", "numba", "h5py", "numba-cuda", "cuda-python", "cupy-cuda13x", "ml_dtypes", "safetensors")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 on success, 1 when what was asked for cannot be done, 2 for a wrong command line.

    ``kdcore falsify`` returns 1 when the implementation is falsified.
    """
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options) or 0
        sys.stdout.flush()
        return status
    except _UsageError as error:
        print(f"kdcore: {error}", file=sys.stderr)
        return 2
    except (KdcoreError, OSError) as error:
        if isinstance(error, BrokenPipeError) and _reader_has_gone():
            return 128 + signal.SIGPIPE
        print(f"kdcore: {type(error).__name__}: {error}", file=sys.stderr)
        for note in getattr(error, "__notes__", ()):
            print(f"  {note}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("kdcore: interrupted", file=sys.stderr)
        return 130


def _reader_has_gone() -> bool:
    """Whether whoever read the output, as ``head`` does, has read enough; what is left of it is then dropped."""
    output = 1
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # Python flushes once more when it ends
    return True


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

    _add_store_commands(commands)
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
        "--features",
        metavar="A,B,...",
        help="what is claimed; by default all but ignore_index. --features=-NAME: all of these but NAME",
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


def _add_store_commands(commands: Any) -> None:
    store = commands.add_parser(
        "store",
        help="look at, check, tie together and convert stores of a teacher's answers",
        description="Stores of a teacher's answers: shards that kdcore.LogitStoreWriter writes, and manifests of them.",
    )
    verbs = store.add_subparsers(required=True, metavar="VERB")

    inspect = verbs.add_parser("inspect", help="show what a shard or a manifest holds")
    inspect.add_argument("path", metavar="STORE")
    inspect.add_argument("--recover", action="store_true", help="read an unfinished shard up to its last commit")
    inspect.add_argument("--plot", metavar="FILE", help="save a plot of how tail masses are distributed")
    inspect.set_defaults(run=_store_inspect)

    verify = verbs.add_parser("verify", help="check every checksum and every row")
    verify.add_argument("path", metavar="STORE")
    verify.add_argument("--recover", action="store_true", help="check an unfinished shard up to its last commit")
    verify.set_defaults(run=_store_verify)

    manifest = verbs.add_parser("manifest", help="tie the shards of a directory together")
    manifest.add_argument("directory", metavar="DIR")
    manifest.set_defaults(run=_store_manifest)

    repack = verbs.add_parser("repack", help="write the compressed archive form of a shard")
    repack.add_argument("source", metavar="SHARD")
    repack.add_argument("target", metavar="TARGET")
    repack.set_defaults(run=_store_repack)

    imports = verbs.add_parser("import", help="make a shard of another program's file")
    imports.add_argument("source", metavar="SOURCE", help="an HDF5 or Parquet file, or a directory of Parquet files")
    imports.add_argument("target", metavar="SHARD")
    imports.add_argument("--format", required=True, choices=("dense", "distillkit", "axolotl"), dest="layout")
    imports.add_argument("--dataset", default="logits", help="dense: the dataset of logits (default: %(default)s)")
    imports.add_argument("--tokens", default="input_ids", help="dense: that of token ids (default: %(default)s)")
    imports.add_argument("--offsets", help="dense: that of where sequences begin and end, of logits [rows, V]")
    imports.add_argument("--config", metavar="FILE", help="distillkit: its compression_config.yaml")
    imports.add_argument("--vocab-size", type=int, metavar="V", help="axolotl, required: classes of the teacher")
    imports.add_argument("--k", type=int, help="classes kept of a row (default: 64; of distillkit all)")
    imports.add_argument(
        "--temperature", type=float, action="append", metavar="T", help="dense: may be repeated (default: 1 and 2)"
    )
    imports.add_argument("--skip-incomplete", action="store_true", help="axolotl: leave out sequences with gaps")
    imports.add_argument("--teacher", default="", help="a note of where the rows come from")
    imports.set_defaults(run=_store_import)


def _store_inspect(options: argparse.Namespace) -> None:
    from kdcore.store.inspection import describe, plot_tails
    from kdcore.store.reader import LogitStore

    with LogitStore(options.path, recover=options.recover) as store:
        print(describe(store))
        if options.plot is not None:
            print(f"plot: {plot_tails(store, options.plot)}")


def _store_verify(options: argparse.Namespace) -> None:
    from kdcore.store.reader import LogitStore

    with LogitStore(options.path, recover=options.recover) as store:
        store.verify()
        print(f"{options.path}: {len(store):,} rows in {store.sequences:,} sequences, all as they were written")


def _store_manifest(options: argparse.Namespace) -> None:
    from kdcore.store.manifest import write_manifest

    print(f"written: {write_manifest(options.directory)}")


def _store_repack(options: argparse.Namespace) -> None:
    from kdcore.store.convert import repack

    before = os.path.getsize(options.source)
    target = repack(options.source, options.target)
    print(f"written: {target}, {target.stat().st_size / before:.0%} of {before:,} bytes")


def _store_import(options: argparse.Namespace) -> None:
    from kdcore.store.convert import import_axolotl, import_dense, import_distillkit

    foreign = {
        "dense": ("offsets", "temperature"),
        "distillkit": ("config",),
        "axolotl": ("skip_incomplete",),
    }
    for layout, names in foreign.items():
        for name in names:
            if layout != options.layout and getattr(options, name):
                raise DomainError(f"--{name.replace('_', '-')} is for --format {layout}, not for {options.layout}")
    common = {"teacher": options.teacher}
    if options.layout == "dense":
        if options.vocab_size is not None:
            raise DomainError("--vocab-size is not for --format dense: the file has it")
        target = import_dense(
            options.source,
            options.target,
            dataset=options.dataset,
            tokens=options.tokens,
            offsets=options.offsets,
            k=options.k,
            temperatures=options.temperature or (1.0, 2.0),
            **common,
        )
    elif options.layout == "distillkit":
        if options.config is None or options.k is not None:
            raise DomainError("--format distillkit needs --config, which has the k: --k is for others")
        target = import_distillkit(
            options.source, options.target, options.config, vocab_size=options.vocab_size, **common
        )
    else:
        if options.vocab_size is None:
            raise DomainError("--format axolotl needs --vocab-size, which the file does not have")
        target = import_axolotl(
            options.source,
            options.target,
            vocab_size=options.vocab_size,
            k=64 if options.k is None else options.k,
            skip_incomplete=options.skip_incomplete,
            **common,
        )
    print(f"written: {target}")


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
