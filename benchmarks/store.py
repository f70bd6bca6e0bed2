"""What a store costs: bytes, writing, opening, reading, fidelity. Verified first, then timed.

    python benchmarks/store.py [--rows N] [--vocab V] [--directory DIR]

Logits are synthetic, in the manner of a language model: ids by frequency, a mean entropy of 1.3 nats, 4 % of
the probability beyond the 64 likeliest at T = 1 and V = 32,000. Ratios carry over to real teachers in kind, not to
the digit.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

import kdcore
from kdcore.store.convert import repack

K = 64
TEMPERATURES = (1.0, 2.0)
SEQUENCE = 512


def teacher(rows: int, vocab: int, seed: int) -> np.ndarray:
    """Logits float32 [rows, vocab] whose frequent classes come first."""
    rng = np.random.default_rng(seed)
    prior = -1.35 * np.log(np.arange(1, vocab + 1, dtype=np.float32) + 2.7)
    logits = prior + rng.standard_normal((rows, vocab), np.float32) * 2.0
    # A few classes that the context makes likely.
    likely = (vocab * rng.random((rows, 6)) ** 4).astype(np.int64)
    logits[np.arange(rows)[:, None], likely] += rng.normal(8.0, 3.0, (rows, 6)).astype(np.float32)
    return logits


def textbook(logits: np.ndarray, temperature: float) -> np.ndarray:
    """log softmax in float64."""
    scaled = logits.astype(np.float64) / temperature
    scaled -= scaled.max(axis=1, keepdims=True)
    return scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))


def write(path: Path, blocks: list[np.ndarray], sequences: list[np.ndarray], vocab: int) -> float:
    """Seconds that it takes to write a shard, its last sync included."""
    began = time.perf_counter()
    with kdcore.LogitStoreWriter(
        path, vocab_size=vocab, k=K, temperatures=TEMPERATURES, capacity=len(sequences) * SEQUENCE
    ) as writer:
        for i, sequence in enumerate(sequences):
            writer.append(sequence, blocks[i % len(blocks)])
    return time.perf_counter() - began


def verify(path: Path, blocks: list[np.ndarray], sequences: list[np.ndarray]) -> dict[str, float]:
    """Errors against dense, of the first sequences; L1 of the gradient at T = 2 is ‖p̂ - p‖ on the stored ids."""
    errors = {"stored ids, L1 at T = 2": 0.0, "stored ids, largest of a row": 0.0, "tail mass": 0.0}
    masses = []
    with kdcore.LogitStore(path) as store:
        store.verify()
        for block, sequence in zip(blocks, sequences, strict=False):
            order = np.argsort(-block, axis=1, kind="stable")[:, :K]
            for temperature in TEMPERATURES:
                rows = store.sequence(sequence, temperature)
                p = np.exp(textbook(block, temperature))
                assert (rows.indices == order).all(), "other classes than the likeliest"
                head = np.take_along_axis(p, order, 1)
                np.put_along_axis(p, order, 0, 1)
                tail = p.sum(axis=1)
                if temperature == 2.0:
                    distance = np.abs(np.exp(rows.log_probs.astype(np.float64)) - head).sum(axis=1)
                    errors["stored ids, L1 at T = 2"] = max(errors["stored ids, L1 at T = 2"], distance.mean())
                    errors["stored ids, largest of a row"] = max(errors["stored ids, largest of a row"], distance.max())
                relative = np.abs(np.exp(rows.tail_logmass.astype(np.float64)) / tail - 1)
                errors["tail mass"] = max(errors["tail mass"], float(relative.max()))
                masses.append((temperature, tail.mean()))
    for temperature in TEMPERATURES:
        errors[f"mean tail mass at {temperature:g}"] = float(np.mean([m for t, m in masses if t == temperature]))
    assert errors["stored ids, L1 at T = 2"] <= 2e-3 and errors["tail mass"] <= 1e-5, errors
    return errors


class Raw:
    """The same columns by np.memmap, and nothing else."""

    def __init__(self, path: Path) -> None:
        with kdcore.LogitStore(path) as store:
            shard = store._shards[0]
            self.columns = [
                np.memmap(path, column.dtype, "r", shard.offsets[column.name], column.shape(shard.capacity))
                for column in shard.columns
            ]

    def read(self, start: int, stop: int) -> list[np.ndarray]:
        return [np.array(column[start:stop]) for column in self.columns]


def reads(path: Path, passes: int) -> tuple[float, float, float, float]:
    """Seconds a sequence: raw, read by number, found by content; and of the first pass, which checks the blocks."""
    raw = Raw(path)
    with kdcore.LogitStore(path) as store:
        count = store.sequences
        tokens = [store.input_ids(i) for i in range(count)]
    rng = np.random.default_rng(0)
    with kdcore.LogitStore(path) as store:
        began = time.perf_counter()
        for i in rng.permutation(count).tolist():
            store.read(slice(i * SEQUENCE, (i + 1) * SEQUENCE), 2.0)
        first = (time.perf_counter() - began) / count
        totals: list[list[float]] = [[], [], []]
        for _ in range(passes):
            order = rng.permutation(count).tolist()
            for which, work in enumerate(
                (
                    lambda i: raw.read(i * SEQUENCE, (i + 1) * SEQUENCE),
                    lambda i: store.read(slice(i * SEQUENCE, (i + 1) * SEQUENCE), 2.0),
                    lambda i: store.sequence(tokens[i], 2.0),
                )
            ):
                began = time.perf_counter()
                for i in order:
                    work(i)
                totals[which].append((time.perf_counter() - began) / count)
    return (*(min(total) for total in totals), first)  # type: ignore[return-value]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1 << 18, help="rows of the shard that is read")
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--directory", default=None, help="where files go; by default a temporary directory")
    options = parser.parse_args()
    rng = np.random.default_rng(1)
    sequences = [
        (options.vocab * rng.random(SEQUENCE) ** 3).astype(np.uint32) for _ in range(max(8, options.rows // SEQUENCE))
    ]
    frequency = [teacher(SEQUENCE, options.vocab, seed) for seed in range(4)]
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        path = Path(folder) / "frequency.h5"
        write(Path(folder) / "warm.h5", frequency, sequences[:4], options.vocab)  # compiles
        seconds = write(path, frequency, sequences, options.vocab)
        print(f"V = {options.vocab:,}, k = {K}, T = {TEMPERATURES}, {os.cpu_count()} cores")
        for name, error in verify(path, frequency, sequences).items():
            print(f"verified: {name:<30} {error:.3g}")
        rows = len(sequences) * SEQUENCE
        packed = repack(path, Path(folder) / "archive.h5")
        with kdcore.LogitStore(packed) as store:
            store.verify()
        print(f"bytes a row: {path.stat().st_size / rows:.1f} written, {packed.stat().st_size / rows:.1f} repacked")
        print(f"writing, by frequency: {rows / seconds:,.0f} rows/s")
        few = sequences[: min(len(sequences), 128)]
        for name, blocks in (
            ("random", [rng.permuted(block, axis=1) for block in frequency]),
            ("ascending", [np.sort(block, axis=1) for block in frequency]),
        ):
            best = min(write(Path(folder) / f"{name}-{i}.h5", blocks, few, options.vocab) for i in range(2))
            print(f"writing, {name}: {len(few) * SEQUENCE / best:,.0f} rows/s")
        opened = []
        for _ in range(20):
            began = time.perf_counter()
            kdcore.LogitStore(path).close()
            opened.append(time.perf_counter() - began)
        print(f"opening: {min(opened) * 1e3:.2f} ms best, {sorted(opened)[10] * 1e3:.2f} ms median")
        raw, read, found, first = reads(path, 4)
        print(
            f"shuffled sequences of {SEQUENCE} rows: raw memmap {raw * 1e6:.0f} us, read {read * 1e6:.0f} us", end=" "
        )
        print(f"({read / raw:.2f} x raw), by content {found * 1e6:.0f} us ({found / raw:.2f} x raw)")
        print(f"first pass, which checks every block: {first * 1e6:.0f} us ({first / raw:.2f} x raw)")


if __name__ == "__main__":
    main()
