"""Raft by the thesis: pre-vote, stickiness, check-quorum, linearizable reads.

And the one thing that is ours: the shorter pause when the leader's process is known to be dead.
The paper's rules are in ``test_raft_core.py``, membership is in ``test_raft_core_members.py``.
"""

from __future__ import annotations

import pytest

from raft_core import (
    DEAD_LEADER_ATTEMPTS_MAX,
    NotLeaderError,
    RaftCore,
)
from raft_types import (
    AppendEntries,
    AppendReply,
    RaftConfig,
    Role,
    VoteReply,
    VoteRequest,
)
from tests.raft_servers import (
    CONFIG,
    acknowledge,
    appends,
    elect,
    flush,
    lead,
    log_of,
    replies,
    server,
    time_out,
)


def heartbeat(
    term: int = 1, *, sender: str = "b", to: str = "a", last: tuple[int, int] = (0, 0)
) -> AppendEntries:
    return AppendEntries(sender, to, term, *last, (), 0, 1)


def pre_vote(term: int, last_index: int = 0, last_term: int = 0, by: str = "c") -> VoteRequest:
    return VoteRequest(by, "a", term, last_index, last_term, True)


def tick(core: RaftCore, count: int) -> None:
    for _ in range(count):
        core.tick()


def follower_of_b(voters: str = "abc", name: str = "a", learners: str = "") -> RaftCore:
    core = server(name, voters, learners=learners, log=log_of(1))
    core.step(AppendEntries("b", name, 1, 1, 1, (), 0, 1))
    flush(core)
    return core


# ---- Pre-vote (thesis 9.6) ---------------------------------------------------------------------


def test_pre_candidate_keeps_its_term_and_vote() -> None:
    """A server that is cut off comes back with the term it left with.

    Source: thesis 9.6; fault-model I16.
    """
    core = server(log=log_of(1), term=4, voted_for="b")

    for _ in range(10):
        sent = time_out(core)
        tick(core, CONFIG.election_ticks_max)
        flush(core)

    assert sent == []  # no second request within the same timeout
    assert (core.role, core.term, core.voted_for) == (Role.PRE_CANDIDATE, 4, "b")


def test_pre_vote_asks_about_the_next_term() -> None:
    """The request names the term that the election would have.

    Source: thesis 9.6.
    """
    core = server(log=log_of(1), term=4)

    assert time_out(core) == [VoteRequest("a", to, 5, 1, 1, True) for to in "bc"]


def test_granting_a_pre_vote_changes_nothing() -> None:
    """Not the term, the vote, the role or the timer; it may be granted to several.

    Source: thesis 9.6; raft-traps T17.
    """
    core, undisturbed = server(), server()
    tick(core, 9)
    tick(undisturbed, 9)

    granted = [replies(core, pre_vote(1, by=by)) for by in "bc"]

    assert granted == [[VoteReply("a", by, 1, True, True)] for by in "bc"]
    assert (core.term, core.voted_for, core.role) == (0, None, Role.FOLLOWER)
    while core.role is Role.FOLLOWER:
        core.tick()
        undisturbed.tick()
    assert undisturbed.role is Role.PRE_CANDIDATE


@pytest.mark.parametrize(
    ("last_index", "last_term", "granted"),
    [(2, 2, True), (1, 3, True), (1, 2, False), (9, 1, False)],
)
def test_pre_vote_is_denied_to_a_log_that_is_less_up_to_date(
    last_index: int, last_term: int, granted: bool
) -> None:
    """An election that can't be won must not raise the term.

    Source: thesis 9.6, raft-traps T17.
    """
    core = server(log=log_of(1, 2))

    assert replies(core, pre_vote(3, last_index, last_term)) == [
        VoteReply("a", "c", 3 if granted else 2, granted, True)
    ]


def test_pre_vote_is_not_granted_while_a_leader_is_heard() -> None:
    """It is not even answered within the minimum timeout, and granted after it.

    Source: thesis 9.6 and 4.2.3; raft-traps T17, T19.
    """
    core = follower_of_b()
    tick(core, CONFIG.election_ticks_min - 1)
    assert replies(core, pre_vote(2, 1, 1)) == []

    core.tick()

    assert replies(core, pre_vote(2, 1, 1)) == [VoteReply("a", "c", 2, True, True)]


@pytest.mark.parametrize("term", [3, 4])
def test_pre_candidate_of_an_older_term_is_told_the_newer_one(term: int) -> None:
    """Silence would leave it asking for ever.

    Source: raft-traps T18.
    """
    core = server(term=4)

    (reply,) = replies(core, pre_vote(term))

    assert reply == VoteReply("a", "c", 4, False, True)
    asking = server("c", term=2)
    time_out(asking)
    asking.step(reply)
    assert (asking.role, asking.term) == (Role.FOLLOWER, 4)


def test_majority_of_pre_votes_starts_the_election() -> None:
    """Only then is the term raised.

    Source: thesis 9.6.
    """
    core = server(voters="abcde")
    time_out(core)

    replies(core, VoteReply("b", "a", 1, True, True))
    assert (core.role, core.term) == (Role.PRE_CANDIDATE, 0)
    replies(core, VoteReply("c", "a", 1, True, True))

    assert (core.role, core.term) == (Role.CANDIDATE, 1)


def test_majority_of_refused_pre_votes_ends_the_attempt() -> None:
    """The next timeout tries again."""
    core = server(term=3)
    time_out(core)

    for voter in "bc":
        core.step(VoteReply(voter, "a", 3, False, True))

    assert (core.role, core.term) == (Role.FOLLOWER, 3)


@pytest.mark.parametrize("role", [Role.FOLLOWER, Role.CANDIDATE])
def test_late_pre_vote_elects_no_one(role: Role) -> None:
    """A pre-vote is no vote, whoever is granted it.

    Source: thesis 9.6.
    """
    core = server(voters="abcde")
    if role is Role.CANDIDATE:
        time_out(core)
        for voter in "bc":
            core.step(VoteReply(voter, "a", 1, True, True))
        flush(core)

    for voter in "bcde":
        core.step(VoteReply(voter, "a", core.term, True, True))
        core.step(VoteReply(voter, "a", core.term + 1, True, True))

    assert core.role is role


def test_pre_vote_of_an_earlier_attempt_counts_for_its_own_term_only() -> None:
    """The answer names the term it was asked about."""
    core = server(term=3)
    time_out(core)

    replies(core, VoteReply("b", "a", 3, True, True))

    assert core.role is Role.PRE_CANDIDATE


def test_pre_candidate_may_still_vote() -> None:
    """To be a pre-candidate is no claim: who asks first gets the vote of the term."""
    core = server(term=3)
    time_out(core)

    (reply,) = replies(core, VoteRequest("b", "a", 3, 0, 0, False))

    assert reply == VoteReply("a", "b", 3, True, False)


# ---- Leader stickiness (thesis 4.2.3) ----------------------------------------------------------


def test_vote_request_does_not_disturb_a_leader_that_is_heard() -> None:
    """Within the minimum timeout a newer term is not even taken over; after it, it is.

    Source: thesis 4.2.3; raft-traps T19, T22.
    """
    core = follower_of_b()
    request = VoteRequest("c", "a", 7, 5, 5, False)
    tick(core, CONFIG.election_ticks_min - 1)
    assert replies(core, request) == []
    assert core.term == 1

    core.tick()

    assert replies(core, request) == [VoteReply("a", "c", 7, True, False)]


def test_leader_is_not_disturbed_by_a_vote_request() -> None:
    """It would hear of a term that was won from a follower.

    Source: thesis 4.2.3; raft-traps T19.
    """
    core = lead()

    assert replies(core, VoteRequest("b", "a", 9, 9, 9, False)) == []
    assert replies(core, pre_vote(9, 9, 9)) == []

    assert (core.role, core.term) == (Role.LEADER, 1)


def test_stale_leader_steps_down_when_its_append_is_refused_with_a_newer_term() -> None:
    """Stickiness makes no deadlock: a server of a newer term answers the leader's heartbeat.

    Source: raft-traps T18.
    """
    leader = lead()
    follower = server(term=5)

    (reply,) = replies(follower, heartbeat(1, sender="c"))
    leader.step(reply)

    assert (leader.role, leader.term) == (Role.FOLLOWER, 5)


def test_server_that_may_not_campaign_forgets_a_leader_that_is_silent() -> None:
    """Its vote is needed like any other: it must not stay loyal to the dead.

    Source: thesis 4.2.3 (stickiness ends with the minimum timeout).
    """
    for core in (follower_of_b(), follower_of_b("bc", learners="a")):
        core.step_down()
        core.step(AppendEntries("b", "a", 1, 1, 1, (), 0, 1))
        flush(core)

        for ticks in range(1, 200):
            core.tick()
            if ticks >= CONFIG.election_ticks_max:
                assert replies(core, pre_vote(2, 1, 1)), f"deaf {ticks} ticks after the last word"

        assert core.leader_id is None
        assert core.role is Role.FOLLOWER


# ---- Check-quorum (thesis 6.2) -----------------------------------------------------------------


def test_leader_that_no_majority_answers_steps_down_within_the_minimum_timeout() -> None:
    """Clients must not hang on a leader that is cut off; it keeps its term and its vote.

    Source: thesis 6.2; raft-traps T20, T3.
    """
    core = lead()

    tick(core, CONFIG.election_ticks_min - 1)
    assert core.role is Role.LEADER
    core.tick()

    assert (core.role, core.term, core.voted_for) == (Role.FOLLOWER, 1, "a")
    assert core.leader_id is None


@pytest.mark.parametrize(
    ("voters", "learners", "answering", "leads"),
    [
        ("abc", "", "b", True),
        ("abcde", "", "b", False),
        ("abcde", "", "bd", True),
        ("abc", "de", "de", False),  # learners don't count
        ("a", "", "", True),  # alone it is its own majority
    ],
)
def test_leader_stays_while_a_majority_of_the_voters_answers(
    voters: str, learners: str, answering: str, leads: bool
) -> None:
    """Any answer of its term shows that the follower still follows, a refusal too.

    Source: thesis 6.2, 4.2.1; raft-traps T20.
    """
    core = elect(server(voters=voters, learners=learners))

    for _ in range(CONFIG.election_ticks_max * 2):
        for follower in answering:
            core.step(AppendReply(follower, "a", core.term, False, 0, 0, 99, 0, 0))
        core.tick()
        if core.role is not Role.LEADER:
            break

    assert (core.role is Role.LEADER) is leads


def test_leader_that_stepped_down_waits_a_whole_timeout() -> None:
    """It was a leader for long; its timer starts now.

    Source: thesis 6.2.
    """
    core = lead()
    tick(core, CONFIG.election_ticks_min)
    assert core.role is Role.FOLLOWER

    tick(core, CONFIG.election_ticks_min - 1)

    assert core.role is Role.FOLLOWER


def test_server_that_was_told_to_step_down_leads_no_more_and_stands_no_more() -> None:
    """A state machine that can't be trusted must not answer; its log is still good for others."""
    core = lead()

    core.step_down()
    tick(core, CONFIG.election_ticks_max * 3)

    assert (core.role, core.leader_id) == (Role.FOLLOWER, None)
    assert flush(core) == []


# ---- Evidence that the leader's process is dead ------------------------------------------------

FAST = RaftConfig(
    heartbeat_ticks=3,
    election_ticks_min=100,
    election_ticks_max=200,
    dead_leader_ticks=10,
    dead_leader_vote_ticks=20,
)


def follower_with_evidence(member_id: str = "a", leader_id: str = "b") -> RaftCore:
    core = server(member_id, config=FAST)
    core.step(heartbeat(sender=leader_id, to=member_id))
    flush(core)
    core.leader_died(leader_id)
    return core


def ticks_between_campaigns(core: RaftCore, count: int) -> list[int]:
    pauses: list[int] = []
    since = 0
    while len(pauses) < count:
        core.tick()
        since += 1
        if flush(core):
            pauses.append(since)
            since = 0
    return pauses


def test_followers_campaign_one_after_the_other_soon_after_the_leaders_death() -> None:
    """They all learn of it at one time, and chance alone would often let two of them collide."""
    first, second = follower_with_evidence("a"), follower_with_evidence("c")
    assert (first.role, first.leader_id) == (Role.FOLLOWER, None)

    [first_pause] = ticks_between_campaigns(first, 1)
    [second_pause] = ticks_between_campaigns(second, 1)

    assert first.role is second.role is Role.PRE_CANDIDATE
    assert 2 <= first_pause <= 5
    assert 10 + 2 <= second_pause <= 10 + 5


def test_dead_leader_leaves_no_gap_in_the_order_of_those_who_stand() -> None:
    """ "b" is the first of those who are left."""
    [pause] = ticks_between_campaigns(follower_with_evidence("b", leader_id="a"), 1)

    assert 2 <= pause <= 5


def test_pause_after_evidence_leaves_time_for_votes_grows_and_ends_with_the_normal_timeout() -> (
    None
):
    """A vote may take long; after some attempts the evidence is no better than silence."""
    first = ticks_between_campaigns(follower_with_evidence("a"), DEAD_LEADER_ATTEMPTS_MAX + 2)
    second = ticks_between_campaigns(follower_with_evidence("c"), DEAD_LEADER_ATTEMPTS_MAX + 2)

    for failed in range(1, DEAD_LEADER_ATTEMPTS_MAX):
        low, high = 20 + (2 << failed), 20 + (5 << failed)
        assert low <= first[failed] <= high
        later = 10 << failed
        assert min(low + later, FAST.election_ticks_min) <= second[failed] <= high + later
    for pause in first[DEAD_LEADER_ATTEMPTS_MAX:] + second[DEAD_LEADER_ATTEMPTS_MAX:]:
        assert FAST.election_ticks_min <= pause <= FAST.election_ticks_max


def test_pre_vote_is_granted_after_evidence_and_not_before() -> None:
    """Evidence ends the stickiness of who has it, and of no one else.

    Source: thesis 4.2.3 (the exception); raft-traps T19.
    """
    core = follower_with_evidence()
    assert replies(core, pre_vote(2)) == [VoteReply("a", "c", 2, True, True)]

    without = server(config=FAST)
    without.step(heartbeat())
    flush(without)
    without.leader_died("c")  # someone else's death

    assert replies(without, pre_vote(2)) == []
    assert without.leader_id == "b"


def test_leader_takes_no_evidence_about_itself() -> None:
    """It lives."""
    core = lead()

    core.leader_died("a")

    assert (core.role, core.leader_id) == (Role.LEADER, "a")


def test_false_evidence_costs_nothing_once_the_leader_is_heard_again() -> None:
    """A follower that hears a leader waits a normal timeout, or it would campaign between beats."""
    core = follower_with_evidence()
    core.step(heartbeat())
    flush(core)

    tick(core, FAST.election_ticks_min - 1)

    assert (core.role, core.leader_id) == (Role.FOLLOWER, "b")


# ---- Linearizable reads (thesis 6.4) -----------------------------------------------------------


def test_read_waits_for_an_entry_of_the_own_term_to_be_committed() -> None:
    """Step 1: before it the leader does not know the cluster's commit index.

    Source: thesis 6.4; raft-traps T32, T47.
    """
    core = elect(server(log=log_of(1), term=1))
    core.read_index("r")
    acknowledge(core, "b", index=1)
    assert core.round == 0  # no round may start yet
    assert core.take_reads() == []

    acknowledge(core, "b")  # the no-op
    assert core.committed_in_own_term
    acknowledge(core, "b")  # the round

    assert core.take_reads() == [(2, ["r"])]


def test_read_waits_for_a_round_that_started_after_it_arrived() -> None:
    """Steps 2 and 3: an answer to an earlier round proves too little.

    Source: thesis 6.4; raft-traps T47.
    """
    core = lead()
    tick(core, CONFIG.heartbeat_ticks)
    earlier = core.round

    core.read_index("r")
    core.step(AppendReply("b", "a", 1, True, 1, earlier))
    core.step(AppendReply("c", "a", 1, True, 1, earlier))
    assert core.take_reads() == []
    (message,) = appends(core, "b")
    core.step(AppendReply("b", "a", 1, True, 1, message.round))

    assert core.take_reads() == [(1, ["r"])]


def test_read_gives_the_commit_index_of_its_arrival() -> None:
    """What is committed later need not be waited for; the driver waits until it is applied.

    Source: thesis 6.4 (steps 2, 4 and 5).
    """
    core = lead()
    core.read_index("r")
    core.propose([b"x"])
    flush(core)

    acknowledge(core, "b")

    assert core.commit_index == 2
    assert core.take_reads() == [(1, ["r"])]
    assert core.take_reads() == []


def test_reads_that_arrive_during_a_round_share_the_next_one() -> None:
    """One round answers many, but only those that were there when it began.

    Source: thesis 6.4 (batching); raft-traps T47.
    """
    core = lead()
    core.read_index("first")
    running = core.round
    core.read_index("second")
    core.read_index("third")

    core.step(AppendReply("b", "a", 1, True, 1, running))
    assert core.take_reads() == [(1, ["first"])]
    acknowledge(core, "b")

    assert core.take_reads() == [(1, ["second", "third"])]


@pytest.mark.parametrize(
    ("voters", "learners", "answering", "given"),
    [
        ("a", "", "", True),
        ("abc", "", "b", True),
        ("abcde", "", "b", False),
        ("abcde", "", "be", True),
        ("abc", "d", "d", False),
    ],
)
def test_read_needs_the_answers_of_a_majority_of_the_voters(
    voters: str, learners: str, answering: str, given: bool
) -> None:
    """A learner's answer proves no leadership.

    Source: thesis 6.4, 4.2.1.
    """
    core = lead(server(voters=voters, learners=learners))
    core.read_index("r")

    acknowledge(core, *answering)

    assert bool(core.take_reads()) is given


def test_refused_append_answers_a_round_too() -> None:
    """A follower that lacks entries still recognises the leader.

    Source: thesis 6.4.
    """
    core = lead()
    core.read_index("r")

    core.step(AppendReply("b", "a", 1, False, 0, core.round, 99, 0, 0))

    assert core.take_reads() == [(1, ["r"])]


def test_refusal_of_a_delayed_append_answers_no_round_of_a_later_leadership() -> None:
    """The answer is of the new term, but what it answers is not.

    Source: thesis 6.4; raft-traps T30, T48.
    """
    follower = server("b", term=5)
    (refusal,) = replies(follower, AppendEntries("a", "b", 1, 7, 1, (), 7, 50))
    core = lead(server(term=4))  # the sender of that append, leader again, now of term 5
    core.read_index("r")

    core.step(refusal)

    assert core.take_reads() == []
    assert core.progress["b"].next_index == core.log.last_index + 1


@pytest.mark.parametrize("end", ["newer term", "check-quorum", "step_down"])
def test_read_that_waits_when_the_leadership_ends_is_never_given(end: str) -> None:
    """Not then, and not in a later leadership of the same server.

    Source: thesis 6.4; raft-traps T48, T25.
    """
    core = lead(server(log=log_of(1)))
    core.read_index("in the round")
    core.read_index("waiting")

    if end == "newer term":
        core.step(heartbeat(core.term + 1))
    elif end == "check-quorum":
        tick(core, CONFIG.election_ticks_min)
    else:
        core.step_down()
        core.may_campaign = True
    assert core.role is Role.FOLLOWER
    flush(core)
    lead(core)
    for _ in range(3):
        tick(core, CONFIG.heartbeat_ticks)
        acknowledge(core, "b", "c")

    assert core.take_reads() == []


def test_follower_refuses_a_read() -> None:
    """Only a leader can prove that it leads."""
    with pytest.raises(NotLeaderError):
        server().read_index("r")
