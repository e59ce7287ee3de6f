"""What the driver watches beside the core: the leader's lease, and this node's own disk.

Called by ``raft_node.py`` with its lock held, unless a method says otherwise.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Final

from raft_core import RaftCore
from raft_types import Role, Room
from replication_log import ReplicationLog
from replication_log_format import DISK_FAULTS, DiskRefusesError

log = logging.getLogger(__name__)

# Below the first only deletions are done, below the second nothing is written, so that what was
# accepted still fits. There is a warning long before.
DISK_WARNING_BYTES: Final = 256 * 1024 * 1024
DISK_RESERVE_BYTES: Final = 64 * 1024 * 1024
DISK_FLOOR_BYTES: Final = 32 * 1024 * 1024


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
        self._noted_round = 0  # the last that is, or was, in the next
        self._started: deque[tuple[int, float]] = deque()  # (round, when it began), unconfirmed
        self._valid_until_s = 0.0
        self._wait_until_s = 0.0

    def begin(self) -> None:
        """This node has just become the leader."""
        self._started.clear()
        self._noted_round = 0
        self._valid_until_s = 0.0
        if self._enabled:
            self._wait_until_s = self._clock() + self._election_timeout_min_s

    def follow(self, core: RaftCore) -> None:
        """Note which rounds have begun, before any message of theirs leaves, or were confirmed."""
        if not self._enabled or core.role is not Role.LEADER:
            self._valid_until_s = 0.0
            return
        if self._noted_round < core.round:
            self._noted_round = core.round
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


class DiskWatch:
    """Whether this node's own disk has room, takes what is written, and answers at all."""

    def __init__(self, disk: ReplicationLog) -> None:
        self._disk = disk
        self.room = Room.PLENTY  # as it was at the last look
        self._free_bytes = DISK_WARNING_BYTES
        self._refusal = ""  # why the disk takes nothing now
        self.hangs = False
        # How long, in ticks of a process that runs, the present write has taken.
        self._writing_ticks = 0
        self._writes_done = self._writes_watched = 0

    @property
    def trouble(self) -> str:
        """What is wrong, for a person; "" if nothing is."""
        if self._refusal:
            return f"{self._refusal}: make room, or mend it; this node then goes on by itself"
        if self.hangs:
            return "the disk hangs"
        if self.room is not Room.PLENTY:
            return "the disk is almost full"
        if self._free_bytes < DISK_WARNING_BYTES:
            return f"the disk has {self._free_bytes >> 20} MiB left"
        return ""

    def room_trouble(self, room: Room) -> str:
        """What clients of this node may not write where the cluster has this ``room``; "" if all."""
        if room is Room.PLENTY:
            return ""
        what = "all but deletions" if room is Room.SHORT else "all writes"
        where = "a majority's disks are" if self.room < room else "the disk is"
        return f"{where} almost full: {what} are refused until there is room"

    # ---- Without the lock: thread raft-log-writer; one writer, so that readers need none --------

    def look(self) -> None:
        """See how much room there is."""
        before = self.trouble
        self._free_bytes = free_bytes = self._disk.bytes_free()
        if free_bytes >= DISK_RESERVE_BYTES:
            self.room = Room.PLENTY
        else:
            self.room = Room.SHORT if free_bytes >= DISK_FLOOR_BYTES else Room.NONE
        if bool(before) != bool(self.trouble):
            log.warning("%s", self.trouble or "the disk has room again")

    # ---- Without the lock: who writes to the log, one thread at a time --------------------------

    def refused(self, error: DiskRefusesError) -> None:
        """A write has failed, and is to be tried again."""
        refusal = DISK_FAULTS[error.errno or 0]
        if refusal != self._refusal:
            log.error("%s: this node writes nothing until that is mended (%s)", refusal, error)
        self._refusal = refusal

    def written(self) -> None:
        """A write has succeeded."""
        self._writes_done += 1
        if self._refusal:
            self._refusal = ""
            log.warning("the disk takes what is written again")

    # ---- Thread raft-timer ----------------------------------------------------------------------

    def watch(self, ticks: int, ticks_max: int, *, is_writing: bool) -> bool:
        """So many ticks have passed; True if ``hangs`` has changed."""
        if self._writes_done != self._writes_watched or not is_writing:
            self._writes_watched = self._writes_done
            self._writing_ticks = 0
        self._writing_ticks += ticks
        was, self.hangs = self.hangs, self._writing_ticks > ticks_max
        return was != self.hangs
