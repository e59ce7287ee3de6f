"""Leadership transfer, thesis 3.10: one leader makes way for another without an election timeout."""

from __future__ import annotations

import pytest

from raft_core import (
    MembershipChangeRefusedError,
    NotLeaderError,
    RaftCore,
    TransferRefusedError,
    TransferUnderWayError,
)
from raft_types import Message, Role, TimeoutNow, VoteReply, VoteRequest
from tests.raft_servers import CONFIG, acknowledge, appends, flush, lead, member, server


def sent(core: RaftCore) -> list[Message]:
    """What the core has to say now."""
    ready = core.ready()
    if ready is None:
        return []
    core.advance(ready)
    return list(ready.messages)


def test_target_that_has_everything_is_told_at_once() -> None:
    core = lead()

    core.transfer_to("b")

    assert sent(core) == [TimeoutNow("a", "b", core.term)]
    assert core.role is Role.LEADER, "until the other is elected"


def test_target_is_told_only_when_it_has_everything_and_all_is_committed() -> None:
    """Otherwise a write under way would end as unknown."""
    core = lead()
    core.propose([b"x"])
    flush(core)
    appends(core, "b")
    appends(core, "c")

    core.transfer_to("b")
    assert sent(core) == []
    acknowledge(core, "c")
    assert sent(core) == [], "committed, but b does not have it yet"
    acknowledge(core, "b")

    assert sent(core) == [TimeoutNow("a", "b", core.term)]


def test_target_is_told_when_the_leaders_own_disk_completes_the_majority() -> None:
    """Nothing else may come after that which would bring the matter up again."""
    core = lead()
    core.propose([b"x"])
    ready = core.ready()
    assert ready is not None
    core.transfer_to("b")
    appends(core, "b")
    acknowledge(core, "b")
    assert core.commit_index < core.log.last_index, "b alone is no majority"

    core.advance(ready)

    assert sent(core) == [TimeoutNow("a", "b", core.term)]


def test_nothing_new_is_accepted_while_it_lasts() -> None:
    """Else the target might never have everything."""
    core = lead()
    core.transfer_to("b")

    with pytest.raises(TransferUnderWayError):
        core.propose([b"x"])
    with pytest.raises(MembershipChangeRefusedError):
        core.add_learner(member("d", voter=False))
    with pytest.raises(TransferRefusedError):
        core.transfer_to("c")


def test_leader_goes_on_if_the_target_does_not_take_over() -> None:
    """After a minimum election timeout; reads need no such wait."""
    core = lead()
    core.transfer_to("b")

    for _ in range(CONFIG.election_ticks_min):
        core.tick()
        flush(core)
        acknowledge(core, "b", "c")

    assert core.transfer_target is None
    core.propose([b"x"])


def test_target_that_is_not_named_is_the_one_whose_log_is_furthest() -> None:
    core = lead()
    core.propose([b"x"])
    flush(core)
    appends(core, "b")
    appends(core, "c")
    acknowledge(core, "c")

    core.transfer_to(None)

    assert core.transfer_target == "c"


def test_who_is_no_voter_or_silent_is_not_a_target() -> None:
    core = lead()
    with pytest.raises(TransferRefusedError):
        core.transfer_to("stranger")
    for _ in range(CONFIG.election_ticks_min):
        core.tick()
        flush(core)
        acknowledge(core, "c")
    with pytest.raises(TransferRefusedError):
        core.transfer_to("b")


def test_only_a_leader_hands_over() -> None:
    with pytest.raises(NotLeaderError):
        server().transfer_to("b")


def test_target_campaigns_at_once_without_asking_first() -> None:
    core = server("b")
    core.step(TimeoutNow("a", "b", core.term))

    requests = [message for message in sent(core) if isinstance(message, VoteRequest)]

    assert core.role is Role.CANDIDATE
    assert {request.to for request in requests} == {"a", "c"}
    assert all(request.transfer and not request.pre_vote for request in requests)


def test_stale_order_to_campaign_is_ignored() -> None:
    core = lead(server("b"))
    core.step(TimeoutNow("a", "b", core.term - 1))

    assert core.role is Role.LEADER
    assert sent(core) == []


def test_voters_owe_the_leader_no_loyalty_when_it_asked_for_the_election_itself() -> None:
    """Without the mark the same request is not even answered (thesis 4.2.3)."""
    core = lead()
    term, last = core.term + 1, core.log.last_index
    core.step(VoteRequest("b", "a", term, last, core.log.last_term, False))
    assert core.leader_id == "a"

    core.step(VoteRequest("b", "a", term, last, core.log.last_term, False, transfer=True))

    assert core.role is Role.FOLLOWER
    assert VoteReply("a", "b", term, True, False) in sent(core)


def test_leader_that_gives_way_may_lead_again() -> None:
    core = lead()

    core.give_way()

    assert core.role is Role.FOLLOWER
    assert core.may_campaign
