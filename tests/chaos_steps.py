"""How nodes die between two steps: the rounds of chaos that need the points of ``failpoint_server.py``.

The letters are those of the fault model; what a round may do is in ``chaos_stage.py``. Here clients
and faults meet at a step; that each step is survived by itself is shown by ``test_crash_points.py``.
"""

from __future__ import annotations

import contextlib
import signal
from typing import Final

from tests.chaos_disks import fall_behind, fill, unfill
from tests.chaos_stage import NotDoneError, Stage
from tests.cluster import eventually

DIES_WITHIN_S: Final = 10.0
# A step is taken so often before the node dies there.
COUNT_MAX: Final = 40

# By what has to happen for a node to get there; no other node does.
FOLLOWS: Final = (
    *("append torn", "append before pwrite", "append before fdatasync"),
    *("after ReplicationLog.append", "after RaftNode._write", "before RaftNode._advance_locked"),
    *("before RaftCore._commit_to as secondary", "after RaftCore._commit_to as secondary"),
    *("before RaftNode._apply", "after RaftNode._apply"),
)
LEADS: Final = (
    *("before RaftNode._next_append", "after RaftNode._next_append"),
    *("before RaftCore._commit_to as primary", "after RaftCore._commit_to as primary"),
    "before Waiting.applied",
)
SAVES: Final = (
    *("save-begun", "save-header-written", "save-rows-written", "save-committed", "save-synced"),
    *("drop_before before unlink", "drop_before before fsync"),
    *("_create_segment before pwrite", "_create_segment before fdatasync"),
    "_create_segment before fsync",
)
INSTALLS: Final = (
    *("before StateKeeper.on_chunk", "snapshot-received", "snapshot-synced", "install-closed"),
    *("install-renamed", "install-synced", "before ReplicationLog.reset"),
    *("reset before unlink", "reset before fsync", "after ReplicationLog.reset"),
)
VOTES: Final = ("vote before pwrite", "vote before fdatasync")


def crash_following(stage: Stage) -> None:
    """F10: a secondary dies between two steps of writing, answering, committing, applying."""
    victim = stage.one(stage.cluster.secondaries())
    _start_to_die(stage, victim, f"{stage.one(FOLLOWS)} {stage.rng.randint(1, COUNT_MAX)}")
    _await_death(stage, victim)


def crash_leading(stage: Stage) -> None:
    """F10: a primary dies between two steps of sending, committing, answering."""
    cluster = stage.cluster
    victim = stage.one(cluster.secondaries())
    _start_to_die(stage, victim, f"{stage.one(LEADS)} {stage.rng.randint(1, COUNT_MAX)}")

    def leads() -> bool:
        if cluster.spawned[victim].poll() is not None:
            return True
        status = cluster.status(victim)
        if status is not None and status["role"] != "PRIMARY":
            with contextlib.suppress(OSError):
                cluster.ask(cluster.primary(), f"FAILOVER TO {victim}")
        return status is not None and status["role"] == "PRIMARY"

    with contextlib.suppress(AssertionError):
        eventually(leads, f"{victim} leads", DIES_WITHIN_S / 2)
    _await_death(stage, victim)


def crash_saving(stage: Stage) -> None:
    """F10: a node dies between two steps of saving its state, cutting its log, beginning a segment."""
    victim = stage.one(stage.cluster.secondaries())
    _start_to_die(stage, victim, stage.one(SAVES))
    refusal = fill(stage, lambda: stage.cluster.spawned[victim].poll() is not None)
    assert refusal is None, str(refusal)
    _await_death(stage, victim)
    unfill(stage)


def crash_installing(stage: Stage) -> None:
    """F6, F10: a follower behind the log dies between two steps of installing a state."""
    victim = stage.one(stage.cluster.secondaries())
    fall_behind(stage, victim)
    stage.network.heal()
    _start_to_die(stage, victim, stage.one(INSTALLS))
    unfill(stage)
    _await_death(stage, victim)


def crash_voting(stage: Stage) -> None:
    """F10: a node dies between two steps of voting, after the primary has: nobody leads meanwhile."""
    cluster = stage.cluster
    victim = stage.one(cluster.secondaries())
    _start_to_die(stage, victim, stage.one(VOTES))
    cluster.eventually(lambda: cluster.status(victim), f"{victim} answers")
    cluster.kill(cluster.primary())
    _await_death(stage, victim)


def _start_to_die(stage: Stage, victim: str, point: str) -> None:
    """Start a node anew that is to die at this step."""
    stage.tell(f"{victim} is to die: {point}")
    stage.cluster.kill(victim)
    stage.cluster.failpoints[victim] = point
    stage.cluster.start(victim)


def _await_death(stage: Stage, victim: str) -> None:
    """Raises NotDoneError if it does not come to its step; it runs no more in any case."""
    process = stage.cluster.spawned[victim]
    try:
        eventually(lambda: process.poll() is not None, f"{victim} dies", DIES_WITHIN_S)
    except AssertionError as error:
        stage.cluster.kill(victim)  # it must not die in another round
        raise NotDoneError(f"{victim} did not come to that step") from error
    assert process.poll() == -signal.SIGKILL, f"{victim} ended with {process.poll()}"
    stage.hold(0.0, 1.0)
