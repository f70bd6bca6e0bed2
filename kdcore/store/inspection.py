"""What a store holds, as a table and as a plot."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kdcore.checks import file_path
from kdcore.errors import DomainError, MissingDependencyError
from kdcore.store.reader import LogitStore

__all__ = ["describe", "plot_tails", "tail_masses"]

#: Rows that averages and the plot are made of, evenly spread: enough for three digits.
_SAMPLE = 20_000


def tail_masses(store: LogitStore) -> NDArray[np.float32]:
    """The probability beyond the stored classes, float32 [rows, temperatures], of rows evenly spread over a store."""
    if store.kind != "topk":
        raise DomainError(f"{store.path}: tails are what a store of kind 'topk' has, and this is {store.kind!r}")
    rows = np.unique(np.linspace(0, len(store) - 1, min(len(store), _SAMPLE)).astype(np.int64))
    if len(store) == 0:
        return np.empty((0, len(store.temperatures)), np.float32)
    tails = [store.read(rows, t).tail_logmass for t in store.temperatures]  # type: ignore[union-attr]
    masses: NDArray[np.float32] = np.exp(np.stack(tails, axis=1))
    return masses


def describe(store: LogitStore) -> str:
    """A table: kind, rows, bytes a row, mean tail mass at each temperature, where the rows come from."""
    header = store.header
    size = sum(path.stat().st_size for path in store.shards)
    lines: list[tuple[str, Any]] = [
        ("store", store.path),
        ("kind", header.kind),
        ("shards", len(store.shards)),
        ("rows", f"{len(store):,}"),
        ("sequences", f"{store.sequences:,}"),
        ("vocabulary", f"{header.vocab_size:,}"),
        ("values", f"{header.k} a row, {header.value_dtype}"),
    ]
    if header.kind == "sampled":
        lines.append(("samples", f"{header.head_k} exact, {header.draws} draws, seed {header.seed}"))
    if header.index_encoding != "none":
        lines.append(("classes", f"{header.index_encoding}, {header.index_bits} bits"))
    lines.append(("bytes a row", f"{size / len(store):.1f}" if len(store) else "no rows"))
    lines.append(("temperatures", ", ".join(f"{t:g}" for t in header.temperatures)))
    if header.kind == "topk":
        lines.append(
            ("tail", {"producer": "from the logits", "derived": "derived, 1 minus the head"}[header.tail_source])
        )
        if len(store):
            means = tail_masses(store).mean(axis=0, dtype=np.float64)
            for t, mean in zip(header.temperatures, means, strict=True):
                lines.append((f"tail mass at {t:g}", f"{mean:.4f} on average"))
    for name in (
        "teacher",
        "teacher_revision",
        "tokenizer_sha256",
        "corpus_sha256",
        "head_sha256",
        "writer",
        "store_uuid",
    ):
        if value := getattr(header, name):
            lines.append((name.replace("_", " "), value))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in lines)


def plot_tails(store: LogitStore, path: str | os.PathLike[str]) -> Path:
    """Save a plot of how tail masses are distributed, at each temperature (extra ``demo``)."""
    masses = tail_masses(store)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots are drawn with matplotlib: pip install 'kdcore[demo]'") from error
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    edges = np.linspace(0, 1, 51).tolist()
    for t, column in zip(store.temperatures, masses.T, strict=True):
        mean = f", mean {column.mean():.3f}" if column.size else ""
        axes.hist(column, edges, histtype="step", linewidth=1.6, label=f"T = {t:g}{mean}")
    axes.set_xlabel(f"probability beyond the {store.header.k} stored classes")
    axes.set_ylabel("rows")
    axes.set_title(f"Tail mass of {store.path.name}")
    axes.legend()
    axes.grid(alpha=0.3)
    target = file_path(path, "path")
    figure.savefig(target, dpi=144)
    return target
