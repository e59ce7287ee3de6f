"""A node dies at a named step, between any two things it does to its disk: nothing is lost.

The steps are those of ``failpoint_server.py``, which poses as the node. A node alone has nobody to
copy from: what it answered OK is on its own disk or gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from cluster_nodes import free_ports
from kv_config import Address
from kv_types import Reply
from tests.cluster import PATIENCE_S, SHORT_TIMERS, Cluster, RespConnection, ask, eventually
from tests.failpoint_server import VARIABLE, points

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SERVER = Path(__file__).with_name("failpoint_server.py")
VALUE = "x" * 4000
# Saved, and cut, whenever half of it has been written.
SMALL_LOG = ("--max-log", "1MiB")
BATCH = 20
BATCHES_MAX = 60

# In CI the first of each group; all of them by `make crash-points`.
EVERY_POINT = bool(os.environ.get("KV_TEST_EVERY_POINT"))
LISTED: set[str] = set()  # all of them, chosen or not


def chosen(count: int, *points: str) -> list[str]:
    LISTED.update(points)
    return list(points if EVERY_POINT else points[:count])


SAVE = chosen(
    1,
    *("save-committed", "save-rows-written", "save-begun", "save-header-written", "save-synced"),
)
CUT = chosen(
    1, "drop_before before unlink 2", "drop_before before unlink", "drop_before before fsync"
)
SEGMENT = chosen(
    1, *(f"_create_segment before {call}" for call in ("fdatasync", "pwrite", "fsync"))
)
APPEND = chosen(
    1,
    *("append torn 3", "append before fdatasync 3", "append before pwrite 3"),
    *("after ReplicationLog.append 3", "before RaftNode._apply 3", "after RaftNode._apply 3"),
)
VOTE = chosen(1, "vote before fdatasync", "vote before pwrite", "after ReplicationLog.append")
INSTALL = chosen(
    1,
    *("install-renamed", "_create_segment before fdatasync", "reset before unlink"),
    *("snapshot-received", "snapshot-synced", "install-closed", "install-synced"),
    *("before ReplicationLog.reset", "_create_segment before pwrite"),
    *("before StateKeeper.on_chunk 2", "after StateKeeper.on_chunk 3"),
    *("_create_segment before fsync", "reset before fsync", "after ReplicationLog.reset"),
)
FOLLOW = chosen(
    1,
    *("after ReplicationLog.append 3", "after RaftNode._write 3", "append torn 3"),
    *("append before fdatasync 3", "before RaftNode._apply 3", "before RaftNode._advance_locked 3"),
    *("after RaftNode._apply 3", "before RaftCore._commit_to as secondary 3"),
    "after RaftCore._commit_to as secondary 3",
)
LEAD = chosen(
    1,
    *("before Waiting.applied 20", "after RaftNode._next_append 60"),
    *("before RaftNode._next_append 60", "before RaftNode._apply 20", "after RaftNode._apply 20"),
    *("append before fdatasync 20", "after ReplicationLog.append 20"),
    *("before RaftCore._commit_to as primary 20", "after RaftCore._commit_to as primary 20"),
)
RESTORE = chosen(
    1,
    *("install-renamed", "reset before unlink", "save_identity before rename 2"),
    *("snapshot-received", "snapshot-synced", "install-closed", "install-synced"),
    *("before ReplicationLog.reset", "_create_segment before fsync", "reset before fsync"),
    *("after ReplicationLog.reset", "append before fdatasync", "after ReplicationLog.append"),
)
# A change of membership: decided or heard, on disk, in force, committed, applied; by who dies there.
# A newcomer's way in is two changes, the second of which gives it its vote.
FOUNDERS, NEWCOMER = ("node1", "node2", "node3"), "node4"


def membership_points(count: int) -> list[str]:
    """Of the change that is the ``count``-th of a process."""
    steps = [f"{name} membership {count}" for name in ("RaftCore._commit_to", "RaftNode._apply")]
    steps += [f"RaftCore._append_entries membership {count}"]
    steps += [f"ReplicationLog.append membership {count}"]
    steps += [f"RaftNode._follow_membership_locked {count + 1}"]  # the first is of its start
    return [f"{when} {step}" for step in steps for when in ("after", "before")]


JOIN = chosen(1, *membership_points(2), *membership_points(1))
REMOVE = chosen(1, *membership_points(1))
# Of a primary alone: nothing has left it yet; a majority has the entry. Between, it is open.
UNSENT = ("RaftCore._append_entries", "RaftNode._follow_membership_locked")
COMMITTED = ("RaftCore._commit_to", "RaftNode._apply")


class Writes:
    """What was written to a cluster, and what was said to it."""

    def __init__(self) -> None:
        self.done = 0  # batches: each is one command
        self.unknown: set[int] = set()

    @staticmethod
    def _batch(number: int) -> dict[str, str]:
        return {f"key:{number}:{i}": f"{number}:{i}:{VALUE}" for i in range(BATCH)}

    def write_until_it_dies(self, connection: RespConnection) -> None:
        """Write batch after batch, until one is not answered."""
        for _ in range(BATCHES_MAX):
            if not self.write(connection):
                return

    def write(self, connection: RespConnection) -> bool:
        """Write the next batch; whether it was answered."""
        number = self.done
        self.done += 1
        words = [word for pair in self._batch(number).items() for word in pair]
        try:
            reply: Reply = connection.ask("MSET", *words)
        except ConnectionError:
            self.unknown.add(number)
            return False
        assert reply == "OK", reply
        return True

    def check(self, ask: Callable[..., Reply]) -> None:
        """What was answered is there, and what was not is there whole or not at all."""
        for number in range(self.done):
            pairs = self._batch(number)
            found = ask("MGET", *pairs)
            if number in self.unknown and found == [None] * BATCH:
                continue
            assert found == [value.encode() for value in pairs.values()], f"batch {number}"


def start_to_die(
    cluster: Cluster, node_id: str, monkeypatch: pytest.MonkeyPatch, point: str
) -> psutil.Popen:
    """Start a node that runs no more, to die at this step; its process."""
    with monkeypatch.context() as patch:
        patch.setenv(VARIABLE, point)
        cluster.start(node_id)
    process = cluster.manager._processes.find(cluster.node(node_id))
    assert isinstance(process, psutil.Popen)
    return process


# ---- A node alone ------------------------------------------------------------------------------


class Alone(NamedTuple):
    """A cluster of one."""

    cluster: Cluster
    writes: Writes


@pytest.fixture(scope="module")
def alone() -> Iterator[Alone]:
    with Cluster(*SHORT_TIMERS, *SMALL_LOG, nodes=1, server_script=SERVER) as cluster:
        yield Alone(cluster, Writes())


@pytest.mark.parametrize("point", [*SAVE, *CUT, *SEGMENT, *APPEND, *VOTE])
def test_node_alone_when_it_dies_at_a_step_then_every_acknowledged_write_is_there(
    alone: Alone, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Saving the state, cutting the log behind it, beginning a segment, appending, voting."""
    cluster, writes = alone
    if cluster.process("node1") is not None:
        cluster.kill("node1")
    process = start_to_die(cluster, "node1", monkeypatch, point)
    cluster.eventually(
        lambda: process.poll() is not None or cluster.status("node1"), "node1 answers"
    )
    with contextlib.suppress(ConnectionError), cluster.resp("node1") as connection:
        writes.write_until_it_dies(connection)
    assert process.wait(PATIENCE_S) == -signal.SIGKILL

    cluster.start("node1")

    cluster.primary()
    with cluster.resp("node1") as connection:
        writes.check(connection.ask)


def let_lead(cluster: Cluster, node_id: str, process: psutil.Popen) -> None:
    """Hand the leadership to this node, unless it dies before it has it."""

    def leads() -> bool:
        status = cluster.status(node_id)
        if status is None or status["role"] == "PRIMARY":
            return status is not None or process.poll() is not None
        cluster.ask(cluster.primary(), f"FAILOVER TO {node_id}")
        return False

    cluster.eventually(leads, f"{node_id} leads")


# ---- Three nodes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared_trio() -> Iterator[Cluster]:
    with Cluster(*SHORT_TIMERS, *SMALL_LOG, server_script=SERVER) as cluster:
        yield cluster


@pytest.fixture
def trio(shared_trio: Cluster) -> Cluster:
    """Three nodes, all healthy when the test begins."""
    shared_trio.heal()
    if NEWCOMER in shared_trio.node_ids:
        shared_trio.manager.remove(NEWCOMER, report=lambda line: None)
    with shared_trio.resp(shared_trio.primary()) as connection:
        assert connection.ask("FLUSHALL") == "OK"
    shared_trio.in_step()
    return shared_trio


@pytest.mark.parametrize("point", INSTALL)
def test_install_when_the_process_dies_at_a_step_then_it_starts_and_goes_on(
    trio: Cluster, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """With the state of before or the one received, and a log that fits it."""
    victim = trio.secondaries()[0]
    reached = trio.in_step()["applied_index"]
    trio.kill(victim)
    primary, writes = trio.primary(), Writes()

    def write_and_look() -> bool:
        assert writes.write(connection)
        status = trio.status(primary)
        return status is not None and status["first_index"] > reached + 1

    with trio.resp(primary) as connection:
        trio.eventually(write_and_look, "the log is cut")
    process = start_to_die(trio, victim, monkeypatch, point)
    assert process.wait(PATIENCE_S) == -signal.SIGKILL

    trio.start(victim)

    assert trio.in_step()["keys"] == writes.done * BATCH


@pytest.mark.parametrize("point", FOLLOW)
def test_secondary_when_it_dies_at_a_step_then_it_comes_back_in_step(
    trio: Cluster, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Before and after it wrote, answered, applied: it has no less than it said."""
    victim = trio.secondaries()[0]
    trio.kill(victim)
    process = start_to_die(trio, victim, monkeypatch, point)
    writes = Writes()
    trio.eventually(lambda: process.poll() is not None or trio.status(victim), f"{victim} answers")

    def write_and_look() -> bool:
        assert writes.write(connection)
        return process.poll() is not None

    with trio.resp(trio.primary()) as connection:
        trio.eventually(write_and_look, f"{victim} dies")
        assert process.wait() == -signal.SIGKILL
        trio.start(victim)
        assert trio.in_step()["keys"] == writes.done * BATCH
        writes.check(connection.ask)


@pytest.mark.parametrize("point", LEAD)
def test_primary_when_it_dies_at_a_step_then_the_others_have_what_it_answered(
    trio: Cluster, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Before and after it wrote, sent, applied, answered: an unknown outcome is one or the other."""
    victim = trio.secondaries()[0]
    trio.kill(victim)
    process = start_to_die(trio, victim, monkeypatch, point)
    writes = Writes()
    let_lead(trio, victim, process)
    with contextlib.suppress(ConnectionError), trio.resp(victim) as connection:
        writes.write_until_it_dies(connection)
    assert process.wait(PATIENCE_S) == -signal.SIGKILL

    with trio.resp(trio.primary(trio.others(victim))) as connection:
        writes.check(connection.ask)
        trio.start(victim)
        trio.in_step()


# ---- Members come and go -----------------------------------------------------------------------


class Doomed(NamedTuple):
    """A node that is to die in a change of membership."""

    node_id: str
    process: psutil.Popen


@pytest.fixture
def quartet(shared_trio: Cluster) -> Cluster:
    """Three nodes, and the one that is to leave."""
    shared_trio.heal()
    if NEWCOMER not in shared_trio.node_ids:
        shared_trio.manager.add(NEWCOMER, report=lambda line: None)
    with shared_trio.resp(shared_trio.primary()) as connection:
        assert connection.ask("FLUSHALL") == "OK"
    shared_trio.in_step()
    return shared_trio


def doom(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, role: str, point: str) -> Doomed:
    """Start a node anew, to die at a step when it is in this role."""
    primary = cluster.primary()
    if primary == NEWCOMER:
        cluster.manager.failover(FOUNDERS[0], report=lambda line: None)
        primary = cluster.primary()
    victim = next(node_id for node_id in FOUNDERS if node_id != primary)
    process = cluster.process(victim)
    assert process is not None
    # It saves its state, so that no change of before is applied again, which would be its death.
    process.terminate()
    process.wait(PATIENCE_S)
    doomed = Doomed(victim, start_to_die(cluster, victim, monkeypatch, point))
    cluster.eventually(lambda: cluster.status(victim), f"{victim} answers")
    if role == "primary":
        let_lead(cluster, victim, doomed.process)
    cluster.in_step()
    return doomed


def write_until_dead(cluster: Cluster, doomed: Doomed, writes: Writes) -> None:
    """Write to the primary, who may be the one to die."""

    def write_and_look() -> bool:
        if writes.done < BATCHES_MAX and not writes.write(connection):
            return True
        return doomed.process.poll() is not None

    with contextlib.suppress(ConnectionError), cluster.resp(cluster.primary()) as connection:
        cluster.eventually(write_and_look, f"{doomed.node_id} dies")
    assert doomed.process.wait(PATIENCE_S) == -signal.SIGKILL


def agreed_members(cluster: Cluster) -> set[str]:
    """The voters' names, once all who are members say the same, and nobody else is one."""

    def alike() -> set[str] | None:
        told = {name: cluster.ask(name, "MEMBER LIST")["members"] for name in FOUNDERS}
        if NEWCOMER in (member["node_id"] for member in told[FOUNDERS[0]]):
            told[NEWCOMER] = cluster.ask(NEWCOMER, "MEMBER LIST")["members"]
        seen = {
            frozenset((m["member_id"], m["node_id"], m["voter"]) for m in m) for m in told.values()
        }
        return {name for _, name, _ in seen.pop()} if len(seen) == 1 else None

    return cluster.eventually(alike, "all have the same members")


@pytest.mark.parametrize("role", ["primary", "secondary"])
@pytest.mark.parametrize("point", JOIN)
def test_member_added_when_a_node_dies_at_a_step_then_all_have_it(
    trio: Cluster, monkeypatch: pytest.MonkeyPatch, role: str, point: str
) -> None:
    """The newcomer asks until it is let in, so the change comes about whoever dies; once."""
    doomed, writes = doom(trio, monkeypatch, role, point), Writes()
    local = trio.manager._local
    newcomer = local.new_place(NEWCOMER)
    local.remember(newcomer)
    local.spawn(newcomer)
    write_until_dead(trio, doomed, writes)

    trio.start(doomed.node_id)

    trio.heal()
    assert agreed_members(trio) == {*FOUNDERS, NEWCOMER}
    assert trio.in_step()["voters"] == 4
    with trio.resp(trio.primary()) as connection:
        writes.check(connection.ask)
    trio.manager.remove(NEWCOMER, report=lambda line: None)
    assert agreed_members(trio) == set(FOUNDERS)


@pytest.mark.parametrize("role", ["primary", "secondary"])
@pytest.mark.parametrize("point", REMOVE)
def test_member_removed_when_a_node_dies_at_a_step_then_it_is_gone_for_all_or_for_none(
    quartet: Cluster, monkeypatch: pytest.MonkeyPatch, role: str, point: str
) -> None:
    """What is answered has happened; what nobody but the dead could know has not.

    The one that was to go may lead meanwhile, where it was not removed.
    """
    cluster = quartet
    doomed, writes = doom(cluster, monkeypatch, role, point), Writes()
    primary = cluster.primary()
    assert (primary == doomed.node_id) == (role == "primary")
    with cluster.resp(primary) as connection:
        assert writes.write(connection)
    answer = {"status": "UNKNOWN"}
    with contextlib.suppress(ConnectionError):
        answer = cluster.ask(primary, f"MEMBER REMOVE {NEWCOMER}")
    write_until_dead(cluster, doomed, writes)

    cluster.start(doomed.node_id)

    leader = cluster.primary()
    cluster.in_step(FOUNDERS)
    is_gone = NEWCOMER not in agreed_members(cluster)
    step = point.split()[1]
    if role == "secondary":
        assert answer["status"] == "OK"
    if role == "secondary" or step in COMMITTED:
        assert is_gone
    elif step in UNSENT:
        assert not is_gone
    with cluster.resp(leader) as connection:
        writes.check(connection.ask)
    cluster.manager.remove(NEWCOMER, report=lambda line: None)
    cluster.manager.add(NEWCOMER, report=lambda line: None)
    assert agreed_members(cluster) == {*FOUNDERS, NEWCOMER}
    cluster.in_step()


# ---- A backup restored -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backup(alone: Alone, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a state with keys."""
    cluster, writes = alone
    cluster.heal()
    with cluster.resp("node1") as connection:
        assert writes.write(connection)
    path = tmp_path_factory.mktemp("backup") / "backup"
    cluster.manager.backup(path, report=lambda line: None)
    return path


@pytest.mark.parametrize("point", RESTORE)
def test_restore_when_it_dies_at_a_step_then_the_same_command_goes_on(
    backup: Path, alone: Alone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """A directory that was begun is neither taken for whole, nor in the way."""
    port, peer_port = free_ports(2)
    here = [f"--port={port}", f"--peer-port={peer_port}", f"--join=127.0.0.1:{port}"]
    command = [sys.executable, str(SERVER), "--primary", *here, f"--data-dir={tmp_path / 'data'}"]
    command.append(f"--restore-from={backup}")

    died = subprocess.run(
        command, env={**os.environ, VARIABLE: point}, timeout=PATIENCE_S, capture_output=True
    )
    assert died.returncode == -signal.SIGKILL, died.stderr.decode()

    with serving(command, port, tmp_path / "log") as connection:
        alone.writes.check(connection.ask)


@contextlib.contextmanager
def serving(command: Sequence[str], port: int, path: Path) -> Iterator[RespConnection]:
    """A connection to a node alone, once it leads; it logs to ``path``."""
    with path.open("wb") as log:
        process = psutil.Popen(command, stdout=log, stderr=log)
    try:
        eventually(lambda: is_primary(("127.0.0.1", port)), "it serves", explain=path.read_text)
        with RespConnection(("127.0.0.1", port)) as connection:
            yield connection
    finally:
        process.kill()
        process.wait()


def is_primary(address: Address) -> bool:
    with contextlib.suppress(OSError):
        return bool(ask(address, "GET anything")["status"] == "NOT_FOUND")
    return False


# ---- The harness -------------------------------------------------------------------------------


def test_point_when_it_does_not_exist_then_the_server_does_not_start() -> None:
    """Nothing would die, and the test would pass."""
    env = {**os.environ, VARIABLE: "save-comitted"}

    process = subprocess.run(
        [sys.executable, str(SERVER)], env=env, capture_output=True, check=False
    )

    assert process.returncode == 1
    assert b"no point is called 'save-comitted'" in process.stderr


def test_points_when_state_db_gets_a_new_step_then_a_test_dies_there() -> None:
    """The lists above are complete, but for the steps of creating and of copying a state."""
    steps = {point for point in points() if "-" in point and " " not in point}

    elsewhere = {"create-synced", "create-renamed", "snapshot-copied"}  # test_state_db.py
    assert steps - LISTED == elsewhere


def test_points_when_listed_then_they_exist() -> None:
    """One that is misspelt among those left to `make crash-points` is noticed in CI, too."""
    assert {point.rstrip(" 0123456789") for point in LISTED} <= points()
