"""The lease by a clock that the test moves: how long a leader may answer reads by itself."""

from __future__ import annotations

from raft_core import RaftCore
from raft_types import AppendReply
from raft_watch import Lease
from tests.raft_servers import append, lead, server

TIMEOUT_S = 10.0


class Leading:
    """A leader of three and its lease, driven as the node does: rounds, answers, time."""

    def __init__(self, *, enabled: bool = True) -> None:
        self.now_s = 100.0
        self.lease = Lease(enabled, TIMEOUT_S, lambda: self.now_s)
        self.core: RaftCore = server()
        lead(self.core)
        self.lease.begin()
        self.lease.follow(self.core)

    def after(self, seconds: float) -> None:
        self.now_s += seconds
        self.lease.follow(self.core)

    def begin_round(self) -> None:
        self.core.read_index(object())
        self.lease.follow(self.core)

    def answer(self, round_: int | None = None) -> None:
        core = self.core
        core.step(AppendReply("b", "a", core.term, True, core.log.last_index, round_ or core.round))
        self.lease.follow(core)


def test_lease_runs_from_the_begin_of_the_round_that_a_majority_answered() -> None:
    """Thesis 6.4.1: from then on the majority votes for nobody, not from when its answers came."""
    leading = Leading()
    leading.begin_round()
    leading.after(3.0)
    assert not leading.lease.is_valid(), "nobody has answered"

    leading.answer()

    leading.after(4.9)
    assert leading.lease.is_valid()
    leading.after(0.2)
    assert not leading.lease.is_valid(), "0.8 of the timeout after the round began"


def test_lease_is_not_renewed_by_a_round_that_was_answered_before() -> None:
    """However often the node looks, between two rounds nobody has promised anything."""
    leading = Leading()
    leading.begin_round()
    leading.answer()

    for _ in range(9):
        leading.after(1.0)

    assert not leading.lease.is_valid()


def test_lease_is_not_renewed_by_an_answer_to_an_earlier_round() -> None:
    leading = Leading()
    leading.begin_round()
    earlier = leading.core.round
    leading.answer()
    leading.after(7.0)
    leading.begin_round()
    leading.answer(earlier)

    leading.after(1.5)

    assert not leading.lease.is_valid()


def test_lease_ends_with_the_leadership() -> None:
    """Whatever it was promised as a leader, another may lead now."""
    leading = Leading()
    leading.begin_round()
    leading.answer()
    assert leading.lease.is_valid()

    leading.core.step(append(leading.core.term + 1))
    leading.lease.follow(leading.core)
    assert not leading.lease.is_valid()

    lead(leading.core)
    leading.lease.begin()
    leading.lease.follow(leading.core)
    assert not leading.lease.is_valid()


def test_lease_of_a_new_leader_waits_for_the_old_one() -> None:
    """Longer than any old lease can last: its voters may have promised something just before."""
    leading = Leading()
    assert leading.lease.must_wait()
    leading.after(TIMEOUT_S - 0.1)
    assert leading.lease.must_wait()
    assert not leading.lease.just_ended()
    leading.after(0.2)

    assert not leading.lease.must_wait()
    assert [leading.lease.just_ended() for _ in range(2)] == [True, False]


def test_lease_when_not_asked_for_is_never_valid_and_never_waited_for() -> None:
    leading = Leading(enabled=False)
    leading.begin_round()
    leading.answer()

    assert not leading.lease.is_valid()
    assert not leading.lease.must_wait()
