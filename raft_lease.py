"""The leader's lease: reads without a round, for those who trust their clocks (thesis 6.4.1).

Called by ``raft_node.py`` with its lock held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from raft_core import RaftCore
from raft_types import Role


class Lease:
    """The leader's lease, which answers reads without a round (thesis 6.4.1).

    Only with ``--read-mode lease``; otherwise never valid. A round that a majority has answered
    proves that none of them votes for another for an election timeout from its start. That
    promise is not kept where a dead leader's followers campaign at once: so a new leader waits
    until any old lease has run out. Caller holds the node's lock.
    """

    # Of the minimum election timeout: the rest is for clocks that run at different rates.
    FRACTION = 0.8

    def __init__(
        self, enabled: bool, election_timeout_min_s: float, clock: Callable[[], float]
    ) -> None:
        self._enabled = enabled
        self._election_timeout_min_s = election_timeout_min_s
        self._clock = clock
        self._started: deque[tuple[int, float]] = deque()  # (round, when it began), unconfirmed
        self._valid_until_s = 0.0
        self._wait_until_s = 0.0

    def begin(self) -> None:
        """This node has just become the leader."""
        self._started.clear()
        self._valid_until_s = 0.0
        if self._enabled:
            self._wait_until_s = self._clock() + self._election_timeout_min_s

    def follow(self, core: RaftCore) -> None:
        """Note which rounds have begun, before any message of theirs leaves, or were confirmed."""
        if not self._enabled or core.role is not Role.LEADER:
            self._valid_until_s = 0.0
            return
        if not self._started or self._started[-1][0] < core.round:
            self._started.append((core.round, self._clock()))
        confirmed = core.confirmed_round
        while self._started and self._started[0][0] <= confirmed:
            _, began_s = self._started.popleft()
            self._valid_until_s = began_s + self._election_timeout_min_s * self.FRACTION

    def is_valid(self) -> bool:
        """Whether this leader may answer a read by itself now."""
        return self._enabled and self._clock() < self._valid_until_s

    def must_wait(self) -> bool:
        """Whether the last leader's lease may still run."""
        return self._enabled and self._clock() < self._wait_until_s

    def just_ended(self) -> bool:
        """True once, when waiting for the old lease is over."""
        if self._wait_until_s == 0.0 or self.must_wait():
            return False
        self._wait_until_s = 0.0
        return True
