"""The demo's text: the source files of the running Python's standard library, split by path, and positions in them.

Nothing is downloaded, and whoever runs the demo has the text already. Files are split whole, so that no position that
is evaluated has its neighbours in training, and by a hash of the path, so that a file added or removed by another
Python version moves no other file.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kdcore.errors import DomainError, MissingSourceError

__all__ = ["Corpus", "load_corpus", "part_of", "passages", "positions", "source_paths"]

Part = Literal["train", "tune", "held_out"]

HELD_OUT_PERCENT = 5
TUNE_PERCENT = 5

# Installed packages lie below the standard library's folder, but are not part of it.
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    """File contents by relative POSIX path, sorted by path, in three disjoint parts.

    ``train`` (90 % of the files) fits the teacher and gives the students' positions, ``tune`` (5 %) chooses learning
    rates, ``held_out`` (5 %) is for the reported numbers and nothing else. The teacher is not fitted on ``tune``: its
    probabilities would carry the labels there, and the distilled student's learning rate would be chosen on text that
    its teacher has seen.
    """

    train: dict[str, bytes]
    tune: dict[str, bytes]
    held_out: dict[str, bytes]


def part_of(path: str) -> Part:
    """The part that the file with this relative POSIX path belongs to; depends on the path alone."""
    digest = hashlib.blake2b(path.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    percent = int.from_bytes(digest, "little") * 100 >> 64
    if percent < HELD_OUT_PERCENT:
        return "held_out"
    return "tune" if percent < HELD_OUT_PERCENT + TUNE_PERCENT else "train"


def source_paths(root: Path) -> list[str]:
    """Relative POSIX paths of the ``.py`` files below ``root``, without installed packages, sorted."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
        found += [Path(folder, name).relative_to(root).as_posix() for name in names if name.endswith(".py")]
    return sorted(found)


def load_corpus(root: str | Path | None = None) -> Corpus:
    """Read and split the ``.py`` files below ``root``, by default the standard library of the running Python.

    Raises :class:`MissingSourceError` where there are none, or too few for every part to have a file.
    """
    folder = Path(sysconfig.get_path("stdlib") if root is None else root)
    parts: dict[Part, dict[str, bytes]] = {"train": {}, "tune": {}, "held_out": {}}
    for path in source_paths(folder):
        parts[part_of(path)][path] = (folder / path).read_bytes()
    if not all(parts.values()):
        sizes = ", ".join(f"{len(files)} {part}" for part, files in parts.items())
        raise MissingSourceError(
            f"the demo learns from the standard library's source files, but {folder} holds too few .py files "
            f"({sizes}); a Python whose library is zipped or ships compiled files only cannot run it"
        )
    return Corpus(**parts)


def positions(files: Sequence[bytes], count: int, seed: int, order: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """``count`` positions of ``files``, uniformly without replacement: what precedes each, and the byte that is there.

    Returns contexts uint8 [count, order - 1], oldest byte first, and labels uint8 [count]. Only positions whose context
    lies within the file are drawn. Budgets are nested: with the same files, seed and order, the first 3,000 of 30,000
    positions are the 3,000, so that a learning curve over budgets is not a comparison of samples.
    """
    if order < 1:
        raise DomainError(f"order must be at least 1, got {order}")
    n = order - 1
    per_file = np.array([max(len(data) - n, 0) for data in files], np.int64)
    ends = np.cumsum(per_file)
    total = int(ends[-1]) if len(files) else 0
    if not 0 <= count <= total:
        raise DomainError(f"count must lie between 0 and the {total} positions with a full context, got {count}")
    drawn = _sample(total, count, seed)
    text = np.frombuffer(b"".join(files), np.uint8)
    file = np.searchsorted(ends, drawn, side="right")
    sizes = np.array([len(data) for data in files], np.int64)
    start = (np.cumsum(sizes) - sizes)[file] + drawn - (ends - per_file)[file]
    window = start[:, None] + np.arange(order)
    grams = text[window]
    return np.ascontiguousarray(grams[:, :n]), np.ascontiguousarray(grams[:, n])


def passages(
    files: Sequence[bytes], count: int, length: int, seed: int, *, before: int, taken: NDArray[np.uint8] | None = None
) -> NDArray[np.uint8]:
    """``count`` passages of ``length`` bytes of ``files``, each with the ``before`` bytes before it and the next byte.

    Returns uint8 [count, before + length + 1], drawn as :func:`positions` draws, so that budgets are nested here too. A
    passage that was drawn before, or that is one of ``taken``, is left out: a teacher's answers are found by what the
    passage says.
    """
    seen = set() if taken is None else {passage[before:-1].tobytes() for passage in taken}
    kept: list[int] = []
    drawn = count
    while True:
        contexts, following = positions(files, drawn, seed, before + length + 1)
        for i in range(len(kept) and kept[-1] + 1, drawn):
            content = contexts[i, before:].tobytes()
            if content not in seen and len(kept) < count:
                seen.add(content)
                kept.append(i)
        if len(kept) == count:
            return np.concatenate([contexts, following[:, None]], axis=1)[kept]
        drawn += count


def _sample(total: int, count: int, seed: int) -> NDArray[np.int64]:
    """The first ``count`` entries of a random permutation of ``range(total)``.

    Fisher-Yates, with only the displaced entries kept: a permutation of 28 million positions would take 220 MB.
    """
    uniform = np.random.default_rng(seed).random(count)
    chosen = np.arange(count) + (uniform * (total - np.arange(count))).astype(np.int64)
    displaced: dict[int, int] = {}
    result = np.empty(count, np.int64)
    for i, j in enumerate(chosen.tolist()):
        result[i] = displaced.get(j, j)
        displaced[j] = displaced.get(i, i)
    return result
