"""Raft by chapter 4 of the thesis: members that join, learn, vote, move and leave.

Stories: ``scenarios/learner*.txt`` and ``scenarios/removal*.txt``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from raft_core import MembershipChangeRefusedError, NotLeaderError, RaftCore
from raft_types import (
    VOTERS_MAX,
    AppendEntries,
    AppendReply,
    Entry,
    EntryKind,
    Member,
    Membership,
    Role,
    Room,
    Snapshot,
    SnapshotDue,
    SnapshotOutcome,
    SnapshotReply,
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
    member,
    membership,
    replies,
    server,
    time_out,
)


def tick(core: RaftCore, count: int) -> None:
    for _ in range(count):
        core.tick()


def tick_heard(core: RaftCore, count: int, *heard: str) -> None:
    """Time passes, and these followers answer all that they are sent."""
    for _ in range(count):
        core.tick()
        flush(core)
        acknowledge(core, *heard)


def change(index: int, term: int, members: Membership) -> Entry:
    return Entry(index, term, EntryKind.MEMBERSHIP, members.encode())


def decoded(entry: Entry) -> Membership:
    assert entry.kind is EntryKind.MEMBERSHIP
    return Membership.decode(entry.data)


def leader_with_learner() -> RaftCore:
    """a, b, c vote; d has just been added and knows nothing."""
    core = lead()
    core.add_learner(member("d", voter=False))
    flush(core)
    for follower in "bc":
        appends(core, follower)
    acknowledge(core, "b", "c")
    return core


# ---- Learners (thesis 4.2.1) -------------------------------------------------------------------


def test_learner_receives_the_log_and_does_not_count() -> None:
    """Its copy makes no majority.

    Source: thesis 4.2.1.
    """
    core = leader_with_learner()
    index = core.propose([b"x"])
    flush(core)
    assert core.wants_append("d")

    acknowledge(core, "d")
    assert core.commit_index == index - 1
    acknowledge(core, "b")

    assert core.commit_index == index


@pytest.mark.parametrize(("voters", "learners"), [("bc", "a"), ("bc", "")])
def test_learner_and_stranger_never_campaign(voters: str, learners: str) -> None:
    """Who has no vote does not stand, whatever the others would say.

    Source: thesis 4.2.1.
    """
    core = server(voters=voters, learners=learners)

    tick(core, CONFIG.election_ticks_max * 5)
    for voter in "bc":
        core.step(VoteReply(voter, "a", 1, True, True))

    assert (core.role, core.term) == (Role.FOLLOWER, 0)


def test_learner_that_hears_no_leader_asks_the_voters_for_one() -> None:
    """By a pre-vote, which changes nothing: a leader that removed it meanwhile will tell it.

    Source: raft-traps T65.
    """
    asking, fresh = server("d", learners="d"), server("d", "")

    tick(asking, CONFIG.election_ticks_max)
    tick(fresh, CONFIG.election_ticks_max)  # it knows no one to ask

    assert flush(asking) == [VoteRequest("d", to, 1, 0, 0, True) for to in "abc"]
    assert flush(fresh) == []


def test_votes_of_learners_and_strangers_are_not_counted() -> None:
    """Only voters make a majority.

    Source: thesis 4.2.1.
    """
    core = server(learners="d")
    assert {message.to for message in time_out(core)} == {"b", "c"}

    for voter in "dz":
        core.step(VoteReply(voter, "a", 1, True, True))
    assert (core.role, core.term) == (Role.PRE_CANDIDATE, 0)
    replies(core, VoteReply("b", "a", 1, True, True))
    for voter in "dz":
        core.step(VoteReply(voter, "a", 1, True, False))

    assert core.role is Role.CANDIDATE


def test_votes_and_appends_are_taken_from_servers_outside_the_own_membership() -> None:
    """The sender may be in a membership that this server has not received yet.

    Source: thesis 4.1; raft-traps T62.
    """
    fresh = server("z", "")

    assert replies(fresh, VoteRequest("q", "z", 1, 0, 0, False)) == [
        VoteReply("z", "q", 1, True, False)
    ]
    fresh.step(AppendEntries("q", "z", 1, 0, 0, tuple(log_of(1)), 1, 1))

    assert (fresh.leader_id, fresh.commit_index) == ("q", 1)


def test_learner_is_promoted_once_a_round_took_less_than_a_timeout() -> None:
    """The new voter must not hold up commits while it catches up.

    Source: thesis 4.2.1; raft-traps T63.
    """
    core = leader_with_learner()
    for _ in range(CONFIG.election_ticks_min + 1):  # its first round is slow
        acknowledge(core, "b", "c")
        core.tick()
    before = core.log.last_index
    acknowledge(core, "d")
    core.tick()
    assert core.log.last_index == before  # so it needs another one

    acknowledge(core, "d")
    core.tick()

    assert core.membership == membership("abcd")
    assert core.log.last_index == before + 1


def test_learner_waits_for_its_vote_while_the_leadership_is_handed_over() -> None:
    """No change is proposed then: the refusal once ended the leader's process."""
    core = leader_with_learner()
    core.transfer_to("b")
    acknowledge(core, "b", "c", "d")

    core.tick()
    assert core.membership == membership("abc", "d")
    for _ in range(CONFIG.election_ticks_min):  # b does not take over
        acknowledge(core, "b", "c", "d")
        core.tick()

    assert core.membership == membership("abcd")


def test_learner_that_holds_only_a_part_is_not_promoted() -> None:
    """It answers at once, but a round of catching up ends where the log ended at its begin.

    Source: thesis 4.2.1.
    """
    core = leader_with_learner()
    before = core.log.last_index

    acknowledge(core, "d", index=before - 1)
    core.tick()

    assert not core.membership.is_voter("d")
    assert core.log.last_index == before


def test_learner_that_does_not_answer_is_not_promoted() -> None:
    """A typo in its address must not cost the cluster a failure it could tolerate.

    Source: raft-traps T63.
    """
    core = leader_with_learner()

    for _ in range(CONFIG.election_ticks_max * 3):
        acknowledge(core, "b", "c")
        core.tick()

    assert not core.membership.is_voter("d")


def test_learner_that_died_after_catching_up_is_not_promoted() -> None:
    """It caught up while another change was under way, and was not heard since.

    Source: thesis 4.2.1; raft-traps T63.
    """
    core = leader_with_learner()
    core.add_learner(member("e", voter=False))  # not committed: nothing else may change
    flush(core)
    acknowledge(core, "d")
    for _ in range(CONFIG.election_ticks_min + 1):
        acknowledge(core, "b", "c", index=core.commit_index)
        core.tick()

    acknowledge(core, "b", "c")
    tick(core, 3)  # nothing new to catch up with, and no word from it

    assert not core.membership.is_voter("d")


def test_learner_that_is_to_stay_one_is_never_promoted() -> None:
    """A read copy holds the data and never counts, however close it follows.

    Source: thesis 4.2.1.
    """
    core = lead()
    core.add_learner(member("d", voter=False, stays_learner=True))
    flush(core)
    acknowledge(core, "b", "c", "d")

    tick_heard(core, CONFIG.election_ticks_max * 3, "b", "c", "d")

    assert core.membership.voters == ("a", "b", "c")


IMPATIENT = replace(CONFIG, learner_ticks_max=50)


def leader_with_silent_learner(learner: Member) -> RaftCore:
    """For one tick less than a leader's patience."""
    core = lead(server(config=IMPATIENT))
    core.add_learner(learner)
    flush(core)
    acknowledge(core, "b", "c")
    tick_heard(core, IMPATIENT.learner_ticks_max - 1, "b", "c")
    return core


def test_learner_that_is_not_heard_of_is_dropped_and_named() -> None:
    """Its address was mistyped: the name is free again, and someone can be told.

    Source: thesis 4.2.1 ("abort the change"); raft-traps T63.
    """
    nobody = member("d", voter=False)
    core = leader_with_silent_learner(nobody)
    assert core.take_notices() == []
    assert core.membership.get("d") == nobody

    core.tick()

    assert core.membership == membership("abc")
    [notice] = core.take_notices()
    assert "learner d is dropped: it was not heard of" in notice
    assert f"{nobody.host} with peer port {nobody.peer_port}" in notice
    assert core.take_notices() == []


@pytest.mark.parametrize("sign", ["an append reply", "a snapshot reply"])
def test_learner_that_is_heard_of_is_kept_however_far_behind(sign: str) -> None:
    """A big state takes its time.

    Source: raft-traps T63.
    """
    core = leader_with_silent_learner(member("d", voter=False))
    if sign == "an append reply":
        acknowledge(core, "d", index=0)
    else:
        core.step(SnapshotReply("d", "a", core.term, 1, 9, SnapshotOutcome.MORE))

    tick_heard(core, IMPATIENT.learner_ticks_max - 1, "b", "c")

    assert core.membership.get("d") is not None
    assert core.take_notices() == []


def test_learner_that_is_heard_of_but_does_not_catch_up_is_dropped_in_the_end() -> None:
    """It would hold its name, and the leader's attention, for ever.

    Source: thesis 4.2.1 (a fixed number of rounds); raft-traps T63.
    """
    patience_ticks = 200
    core = lead(server(config=replace(IMPATIENT, catch_up_ticks_max=patience_ticks)))
    core.add_learner(member("d", voter=False))
    flush(core)
    acknowledge(core, "b", "c")

    for tick_count in range(patience_ticks):
        assert core.membership.get("d") is not None, tick_count
        acknowledge(core, "d", index=0)
        tick_heard(core, 1, "b", "c")

    assert core.membership == membership("abc")
    [notice] = core.take_notices()
    assert "learner d is dropped: it does not catch up" in notice


def test_learner_that_is_to_stay_one_is_not_dropped() -> None:
    """A read copy may be away for a weekend, and take as long to catch up."""
    core = leader_with_silent_learner(member("d", voter=False, stays_learner=True))

    tick_heard(core, IMPATIENT.catch_up_ticks_max, "b", "c")

    assert core.membership.get("d") is not None


def test_learner_is_not_dropped_while_another_change_is_under_way() -> None:
    """One change at a time.

    Source: thesis 4.1; raft-traps T61.
    """
    core = leader_with_silent_learner(member("d", voter=False))
    core.change_member(member("b")._replace(port=1))

    core.tick()
    assert core.membership.get("d") is not None
    flush(core)
    acknowledge(core, "b", "c")
    core.tick()

    assert core.membership.get("d") is None


# ---- Changes, one at a time (thesis 4.1) -------------------------------------------------------


def test_membership_takes_effect_when_it_is_appended() -> None:
    """Not when it is committed, at the leader as at a follower.

    Source: thesis 4.1; raft-traps T62.
    """
    leader = lead()
    leader.add_learner(member("d", voter=False))
    assert leader.membership == membership("abc", "d")
    assert "d" in leader.progress

    follower = server("b")
    (message,) = appends(leader, "b")
    prefix = leader.log.entries(1, 1 << 20) or ()
    follower.step(AppendEntries("a", "b", 1, 0, 0, prefix, 0, 1))

    assert message.entries == prefix[1:]
    assert follower.membership == membership("abc", "d")


def test_membership_is_rolled_back_when_its_entry_is_truncated() -> None:
    """What was never committed never was.

    Source: thesis 4.1; raft-traps T62.
    """
    core = server()
    entry = Entry(1, 1, EntryKind.MEMBERSHIP, membership("abc", "d").encode())
    core.step(AppendEntries("b", "a", 1, 0, 0, (entry,), 0, 1))
    assert core.membership == membership("abc", "d")

    other = Entry(1, 2, EntryKind.NOOP, b"")
    core.step(AppendEntries("c", "a", 2, 0, 0, (other,), 0, 1))

    assert core.membership == membership("abc")


def test_membership_does_not_change_before_an_entry_of_the_own_term_is_committed() -> None:
    """Without it two leaders could use majorities that do not meet.

    Source: thesis 4.1 (as corrected, raft-dev 2015); raft-traps T61.
    """
    core = elect(server())
    with pytest.raises(MembershipChangeRefusedError):
        core.add_learner(member("d", voter=False))

    acknowledge(core, "b")

    assert core.add_learner(member("d", voter=False)) == 2


def test_membership_changes_one_at_a_time() -> None:
    """The next change waits until this one is committed.

    Source: thesis 4.1; raft-traps T61.
    """
    core = lead()
    core.add_learner(member("d", voter=False))
    flush(core)
    with pytest.raises(MembershipChangeRefusedError):
        core.add_learner(member("e", voter=False))

    acknowledge(core, "b")

    assert core.add_learner(member("e", voter=False)) == 3


def test_follower_refuses_a_change_of_membership() -> None:
    """Only a leader appends."""
    with pytest.raises(NotLeaderError):
        server().add_learner(member("d", voter=False))


def test_new_leader_promotes_a_learner_it_inherited() -> None:
    """Catching up goes on under the next leader, and is measured anew.

    Source: thesis 4.2.1.
    """
    core = lead(server(learners="d"))

    core.tick()
    (entry,) = core.log.entries(core.log.last_index, 1 << 20) or ()

    assert decoded(entry) == membership("abcd")


def test_uncommitted_promotion_counts_with_the_new_majority() -> None:
    """Two of three were enough; of four it takes three.

    Source: thesis 4.1.
    """
    core = lead(server(learners="d"))
    core.tick()
    flush(core)

    acknowledge(core, "b")
    assert core.commit_index == core.log.last_index - 1
    acknowledge(core, "d")

    assert core.commit_index == core.log.last_index


def test_member_that_moved_gets_its_new_address() -> None:
    """The same member, elsewhere; who votes stays as it is.

    Source: raft-traps T56, T64.
    """
    core = lead()
    moved = member("b")._replace(host="10.0.0.2", port=1, peer_port=2)

    index = core.change_member(moved)

    assert core.membership.get("b") == moved
    assert core.membership.voters == ("a", "b", "c")
    (entry,) = core.log.entries(index, 1 << 20) or ()
    assert decoded(entry) == core.membership


def test_change_of_a_member_is_no_way_to_a_vote() -> None:
    """A vote is earned by catching up."""
    core = lead(server(learners="d"))

    with pytest.raises(AssertionError):
        core.change_member(member("d"))
    with pytest.raises(AssertionError):
        core.change_member(member("z"))


# ---- What a person is told ---------------------------------------------------------------------


def test_objection_to_a_newcomer_names_whose_place_it_would_take() -> None:
    """A name and an address belong to one member."""
    members = membership("abc")

    assert "the name a is taken" in members.objection_to(member("x")._replace(node_id="a"))
    assert "the address 127.0.0.1:7000 is taken" in members.objection_to(member("x"))
    assert members.objection_to(member("x")._replace(port=1)) == ""


def test_objection_to_a_move_does_not_name_the_member_itself() -> None:
    """It may keep its own name and its own port."""
    alone = Membership((member("a"), member("b")._replace(port=1)))

    assert alone.objection_to(member("a")._replace(peer_port=9)) == ""
    assert "is taken by b" in alone.objection_to(member("a")._replace(port=1))


def test_objection_to_an_eighth_voter() -> None:
    """Every commit waits for a majority; one more copy may learn."""
    full = Membership(tuple(member(f"n{i}")._replace(port=i) for i in range(VOTERS_MAX)))

    assert "at most 7 voters" in full.objection_to(member("x", voter=False))
    assert full.objection_to(member("x", voter=False, stays_learner=True)) == ""
    assert full.objection_to(member("n1")._replace(port=99)) == ""


def test_objection_to_the_removal_of_a_stranger_and_of_the_only_voter() -> None:
    """The first is a typing error; the second would be the end of the cluster."""
    members = membership("a", "d")

    assert "no member x" in members.objection_to_leaving("x")
    assert "only voter" in members.objection_to_leaving("a")
    assert members.objection_to_leaving("d") == ""


def test_membership_travels_with_all_that_is_known_of_a_member() -> None:
    """And one that was written before learners could stay learners is understood."""
    members = membership("a", "d").with_member(member("e", voter=False, stays_learner=True))
    older = members.encode().replace(b'"stays_learner": false, ', b"")

    assert Membership.decode(members.encode()) == members
    assert Membership.decode(older) == members


# ---- Removal (thesis 4.2.2) --------------------------------------------------------------------


def test_removed_member_counts_no_more_as_soon_as_the_entry_is_appended() -> None:
    """Of three voters two are left, and both are needed.

    Source: thesis 4.1, 4.2.2.
    """
    core = lead()
    index = core.remove_member("c")
    flush(core)
    assert core.membership == membership("ab")

    acknowledge(core, "c")
    assert core.commit_index == index - 1
    acknowledge(core, "b")

    assert core.commit_index == index


def test_leader_that_removes_itself_does_not_count_itself() -> None:
    """It manages a cluster to which it does not belong.

    Source: thesis 4.2.2.
    """
    core = lead()
    index = core.remove_member("a")
    flush(core)

    acknowledge(core, "b")
    assert (core.commit_index, core.role) == (index - 1, Role.LEADER)
    acknowledge(core, "c")

    assert core.commit_index == index


def test_leader_that_removes_itself_steps_down_when_that_is_committed() -> None:
    """Not before: it may be the only one who can bring it about.

    Source: thesis 4.2.2; raft-traps T65.
    """
    core = lead()
    core.remove_member("a")
    flush(core)
    core.propose([b"still leading"])
    flush(core)
    tick_heard(core, CONFIG.heartbeat_ticks)
    assert core.role is Role.LEADER and not core.is_removed

    acknowledge(core, "b", "c")

    assert (core.role, core.leader_id, core.is_removed) == (Role.FOLLOWER, None, True)
    tick(core, CONFIG.election_ticks_max * 3)
    assert flush(core) == []


def test_leader_that_removes_itself_still_needs_the_others_answers_to_lead() -> None:
    """Check-quorum and reads count the voters that are left.

    Source: thesis 4.2.2, 6.2, 6.4.
    """
    core = lead(server(voters="ab"))
    core.remove_member("a")
    core.read_index("r")
    assert core.take_reads() == []  # its own word is not enough any more

    tick(core, CONFIG.election_ticks_min)

    assert core.role is not Role.LEADER


@pytest.mark.parametrize(
    ("own", "others", "left"),
    [
        (Room.PLENTY, (Room.PLENTY, Room.NONE), Room.PLENTY),
        (Room.PLENTY, (Room.SHORT, Room.SHORT), Room.SHORT),
        (Room.PLENTY, (Room.NONE, Room.SHORT), Room.SHORT),
        (Room.PLENTY, (Room.NONE, Room.NONE), Room.NONE),
        (Room.SHORT, (Room.PLENTY, Room.PLENTY), Room.SHORT),
        (Room.NONE, (Room.PLENTY, Room.PLENTY), Room.NONE),
    ],
)
def test_leader_counts_on_the_room_that_a_majority_of_the_disks_has(
    own: Room, others: tuple[Room, Room], left: Room
) -> None:
    """And on its own. Followers tell with each answer, so that none runs into its disk's end.

    Source: raft-traps T69.
    """
    core = lead()
    core.room = own

    for follower, room in zip("bc", others, strict=True):
        core.step(AppendReply(follower, "a", core.term, True, 1, core.round, room=room))

    assert core.cluster_room is left


def test_follower_tells_with_each_answer_what_room_its_disk_has() -> None:
    """Refusals tell it too."""
    core = server()
    core.room = Room.SHORT

    agreed = answer(core, append(1, heartbeat=1))
    refused = answer(core, append(1, after=(9, 1)))

    assert (agreed.room, refused.room) == (Room.SHORT, Room.SHORT)


def test_read_that_waits_for_a_member_that_is_removed_goes_on() -> None:
    """Who need not answer any more will not: the leader's own word is enough now.

    Source: thesis 4.2.2, 6.4.
    """
    core = lead(server(voters="ab"))
    core.read_index("r")
    assert core.take_reads() == []

    core.remove_member("b")

    assert core.take_reads() == [(1, ["r"])]


def test_server_outside_its_newest_membership_stands_until_that_is_committed() -> None:
    """Its log may be the only one that can win; it does not count its own vote.

    Source: thesis 4.2.2, figure 4.6.
    """
    core = server(voters="ab", log=[*log_of(1), change(2, 1, membership("b"))])

    assert time_out(core) == [VoteRequest("a", "b", 2, 2, 1, True)]
    replies(core, VoteReply("b", "a", 2, True, True))
    assert (core.role, core.term) == (Role.CANDIDATE, 2)
    replies(core, VoteReply("b", "a", 2, True, False))
    assert (core.role, core.term) == (Role.LEADER, 2)
    acknowledge(core, "b")

    assert (core.role, core.is_removed) == (Role.FOLLOWER, True)


def test_removed_server_does_not_stand_once_its_removal_is_committed() -> None:
    """It can only disturb.

    Source: thesis 4.2.3; raft-traps T22.
    """
    core = server("c", log=[*log_of(1), change(2, 1, membership("ab"))])
    core.step(AppendEntries("a", "c", 1, 2, 1, (), 2, 1))
    flush(core)

    tick(core, CONFIG.election_ticks_max * 3)

    assert flush(core) == []
    assert core.is_removed


def test_removal_that_would_leave_too_few_who_answer_is_refused() -> None:
    """It would be in force at once, and could neither be committed nor taken back.

    Source: thesis 4.1 (a change takes effect when it is appended).
    """
    core = lead()
    tick_heard(core, CONFIG.election_ticks_min, "b")  # c is dead

    with pytest.raises(MembershipChangeRefusedError, match="only 1 answer now, and 2 are needed"):
        core.remove_member("b")

    assert core.remove_member("c") == core.log.last_index


def test_only_voter_and_stranger_are_never_removed() -> None:
    """The driver has asked ``objection_to_leaving`` first."""
    core = lead(server(voters="a"))

    for name in "az":
        with pytest.raises(AssertionError):
            core.remove_member(name)


def test_removal_waits_for_the_change_before_it() -> None:
    """One at a time, as all changes.

    Source: thesis 4.1; raft-traps T61.
    """
    core = lead()
    core.remove_member("c")

    with pytest.raises(MembershipChangeRefusedError, match="another change"):
        core.remove_member("b")


# ---- The removed server learns it (thesis 4.2.2, raft-traps T65) -------------------------------


def leader_that_removed_c() -> RaftCore:
    """The removal is committed; c has not answered since."""
    core = lead()
    core.remove_member("c")
    flush(core)
    acknowledge(core, "b")
    return core


def follower_c() -> RaftCore:
    """c, with the no-op of a's term."""
    core = server("c", log=[Entry(1, 1, EntryKind.NOOP, b"")])
    replies(core, AppendEntries("a", "c", 1, 1, 1, (), 1, 1))
    return core


def bring_up_to_date(leader: RaftCore, follower: RaftCore) -> None:
    """All that the leader has for this follower arrives."""
    for _ in range(6):
        for message in appends(leader, follower.member_id):
            for reply in replies(follower, message):
                leader.step(reply)


def test_removed_server_still_gets_the_entry_and_its_commit() -> None:
    """The log itself tells it.

    Source: raft-traps T65.
    """
    leader, removed = leader_that_removed_c(), follower_c()

    bring_up_to_date(leader, removed)

    assert removed.commit_index == 2
    assert removed.is_removed


def test_removed_server_is_told_for_a_while_only() -> None:
    """It may be gone for good, and most often that is why it was removed."""
    core = leader_that_removed_c()
    tick_heard(core, CONFIG.election_ticks_max * 2 - 1, "b")
    assert "c" in core.progress

    tick_heard(core, 1, "b")

    assert "c" not in core.progress
    assert not core.wants_append("c")


def test_removed_server_is_told_until_it_is_committed() -> None:
    """Before that there is nothing to tell."""
    core = lead()
    core.remove_member("c")
    flush(core)

    tick_heard(core, CONFIG.election_ticks_max * 3)  # no one answers: it does not lead any more
    assert core.role is not Role.LEADER
    core = lead()
    core.remove_member("c")
    for _ in range(CONFIG.election_ticks_max * 3):
        acknowledge(core, "b", index=1)
        core.tick()

    assert core.role is Role.LEADER
    assert "c" in core.progress


def test_removed_server_far_behind_is_told_for_as_long_as_it_comes_nearer() -> None:
    """Its log has to reach the entry."""
    core = lead(server(log=log_of(*[1] * 8)))
    core.progress["c"].match_index = 2
    core.remove_member("c")
    flush(core)
    acknowledge(core, "b")

    for index in (5, 9):
        tick_heard(core, CONFIG.election_ticks_max * 2 - 1, "b")
        acknowledge(core, "c", index=index)
        tick_heard(core, 1, "b")
        assert "c" in core.progress
    tick_heard(core, CONFIG.election_ticks_max * 2, "b")

    assert "c" not in core.progress


@pytest.mark.parametrize("sign", ["it campaigns", "it connects"])
def test_removed_server_that_comes_back_later_is_told_then(sign: str) -> None:
    """It asks for votes that nobody may give it, or has a connection again.

    Source: thesis 4.2.3; raft-traps T22, T65.
    """
    leader, removed = leader_that_removed_c(), follower_c()
    tick_heard(leader, CONFIG.election_ticks_max * 2, "b")
    assert "c" not in leader.progress

    if sign == "it campaigns":
        for request in time_out(removed):
            if request.to == "a":
                assert replies(leader, request) == []
    else:
        leader.link_up("c")
    tick(leader, CONFIG.heartbeat_ticks)
    bring_up_to_date(leader, removed)

    assert (leader.role, leader.term) == (Role.LEADER, 1)
    assert removed.is_removed


def test_removed_server_that_is_behind_the_log_is_told_by_a_state() -> None:
    """And by the log after it, so it keeps getting that for a while.

    Source: raft-traps T65.
    """
    core = leader_that_removed_c()
    core.compacted_to(3)
    core.link_up("c")
    core.progress["c"].match_index = 0
    core.progress["c"].probe_from(1)
    core.link_up("c")
    assert isinstance(core.append_for("c"), SnapshotDue)
    core.snapshot_started("c")

    tick_heard(core, CONFIG.election_ticks_max * 4, "b")
    assert "c" in core.progress
    core.snapshot_ended("c", 2)
    tick_heard(core, CONFIG.election_ticks_max * 2 - 1, "b")
    assert "c" in core.progress
    tick_heard(core, 1, "b")

    assert "c" not in core.progress


def test_state_without_this_server_tells_it_that_it_was_removed() -> None:
    """It had been a member, and the cluster went on without it."""
    core = follower_c()
    core.restore(Snapshot(9, 1, membership("ab"), 7))

    assert core.is_removed


def test_server_that_is_not_yet_added_is_not_removed() -> None:
    """It meets memberships without it, from before it came: in the log and in a state.

    Source: raft-traps T65.
    """
    fresh = server("d", "")
    assert not fresh.is_removed
    founded = change(1, 1, membership("abc"))
    added = change(2, 1, membership("abc", "d"))

    replies(fresh, AppendEntries("a", "d", 1, 0, 0, (founded,), 1, 1))
    assert not fresh.is_removed
    fresh.restore(Snapshot(2, 1, membership("abc"), 1))
    assert not fresh.is_removed
    fresh = server("d", "")
    replies(fresh, AppendEntries("a", "d", 1, 0, 0, (founded, added), 2, 1))

    assert fresh.membership == membership("abc", "d")
    assert not fresh.is_removed


def test_removal_that_is_not_committed_is_no_removal() -> None:
    """It may still be rolled back, and is.

    Source: thesis 4.1; raft-traps T62.
    """
    core = follower_c()
    replies(core, AppendEntries("a", "c", 1, 1, 1, (change(2, 1, membership("ab")),), 1, 1))
    assert core.membership == membership("ab")
    assert not core.is_removed

    noop = Entry(2, 2, EntryKind.NOOP, b"")
    replies(core, AppendEntries("b", "c", 2, 1, 1, (noop,), 2, 1))

    assert core.membership == membership("abc")
    assert not core.is_removed


@pytest.mark.parametrize("by", ["the log", "a state"])
def test_admission_that_was_rolled_back_is_none(by: str) -> None:
    """Only what is committed has happened.

    Source: thesis 4.1; raft-traps T62.
    """
    core = server("d", "")
    founded = change(1, 1, membership("abc"))
    added = change(2, 1, membership("abc", "d"))
    replies(core, AppendEntries("a", "d", 1, 0, 0, (founded, added), 1, 1))

    if by == "the log":
        noop = Entry(2, 2, EntryKind.NOOP, b"")
        replies(core, AppendEntries("b", "d", 2, 1, 1, (noop,), 2, 1))
    else:
        core.restore(Snapshot(5, 2, membership("abc"), 1))

    assert core.membership == membership("abc")
    assert not core.is_removed


def test_removal_is_known_after_the_log_that_told_it_was_compacted() -> None:
    core = server("c", log=[change(1, 1, membership("abc")), change(2, 1, membership("ab"))])
    replies(core, AppendEntries("a", "c", 1, 2, 1, (), 2, 1))

    core.compacted_to(3)

    assert core.is_removed


def test_outsider_that_becomes_a_member_is_none_any_more() -> None:
    """A new server may connect before it is added."""
    core = lead()
    core.link_up("d")
    core.add_learner(member("d", voter=False, stays_learner=True))
    flush(core)
    acknowledge(core, "b", "c")

    tick_heard(core, CONFIG.election_ticks_max * 3, "b", "c", "d")

    assert "d" in core.progress


def test_member_that_connects_is_no_outsider() -> None:
    """It gets the log for as long as it is a member."""
    core = lead()
    core.link_up("b")

    tick_heard(core, CONFIG.election_ticks_max * 3, "b", "c")

    assert "b" in core.progress


def test_new_leader_gives_the_removed_one_what_it_asks_for() -> None:
    """Who led when it was removed may be gone."""
    removed = follower_c()
    log = [Entry(1, 1, EntryKind.NOOP, b""), change(2, 1, membership("ab"))]
    leader = lead(server("b", "abc", log=log, term=1))
    assert "c" not in leader.progress

    leader.link_up("c")
    tick(leader, CONFIG.heartbeat_ticks)
    bring_up_to_date(leader, removed)

    assert removed.is_removed
