"""What the leader knows of one follower, and when it may be sent more.

A follower is *probed* (one message, then wait for the answer) until the leader knows where their
logs agree; after that entries are *replicated* ahead of the answers, up to a window in flight. One
that needs entries the leader no longer has gets a *snapshot*, and heartbeats meanwhile.

Carved out of ``raft_core.py``, the only caller. No I/O.
"""

from __future__ import annotations

from collections import deque
from enum import Enum

from raft_types import Room

# Appends with entries that may wait for their answer at one follower. While one does, entries
# gather for the next; with sixteen, under load, most messages carried a single entry.
INFLIGHT_MESSAGES_MAX = 1
INFLIGHT_BYTES_MAX = 8 * 1024 * 1024


class ProgressState(Enum):
    """Whether the point of agreement is still searched for, or known, or before the log."""

    PROBE = "probe"
    REPLICATE = "replicate"
    SNAPSHOT = "snapshot"


class Progress:
    """One follower in the current leadership.

    Invariants: match_index < next_index; the log holds next_index, or will, or this is SNAPSHOT.
    """

    def __init__(self, next_index: int, now_ticks: int) -> None:
        self.state = ProgressState.PROBE
        # The follower's disk is known to equal our log up to here; it never goes back.
        self.match_index = 0
        # The next entry to send.
        self.next_index = next_index
        # PROBE: a message is under way, so wait for its answer or the next heartbeat.
        self.probe_sent = False
        # SNAPSHOT: the driver has not begun to send one yet.
        self.snapshot_due = False
        # The highest commit index that a message told the follower.
        self.sent_commit = 0
        # The round that was the newest when match_index last grew. Who refuses later messages that
        # begin no higher has lost what it had: its directory was put back, or its disk lied.
        self.matched_round = 0
        self.has_lost = False
        # The newest heartbeat round sent, and the newest answered.
        self.sent_round = 0
        self.acked_round = 0
        # What its disk had left when it last answered.
        self.room = Room.PLENTY
        # When the follower last answered, in the leader's ticks (check-quorum, thesis 6.2).
        self.heard_ticks = now_ticks
        # A learner's present round of catching up: where it ends, when it began (thesis 4.2.1).
        self.catch_up_index = next_index - 1
        self.catch_up_since_ticks = now_ticks
        self.followed_since_ticks = now_ticks
        self._inflight: deque[tuple[int, int]] = deque()  # (last index, bytes), ascending
        self._inflight_bytes = 0

    def may_send_entries(self, last_index: int) -> bool:
        """Whether an append with entries, of a log up to ``last_index``, may go out now."""
        if self.next_index > last_index:
            return False
        if self.state is ProgressState.REPLICATE:
            return (
                len(self._inflight) < INFLIGHT_MESSAGES_MAX
                and self._inflight_bytes < INFLIGHT_BYTES_MAX
            )
        return self.state is ProgressState.PROBE and not self.probe_sent

    def may_send_news(self, present_round: int, commit_index: int) -> bool:
        """Whether there is something to tell without entries: a round, or that some are committed.

        That they are is news of entries only that this follower has.
        """
        if self.sent_round < present_round:
            return True
        known = self.next_index - 1
        return self.state is ProgressState.REPLICATE and min(commit_index, known) > self.sent_commit

    def sent(self, prev_index: int, last_index: int, size_bytes: int, commit_index: int) -> None:
        """An append of the entries ``prev_index + 1 .. last_index`` is on its way."""
        self.sent_commit = max(self.sent_commit, min(commit_index, last_index))
        if self.state is ProgressState.PROBE:
            self.probe_sent = True
        elif last_index > prev_index:
            self.next_index = last_index + 1
            self._inflight.append((last_index, size_bytes))
            self._inflight_bytes += size_bytes

    def matched(self, index: int, present_round: int) -> bool:
        """The follower holds everything up to ``index``; True if that is news (raft-traps T29)."""
        while self._inflight and self._inflight[0][0] <= index:
            self._inflight_bytes -= self._inflight.popleft()[1]
        advanced = index > self.match_index
        if advanced:
            self.matched_round = present_round
        self.match_index = max(self.match_index, index)
        self.next_index = max(self.next_index, index + 1)
        if self.state is ProgressState.PROBE and index + 1 >= self.next_index:
            self.state = ProgressState.REPLICATE
            self.probe_sent = False
        return advanced

    def probe_from(self, next_index: int) -> None:
        """Forget what is in flight and search from ``next_index`` (but never below match)."""
        self.state = ProgressState.PROBE
        self.next_index = max(next_index, self.match_index + 1)
        self.probe_sent = False
        self.snapshot_due = False
        self.sent_commit = min(self.sent_commit, self.match_index)
        self._inflight.clear()
        self._inflight_bytes = 0

    @property
    def is_receiving_snapshot(self) -> bool:
        """Whether the driver is at sending a state to it."""
        return self.state is ProgressState.SNAPSHOT and not self.snapshot_due

    def need_snapshot(self) -> None:
        """The log no longer holds ``next_index``."""
        self.probe_from(self.next_index)
        self.state = ProgressState.SNAPSHOT
        self.snapshot_due = True
