"""Raft by section 7 of the paper: states that take the place of the log's beginning.

Stories with chunks that are lost, and crashes while a state is installed: ``scenarios/snapshot*.txt``.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from raft_core import RaftCore
from raft_progress import ProgressState
from raft_types import (
    AppendEntries,
    AppendReply,
    EntriesOnDisk,
    Entry,
    EntryKind,
    HardState,
    Membership,
    Role,
    Snapshot,
    SnapshotChunk,
    SnapshotDue,
    SnapshotOutcome,
    SnapshotReply,
    VoteReply,
    VoteRequest,
)
from tests.raft_servers import (
    CONFIG,
    SimDisk,
    SimState,
    acknowledge,
    answer,
    append,
    appends,
    flush,
    lead,
    log_of,
    membership,
    replies,
    server,
    terms,
    time_out,
)


def snapshot_at(index: int, term: int = 1, members: Membership | None = None) -> Snapshot:
    return Snapshot(index, term, members or membership("abc"), 0)


def chunk(term: int = 1, offset: int = 0, sender: str = "b") -> SnapshotChunk:
    return SnapshotChunk(sender, "a", term, 7, offset, b"bytes", False)


def restored(
    index: int = 5, term: int = 1, *, name: str = "a", log: Sequence[Entry] = ()
) -> RaftCore:
    """A follower that has restored a state and written what that asks for."""
    core = server(name, log=log, term=term)
    core.step(chunk(term))
    core.restore(snapshot_at(index, term))
    flush(core)
    return core


def compacted_leader(first: int = 4) -> RaftCore:
    """Leader a of term 2 with entries up to 5, all committed; its log begins at ``first``."""
    core = lead(server(log=log_of(1, 1, 1, 1)))
    core.compacted_to(first)
    return core


def leader_that_lacks_what_c_needs() -> RaftCore:
    """The same, and c has refused: it has nothing at all."""
    core = compacted_leader()
    core.link_up("c")
    core.progress["c"].match_index = 0
    core.progress["c"].probe_from(6)
    core.step(AppendReply("c", "a", 2, False, 0, 0, 5, 0, 0))
    return core


def ticks_until_campaign(core: RaftCore) -> int:
    for ticks in range(1, 100):
        core.tick()
        if core.role is not Role.FOLLOWER:
            return ticks
    raise AssertionError("never campaigned")


# ---- The follower: chunks ----------------------------------------------------------------------


def test_chunk_of_an_older_term_is_answered_with_the_newer_one() -> None:
    """A stale leader learns that it is stale, and nothing of its state is taken.

    Source: paper figure 13 (receiver 1).
    """
    core = server(term=5)
    stale = chunk(4)

    assert replies(core, stale) == [AppendReply("a", "b", 5, False, 0, 0)]
    core.answer_chunk(stale, 5, SnapshotOutcome.MORE)

    assert flush(core) == []


@pytest.mark.parametrize("role", [Role.FOLLOWER, Role.CANDIDATE])
def test_chunk_of_a_newer_term_makes_a_follower_of_its_sender(role: Role) -> None:
    """It comes from a leader, like an append.

    Source: paper 5.1 and section 7.
    """
    core = server()
    if role is Role.CANDIDATE:
        time_out(core)
        replies(core, VoteReply("b", "a", 1, True, True))

    core.step(chunk(3))

    assert (core.role, core.term, core.leader_id) == (Role.FOLLOWER, 3, "b")


def test_every_chunk_is_a_sign_of_life_of_the_leader() -> None:
    """However long a state travels, its receiver does not campaign.

    Source: raft-traps T42.
    """
    core = server()
    for _ in range(CONFIG.election_ticks_max * 3):
        core.tick()
        core.step(chunk())

    assert (core.role, core.leader_id) == (Role.FOLLOWER, "b")
    assert ticks_until_campaign(core) >= CONFIG.election_ticks_min


def test_answer_to_a_chunk_leaves_when_its_term_is_durable() -> None:
    """It names a term, so it waits for the disk like any message.

    Source: raft-traps T1.
    """
    core = server()
    first = chunk(3)
    core.step(first)
    core.answer_chunk(first, 5, SnapshotOutcome.MORE)

    ready = core.ready()

    assert ready is not None
    assert ready.hard_state == HardState(3, None)
    assert ready.messages == (SnapshotReply("a", "b", 3, 7, 5, SnapshotOutcome.MORE),)


# ---- The follower: restoring (paper figure 13) -------------------------------------------------


def test_state_that_is_ahead_of_the_log_empties_it() -> None:
    """The log begins after the state, which is committed and applied.

    Source: paper figure 13 (receiver 7).
    """
    core = restored(5, log=log_of(1, 1))

    assert (core.log.first_index, core.log.last_index, core.commit_index) == (6, 5, 5)
    assert core.log.stable_index == 5
    assert core.entries_to_apply(6, 1 << 20) == ()
    reply = answer(core, append(1, Entry(6, 1, EntryKind.COMMAND, b"x"), after=(5, 1), commit=6))
    assert (reply.success, core.commit_index) == (True, 6)


def test_log_that_agrees_with_the_state_keeps_what_follows_it() -> None:
    """Those entries were acknowledged: a leader may count on them.

    Source: paper figure 13 (receiver 6); raft-traps T39.
    """
    core = server(log=log_of(1, 1, 2, 2), term=2)

    core.restore(snapshot_at(3, 2))

    assert (terms(core), core.commit_index) == ([1, 1, 2, 2], 3)
    assert core.ready() is None  # nothing to write, above all no log to empty


def test_log_that_differs_at_the_state_is_emptied() -> None:
    """What follows an entry that was never committed was not committed either.

    Source: paper figure 13 (receiver 7); raft-traps T39.
    """
    core = server(log=log_of(1, 1, 1, 1), term=2)

    core.restore(snapshot_at(3, 2))

    assert (core.log.first_index, core.log.last_index, core.log.last_term) == (4, 3, 2)
    assert core.truncated_count == 1


def test_state_that_takes_the_place_of_what_it_had_led_is_told() -> None:
    """With asynchronous replication it had answered for that (promise G1).

    For any other server it is nothing out of the way: it was behind.
    """
    old_leader = server(log=log_of(1, 2, 2, 2), term=2, voted_for="a")
    follower = server(log=log_of(1, 2, 2, 2), term=2, voted_for="b")

    for core in (old_leader, follower):
        core.restore(snapshot_at(10, 3))

    assert old_leader.take_notices() == ["rolled back entries=4 at most"]
    assert follower.take_notices() == []


@pytest.mark.parametrize("index", [1, 3])
def test_state_that_is_no_news_changes_nothing(index: int) -> None:
    """A server never goes back behind what it has committed.

    Source: raft-traps T39.
    """
    core = server()
    answer(core, append(1, *log_of(1, 1, 1, 1), commit=3))

    core.restore(snapshot_at(index))

    assert (core.commit_index, core.log.first_index, core.log.last_index) == (3, 1, 4)
    assert core.ready() is None


def test_ready_says_that_the_log_is_to_be_emptied_before_the_answer_leaves() -> None:
    """State, then log, then the word that both are there.

    Source: raft-traps T37.
    """
    core = server(log=log_of(1))
    last = chunk()
    core.step(last)
    core.restore(snapshot_at(5))
    core.answer_chunk(last, 0, SnapshotOutcome.INSTALLED)
    new = Entry(6, 1, EntryKind.COMMAND, b"x")
    core.step(append(1, new, after=(5, 1)))

    ready = core.ready()

    assert ready is not None
    assert (ready.log_base, ready.entries) == ((5, 1), (new,))
    assert [type(message) for message in ready.messages] == [SnapshotReply, AppendReply]
    core.advance(ready)
    assert core.ready() is None


def test_write_of_the_old_log_that_ends_after_the_state_came_counts_for_nothing() -> None:
    """The disk was busy with entries that are gone; the emptying comes after it.

    Source: raft-traps T36, T37.
    """
    core = server()
    core.step(append(1, *log_of(1, 1)))
    writing = core.ready()
    assert writing is not None
    core.restore(snapshot_at(5))
    core.step(append(1, Entry(6, 1, EntryKind.COMMAND, b"x"), after=(5, 1)))

    assert core.ready() is None
    core.advance(writing)

    assert core.log.stable_index == 5
    ready = core.ready()
    assert ready is not None
    assert ready.log_base == (5, 1)


def test_membership_of_the_state_is_in_force_and_what_is_truncated_falls_back_to_it() -> None:
    """Who belongs to the cluster travels with the state.

    Source: paper section 7 ("the latest configuration"); raft-traps T38, T41, T64.
    """
    core = server("z", "")
    core.restore(Snapshot(5, 1, membership("abz"), 3))
    assert core.membership == membership("abz")

    entry = Entry(6, 1, EntryKind.MEMBERSHIP, membership("abz", "d").encode())
    core.step(AppendEntries("a", "z", 1, 5, 1, (entry,), 0, 1))
    assert core.membership == membership("abz", "d")
    core.step(AppendEntries("b", "z", 2, 5, 1, (Entry(6, 2, EntryKind.NOOP, b""),), 0, 1))

    assert core.membership == membership("abz")
    assert core.membership_at(5) == (3, membership("abz"))


def test_membership_in_a_log_that_differs_from_the_state_goes_with_it() -> None:
    """It was never committed: who still counted by it would take a minority for a majority.

    Source: raft-traps T38, T62.
    """
    change = Entry(4, 1, EntryKind.MEMBERSHIP, membership("abcd").encode())
    core = server(log=[*log_of(1, 1, 1), change], term=2)
    assert core.membership == membership("abcd")

    core.restore(snapshot_at(3, 2))

    assert core.membership == membership("abc")
    assert core.membership_at(3) == (0, membership("abc"))


def test_membership_in_the_kept_part_of_the_log_stays_in_force() -> None:
    """The state's is the older one."""
    core = server()
    entry = Entry(3, 1, EntryKind.MEMBERSHIP, membership("abc", "d").encode())
    core.step(append(1, *log_of(1, 1), entry))

    core.restore(snapshot_at(2))

    assert core.membership == membership("abc", "d")
    assert core.membership_at(2) == (0, membership("abc"))


def test_candidate_may_restore_a_state_that_arrived_before_its_timeout() -> None:
    """A state holds only what is committed, whatever has happened since it was sent."""
    core = server()
    time_out(core)
    replies(core, VoteReply("b", "a", 1, True, True))
    assert (core.role, core.term) == (Role.CANDIDATE, 1)

    core.restore(snapshot_at(5))
    core.step(VoteReply("b", "a", 1, True, False))

    assert (core.role, core.log.last_index) == (Role.LEADER, 6)


# ---- A log without its beginning ---------------------------------------------------------------


def test_server_starts_from_its_state_and_its_log() -> None:
    """What the state has is committed; what follows is learned from a leader.

    Source: paper section 7; raft-traps T9, T38.
    """
    disk = SimDisk(membership("abc"))
    disk.write(HardState(2, None), log_of(1, 1, 2, 2))
    disk.save(SimState(snapshot_at(3, 2), tuple(log_of(1, 1, 2))))
    disk.drop_before(3)

    core = disk.start("a", CONFIG, random.Random(1))

    assert (core.commit_index, core.log.first_index, core.log.last_index) == (3, 3, 4)
    assert core.entries_to_apply(4, 1 << 20) == ()
    assert core.membership == membership("abc")


@pytest.mark.parametrize(
    ("log", "why"),
    [((1, 1), "the log ends before the state"), ((1, 1, 1, 1), "an entry was never committed")],
)
def test_server_whose_log_does_not_meet_its_state_starts_without_the_log(
    log: tuple[int, ...], why: str
) -> None:
    """A crash came after a state was installed and before the log was emptied.

    Source: paper figure 13 (receiver 7); raft-traps T37.
    """
    disk = SimDisk(membership("abc"))
    disk.write(HardState(2, None), log_of(*log))
    disk.save(SimState(snapshot_at(3, 2), tuple(log_of(1, 1, 2))))

    core = disk.start("a", CONFIG, random.Random(1))

    assert (core.log.first_index, core.log.last_index, core.log.last_term) == (4, 3, 2), why


def test_server_starts_in_the_term_of_its_state_if_a_crash_took_the_hard_state() -> None:
    """The state was in place before the term in which it came was saved: no vote left in that term.

    Source: paper figure 2 (a term never decreases).
    """
    disk = SimDisk(membership("abc"))
    disk.write(HardState(2, "b"), log_of(1))
    disk.save(SimState(snapshot_at(3, 4), tuple(log_of(1, 1, 4))))

    core = disk.start("a", CONFIG, random.Random(1))

    assert disk.hard_state == HardState(4, None)
    assert (core.term, core.voted_for) == (4, None)


@pytest.mark.parametrize(
    ("last_index", "last_term", "granted"), [(5, 3, True), (9, 2, False), (4, 3, False)]
)
def test_vote_compares_with_the_state_where_the_log_is_empty(
    last_index: int, last_term: int, granted: bool
) -> None:
    """The state's last index and term are the log's.

    Source: paper 5.4.1 and section 7; raft-traps T16.
    """
    core = restored(5, 3)
    for _ in range(CONFIG.election_ticks_min):
        core.tick()

    (reply,) = replies(core, VoteRequest("b", "a", 4, last_index, last_term, False))

    assert isinstance(reply, VoteReply)
    assert reply.granted is granted


def test_candidate_names_the_end_of_its_state_where_its_log_is_empty() -> None:
    """Or nobody would vote for it.

    Source: paper 5.4.1 and section 7; raft-traps T16.
    """
    sent = time_out(restored(5, 3))

    assert {(m.last_index, m.last_term) for m in sent if isinstance(m, VoteRequest)} == {(5, 3)}


def test_append_right_after_the_state_is_checked_against_its_term() -> None:
    """The base of the log is as good as an entry.

    Source: paper section 7; raft-traps T26.
    """
    core = restored(5, 3)
    new = Entry(6, 3, EntryKind.COMMAND, b"x")

    reply = answer(core, append(3, new, after=(5, 3)))

    assert (reply.success, reply.match_index) == (True, 6)


@pytest.mark.parametrize(
    ("after", "count", "match_index"),
    [
        ((0, 0), 0, 0),  # a heartbeat while a snapshot travels
        ((1, 1), 2, 3),  # wholly before the base
        ((3, 1), 4, 7),  # across it
    ],
)
def test_append_from_before_the_state_is_taken_for_what_it_is(
    after: tuple[int, int], count: int, match_index: int
) -> None:
    """What was committed is the same in every leader's log: only what is new is added.

    Source: paper figure 3 (leader completeness); raft-traps T26, T38.
    """
    core = restored(5)
    entries = log_of(*[1] * 7)[after[0] : after[0] + count]

    reply = answer(core, append(1, *entries, after=after, heartbeat=1))

    assert (reply.success, reply.match_index) == (True, match_index)
    assert (core.log.first_index, core.log.last_index) == (6, max(5, match_index))


def test_follower_with_a_state_refuses_no_further_back_than_the_state() -> None:
    """A leader has what is committed, so that is where the logs agree at the latest.

    Source: paper 5.3 and section 7.
    """
    core = restored(5, 1)
    answer(core, append(2, Entry(6, 2, EntryKind.COMMAND, b"x"), after=(5, 1)))

    reply = answer(core, append(3, after=(9, 1), heartbeat=1, sender="c"))

    assert (reply.success, reply.hint_index, reply.hint_term) == (False, 5, 1)


# ---- The leader --------------------------------------------------------------------------------


def test_leader_still_serves_a_follower_from_the_base_of_its_log() -> None:
    """The term before its first entry is known.

    Source: paper section 7; raft-traps T38.
    """
    core = compacted_leader(first=4)
    core.progress["c"].match_index = 0
    core.progress["c"].probe_from(6)

    core.step(AppendReply("c", "a", 2, False, 0, 0, 5, 3, 1))

    (message,) = appends(core, "c")
    assert (message.prev_index, message.prev_term) == (3, 1)
    assert [entry.index for entry in message.entries] == [4, 5]


@pytest.mark.parametrize("hint", [(0, 0), (2, 1), (5, 0)])
def test_follower_that_needs_what_is_gone_from_the_log_is_to_be_sent_the_state(
    hint: tuple[int, int],
) -> None:
    """The log begins after what it needs, or after where their terms could agree.

    Source: paper section 7.
    """
    core = compacted_leader()
    core.progress["c"].match_index = 0
    core.progress["c"].probe_from(6)

    core.step(AppendReply("c", "a", 2, False, 0, 0, 5, *hint))

    assert core.wants_append("c", commit_due=0)
    assert isinstance(core.append_for("c"), SnapshotDue)


def test_follower_that_is_overtaken_by_the_end_of_the_log_is_to_be_sent_the_state() -> None:
    """It was slow, and the tail of the log is bounded.

    Source: paper section 7; raft-traps T43.
    """
    core = lead()
    index = core.propose([b"x", b"y"])
    flush(core)
    acknowledge(core, "b")
    assert core.append_for("c") is not None  # in flight, and lost

    core.compacted_to(index + 2)
    core.link_up("c")

    assert core.append_for("c") == SnapshotDue(index)


def test_state_is_due_until_the_driver_begins_to_send_it() -> None:
    """And is not asked for twice.

    Source: raft-traps T42.
    """
    core = leader_that_lacks_what_c_needs()
    assert core.append_for("c") == SnapshotDue(1)
    assert core.append_for("c") == SnapshotDue(1)

    core.snapshot_started("c")

    assert core.append_for("c") is None
    assert not core.wants_append("c")


def test_only_heartbeats_flow_while_the_state_travels() -> None:
    """They claim nothing about the follower's log, and its answers say nothing about it.

    Source: paper section 7; raft-traps T42.
    """
    core = leader_that_lacks_what_c_needs()
    core.snapshot_started("c")
    core.propose([b"x"])
    flush(core)
    acknowledge(core, "b")
    assert core.append_for("c") is None
    core.read_index("r")

    (heartbeat,) = appends(core, "c")
    reply = answer(restored(3, name="c"), heartbeat)
    core.step(reply)

    assert heartbeat == AppendEntries("a", "c", 2, 0, 0, (), 0, core.round)
    assert (reply.success, reply.match_index) == (True, 0)
    assert core.take_reads() == [(6, ["r"])]  # but they prove the leadership
    assert core.progress["c"].state is ProgressState.SNAPSHOT


def test_answers_to_chunks_keep_the_leader_in_office() -> None:
    """A follower that is busy with a state is alive.

    Source: thesis 6.2 (check-quorum); raft-traps T42.
    """
    core = leader_that_lacks_what_c_needs()
    core.snapshot_started("c")

    for _ in range(CONFIG.election_ticks_max):
        core.step(SnapshotReply("c", "a", 2, 7, 5, SnapshotOutcome.MORE))
        core.step(SnapshotReply("z", "a", 2, 7, 5, SnapshotOutcome.MORE))  # a stranger
        core.tick()

    assert core.role is Role.LEADER


def test_after_the_state_the_log_goes_on_from_there() -> None:
    """The follower has what the state has.

    Source: paper section 7.
    """
    core = leader_that_lacks_what_c_needs()
    core.snapshot_started("c")
    core.propose([b"x"])

    core.snapshot_ended("c", 4)

    (message,) = appends(core, "c")
    assert (message.prev_index, [e.index for e in message.entries]) == (4, [5, 6])
    assert core.progress["c"].match_index == 4


def test_state_that_took_longer_than_the_log_lasts_is_followed_by_another() -> None:
    """The driver sees it by the next request; it should keep more of the log.

    Source: raft-traps T43.
    """
    core = leader_that_lacks_what_c_needs()
    core.snapshot_started("c")
    core.compacted_to(6)

    core.snapshot_ended("c", 4)

    assert core.append_for("c") == SnapshotDue(5)


def test_after_a_failed_transfer_the_follower_is_asked_anew() -> None:
    """It may have another log by now, or none.

    Source: raft-traps T42.
    """
    core = leader_that_lacks_what_c_needs()
    core.snapshot_started("c")

    core.snapshot_ended("c", None)
    assert core.append_for("c") is None
    for _ in range(CONFIG.heartbeat_ticks):
        core.tick()

    (probe,) = appends(core, "c")
    assert (probe.prev_index, probe.entries) == (5, ())


def test_transfer_of_an_earlier_leadership_ends_without_harm() -> None:
    """What it says of the follower is true all the same; a failure says nothing."""
    core = compacted_leader()
    core.snapshot_ended("z", 4)
    core.snapshot_ended("c", None)
    assert core.progress["c"].state is ProgressState.REPLICATE

    core.snapshot_ended("c", 4)

    assert core.progress["c"].match_index == 5


def test_log_that_becomes_shorter_does_not_interrupt_the_transfer() -> None:
    """Or a slow transfer would begin again and again, and never end.

    Source: raft-traps T42, T43.
    """
    core = leader_that_lacks_what_c_needs()
    core.snapshot_started("c")

    core.compacted_to(6)

    assert core.append_for("c") is None


def test_new_connection_does_not_interrupt_the_transfer() -> None:
    """Its driver repeats the chunk; only the heartbeat is repeated here.

    Source: raft-traps T42.
    """
    core = leader_that_lacks_what_c_needs()
    core.snapshot_started("c")
    core.read_index("r")
    appends(core, "c")

    core.link_up("c")

    (heartbeat,) = appends(core, "c")
    assert heartbeat.round == core.round
    assert core.progress["c"].state is ProgressState.SNAPSHOT


def test_late_refusal_does_not_interrupt_the_transfer() -> None:
    """It answers a question from before.

    Source: raft-traps T29.
    """
    core = leader_that_lacks_what_c_needs()
    core.snapshot_started("c")

    core.step(AppendReply("c", "a", 2, False, 0, 0, 5, 0, 0))
    core.step(AppendReply("c", "a", 2, False, 0, 0, 0, 0, 0))

    assert core.append_for("c") is None


def test_entries_read_from_disk_are_of_no_use_once_the_log_begins_after_them() -> None:
    """Reading took as long as the log lasted: the state is due instead.

    Source: raft-traps T38, T43.
    """
    entries = log_of(1, 1, 1, 1)
    disk = SimDisk(membership("abc"))
    disk.write(HardState(1, None), entries)
    core = lead(disk.start("a", CONFIG, random.Random(1), tail_count=1))
    core.progress["c"].match_index = 0
    core.progress["c"].probe_from(6)
    core.step(AppendReply("c", "a", 2, False, 0, 0, 5, 0, 0))
    assert core.append_for("c") == EntriesOnDisk(1, 5)

    core.compacted_to(4)

    assert core.append_with("c", entries) is None
    assert core.append_for("c") == SnapshotDue(1)


def test_log_is_not_compacted_beyond_what_is_committed() -> None:
    """What a state can't hold yet must stay.

    Source: raft-traps T37.
    """
    core = lead()
    core.propose([b"x"])
    flush(core)

    with pytest.raises(AssertionError):
        core.compacted_to(core.commit_index + 2)
