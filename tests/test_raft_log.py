"""The log as the core sees it: its terms, its window in memory, its way to the disk."""

from __future__ import annotations

import random

import pytest

from raft_log import MembershipLog, RaftLog, entry_bytes
from raft_types import Entry, EntryKind, Membership, Snapshot
from tests.raft_servers import log_of, membership, runs_of


def make_log(*terms: int, window_bytes_max: int = 1 << 20) -> RaftLog:
    entries = log_of(*terms)
    return RaftLog(len(entries), runs_of(entries), entries, window_bytes_max=window_bytes_max)


def test_term_at_knows_every_index_of_the_log() -> None:
    """Terms come in runs; 0 is the term before the first entry."""
    log = make_log(1, 1, 4, 4, 4, 6)

    assert [log.term_at(i) for i in range(7)] == [0, 1, 1, 4, 4, 4, 6]
    assert log.last_term == 6


@pytest.mark.parametrize("index", [-1, 3])
def test_term_at_raises_outside_the_log(index: int) -> None:
    """There is no guess about an entry that is not there."""
    with pytest.raises(IndexError):
        make_log(1, 1).term_at(index)


def test_empty_log_ends_at_zero_of_term_zero() -> None:
    """Index 0 and term 0 always match: the first append starts there."""
    log = RaftLog()

    assert (log.last_index, log.last_term) == (0, 0)
    assert log.matches(0, 0)
    assert not log.matches(1, 0)


@pytest.mark.parametrize(
    ("last_index", "last_term", "up_to_date"),
    [
        (3, 2, True),  # equal
        (4, 2, True),  # longer
        (2, 2, False),  # shorter
        (1, 3, True),  # shorter, but of a later term
        (9, 1, False),  # longer, but of an earlier term
    ],
)
def test_up_to_date_compares_last_terms_then_lengths(
    last_index: int, last_term: int, up_to_date: bool
) -> None:
    """The later term wins; with equal terms the longer log.

    Source: paper 5.4.1, raft-traps T16.
    """
    assert make_log(1, 1, 2).is_up_to_date(last_index, last_term) is up_to_date


@pytest.mark.parametrize(
    ("index", "term", "expected"),
    [(6, 5, 6), (6, 4, 4), (9, 9, 6), (3, 4, 3), (6, 3, 2), (6, 0, 0), (0, 5, 0)],
)
def test_last_index_up_to_term_skips_whole_terms(index: int, term: int, expected: int) -> None:
    """A refused append is backed up by terms, not by entries.

    Source: paper 5.3 (the end).
    """
    assert make_log(1, 1, 4, 4, 5, 5).last_index_up_to_term(index, term) == expected


@pytest.mark.parametrize(("index", "term"), [(4, 1), (2, 1), (3, 0)])
def test_append_refuses_a_gap_a_repetition_and_an_older_term(index: int, term: int) -> None:
    """The log is contiguous and its terms never decrease; a caller that errs must be stopped."""
    log = make_log(1, 1)

    with pytest.raises(AssertionError):
        log.append([Entry(index, term, EntryKind.NOOP, b"")])


def test_truncate_takes_the_entries_and_their_terms() -> None:
    """What conflicts goes from the window, the terms and the count of stable entries."""
    log = make_log(1, 2, 2, 3)

    log.truncate_from(3)

    assert (log.last_index, log.last_term, log.stable_index) == (2, 2, 2)
    assert log.entries(1, 1 << 20) == tuple(log_of(1, 2))


def test_truncate_below_the_window_leaves_an_empty_window() -> None:
    """A long divergence may end before what is in memory; appending goes on from there."""
    entries = log_of(1, 1, 1, 1)
    log = RaftLog(4, runs_of(entries), entries[3:])

    log.truncate_from(2)
    log.append([Entry(2, 5, EntryKind.COMMAND, b"new")])

    assert log.entries(1, 100) is None
    assert log.entries(2, 100) == (Entry(2, 5, EntryKind.COMMAND, b"new"),)
    assert log.take_unwritten() == (Entry(2, 5, EntryKind.COMMAND, b"new"),)


def test_entries_stops_at_the_byte_limit_but_gives_at_least_one() -> None:
    """A batch is bounded, and an entry above the bound must still travel.

    Source: raft-traps T34.
    """
    log = make_log(1, 1, 1)
    size_bytes = entry_bytes(log_of(1)[0])

    assert len(log.entries(1, size_bytes * 2) or ()) == 2
    assert len(log.entries(1, 1) or ()) == 1
    assert len(log.entries(2, 1 << 20) or ()) == 2
    assert log.entries(4, 1 << 20) == ()


def test_take_unwritten_hands_out_each_entry_once() -> None:
    """What is on its way to the disk is not written a second time."""
    log = RaftLog()
    log.append(log_of(1, 1))

    assert log.take_unwritten() == tuple(log_of(1, 1))
    assert not log.has_unwritten
    assert log.stable_index == 0


def test_written_counts_what_is_still_in_the_log() -> None:
    """A write that ends after its entries were replaced says nothing about the new ones."""
    log = RaftLog()
    log.append(log_of(1, 1))
    (_, last) = log.take_unwritten()
    log.truncate_from(2)
    log.append([Entry(2, 2, EntryKind.COMMAND, b"other")])

    log.written(last)

    assert log.stable_index == 0
    (other,) = log.take_unwritten()
    log.written(other)
    assert log.stable_index == 2


def test_trim_keeps_what_is_not_durable_or_not_applied() -> None:
    """An entry leaves memory only when it is on disk and in the state machine."""
    log = make_log(1, 1, 1, 1, window_bytes_max=0)
    log.append([Entry(5, 1, EntryKind.COMMAND, b"not durable")])

    log.trim(2)

    assert log.entries(2, 100) is None
    assert log.entries(3, 100) is not None
    log.trim(5)
    assert log.entries(4, 100) is None
    assert log.entries(5, 100) is not None


def test_trim_within_the_budget_keeps_everything() -> None:
    """A follower that lags a little is served from memory."""
    log = make_log(1, 1, 1)

    log.trim(3)

    assert log.entries(1, 100) is not None


# ---- Without its beginning (paper section 7) ---------------------------------------------------


def compacted_log() -> RaftLog:
    """Entries 4, 5 and 6 of the terms 2, 4 and 4; the base is 3, of term 2."""
    log = make_log(1, 2, 2, 2, 4, 4)
    log.compact(4)
    return log


def test_compacted_log_knows_the_term_of_its_base_and_none_before_it() -> None:
    """The base is what the first append after it is checked against.

    Source: paper section 7; raft-traps T38.
    """
    log = compacted_log()

    assert (log.first_index, log.last_index) == (4, 6)
    assert [log.term_at(i) for i in range(3, 7)] == [2, 2, 4, 4]
    with pytest.raises(IndexError, match="holds 4 to 6"):
        log.term_at(2)
    assert log.entries(3, 1 << 20) is None
    assert log.entries(4, 1 << 20) == tuple(log_of(1, 2, 2, 2, 4, 4)[3:])


def test_compacted_log_agrees_with_every_leader_before_its_base() -> None:
    """It was committed; at the base and after it the terms decide.

    Source: paper figure 3 (leader completeness); raft-traps T26.
    """
    log = compacted_log()

    assert log.matches(0, 0)
    assert log.matches(2, 9)
    assert log.matches(3, 2)
    assert not log.matches(3, 1)
    assert not log.matches(7, 4)


@pytest.mark.parametrize(
    ("index", "term", "expected"), [(6, 3, 4), (6, 2, 4), (9, 4, 6), (3, 2, 3), (1, 1, 1)]
)
def test_last_index_up_to_term_of_a_compacted_log(index: int, term: int, expected: int) -> None:
    """As before, down to the base; further down no one knows better."""
    assert compacted_log().last_index_up_to_term(index, term) == expected


def test_last_index_up_to_term_says_when_it_lies_before_the_base() -> None:
    """All that the log knows is newer."""
    assert compacted_log().last_index_up_to_term(6, 1) < 3


def test_compact_drops_only_what_is_stable_and_never_less() -> None:
    """What is not on disk has no other copy; a smaller first index is old news."""
    log = compacted_log()
    log.append([Entry(7, 4, EntryKind.COMMAND, b"not durable")])

    log.compact(2)
    assert log.first_index == 4
    with pytest.raises(AssertionError):
        log.compact(8)
    log.compact(7)

    assert (log.first_index, log.last_index, log.last_term) == (7, 7, 4)
    assert log.take_unwritten() == (Entry(7, 4, EntryKind.COMMAND, b"not durable"),)


def test_compacted_log_is_never_truncated_into_its_base() -> None:
    """That would be to replace a committed entry."""
    with pytest.raises(AssertionError):
        compacted_log().truncate_from(3)


def test_reset_log_is_empty_and_ends_at_its_base() -> None:
    """Up to date is who has as much as the state: raft-traps T16."""
    log = make_log(1, 1, 1)

    log.reset(9, 3)

    assert (log.first_index, log.last_index, log.last_term, log.stable_index) == (10, 9, 3, 9)
    assert not log.has_unwritten
    assert log.is_up_to_date(9, 3)
    assert not log.is_up_to_date(8, 3)
    assert not log.is_up_to_date(99, 2)
    log.append([Entry(10, 3, EntryKind.NOOP, b"")])
    assert [log.term_at(i) for i in (9, 10)] == [3, 3]


def test_write_from_before_a_reset_says_nothing() -> None:
    """Neither beyond the base nor before it."""
    log = RaftLog()
    log.append(log_of(1, 1, 1))
    *_, last = log.take_unwritten()
    log.reset(2, 2)
    log.append([Entry(3, 2, EntryKind.NOOP, b"")])

    log.written(last)
    log.written(log_of(1)[0])

    assert log.stable_index == 2


# ---- Against a model ---------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_log_equals_a_plain_list_whatever_is_done_to_it(seed: int) -> None:
    """Random appends, truncations, writes, trims and compactions, against a list of entries."""
    rng = random.Random(seed)
    log, model, stable, base = RaftLog(window_bytes_max=200), list[Entry](), 0, 0
    for _ in range(200):
        if rng.random() < 0.2 and len(model) > base:
            index = rng.randint(base + 1, len(model))
            log.truncate_from(index)
            del model[index - 1 :]
            stable = min(stable, len(model))
        elif rng.random() < 0.3 and log.has_unwritten:
            unwritten = log.take_unwritten()
            log.written(unwritten[-1])
            stable = len(model)
        elif rng.random() < 0.3:
            log.trim(rng.randint(0, stable))
        elif rng.random() < 0.2:
            base = rng.randint(base, stable)
            log.compact(base + 1)
        elif rng.random() < 0.05 and len(model) > base:
            base = stable = len(model) - 1
            del model[base:]
            log.reset(base, model[-1].term if base else 0)
        else:
            term = max(1, log.last_term + rng.randint(0, 1))
            new = [
                Entry(len(model) + 1 + i, term, EntryKind.COMMAND, bytes(rng.randint(0, 40)))
                for i in range(rng.randint(1, 4))
            ]
            log.append(new)
            model += new

        assert (log.first_index, log.last_index) == (base + 1, len(model))
        assert log.stable_index == stable
        assert [log.term_at(e.index) for e in model[base:]] == [e.term for e in model[base:]]
        assert log.term_at(base) == (model[base - 1].term if base else 0)
        for first in range(1, len(model) + 1):
            held = log.entries(first, 1 << 20)
            assert held is None or list(held) == model[first - 1 :]
        assert log.entries(stable + 1, 1 << 20) is not None, "not on disk and not in memory"


# ---- Memberships -------------------------------------------------------------------------------


def membership_log() -> MembershipLog:
    """a founded, b joined with entry 5, c with entry 9."""
    return MembershipLog("a", [(9, membership("abc")), (1, membership("a")), (5, membership("ab"))])


def test_membership_log_knows_who_was_a_member_when() -> None:
    """The latest is in force; for a state it is the one of its index."""
    log = membership_log()

    assert (log.latest_index, log.latest) == (9, membership("abc"))
    assert log.at(8) == (5, membership("ab"))
    assert log.at(9) == (9, membership("abc"))
    assert log.at(0) == (0, Membership())


def test_membership_log_without_entries_has_no_members() -> None:
    """A server that waits to be added."""
    log = MembershipLog("a", [])

    assert (log.latest_index, log.latest) == (0, Membership())


def test_membership_log_that_is_compacted_keeps_the_change_that_is_in_force_there() -> None:
    """Its entry is gone, what it said is not.

    Source: raft-traps T38, T64.
    """
    log = membership_log()

    log.compact(8)

    assert log.at(7) == (5, membership("ab"))
    assert log.at(4) == (0, Membership())
    assert log.latest == membership("abc")


def test_membership_log_takes_the_state_for_what_came_before_it() -> None:
    """Changes after it stay, until they are truncated."""
    log = membership_log()

    log.restore(Snapshot(7, 2, membership("abx"), 6), 7)

    assert log.at(7) == (6, membership("abx"))
    assert log.latest == membership("abc")
    log.truncate_from(9)
    assert log.latest == membership("abx")
