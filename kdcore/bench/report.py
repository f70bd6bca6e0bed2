"""Results as JSON, as a table, and as plots."""

from __future__ import annotations

import statistics
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["plots", "table"]

METHOD = """\
Each result was verified against a float64 textbook before it was timed; error/bound is its worst error in units of
`kdcore.testing.bounds`. A repetition times every contender once, right after its limit: "x limit" is the median of the
ratios within repetitions, "best/best" the shortest time over the limit's shortest. "% of limit" is the bandwidth, by
the least traffic that the work needs, as a share of the limit's. "against" is the time over that of another row.
"""


def table(results: dict[str, Any]) -> str:
    """Everything as Markdown."""
    machine, versions = results["machine"], results["versions"]
    known = ", ".join(f"{name} {number}" for name, number in versions.items() if number is not None)
    lines = [
        f"`{results['command']}`, {results['date']}",
        "",
        f"{machine['cpu']}, {machine['threads']} threads, {machine['system']}; {known}",
        "",
        METHOD,
    ]
    for section in results["sections"]:
        lines += _section(section)
    if "start" in results:
        lines += ["### first call, from the start of the process", ""]
        lines += _grid(
            ["kernel cache", "total s", "imports s", "first call s", "second call s"],
            [
                [row["name"], *(f"{row[f'{part}_seconds']:.3f}" for part in ("total", "imports", "first_call")),
                 f"{row['second_call_seconds']:.6f}"]
                for row in results["start"]
            ],
        )  # fmt: skip
    if "memory" in results:
        lines += ["### memory beyond the arguments, float32, `out=` given", ""]
        lines += _grid(
            ["shape", "one array", "peak, NumPy", "peak, resident"],
            [
                [str(list(row["shape"])), *(_size(row[f"{part}_bytes"]) for part in ("array", "peak", "resident"))]
                for row in results["memory"]
            ],
        )
    return "\n".join(lines).rstrip() + "\n"


def _section(section: dict[str, Any]) -> list[str]:
    lines = [f"### {section['title']}", ""]
    speed = ""
    if len({tuple(row["shape"]) for row in section["rows"]}) == 1:
        rate = statistics.median(row["limit_bytes_per_second"] for row in section["rows"])
        speed = f"; the limit moves {rate / 1e9:.1f} GB/s"
    lines += [f"{section['repetitions']} repetitions{speed}", ""]
    lines += _grid(
        ["", "median ms", "min ms", "limit ms", "x limit", "best/best", "% of limit", "against", "error/bound"],
        [
            [
                row["name"],
                _milliseconds(row["median_seconds"]),
                _milliseconds(row["min_seconds"]),
                _milliseconds(row["limit_median_seconds"]),
                f"{row['ratio_to_limit']:.2f}",
                f"{row['ratio_of_minima']:.2f}",
                f"{100 * row['share_of_limit']:.0f}",
                _against(row),
                f"{row['error_over_bound']:.2f}",
            ]
            for row in section["rows"]
        ],
    )
    compiled = [row for row in section["rows"] if row["name"].endswith(" compile")]
    lines += [f"{row['name']}: first call {row['first_call_seconds']:.1f} s" for row in compiled]
    lines += [f"{name}: {reason}" for name, reason in section["absent"].items()]
    return [*lines, ""] if lines[-1] else lines


def _grid(head: list[str], body: list[list[str]]) -> list[str]:
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return [*(f"| {' | '.join(cells)} |" for cells in (head, rule, *body)), ""]


def _against(row: dict[str, Any]) -> str:
    if "reference" not in row or row["reference"] == row["name"]:
        return ""
    return f"{row['ratio_to_reference']:.2f} (best {row['best_to_reference']:.2f}) x {row['reference']}"


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:#.3g}".rstrip(".")


def _size(count: int | None) -> str:
    if count is None:
        return "not known"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.1f} KiB"


# --- plots ---------------------------------------------------------------------------------------------------------


def plots(results: dict[str, Any], folder: Path) -> list[Path]:
    """Write the plots that the results allow; none without matplotlib."""
    if find_spec("matplotlib") is None:
        return []
    written = []
    for section in results["sections"]:
        if section["part"] == "scaling":
            written.append(_scaling(section, folder / "scaling.png"))
    kd = [section for section in results["sections"] if section["part"] == "kd"]
    if kd:
        written.append(_bars(kd, folder / "kd.png"))
    return written


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _scaling(section: dict[str, Any], path: Path) -> Path:
    """Time over B·V, a line for each V, and the limit's: parallel lines of slope 1 are linear cost."""
    figure = _figure(7, 4.6)
    axes = figure.subplots()
    rows = section["rows"]
    for V in sorted({row["shape"][1] for row in rows}):
        mine = [row for row in rows if row["shape"][1] == V]
        sizes = [row["shape"][0] * V for row in mine]
        axes.plot(sizes, [1e3 * row["median_seconds"] for row in mine], "o-", label=f"V = {V:,}", markersize=4)
    by_size = {row["shape"][0] * row["shape"][1]: 1e3 * row["limit_median_seconds"] for row in rows}
    axes.plot(*zip(*sorted(by_size.items()), strict=True), "k--", label="triad, non-temporal stores")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("B · V")
    axes.set_ylabel("milliseconds")
    axes.set_title("KD loss and gradient: cost over rows times classes")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=144)
    return path


def _bars(sections: list[dict[str, Any]], path: Path) -> Path:
    """Times over the limit's, on a logarithmic axis, since peers are far away."""
    figure = _figure(8 * len(sections) ** 0.5, 1.5 + 0.28 * max(len(section["rows"]) for section in sections))
    for axes, section in zip(figure.subplots(1, len(sections), squeeze=False)[0], sections, strict=True):
        rows = section["rows"][::-1]
        colors = ["tab:blue" if row["name"].startswith("kdcore") else "tab:gray" for row in rows]
        bars = axes.barh([row["name"] for row in rows], [row["ratio_to_limit"] for row in rows], color=colors)
        axes.bar_label(bars, [f" {row['ratio_to_limit']:.2f}" for row in rows], fontsize=8)
        axes.axvline(1, color="black", linestyle="--", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlim(0.8, 2.5 * max(row["ratio_to_limit"] for row in rows))
        axes.set_xlabel("time over the triad with non-temporal stores")
        axes.set_title(section["title"], fontsize=10)
        axes.tick_params(axis="y", labelsize=8)
    figure.savefig(path, dpi=144)
    return path
