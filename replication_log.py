"""The replicated log on disk: hard state and entries, in append-only segment files.

Rule 1: ``append`` returns only when its whole batch is on the disk: one write, one fdatasync.
Rule 2: after a failed write or sync nothing is appended any more (raft-traps T6). The kernel may
have marked the pages clean though they never arrived; only a restart finds out what did.
Rule 3: bytes once written stay as they are. An entry whose index is in the log already replaces it
and everything after it, because of two records the later one counts.
Rule 4: an incomplete last record (a torn tail) is cut and kept as a copy. Any other damage stops
the node: to cut it might lose an entry that a majority counts on (raft-traps T8).
Rule 5: behind the last record a file holds nothing but zeros, which are its clean end.
Rule 6: entries leave the log at its front in whole segments, the oldest first (``drop_before``), or
all at once (``reset``). Whatever files a crash leaves of that are a log that begins somewhere.

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
import logging
import os
import struct
import sys
import threading
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
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
    encode_entries,
)
from replication_log_format import (
    DISK_FAULTS,
    FORMAT_VERSION,
    RECORD_BYTES_MAX,
    RECORD_HEADER_BYTES,
    SECTOR_BYTES,
    SEGMENT_HEADER_BYTES,
    CorruptLogError,
    DataDirLockedError,
    DiskRefusesError,
    SegmentHeader,
    TornRecordError,
    decode_identity,
    decode_payload,
    decode_record_header,
    decode_segment_header,
    encode_identity,
    encode_record,
    encode_segment_header,
    is_cut_short,
    record_start,
    scan,
)

log = logging.getLogger(__name__)

# A write that reaches beyond the file's zeros brings new ones up to a multiple of this. To sync a
# write over zeros costs the disk alone; one that changes the file's length costs the file system's
# journal as well, which etcd saves in the same way (wal/wal.go, preallocation).
_ZEROS_BYTES = 256 << 10
_TURN_BYTES_MAX = 4 << 20

# ---- Values ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Recovered:
    """What the log held when it was opened."""

    hard_state: HardState
    first_index: int
    base_term: int  # of the entry before first_index; 0 if there never was one
    last_index: int  # first_index - 1 if the log is empty
    term_runs: tuple[tuple[int, int], ...]  # (first index, term) of each run of equal terms
    memberships: tuple[tuple[int, Membership], ...]  # every MEMBERSHIP entry in it, by index
    tail: tuple[Entry, ...]  # the last entries, up to last_index, at most tail_bytes_max of them


@dataclass(frozen=True, slots=True)
class Disk:
    """The calls that change the disk, so that a test can watch them or make them fail."""

    pwrite: Callable[[int, bytes, int], int] = os.pwrite
    fdatasync: Callable[[int], None] = os.fdatasync
    fsync: Callable[[int], None] = os.fsync  # for directories, and for a file that was cut
    ftruncate: Callable[[int, int], None] = os.ftruncate
    rename: Callable[[Path, Path], None] = os.rename
    unlink: Callable[[Path], None] = os.unlink
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


@contextmanager
def _refusal_told() -> Iterator[None]:
    """Makes a DiskRefusesError of what a disk may answer that has no room."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FAULTS:
            raise DiskRefusesError(error.errno, error.strerror) from error
        raise


def _copy_of_torn(path: Path) -> Path:
    """Where what is cut from a segment is kept."""
    return path.with_suffix(".seg.torn")


# ---- The index ---------------------------------------------------------------------------------


class _Segment:
    """An open file of the log. The last who holds on to it closes it: a drop waits for no reader."""

    def __init__(self, path: Path, fd: int, first_index: int) -> None:
        self.path = path
        self.fd = fd
        self.first_index = first_index
        # Where the last record ends. Invariant: from there the file holds zeros, to its own end, unless
        # the disk has just refused a write and took a part of it.
        self.records_end = SEGMENT_HEADER_BYTES
        self.was_refused = False
        self.size_bytes = SEGMENT_HEADER_BYTES  # the file's length

    def __del__(self) -> None:
        os.close(self.fd)


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

    def reset(self, first: int) -> None:
        """Forget all batches; the next one begins at ``first``."""
        with self._lock:
            for column in (self._firsts, self._sequences, self._offsets, self._sizes):
                del column[:]
            self.first, self.last = first, first - 1

    def drop_before(self, index: int, last_sequence: int) -> int:
        """Forget the segments that hold only entries before ``index``, but not the last segment.

        Returns the sequence of the first that is left.
        """
        with self._lock:
            if index > self.last or not self._firsts:
                sequence = last_sequence
            else:
                sequence = self._sequences[max(0, bisect_right(self._firsts, index) - 1)]
            keep = bisect_left(self._sequences, sequence)
            for column in (self._firsts, self._sequences, self._offsets, self._sizes):
                del column[:keep]
            self.first = self._firsts[0] if self._firsts else self.last + 1
            return sequence

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
            return self._firsts[row] if self._firsts else self.last + 1


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
            self._disk = replace(
                self._disk,
                fdatasync=lambda _fd: None,
                fsync=lambda _fd: None,
                pwrite_durably=None,
            )
        # Set while the disk is being changed, and for good if that raises (Rule 2).
        self._broken = False
        # By sequence, in their order. Any thread may look; records are appended to the last.
        self._segments: dict[int, _Segment] = {}
        self._last_sequence = 0
        self._index = _Index()
        self._hard_state = HardState(0, None)
        self._base_term = 0  # this and the next: see Recovered
        self._term_runs: list[tuple[int, int]] = []
        self.identity: Identity | None = None

        self._make_directory(directory)
        self._lock_fd = self._lock_directory()
        try:
            self.recovered = self._recover(tail_bytes_max)
        except BaseException:
            self.close()
            raise

    # ---- One thread at a time ----

    @property
    def hard_state(self) -> HardState:
        """The one on the disk."""
        return self._hard_state

    def append(self, hard_state: HardState | None, entries: Sequence[Entry]) -> None:
        """Make a new hard state (None: unchanged) and entries durable, with one write and one sync.

        (Much is written in several turns: a reader takes in whole records, however few entries it
        wants.) The entries' indexes are consecutive and leave no gap after the log's last.

        Raises DiskRefusesError: the same may be appended again, and is then written anew from its
        beginning. Any other OSError is fatal to the process: what it left on the disk is known only
        after a restart.
        """
        if hard_state is None and not entries:
            return
        assert self.identity is not None, "a log belongs to a member before it says anything"
        flaw = self._flaw(hard_state or self._hard_state, entries)
        assert flaw is None, flaw
        begin = size_bytes = 0
        try:
            self._cut_refused()
            for end, entry in enumerate(entries):
                entry_bytes = ENTRY_OVERHEAD_BYTES + len(entry.data)
                size_bytes += entry_bytes
                if size_bytes > _TURN_BYTES_MAX and end > begin:
                    self._append_record(hard_state, entries[begin:end])
                    hard_state, begin, size_bytes = None, end, entry_bytes
            self._append_record(hard_state, entries[begin:])
        except DiskRefusesError:
            self._broken = False
            self._last_segment.was_refused = True
            raise

    def _cut_refused(self) -> None:
        """Remove what a refused write left behind the last record.

        What is tried again begins further back, may be shorter, and may go to another segment: then
        the rest would stay, and look like damage after a restart.
        """
        last = self._last_segment
        if not last.was_refused:
            return
        self._begin_change()
        with _refusal_told():
            self._disk.ftruncate(last.fd, last.records_end)
            self._disk.fsync(last.fd)
        last.size_bytes = last.records_end
        last.was_refused = self._broken = False

    def _append_record(self, hard_state: HardState | None, entries: Sequence[Entry]) -> None:
        data = encode_entries(entries)
        self._begin_change()
        first = entries[0].index if entries else self._index.last + 1
        last = self._last_segment
        size_bytes = record_start(last.records_end) + RECORD_HEADER_BYTES + len(data)
        is_full = last.records_end > SEGMENT_HEADER_BYTES and size_bytes > self._segment_bytes_max
        # Of an empty one too: its first record may have been refused, and what is tried again begins
        # further back.
        if first < last.first_index or is_full:
            last = self._create_segment(first, self.term_at(first - 1))
        record = encode_record(hard_state, data)
        # One record: of several in one write, a crash could leave the later ones whole and an
        # earlier one not, which is how corruption looks.
        assert len(record) <= RECORD_BYTES_MAX, f"a batch of {len(record)} bytes"
        offset = record_start(last.records_end)
        end, size_bytes = offset + len(record), last.size_bytes
        if end > size_bytes:
            size_bytes = max(end, min(end + -end % _ZEROS_BYTES, self._segment_bytes_max))
            record += bytes(size_bytes - end)
        self._write_durably(last.fd, record, offset)
        self._broken = False

        last.records_end, last.size_bytes = end, size_bytes
        self._take(hard_state or self._hard_state, entries, offset, end - offset)

    def drop_before(self, index: int) -> int:
        """Remove the segments that hold only entries before ``index``; the first index that is left.

        The last segment stays. What the entries did has to be durable elsewhere by now.
        """
        self._begin_change()
        # Before the files go: a reader gets IndexError from now on.
        sequence = self._index.drop_before(index, self._last_sequence)
        first = self._index.first
        self._base_term = self.term_at(first - 1)
        ends = [start for start, _term in self._term_runs[1:]] + [self._index.last + 1]
        self._term_runs = [
            (max(start, first), term)
            for (start, term), end in zip(self._term_runs, ends, strict=False)
            if end > first
        ]
        dropped = [number for number in self._segments if number < sequence]
        self._remove([self._segments.pop(number).path for number in dropped])
        self._broken = False
        return first

    def reset(self, index: int, term: int) -> None:
        """Drop all entries and go on after ``index``, an entry of ``term`` in a state kept elsewhere.

        A crash leaves the old log or the new one; the hard state is the same in both. Raises
        DiskRefusesError: nothing is changed, and it may be tried again.
        """
        assert self.identity is not None, "a log belongs to a member before it says anything"
        assert 0 <= term <= self._hard_state.term
        self._begin_change()
        older = list(self._segments)
        try:
            self._create_segment(index + 1, term, begins_anew=True)
        except DiskRefusesError:
            self._broken = False
            raise
        self._begin(index + 1, term)
        # The new one is durable, and hides the others even if some of them stay.
        self._remove([self._segments.pop(number).path for number in older])
        self._broken = False

    def save_identity(self, identity: Identity) -> None:
        """Make the identity durable: the old one or the new one is found after a crash."""
        known = self.identity
        assert known is None or known.member_id == identity.member_id, "a directory has one member"
        path = self._directory / "identity.json"
        temporary = path.with_suffix(".json.tmp")
        data = encode_identity({"format_version": FORMAT_VERSION, **identity._asdict()})

        self._begin_change()
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            self._write(fd, data, 0, self._disk.pwrite)
            self._disk.fdatasync(fd)
        finally:
            os.close(fd)
        self._disk.rename(temporary, path)
        self._sync_directory(self._directory)
        self._broken = False
        self.identity = identity

    def close(self) -> None:
        """Release files and lock, after the last reader is done. Nothing is left to be flushed."""
        self._broken = True
        self._segments.clear()
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    # ---- Any thread ----

    def read(self, first: int, last: int, bytes_max: int) -> list[Entry]:
        """Entries from ``first``, at least one, at most ``last``, and no more than ``bytes_max``.

        Fewer may come; that is no sign of the end. Raises IndexError if the log does not hold all
        of ``first`` to ``last`` (or no longer: they were dropped meanwhile), CorruptLogError if the
        disk gives back something else.
        """
        entries: list[Entry] = []
        for run in self._index.runs(first, last, bytes_max):
            segment = self._segments.get(run.sequence)
            if segment is None:
                raise IndexError(f"entries {first} to {last} were dropped from the log")
            base = run.offsets[0]
            buffer = os.pread(segment.fd, run.end - base, base)
            for offset, bound in zip(run.offsets, run.bounds, strict=True):
                batch = self._decode_batch(segment.path, buffer, base, offset)
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

    @property
    def first_index(self) -> int:
        """The first entry that the log holds; last_index + 1 if it is empty."""
        return self._index.first

    @property
    def last_index(self) -> int:
        return self._index.last

    @property
    def size_bytes(self) -> int:
        """What the log takes on the disk."""
        return sum(segment.size_bytes for segment in list(self._segments.values()))

    def tail_start(self, bytes_max: int) -> int:
        """Where about the last ``bytes_max`` bytes of the log begin; last_index + 1 if it is empty."""
        return self._index.tail_start(bytes_max)

    def bytes_free(self) -> int:
        """How many bytes the directory's file system has left for this process."""
        status = os.statvfs(self._directory)
        return status.f_bavail * status.f_frsize

    # ---- Caller is the owner: what a batch may be, and what it changes ----

    @property
    def _last_segment(self) -> _Segment:
        return self._segments[self._last_sequence]

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
        term = self.term_at(index - 1)
        for expected, entry in enumerate(entries, index):
            if entry.index != expected:
                return f"entry {entry.index} stands where {expected} belongs"
            if entry.term < term:
                return f"entry {entry.index} of term {entry.term} follows one of term {term}"
            term = entry.term
        if term > hard_state.term:
            return f"an entry of term {term} under a hard state of term {hard_state.term}"
        return None

    def term_at(self, index: int) -> int:
        """The term of an entry in the log, or of the one before the first."""
        for first, term in reversed(self._term_runs):
            if first <= index:
                return term
        return self._base_term

    def _begin(self, first: int, base_term: int) -> None:
        """Hold nothing, and expect the entry ``first`` next."""
        self._index.reset(first)
        self._term_runs.clear()
        self._base_term = base_term

    def _take(
        self, hard_state: HardState, entries: Sequence[Entry], offset: int, size_bytes: int
    ) -> None:
        """Count a batch in that is on the disk, in the last segment."""
        self._hard_state = hard_state
        if not entries:
            return
        runs = self._term_runs
        while runs and runs[-1][0] >= entries[0].index:
            runs.pop()
        for entry in entries:
            if not runs or entry.term != runs[-1][1]:
                runs.append((entry.index, entry.term))
        first, last = entries[0].index, entries[-1].index
        self._index.add(first, last, self._last_sequence, offset, size_bytes)

    @staticmethod
    def _decode_batch(path: Path, buffer: bytes, base: int, offset: int) -> list[Entry]:
        """The entries of the record at ``offset``; ``buffer`` holds the file from ``base``."""
        at = offset - base
        try:
            header = decode_record_header(buffer, at)
            if header is None:
                raise ValueError("a record's header has a wrong checksum")
            length, kind, payload_crc = header
            payload = buffer[at + RECORD_HEADER_BYTES : at + RECORD_HEADER_BYTES + length]
            if crc32(payload) != payload_crc:
                raise ValueError("a record has a wrong checksum")
            return decode_payload(kind, payload)[1]
        except (ValueError, struct.error) as error:
            raise CorruptLogError(path, offset, str(error)) from error

    # ---- Caller is the owner: changing the disk ----

    def _begin_change(self) -> None:
        """Refuse to change the disk after a failure; else regard it as failed until it is done."""
        if self._broken:
            raise OSError(errno.EIO, "an earlier write to the log failed: restart the node")
        self._broken = True

    def _write_durably(self, fd: int, data: bytes, offset: int) -> None:
        if self._disk.pwrite_durably is not None:
            # Whether it is the write that fails or the sync, this call can't tell. After a sync that
            # fails all has to be written again anyhow, which shows which of them it is.
            with suppress(DiskRefusesError):
                self._write(fd, data, offset, self._disk.pwrite_durably)
                return
        self._write(fd, data, offset, self._disk.pwrite)
        self._disk.fdatasync(fd)

    def _write(
        self, fd: int, data: bytes, offset: int, pwrite: Callable[[int, bytes, int], int]
    ) -> None:
        with _refusal_told():
            written = pwrite(fd, data, offset)
            while written < len(
                data
            ):  # a short write: the disk may be full, the next one will tell
                written += pwrite(fd, data[written:], offset + written)

    def _create_segment(self, first: int, base_term: int, *, begins_anew: bool = False) -> _Segment:
        """Begin a new last segment, durable under its name before any record is in it."""
        sequence = self._last_sequence + 1
        header = SegmentHeader(sequence, begins_anew, first, base_term, self._hard_state)
        path = self._directory / f"log-{sequence:08x}-{first:016x}.seg"
        with _refusal_told():
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        segment = _Segment(path, fd, first)
        try:
            # No zeros behind it yet: a longer file was in use, whatever it holds (see is_cut_short).
            self._write(fd, encode_segment_header(header), 0, self._disk.pwrite)
        except DiskRefusesError:
            self._disk.unlink(path)  # who tries again must not meet it
            raise
        self._disk.fdatasync(fd)
        self._sync_directory(self._directory)
        self._segments[sequence] = segment
        self._last_sequence = sequence
        return segment

    def _remove(self, paths: Sequence[Path]) -> None:
        """Remove segments, oldest first, each for good before the next: no gap is ever left."""
        for path in paths:
            copy = _copy_of_torn(path)
            if copy.exists():
                self._disk.unlink(copy)
            self._disk.unlink(path)
            self._sync_directory(self._directory)

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
        headers, hidden = self._open_segments()
        memberships: list[tuple[int, Membership]] = []
        for header in headers:
            self._enter_segment(header)
            self._replay(header is headers[-1], memberships)
        if not headers:
            # Created before the identity is saved: an identity without a log is a log that is lost.
            self._create_segment(1, base_term=0)
        elif len(headers) > 1 and self._last_segment.records_end == SEGMENT_HEADER_BYTES:
            # A crash came between its creation and its first record. To use it might be wrong: if
            # it was to hold a replacement, it begins further back than the next record does.
            self._disk.unlink(self._segments.pop(self._last_sequence).path)
            self._last_sequence -= 1
        self._sync_directory(self._directory)  # a crash may have come just before the last sync
        self._remove(hidden)
        return Recovered(
            self._hard_state,
            self._index.first,
            self._base_term,
            self._index.last,
            tuple(self._term_runs),
            tuple(memberships),
            self._read_tail(tail_bytes_max),
        )

    def _load_identity(self) -> None:
        path = self._directory / "identity.json"
        try:
            self.identity = decode_identity(path, path.read_bytes())
        except FileNotFoundError:
            self.identity = None

    def _open_segments(self) -> tuple[list[SegmentHeader], list[Path]]:
        """Open the segments that count; their headers, and the older ones that a reset hid."""
        paths = sorted(self._directory.glob("log-*.seg"))
        if self.identity is not None and not paths:
            raise CorruptLogError(self._directory, 0, "the log of this member is missing")
        # The first one was durable before the identity was: then it cannot have been cut short.
        if (len(paths) > 1 or (paths and self.identity is None)) and is_cut_short(paths[-1]):
            log.warning("removed a segment whose creation was cut short path=%s", paths[-1])
            self._disk.unlink(paths.pop())

        headers: list[SegmentHeader] = []
        while paths and not (headers and headers[0].begins_anew):
            path = paths.pop()
            with path.open("rb") as file:
                header = decode_segment_header(path, file.read(SECTOR_BYTES))
            if headers and header.sequence != headers[0].sequence - 1:
                reason = f"the segment of sequence {headers[0].sequence - 1} is missing"
                raise CorruptLogError(path, 0, reason)
            headers.insert(0, header)
            fd = os.open(path, os.O_RDWR)
            self._segments[header.sequence] = _Segment(path, fd, header.first_index)
        self._segments = dict(sorted(self._segments.items()))
        return headers, paths

    def _enter_segment(self, header: SegmentHeader) -> None:
        """Make the segment the last one, if it continues what those before it hold."""
        _sequence, _begins_anew, first, base_term, hard_state = header
        path = self._segments[header.sequence].path
        # One that begins before all entries that are left replaced them, and what it follows was
        # dropped.
        if self._last_sequence == 0 or first < self._index.first:
            self._begin(first, base_term)
        if self._last_sequence == 0:
            self._hard_state = hard_state
        self._last_sequence = header.sequence
        if self.identity is None and hard_state.term > 0:
            raise CorruptLogError(self._directory / "identity.json", 0, "the identity is missing")
        reason = None
        if first > self._index.last + 1:
            reason = f"it continues at entry {first} a log that ends at {self._index.last}"
        elif base_term != self.term_at(first - 1):
            reason = f"it continues after term {base_term} a log that has another there"
        elif hard_state != self._hard_state:
            reason = f"it continues under {hard_state} a log that ends under {self._hard_state}"
        if reason is not None:
            raise CorruptLogError(path, 0, reason)

    def _replay(self, is_last: bool, memberships: list[tuple[int, Membership]]) -> None:
        """Count in what a segment holds, cut a torn tail off the last one, and sync it."""
        segment = self._last_segment
        path, fd = segment.path, segment.fd
        offset, end = 0, SEGMENT_HEADER_BYTES
        try:
            for offset, record_bytes, kind, payload in scan(path, fd, os.fstat(fd).st_size):
                self._replay_record(path, offset, kind, payload, memberships)
                end = offset + record_bytes
        except TornRecordError as torn:
            if not is_last:
                raise CorruptLogError(path, torn.offset, str(torn)) from torn
            self._cut_torn_tail(path, fd, torn.offset)
        segment.records_end, segment.size_bytes = end, os.fstat(fd).st_size
        if is_last:
            # A sync that failed before the restart may have left the last record marked clean in
            # the page cache and nowhere else. Written again, it is what the next sync writes
            # (Rebello et al., "Can Applications Recover from fsync Failures?", ATC 2020).
            self._write(fd, os.pread(fd, end - offset, offset), offset, self._disk.pwrite)
        # What a killed process wrote is on the disk only now; others are told of it from here on.
        self._disk.fdatasync(fd)

    def _replay_record(
        self,
        path: Path,
        offset: int,
        kind: int,
        payload: bytes,
        memberships: list[tuple[int, Membership]],
    ) -> None:
        try:
            hard_state, entries = decode_payload(kind, payload)
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
        self._take(hard_state, entries, offset, RECORD_HEADER_BYTES + len(payload))

    def _cut_torn_tail(self, path: Path, fd: int, offset: int) -> None:
        """Cut the last segment at ``offset``, once a copy of what is cut is safe.

        The cut is durable before anything is appended: a later record that is shorter would leave
        the rest of the torn one behind itself.
        """
        torn = os.pread(fd, os.fstat(fd).st_size - offset, offset).rstrip(b"\0")
        copy = _copy_of_torn(path)
        log.warning(
            "cut a torn tail path=%s offset=%d bytes=%d copy=%s", path, offset, len(torn), copy
        )
        with copy.open("wb") as file:
            file.write(torn)
            file.flush()
            self._disk.fdatasync(file.fileno())
        self._sync_directory(self._directory)
        self._disk.ftruncate(fd, offset)
        self._disk.fsync(fd)

    def _read_tail(self, bytes_max: int) -> tuple[Entry, ...]:
        """The last entries, at most ``bytes_max`` of them."""
        if self._index.last < self._index.first or bytes_max == 0:
            return ()
        start = self._index.tail_start(bytes_max)
        entries = self.read(start, self._index.last, sys.maxsize)
        total_bytes = 0
        for count, entry in enumerate(reversed(entries)):
            total_bytes += ENTRY_OVERHEAD_BYTES + len(entry.data)
            if total_bytes > bytes_max:
                return tuple(entries[len(entries) - count :])
        return tuple(entries)
