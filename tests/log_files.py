"""Logs on disk as the tests want them: small, quick to write, and easy to damage."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import replication_log_format
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
        found = replication_log_format.scan(segment, file.fileno(), segment.stat().st_size)
        records = [(offset, offset + size_bytes) for offset, size_bytes, _kind, _data in found]
    return [records[0][0], *(end for _offset, end in records)]


def append_raw(directory: Path, hard_state: HardState | None, batch: list[Entry]) -> int:
    """Write a whole record that ``append`` would refuse to write; where it begins."""
    segment = segments(directory)[-1]
    start = replication_log_format.record_start(record_ends(segment)[-1])
    with segment.open("r+b") as file:
        file.seek(start)
        file.write(replication_log_format.encode_record(hard_state, encode_entries(batch)))
    return start


def flip(path: Path, offset: int, pattern: int = 0xFF) -> None:
    with path.open("r+b", buffering=0) as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ pattern]))


def path_of(fd: int) -> Path:
    return Path(os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)"))


class WatchedDisk:
    """A disk that keeps the order of calls, and fails on demand: by kind of call, or by number."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str]] = []  # call and file name
        self.fail: dict[str, OSError] = {}
        self.short_bytes = sys.maxsize  # the most that one write takes
        self.calls_max = sys.maxsize  # all further ones fail, and do nothing
        self.room_bytes = sys.maxsize  # what writes may still take, then they fail with the next
        self.no_room = OSError(errno.ENOSPC, "no room")

    def disk(self) -> Disk:
        return Disk(
            self._pwrite,
            self._fdatasync,
            self._fsync,
            self._ftruncate,
            self._rename,
            self._unlink,
        )

    def take(self) -> list[tuple[str, str]]:
        calls, self.calls = self.calls, []
        return calls

    def _note(self, call: str, file: int | Path) -> None:
        name = path_of(file).name if isinstance(file, int) else file.name
        self.calls.append((call, name))
        if call in self.fail:
            raise self.fail[call]
        if len(self.calls) > self.calls_max:
            raise OSError(errno.EIO, "stopped")

    def _pwrite(self, fd: int, data: bytes, offset: int) -> int:
        self._note("pwrite", fd)
        if self.room_bytes == 0:
            raise self.no_room
        count = os.pwrite(fd, data[: min(self.short_bytes, self.room_bytes)], offset)
        self.room_bytes -= count
        return count

    def _fdatasync(self, fd: int) -> None:
        self._note("fdatasync", fd)
        os.fdatasync(fd)

    def _fsync(self, fd: int) -> None:
        self._note("fsync", fd)
        os.fsync(fd)

    def _ftruncate(self, fd: int, length: int) -> None:
        self._note("ftruncate", fd)
        os.ftruncate(fd, length)

    def _rename(self, source: Path, target: Path) -> None:
        self._note("rename", target)
        source.rename(target)

    def _unlink(self, path: Path) -> None:
        self._note("unlink", path)
        path.unlink()


class PowerLossDisk:
    """A disk that knows what would survive a power loss, and can lose the rest."""

    def __init__(self) -> None:
        self._synced: dict[Path, bytes] = {}  # a file's content at its last sync
        self._names: set[Path] = set()  # that are in a synced directory
        self._unlinked: dict[Path, bytes] = {}  # that still are; synced contents
        self.syncs_left = sys.maxsize  # until the power fails, within a sync

    def disk(self) -> Disk:
        return Disk(os.pwrite, self._fdatasync, self._fsync, unlink=self._unlink)

    def _take_sync(self) -> None:
        if self.syncs_left == 0:
            raise OSError(errno.EIO, "power failure")
        self.syncs_left -= 1

    def _fdatasync(self, fd: int) -> None:
        self._take_sync()
        path = path_of(fd)
        self._synced[path] = path.read_bytes()

    def _fsync(self, fd: int) -> None:
        path = path_of(fd)
        if not path.is_dir():
            self._fdatasync(fd)
            return
        self._take_sync()
        self._names = set(segments(path))
        self._unlinked.clear()

    def _unlink(self, path: Path) -> None:
        path.unlink()
        synced = self._synced.pop(path, b"")
        if path in self._names:
            self._unlinked[path] = synced

    def lose_power(self, directory: Path, choose: Callable[[int, int], int]) -> None:
        """Undo what was not synced: sectors, lengths and names, each as ``choose`` says.

        It is asked for a number between two, of which the lower one means that all is lost.
        """
        self.syncs_left = sys.maxsize
        for path, content in self._unlinked.items():
            if not choose(0, 1):
                path.write_bytes(content)
                self._synced[path] = content
        self._unlinked.clear()
        for path in segments(directory):
            if path not in self._names and not choose(0, 1):
                path.unlink()
                self._synced.pop(path, None)
                continue
            synced, written = self._synced.get(path, b""), path.read_bytes()
            if synced == written:
                continue
            survivor = bytearray(synced.ljust(len(written), b"\0"))
            for sector in range(0, len(written), 512):
                if choose(0, 1):
                    survivor[sector : sector + 512] = written[sector : sector + 512]
            lengths = sorted((len(synced), len(written)))
            path.write_bytes(survivor[: choose(lengths[0], lengths[1])])
