"""Raft by the paper: one test for each rule of terms, elections, replication and safety.

Durability and the size of messages are in ``test_raft_core_ready.py``; what the thesis adds
(pre-vote, check-quorum, reads, membership) in ``test_raft_core_thesis.py``; whole stories in
``test_raft_scenarios.py``.
"""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from raft_core import ImpossibleMessageError, NotLeaderError, RaftCore
from raft_log import RaftLog
from raft_types import (
    AppendReply,
    Entry,
    EntryKind,
    HardState,
    HashReport,
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
    replies,
    server,
    terms,
    time_out,
)


def request_vote(term: int, last_index: int = 0, last_term: int = 0, by: str = "b") -> VoteRequest:
    return VoteRequest(by, "a", term, last_index, last_term, False)


def votes_for(core: RaftCore, request: VoteRequest) -> bool:
    (reply,) = replies(core, request)
    assert isinstance(reply, VoteReply)
    return reply.granted


def candidate(name: str = "a", voters: str = "abc") -> RaftCore:
    """A candidate of term 1 whose own vote is on disk and whose requests are sent."""
    core = server(name, voters)
    time_out(core)
    for voter in core.membership.voters:
        if voter != name and core.role is Role.PRE_CANDIDATE:
            core.step(VoteReply(voter, name, 1, True, True))
    flush(core)
    assert core.role is Role.CANDIDATE
    return core


# ---- Terms (paper 5.1) -------------------------------------------------------------------------


@pytest.mark.parametrize("role", [Role.FOLLOWER, Role.CANDIDATE, Role.LEADER])
def test_server_of_any_role_follows_a_newer_term(role: Role) -> None:
    """Who sees a newer term takes it over and is a follower.

    Source: paper 5.1.
    """
    core = server() if role is Role.FOLLOWER else candidate()
    if role is Role.LEADER:
        core = lead()
    assert core.role is role

    core.step(append(7))

    assert (core.role, core.term, core.leader_id) == (Role.FOLLOWER, 7, "b")


def test_append_of_an_older_term_is_refused_with_the_newer_one() -> None:
    """A stale leader learns that it is stale, and its entries are not taken.

    Source: paper 5.1, figure 2 (AppendEntries, receiver 1).
    """
    core = server(term=5)

    reply = answer(core, append(4, *log_of(4)))

    assert (reply.success, reply.term, core.log.last_index) == (False, 5, 0)


def test_vote_request_of_an_older_term_is_refused_with_the_newer_one() -> None:
    """A stale candidate learns the term; silence would leave it behind for ever.

    Source: paper 5.1; raft-traps T18.
    """
    assert replies(server(term=5), request_vote(4)) == [VoteReply("a", "b", 5, False, False)]


def test_replies_of_an_older_term_are_ignored() -> None:
    """An answer to an earlier leadership says nothing about this one.

    Source: paper 5.1; raft-traps T30.
    """
    core = elect(server(log=log_of(1, 1, 1)))

    core.step(AppendReply("b", "a", core.term - 1, True, core.log.last_index, 9))
    core.step(VoteReply("b", "a", core.term - 1, False, False))

    assert core.progress["b"].match_index == 0
    assert core.progress["b"].acked_round == 0
    assert core.role is Role.LEADER


def test_core_refuses_a_message_that_is_not_of_raft() -> None:
    """State hashes are the driver's; one that arrives here is a bug of the driver."""
    with pytest.raises(TypeError):
        server().step(HashReport("b", "a", 0, 1, 1, False))


# ---- Leader election (paper 5.2) ---------------------------------------------------------------


def test_server_starts_as_a_follower_with_what_it_had_saved() -> None:
    """Term, vote and log survive; role, leader and commit index do not.

    Source: paper 5.2 and figure 2 (state).
    """
    core = server(log=log_of(1, 2), term=3, voted_for="c")

    assert (core.role, core.term, core.voted_for) == (Role.FOLLOWER, 3, "c")
    assert (core.leader_id, core.commit_index, core.log.last_index) == (None, 0, 2)
    assert not core.has_ready


def test_leader_sends_heartbeats_to_all_at_each_interval() -> None:
    """Heartbeats without entries hold the leadership.

    Source: paper 5.2.
    """
    core = lead()
    acknowledge(core, "b", "c")

    for _ in range(CONFIG.heartbeat_ticks - 1):
        core.tick()
        assert not core.wants_append("b")
    core.tick()

    for follower in "bc":
        (heartbeat,) = appends(core, follower)
        assert (heartbeat.entries, heartbeat.round) == ((), core.round)


def test_follower_that_hears_no_leader_campaigns_after_its_timeout() -> None:
    """A campaign begins within the drawn timeout, and not before the minimum.

    Source: paper 5.2.
    """
    core = server()

    for _ in range(CONFIG.election_ticks_min - 1):
        core.tick()
    assert not core.has_ready
    sent = time_out(core)

    assert core.role is Role.PRE_CANDIDATE
    assert {message.to for message in sent} == {"b", "c"}


def test_candidate_raises_its_term_votes_for_itself_and_asks_all_voters() -> None:
    """The request carries the end of the candidate's log.

    Source: paper 5.2, figure 2 (rules for candidates).
    """
    core = server(log=log_of(1, 2), term=2)
    time_out(core)

    sent = replies(core, VoteReply("b", "a", 3, True, True))

    assert (core.role, core.term, core.voted_for) == (Role.CANDIDATE, 3, "a")
    assert sent == [VoteRequest("a", to, 3, 2, 2, False) for to in "bc"]


def test_timeout_is_drawn_anew_for_every_election() -> None:
    """Timeouts lie in the interval and differ, so that a split vote is soon resolved.

    Source: paper 5.2; raft-traps T14.
    """
    core = server()
    campaigns = [0]
    for now in range(1, 4000):
        core.tick()
        if flush(core):
            campaigns.append(now)

    pauses = [later - earlier for earlier, later in pairwise(campaigns)]
    assert set(pauses) == set(range(CONFIG.election_ticks_min, CONFIG.election_ticks_max + 1))


def test_vote_goes_to_one_candidate_a_term_first_come_first_served() -> None:
    """A second candidate is refused; the first is told again, for the answer may be lost.

    Source: paper 5.2, figure 2 (RequestVote, receiver 2).
    """
    core = server()

    assert votes_for(core, request_vote(1, by="b"))
    assert not votes_for(core, request_vote(1, by="c"))
    assert votes_for(core, request_vote(1, by="b"))


def test_vote_survives_a_restart() -> None:
    """The vote is in the hard state that leaves with the answer, in one record with its term.

    Source: paper figure 2 (persistent state); raft-traps T1, T2.
    """
    core = server()
    core.step(request_vote(4, by="b"))

    ready = core.ready()

    assert ready is not None
    assert ready.hard_state == HardState(4, "b")
    assert ready.messages == (VoteReply("a", "b", 4, True, False),)
    restarted = server(term=4, voted_for="b")
    assert not votes_for(restarted, request_vote(4, by="c"))


def test_stepping_down_within_a_term_keeps_the_vote() -> None:
    """Two leaders of one term follow from a vote that was forgotten.

    Source: raft-traps T3.
    """
    core = candidate()
    core.step(append(1, sender="c"))
    flush(core)
    assert (core.role, core.voted_for) == (Role.FOLLOWER, "a")
    leader = lead()
    leader.step_down()

    assert leader.voted_for == "a"
    assert not votes_for(leader, request_vote(leader.term, 9, leader.term))


def test_timer_starts_again_when_a_vote_is_granted_and_not_when_it_is_refused() -> None:
    """Only who may become leader is given time.

    Source: paper figure 2 (rules for followers); raft-traps T14.
    """

    def ticks_left(request: VoteRequest) -> int:
        core = server(log=log_of(1))
        for _ in range(CONFIG.election_ticks_min - 1):
            core.tick()
        replies(core, request)
        for ticks in range(1, 100):
            core.tick()
            if core.role is not Role.FOLLOWER:
                return ticks
        raise AssertionError("never campaigned")

    undisturbed = ticks_left(request_vote(1))  # its log is too short: refused
    granted = ticks_left(request_vote(2, 1, 1))

    assert granted == undisturbed + CONFIG.election_ticks_min - 1


def test_timer_starts_again_on_appends_of_the_current_leader_only() -> None:
    """A stale leader does not keep an election from happening.

    Source: paper figure 2 (rules for followers); raft-traps T14.
    """
    core = server(term=2)
    for _ in range(CONFIG.election_ticks_max * 3):
        core.tick()
        replies(core, append(2))
    assert (core.role, core.leader_id) == (Role.FOLLOWER, "b")

    for _ in range(CONFIG.election_ticks_max):
        core.tick()
        replies(core, append(1, sender="c"))

    assert core.role is Role.PRE_CANDIDATE


@pytest.mark.parametrize(("size", "needed"), [(1, 0), (2, 1), (3, 1), (4, 2), (5, 2)])
def test_candidate_wins_with_the_votes_of_a_majority(size: int, needed: int) -> None:
    """Besides its own: none of 1, one of 2 or 3, two of 4 or 5.

    Source: paper 5.2; raft-traps T5.
    """
    others = "abcde"[1:size]
    core = candidate(voters="abcde"[:size]) if others else server(voters="a")
    if not others:
        time_out(core)

    for voter in others[:needed]:
        assert core.role is Role.CANDIDATE
        core.step(VoteReply(voter, "a", 1, True, False))

    assert (core.role, core.term) == (Role.LEADER, 1)


def test_server_that_is_alone_leads_after_its_first_tick() -> None:
    """No other leader can be alive, so there is nothing to wait for; its vote is synced all the same.

    Source: raft-traps T5.
    """
    core = server(voters="a", log=log_of(3))

    core.tick()
    assert (core.role, core.term) == (Role.CANDIDATE, 4)
    flush(core)

    assert core.role is Role.LEADER


def test_votes_are_counted_by_voter_not_by_message() -> None:
    """The network may deliver a vote twice.

    Source: paper 5.2; raft-traps T15.
    """
    core = candidate(voters="abcde")

    for _ in range(5):
        core.step(VoteReply("b", "a", 1, True, False))
    assert (core.role, core.term) == (Role.CANDIDATE, 1)
    core.step(VoteReply("c", "a", 1, True, False))

    assert core.role is Role.LEADER


def test_candidate_refused_by_a_majority_is_a_follower_again() -> None:
    """It cannot win this term any more.

    Source: paper 5.2.
    """
    core = candidate()

    core.step(VoteReply("b", "a", 1, False, False))
    assert core.role is Role.CANDIDATE
    core.step(VoteReply("c", "a", 1, False, False))

    assert (core.role, core.term) == (Role.FOLLOWER, 1)


def test_candidate_that_hears_the_leader_of_its_term_follows_it() -> None:
    """Another server has won.

    Source: paper 5.2.
    """
    core = candidate()

    answer(core, append(1, *log_of(1), sender="c"))

    assert (core.role, core.leader_id, core.log.last_index) == (Role.FOLLOWER, "c", 1)


def test_candidate_without_an_outcome_tries_again_in_a_new_term() -> None:
    """A split vote ends with the next timeout.

    Source: paper 5.2.
    """
    core = candidate()
    for _ in range(CONFIG.election_ticks_max):
        core.tick()
    assert core.role is Role.PRE_CANDIDATE

    replies(core, VoteReply("c", "a", 2, True, True))

    assert (core.role, core.term) == (Role.CANDIDATE, 2)


def test_late_vote_does_not_count_once_the_candidacy_is_over() -> None:
    """A vote of this term that arrives at a follower is too late."""
    core = candidate()
    core.step(append(1, sender="c"))

    core.step(VoteReply("b", "a", 1, True, False))

    assert core.role is Role.FOLLOWER


def test_second_leader_in_one_term_is_not_believed() -> None:
    """Election safety is broken elsewhere, or somebody lies; this server stays with the first.

    Source: paper figure 3; raft-traps T71.
    """
    core = server()
    core.step(append(1, sender="b"))

    with pytest.raises(ImpossibleMessageError, match="two leaders"):
        core.step(append(1, *log_of(1), sender="c"))

    assert (core.leader_id, core.log.last_index) == ("b", 0)


def test_leader_does_not_believe_another_of_its_own_term() -> None:
    """It was elected by a majority, which votes once.

    Source: paper figure 3; raft-traps T71.
    """
    core = lead()

    with pytest.raises(ImpossibleMessageError, match="two leaders"):
        core.step(append(core.term, sender="b"))

    assert core.role is Role.LEADER


def test_answer_to_what_was_not_sent_moves_nothing() -> None:
    """Neither the commit index nor a read may rest on it (thesis 6.4).

    Source: raft-traps T30, T71.
    """
    core = lead()
    core.propose([b"x"])
    core.read_index("r")

    for match_index, round_ in ((core.log.last_index + 1, 0), (0, core.round + 1)):
        with pytest.raises(ImpossibleMessageError, match="not sent"):
            core.step(AppendReply("b", "a", core.term, True, match_index, round_))

    assert core.commit_index < core.log.last_index
    assert core.take_reads() == []


# ---- Log replication (paper 5.3) ---------------------------------------------------------------


def test_leader_starts_its_term_with_a_no_op_sent_to_all() -> None:
    """Without an entry of its own term it may neither commit nor read.

    Source: paper 8, thesis 6.4; raft-traps T32.
    """
    core = elect(server(log=log_of(1)))

    (message,) = appends(core, "b")

    assert (message.prev_index, message.prev_term) == (1, 1)
    assert message.entries == (Entry(2, 2, EntryKind.NOOP, b""),)


@pytest.mark.parametrize(
    ("size", "acks", "committed"),
    [
        (2, "", False),
        (2, "b", True),
        (3, "", False),
        (3, "b", True),
        (4, "b", False),
        (4, "bc", True),
        (5, "b", False),
        (5, "bc", True),
    ],
)
def test_entry_is_committed_once_a_majority_holds_it(size: int, acks: str, committed: bool) -> None:
    """The leader's own copy is one of them.

    Source: paper 5.3.
    """
    core = elect(server(voters="abcde"[:size]))
    index = core.propose([b"x"])
    flush(core)

    acknowledge(core, *acks)

    assert core.commit_index == (index if committed else 0)


def test_followers_learn_of_a_commit_without_waiting_for_a_heartbeat() -> None:
    """The next message carries the commit index; if none is due, one becomes due.

    Source: paper 5.3.
    """
    core = lead()
    index = core.propose([b"x"])
    flush(core)
    appends(core, "b")

    acknowledge(core, "b")
    (message,) = appends(core, "b")

    assert (message.entries, message.commit_index) == ((), index)
    assert appends(core, "b") == []


def test_committed_entries_are_given_in_order_and_once_they_are_known() -> None:
    """What may be applied ends at the commit index.

    Source: paper figure 2 (rules for all servers).
    """
    core = server()
    answer(core, append(1, *log_of(1, 1, 1), commit=2))

    assert core.entries_to_apply(1, 1 << 20) == tuple(log_of(1, 1))
    core.applied_to(2)
    assert core.entries_to_apply(3, 1 << 20) == ()
    with pytest.raises(AssertionError):
        core.applied_to(3)


def test_nothing_is_given_to_apply_after_a_restart_until_a_leader_commits() -> None:
    """The commit index is volatile: an entry on disk alone says nothing, in memory or not.

    Source: paper figure 2 (state); raft-traps T9.
    """
    entries = log_of(1, 1, 1)
    log = RaftLog(3, [(1, 1)], entries[2:])
    core = RaftCore("a", CONFIG, log, HardState(1, None), [], random.Random(1))

    assert core.entries_to_apply(1, 1 << 20) == ()
    core.step(append(1, after=(3, 1), commit=1, heartbeat=1))
    assert core.entries_to_apply(1, 1 << 20) is None  # committed, but to be read from disk


def test_proposal_to_a_follower_is_refused_and_appends_nothing() -> None:
    """Only a leader takes commands.

    Source: paper 5.3; raft-traps T52 (a definite no).
    """
    core = server()

    with pytest.raises(NotLeaderError):
        core.propose([b"x"])

    assert core.log.last_index == 0


@pytest.mark.parametrize(
    ("prev", "hint"),
    [
        ((7, 3), (5, 3)),  # beyond the end: may agree at the end
        ((5, 5), (5, 3)),  # our term is older there: may agree there
        ((5, 2), (2, 1)),  # our terms are newer: skip all of them
        ((3, 1), (2, 1)),
    ],
)
def test_follower_without_the_previous_entry_refuses_and_says_where_it_may_agree(
    prev: tuple[int, int], hint: tuple[int, int]
) -> None:
    """The consistency check, and the hint that lets the leader skip whole terms.

    Source: paper 5.3; raft-traps T26, T35.
    """
    core = server(log=log_of(1, 1, 3, 3, 3), term=5)

    reply = answer(core, append(5, Entry(prev[0] + 1, 5, EntryKind.NOOP, b""), after=prev))

    assert (reply.success, reply.prev_index) == (False, prev[0])
    assert (reply.hint_index, reply.hint_term) == hint
    assert core.log.last_index == 5


def test_conflicting_entries_are_replaced_with_all_that_follow() -> None:
    """The leader's log wins.

    Source: paper 5.3, figure 2 (AppendEntries, receiver 3 and 4).
    """
    core = server(log=log_of(1, 1, 2, 2))
    new = Entry(3, 4, EntryKind.COMMAND, b"new")

    reply = answer(core, append(4, log_of(1, 1)[1], new, after=(1, 1)))

    assert (reply.success, reply.match_index) == (True, 3)
    assert terms(core) == [1, 1, 4]
    assert core.truncated_count == 2


def test_delayed_append_does_not_cut_what_a_later_one_brought() -> None:
    """Only an entry that conflicts is a reason to truncate.

    Source: paper figure 2 (AppendEntries, receiver 3); raft-traps T27.
    """
    core = server()
    entries = log_of(1, 1, 1, 1)
    answer(core, append(1, *entries))

    reply = answer(core, append(1, *entries[:2]))

    assert reply.match_index == 2  # what this message verified, and no more
    assert core.log.last_index == 4
    assert core.truncated_count == 0


def test_append_delivered_twice_changes_nothing() -> None:
    """AppendEntries is idempotent.

    Source: paper 5.5.
    """
    core = server()
    message = append(1, *log_of(1, 1), commit=1)

    first, second = answer(core, message), answer(core, message)

    assert first == second
    assert (core.log.last_index, core.commit_index) == (2, 1)


@pytest.mark.parametrize(
    ("after", "entries", "leader_commit", "expected"),
    [
        ((2, 1), 0, 9, 2),  # a heartbeat verifies up to its previous entry
        ((1, 1), 1, 9, 2),
        ((4, 1), 0, 3, 3),
        ((4, 1), 0, 0, 1),  # never lower
    ],
)
def test_follower_commits_no_further_than_the_message_verified(
    after: tuple[int, int], entries: int, leader_commit: int, expected: int
) -> None:
    """min(leaderCommit, index of last new entry), and never back.

    Source: paper figure 2 (AppendEntries, receiver 5); raft-traps T28.
    """
    log = log_of(1, 1, 1, 1)
    core = server(log=log)
    answer(core, append(2, after=(1, 1), commit=1, heartbeat=1))

    new = log[after[0] : after[0] + entries]
    answer(core, append(2, *new, after=after, commit=leader_commit, heartbeat=1))

    assert core.commit_index == expected


def test_committed_entry_is_never_replaced() -> None:
    """A leader that tries is a broken one: it is not believed.

    Source: paper figure 3 (leader completeness); raft-traps T71.
    """
    core = server()
    answer(core, append(1, *log_of(1), commit=1))

    with pytest.raises(ImpossibleMessageError, match="replace 1, a committed entry"):
        core.step(append(2, Entry(1, 2, EntryKind.NOOP, b"")))

    assert terms(core) == [1]


def test_match_index_never_goes_back() -> None:
    """Replies may be reordered; what a follower's disk held it still holds.

    Source: raft-traps T29.
    """
    core = lead()
    index = core.propose([b"x", b"y"]) + 1
    appends(core, "b")

    acknowledge(core, "b", index=index)
    acknowledge(core, "b", index=1)

    assert core.progress["b"].match_index == index
    assert core.progress["b"].next_index == index + 1


def test_stale_refusal_does_not_move_a_follower_back() -> None:
    """A refusal below what the follower has acknowledged since is old news.

    Source: raft-traps T29.
    """
    core = lead()
    match_index = core.progress["b"].match_index

    core.step(AppendReply("b", "a", core.term, False, 0, 0, match_index, 0, 0))

    assert core.progress["b"].next_index == match_index + 1
    assert appends(core, "b") == []


def test_follower_that_lacks_what_it_acknowledged_is_named_and_counted_on_no_more() -> None:
    """An old copy of its directory was put back, or its disk lied: it is not filled up again.

    Its vote may have let something be lost already; and by what it acknowledged entries were
    committed, so that the match index stays (raft-traps T29).
    """
    core = lead()
    match_index = core.progress["b"].match_index
    refusal = AppendReply("b", "a", core.term, False, 0, core.round, match_index, 0, 0)
    core.step(refusal)
    assert core.take_notices() == core.troubles == []  # sent before "b" acknowledged, perhaps

    for _ in range(core.config.heartbeat_ticks):
        core.tick()
    core.step(replace(refusal, round=core.round))
    core.step(replace(refusal, round=core.round))

    [trouble] = core.troubles
    assert "b has lost entries that it had acknowledged" in trouble
    assert core.take_notices() == [trouble]
    assert core.progress["b"].match_index == match_index
    acknowledge(core, "c")
    assert core.role is Role.LEADER


def test_reply_of_a_stranger_is_ignored() -> None:
    """Who is not a member has no say."""
    core = lead()

    core.step(AppendReply("z", "a", core.term, True, 1, 1))

    assert "z" not in core.progress


def test_refused_leader_backs_up_by_terms_not_by_entries() -> None:
    """A divergence of hundreds of entries in two terms takes a few messages.

    Source: paper 5.3 (the end); raft-traps T35.
    """
    leader = elect(server("a", log=log_of(*[1] * 3, *[4] * 300)))
    follower = server("b", log=log_of(*[1] * 3, *[2] * 200, *[3] * 200))

    rounds = 0
    while leader.progress["b"].match_index < leader.log.last_index:
        rounds += 1
        (message,) = appends(leader, "b")
        leader.step(answer(follower, message))

    assert rounds <= 4
    assert terms(follower) == terms(leader)


FIGURE_7 = {
    "a": [1, 1, 1, 4, 4, 5, 5, 6, 6],
    "b": [1, 1, 1, 4],
    "c": [1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 6],
    "d": [1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 7, 7],
    "e": [1, 1, 1, 4, 4, 4, 4],
    "f": [1, 1, 1, 2, 2, 2, 3, 3, 3, 3, 3],
}


@pytest.mark.parametrize("case", FIGURE_7)
def test_leader_brings_every_follower_of_figure_7_to_its_own_log(case: str) -> None:
    """Missing, extra, or both: the follower's log ends equal to the leader's.

    Source: paper figure 7.
    """
    leader_log = log_of(1, 1, 1, 4, 4, 5, 5, 6, 6, 6)
    leader = elect(server("a", "abc", log=leader_log, term=7))
    follower = server("b", "abc", log=log_of(*FIGURE_7[case]), term=7)

    for _ in range(10):
        for message in appends(leader, "b"):
            for reply in replies(follower, message):
                leader.step(reply)

    assert terms(follower) == [1, 1, 1, 4, 4, 5, 5, 6, 6, 6, 8]
    assert leader.progress["b"].match_index == 11


# ---- Safety (paper 5.4) ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last_index", "last_term", "granted"),
    [(2, 2, True), (3, 2, True), (1, 2, False), (1, 3, True), (9, 1, False)],
)
def test_vote_is_denied_to_a_log_that_is_less_up_to_date(
    last_index: int, last_term: int, granted: bool
) -> None:
    """So that a leader holds every committed entry.

    Source: paper 5.4.1; raft-traps T16.
    """
    core = server(log=log_of(1, 2))

    assert votes_for(core, request_vote(4, last_index, last_term)) is granted
    assert core.term == 4


def test_leader_commits_only_entries_of_its_own_term_by_counting() -> None:
    """An old entry on a majority may still be overwritten; one of the own term commits it too.

    Source: paper 5.4.2, figure 8; raft-traps T31.
    """
    core = elect(server(log=log_of(1, 2), term=3))

    acknowledge(core, "b", "c", index=2)
    assert core.commit_index == 0
    acknowledge(core, "b", index=3)

    assert core.commit_index == 3


def test_newly_elected_leader_never_overwrites_its_own_log() -> None:
    """It only appends.

    Source: paper figure 3 (leader append-only).
    """
    core = elect(server(log=log_of(1, 1, 2)))

    core.step(AppendReply("b", "a", core.term, False, 0, 0, 3, 0, 0))

    assert terms(core) == [1, 1, 2, 3]


def test_settings_that_cannot_elect_are_refused() -> None:
    """Heartbeats must come more often than election timeouts.

    Source: paper 5.6 (the timing requirement).
    """
    with pytest.raises(ValueError, match="heartbeat"):
        RaftConfig(heartbeat_ticks=10, election_ticks_min=10, election_ticks_max=20)
