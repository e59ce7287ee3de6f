"""Operations on real nodes while a client writes: nothing answered OK is lost, no client is refused.

What the manager says and refuses is in ``test_cluster_members.py``, with fake nodes; here stands
what the cluster makes of it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from cluster_manager import SERVER_SCRIPT, ClusterManager, verify
from cluster_nodes import free_ports
from kv_config import EXIT_CONFIG, EXIT_REMOVED, format_address
from kv_errors import KVError
from tests.cluster import PATIENCE_S, SHORT_TIMERS, Cluster, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# A pause that no election timeout fits into (5 s), on a machine that is busy with other tests.
HAND_OVER_S_MAX = 1.0
ELECTION_TIMEOUT_S_MIN = 5.0


class Writer:
    """A client that writes without a break, and notes what was answered OK and when."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._stop = threading.Event()
        self.written = 0
        self.errors: list[KVError] = []
        self.longest_s = 0.0
        self._thread = threading.Thread(target=self._write, name="writer")

    def _write(self) -> None:
        with self._cluster.client() as client:
            while not self._stop.is_set():
                began_s = time.monotonic()
                try:
                    client.set(f"key:{self.written + 1}", self.written + 1)
                except KVError as error:
                    self.errors.append(error)
                    return
                self.written += 1
                self.longest_s = max(self.longest_s, time.monotonic() - began_s)

    def goes_on(self) -> None:
        """Wait until some more has been written."""
        enough = self.written + 20
        eventually(lambda: self.written >= enough or self.errors, "the client writes")
        assert not self.errors


@contextmanager
def writing(cluster: Cluster) -> Iterator[Writer]:
    """A writer beside the block; in the end all that it wrote is on every node."""
    writer = Writer(cluster)
    writer._thread.start()
    try:
        writer.goes_on()
        yield writer
        writer.goes_on()
    finally:
        writer._stop.set()
        writer._thread.join()
    assert not writer.errors
    with cluster.client() as client:
        numbers = range(1, writer.written + 1)
        assert client.mget([f"key:{number}" for number in numbers]) == list(numbers)
    cluster.in_step()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with Cluster() as cluster:
        yield cluster


def silent(_: str) -> None:
    """Nobody reads what the manager says."""


# ---- Leadership ------------------------------------------------------------------------------------


def test_failover_when_a_client_writes_then_it_sees_a_short_pause_and_no_error(cluster):
    """With the default timers, where an election after a silence takes 5 to 8 s."""
    with writing(cluster) as writer:
        writer.longest_s = 0.0
        cluster.manager.failover("node3", silent)
        writer.goes_on()
        cluster.manager.failover(None, silent)
        writer.goes_on()

    assert writer.longest_s < HAND_OVER_S_MAX
    assert cluster.primary() != "node3"


def test_restart_when_a_client_writes_then_all_processes_are_new_and_it_sees_no_error(cluster):
    """The members and their data are those of before."""
    before = cluster.manager.status()

    with writing(cluster) as writer:
        writer.longest_s = 0.0
        cluster.manager.restart(silent)

    after = cluster.manager.status()
    assert writer.longest_s < HAND_OVER_S_MAX
    assert not {row.pid for row in before.nodes} & {row.pid for row in after.nodes}
    assert after.members == before.members
    assert after.cluster_id == before.cluster_id


# ---- Members -------------------------------------------------------------------------------------


def test_directory_when_it_is_lost_then_the_same_command_brings_back_a_new_member(cluster):
    """Its old vote is never counted again: it has another id. Source: raft-traps T12."""
    victim = cluster.secondaries()[0]
    old = cluster.manager.status().member(victim)
    assert old is not None

    with writing(cluster):
        cluster.kill(victim)
        shutil.rmtree(cluster.node(victim).directory)
        cluster.manager.start(silent)

    new = cluster.manager.status().member(victim)
    assert new is not None
    assert new.member_id != old.member_id
    assert (new.port, new.voter) == (old.port, True)
    assert cluster.manager.status().tolerance == "3 nodes tolerate 1 failure"


def test_directory_when_it_is_lost_then_replace_does_the_same(cluster):
    """With the manager removing the old member, instead of the node."""
    victim = cluster.secondaries()[0]
    old = cluster.manager.status().member(victim)

    with writing(cluster):
        cluster.kill(victim)
        shutil.rmtree(cluster.node(victim).directory)
        cluster.manager.replace(victim, silent)

    new = cluster.manager.status().member(victim)
    assert old is not None
    assert new is not None
    assert new.member_id != old.member_id
    assert cluster.manager.status().tolerance == "3 nodes tolerate 1 failure"


def test_cluster_when_it_grows_to_five_and_shrinks_to_three_then_a_client_sees_no_error():
    """1 to 3 to 5 and back to 3, the first primary among those that leave."""
    with Cluster(nodes=1) as cluster:
        manager = cluster.manager
        with writing(cluster):
            for node_id in ("node2", "node3", "node4", "node5"):
                manager.add(node_id, report=silent)
            assert manager.status().tolerance == "5 nodes tolerate 2 failures"
            for node_id in ("node1", "node4"):
                manager.remove(node_id, silent)

        assert sorted(cluster.node_ids) == ["node2", "node3", "node5"]
        assert manager.status().tolerance == "3 nodes tolerate 1 failure"


def test_learner_when_it_was_added_then_it_has_the_data_and_never_a_vote(cluster):
    """It may be asked for stale reads, and no majority waits for it."""
    cluster.manager.add("copy", True, report=silent)
    version = cluster.ask(cluster.primary(), "SET shared value")["version"]

    def has_it() -> bool:
        status = cluster.status("copy")
        return status is not None and status["applied_index"] >= version

    cluster.eventually(has_it, "the learner has applied the write")
    with cluster.resp("copy") as connection:
        assert connection.ask("READONLY") == "OK"
        assert connection.ask("GET", "shared") == b"value"
    status = cluster.manager.status()
    assert (status.row("copy").role, status.row("copy").voter) == ("LEARNER", False)
    assert status.tolerance == "3 nodes tolerate 1 failure"


def test_node_when_a_client_removes_it_then_it_exits_with_79_and_is_not_restarted(cluster):
    """A removed node must not come back by itself. Source: raft-traps T65."""
    victim = cluster.secondaries()[0]

    answer = cluster.ask(cluster.primary(), f"MEMBER REMOVE {victim}")

    assert answer["status"] == "OK"
    # As in life: who watches is not who has started the nodes, and so is told no exit status.
    monitor = ClusterManager(None, None, cluster.manager.data_dir)
    [event] = cluster.eventually(monitor.watch, "the removed node ends")
    assert event.startswith(f"{victim} exited with status {EXIT_REMOVED}: it was removed")
    [event] = cluster.eventually(cluster.manager.watch, "who has started it sees that too")
    assert event.startswith(f"{victim} exited with status {EXIT_REMOVED}: it was removed")
    assert monitor.watch() == cluster.manager.watch() == []
    assert cluster.manager.status().row(victim).removed


def test_name_when_two_processes_live_under_it_then_the_second_is_refused(cluster, tmp_path):
    """Its own directory and ports do not make it another node."""
    [port] = free_ports(1)
    join = ",".join(map(format_address, cluster.manager.addresses))
    argv = ["--node-id", "node2", "--port", str(port), "--data-dir", str(tmp_path / "node2")]

    second = subprocess.run(
        [sys.executable, SERVER_SCRIPT, *argv, "--join", join],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )

    assert second.returncode == EXIT_CONFIG
    assert "the name node2 is taken" in second.stderr
    assert cluster.manager.status().tolerance == "3 nodes tolerate 1 failure"


# ---- Backup --------------------------------------------------------------------------------------


def test_backup_when_all_is_lost_then_a_new_cluster_has_every_key(tmp_path: Path):
    """Also what was written last before the backup was asked for; and the old nodes stay out."""
    path = tmp_path / "backup.kv"
    with Cluster(*SHORT_TIMERS) as cluster, cluster.client() as client:
        old = cluster.manager.status()
        for number in range(500):
            client.set(f"held:{number}", number)
        client.set("fleeting", 1, ttl_s=3600)
        client.incr("counter")
        with writing(cluster):
            client.set("last", "before the backup")
            cluster.manager.backup(path, silent)
        held = {number: client.gets(f"held:{number}") for number in range(500)}
    assert "keys, the state after entry" in verify(path)

    with closing(Cluster(*SHORT_TIMERS)) as restored:
        restored.manager.restore(path, report=silent)
        with restored.client() as client:
            assert {number: client.gets(f"held:{number}") for number in range(500)} == held
            assert client.get("last") == "before the backup"
            assert client.incr("counter") == 2
        with restored.resp(restored.primary()) as connection:
            ttl_s = connection.ask("TTL", "fleeting")
            assert isinstance(ttl_s, int)
            assert 3000 < ttl_s <= 3600
        restored.in_step()
        new = restored.manager.status()
        assert new.cluster_id != old.cluster_id
        assert not {m.member_id for m in new.members} & {m.member_id for m in old.members}


# ---- In memory -----------------------------------------------------------------------------------


def test_in_memory_node_when_it_dies_then_comes_back_as_a_new_member():
    """Nothing is lost while a majority lives."""
    with Cluster("--in-memory", *SHORT_TIMERS) as cluster:
        victim = cluster.secondaries()[0]
        old = cluster.manager.status().member(victim)
        with writing(cluster):
            cluster.kill(victim)
            cluster.manager.start(silent)

        new = cluster.manager.status().member(victim)
        assert old is not None
        assert new is not None
        assert new.member_id != old.member_id
        assert not cluster.node(victim).directory.is_relative_to(cluster.directory)


def test_in_memory_cluster_when_all_was_stopped_then_begins_anew():
    """There is nothing left that a start could resume."""
    with Cluster("--in-memory", *SHORT_TIMERS) as cluster:
        old = cluster.manager.status().cluster_id
        cluster.manager.stop(silent)

        cluster.manager.start(silent)

        assert cluster.manager.status().cluster_id != old


def test_in_memory_cluster_when_its_backup_is_restored_then_has_its_data_again(tmp_path: Path):
    """That is its only way to outlive its processes."""
    with Cluster("--in-memory", *SHORT_TIMERS) as cluster:
        with cluster.client() as client:
            client.set("key", "value")
        cluster.manager.backup(tmp_path / "backup.kv", silent)
        cluster.manager.stop(silent)

        cluster.manager.restore(tmp_path / "backup.kv", report=silent)

        with cluster.client() as client:
            assert client.get("key") == "value"


def test_stop_when_a_client_holds_a_connection_then_all_nodes_end_in_order(cluster):
    """The primary hands over where there is somebody to hand over to; nobody is killed."""
    said: list[str] = []
    with cluster.resp(cluster.primary()) as connection:
        assert connection.ask("PING") == "PONG"
        began_s = time.monotonic()
        cluster.manager.stop(said.append)

    assert said[-1] == "Cluster stopped."
    assert not [line for line in said if "SIGKILL" in line]
    assert time.monotonic() - began_s < ELECTION_TIMEOUT_S_MIN, "it waited for an heir"
