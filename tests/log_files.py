"""Logs on disk as the tests want them: small, quick to write, and easy to damage."""

from __future__ import annotations

import os
import sys
from contextlib import closing
from pathlib import Path

import replication_log
from raft_types import Entry, EntryKind, HardState, Identity, encode_entries
from replication_log import Disk, Recovered, ReplicationLog

IDENTITY = Identity(cluster_id="c" * 16, member_id="a" * 16, node_id="node1")
VOTE = HardState(term=1, voted_for=IDENTITY.member_id)


def entry(index: int, term: int = 1, data: bytes | None = None) -> Entry:
    """An entry whose data tells index and term, so that a wrong one is seen."""
    return Entry(index, term, EntryKind.COMMAND, data or b"%d of %d" % (index, term))


def entries(first: int, last: int, term: int = 1) -> list[Entry]:
    return [entry(index, term) for index in range(first, last + 1)]


def open_log(
    directory: Path,
    *,
    fsync: bool = False,
    segment_bytes_max: int = 64 << 20,
    tail_bytes_max: int = 16 << 20,
    disk: Disk | None = None,
) -> closing[ReplicationLog]:
    """Open a log, by default without waiting for the disk; as a founder does if it is new."""
    log = ReplicationLog(
        directory,
        fsync=fsync,
        segment_bytes_max=segment_bytes_max,
        tail_bytes_max=tail_bytes_max,
        disk=disk,
    )
    if log.identity is None:
        log.save_identity(IDENTITY)
    return closing(log)


def recover(directory: Path) -> Recovered:
    with open_log(directory) as log:
        return log.recovered


def write_log(directory: Path, *batches: list[Entry], segment_bytes_max: int = 64 << 20) -> None:
    """Write one record for the vote, and one for each batch."""
    with open_log(directory, segment_bytes_max=segment_bytes_max) as log:
        log.append(VOTE, [])
        for batch in batches:
            log.append(None, batch)


def segments(directory: Path) -> list[Path]:
    return sorted(directory.glob("log-*.seg"))


def record_ends(segment: Path) -> list[int]:
    """The offset at which each record ends, the file header's first."""
    with segment.open("rb") as file:
        found = replication_log._scan(segment, file.fileno(), segment.stat().st_size)
        records = [(offset, offset + size_bytes) for offset, size_bytes, _kind, _data in found]
    return [records[0][0], *(end for _offset, end in records)]


def append_raw(directory: Path, hard_state: HardState | None, batch: list[Entry]) -> int:
    """Write a whole record that ``append`` would refuse to write; where it begins."""
    segment = segments(directory)[-1]
    start = replication_log._record_start(record_ends(segment)[-1])
    with segment.open("r+b") as file:
        file.seek(start)
        file.write(replication_log._encode_record(hard_state, encode_entries(batch)))
    return start


def flip(path: Path, offset: int, pattern: int = 0xFF) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ pattern]))


class WatchedDisk:
    """A disk that keeps the order of calls, and raises what ``fail`` holds for a call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []  # call and file name
        self.fail: dict[str, OSError] = {}
        self.short_bytes = sys.maxsize  # the most that one write takes

    def disk(self) -> Disk:
        return Disk(self._pwrite, self._fdatasync, self._fsync)

    def take(self) -> list[tuple[str, str]]:
        calls, self.calls = self.calls, []
        return calls

    def _note(self, call: str, fd: int) -> None:
        self.calls.append((call, Path(os.readlink(f"/proc/self/fd/{fd}")).name))
        if call in self.fail:
            raise self.fail[call]

    def _pwrite(self, fd: int, data: bytes, offset: int) -> int:
        self._note("pwrite", fd)
        return os.pwrite(fd, data[: self.short_bytes], offset)

    def _fdatasync(self, fd: int) -> None:
        self._note("fdatasync", fd)
        os.fdatasync(fd)

    def _fsync(self, fd: int) -> None:
        self._note("fsync", fd)
        os.fsync(fd)
