"""The replicated log on disk: hard state and entries, in append-only segment files.

Rule 1: ``append`` returns only when its whole batch is on the disk: one write, one fdatasync.
Rule 2: after a failed write or sync nothing is appended any more (raft-traps T6). The kernel may
have marked the pages clean though they never arrived; only a restart finds out what did.
Rule 3: bytes once written stay as they are. An entry whose index is in the log already replaces it
and everything after it, because of two records the later one counts.
Rule 4: an incomplete last record (a torn tail) is cut and kept as a copy. Any other damage stops
the node: to cut it might lose an entry that a majority counts on (raft-traps T8).
Rule 5: behind the last record a file holds nothing but zeros, which are its clean end.

A data directory, and what is in its files (integers big-endian, numbers in names hexadecimal):

    identity.json                       whose directory it is
    lock                                flock'ed by the process that uses it, and holds its pid
    log-<sequence>-<first index>.seg    a segment: file header, record, record, ..., zeros
    log-....seg.torn                    the last torn tail that was cut from this segment
    record                              header (length, kind, two CRC32), payload: one batch;
                                        the header never crosses a sector's border
    payload                             the hard state, if it changed; raft_types.encode_entries

One thread at a time appends, saves the identity or closes: whoever holds the core's Ready. Any
thread reads. Read on in ``raft_node.py`` (who calls this) and docs/adr/0003 (why not a database).
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import struct
import sys
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

from raft_types import (
    ENTRY_OVERHEAD_BYTES,
    Entry,
    EntryKind,
    HardState,
    Identity,
    Membership,
    decode_entries,
    encode_entries,
)

log = logging.getLogger(__name__)

_FORMAT_VERSION = 2  # of identity.json and of segments; 1 was never released
_READ_BYTES = 4 << 20  # a recovery reads a segment in pieces of this size
# A write that reaches beyond the file's zeros brings new ones up to a multiple of this. To sync a
# write over zeros costs the disk alone; one that changes the file's length costs the file system's
# journal as well, which etcd saves in the same way (wal/wal.go, preallocation).
_ZEROS_BYTES = 256 << 10
_SECTOR_BYTES = 512  # what a disk writes whole or not at all

_WHAT_TO_DO = (
    "This node does not start on a damaged log, and nothing in it was changed. While the others "
    "are a majority, start a new node instead: another --node-id and --port, an empty --data-dir. "
    "It copies the data from them. Never delete single files: the node would forget its promises."
)


# ---- Errors: why a data directory cannot be used -----------------------------------------------


class DataDirError(Exception):
    """The data directory cannot be used; the message says why, and what to do."""


class DataDirLockedError(DataDirError):
    """Another process uses the directory."""


class UnknownFormatError(DataDirError):
    """The directory was written by a version of this program with another file format."""

    def __init__(self, path: Path, version: object) -> None:
        super().__init__(
            f"{path} has format version {version}, and this program reads only version "
            f"{_FORMAT_VERSION}. Start the version of the program that wrote it."
        )


class CorruptLogError(DataDirError):
    """A file is damaged or missing, in a way that a crash does not explain."""

    def __init__(self, path: Path, offset: int, reason: str) -> None:
        super().__init__(f"{path} at byte {offset}: {reason}. {_WHAT_TO_DO}")
        self.path = path
        self.offset = offset
        self.reason = reason


class _TornRecordError(Exception):
    """What stands at ``offset`` looks like a record whose write a crash interrupted."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(reason)
        self.offset = offset


# ---- Values ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recovered:
    """What the log held when it was opened."""

    hard_state: HardState
    first_index: int  # 1 if the log is empty
    last_index: int  # 0 if the log is empty
    term_runs: tuple[tuple[int, int], ...]  # (first index, term) of each run of equal terms
    memberships: tuple[tuple[int, Membership], ...]  # every MEMBERSHIP entry, by index
    tail: tuple[Entry, ...]  # the last entries, up to last_index, at most tail_bytes_max of them


@dataclass(frozen=True, slots=True)
class Disk:
    """The calls that change the disk, so that a test can watch them or make them fail."""

    pwrite: Callable[[int, bytes, int], int] = os.pwrite
    fdatasync: Callable[[int], None] = os.fdatasync
    fsync: Callable[[int], None] = os.fsync  # for directories, and for a file that was cut
    # pwrite and fdatasync in one; None: one after the other.
    pwrite_durably: Callable[[int, bytes, int], int] | None = None


def _system_disk() -> Disk:
    if not hasattr(os, "RWF_DSYNC"):
        return Disk()

    # Linux has one call for both. After each of two a thread would queue anew for the
    # interpreter's lock, which under load takes longer than the disk.
    def pwrite_durably(fd: int, data: bytes, offset: int) -> int:
        return os.pwritev(fd, [data], offset, os.RWF_DSYNC)

    return Disk(pwrite_durably=pwrite_durably)


# ---- The format --------------------------------------------------------------------------------

# Magic, format version, sequence, first index, base term, CRC32.
_SEGMENT_HEADER = struct.Struct(">4sIIQQI")
_SEGMENT_HEADER_BYTES = _SEGMENT_HEADER.size
_SEGMENT_MAGIC = b"RLOG"
# The sequence orders the files. The first index, which need not grow from file to file, is the one
# after the last when the segment was created, and the base term is the term of that last one:
# together they show that no segment before it lost its end.
_SEGMENT_NAME = re.compile(r"log-([0-9a-f]{8})-([0-9a-f]{16})\.seg")

_RECORD_HEADER = struct.Struct(">IIII")  # payload length, kind, CRC32 of payload, own CRC32
_RECORD_HEADER_BYTES = _RECORD_HEADER.size
_RECORD_BYTES_MAX = 0x7FFF_F000  # the most that one read or write call of Linux moves
_ENTRIES = 0  # kinds of records
_HARD_STATE_AND_ENTRIES = 1

_HARD_STATE = struct.Struct(">QB")  # term, length of voted_for (0: nobody), which follows


_CRC_BYTES = 4  # of a header, at its end, over what comes before


def _encode_segment_header(sequence: int, first_index: int, base_term: int) -> bytes:
    fields = _SEGMENT_MAGIC, _FORMAT_VERSION, sequence, first_index, base_term
    return _sealed(_SEGMENT_HEADER.pack(*fields, 0)[:-_CRC_BYTES])


def _decode_segment_header(path: Path, data: bytes) -> tuple[int, int, int]:
    """Sequence, first index and base term. ``data`` is the segment's first sector."""
    magic, version = data[:4], int.from_bytes(data[4:8], "big")
    if len(data) < 8 or magic != _SEGMENT_MAGIC:
        raise CorruptLogError(path, 0, "not a segment of the log")
    # The header of another version may be longer or shorter, but its checksum is at its end.
    for end in [_SEGMENT_HEADER_BYTES] if version == _FORMAT_VERSION else range(12, len(data) + 1):
        if data[:end] == _sealed(data[: end - _CRC_BYTES]):
            break
    else:
        raise CorruptLogError(path, 0, "the segment's header has a wrong checksum")
    if version != _FORMAT_VERSION:
        raise UnknownFormatError(path, version)
    _magic, _version, sequence, first_index, base_term, _crc = _SEGMENT_HEADER.unpack_from(data)
    return sequence, first_index, base_term


def _record_start(end: int) -> int:
    """Where the record after one that ends at ``end`` begins: there, or at the next sector.

    Within one sector, its header is on the disk whole or not at all, whenever the power fails.
    """
    left_bytes = -end % _SECTOR_BYTES
    return end + left_bytes if 0 < left_bytes < _RECORD_HEADER_BYTES else end


def _encode_record(hard_state: HardState | None, entries: bytes) -> bytes:
    kind, payload = _ENTRIES, entries
    if hard_state is not None:
        voted_for = (hard_state.voted_for or "").encode()
        kind = _HARD_STATE_AND_ENTRIES
        payload = _HARD_STATE.pack(hard_state.term, len(voted_for)) + voted_for + entries
    header = _RECORD_HEADER.pack(len(payload), kind, crc32(payload), 0)
    return _sealed(header[:-_CRC_BYTES]) + payload


def _sealed(fields: bytes) -> bytes:
    return fields + crc32(fields).to_bytes(_CRC_BYTES, "big")


def _decode_record_header(buffer: bytes, at: int) -> tuple[int, int, int] | None:
    """Payload length, kind and payload CRC32; None if the header's own checksum is wrong."""
    length, kind, payload_crc, header_crc = _RECORD_HEADER.unpack_from(buffer, at)
    if crc32(buffer[at : at + _RECORD_HEADER_BYTES - _CRC_BYTES]) != header_crc:
        return None
    return length, kind, payload_crc


def _decode_payload(kind: int, payload: bytes) -> tuple[HardState | None, list[Entry]]:
    """A record's hard state, if it has one, and its entries. ValueError if it has neither form."""
    if kind == _ENTRIES:
        return None, decode_entries(payload)
    if kind != _HARD_STATE_AND_ENTRIES or len(payload) < _HARD_STATE.size:
        raise ValueError(f"a record of the unknown kind {kind}")
    term, length = _HARD_STATE.unpack_from(payload)
    end = _HARD_STATE.size + length
    voted_for = payload[_HARD_STATE.size : end].decode() or None
    return HardState(term, voted_for), decode_entries(payload, end)


def _data_end(fd: int, size_bytes: int) -> int:
    """The offset behind the file's last byte that is not zero."""
    end = size_bytes
    while end > 0:
        start = max(0, end - _READ_BYTES)
        data = os.pread(fd, end - start, start).rstrip(b"\0")
        if data:
            return start + len(data)
        end = start
    return 0


def _scan(path: Path, fd: int, size_bytes: int) -> Iterator[tuple[int, int, int, bytes]]:
    """Offset, size, kind and payload of each record, until nothing but zeros is left.

    A last record of which not one byte is on the disk cannot be told from one that was never
    written. Raises _TornRecordError where an interrupted write explains what is found, else
    CorruptLogError.
    """
    data_end = _data_end(fd, size_bytes)
    offset, want_bytes = _SEGMENT_HEADER_BYTES, _READ_BYTES
    while offset < data_end:
        buffer = os.pread(fd, want_bytes, offset)
        at, end, want_bytes = 0, 0, _READ_BYTES
        while offset + at < data_end and len(buffer) - at >= _RECORD_HEADER_BYTES:
            header = _decode_record_header(buffer, at)
            if header is None:
                raise _judge_header(path, fd, offset + at, size_bytes)
            length, kind, payload_crc = header
            end = at + _RECORD_HEADER_BYTES + length
            if end > len(buffer):
                break
            payload = buffer[at + _RECORD_HEADER_BYTES : end]
            if crc32(payload) != payload_crc:
                raise _judge_payload(path, offset + at, payload, data_end)
            yield offset + at, end - at, kind, payload
            at = _record_start(offset + end) - offset
        if at == 0:  # not one whole record: it is longer than what was read, or than the file
            if offset + len(buffer) >= size_bytes:
                raise _TornRecordError(offset, "the file ends within a record")
            want_bytes = end
        offset += at


def _judge_header(path: Path, fd: int, offset: int, size_bytes: int) -> Exception:
    """A record header has a wrong checksum: torn only if its sector did not arrive.

    Then zeros are left of it, up to the sector's border. Other sectors of the record may have
    arrived, but nothing was written behind it: one write is under way at a time.
    """
    data = os.pread(fd, size_bytes - offset, offset)
    if not _is_zero(data[: _SECTOR_BYTES - offset % _SECTOR_BYTES]):
        return CorruptLogError(path, offset, "a record's header has a wrong checksum")
    if _holds_a_record(data):
        return CorruptLogError(path, offset, "zeros in place of a record, and others after it")
    return _TornRecordError(offset, "zeros in place of the last record's header")


# What a record's header begins with: a length, not 0, and a kind. Finds all, and little else.
_HEADER_LIKE = re.compile(rb"(?=[\x00-\x7f].{3}\0\0\0[\0\1])(?!\0{4})", re.DOTALL)


def _holds_a_record(data: bytes) -> bool:
    """Whether a whole record, with both its checksums right, begins anywhere."""
    for found in _HEADER_LIKE.finditer(data):
        start = found.start() + _RECORD_HEADER_BYTES
        header = _decode_record_header(data, found.start()) if start <= len(data) else None
        if header is not None:
            length, _kind, payload_crc = header
            payload = data[start : start + length]
            if len(payload) == length and crc32(payload) == payload_crc:
                return True
    return False


def _judge_payload(path: Path, offset: int, payload: bytes, data_end: int) -> Exception:
    """A payload has a wrong checksum: torn only in the last record, with a sector still unwritten.

    The rule is etcd's (wal/decoder.go, isTornEntry). The sector that the header ends in did arrive,
    for the header is whole: only those after it count.
    """
    start = offset + _RECORD_HEADER_BYTES
    if start + len(payload) >= data_end:
        for at in range(-start % _SECTOR_BYTES, len(payload), _SECTOR_BYTES):
            if _is_zero(payload[at : at + _SECTOR_BYTES]):
                return _TornRecordError(offset, "zeros in place of a part of the last record")
    return CorruptLogError(path, offset, "a record has a wrong checksum")


def _is_zero(data: bytes) -> bool:
    return data.count(0) == len(data)


def _encode_identity(fields: dict[str, object]) -> bytes:
    """The identity file: fields and their CRC32, readable for a person."""
    crc = crc32(json.dumps(fields).encode())
    return json.dumps({**fields, "crc32": f"{crc:08x}"}, indent=2).encode() + b"\n"


def _decode_identity(path: Path, data: bytes) -> Identity:
    try:
        fields = json.loads(data)
        fields.pop("crc32")
        # Compared as bytes, so that no change at all, by hand or by a bad disk, goes unseen.
        if data != _encode_identity(fields):
            raise ValueError("its checksum is wrong")
        version = fields.pop("format_version")
        if version != _FORMAT_VERSION:
            raise UnknownFormatError(path, version)
        return Identity(**fields)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptLogError(path, 0, f"not an identity: {error!r}") from error


# ---- The index ---------------------------------------------------------------------------------


class _Run(NamedTuple):
    """Batches that lie in one segment, in file order, to be read at once."""

    sequence: int
    offsets: array[int]
    bounds: array[int]  # by batch: the index at which the next batch takes over
    end: int  # offset at which the last batch ends


class _Index:
    """Where each batch lies: arrays of integers, 24 bytes a batch.

    Invariant: rows are in the order of first indexes and of file positions alike. A row counts up
    to the first index of the next: what its batch holds beyond was replaced.
    """

    def __init__(self) -> None:
        # Guards all fields; for memory work only, never held during disk I/O.
        self._lock = threading.Lock()
        self._firsts = array("Q")
        self._sequences = array("I")
        self._offsets = array("Q")
        self._sizes = array("I")
        self.first = 1
        self.last = 0

    def add(self, first: int, last: int, sequence: int, offset: int, size_bytes: int) -> None:
        """Add the batch that holds ``first`` to ``last``; it replaces what there is from there."""
        with self._lock:
            if first <= self.last:
                keep = bisect_left(self._firsts, first)
                for column in (self._firsts, self._sequences, self._offsets, self._sizes):
                    del column[keep:]
            self._firsts.append(first)
            self._sequences.append(sequence)
            self._offsets.append(offset)
            self._sizes.append(size_bytes)
            self.last = last

    def runs(self, first: int, last: int, bytes_max: int) -> list[_Run]:
        """What to read for ``first`` to ``last``: the first batch, and bytes_max on disk after it.

        Taken in one hold of the lock, for a batch that is added between two looks could replace
        entries of the first look. IndexError if the log does not hold all of them.
        """
        runs = []
        with self._lock:
            if not self.first <= first <= last <= self.last:
                held = f"{self.first} to {self.last}"
                raise IndexError(f"entries {first} to {last} are not in the log, which has {held}")
            row = bisect_right(self._firsts, first) - 1
            stop = bisect_right(self._firsts, last)
            budget_bytes = self._sizes[row] + bytes_max
            while row < stop and budget_bytes > 0:
                offset, sequence = self._offsets[row], self._sequences[row]
                end = bisect_right(self._sequences, sequence, row, stop)
                end = bisect_left(self._offsets, offset + budget_bytes, row + 1, end)
                bounds = self._firsts[row + 1 : end + 1]
                if end == stop:
                    bounds = self._firsts[row + 1 : end]
                    bounds.append(last + 1)
                size_bytes = self._offsets[end - 1] + self._sizes[end - 1] - offset
                runs.append(_Run(sequence, self._offsets[row:end], bounds, offset + size_bytes))
                budget_bytes -= size_bytes
                row = end
        return runs

    def tail_start(self, bytes_max: int) -> int:
        """The first index of the batch with which the last ``bytes_max`` bytes begin."""
        with self._lock:
            row = len(self._sizes)
            while row > 0 and bytes_max > 0:
                row -= 1
                bytes_max -= self._sizes[row]
            return self._firsts[row]


# ---- The log -----------------------------------------------------------------------------------


class ReplicationLog:
    """The durable log of one member; opening it locks the directory and recovers what it holds."""

    def __init__(
        self,
        directory: Path,
        *,
        fsync: bool = True,
        segment_bytes_max: int = 64 << 20,
        tail_bytes_max: int = 16 << 20,
        disk: Disk | None = None,
    ) -> None:
        """Raises DataDirError or OSError. ``fsync=False`` trusts the power supply (``--fsync no``).

        ``segment_bytes_max`` is exceeded only by a single batch that is longer.
        """
        self._directory = directory
        self._segment_bytes_max = segment_bytes_max
        self._disk = disk or _system_disk()
        if not fsync:
            self._disk = Disk(self._disk.pwrite, lambda _fd: None, lambda _fd: None)
        # Set while the disk is being changed, and for good if that raises (Rule 2).
        self._broken = False
        self._segments: dict[int, tuple[Path, int]] = {}  # path and fd, by sequence
        # In the last segment, to which records are appended. Invariant: from where they end, the
        # file holds zeros up to its own end.
        self._records_end = 0
        self._zeros_end = 0
        self._index = _Index()
        self._hard_state = HardState(0, None)
        self._term_runs: list[tuple[int, int]] = []  # see Recovered
        self.identity: Identity | None = None

        self._make_directory(directory)
        self._lock_fd = self._lock_directory()
        try:
            self.recovered = self._recover(tail_bytes_max)
        except BaseException:
            self.close()
            raise

    # ---- One thread at a time ----

    def append(self, hard_state: HardState | None, entries: Sequence[Entry]) -> None:
        """Make a new hard state (None: unchanged) and entries durable, with one write and one sync.

        The entries' indexes are consecutive and leave no gap after the log's last. Any OSError is
        fatal to the process: what it left on the disk is known only after a restart.
        """
        if hard_state is None and not entries:
            return
        assert self.identity is not None, "a log belongs to a member before it says anything"
        flaw = self._flaw(hard_state or self._hard_state, entries)
        assert flaw is None, flaw
        data = encode_entries(entries)

        self._begin_change()
        if self._records_end > _SEGMENT_HEADER_BYTES:
            size_bytes = _record_start(self._records_end) + _RECORD_HEADER_BYTES + len(data)
            if size_bytes > self._segment_bytes_max:
                self._create_segment(len(self._segments) + 1)
        if self._records_end == _SEGMENT_HEADER_BYTES and hard_state is None:
            # A segment never needs those before it to know the hard state.
            hard_state = self._hard_state
        record = _encode_record(hard_state, data)
        # One record for all, however large: of several, a crash could leave the later ones whole
        # and an earlier one not, which is how corruption looks.
        assert len(record) <= _RECORD_BYTES_MAX, f"a batch of {len(record)} bytes"
        sequence, offset = len(self._segments), _record_start(self._records_end)
        _path, fd = self._segments[sequence]
        end = offset + len(record)
        zeros_end = self._zeros_end
        if end > zeros_end:
            zeros_end = max(end, min(end + -end % _ZEROS_BYTES, self._segment_bytes_max))
            record += bytes(zeros_end - end)
        if self._disk.pwrite_durably is None:
            self._write(fd, record, offset, self._disk.pwrite)
            self._disk.fdatasync(fd)
        else:
            self._write(fd, record, offset, self._disk.pwrite_durably)
        self._broken = False

        self._records_end, self._zeros_end = end, zeros_end
        self._take(hard_state or self._hard_state, entries, sequence, offset, end - offset)

    def save_identity(self, identity: Identity) -> None:
        """Make the identity durable: the old one or the new one is found after a crash."""
        known = self.identity
        assert known is None or known.member_id == identity.member_id, "a directory has one member"
        path = self._directory / "identity.json"
        temporary = path.with_suffix(".json.tmp")
        data = _encode_identity({"format_version": _FORMAT_VERSION, **identity._asdict()})

        self._begin_change()
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            self._write(fd, data, 0, self._disk.pwrite)
            self._disk.fdatasync(fd)
        finally:
            os.close(fd)
        temporary.rename(path)
        self._sync_directory(self._directory)
        self._broken = False
        self.identity = identity

    def close(self) -> None:
        """Release files and lock, after the last reader is done. Nothing is left to be flushed."""
        self._broken = True
        for _path, fd in self._segments.values():
            os.close(fd)
        self._segments.clear()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    # ---- Any thread ----

    def read(self, first: int, last: int, bytes_max: int) -> list[Entry]:
        """Entries from ``first``, at least one, at most ``last``, and no more than ``bytes_max``.

        Fewer may come; that is no sign of the end. Raises IndexError if the log does not hold all
        of ``first`` to ``last``, CorruptLogError if the disk gives back something else.
        """
        entries: list[Entry] = []
        for run in self._index.runs(first, last, bytes_max):
            path, fd = self._segments[run.sequence]
            base = run.offsets[0]
            buffer = os.pread(fd, run.end - base, base)
            for offset, bound in zip(run.offsets, run.bounds, strict=True):
                batch = self._decode_batch(path, buffer, base, offset)
                entries += batch[: bound - batch[0].index]
        entries = entries[first - entries[0].index :]
        assert entries[0].index == first
        assert entries[-1].index == first + len(entries) - 1

        total_bytes = 0
        for count, entry in enumerate(entries):
            total_bytes += ENTRY_OVERHEAD_BYTES + len(entry.data)
            if total_bytes > bytes_max and count > 0:
                return entries[:count]
        return entries

    def bytes_free(self) -> int:
        """How many bytes the directory's file system has left for this process."""
        status = os.statvfs(self._directory)
        return status.f_bavail * status.f_frsize

    # ---- Caller is the owner: what a batch may be, and what it changes ----

    def _flaw(self, hard_state: HardState, entries: Sequence[Entry]) -> str | None:
        """What forbids this batch to be the next; None if nothing does."""
        if hard_state is not self._hard_state:
            term, voted_for = self._hard_state
            if hard_state.term < term:
                return f"the hard state's term falls from {term} to {hard_state.term}"
            if hard_state.term == term and voted_for not in (None, hard_state.voted_for):
                return f"a second vote in term {term}"
        if not entries:
            return None
        index = entries[0].index
        if not self._index.first <= index <= self._index.last + 1:
            return f"entry {index} cannot follow a log that ends at {self._index.last}"
        term = self._term_at(index - 1)
        for expected, entry in enumerate(entries, index):
            if entry.index != expected:
                return f"entry {entry.index} stands where {expected} belongs"
            if entry.term < term:
                return f"entry {entry.index} of term {entry.term} follows one of term {term}"
            term = entry.term
        if term > hard_state.term:
            return f"an entry of term {term} under a hard state of term {hard_state.term}"
        return None

    def _term_at(self, index: int) -> int:
        """The term of an entry in the log; 0 before the first."""
        for first, term in reversed(self._term_runs):
            if first <= index:
                return term
        return 0

    def _take(
        self,
        hard_state: HardState,
        entries: Sequence[Entry],
        sequence: int,
        offset: int,
        size_bytes: int,
    ) -> None:
        """Count a batch in that is on the disk."""
        self._hard_state = hard_state
        if not entries:
            return
        runs = self._term_runs
        while runs and runs[-1][0] >= entries[0].index:
            runs.pop()
        for entry in entries:
            if not runs or entry.term != runs[-1][1]:
                runs.append((entry.index, entry.term))
        self._index.add(entries[0].index, entries[-1].index, sequence, offset, size_bytes)

    @staticmethod
    def _decode_batch(path: Path, buffer: bytes, base: int, offset: int) -> list[Entry]:
        """The entries of the record at ``offset``; ``buffer`` holds the file from ``base``."""
        at = offset - base
        try:
            header = _decode_record_header(buffer, at)
            if header is None:
                raise ValueError("a record's header has a wrong checksum")
            length, kind, payload_crc = header
            payload = buffer[at + _RECORD_HEADER_BYTES : at + _RECORD_HEADER_BYTES + length]
            if crc32(payload) != payload_crc:
                raise ValueError("a record has a wrong checksum")
            return _decode_payload(kind, payload)[1]
        except (ValueError, struct.error) as error:
            raise CorruptLogError(path, offset, str(error)) from error

    # ---- Caller is the owner: changing the disk ----

    def _begin_change(self) -> None:
        """Refuse to change the disk after a failure; else regard it as failed until it is done."""
        if self._broken:
            raise OSError(errno.EIO, "an earlier write to the log failed: restart the node")
        self._broken = True

    def _write(
        self, fd: int, data: bytes, offset: int, pwrite: Callable[[int, bytes, int], int]
    ) -> None:
        written = pwrite(fd, data, offset)
        while written < len(data):  # a short write: the disk may be full, the next one will tell
            written += pwrite(fd, data[written:], offset + written)

    def _create_segment(self, sequence: int) -> None:
        """Begin a new last segment, durable under its name before any record is in it."""
        first = self._index.last + 1
        path = self._directory / f"log-{sequence:08x}-{first:016x}.seg"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        # A reader may look at the same time: assigning to a dict is atomic.
        self._segments[sequence] = path, fd
        header = _encode_segment_header(sequence, first, self._term_at(first - 1))
        self._write(fd, header, 0, self._disk.pwrite)
        self._disk.fdatasync(fd)
        self._sync_directory(self._directory)
        self._records_end = self._zeros_end = _SEGMENT_HEADER_BYTES

    def _sync_directory(self, directory: Path) -> None:
        """Make names durable that were created, renamed or removed (raft-traps T7)."""
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            self._disk.fsync(fd)
        finally:
            os.close(fd)

    def _make_directory(self, directory: Path) -> None:
        if not directory.is_dir():
            self._make_directory(directory.parent)
            directory.mkdir(exist_ok=True)
            self._sync_directory(directory.parent)

    def _lock_directory(self) -> int:
        """Take the lock, which the kernel gives back when this process ends, however it ends."""
        fd = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(fd, 0)
            os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError as error:
            pid = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise DataDirLockedError(
                f"{self._directory} is used by another process (pid {pid}). Stop it first, or give "
                "this node a data directory of its own."
            ) from error
        return fd

    # ---- Opening ----

    def _recover(self, tail_bytes_max: int) -> Recovered:
        """Read everything, check everything, and leave the last segment ready for more."""
        self._load_identity()
        paths = self._segment_paths()
        memberships: list[tuple[int, Membership]] = []
        for sequence, path in enumerate(paths, 1):
            is_last = sequence == len(paths)
            fd = os.open(path, os.O_RDWR)
            self._segments[sequence] = path, fd
            if self._open_segment(sequence, is_last):
                self._replay(sequence, is_last, memberships)
        if not self._segments:
            # Created before the identity is saved: an identity without a log is a log that is lost.
            self._create_segment(1)
        self._sync_directory(self._directory)  # a crash may have come just before the last sync
        return Recovered(
            self._hard_state,
            self._index.first,
            self._index.last,
            tuple(self._term_runs),
            tuple(memberships),
            self._read_tail(tail_bytes_max),
        )

    def _load_identity(self) -> None:
        path = self._directory / "identity.json"
        try:
            self.identity = _decode_identity(path, path.read_bytes())
        except FileNotFoundError:
            self.identity = None

    def _segment_paths(self) -> list[Path]:
        """The segments in their order. Raises CorruptLogError if one is missing."""
        paths = sorted(self._directory.glob("log-*.seg"))
        for sequence, path in enumerate(paths, 1):
            if not path.name.startswith(f"log-{sequence:08x}-"):
                raise CorruptLogError(path, 0, f"the segment of sequence {sequence} is missing")
        if self.identity is not None and not paths:
            raise CorruptLogError(self._directory, 0, "the log of this member is missing")
        return paths

    def _open_segment(self, sequence: int, is_last: bool) -> bool:
        """Check a segment's header. False: a crash cut its creation short, and it was removed."""
        path, fd = self._segments[sequence]
        data = os.pread(fd, _SECTOR_BYTES, 0)
        # The first one was durable before the identity was: then it cannot have been cut short.
        may_be_torn = is_last and (sequence > 1 or self.identity is None)
        if may_be_torn and (
            len(data) < _SEGMENT_HEADER_BYTES
            or (len(data) == _SEGMENT_HEADER_BYTES and _is_zero(data))
        ):
            log.warning("removed a segment whose creation was cut short path=%s", path)
            os.close(fd)
            del self._segments[sequence]
            path.unlink()
            return False
        number, first, base_term = _decode_segment_header(path, data)
        named = _SEGMENT_NAME.fullmatch(path.name)
        if named is None or (number, first) != tuple(int(group, 16) for group in named.groups()):
            raise CorruptLogError(path, 0, "the segment has another's name")
        if first != self._index.last + 1:
            reason = f"it continues at entry {first} a log that ends at {self._index.last}"
            raise CorruptLogError(path, 0, reason)
        if base_term != self._term_at(first - 1):
            reason = f"it continues after term {base_term} a log that ends in another"
            raise CorruptLogError(path, 0, reason)
        return True

    def _replay(
        self, sequence: int, is_last: bool, memberships: list[tuple[int, Membership]]
    ) -> None:
        """Count in what a segment holds, cut a torn tail off the last one, and sync it."""
        path, fd = self._segments[sequence]
        size_bytes = os.fstat(fd).st_size
        offset, end = 0, _SEGMENT_HEADER_BYTES
        try:
            for offset, record_bytes, kind, payload in _scan(path, fd, size_bytes):
                self._replay_record(sequence, offset, kind, payload, memberships)
                end = offset + record_bytes
        except _TornRecordError as torn:
            if not is_last:
                raise CorruptLogError(path, torn.offset, str(torn)) from torn
            self._cut_torn_tail(path, fd, torn.offset)
        self._records_end, self._zeros_end = end, os.fstat(fd).st_size
        if is_last:
            # A sync that failed before the restart may have left the last record marked clean in
            # the page cache and nowhere else. Written again, it is what the next sync writes
            # (Rebello et al., "Can Applications Recover from fsync Failures?", ATC 2020).
            self._write(fd, os.pread(fd, end - offset, offset), offset, self._disk.pwrite)
        # What a killed process wrote is on the disk only now; others are told of it from here on.
        self._disk.fdatasync(fd)

    def _replay_record(
        self,
        sequence: int,
        offset: int,
        kind: int,
        payload: bytes,
        memberships: list[tuple[int, Membership]],
    ) -> None:
        path, _fd = self._segments[sequence]
        try:
            hard_state, entries = _decode_payload(kind, payload)
            hard_state = hard_state or self._hard_state
            flaw = self._flaw(hard_state, entries)
            if flaw is not None:
                raise ValueError(flaw)
            if entries:
                while memberships and memberships[-1][0] >= entries[0].index:
                    memberships.pop()
            memberships += [
                (entry.index, Membership.decode(entry.data))
                for entry in entries
                if entry.kind is EntryKind.MEMBERSHIP
            ]
        except ValueError as error:
            raise CorruptLogError(path, offset, str(error)) from error
        if self.identity is None:
            raise CorruptLogError(self._directory / "identity.json", 0, "the identity is missing")
        self._take(hard_state, entries, sequence, offset, _RECORD_HEADER_BYTES + len(payload))

    def _cut_torn_tail(self, path: Path, fd: int, offset: int) -> None:
        """Cut the last segment at ``offset``, once a copy of what is cut is safe.

        The cut is durable before anything is appended: a later record that is shorter would leave
        the rest of the torn one behind itself.
        """
        torn = os.pread(fd, os.fstat(fd).st_size - offset, offset).rstrip(b"\0")
        copy = path.with_suffix(".seg.torn")
        log.warning(
            "cut a torn tail path=%s offset=%d bytes=%d copy=%s", path, offset, len(torn), copy
        )
        with copy.open("wb") as file:
            file.write(torn)
            file.flush()
            self._disk.fdatasync(file.fileno())
        self._sync_directory(self._directory)
        os.ftruncate(fd, offset)
        self._disk.fsync(fd)

    def _read_tail(self, bytes_max: int) -> tuple[Entry, ...]:
        """The last entries, at most ``bytes_max`` of them."""
        if self._index.last == 0 or bytes_max == 0:
            return ()
        start = self._index.tail_start(bytes_max)
        entries = self.read(start, self._index.last, sys.maxsize)
        total_bytes = 0
        for count, entry in enumerate(reversed(entries)):
            total_bytes += ENTRY_OVERHEAD_BYTES + len(entry.data)
            if total_bytes > bytes_max:
                return tuple(entries[len(entries) - count :])
        return tuple(entries)
