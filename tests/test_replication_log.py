"""The durable log: what it keeps, gives back and syncs, with real files."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import replace
from pathlib import Path

import pytest

import replication_log
import replication_log_format
from raft_types import ENTRY_OVERHEAD_BYTES, Entry, EntryKind, HardState, Member, Membership
from replication_log import Disk, Recovered, ReplicationLog
from replication_log_format import CorruptLogError, DataDirLockedError, DiskRefusesError
from tests.log_files import (
    IDENTITY,
    VOTE,
    WatchedDisk,
    append_raw,
    entries,
    entry,
    flip,
    open_log,
    record_ends,
    recover,
    segments,
    write_log,
)

# ---- Keeping -----------------------------------------------------------------------------------


def test_open_when_directory_is_new_then_log_is_empty(tmp_path: Path) -> None:
    """An empty directory is a member that never voted and has no name yet (raft-traps T12)."""
    with closing(ReplicationLog(tmp_path / "data" / "node1", fsync=False)) as log:
        assert log.identity is None
        assert log.recovered == Recovered(HardState(0, None), 1, 0, 0, (), (), ())
        with pytest.raises(IndexError):
            log.read(1, 1, 1000)


def test_open_when_batches_were_appended_then_all_are_back(tmp_path: Path) -> None:
    """Entries, hard state, terms and memberships survive a restart as they were appended."""
    members = Membership((Member("a" * 16, "node1", "127.0.0.1", 6379, 16379, True),))
    membership = Entry(4, 3, EntryKind.MEMBERSHIP, members.encode())
    with open_log(tmp_path) as log:
        log.append(VOTE, [])
        log.append(None, [entry(1), Entry(2, 1, EntryKind.NOOP, b"")])
        log.append(HardState(3, None), [entry(3, term=2), membership])

    with open_log(tmp_path) as log:
        recovered = log.recovered
        everything = log.read(1, 4, 1000)
        assert log.identity == IDENTITY
    assert everything == [
        entry(1),
        Entry(2, 1, EntryKind.NOOP, b""),
        entry(3, term=2),
        membership,
    ]
    assert recovered == Recovered(
        hard_state=HardState(3, None),
        first_index=1,
        base_term=0,
        last_index=4,
        term_runs=((1, 1), (3, 2), (4, 3)),
        memberships=((4, members),),
        tail=tuple(everything),
    )


def test_append_when_only_the_hard_state_changes_then_the_latest_is_kept(tmp_path: Path) -> None:
    """Term and vote change without an entry: a follower that only votes (raft-traps T1, T2)."""
    with open_log(tmp_path) as log:
        for term in range(1, 10):
            log.append(HardState(term, None), [])
            log.append(HardState(term, "b" * 16), [])

    assert recover(tmp_path).hard_state == HardState(9, "b" * 16)
    assert recover(tmp_path).last_index == 0


def test_append_when_nothing_is_given_then_nothing_is_written(tmp_path: Path) -> None:
    """A batch of nothing costs no write and no sync."""
    write_log(tmp_path)
    size_bytes = segments(tmp_path)[0].stat().st_size

    with open_log(tmp_path) as log:
        log.append(None, [])

    assert segments(tmp_path)[0].stat().st_size == size_bytes


def test_append_when_entries_are_there_already_then_they_and_all_after_are_replaced(
    tmp_path: Path,
) -> None:
    """A conflicting entry replaces the existing entry and all that follow it.

    Source: paper figure 2, AppendEntries, receiver's steps 3 and 4.
    """
    write_log(tmp_path, entries(1, 10), entries(11, 20))
    with open_log(tmp_path) as log:
        log.append(HardState(2, None), entries(5, 6, term=2))
        expected = entries(1, 4) + entries(5, 6, term=2)

        assert log.read(1, 6, 10_000) == expected
        with pytest.raises(IndexError):
            log.read(7, 7, 10_000)
        log.append(None, entries(7, 8, term=2))
        assert log.read(3, 8, 10_000) == entries(3, 4) + entries(5, 8, term=2)

    with open_log(tmp_path) as log:
        assert log.read(1, 8, 10_000) == entries(1, 4) + entries(5, 8, term=2)
        assert log.recovered.term_runs == ((1, 1), (5, 2))
        assert log.recovered.tail == tuple(log.read(1, 8, 10_000))


def test_append_when_a_membership_is_replaced_then_it_is_not_recovered(tmp_path: Path) -> None:
    """A membership counts only as long as its entry is in the log (raft-traps T62)."""
    membership = Entry(2, 1, EntryKind.MEMBERSHIP, Membership().encode())
    write_log(tmp_path, [entry(1), membership], [entry(2)])

    assert recover(tmp_path).memberships == ()


def test_append_when_much_is_given_then_it_is_several_records_each_synced_before_the_next(
    tmp_path: Path,
) -> None:
    """A peer that is far behind reads a little at a time, and whole records with it."""
    watched = WatchedDisk()
    batch = [entry(index, data=b"x" * (1 << 20)) for index in range(1, 11)]
    with open_log(tmp_path, fsync=True, disk=watched.disk()) as log:
        watched.take()
        log.append(HardState(1, None), batch)
        name = segments(tmp_path)[0].name
        assert watched.take() == 4 * [("pwrite", name), ("fdatasync", name)]
        assert log.read(1, 10, 100 << 20) == batch

    assert recover(tmp_path).last_index == 10


def test_append_when_segments_are_full_then_new_ones_are_begun(tmp_path: Path) -> None:
    """No segment is longer than its limit, and all of them together are the log."""
    batches = [entries(first, first + 2) for first in range(1, 61, 3)]
    write_log(tmp_path, *batches, segment_bytes_max=400)

    assert len(segments(tmp_path)) > 3
    assert all(path.stat().st_size <= 400 for path in segments(tmp_path))
    with open_log(tmp_path) as log:
        assert log.read(1, 60, 100_000) == entries(1, 60)
        assert log.recovered.tail == tuple(entries(1, 60))


@pytest.mark.parametrize(("spare_bytes", "count"), [(0, 1), (-1, 2)])
def test_append_when_a_batch_just_fits_then_no_segment_is_begun(
    tmp_path: Path, spare_bytes: int, count: int
) -> None:
    """The limit is the last size that is allowed."""
    write_log(tmp_path / "measured", entries(1, 3))
    size_bytes = record_ends(segments(tmp_path / "measured")[0])[-1]
    write_log(tmp_path / "limited", entries(1, 3), segment_bytes_max=size_bytes + spare_bytes)

    assert len(segments(tmp_path / "limited")) == count


def test_append_when_a_batch_is_longer_than_a_segment_then_it_has_one_of_its_own(
    tmp_path: Path,
) -> None:
    """A batch is one record and never divided, whatever the limit is."""
    write_log(tmp_path, entries(1, 2), entries(3, 40), entries(41, 42), segment_bytes_max=400)

    assert len(segments(tmp_path)) == 3
    assert recover(tmp_path).tail == tuple(entries(1, 42))


def test_append_when_replacing_across_segments_then_order_of_writing_counts(
    tmp_path: Path,
) -> None:
    """Segments whose first index is lower than that of an earlier one are read in their order."""
    with open_log(tmp_path, segment_bytes_max=300) as log:
        log.append(VOTE, [])
        for first in range(1, 31, 3):
            log.append(None, entries(first, first + 2))
        before = len(segments(tmp_path))
        for term in range(2, 12):
            log.append(HardState(term, None), entries(5, 9, term))
        assert log.read(1, 9, 10_000) == entries(1, 4) + entries(5, 9, term=11)

    assert len(segments(tmp_path)) > before + 2
    with open_log(tmp_path) as log:
        assert log.read(1, 9, 10_000) == entries(1, 4) + entries(5, 9, term=11)
        assert log.recovered.term_runs == ((1, 1), (5, 11))


def test_recovered_when_the_log_is_long_then_the_tail_is_bounded(tmp_path: Path) -> None:
    """At most tail_bytes_max of entries are kept in memory, the last ones, without a gap."""
    write_log(tmp_path, entries(1, 50), entries(51, 100))
    one_bytes = ENTRY_OVERHEAD_BYTES + len(entry(99).data)

    for tail_bytes_max, count in (
        (0, 0),
        (one_bytes, 0),  # the last, 100, is one byte longer
        (one_bytes + 1, 1),
        (10 * one_bytes + 1, 10),
        (10 * one_bytes, 9),
        (1 << 20, 100),
    ):
        with open_log(tmp_path, tail_bytes_max=tail_bytes_max) as log:
            assert log.recovered.tail == tuple(entries(101 - count, 100))


def test_append_when_raft_would_never_ask_for_it_then_it_is_refused(tmp_path: Path) -> None:
    """A gap, a term that falls or a second vote is our bug, and is not written."""
    write_log(tmp_path, entries(1, 3))
    append_raw(tmp_path, HardState(2, "a" * 16), [entry(4, term=2)])
    size_bytes = segments(tmp_path)[0].stat().st_size
    wrong: list[tuple[HardState | None, list[Entry]]] = [
        (None, [entry(6, term=2)]),  # a gap
        (None, [entry(0)]),
        (None, [entry(5, term=2), entry(7, term=2)]),  # a gap within
        (None, [entry(5, term=3)]),  # a term that is not on the disk yet
        (None, [entry(5, term=1)]),  # a term that falls
        (HardState(3, None), [entry(5, term=3), entry(6, term=2)]),
        (HardState(1, None), []),
        (HardState(2, "b" * 16), []),  # a second vote in a term (raft-traps T3)
        (HardState(2, None), []),  # a vote forgotten
    ]

    with open_log(tmp_path) as log:
        for hard_state, batch in wrong:
            with pytest.raises(AssertionError):
                log.append(hard_state, batch)
        assert segments(tmp_path)[0].stat().st_size == size_bytes
        log.append(None, [entry(5, term=2)])
    assert recover(tmp_path).last_index == 5


# ---- Reading -----------------------------------------------------------------------------------


def test_read_when_bytes_are_limited_then_it_stops_there_but_gives_one(tmp_path: Path) -> None:
    """A read holds at least one entry, else no more than bytes_max."""
    with open_log(tmp_path, segment_bytes_max=200) as log:
        log.append(VOTE, entries(1, 9))
        for item in entries(10, 30):
            log.append(None, [item])
        one_bytes = ENTRY_OVERHEAD_BYTES + len(entry(10).data)

        assert log.read(10, 30, 0) == [entry(10)]
        assert log.read(10, 30, one_bytes) == [entry(10)]
        assert log.read(2, 9, 2 * one_bytes - 1) == entries(2, 3)
        assert log.read(9, 12, 10_000) == entries(9, 12)
        assert log.read(5, 5, 10_000) == [entry(5)]
        for first in range(1, 31):
            for bytes_max in (0, 50, 200, 500):
                found = log.read(first, 30, bytes_max)
                assert found == entries(first, first + len(found) - 1)
                used_bytes = sum(ENTRY_OVERHEAD_BYTES + len(item.data) for item in found)
                assert len(found) == 1 or used_bytes <= bytes_max


def test_read_when_the_log_does_not_hold_it_then_index_error(tmp_path: Path) -> None:
    """An index outside the log is told apart from damage."""
    write_log(tmp_path, entries(1, 3))
    with open_log(tmp_path) as log:
        for first, last in ((0, 2), (3, 4), (4, 4), (3, 2)):
            with pytest.raises(IndexError):
                log.read(first, last, 1000)


def test_read_when_the_disk_gives_back_something_else_then_corrupt(tmp_path: Path) -> None:
    """A checksum is looked at on every read, not only when the log is opened."""
    write_log(tmp_path, entries(1, 3))
    segment = segments(tmp_path)[0]
    start, end = record_ends(segment)[-2:]
    with open_log(tmp_path) as log:
        for offset in range(start, end):
            flip(segment, offset)
            with pytest.raises(CorruptLogError, match=segment.name):
                log.read(1, 3, 1000)
            flip(segment, offset)
        assert log.read(1, 3, 1000) == entries(1, 3)


@pytest.mark.slow
@pytest.mark.usefixtures("restless_threads")
def test_read_when_another_thread_appends_and_replaces_then_what_comes_fits_together(
    tmp_path: Path,
) -> None:
    """One read sees the log as it was at one moment: indexes without a gap, terms never falling."""
    seed = 7
    chance = random.Random(seed)
    done = threading.Event()

    def read_on(log: ReplicationLog) -> int:
        reads = 0
        while not done.is_set():
            try:
                found = log.read(5, 20, 1 << 20)
            except IndexError as error:
                assert "not in the log" in str(error)  # cut to below 20 a moment ago
                continue
            terms = [item.term for item in found]
            assert found == [entry(5 + i, term) for i, term in enumerate(terms)], f"{seed=}"
            assert len(found) == 16
            assert terms == sorted(terms)
            reads += 1
        return reads

    with open_log(tmp_path, segment_bytes_max=4000) as log, ThreadPoolExecutor() as pool:
        log.append(VOTE, entries(1, 20))
        readers = [pool.submit(read_on, log) for _ in range(2)]
        try:
            for term in range(2, 6000):
                first = chance.randint(2, 20)
                middle = chance.randint(first, 20)
                log.append(HardState(term, None), entries(first, middle, term))
                log.append(None, entries(middle + 1, 20, term))
        finally:
            done.set()
        assert all(reader.result() > 0 for reader in readers)


# ---- Identity ----------------------------------------------------------------------------------


def test_save_identity_when_reopened_then_it_is_back(tmp_path: Path) -> None:
    """A cluster id may come later; the member stays who it is (raft-traps T12)."""
    unfounded = IDENTITY._replace(cluster_id="")
    with closing(ReplicationLog(tmp_path, fsync=False)) as log:
        log.save_identity(unfounded)
    with open_log(tmp_path) as log:
        assert log.identity == unfounded
        log.save_identity(IDENTITY)
        with pytest.raises(AssertionError):
            log.save_identity(IDENTITY._replace(member_id="b" * 16))

    with open_log(tmp_path) as log:
        assert log.identity == IDENTITY


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"{}", b"null", b"\xff", b"7", b"[" * 100_000]
)
def test_open_when_identity_is_unreadable_then_refused(tmp_path: Path, content: bytes) -> None:
    """A member that does not know who it is must not vote as somebody else."""
    write_log(tmp_path, [entry(1)])
    (tmp_path / "identity.json").write_bytes(content)

    with pytest.raises(CorruptLogError, match=r"identity\.json"):
        recover(tmp_path)


def test_open_when_identity_is_missing_from_a_log_then_refused(tmp_path: Path) -> None:
    """Entries and votes without a name belong to nobody."""
    write_log(tmp_path)
    (tmp_path / "identity.json").unlink()

    with pytest.raises(CorruptLogError, match=r"identity\.json.*identity is missing"):
        recover(tmp_path)


def test_open_when_the_log_is_missing_beside_an_identity_then_refused(tmp_path: Path) -> None:
    """A member that lost its log could vote a second time in a term (raft-traps T12)."""
    write_log(tmp_path, [entry(1)])
    segment = segments(tmp_path)[0]

    segment.write_bytes(b"")
    with pytest.raises(CorruptLogError, match="not a segment"):
        recover(tmp_path)
    segment.unlink()
    with pytest.raises(CorruptLogError, match="log of this member is missing"):
        recover(tmp_path)


def test_open_when_a_crash_came_before_the_first_identity_then_new(tmp_path: Path) -> None:
    """The first segment is created before the identity: alone, whole or not, it is no member."""
    ReplicationLog(tmp_path, fsync=False).close()
    segment = segments(tmp_path)[0]
    header = segment.read_bytes()

    for length in range(len(header) + 1):
        segment.write_bytes(header[:length])
        with closing(ReplicationLog(tmp_path, fsync=False)) as log:
            assert log.identity is None
            with pytest.raises(AssertionError):
                log.append(VOTE, [])
        assert segment.read_bytes() == header


# ---- Syncs and failures ------------------------------------------------------------------------


def test_append_when_it_returns_then_one_write_and_one_sync_were_made(tmp_path: Path) -> None:
    """However much a batch holds, it costs one write and one sync, in this order."""
    watched = WatchedDisk()
    with open_log(tmp_path, fsync=True, disk=watched.disk()) as log:
        name = segments(tmp_path)[0].name
        watched.take()

        log.append(VOTE, entries(1, 100))
        assert watched.take() == [("pwrite", name), ("fdatasync", name)]
        log.append(HardState(2, None), [])
        assert watched.take() == [("pwrite", name), ("fdatasync", name)]


@pytest.mark.skipif(not hasattr(os, "RWF_DSYNC"), reason="Linux has it")
def test_append_when_one_call_writes_and_syncs_then_each_write_asks_for_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's own disk gets no sync of its own then (fault-model M3)."""
    flags, write = [], os.pwritev

    def pwritev(fd: int, buffers: list[bytes], offset: int, flag: int = 0) -> int:
        flags.append(flag)
        is_first = len(flags) == 1  # a short write, then the rest
        return write(fd, [buffers[0][:50]] if is_first else buffers, offset, flag)

    with open_log(tmp_path, fsync=True) as log:
        monkeypatch.setattr(os, "pwritev", pwritev)
        log.append(VOTE, entries(1, 3))
        log.append(None, [entry(4)])

    assert flags == [os.RWF_DSYNC] * 3


def test_append_when_the_file_has_zeros_then_they_are_written_over(tmp_path: Path) -> None:
    """A write past the zeros brings new ones along; all others leave the file's length alone.

    So does the first one after a restart: the zeros are found again.
    """
    zeros_bytes = replication_log._ZEROS_BYTES
    segment_bytes_max = 2 * zeros_bytes + 1000
    sizes_bytes: list[int] = []
    written_bytes: list[int] = []

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        written_bytes.append(len(data))
        return os.pwrite(fd, data, offset)

    def append(log: ReplicationLog, item: Entry) -> None:
        log.append(None, [item])
        sizes_bytes.append(segments(tmp_path)[0].stat().st_size)

    with open_log(tmp_path, segment_bytes_max=segment_bytes_max, disk=Disk(pwrite)) as log:
        log.append(VOTE, [])
        append(log, entry(1))
        append(log, entry(2))
    with open_log(tmp_path, segment_bytes_max=segment_bytes_max, disk=Disk(pwrite)) as log:
        written_bytes.clear()
        append(log, entry(3))
        assert written_bytes[0] < 100
        append(log, entry(4, data=b"x" * zeros_bytes))
        append(log, entry(5, data=b"x" * (zeros_bytes // 2)))
        append(log, entry(6, data=b"x" * (zeros_bytes // 2)))
        append(log, entry(7))
        assert len(written_bytes) == 5

    assert [size_bytes / zeros_bytes for size_bytes in sizes_bytes[:5]] == [1, 1, 1, 2, 2]
    assert sizes_bytes[5:] == [segment_bytes_max] * 2
    assert recover(tmp_path).last_index == 7


def test_append_when_a_header_would_cross_a_sector_then_the_record_begins_behind_it(
    tmp_path: Path,
) -> None:
    """A sector is on the disk whole or not at all, and so is each record's header."""
    chance = random.Random(1)
    batches = [[entry(i, data=b"x" * chance.randrange(1, 300))] for i in range(1, 400)]
    write_log(tmp_path, *batches)
    segment = segments(tmp_path)[0]
    with segment.open("rb") as file:
        found = list(replication_log_format.scan(segment, file.fileno(), segment.stat().st_size))
    starts = [offset for offset, _size, _kind, _payload in found]

    assert all(start // 512 == (start + 15) // 512 for start in starts)
    assert any(start % 512 == 0 for start in starts)
    with open_log(tmp_path) as log:
        assert log.read(1, 399, 1 << 20) == [item for batch in batches for item in batch]


def test_append_when_fsync_is_off_then_nothing_is_synced(tmp_path: Path) -> None:
    """``--fsync no`` means none at all, neither of files nor of directories."""
    watched = WatchedDisk()
    with open_log(tmp_path, fsync=False, disk=watched.disk(), segment_bytes_max=200) as log:
        for item in entries(1, 10):
            log.append(VOTE, [item])

    assert {call for call, _name in watched.calls} == {"pwrite", "rename"}


def test_append_when_a_segment_is_begun_then_it_is_durable_before_its_first_record(
    tmp_path: Path,
) -> None:
    """A new file's header and its name in the directory are synced first (raft-traps T7)."""
    watched = WatchedDisk()
    with open_log(tmp_path, fsync=True, disk=watched.disk(), segment_bytes_max=100) as log:
        log.append(VOTE, [entry(1)])
        watched.take()
        log.append(None, [entry(2)])
        name = segments(tmp_path)[-1].name

    assert len(segments(tmp_path)) == 2
    assert watched.take() == [
        ("pwrite", name),
        ("fdatasync", name),
        ("fsync", tmp_path.name),
        ("pwrite", name),
        ("fdatasync", name),
    ]


def test_save_identity_when_it_returns_then_file_and_name_were_synced(tmp_path: Path) -> None:
    """Temporary file, sync, rename, sync of the directory (raft-traps T7)."""
    watched = WatchedDisk()
    with closing(ReplicationLog(tmp_path / "node1", disk=watched.disk())) as log:
        name = segments(tmp_path / "node1")[0].name
        assert watched.take() == [
            ("fsync", tmp_path.name),  # the data directory's own name
            ("pwrite", name),
            ("fdatasync", name),
            ("fsync", "node1"),
            ("fsync", "node1"),
        ]
        log.save_identity(IDENTITY)

    temporary = "identity.json.tmp"
    assert watched.take() == [
        ("pwrite", temporary),
        ("fdatasync", temporary),
        ("rename", "identity.json"),
        ("fsync", "node1"),
    ]


def test_open_when_a_log_is_there_then_its_end_is_written_again_and_synced(tmp_path: Path) -> None:
    """What a killed process left in the page cache is on the disk before anyone is told of it.

    Written again, for after a failed fsync pages may be marked clean. Source: Rebello, ATC 2020.
    """
    write_log(tmp_path, *([item] for item in entries(1, 5)), segment_bytes_max=200)
    first, last = segments(tmp_path)[0].name, segments(tmp_path)[-1].name
    contents = [path.read_bytes() for path in segments(tmp_path)]
    watched = WatchedDisk()
    with open_log(tmp_path, fsync=True, disk=watched.disk()):
        calls = watched.take()

    assert calls[0] == ("fdatasync", first)
    assert calls[-3:] == [("pwrite", last), ("fdatasync", last), ("fsync", tmp_path.name)]
    assert [path.read_bytes() for path in segments(tmp_path)] == contents


@pytest.mark.parametrize(
    ("call", "code"),
    [("pwrite", errno.EIO), ("fdatasync", errno.EIO), ("fdatasync", errno.ENOSPC)],
)
def test_append_when_the_disk_fails_then_every_further_append_is_refused(
    tmp_path: Path, call: str, code: int
) -> None:
    """A failed write or sync is final, even where the next would succeed (raft-traps T6)."""
    watched = WatchedDisk()
    with open_log(tmp_path, fsync=True, disk=watched.disk()) as log:
        log.append(VOTE, entries(1, 2))
        watched.fail[call] = OSError(code, os.strerror(code))
        with pytest.raises(OSError, match=os.strerror(code)):
            log.append(None, [entry(3)])
        watched.fail.clear()
        watched.take()

        for _ in range(2):
            with pytest.raises(OSError, match="earlier write"):
                log.append(None, [entry(3)])
        with pytest.raises(OSError, match="earlier write"):
            log.save_identity(IDENTITY)
        assert watched.take() == []
        assert log.read(1, 2, 1000) == entries(1, 2)
        with pytest.raises(IndexError):  # it was never durable
            log.read(3, 3, 1000)

    assert recover(tmp_path).tail[:2] == tuple(entries(1, 2))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize("left_bytes", [0, 30])
@pytest.mark.parametrize("segment_bytes_max", [100, 1 << 20])
def test_append_when_the_disk_has_no_room_then_the_same_may_be_appended_again(
    tmp_path: Path, code: int, left_bytes: int, segment_bytes_max: int
) -> None:
    """Nothing was synced, so nothing is in doubt; what was left of it is written over."""
    watched = WatchedDisk()
    with open_log(
        tmp_path, fsync=True, disk=watched.disk(), segment_bytes_max=segment_bytes_max
    ) as log:
        log.append(VOTE, [entry(1)])
        for _ in range(2):
            watched.room_bytes, watched.no_room = left_bytes, OSError(code, "no room")
            with pytest.raises(DiskRefusesError, match="no room"):
                log.append(HardState(5, "n2"), [entry(2, 5), entry(3, 5)])
            assert log.read(1, 1, 1000) == [entry(1)]
        watched.room_bytes = sys.maxsize

        log.append(HardState(5, "n2"), [entry(2, 5), entry(3, 5)])

        assert log.read(1, 3, 1000) == [entry(1), entry(2, 5), entry(3, 5)]
    with open_log(tmp_path) as log:
        assert log.recovered.tail == (entry(1), entry(2, 5), entry(3, 5))
        assert log.hard_state == HardState(5, "n2")


@pytest.mark.parametrize("taken_bytes", [0, 5, 512, 1500])
@pytest.mark.parametrize("refused", [1, 2, 3])
@pytest.mark.parametrize("segment_bytes_max", [4000, 7000, 1 << 20])
def test_append_when_any_of_its_turns_finds_no_room_then_the_log_is_whole_when_it_is_tried_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    taken_bytes: int,
    refused: int,
    segment_bytes_max: int,
) -> None:
    """It begins further back than what was refused, of which the disk may have taken a part."""
    monkeypatch.setattr(replication_log, "_TURN_BYTES_MAX", 2500)
    batch = [Entry(index, 1, EntryKind.COMMAND, bytes([index]) * 1000) for index in range(2, 8)]
    calls = -100

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls == refused and taken_bytes:
            return os.pwrite(fd, data[:taken_bytes], offset)
        if calls in (refused, refused + 1):
            raise OSError(errno.ENOSPC, "no room")
        return os.pwrite(fd, data, offset)

    with open_log(
        tmp_path, fsync=True, disk=Disk(pwrite), segment_bytes_max=segment_bytes_max
    ) as log:
        log.append(VOTE, [entry(1)])
        calls = 0
        is_taken = False
        while not is_taken:
            with suppress(DiskRefusesError):
                log.append(None, batch)
                is_taken = True
        assert calls > refused
        assert log.read(2, 7, 100_000) == batch

    assert recover(tmp_path).tail == (entry(1), *batch)
    with open_log(tmp_path) as log:
        log.drop_before(3)
    assert recover(tmp_path).tail[-5:] == tuple(batch[1:])


def test_append_when_the_call_that_writes_and_syncs_fails_then_both_are_done_anew(
    tmp_path: Path,
) -> None:
    """It does not tell which of the two has failed; a sync that fails must not be believed later."""
    watched = WatchedDisk()
    calls: list[str] = []

    def pwrite_durably(fd: int, data: bytes, offset: int) -> int:
        calls.append("both")
        raise OSError(errno.ENOSPC, "no room, or no sync")

    disk = replace(watched.disk(), pwrite_durably=pwrite_durably)
    with open_log(tmp_path, fsync=True, disk=disk) as log:
        log.append(VOTE, [entry(1)])
        assert (calls, watched.take()[-2:]) == (
            ["both"],
            [("pwrite", segments(tmp_path)[0].name), ("fdatasync", segments(tmp_path)[0].name)],
        )
        watched.fail["fdatasync"] = OSError(errno.ENOSPC, "no sync")
        with pytest.raises(OSError, match="no sync"):
            log.append(None, [entry(2)])
        with pytest.raises(OSError, match="earlier write"):
            log.append(None, [entry(2)])


def test_append_when_the_call_that_writes_and_syncs_meets_a_broken_disk_then_nothing_is_done_anew(
    tmp_path: Path,
) -> None:
    """After an error of the disk a sync that succeeds proves nothing (raft-traps T6)."""
    watched = WatchedDisk()

    def pwrite_durably(fd: int, data: bytes, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    disk = replace(watched.disk(), pwrite_durably=pwrite_durably)
    with open_log(tmp_path, fsync=True, disk=disk) as log:
        watched.take()

        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            log.append(VOTE, [entry(1)])

        assert watched.take() == []
        with pytest.raises(OSError, match="earlier write"):
            log.append(VOTE, [entry(1)])
        assert log.hard_state == HardState(0, None)


@pytest.mark.parametrize("failing_sync", ["fdatasync", "fsync"])
def test_append_when_a_new_segment_fails_then_every_further_append_is_refused(
    tmp_path: Path, failing_sync: str
) -> None:
    """Creating a segment is part of the append: its failure is as final."""
    watched = WatchedDisk()
    with open_log(tmp_path, fsync=True, disk=watched.disk(), segment_bytes_max=100) as log:
        log.append(VOTE, [entry(1)])
        watched.fail[failing_sync] = OSError(errno.EIO, "gone")
        with pytest.raises(OSError, match="gone"):
            log.append(None, [entry(2)])
        watched.fail.clear()
        with pytest.raises(OSError, match="earlier write"):
            log.append(None, [entry(2)])

    with open_log(tmp_path) as log:
        assert log.recovered.tail == (entry(1),)
        log.append(None, [entry(2)])


def test_append_when_writes_are_short_then_the_rest_follows(tmp_path: Path) -> None:
    """A write may take less than it is given; the record is whole before the sync."""
    watched = WatchedDisk()
    watched.short_bytes = 7
    with open_log(tmp_path, fsync=True, disk=watched.disk(), segment_bytes_max=400) as log:
        log.append(VOTE, entries(1, 5))
        calls = [call for call, _name in watched.take()]

    assert calls.count("pwrite") > 10
    assert calls[-2:] == ["pwrite", "fdatasync"]
    assert recover(tmp_path).tail == tuple(entries(1, 5))


def test_bytes_free_when_asked_then_it_is_what_the_file_system_says(tmp_path: Path) -> None:
    """The number by which a primary stops taking writes before the disk is full."""
    status = os.statvfs(tmp_path)
    with open_log(tmp_path) as log:
        assert 0 < log.bytes_free() <= status.f_blocks * status.f_frsize


# ---- The lock ----------------------------------------------------------------------------------


def test_open_when_in_use_by_this_process_then_refused(tmp_path: Path) -> None:
    """Two logs on one directory would write over each other, even within one process."""
    with open_log(tmp_path), pytest.raises(DataDirLockedError, match=f"pid {os.getpid()}"):
        ReplicationLog(tmp_path)

    with open_log(tmp_path) as log:
        assert log.identity == IDENTITY


@pytest.fixture
def other_process(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the log in ``tmp_path`` open until it is killed."""
    program = (
        "import sys; from pathlib import Path; from replication_log import ReplicationLog;"
        "log = ReplicationLog(Path(sys.argv[1])); print('open', flush=True); sys.stdin.read()"
    )
    root = Path(replication_log.__file__).parent
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        yield process
        process.kill()


def test_open_when_in_use_by_another_process_then_refused_until_it_is_gone(
    tmp_path: Path, other_process: subprocess.Popen[str]
) -> None:
    """The message names the process; a killed one leaves no lock behind."""
    with pytest.raises(DataDirLockedError, match=f"pid {other_process.pid}"):
        ReplicationLog(tmp_path)

    other_process.kill()
    other_process.wait()
    with open_log(tmp_path) as log:
        log.append(VOTE, [entry(1)])


# ---- Size --------------------------------------------------------------------------------------


def test_index_when_a_log_has_many_small_batches_then_memory_stays_small() -> None:
    """A million batches of one entry cost less than 30 MB: 30 bytes each."""
    count = 100_000
    tracemalloc.start()
    try:
        index = replication_log._Index()
        for i in range(1, count + 1):
            index.add(i, i, 1, i * 137, 137)
        used_bytes, _peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert index.last == count
    assert used_bytes < 30 * count


def test_index_when_a_batch_is_replaced_then_its_row_goes() -> None:
    """A log whose end is replaced again and again does not grow in memory."""
    index = replication_log._Index()
    for i in range(100):
        index.add(1 + i % 2, 5, 1, i * 100, 100)

    assert len(index._firsts) == 2


@pytest.mark.parametrize("read_bytes", [16, 100, 1000])
def test_open_when_records_are_longer_than_a_piece_then_they_are_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_bytes: int
) -> None:
    """A recovery reads in pieces; where their borders fall makes no difference."""
    write_log(tmp_path, entries(1, 40), [entry(41)], entries(42, 43), [entry(44, data=b"x" * 3000)])
    monkeypatch.setattr(replication_log_format, "_READ_BYTES", read_bytes)

    recovered = recover(tmp_path)
    assert recovered.tail[:-1] == tuple(entries(1, 43))
    assert recovered.last_index == 44
