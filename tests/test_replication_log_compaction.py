"""The durable log made shorter: dropped at its front, or begun anew behind an installed state."""

from __future__ import annotations

import errno
import os
import random
import shutil
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from raft_types import Entry, EntryKind, HardState, Member, Membership
from replication_log import Recovered, ReplicationLog
from replication_log_format import CorruptLogError, DiskRefusesError
from tests.log_files import (
    VOTE,
    PowerLossDisk,
    WatchedDisk,
    entries,
    entry,
    flip,
    open_log,
    record_ends,
    recover,
    segments,
    write_log,
)

SEGMENT_BYTES_MAX = 400


def write_segments(directory: Path, last: int = 40) -> None:
    """A log of one-entry batches in many segments; its last vote is in the last but one."""
    write_log(
        directory,
        *([item] for item in entries(1, last)),
        segment_bytes_max=SEGMENT_BYTES_MAX,
    )


def first_indexes(directory: Path) -> list[int]:
    """The index that each segment has in its name."""
    return [int(path.stem.rsplit("-", 1)[1], 16) for path in segments(directory)]


# ---- Dropping ----------------------------------------------------------------------------------


def test_drop_before_when_segments_hold_only_older_entries_then_they_go(tmp_path: Path) -> None:
    """As many whole segments as possible, no entry that was not named, and never the last."""
    write_segments(tmp_path)
    starts = first_indexes(tmp_path)
    assert len(starts) > 5

    with open_log(tmp_path) as log:
        for index in range(45):
            expected = max(start for start in starts if start <= max(index, 1))
            assert log.drop_before(index) == log.first_index == expected
            assert first_indexes(tmp_path) == [start for start in starts if start >= expected]
            assert log.last_index == 40
            assert log.read(expected, 40, 1 << 20) == entries(expected, 40)
            assert log.size_bytes == sum(path.stat().st_size for path in segments(tmp_path))
            with pytest.raises(IndexError, match="not in the log"):
                log.read(expected - 1, 40, 1 << 20)
        assert log.drop_before(3) == starts[-1]  # no way back


def test_open_when_entries_were_dropped_then_the_log_begins_later(tmp_path: Path) -> None:
    """First index and the term before it, hard state, terms and memberships of what is left."""
    old, new = (Membership((Member("a" * 16, name, "h", 1, 2, True),)) for name in ("n", "m"))
    with open_log(tmp_path, segment_bytes_max=SEGMENT_BYTES_MAX) as log:
        log.append(VOTE, [Entry(1, 1, EntryKind.MEMBERSHIP, old.encode()), *entries(2, 9)])
        log.append(HardState(3, None), entries(10, 17, term=2))
        log.append(None, entries(18, 25, term=2))
        log.append(None, [*entries(26, 30, 3), Entry(31, 3, EntryKind.MEMBERSHIP, new.encode())])
        log.append(None, entries(32, 40, term=3))
        assert first_indexes(tmp_path) == [1, 10, 18, 26, 32]

        assert log.drop_before(25) == 18
        assert log._term_runs == [(18, 2), (26, 3)]
        log.append(None, entries(41, 42, term=3))
        # A term is compared with the one before the first index, too.
        with pytest.raises(AssertionError, match="follows one of term 2"):
            log.append(None, [entry(18, term=1)])

    recovered = recover(tmp_path)
    assert recovered == Recovered(
        HardState(3, None),
        first_index=18,
        base_term=2,
        last_index=42,
        term_runs=((18, 2), (26, 3)),
        memberships=((31, new),),
        tail=recovered.tail,
    )
    with open_log(tmp_path) as log:
        assert log.drop_before(26) == 26
        log.append(HardState(4, None), [entry(27, term=4)])
    assert recover(tmp_path).term_runs == ((26, 3), (27, 4))
    assert recover(tmp_path).base_term == 2


def test_drop_before_when_all_entries_are_older_then_the_last_segment_stays(tmp_path: Path) -> None:
    """The log never ends up without a file, and remembers its vote."""
    write_segments(tmp_path)
    (last,) = segments(tmp_path)[-1:]
    with open_log(tmp_path, segment_bytes_max=1) as log:
        log.append(HardState(2, "b" * 16), [])
        assert log.drop_before(41) == log.first_index == 41

    assert segments(tmp_path) != [last]
    with open_log(tmp_path) as log:
        recovered = log.recovered
        assert recovered == Recovered(HardState(2, "b" * 16), 41, 1, 40, (), (), ())
        log.append(None, [entry(41, term=2)])
    assert recover(tmp_path).tail == (entry(41, term=2),)


def test_drop_before_when_a_replacement_begins_before_its_segment_then_it_can_be_the_first(
    tmp_path: Path,
) -> None:
    """A replacement that reaches behind its segment's first entry begins a segment of its own."""
    write_segments(tmp_path, last=20)
    with open_log(tmp_path) as log:
        log.append(HardState(2, None), entries(4, 6, term=2))
        assert len(first_indexes(tmp_path)) > 3
        log.append(HardState(3, None), [entry(4, term=3)])  # not before it: no other segment
        log.append(None, entries(5, 7, term=3))
        starts = first_indexes(tmp_path)
        assert starts[-1] == 4
        assert starts == [*sorted(starts[:-1]), 4]

        assert log.drop_before(4) == 4
        assert first_indexes(tmp_path) == [4]
        assert log.read(4, 7, 1000) == entries(4, 7, term=3)
    assert recover(tmp_path).tail == tuple(entries(4, 7, term=3))
    assert recover(tmp_path).base_term == 1


def test_open_when_a_crash_came_before_a_segments_first_record_then_nothing_is_replaced(
    tmp_path: Path,
) -> None:
    """The segment of a replacement holds nothing yet: it goes, and all entries stay."""
    write_segments(tmp_path, last=20)
    before = recover(tmp_path)
    files = segments(tmp_path)
    watched = WatchedDisk()
    with open_log(tmp_path, fsync=True, disk=watched.disk()) as log:
        watched.take()
        watched.calls_max = 3  # header, its sync, the directory's
        with pytest.raises(OSError, match="stopped"):
            log.append(HardState(2, None), entries(4, 6, term=2))
    assert first_indexes(tmp_path)[-1] == 4

    assert recover(tmp_path) == before
    assert segments(tmp_path) == files
    with open_log(tmp_path, segment_bytes_max=1) as log:
        log.append(HardState(2, None), [entry(21, term=2)])
        assert log.drop_before(21) == 21
    assert recover(tmp_path).tail == (entry(21, term=2),)


def test_drop_before_when_segments_go_then_oldest_first_and_each_for_good(tmp_path: Path) -> None:
    """After a crash at any point, no segment is missing between two that are there."""
    write_segments(tmp_path)
    paths = segments(tmp_path)
    torn = paths[1].with_suffix(".seg.torn")
    torn.write_bytes(b"torn")
    watched = WatchedDisk()
    with open_log(tmp_path, fsync=True, disk=watched.disk()) as log:
        watched.take()
        log.drop_before(first_indexes(tmp_path)[3])

    assert watched.take() == [
        ("unlink", paths[0].name),
        ("fsync", tmp_path.name),
        ("unlink", torn.name),
        ("unlink", paths[1].name),
        ("fsync", tmp_path.name),
        ("unlink", paths[2].name),
        ("fsync", tmp_path.name),
    ]


@pytest.mark.parametrize("call", ["unlink", "fsync"])
def test_drop_before_when_the_disk_fails_then_every_further_change_is_refused(
    tmp_path: Path, call: str
) -> None:
    """As final as a failed append (raft-traps T6)."""
    write_segments(tmp_path)
    watched = WatchedDisk()
    with open_log(tmp_path, fsync=True, disk=watched.disk()) as log:
        watched.fail[call] = OSError(errno.EIO, "gone")
        with pytest.raises(OSError, match="gone"):
            log.drop_before(20)
        watched.fail.clear()
        changes: list[Callable[[], object]] = [
            lambda: log.append(None, [entry(41)]),
            lambda: log.drop_before(30),
            lambda: log.reset(50, 1),
        ]
        for change in changes:
            with pytest.raises(OSError, match="earlier write"):
                change()

    assert recover(tmp_path).last_index == 40


# ---- Beginning anew ----------------------------------------------------------------------------


@pytest.mark.parametrize("index", [0, 1, 7, 39, 40, 41, 1000])
def test_reset_when_it_returns_then_the_log_is_empty_and_goes_on_there(
    tmp_path: Path, index: int
) -> None:
    """Before, within or behind what it held; the vote stays."""
    vote = HardState(3, "b" * 16)
    write_segments(tmp_path)
    with open_log(tmp_path) as log:
        log.append(vote, [])
        log.reset(index, min(index, 2))

        assert (log.first_index, log.last_index) == (index + 1, index)
        assert first_indexes(tmp_path) == [index + 1]
        assert log.size_bytes == segments(tmp_path)[0].stat().st_size
        with pytest.raises(IndexError):
            log.read(index, index, 1000)
        with pytest.raises(AssertionError):
            log.append(None, [entry(index, term=3)])
        with pytest.raises(AssertionError):
            log.append(None, [entry(index + 2, term=3)])
    assert recover(tmp_path) == Recovered(vote, index + 1, min(index, 2), index, (), (), ())

    with open_log(tmp_path) as log:
        assert log.drop_before(index + 9) == log.drop_before(1) == index + 1
        log.append(None, entries(index + 1, index + 3, term=3))
    recovered = recover(tmp_path)
    assert recovered.tail == tuple(entries(index + 1, index + 3, term=3))
    assert recovered.term_runs == ((index + 1, 3),)


def test_reset_when_the_disk_has_no_room_then_nothing_is_changed(tmp_path: Path) -> None:
    """So that it is tried again when there is some."""
    write_segments(tmp_path)
    watched = WatchedDisk()
    with open_log(tmp_path, disk=watched.disk()) as log:
        log.append(HardState(3, None), [])
        held = log.first_index, log.last_index
        watched.room_bytes = 0
        with pytest.raises(DiskRefusesError):
            log.reset(100, 2)
        assert (log.first_index, log.last_index) == held
        assert log.read(held[1], held[1], 1000) == [entry(held[1])]
        watched.room_bytes = sys.maxsize

        log.reset(100, 2)

        assert (log.first_index, log.last_index) == (101, 100)
    assert recover(tmp_path).last_index == 100


def test_reset_when_asked_for_what_cannot_be_then_refused(tmp_path: Path) -> None:
    """A term that this server never heard of is our bug; a log without a member has no state."""
    write_segments(tmp_path / "named")
    with open_log(tmp_path / "named") as log, pytest.raises(AssertionError):
        log.reset(50, 2)

    assert recover(tmp_path / "named").last_index == 40
    log = ReplicationLog(tmp_path / "nameless", fsync=False)
    with pytest.raises(AssertionError):
        log.reset(0, 0)
    log.close()


def test_reset_when_segments_go_then_the_new_one_is_durable_first(tmp_path: Path) -> None:
    """At every moment one of the two logs is whole on the disk."""
    write_segments(tmp_path)
    old = segments(tmp_path)
    watched = WatchedDisk()
    with open_log(tmp_path, fsync=True, disk=watched.disk()) as log:
        watched.take()
        log.reset(100, 1)
        (new,) = segments(tmp_path)

    calls = watched.take()
    assert calls[:3] == [("pwrite", new.name), ("fdatasync", new.name), ("fsync", tmp_path.name)]
    assert calls[3::2] == [("unlink", path.name) for path in old]
    assert set(calls[4::2]) == {("fsync", tmp_path.name)}


def test_open_when_a_reset_was_interrupted_then_what_it_hid_is_not_even_read(
    tmp_path: Path,
) -> None:
    """Once the new segment is there, gaps and damage before it mean nothing; the rest is removed.

    Removed only when the new one is durable for certain: a crash may have come before its sync.
    """
    write_segments(tmp_path)
    watched = WatchedDisk()
    with open_log(tmp_path, fsync=True, disk=watched.disk()) as log:
        watched.take()
        watched.calls_max = 3
        with pytest.raises(OSError, match="stopped"):
            log.reset(100, 1)
    old = segments(tmp_path)[:-1]
    old[2].unlink()
    flip(old[0], 5)
    flip(old[4], record_ends(old[4])[0] + 20)

    watched = WatchedDisk()
    with open_log(tmp_path, fsync=True, disk=watched.disk()) as log:
        assert log.recovered == Recovered(VOTE, 101, 1, 100, (), (), ())
        calls = watched.take()
    assert first_indexes(tmp_path) == [101]
    assert calls[: calls.index(("unlink", old[0].name))] == [
        ("pwrite", segments(tmp_path)[0].name),
        ("fdatasync", segments(tmp_path)[0].name),
        ("fsync", tmp_path.name),
    ]


# ---- Crashes between any two steps -------------------------------------------------------------


def _outcomes(
    directory: Path, change: Callable[[ReplicationLog], object], *, power_loss: bool
) -> list[Recovered]:
    """What is recovered if the process, or the power, is gone after 0, 1, 2 ... calls."""
    write_segments(directory / "whole")
    outcomes: list[Recovered] = []
    for calls_max in range(1000):
        copy = directory / str(calls_max)
        shutil.copytree(directory / "whole", copy)
        power, watched = PowerLossDisk(), WatchedDisk()
        disk = power.disk() if power_loss else watched.disk()
        done = False
        with open_log(copy, fsync=True, disk=disk, tail_bytes_max=1 << 20) as log:
            watched.take()
            watched.calls_max = power.syncs_left = calls_max
            with suppress(OSError):
                change(log)
                done = True
        if power_loss:
            power.lose_power(copy, lambda low, _high: low)
        # The second finds what the first left.
        outcomes += [recover(copy), recover(copy)]
        assert outcomes[-1] == outcomes[-2]
        with open_log(copy) as log:
            last = log.last_index + 1
            log.append(None, [entry(last, log.recovered.hard_state.term)])
        assert recover(copy).last_index == last
        if done:
            return outcomes
    raise AssertionError("it never came to an end")


@pytest.mark.parametrize("power_loss", [False, True])
def test_drop_before_when_stopped_at_any_call_then_no_other_entry_is_lost(
    tmp_path: Path, power_loss: bool
) -> None:
    """Entries are dropped step by step, from the front."""
    outcomes = _outcomes(tmp_path, lambda log: log.drop_before(30), power_loss=power_loss)

    firsts = [recovered.first_index for recovered in outcomes]
    assert firsts == sorted(firsts)
    assert len(set(firsts)) > 4
    assert 25 < firsts[-1] <= 30
    for recovered in outcomes:
        assert recovered.tail == tuple(entries(recovered.first_index, 40))
        assert recovered.hard_state == VOTE
        assert recovered.base_term == (0 if recovered.first_index == 1 else 1)


@pytest.mark.parametrize("power_loss", [False, True])
@pytest.mark.parametrize("index", [20, 100])
def test_reset_when_stopped_at_any_call_then_the_old_log_or_the_new_is_there(
    tmp_path: Path, power_loss: bool, index: int
) -> None:
    """Never a part of the old one, and never a log that forgot its vote."""
    outcomes = _outcomes(tmp_path, lambda log: log.reset(index, 1), power_loss=power_loss)

    new = Recovered(VOTE, index + 1, 1, index, (), (), ())
    news = [recovered == new for recovered in outcomes]
    assert news == sorted(news)
    assert set(news) == {False, True}
    for recovered in outcomes:
        if recovered != new:
            assert (recovered.hard_state, recovered.first_index) == (VOTE, 1)
            assert recovered.tail == tuple(entries(1, 40))


@pytest.mark.slow
@pytest.mark.parametrize("power_loss", [False, True])
def test_append_when_stopped_at_any_call_while_replacing_then_all_of_it_or_nothing(
    tmp_path: Path, power_loss: bool
) -> None:
    """A replacement that needs a segment of its own counts from its record on."""

    def replace(log: ReplicationLog) -> None:
        log.append(HardState(2, None), entries(4, 6, term=2))

    outcomes = _outcomes(tmp_path, replace, power_loss=power_loss)

    for recovered in outcomes:
        if recovered.hard_state == VOTE:
            assert recovered.tail == tuple(entries(1, 40))
        else:
            assert recovered.tail == (*entries(1, 3), *entries(4, 6, term=2))
    assert outcomes[0] != outcomes[-1]


# ---- Damage to what a segment knows ------------------------------------------------------------


def test_open_when_a_segment_lost_a_vote_then_refused(tmp_path: Path) -> None:
    """The next segment knows the hard state under which it was begun."""
    write_log(tmp_path, entries(1, 2))
    segment = segments(tmp_path)[0]
    with open_log(tmp_path) as log:
        log.append(HardState(2, "b" * 16), [])
    start = record_ends(segment)[-2]
    with open_log(tmp_path, segment_bytes_max=1) as log:
        log.append(None, [entry(3)])

    segment.write_bytes(segment.read_bytes()[:start])
    with pytest.raises(CorruptLogError, match="continues under"):
        recover(tmp_path)


def test_open_when_identity_is_missing_beside_an_empty_log_with_a_vote_then_refused(
    tmp_path: Path,
) -> None:
    """A log that begins anew holds a promise even without a record."""
    write_segments(tmp_path)
    with open_log(tmp_path) as log:
        log.reset(50, 1)
    (tmp_path / "identity.json").unlink()

    with pytest.raises(CorruptLogError, match="identity is missing"):
        recover(tmp_path)


# ---- Readers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [lambda log: log.drop_before(30), lambda log: log.reset(50, 1)], ids=["drop", "reset"]
)
def test_read_when_the_segment_is_dropped_meanwhile_then_index_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[ReplicationLog], object]
) -> None:
    """The reader has looked up where to read, and finds the file gone."""
    write_segments(tmp_path)
    with open_log(tmp_path) as log:
        look_up = log._index.runs

        def look_up_and_drop(*args: int) -> object:
            runs = look_up(*args)
            change(log)
            return runs

        monkeypatch.setattr(log._index, "runs", look_up_and_drop)
        with pytest.raises(IndexError, match="dropped"):
            log.read(1, 3, 1000)


@pytest.mark.usefixtures("restless_threads")
def test_read_when_another_thread_drops_and_resets_then_right_entries_or_index_error(
    tmp_path: Path,
) -> None:
    """A file stays open as long as anyone reads it: its number cannot come to mean another."""
    seed = 11
    chance = random.Random(seed)
    done = threading.Event()

    def read_on(log: ReplicationLog) -> int:
        reads = 0
        while not done.is_set():
            first = log.first_index
            try:
                found = log.read(first, first + 5, 1 << 20)
            except IndexError:
                continue
            assert found == entries(first, first + 5), f"{seed=}"
            reads += 1
        return reads

    with open_log(tmp_path, segment_bytes_max=500) as log, ThreadPoolExecutor() as pool:
        log.append(VOTE, [])
        readers = [pool.submit(read_on, log) for _ in range(2)]
        try:
            for _ in range(1500):
                last = log.last_index
                log.append(None, entries(last + 1, last + 5))
                if chance.random() < 0.3:
                    log.drop_before(last - 10)
                if chance.random() < 0.01:
                    log.reset(last + 100, 1)
        finally:
            done.set()
        assert all(reader.result() > 0 for reader in readers)


def test_log_when_segments_come_and_go_then_files_stay_few(tmp_path: Path) -> None:
    """A log that lives for years keeps neither files nor their numbers."""
    with open_log(tmp_path, segment_bytes_max=500) as log:
        log.append(VOTE, [])
        open_files = []
        for first in range(1, 1000, 5):
            log.append(None, entries(first, first + 4))
            log.drop_before(first)
            open_files.append(len(os.listdir("/proc/self/fd")))
        assert len(log._index._firsts) < 10
        assert log.size_bytes < 2000

    assert max(open_files) - min(open_files) <= 2
    assert len(segments(tmp_path)) <= 3
    assert recover(tmp_path).last_index == 1000
