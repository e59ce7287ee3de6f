"""What the core hands out, and when: nothing before it is durable, nothing without a bound.

The rules of elections and replication are in ``test_raft_core.py``.
"""

from __future__ import annotations

import random

import pytest

import raft_progress
from raft_core import RaftCore, TooMuchUncommittedError
from raft_log import RaftLog, entry_bytes
from raft_types import (
    AppendReply,
    EntriesOnDisk,
    Entry,
    EntryKind,
    HardState,
    RaftConfig,
    Role,
    VoteReply,
    VoteRequest,
)
from tests.raft_servers import (
    CONFIG,
    acknowledge,
    answer,
    append,
    appends,
    elect,
    flush,
    lead,
    log_of,
    membership,
    server,
    time_out,
)

# ---- Durability (paper figure 2, thesis 10.2.1) ------------------------------------------------


def test_candidate_counts_its_own_vote_only_when_it_is_on_disk() -> None:
    """A crash in between would let it vote again in the same term.

    Source: paper figure 2 (persistent state); raft-traps T1.
    """
    core = server(voters="a")
    while core.role is Role.FOLLOWER:
        core.tick()

    ready = core.ready()
    assert ready is not None
    assert (core.role, ready.hard_state) == (Role.CANDIDATE, HardState(1, "a"))
    core.advance(ready)

    assert core.role is Role.LEADER


def test_candidate_asks_for_votes_together_with_its_own_on_disk() -> None:
    """No message of a term leaves before the term is durable.

    Source: paper figure 2 (persistent state); raft-traps T1.
    """
    core = server()
    time_out(core)
    core.step(VoteReply("b", "a", 1, True, True))

    ready = core.ready()

    assert ready is not None
    assert ready.hard_state == HardState(1, "a")
    assert [type(message) for message in ready.messages] == [VoteRequest, VoteRequest]


def test_leader_counts_its_own_copy_only_when_it_is_on_disk() -> None:
    """It may send before it has written, but not count; the others may commit without it.

    Source: thesis 10.2.1; raft-traps T4.
    """
    core = lead()
    index = core.propose([b"x"])
    assert core.wants_append("b")  # in parallel with the own write

    acknowledge(core, "b")
    assert core.commit_index == index - 1
    acknowledge(core, "c")

    assert core.commit_index == index
    flush(core)
    assert core.commit_index == index


def test_leader_alone_commits_when_its_disk_has_the_entry() -> None:
    """A cluster of one acknowledges nothing that a crash could take back.

    Source: raft-traps T5.
    """
    core = elect(server(voters="a"))
    index = core.propose([b"x"])

    ready = core.ready()
    assert ready is not None
    assert core.commit_index < index
    core.advance(ready)

    assert core.commit_index == index


def test_follower_acknowledges_with_the_entries_on_disk() -> None:
    """The reply leaves in the same Ready that writes what it claims.

    Source: paper figure 2 (AppendEntries); raft-traps T4.
    """
    core = server()
    core.step(append(1, *log_of(1, 1)))

    ready = core.ready()

    assert ready is not None
    assert ready.entries == tuple(log_of(1, 1))
    assert ready.hard_state == HardState(1, None)
    assert [type(message) for message in ready.messages] == [AppendReply]


def test_repeated_append_is_acknowledged_only_after_the_first_is_written() -> None:
    """The second copy writes nothing, but its answer must wait all the same.

    Source: raft-traps T4.
    """
    core = server()
    core.step(append(1, *log_of(1)))
    writing = core.ready()
    assert writing is not None

    core.step(append(1, *log_of(1)))

    assert core.ready() is None
    core.advance(writing)
    (reply,) = flush(core)
    assert isinstance(reply, AppendReply)
    assert reply.match_index == 1


def test_write_that_ends_after_its_entries_were_replaced_commits_nothing() -> None:
    """What a slow disk reports about an old entry says nothing about the new one.

    Source: raft-traps T4, T36.
    """
    core = server()
    core.step(append(1, *log_of(1, 1)))
    writing = core.ready()
    assert writing is not None
    core.step(append(2, Entry(2, 2, EntryKind.NOOP, b""), after=(1, 1), sender="c"))

    core.advance(writing)

    assert core.log.stable_index < 2
    ready = core.ready()
    assert ready is not None
    assert ready.entries == (Entry(2, 2, EntryKind.NOOP, b""),)


def test_committed_entry_that_replaces_one_on_disk_is_not_read_from_there() -> None:
    """Committed by others, not yet written here: the disk still holds what was replaced.

    Source: paper figure 3 (state machine safety).
    """
    log = RaftLog(3, [(1, 1)])  # three entries on disk, nothing in memory
    core = RaftCore("a", CONFIG, log, HardState(1, None), [], random.Random(1))
    new = Entry(3, 2, EntryKind.COMMAND, b"new")
    core.step(append(2, new, after=(2, 1), commit=3))

    assert core.commit_index == 3
    assert core.entries_to_apply(1, 1 << 20) is None
    assert core.log.stable_index == 2  # the driver reads up to here
    assert core.entries_to_apply(3, 1 << 20) == (new,)


def test_vote_won_after_the_candidacy_was_given_up_elects_no_one() -> None:
    """The own vote reaches the disk when a leader of the term is known already."""
    core = server()
    time_out(core)
    core.step(VoteReply("b", "a", 1, True, True))
    writing = core.ready()
    assert writing is not None
    core.step(append(1, sender="b"))

    core.advance(writing)

    assert core.role is Role.FOLLOWER


# ---- Batches and windows (thesis 10.2) ---------------------------------------------------------


@pytest.fixture
def window(monkeypatch: pytest.MonkeyPatch) -> int:
    """Appends that may be under way to one follower, whatever the measured value is today."""
    monkeypatch.setattr(raft_progress, "INFLIGHT_MESSAGES_MAX", 4)
    return raft_progress.INFLIGHT_MESSAGES_MAX


def small_batches(bytes_max: int) -> RaftConfig:
    return RaftConfig(3, 10, 20, append_bytes_max=bytes_max)


def test_append_is_contiguous_and_bounded_in_bytes(window: int) -> None:
    """All that has gathered goes in one message, up to the limit.

    Source: thesis 10.2.2; raft-traps T34.
    """
    size_bytes = entry_bytes(log_of(1)[0])
    core = lead(server(config=small_batches(size_bytes * 4)))
    core.propose([b"%d" % i for i in range(8)])

    batches = [[e.index for e in message.entries] for message in appends(core, "b")]

    assert batches == [[2, 3, 4, 5], [6, 7, 8, 9]]


def test_follower_is_sent_no_more_than_a_window_ahead_of_its_answers(window: int) -> None:
    """A slow follower costs bounded memory; its answer opens the window again.

    Source: thesis 10.2.1; raft-traps T34.
    """
    core = lead(server(config=small_batches(1)))
    first = core.propose([b"x"] * 100)

    assert len(appends(core, "b")) == window
    assert not core.wants_append("b")
    acknowledge(core, "b", index=first + 2)

    assert len(appends(core, "b")) == 3


def test_new_commit_index_may_wait_for_entries_but_only_up_to_the_one_that_is_due() -> None:
    """What is due is told by itself; what is newer goes with the next entries, for nothing.

    Source: the commit index of an append, paper figure 2; docs/adr/0007.
    """
    core = lead()
    older = core.propose([b"x"])
    acknowledge(core, "b")
    flush(core)
    appends(core, "b")  # tells that it is committed
    newer = core.propose([b"y"])
    acknowledge(core, "b")
    flush(core)

    assert core.commit_index == newer
    assert core.wants_append("b")
    assert not core.wants_append("b", commit_due=older)
    assert core.wants_append("b", commit_due=newer)
    core.propose([b"z"])
    assert core.wants_append("b", commit_due=older)
    assert [message.commit_index for message in appends(core, "b")] == [newer]


def test_follower_whose_log_is_not_known_yet_is_probed_with_one_message(window: int) -> None:
    """Until it answers there is no use in sending more; a heartbeat probes again.

    Source: thesis 10.2.1.
    """
    core = elect(server(config=small_batches(1)))
    core.propose([b"x", b"y"])

    assert len(appends(core, "b")) == 1
    assert appends(core, "b") == []
    for _ in range(CONFIG.heartbeat_ticks):
        core.tick()
    assert [m.entries for m in appends(core, "b")] == [()]

    acknowledge(core, "b", index=1)
    assert len(appends(core, "b")) == 2


def test_lost_appends_are_sent_again_after_a_refused_heartbeat() -> None:
    """What was sent ahead and lost is noticed with the next heartbeat.

    Source: paper 5.3 (the leader retries).
    """
    core = lead()
    follower = server("b", log=[core.log.entries(1, 99)[0]])  # type: ignore[index]
    core.propose([b"x", b"y"])
    appends(core, "b")  # lost
    core.propose([b"z"])
    appends(core, "b")  # lost
    for _ in range(CONFIG.heartbeat_ticks):
        core.tick()

    for _ in range(2):
        for message in appends(core, "b"):
            core.step(answer(follower, message))

    assert follower.log.last_index == core.log.last_index


def test_new_connection_sends_again_what_was_in_flight_on_the_old_one() -> None:
    """What a broken connection held is lost, and need not be waited for.

    Source: paper 5.3 (the leader retries).
    """
    core = lead()
    core.propose([b"x"])
    lost = appends(core, "b")

    core.link_up("b")
    core.link_up("z")  # a stranger's connection concerns no one

    (again,) = appends(core, "b")
    assert again.entries == lost[0].entries


def test_entries_that_left_memory_are_read_from_disk_by_the_driver() -> None:
    """The core says which; what no longer fits when they come is dropped.

    Source: thesis 10.2.1; raft-traps T34.
    """
    entries = log_of(1, 1, 1)
    log = RaftLog(3, [(1, 1)], entries[2:])
    memberships = [(0, membership("abc"))]
    core = elect(RaftCore("a", CONFIG, log, HardState(1, None), memberships, random.Random(1)))
    appends(core, "b")
    core.step(AppendReply("b", "a", core.term, False, 0, 0, 3, 0, 0))

    assert core.append_for("b") == EntriesOnDisk(1, 4)
    assert core.append_with("b", []) is None
    assert core.append_with("z", entries[:1]) is None
    assert core.append_with("b", entries[1:2]) is None  # not what comes next
    assert core.append_with("b", [Entry(1, 9, EntryKind.NOOP, b"")]) is None  # another log's
    message = core.append_with("b", entries[:2])
    assert message is not None
    assert (message.prev_index, message.entries) == (0, tuple(entries[:2]))
    assert core.append_with("b", entries[:2]) is None  # one probe at a time


def test_proposals_wait_when_too_much_is_uncommitted() -> None:
    """Without a majority the leader's memory must not grow for ever; a commit makes room.

    Source: raft-traps T34.
    """
    core = lead(server(config=RaftConfig(3, 10, 20, uncommitted_bytes_max=100)))
    core.propose([bytes(200)])
    with pytest.raises(TooMuchUncommittedError):
        core.propose([b"x"])
    flush(core)

    acknowledge(core, "b")

    assert core.propose([b"x"]) == core.log.last_index


def test_proposals_of_an_earlier_leadership_are_nobody_s_burden() -> None:
    """What was uncommitted then may be gone by now, and would never be taken off the sum."""
    core = lead(server(config=RaftConfig(3, 10, 20, uncommitted_bytes_max=100)))
    core.propose([bytes(200)])
    flush(core)
    core.step(append(core.term + 1))

    elect(core)

    assert core.propose([b"x"]) == core.log.last_index
