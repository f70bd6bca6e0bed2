"""A run of the benchmark: plan, measure, write."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kdcore._version import __version__
from kdcore.bench import PARTS, cases, measure, report
from kdcore.bench.peers import version_of
from kdcore.engines import resolve_threads
from kdcore.errors import ConfigError

__all__ = ["run_bench"]

_RESULTS = "results.json"


def run_bench(
    output_dir: str | Path,
    *,
    quick: bool = False,
    only: Iterable[str] = (),
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the parts named in ``only`` (by default all) and write results.json, table.md and plots to ``output_dir``."""
    settings = cases.QUICK if quick else cases.FULL
    chosen = [part for part in PARTS if part in set(only)] or list(PARTS)
    output = _own(Path(output_dir))
    threads = resolve_threads(None)
    results: dict[str, Any] = {
        "benchmark": "kdcore",
        "command": " ".join(["kdcore bench", *["--quick"] * quick, *(f"--only {part}" for part in only)]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": {"cpu": _cpu_model(), "threads": threads, "system": f"{platform.system()} {platform.machine()}"},
        "versions": {"python": platform.python_version(), "kdcore": __version__}
        | {name: version_of(name) for name in ("numpy", "numba", "llvmlite", "ml_dtypes", "torch", "scipy")},
        "sections": [],
    }
    sections = list(cases.plan(settings, frozenset(chosen), threads))
    extra = [part for part in ("start", "memory") if part in chosen]
    with tqdm(total=len(sections) + len(extra), unit="section", disable=not sys.stderr.isatty()) as bar:
        for part, build in sections:
            bar.set_description(part)
            results["sections"].append({"part": part, **measure.measure(build(), settings)})
            bar.update()
        for part in extra:
            bar.set_description(part)
            if part == "start":
                results["start"] = measure.first_calls(settings.starts)
            else:
                results["memory"] = [measure.peak_memory(shape, threads) for shape in settings.memory]
            bar.update()

    text = report.table(results)
    (output / _RESULTS).write_text(json.dumps(results, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    (output / "table.md").write_text(text, encoding="utf-8")
    drawn = report.plots(results, output)
    say(text)
    say(f"written: {', '.join(str(path) for path in (output / _RESULTS, output / 'table.md', *drawn))}")
    if version_of("matplotlib") is None:
        say("no plots: matplotlib is not installed (pip install 'kdcore[bench]')")
    return results


def _own(output: Path) -> Path:
    """``output``, made if need be; a folder with files that are not of an earlier run is an error."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        try:
            mine = json.loads((output / _RESULTS).read_text(encoding="utf-8"))["benchmark"] == "kdcore"
        except (OSError, ValueError, LookupError, TypeError):
            mine = False
        if not mine:
            raise ConfigError(f"{output} has files that are not from an earlier run: choose another output directory")
    output.mkdir(parents=True, exist_ok=True)
    return output


def _cpu_model() -> str:
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()
