"""A teacher's answers, written by many processes, read as one store.

    python examples/teacher_store.py DIRECTORY              # plain processes
    pip install kdcore[dask]
    python examples/teacher_store.py DIRECTORY --dask       # Dask workers, here of a cluster on this machine

The unit of work is a shard: one writer, one file, a slice of the corpus. Nothing is shared but the directory, so that
processes, Dask, Ray, or the array jobs of a cluster do as well. Run it again after a crash, or kill it yourself: shards
that are finished are skipped, and one that was begun goes on behind its last commit.
"""

import argparse
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

import kdcore
from kdcore.store.manifest import write_manifest

CLASSES, SHARDS, SEQUENCES, LENGTH = 5_000, 4, 6, 32
SETTINGS = {"vocab_size": CLASSES, "k": 64, "temperatures": (1.0, 2.0), "teacher": "a table of random numbers"}


def corpus(shard):
    """The token sequences of a shard: here random ones, which differ from shard to shard."""
    rng = np.random.default_rng([1, shard])
    return [rng.integers(0, CLASSES, LENGTH) for _ in range(SEQUENCES)]


def teacher(tokens):
    """Logits [L, V] of what follows each token: where your model goes."""
    table = np.random.default_rng(0).normal(scale=3, size=(256, CLASSES)).astype(np.float32)
    return table[tokens % 256]


def write_shard(directory, shard):
    """Write one shard, or what is missing of it; returns its rows."""
    path = Path(directory) / f"teacher-{shard:05}.h5"
    try:
        writer = kdcore.LogitStoreWriter.resume(path)
    except FileNotFoundError:
        writer = kdcore.LogitStoreWriter(path, capacity=SEQUENCES * LENGTH, shard_index=shard, **SETTINGS)
    with writer:
        if not writer.closed:
            for tokens in corpus(shard)[writer.committed_sequences :]:
                writer.append(tokens, teacher(tokens))
                writer.commit()  # a crash costs what comes next, no more; a quick teacher commits every few seconds
    return writer.rows


def with_processes(directory):
    with ProcessPoolExecutor(2, mp_context=get_context("spawn")) as pool:
        return list(pool.map(write_shard, [directory] * SHARDS, range(SHARDS)))


def with_dask(directory):
    from distributed import Client, LocalCluster

    # A real cluster is another Client(...). Its workers must see the directory.
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        return client.gather(client.map(write_shard, [directory] * SHARDS, range(SHARDS)))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dask", action="store_true")
    options = parser.parse_args()
    options.directory.mkdir(parents=True, exist_ok=True)
    rows = (with_dask if options.dask else with_processes)(options.directory)

    manifest = write_manifest(options.directory)  # as does: kdcore store manifest DIRECTORY
    with kdcore.LogitStore(manifest, vocab_size=CLASSES) as store:
        assert len(store) == sum(rows) and store.sequences == SHARDS * SEQUENCES
        tails = [np.exp(answers.tail_logmass).mean() for _, answers in store.shuffled(seed=0, temperature=2.0)]
        tokens = corpus(2)[3]
        answers = store.sequence(tokens, temperature=2.0)  # by what was read, whichever shard has it
        best = np.argmax(teacher(tokens), axis=1)
        assert (answers.indices[:, 0] == best).all()
        print(f"{len(store.shards)} shards, {len(store)} rows, mean tail mass at T = 2: {np.mean(tails):.3f}")


if __name__ == "__main__":
    sys.exit(main())
