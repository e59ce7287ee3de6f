"""Power is lost, on real nodes: what was not synced is gone, and every acknowledged write is there.

`make power-loss` does for many rounds what the whole suite does for a few. A failure names its
seed, which gives the same choices; what the processes make of them differs from run to run.
"""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from cluster_nodes import free_ports
from kv_store import KeyValueStore
from kv_types import Reply
from raft_snapshots import fit_log, snapshot_of
from raft_types import EntryKind
from replication_log import ReplicationLog
from state_db import StateDb
from tests.cluster import PATIENCE_S, SHORT_TIMERS, Cluster
from tests.failpoint_server import VARIABLE
from tests.power_loss import DiskDirectory, compile_recorder, contents, fill, seen
from tests.test_crash_points import (
    APPEND,
    BATCH,
    CUT,
    EVERY_POINT,
    INSTALL,
    SAVE,
    SEGMENT,
    SERVER,
    SMALL_LOG,
    Writes,
    serving,
)

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ROUNDS = int(os.environ.get("KV_TEST_ROUNDS", "2"))
IMAGES = 10
VALUE_BYTES = (10, 600, 3000, 20_000)
READ_KEYS_MAX = 100


class PoweredCluster:
    """A cluster whose nodes can lose their power."""

    def __init__(self, cluster: Cluster, journals: Path, chance: random.Random) -> None:
        self.cluster = cluster
        self._journals = journals
        self._chance = chance
        # What each node's directory held when its process began: nothing, at first.
        self._before: dict[str, dict[str, bytes]] = {n: {} for n in cluster.node_ids}
        self.acknowledged: dict[str, str] = {}

    def lose_power(self, *node_ids: str) -> None:
        """Of all of these at once."""
        for node_id, disk in self.kill(*node_ids).items():
            fill(self.cluster.node(node_id).directory, disk.after_loss(self._chance))

    def kill(self, *node_ids: str) -> dict[str, DiskDirectory]:
        """By SIGKILL, all of these at once; what was safe of their disks, and what was not."""
        cluster = self.cluster
        pids = {}
        for node_id in node_ids:
            process = cluster.process(node_id)
            assert process is not None
            pids[node_id] = process.pid
        cluster.kill(*node_ids)
        return {node_id: self.disk_after(node_id, pid) for node_id, pid in pids.items()}

    def disk_after(self, node_id: str, pid: int) -> DiskDirectory:
        """What this process, which has ended, has done."""
        journal = self._journals / str(pid)
        directory = self.cluster.node(node_id).directory
        disk = seen(directory, self._before[node_id], journal)
        journal.unlink()
        return disk

    def start(self, *node_ids: str) -> None:
        for node_id in node_ids:
            self._before[node_id] = contents(self.cluster.node(node_id).directory)
            self.cluster.start(node_id)

    def write(self, node_id: str, name: str, stop: threading.Event) -> None:
        """Write keys until told to stop, or the node is gone."""
        sizes = random.Random(name)
        with self.cluster.resp(node_id) as connection:
            for number in range(1_000_000):
                key = f"{name}:{number}"
                value = f"{key}:".ljust(sizes.choice(VALUE_BYTES), "x")
                try:
                    reply = connection.ask("SET", key, value)
                except OSError:
                    return
                if reply != "OK":  # it leads no more
                    return
                self.acknowledged[key] = value
                if stop.is_set():
                    return

    @contextmanager
    def writers(self, name: str) -> Iterator[None]:
        """Three clients write meanwhile; some of what they write has been answered at the start."""
        primary = self.cluster.primary()
        stop = threading.Event()
        threads = [
            threading.Thread(target=self.write, args=(primary, f"{name}.{i}", stop))
            for i in range(3)
        ]
        wanted = len(self.acknowledged) + self._chance.randint(10, 120)
        for thread in threads:
            thread.start()
        try:
            self.cluster.eventually(lambda: len(self.acknowledged) >= wanted, "writes are answered")
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def round(self, number: int) -> None:
        """Write, lose power somewhere, start again, and look at what is there."""
        cluster, chance = self.cluster, self._chance
        one = chance.choice(cluster.node_ids)
        victims = chance.choice([cluster.node_ids, cluster.others(one), [one]])
        with self.writers(str(number)):
            self.lose_power(*victims)
        self.start(*victims)
        cluster.primary()
        cluster.in_step()
        self.check()

    def check(self) -> None:
        """Every acknowledged write is there, as it was written."""
        keys = list(self.acknowledged)
        lost = []
        with self.cluster.resp(self.cluster.primary()) as connection:
            for start in range(0, len(keys), READ_KEYS_MAX):
                some = keys[start : start + READ_KEYS_MAX]
                found = connection.ask("MGET", *some)
                assert isinstance(found, list)
                pairs = zip(some, found, strict=True)
                lost += [k for k, value in pairs if value != self.acknowledged[k].encode()]
        assert not lost, f"{len(lost)} of {len(keys)} acknowledged writes are lost: {lost[:5]}"


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Nodes that are started now record what they do, in the directory that is given."""
    directory = tmp_path_factory.mktemp("power-loss")
    recorder = compile_recorder(directory)
    if recorder is None:
        pytest.skip("there is no C compiler to make the recorder with")
    journals = directory / "journals"
    journals.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LD_PRELOAD", str(recorder))
        patch.setenv("KV_POWER_PREFIX", os.path.join(tempfile.gettempdir(), "kv-cluster-"))
        patch.setenv("KV_POWER_JOURNALS", str(journals))
        yield journals


def seeded(name: str) -> tuple[random.Random, str]:
    """A source of chance, and how to get it again."""
    seed = int(os.environ.get("KV_TEST_SEED", secrets.randbits(32)))
    return random.Random(f"{name} {seed}"), f"KV_TEST_SEED={seed}"


def test_power_when_it_is_lost_then_every_acknowledged_write_is_there(environment: Path) -> None:
    """Of one node, of a majority, of all at once, under load, while states are saved (I10, F2)."""
    chance, seed = seeded("cluster")
    with Cluster(*SHORT_TIMERS, *SMALL_LOG) as cluster:
        powered = PoweredCluster(cluster, environment, chance)
        for number in range(ROUNDS):
            try:
                powered.round(number)
            except AssertionError as error:
                raise AssertionError(f"round {number} of {seed}: {error}") from error


# ---- Many losses of one kill, recovered in this process ----------------------------------------


def recovered(directory: Path) -> KeyValueStore:
    """What a node would find there, with all that its log holds."""
    state, disk = None, ReplicationLog(directory, fsync=False)
    try:
        state = StateDb(directory, fsync=False)
        header, store = state.load()
        fit_log(disk, snapshot_of(header))
        while store.applied_index < disk.last_index:
            for entry in disk.read(store.applied_index + 1, disk.last_index, 1 << 20):
                if entry.kind is EntryKind.COMMAND:
                    store.apply(entry.index, entry.data)
                else:
                    store.skip(entry.index)
        return store
    finally:
        disk.close()
        if state is not None:
            state.close()


def holders(
    disks: Iterable[DiskDirectory], keys: Collection[str], directory: Path, chance: random.Random
) -> Counter[str]:
    """On how many disks each key is after all of them have lost their power."""
    count: Counter[str] = Counter()
    for disk in disks:
        fill(directory, disk.after_loss(chance))
        store = recovered(directory)
        count.update(key for key in keys if store.read([b"EXISTS", key.encode()], 0))
    return count


def test_disks_when_power_is_lost_in_any_way_then_a_majority_has_every_acknowledged_write(
    environment: Path, tmp_path: Path
) -> None:
    """Each kill stands for many losses of power: chance decides anew about all that was not synced."""
    chance, seed = seeded("images")
    unsafe_bytes = 0
    with Cluster(*SHORT_TIMERS, *SMALL_LOG) as cluster:
        powered = PoweredCluster(cluster, environment, chance)
        for number in range((ROUNDS + 1) // 2):
            with powered.writers(str(number)):
                disks = powered.kill(*cluster.node_ids)
            for _ in range(IMAGES):
                count = holders(disks.values(), powered.acknowledged, tmp_path / "image", chance)
                lost = [key for key in powered.acknowledged if count[key] < 2]
                assert not lost, f"{lost[:5]} of {len(lost)} in round {number} of {seed}"
            unsafe_bytes += sum(disk.unsafe_bytes for disk in disks.values())
            powered.start(*cluster.node_ids)
    assert unsafe_bytes


@pytest.mark.parametrize("point", [*SAVE, *CUT, *SEGMENT, *APPEND] if EVERY_POINT else CUT)
def test_disk_when_power_is_lost_at_a_step_then_every_acknowledged_write_is_there(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Of a node alone, between two things that it does to its disk, whatever is left of them."""
    chance, seed = seeded(point)
    writes = Writes()
    with Cluster(*SHORT_TIMERS, *SMALL_LOG, nodes=1, server_script=SERVER) as cluster:
        powered = PoweredCluster(cluster, environment, chance)
        powered.lose_power("node1")
        with monkeypatch.context() as patch:
            patch.setenv(VARIABLE, point)
            powered.start("node1")
            process = cluster.process("node1")
        assert process is not None
        cluster.primary()
        with suppress(ConnectionError), cluster.resp("node1") as connection:
            writes.write_until_it_dies(connection)
        assert process.wait(PATIENCE_S) == -signal.SIGKILL
        disk = powered.disk_after("node1", process.pid)

    for _ in range(IMAGES):
        fill(tmp_path / "image", disk.after_loss(chance))
        store = recovered(tmp_path / "image")
        try:
            writes.check(partial(_read, store))
        except AssertionError as error:
            raise AssertionError(f"{seed}: {error}") from error


def _read(store: KeyValueStore, *words: str) -> Reply:
    return store.read([word.encode() for word in words], 0)


@pytest.mark.parametrize("point", INSTALL)
def test_disk_when_power_is_lost_while_a_state_is_installed_then_the_node_starts(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """With the state of before or the one received, and a log that fits it; it catches up."""
    chance, seed = seeded(point)
    writes = Writes()
    with Cluster(*SHORT_TIMERS, *SMALL_LOG, server_script=SERVER) as cluster:
        powered = PoweredCluster(cluster, environment, chance)
        victim = cluster.secondaries()[0]
        reached = cluster.in_step()["applied_index"]
        powered.lose_power(victim)
        primary = cluster.primary()

        def write_and_look() -> bool:
            assert writes.write(connection)
            status = cluster.status(primary)
            return status is not None and status["first_index"] > reached + 1

        with cluster.resp(primary) as connection:
            cluster.eventually(write_and_look, "the log is cut")
        with monkeypatch.context() as patch:
            patch.setenv(VARIABLE, point)
            powered.start(victim)
            process = cluster.process(victim)
        assert process is not None
        assert process.wait(PATIENCE_S) == -signal.SIGKILL
        disk = powered.disk_after(victim, process.pid)
        for _ in range(IMAGES):
            left = disk.after_loss(chance)
            fill(tmp_path / "image", left)
            assert recovered(tmp_path / "image").applied_index >= reached, seed
        fill(cluster.node(victim).directory, left)
        powered.start(victim)
        assert cluster.in_step()["keys"] == writes.done * BATCH


FOUND = [
    *("create-synced", "create-renamed", "save_identity before rename"),
    *("save_identity before fsync", "append before fdatasync", "save_identity before rename 2"),
    *("save_identity before fsync 2", "_create_segment before fsync", "vote before fdatasync"),
]


@pytest.mark.skipif(not EVERY_POINT, reason="runs with `make crash-points`")
@pytest.mark.parametrize("point", FOUND)
def test_founding_when_power_is_lost_at_a_step_then_the_same_command_founds_it(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str
) -> None:
    """Whatever is left of a directory that was begun is nobody's yet, or finished."""
    chance, seed = seeded(point)
    port, peer_port = free_ports(2)
    directory = tmp_path / "data"
    here = [f"--port={port}", f"--peer-port={peer_port}", f"--join=127.0.0.1:{port}"]
    command = [sys.executable, str(SERVER), "--primary", *here, f"--data-dir={directory}"]
    monkeypatch.setenv("KV_POWER_PREFIX", str(directory))
    with subprocess.Popen(
        command, env={**os.environ, VARIABLE: point}, stderr=subprocess.DEVNULL
    ) as process:
        assert process.wait(PATIENCE_S) == -signal.SIGKILL
    disk = seen(directory, {}, environment / str(process.pid))

    for _ in range(IMAGES):
        fill(directory, disk.after_loss(chance))
        with serving(command, port, tmp_path / "log") as connection:
            assert connection.ask("SET", "k", "v") == "OK", seed


def test_disks_when_nothing_is_synced_then_the_loss_is_seen(
    environment: Path, tmp_path: Path
) -> None:
    """The test that must fail: with ``--fsync no``, what was acknowledged goes with the power."""
    chance = random.Random(1)
    with Cluster(*SHORT_TIMERS, "--fsync", "no", nodes=1) as cluster:
        powered = PoweredCluster(cluster, environment, chance)
        with powered.writers("unsafe"):
            disks = powered.kill("node1")

    left = [disks["node1"].after_loss(chance) for _ in range(20)]

    key = min(powered.acknowledged).encode()
    assert not all(any(key in data for data in files.values()) for files in left)
