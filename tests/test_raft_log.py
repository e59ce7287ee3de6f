"""The log as the core sees it: its terms, its window in memory, its way to the disk."""

from __future__ import annotations

import random

import pytest

from raft_log import RaftLog, entry_bytes
from raft_types import Entry, EntryKind
from tests.raft_servers import log_of, runs_of


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


@pytest.mark.parametrize("seed", range(20))
def test_log_equals_a_plain_list_whatever_is_done_to_it(seed: int) -> None:
    """Random appends, truncations, writes and trims, against a list of entries."""
    rng = random.Random(seed)
    log, model, stable = RaftLog(window_bytes_max=200), list[Entry](), 0
    for _ in range(200):
        if rng.random() < 0.2 and model:
            index = rng.randint(1, len(model))
            log.truncate_from(index)
            del model[index - 1 :]
            stable = min(stable, len(model))
        elif rng.random() < 0.3 and log.has_unwritten:
            unwritten = log.take_unwritten()
            log.written(unwritten[-1])
            stable = len(model)
        elif rng.random() < 0.3:
            log.trim(rng.randint(0, stable))
        else:
            term = max(1, log.last_term + rng.randint(0, 1))
            new = [
                Entry(len(model) + 1 + i, term, EntryKind.COMMAND, bytes(rng.randint(0, 40)))
                for i in range(rng.randint(1, 4))
            ]
            log.append(new)
            model += new

        assert (log.last_index, log.stable_index) == (len(model), stable)
        assert [log.term_at(e.index) for e in model] == [e.term for e in model]
        for first in range(1, len(model) + 1):
            held = log.entries(first, 1 << 20)
            assert held is None or list(held) == model[first - 1 :]
        assert log.entries(stable + 1, 1 << 20) is not None, "not on disk and not in memory"
