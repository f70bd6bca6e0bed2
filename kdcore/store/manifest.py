"""The manifest of a store of many shards: a JSON file beside them that says which they are, and in which order."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kdcore.checks import file_path
from kdcore.errors import ChecksumError, FileFormatError, MissingRowError, ProvenanceError, UnsafeFileError
from kdcore.store.schema import PART
from kdcore.store.shard import Shard

__all__ = ["MANIFEST", "Entry", "Manifest", "read_manifest", "write_manifest"]

MANIFEST = "manifest.json"
_FORMAT = "kdcore.logitstore.manifest"
_VERSION = 1
#: More than a manifest of a million shards.
_MOST_BYTES = 1 << 30
#: Bytes of a file's name, on every common file system.
_LONGEST_NAME = 255


@dataclass(frozen=True)
class Entry:
    """A shard as the manifest has it."""

    name: str
    bytes: int
    rows: int
    sequences: int
    row_start: int
    shard_index: int
    store_uuid: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The shards in order, and the header attributes that all of them have."""

    path: Path
    header: dict[str, Any]
    shards: tuple[Entry, ...]

    def open(self, entry: Entry) -> Shard:
        """A shard, which must be the one that the manifest was made of."""
        shard = Shard(self.path.parent / entry.name)
        found = {"store_uuid": shard.header.store_uuid, "rows": shard.rows, "sequences": shard.sequences}
        for name, value in found.items():
            if value != getattr(entry, name):
                raise ProvenanceError(
                    f"{shard.path}: {name} is {value!r}, but {self.path} has {getattr(entry, name)!r}: another shard"
                )
        _check_agreement(shard, self.header, self.path)
        return shard

    def verify(self, entry: Entry) -> None:
        """Check the SHA-256 of a shard."""
        path = self.path.parent / entry.name
        found = _sha256(path)
        if found != entry.sha256:
            raise ChecksumError(f"{path}: the SHA-256 is {found}, but {self.path} has {entry.sha256}: it was changed")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _plain(header: dict[str, Any]) -> dict[str, Any]:
    """As JSON has it."""
    plain: dict[str, Any] = json.loads(json.dumps(header))
    return plain


def _check_agreement(shard: Shard, header: dict[str, Any], source: Any) -> None:
    own = _plain(shard.header.agreed())
    for name in own.keys() | header.keys():
        if own.get(name) != header.get(name):
            raise ProvenanceError(
                f"{shard.path}: attribute {name!r} is {own.get(name)!r}, but {header.get(name)!r} in {source}: "
                "shards of one store must agree"
            )


def write_manifest(directory: str | os.PathLike[str], shards: Sequence[str] | None = None) -> Path:
    """Tie the shards of a directory together: write its ``manifest.json``, and return the path.

    Parameters
    ----------
    directory
        Where the shards are.
    shards : sequence of str, optional
        Their file names; by default all that end in ``.h5``, of which none may be unfinished.

    Raises
    ------
    ProvenanceError
        Shards disagree, in kind, vocabulary, temperatures or where they come from; one is there twice.
    MissingRowError
        There are none, or a ``shard_index`` between 0 and the largest is missing.
    FileFormatError
        One is unfinished, or no shard.
    """
    folder = file_path(directory, "directory").absolute()
    if not folder.is_dir():
        raise NotADirectoryError(f"{folder} is not a directory of shards")
    if shards is None:
        unfinished = sorted(path.name for path in folder.glob(f"*.h5{PART}"))
        if unfinished:
            raise FileFormatError(f"{folder / unfinished[0]} is unfinished: finish it, or delete it")
        names = sorted(path.name for path in folder.glob("*.h5"))
    else:
        names = list(shards)
    if not names:
        raise MissingRowError(f"{folder} has no shards (*.h5)")
    opened: dict[int, tuple[Shard, str]] = {}
    header: dict[str, Any] = {}
    uuids: dict[str, str] = {}
    for name in names:
        with Shard(folder / _local(name, folder)) as shard:
            index = shard.header.shard_index
            if index in opened:
                raise ProvenanceError(f"{shard.path} and {opened[index][0].path} both have the shard_index {index}")
            if shard.header.store_uuid in uuids:
                raise ProvenanceError(f"{shard.path} is a copy of {uuids[shard.header.store_uuid]}")
            uuids[shard.header.store_uuid] = name
            if not opened:
                header, first = _plain(shard.header.agreed()), shard.path
            _check_agreement(shard, header, first)
            opened[index] = shard, name
    missing = set(range(max(opened) + 1)) - opened.keys()
    if missing:
        raise MissingRowError(f"{folder} has no shard with the shard_index {min(missing)}, but one with {max(opened)}")
    entries, row = [], 0
    for index in sorted(opened):
        shard, name = opened[index]
        path = folder / name
        entries.append(
            Entry(
                name=name,
                bytes=path.stat().st_size,
                rows=shard.rows,
                sequences=shard.sequences,
                row_start=row,
                shard_index=index,
                store_uuid=shard.header.store_uuid,
                sha256=_sha256(path),
            )
        )
        row += shard.rows
    text = json.dumps(
        {"format": _FORMAT, "version": _VERSION, "header": header, "shards": [asdict(entry) for entry in entries]},
        indent=1,
    )
    return _replace(folder / MANIFEST, text)


def _replace(path: Path, text: str) -> Path:
    """Write a file that appears whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "x", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _local(name: Any, source: Any) -> str:
    """A file name beside the manifest, and nothing else."""
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or re.search("[/\\\\\0\ud800-\udfff]", name)  # surrogates are no text
        or len(name.encode()) > _LONGEST_NAME
    ):
        raise UnsafeFileError(f"{source}: a shard must be a file beside it, got {name!r}")
    return name


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest in a file that need not be trusted. The shards must be there; they are opened when they are read."""
    path = file_path(path, "path").absolute()
    if path.stat().st_size > _MOST_BYTES:
        raise FileFormatError(f"{path} has {path.stat().st_size} bytes; the limit of a manifest is {_MOST_BYTES}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{path} is not a manifest, it is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise FileFormatError(f"{path} is not a manifest: its format is not {_FORMAT!r}")
    if content.get("version") != _VERSION:
        raise FileFormatError(f"{path} has the version {content.get('version')!r}; this kdcore reads {_VERSION}")
    header, listed = content.get("header"), content.get("shards")
    if not isinstance(header, dict) or not isinstance(listed, list) or not listed:
        raise FileFormatError(f"{path} must hold an object 'header' and a list 'shards' that is not empty")
    entries = [_entry(item, path, i) for i, item in enumerate(listed)]
    seen: dict[Any, int] = {}
    row = 0
    for i, entry in enumerate(entries):
        if entry.row_start != row:
            kind = "overlap" if entry.row_start < row else "leave a gap"
            raise ProvenanceError(
                f"{path}: shard {i} ({entry.name}) begins at row {entry.row_start}, but those before it end at {row}: "
                f"they {kind}"
            )
        if entry.shard_index != i:
            raise ProvenanceError(f"{path}: shard {i} ({entry.name}) has the shard_index {entry.shard_index}")
        for key in (entry.name, entry.store_uuid):
            if key in seen:
                raise ProvenanceError(f"{path}: shards {seen[key]} and {i} are both {key!r}")
            seen[key] = i
        row += entry.rows
        shard = path.parent / entry.name
        if not shard.is_file():
            raise FileNotFoundError(f"{path}: the shard {shard} is missing")
        if shard.stat().st_size != entry.bytes:
            raise ChecksumError(
                f"{shard} has {shard.stat().st_size} bytes, but {path} has {entry.bytes}: it was changed"
            )
    return Manifest(path, header, tuple(entries))


def _entry(item: Any, path: Path, i: int) -> Entry:
    numbers = ("bytes", "rows", "sequences", "row_start", "shard_index")
    texts = ("name", "store_uuid", "sha256")
    if not isinstance(item, dict) or set(item) != {*numbers, *texts}:
        raise FileFormatError(f"{path}: shard {i} must be an object of {', '.join((*texts, *numbers))}")
    for key in numbers:
        if type(item[key]) is not int or not 0 <= item[key] < 1 << 62:
            raise FileFormatError(f"{path}: {key!r} of shard {i} must be a count, got {item[key]!r}")
    for key in texts:
        if not isinstance(item[key], str):
            raise FileFormatError(f"{path}: {key!r} of shard {i} must be a string, got {item[key]!r}")
    _local(item["name"], path)
    return Entry(**item)
