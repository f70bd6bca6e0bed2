"""Writers that are killed, resumed, doubled, or out of room: what was committed is there."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import replace

import h5py
import numpy as np
import pytest
from processes import in_a_process

import kdcore
from kdcore.errors import (
    CapacityError,
    ChecksumError,
    ClosedShardError,
    DiskFullError,
    FileFormatError,
    RepeatedSequenceError,
    ShardBusyError,
    ShardExistsError,
)
from kdcore.store.convert import repack
from kdcore.store.schema import crc32_of

VOCAB = 40
#: Kills at random moments; they take some 40 milliseconds each.
KILLS = int(os.environ.get("KDCORE_STORE_KILLS", "80"))


def logits_of(ids):
    """Logits that follow from the tokens, so that any row can be recognised."""
    rng = np.random.default_rng([int(ids[0]), len(ids)])
    return (rng.normal(size=(len(ids), VOCAB)) * 2).astype(np.float32)


def sequence(i):
    return np.arange(i, i + 3 + i % 5)


def make(path, capacity=200, **options):
    return kdcore.LogitStoreWriter(path, vocab_size=VOCAB, k=4, capacity=capacity, block_rows=8, **options)


def check(store, count=None):
    """Every sequence of a store is the one that was written, and they are the first that were."""
    store.verify()
    assert count is None or store.sequences == count
    for i in range(store.sequences):
        ids = sequence(i)
        np.testing.assert_array_equal(store.input_ids(i), ids)
        best = np.argsort(-logits_of(ids), axis=1, kind="stable")[:, :4]
        np.testing.assert_array_equal(store.sequence(ids).indices, best)


def test_kills_at_random_moments(tmp_path):
    """Children write until they are killed; what they said was committed is there, and the next child goes on."""
    output = in_a_process(
        f"""
        import os, random, signal, sys, time
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import numpy as np, kdcore
        from test_store_crash import check, make, logits_of, sequence

        with make("warm.h5") as writer:  # compiles, and what children inherit need not be done again
            writer.append(sequence(0), logits_of(sequence(0)))
        kdcore.LogitStoreWriter.resume("warm.h5")

        def write(report):
            try:
                writer = kdcore.LogitStoreWriter.resume("t.h5")
            except FileNotFoundError:
                writer = make("t.h5")
            os.write(report, b"%d\\n" % writer.committed_sequences)
            while writer.rows + 8 <= writer.capacity and not writer.closed:
                for _ in range(random.randrange(1, 4)):
                    ids = sequence(len(writer._keys))
                    if writer.rows + ids.size <= writer.capacity:
                        writer.append(ids, logits_of(ids))
                writer.commit()
                os.write(report, b"%d\\n" % writer.committed_sequences)
            writer.close()
            os.write(report, b"end\\n")

        random.seed(0)
        kills = finished = recovered = 0
        while kills < {KILLS}:
            reader, report = os.pipe()
            child = os.fork()
            if child == 0:
                random.seed(time.time_ns())
                try:
                    write(report)
                finally:
                    os._exit(0)
            os.close(report)
            time.sleep(random.random() ** 2 * 0.06)
            os.kill(child, signal.SIGKILL)
            killed = os.waitpid(child, 0)[1] == signal.SIGKILL
            said = b""
            while block := os.read(reader, 65536):
                said += block
            os.close(reader)
            lines = said.split()
            kills += killed
            promised = max([int(line) for line in lines if line != b"end"], default=0)
            for name in ("t.h5", "t.h5.part"):
                if os.path.exists(name):
                    with kdcore.LogitStore(name, recover=True) as store:
                        assert store.sequences >= promised, (store.sequences, promised)
                        check(store)
                        recovered += 1
                    if name == "t.h5":
                        os.unlink(name)
                        finished += 1
                    break
            else:
                assert promised == 0
        leftovers = sorted(set(os.listdir()) - {{"t.h5.part", "t.h5.part.new", "warm.h5", "script.py"}})
        print(kills, recovered, finished, leftovers)
        """,
        tmp_path,
        KDCORE_NUM_THREADS="1",
    )
    kills, recovered, finished, leftovers = output.split(maxsplit=3)
    assert int(kills) >= KILLS and int(recovered) > KILLS // 3 and int(finished) > 0
    assert leftovers.strip() == "[]"


def test_resume_goes_on_behind_the_last_commit(tmp_path):
    path = tmp_path / "t.h5"
    writer = make(path)
    for i in range(5):
        writer.append(sequence(i), logits_of(sequence(i)))
        if i < 3:
            writer.commit()
    assert (writer.committed_sequences, writer.committed_rows, writer.rows) == (3, 12, 25)
    writer.abandon()
    assert writer.closed and not path.exists()
    writer = kdcore.LogitStoreWriter.resume(path)
    assert (writer.committed_sequences, writer.rows, writer.kind, writer.temperatures) == (3, 12, "topk", (1.0, 2.0))
    with pytest.raises(RepeatedSequenceError):
        writer.append(sequence(1), logits_of(sequence(1)))
    with writer:
        for i in range(3, 9):
            writer.append(sequence(i), logits_of(sequence(i)))
    with kdcore.LogitStore(path) as store:
        check(store, 9)
    finished = kdcore.LogitStoreWriter.resume(path)
    assert finished.closed and finished.committed_sequences == 9
    finished.close()
    with pytest.raises(ClosedShardError, match="finished"):
        finished.append(sequence(20), logits_of(sequence(20)))
    with pytest.raises(FileNotFoundError, match=r"neither .*u.h5 nor .*u.h5.part"):
        kdcore.LogitStoreWriter.resume(tmp_path / "u.h5")


def test_an_error_in_the_block_leaves_what_was_committed(tmp_path):
    path = tmp_path / "t.h5"
    with pytest.raises(ZeroDivisionError), make(path) as writer:
        writer.append(sequence(0), logits_of(sequence(0)))
        writer.commit()
        writer.append(sequence(1), logits_of(sequence(1)))
        _ = 1 / 0
    assert not path.exists()
    part = tmp_path / "t.h5.part"
    with pytest.raises(FileFormatError, match="unfinished shard, which is read with recover=True alone"):
        kdcore.LogitStore(part)
    with kdcore.LogitStore(part, recover=True) as store:
        check(store, 1)


def test_killed_between_the_last_commit_and_the_name(tmp_path, monkeypatch):
    path = tmp_path / "t.h5"
    writer = make(path)
    writer.append(sequence(0), logits_of(sequence(0)))
    monkeypatch.setattr(type(writer), "_rename", lambda self: self._release())
    writer.close()
    monkeypatch.undo()
    assert not path.exists()
    with pytest.raises(FileFormatError, match="recover=True"):
        kdcore.LogitStore(tmp_path / "t.h5.part")
    assert kdcore.LogitStoreWriter.resume(path).closed
    with kdcore.LogitStore(path) as store:
        check(store, 1)


def test_a_reader_beside_the_writer(tmp_path):
    path, part = tmp_path / "t.h5", tmp_path / "t.h5.part"
    with make(path) as writer:
        stores = []
        for i in range(9):
            writer.append(sequence(i), logits_of(sequence(i)))
            writer.commit()
            stores.append(kdcore.LogitStore(part, recover=True))
    for i, store in enumerate(stores):  # each sees what was committed when it was opened
        check(store, i + 1)
        store.close()


def test_a_second_writer(tmp_path):
    path = tmp_path / "t.h5"
    with make(path) as writer:
        with pytest.raises(ShardExistsError, match="was begun"):
            make(path)
        with pytest.raises(ShardBusyError, match="by another writer"):
            kdcore.LogitStoreWriter.resume(path)
        code = f"import kdcore; kdcore.LogitStoreWriter.resume({str(path)!r})"
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert other.returncode == 1 and "ShardBusyError" in other.stderr
        writer.append(sequence(0), logits_of(sequence(0)))
    with kdcore.LogitStore(path) as store:
        check(store, 1)
    assert sorted(os.listdir(tmp_path)) == ["t.h5"]


def test_two_writers_that_begin_at_once(tmp_path):
    """Whatever the moment: one of them has it."""
    output = in_a_process(
        f"""
        import os, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import kdcore
        from test_store_crash import check, make, logits_of, sequence
        for attempt in range(20):
            path, children = f"{{attempt}}.h5", []
            for _ in range(3):
                child = os.fork()
                if child == 0:
                    code = 3
                    try:
                        with make(path) as writer:
                            writer.append(sequence(0), logits_of(sequence(0)))
                        code = 0
                    except (kdcore.ShardBusyError, kdcore.ShardExistsError):
                        code = 1
                    finally:
                        os._exit(code)
                children.append(child)
            codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
            assert codes.count(0) == 1 and codes.count(1) == 2, codes
            with kdcore.LogitStore(path) as store:
                check(store, 1)
        print("done")
        """,
        tmp_path,
        KDCORE_NUM_THREADS="1",
    )
    assert output == "done\n"


def test_the_fork_of_a_writer_does_not_write(tmp_path):
    output = in_a_process(
        f"""
        import os, sys
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        import kdcore
        from test_store_crash import check, make, logits_of, sequence
        writer = make("t.h5")
        child = os.fork()
        if child == 0:
            try:
                writer.append(sequence(0), logits_of(sequence(0)))
            except kdcore.ShardBusyError as error:
                print(error, flush=True)
            os._exit(0)
        os.waitpid(child, 0)
        writer.append(sequence(0), logits_of(sequence(0)))
        writer.close()
        with kdcore.LogitStore("t.h5") as store:
            check(store, 1)
        """,
        tmp_path,
    )
    assert "belongs to the writer of process" in output


def test_no_room_for_the_capacity(tmp_path):
    """The system's limit of a file's size stands for a full disk."""
    output = in_a_process(
        """
        import os, resource, signal
        import kdcore
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        try:
            kdcore.LogitStoreWriter("t.h5", vocab_size=1000, capacity=100_000)
        except kdcore.DiskFullError as error:
            print(type(error).__mro__[2].__name__, error)
        print(sorted(os.listdir()))
        """,
        tmp_path,
    )
    first, second = output.splitlines()
    assert "has no room on disk for the 100000 rows" in first and second == "['script.py']"


@pytest.mark.parametrize("moment", ["pwrite", "fsync"])
def test_a_disk_that_fills_up(tmp_path, monkeypatch, moment):
    path = tmp_path / "t.h5"
    with make(path) as writer:
        writer.append(sequence(0), logits_of(sequence(0)))
        writer.commit()
        real = getattr(os, moment)

        def full(*args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, moment, full)
        with pytest.raises(DiskFullError, match="No space left"):
            writer.append(sequence(1), logits_of(sequence(1)))
            writer.commit()
        with kdcore.LogitStore(tmp_path / "t.h5.part", recover=True) as store:
            check(store, 1)
        monkeypatch.setattr(os, moment, real)
        if moment == "pwrite":  # nothing of it counts; after a failed sync it is there, and not committed
            assert writer.rows == 3
            writer.append(sequence(1), logits_of(sequence(1)))
    with kdcore.LogitStore(path) as store:
        check(store, 2)


def test_a_reserved_disk_is_asked_for(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFullError, match="no room on disk for the 200 rows"):
        make(tmp_path / "t.h5")
    assert os.listdir(tmp_path) == []


def test_a_damaged_part_is_not_resumed(tmp_path):
    path, part = tmp_path / "t.h5", tmp_path / "t.h5.part"
    writer = make(path)
    writer.append(sequence(0), logits_of(sequence(0)))
    writer.commit()
    offset = writer._offsets["rows/values"]
    writer.abandon()
    data = bytearray(part.read_bytes())
    data[offset] ^= 1
    part.write_bytes(data)
    with pytest.raises(ChecksumError, match="'rows/values', rows 0 to 2"):
        kdcore.LogitStoreWriter.resume(path)
    part.write_bytes(part.read_bytes()[:1000])
    with pytest.raises(FileFormatError):
        kdcore.LogitStoreWriter.resume(path)


@pytest.mark.parametrize("moment", [1, 3, 5, 7, 9])
def test_an_interrupt_leaves_nothing_of_a_sequence(tmp_path, monkeypatch, moment):
    """Ctrl-C in a notebook, after which the same writer goes on."""
    calls = 0

    def interrupted(*arguments):
        nonlocal calls
        calls += 1
        if calls == moment:
            raise KeyboardInterrupt
        return crc32_of(*arguments)

    with make(tmp_path / "t.h5") as writer:
        writer.append(sequence(0), logits_of(sequence(0)))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr("kdcore.store.writer.crc32_of", interrupted)
            writer.append(sequence(3), logits_of(sequence(3)))  # across the end of a block
        assert writer.rows == 3 and sequence(3) not in writer
        writer.append(sequence(1), logits_of(sequence(1)))
        writer.append(sequence(2), logits_of(sequence(2)))
    with kdcore.LogitStore(tmp_path / "t.h5") as store:
        check(store, 3)


def test_a_part_without_room_for_its_sequences(tmp_path):
    """Other arrays lie behind that for sequences, and a writer goes by where arrays begin."""
    path, part = tmp_path / "t.h5", tmp_path / "t.h5.part"
    with pytest.raises(RuntimeError, match="stop"), make(path) as writer:
        writer.append(sequence(0), logits_of(sequence(0)))
        writer.commit()
        raise RuntimeError("stop")
    with h5py.File(part, "r+") as file:
        for name, size in (("seq/id", 1), ("seq/offsets", 2)):
            data = file[name][:size]
            del file[name]
            file[name] = data
    with pytest.raises(FileFormatError, match="'seq/id' has room for 1 sequences; expected 200"):
        kdcore.LogitStoreWriter.resume(path)
    with kdcore.LogitStore(part, recover=True) as store:
        check(store, 1)


def test_a_commit_with_the_largest_counter(tmp_path):
    path, part = tmp_path / "t.h5", tmp_path / "t.h5.part"
    writer = make(path)
    writer.append(sequence(0), logits_of(sequence(0)))
    writer.commit()
    place = writer._offsets["commit"]
    words = replace(writer._commit, counter=2**64 - 1).words(writer._header.store_uuid)
    writer.abandon()
    data = bytearray(part.read_bytes())
    data[place : place + 512] = words.tobytes()
    part.write_bytes(data)
    with pytest.raises(FileFormatError, match="'commit' has the counter 18446744073709551615"):
        kdcore.LogitStoreWriter.resume(path)


def test_an_archive_is_not_gone_on_with(tmp_path):
    path = tmp_path / "t.h5"
    with make(path, capacity=2000) as writer:
        ids = np.arange(2000)
        writer.append(ids, logits_of(ids))
    repack(path, tmp_path / "a.h5").rename(tmp_path / "b.h5.part")
    with pytest.raises(FileFormatError, match="b.h5.part has compressed arrays"):
        kdcore.LogitStoreWriter.resume(tmp_path / "b.h5")


def test_capacity_overrun_keeps_what_is_there(tmp_path):
    with make(tmp_path / "t.h5", capacity=7) as writer:
        writer.append(sequence(0), logits_of(sequence(0)))
        writer.append(sequence(1), logits_of(sequence(1)))
        with pytest.raises(CapacityError, match="7 of 7 rows, and no room for 5"):
            writer.append(sequence(2), logits_of(sequence(2)))
    with kdcore.LogitStore(tmp_path / "t.h5") as store:
        check(store, 2)


def test_a_commit_that_was_torn(tmp_path):
    """The slot that was being written is garbage: the one before it holds."""
    path, part = tmp_path / "t.h5", tmp_path / "t.h5.part"
    writer = make(path)
    for i in range(3):
        writer.append(sequence(i), logits_of(sequence(i)))
        writer.commit()
    place = writer._offsets["commit"] + writer._commit.counter % 2 * 512
    writer.abandon()
    data = bytearray(part.read_bytes())
    data[place + 8] ^= 255
    part.write_bytes(data)
    with kdcore.LogitStore(part, recover=True) as store:
        check(store, 2)
    with kdcore.LogitStoreWriter.resume(path) as writer:
        writer.append(sequence(2), logits_of(sequence(2)))
    with kdcore.LogitStore(path) as store:
        check(store, 3)
