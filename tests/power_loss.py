"""Power loss on real nodes: what a disk may hold when a process that is killed was not all synced.

``kill -9`` leaves the page cache, so it proves nothing about fsync (raft-traps T11). Here a node runs
with ``power_loss.c`` preloaded, which records every call that changes a file of its directory. After
the node is killed, ``after_loss`` says what a loss of power could have left of its directory:

Rule 1: what was synced is there: bytes before the last sync of their file, names before the last
sync of their directory.
Rule 2: of the rest chance decides: nothing, all, the first so many calls and a torn one, or any
sectors of any write. A file that grew ends at any byte, a sector within it is old or new.
Rule 3: names come and go in their order, up to some point: what was renamed may have its old name.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import NamedTuple

SOURCE = Path(__file__).with_suffix(".c")
SECTOR_BYTES = 512
_HEAD = struct.Struct(">cIQI")


def compile_recorder(directory: Path) -> Path | None:
    """The library to preload; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        return None
    library = directory / "power_loss.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(library), str(SOURCE)]
    subprocess.run([*command, "-ldl", "-lpthread"], check=True)
    return library


class Record(NamedTuple):
    """A call as ``power_loss.c`` has written it down."""

    kind: str
    number: int
    offset: int
    data: bytes


def read_journal(path: Path) -> Iterator[Record]:
    """The calls of one process, in their order."""
    with path.open("rb") as file:
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            kind, number, offset, length = _HEAD.unpack(head)
            data = file.read(length)
            if len(data) < length:
                return  # killed while it wrote that down: the call was not made
            yield Record(kind.decode(), number, offset, data)


class Change(NamedTuple):
    """What a call does to a file: bytes are put at an offset, or (None) it ends there."""

    offset: int
    data: bytes | None
    is_safe: bool = False  # synced by itself

    def apply(self, content: bytearray) -> None:
        if self.data is None:
            del content[self.offset :]
        missing = self.offset + len(self.data or b"") - len(content)
        content.extend(bytes(max(0, missing)))
        if self.data is not None:
            content[self.offset : self.offset + len(self.data)] = self.data


@dataclass(eq=False)
class DiskFile:
    """The bytes of a file: what is safe, and what was done since."""

    safe: bytearray = field(default_factory=bytearray)
    pending: list[Change] = field(default_factory=list)

    def sync(self) -> None:
        for change in self.pending:
            change.apply(self.safe)
        self.pending.clear()

    def now(self) -> bytearray:
        """What a process sees in it."""
        content = bytearray(self.safe)
        for change in self.pending:
            change.apply(content)
        return content

    def after_loss(self, random: Random) -> bytearray:
        """What may be left of it."""
        content = bytearray(self.safe)
        for change in self._kept(random):
            change.apply(content)
        return content

    def _kept(self, random: Random) -> Iterator[Change]:
        count = len(self.pending)
        kind = random.choice(("nothing", "all", "first", "sectors"))
        first = {"nothing": 0, "first": random.randint(0, count)}.get(kind, count)
        for number, change in enumerate(self.pending):
            if change.is_safe or (number < first and kind != "sectors"):
                yield change
            elif kind == "sectors":
                yield from self._sectors(change, random)
            elif kind == "first" and number == first:
                yield from self._torn(change, random)

    def _torn(self, change: Change, random: Random) -> Iterator[Change]:
        offset, data, _ = change
        if data is None:
            return
        end = offset + random.randint(0, len(data))
        if end < len(self.safe):
            end -= end % SECTOR_BYTES
        if end > offset:
            yield Change(offset, data[: end - offset])

    @staticmethod
    def _sectors(change: Change, random: Random) -> Iterator[Change]:
        offset, data, _ = change
        if data is None:
            yield change
            return
        at = 0
        while at < len(data):
            end = at + SECTOR_BYTES - (offset + at) % SECTOR_BYTES
            if random.random() < 0.5:
                yield Change(offset + at, data[at:end])
            at = end


class Named(NamedTuple):
    """What a call does to the names of a directory."""

    name: str
    file: DiskFile | None  # None: the name goes
    old_name: str | None = None  # which goes in the same step


class DiskDirectory:
    """One node's directory: names and files, safe or not yet. It has no directories in it."""

    def __init__(self, safe: Mapping[str, bytes]) -> None:
        self.names = {name: DiskFile(bytearray(data)) for name, data in safe.items()}
        self._safe = dict(self.names)
        self._pending: list[Named] = []
        self._touched: set[str] = set()  # by the last call, which may not have been made

    def replay(self, directory: Path, journal: Path) -> None:
        """Take in what a process has done to it."""
        opened: dict[int, tuple[str, DiskFile | None]] = {}  # None: the directory itself
        for kind, number, offset, data in read_journal(journal):
            paths = [Path(part.decode()) for part in data.split(b"\0")] if kind in "octdur" else []
            if paths and paths[-1].parent == directory:
                self._touched = {path.name for path in paths}
            match kind:
                case "o" | "c" | "t" | "d" if paths[0] == directory:
                    opened[number] = "", None
                case _ if paths and paths[-1].parent != directory:
                    pass
                case "o" | "c" | "t":
                    opened[number] = paths[0].name, self._open(paths[0].name, kind)
                case "u":
                    self._change(Named(paths[0].name, None))
                case "r":
                    old, new = (path.name for path in paths)
                    self._change(Named(new, self.names[old], old))
                case _ if number in opened:
                    name, file = opened[number]
                    self._touched = {name}
                    self._use(file, kind, offset, data)

    def _open(self, name: str, kind: str) -> DiskFile:
        file = self.names.get(name)
        if file is None:
            assert kind in "ct", f"{name} was opened, and there is none"
            file = DiskFile()
            self._change(Named(name, file))
        if kind == "t":
            file.pending.append(Change(0, None))
        return file

    def _change(self, named: Named) -> None:
        self._apply(named, self.names)
        self._pending.append(named)

    @staticmethod
    def _apply(named: Named, names: dict[str, DiskFile]) -> None:
        if named.old_name is not None:
            names.pop(named.old_name, None)
        if named.file is None:
            names.pop(named.name, None)
        else:
            names[named.name] = named.file

    def _use(self, file: DiskFile | None, kind: str, offset: int, data: bytes) -> None:
        if kind == "s" and file is None:
            for named in self._pending:
                self._apply(named, self._safe)
            self._pending.clear()
        assert file is not None or kind == "s"
        if file is None:
            return
        match kind:
            case "w":
                file.pending.append(Change(offset, data))
            case "W":  # synced itself, and nothing else of its file
                Change(offset, data).apply(file.safe)
                file.pending.append(Change(offset, data, is_safe=True))
            case "l":
                file.pending.append(Change(offset, None))
            case "s":
                file.sync()

    def check(self, found: Mapping[str, bytes]) -> None:
        """Fails if something was done to the directory that was not recorded."""
        now = {name: bytes(file.now()) for name, file in self.names.items()}
        # What was just created may not be written down yet.
        found = {name: data for name, data in found.items() if data or name in now}
        names = {name for name in now.keys() | found.keys() if now.get(name) != found.get(name)}
        assert names <= self._touched, f"not recorded: what was done to {names - self._touched}"

    @property
    def unsafe_bytes(self) -> int:
        """How much of what was written chance decides about."""
        pending = [change for file in self.names.values() for change in file.pending]
        return sum(len(change.data or b"") for change in pending if not change.is_safe)

    def after_loss(self, random: Random) -> dict[str, bytearray]:
        """What may be left of it."""
        names = dict(self._safe)
        count = len(self._pending)
        for named in self._pending[: random.choice((0, count, random.randint(0, count)))]:
            self._apply(named, names)
        return {name: file.after_loss(random) for name, file in names.items()}


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a node that does not run."""
    if not directory.exists():
        return {}
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def seen(directory: Path, before: Mapping[str, bytes], journal: Path) -> DiskDirectory:
    """What a killed node has done to its directory, of which ``before`` is what its process found."""
    disk = DiskDirectory(before)
    disk.replay(directory, journal)
    disk.check(contents(directory))
    return disk


def fill(directory: Path, files: Mapping[str, bytes | bytearray]) -> None:
    """Make these the files of a directory."""
    directory.mkdir(exist_ok=True)
    for path in directory.iterdir():
        path.unlink()
    for name, data in files.items():
        (directory / name).write_bytes(data)
