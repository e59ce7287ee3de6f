"""What it takes to operate the cluster: load, restarts, lost disks, hand-overs, backups.

    python -m benchmarks.operations --keys 100000
    python -m benchmarks.operations --only restart,backup --json FILE

Three nodes with their default settings on this machine, filled with N keys; then the measurements of
``MEASUREMENTS``, one after the other. Exit status 1 if a target of ``operation_results.py`` is missed.
A million keys take about a quarter of an hour.

Nodes, clients and this program share the machine's cores and its disk: what one of them does at a
time is missing to the others, which with three machines it would not be. A latency includes what the
load generator itself was kept waiting.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path

import psutil

from benchmarks.operation_results import (
    Backup,
    HandOver,
    IdleConnections,
    IdleProcessor,
    Lag,
    Latency,
    Load,
    Restart,
    Result,
    Row,
    Turn,
    WriteLatency,
    longest_pauses_s,
    rounded,
    table,
)
from benchmarks.report import machine_facts, today, write_document
from benchmarks.systems import (
    HOST,
    NODES,
    ROOT,
    RedisBenchmark,
    fill_by_resp,
    scratch_directory,
    silent,
    wait_until,
)
from benchmarks.workload import LoadError, Sample, Workload, percentile
from benchmarks.writers import VALUE_BYTES, ClosedLoop, OpenLoop, key, value
from cluster_manager import ClusterManager, ManagerError, verify
from cluster_nodes import Node, Report, ask
from kv_client import KVStoreClient
from kv_errors import KVError
from kv_protocol import encode_request

KEYS = 1_000_000
WARM_UP_S = 3.0
# Started together, nodes save their state together a minute later. In between nothing is due.
ALONE_S = 30.0
SAVING_S = 40.0
SAVING_LOG = "4MiB"  # of which the open loop fills half in about eight seconds: then a save is due
FAILOVERS = 20
STOPS = 5
SETTLE_S = 1.0  # after one hand-over, before the next
COMMAND_S_MAX = 10.0
LAG_WRITES = 500
LAG_PAUSE_S = 0.01  # between two of them: the cluster is to be idle
LAG_S_MAX = 10.0
IDLE_CONNECTIONS = 1000
CROWD_KEYS = 10_000
CROWD = {op: Workload(op, VALUE_BYTES, 50, 1) for op in ("SET", "GET")}
TURNS = 8
TURN_S = 2.0
SAVE_INTERVAL_S = 61.0  # by then whatever was written before is saved
IDLE_S = 60.0
CHECKED_KEYS = 1000
POLL_S = 0.1
REPORT_EVERY_S = 10.0


def _say(text: str) -> None:
    """Progress goes to stderr, so that stdout holds the table alone."""
    print(text, file=sys.stderr, flush=True)


def _say_changes() -> Report:
    """Says what is waited for, when that changes."""
    said = ""

    def report(text: str) -> None:
        nonlocal said
        if text != said:
            _say(f"  {text}")
        said = text

    return report


# ---- The cluster ---------------------------------------------------------------------------------


class Cluster:
    """Three nodes and their N keys, as every measurement finds them."""

    def __init__(self, directory: Path, keys: int) -> None:
        self.directory = directory
        self.keys = keys
        self._server_args: tuple[str, ...] = ()
        self.manager = self._manager(NODES)

    def _manager(self, nodes: int | None) -> ClusterManager:
        return ClusterManager(nodes, None, self.directory / "cluster", self._server_args)

    def start(self, *server_args: str) -> None:
        """Return when all nodes run with these flags, vote, and have what was committed."""
        if server_args != self._server_args:
            self.stop()
            self._server_args = server_args
            self.manager = self._manager(None)
        self.manager.start(report=silent, progress=_say_changes())

    def stop(self) -> None:
        self.manager.stop(report=silent)

    @property
    def addresses(self) -> list[str]:
        return [f"{host}:{port}" for host, port in self.manager.addresses]

    def primary(self) -> Node:
        name = self.manager.status().primary
        if name is None:
            raise LoadError("the cluster has no primary")
        return self.manager.node(name)

    def secondaries(self) -> list[Node]:
        primary = self.primary()
        return [node for node in self.manager.nodes if node != primary]

    def processes(self) -> dict[str, psutil.Process]:
        """By node. Raises psutil.Error if one does not run."""
        return {row.node_id: psutil.Process(row.pid) for row in self.manager.status().nodes}


def _number(node: Node, name: str) -> int:
    """What the node's STATUS says of itself. Raises OSError if it does not answer."""
    return int(str(ask(node.address, "STATUS")[name]))


def _serves(node: Node, committed: int) -> bool:
    """Whether it has a vote, follows a primary, and has applied what was committed."""
    status = ask(node.address, "STATUS")
    return status["role"] == "SECONDARY" and int(str(status["applied_index"])) >= committed


def _roles(manager: ClusterManager) -> list[object]:
    """What each node says that it is. Raises OSError if one does not answer."""
    return [ask(node.address, "STATUS")["role"] for node in manager.nodes]


class Saves:
    """How often each node has saved its state since this was made; to be looked at often.

    A save ends with writing to state.db what stands in state.db-wal, which is empty otherwise. So
    each time that state.db was changed and state.db-wal is empty, there was one.
    """

    def __init__(self, nodes: Sequence[Node]) -> None:
        self._directories = {node.node_id: node.directory for node in nodes}
        self.counts = dict.fromkeys(self._directories, 0)
        self._changed_ns: dict[str, int] = {}
        self.look()

    def look(self) -> None:
        for node_id, directory in self._directories.items():
            wal = directory / "state.db-wal"
            if wal.exists() and wal.stat().st_size:
                continue
            changed_ns = (directory / "state.db").stat().st_mtime_ns
            self.counts[node_id] += self._changed_ns.get(node_id, changed_ns) != changed_ns
            self._changed_ns[node_id] = changed_ns


def _pause(seconds: float, what: str, *looks: Callable[[], object]) -> tuple[float, float]:
    """Let time pass, with a line about it now and then; from when to when that was."""
    begin_s = told_s = time.monotonic()
    _say(f"{what} for {seconds:.0f} s")
    while (now_s := time.monotonic()) < begin_s + seconds:
        if now_s >= told_s + REPORT_EVERY_S:
            told_s = now_s
            _say(f"  {now_s - begin_s:.0f} of {seconds:.0f} s")
        for look in looks:
            look()
        time.sleep(min(POLL_S, max(0.0, begin_s + seconds - now_s)))
    return begin_s, now_s


# ---- Load and restarts ---------------------------------------------------------------------------


def measure_load(cluster: Cluster) -> Load:
    """The bulk loader of ``example_client.py``, with the keys in random order."""
    _say(f"writing a file of {cluster.keys:,} records")
    path = cluster.directory / "load.jsonl"
    with path.open("w") as file:
        for number in random.sample(range(cluster.keys), cluster.keys):
            file.write(json.dumps({"key": key(number), "value": value(number)}) + "\n")
    loader = [sys.executable, "example_client.py", f"--nodes={','.join(cluster.addresses)}"]
    begin_s = time.monotonic()
    done = subprocess.run([*loader, f"--load={path}"], cwd=ROOT, stdout=sys.stderr)
    seconds = time.monotonic() - begin_s
    if done.returncode:
        raise LoadError("the loader failed")
    path.unlink()
    cluster.start()  # until the secondaries have it all
    memory_mb = {n: p.memory_info().rss / 1e6 for n, p in cluster.processes().items()}
    return Load(cluster.keys, seconds, memory_mb)


def measure_restart(cluster: Cluster) -> Restart:
    manager, node = cluster.manager, cluster.secondaries()[0]
    committed = _number(cluster.primary(), "commit_index")
    _say(f"{node.node_id} is killed and started again")
    begin_s = time.monotonic()
    manager.kill_node(node.node_id)
    manager.start_node(node.node_id)
    wait_until(lambda: _serves(node, committed), node.node_id)
    one_s = time.monotonic() - begin_s

    _say("all are killed and started again")
    for node in manager.nodes:
        manager.kill_node(node.node_id)
    begin_s = time.monotonic()
    for node in manager.nodes:
        manager.start_node(node.node_id)
    # All are asked until all answer in one go: the last one is what counts.
    wait_until(lambda: bool(_roles(manager)), "all nodes")
    all_answer_s = time.monotonic() - begin_s
    wait_until(lambda: "PRIMARY" in _roles(manager), "a primary")
    return Restart(one_s, all_answer_s, time.monotonic() - begin_s)


# ---- Latency -------------------------------------------------------------------------------------


def measure_write_latency(cluster: Cluster) -> WriteLatency:
    cluster.stop()
    cluster.start()  # all at once: see ALONE_S
    with OpenLoop(cluster.primary().port, cluster.keys) as load:
        _pause(WARM_UP_S, "warming up", load.check)
        saves = Saves(cluster.manager.nodes)
        alone = _pause(ALONE_S, "writing at a fixed rate", load.check, saves.look)
        rejoin, by_snapshot = _wipe_and_rejoin(cluster)
        writes = load.finish()

    cluster.start("--max-log", SAVING_LOG)
    nodes = cluster.manager.nodes
    with OpenLoop(cluster.primary().port, cluster.keys) as load:
        _pause(WARM_UP_S, "warming up, with a short log", load.check)
        saves_forced = Saves(nodes)
        before = {node.node_id: _number(node, "first_index") for node in nodes}
        saving = _pause(SAVING_S, "writing at a fixed rate", load.check, saves_forced.look)
        cut = {n.node_id: _number(n, "first_index") - before[n.node_id] for n in nodes}
        saving_writes = load.finish()

    return WriteLatency(
        alone=Latency.of(writes, *alone),
        saves_alone=saves.counts,
        rejoin_s=rejoin[1] - rejoin[0],
        by_snapshot=by_snapshot,
        rejoin=Latency.of(writes, *rejoin),
        saving=Latency.of(saving_writes, *saving),
        saves=saves_forced.counts,
        entries_cut=cut,
    )


def _wipe_and_rejoin(cluster: Cluster) -> tuple[tuple[float, float], bool]:
    """Take a secondary's disk away and start it: from when to when, and if it got a snapshot."""
    node, primary = cluster.secondaries()[0], cluster.primary()
    cluster.manager.kill_node(node.node_id)
    shutil.rmtree(node.directory)
    said_before = node.log.stat().st_size
    _say(f"{node.node_id} starts with an empty directory")
    begin_s = time.monotonic()
    cluster.manager.start_node(node.node_id)
    # A mark that stands still: under load no secondary is ever level with the primary.
    wait_until(lambda: _serves(node, 0), node.node_id)
    committed = _number(primary, "commit_index")
    wait_until(lambda: _serves(node, committed), node.node_id)
    end_s = time.monotonic()
    said = node.log.read_bytes()[said_before:]
    return (begin_s, end_s), b"installed a snapshot" in said


# ---- Hand-over -----------------------------------------------------------------------------------


def measure_hand_over(cluster: Cluster) -> HandOver:
    with ClosedLoop(cluster.addresses, cluster.keys) as load:
        _pause(WARM_UP_S, "clients write in a loop", load.check)
        failovers = [_fail_over(cluster, number) for number in range(1, FAILOVERS + 1)]
        seen = load.finish()
    failover_pauses_s = longest_pauses_s(seen.answered_s, failovers)
    with ClosedLoop(cluster.addresses, cluster.keys) as load:
        _pause(WARM_UP_S, "clients write in a loop", load.check)
        stops = [_stop_primary(cluster, number) for number in range(1, STOPS + 1)]
        seen_of_stops = load.finish()
    return HandOver(
        failover_pauses_s,
        seen.errors,
        longest_pauses_s(seen_of_stops.answered_s, stops),
        seen_of_stops.errors,
    )


def _fail_over(cluster: Cluster, number: int) -> tuple[float, float]:
    """From the command until clients have settled."""
    primary = cluster.primary()
    begin_s = time.monotonic()
    ask(primary.address, "FAILOVER", COMMAND_S_MAX)
    took_s = time.monotonic() - begin_s
    _say(f"FAILOVER {number} of {FAILOVERS}: answered after {took_s * 1000:.0f} ms")
    time.sleep(SETTLE_S)
    return begin_s, time.monotonic()


def _stop_primary(cluster: Cluster, number: int) -> tuple[float, float]:
    """From SIGTERM until clients have settled after the end of the process, which then comes back."""
    primary = cluster.primary()
    process = cluster.processes()[primary.node_id]
    begin_s = time.monotonic()
    process.terminate()
    wait_until(lambda: _has_ended(process), f"the end of {primary.node_id}")
    took_s = time.monotonic() - begin_s
    _say(f"SIGTERM {number} of {STOPS}: {primary.node_id} has ended after {took_s:.1f} s")
    time.sleep(SETTLE_S)
    end_s = time.monotonic()
    cluster.start()
    return begin_s, end_s


def _has_ended(process: psutil.Process) -> bool:
    # What we have started and not reaped yet is a zombie.
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


# ---- Replication lag -----------------------------------------------------------------------------


def measure_lag(cluster: Cluster) -> Lag:
    with ExitStack() as stack:

        def connect(node: Node) -> socket.socket:
            connection = stack.enter_context(socket.create_connection(node.address))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection

        primary = connect(cluster.primary())
        secondaries = [connect(node) for node in cluster.secondaries()]
        for secondary in secondaries:
            _expect(b"+OK", _exchange(secondary, b"READONLY"))
        _say(f"{LAG_WRITES} writes, each looked for on the secondaries")
        names = [f"lag:{number}".encode() for number in range(LAG_WRITES)]
        lags_ms: list[float] = []
        looks_ms: list[float] = []
        for name in names:
            _expect(b"+OK", _exchange(primary, b"SET", name, name))
            lags_ms.append(_lag_ms(secondaries, name, looks_ms))
            time.sleep(LAG_PAUSE_S)
        _expect(b":", _exchange(primary, b"DEL", *names))
    return Lag(lags_ms, percentile(looks_ms, 0.50))


def _exchange(connection: socket.socket, *words: bytes) -> bytes:
    """The reply to one request; it is so short that it comes in one piece."""
    connection.sendall(encode_request(words))
    return connection.recv(4096)


def _expect(beginning: bytes, reply: bytes) -> None:
    if not reply.startswith(beginning):
        raise LoadError(f"unexpected reply: {reply!r}")


def _lag_ms(secondaries: Sequence[socket.socket], name: bytes, looks_ms: list[float]) -> float:
    """After what time the last of them shows the key; adds what each look took to ``looks_ms``."""
    begin_s = looked_s = time.perf_counter()
    missing = list(secondaries)
    while missing:
        for secondary in tuple(missing):
            reply = _exchange(secondary, b"GET", name)
            _expect(b"$", reply)
            if name in reply:
                missing.remove(secondary)
            before_s, looked_s = looked_s, time.perf_counter()
            looks_ms.append((looked_s - before_s) * 1000)
        if looked_s > begin_s + LAG_S_MAX:
            raise LoadError(f"{name!r} does not come to the secondaries")
    return (looked_s - begin_s) * 1000


# ---- Idleness ------------------------------------------------------------------------------------


@contextmanager
def _idle_connections(port: int) -> Iterator[None]:
    """Connections that have said something once, and are silent from then on."""
    with ExitStack() as stack:
        connections = [
            stack.enter_context(socket.create_connection((HOST, port)))
            for _ in range(IDLE_CONNECTIONS)
        ]
        for connection in connections:
            connection.sendall(b"*1\r\n$4\r\nPING\r\n")
        for connection in connections:
            connection.recv(64)
        yield


def measure_idle_connections(cluster: Cluster) -> IdleConnections:
    port = cluster.primary().port
    generator = RedisBenchmark()

    def measure() -> dict[str, Sample]:
        return {op: generator.run(port, load, CROWD_KEYS, TURN_S) for op, load in CROWD.items()}

    def measure_beside() -> dict[str, Sample]:
        with _idle_connections(port):
            return measure()

    fill_by_resp(port, CROWD["SET"], CROWD_KEYS)
    measure()  # warms up, and learns how many requests such a turn takes
    turns: dict[str, list[Turn]] = {op: [] for op in CROWD}
    for number in range(TURNS):
        if number % 2:
            beside, without = measure_beside(), measure()
        else:
            without, beside = measure(), measure_beside()
        for op, pairs in turns.items():
            pairs.append(Turn(without[op], beside[op]))
        each = ", ".join(f"{op} {beside[op].rps / without[op].rps:.2f}" for op in CROWD)
        _say(f"turn {number + 1} of {TURNS}: {each} times beside idle connections")
    return IdleConnections(IDLE_CONNECTIONS, turns)


def measure_idle_processor(cluster: Cluster) -> IdleProcessor:
    processes = cluster.processes()
    _pause(SAVE_INTERVAL_S, "waiting for what was written to be saved")

    def used_s() -> dict[str, float]:
        return {node_id: sum(p.cpu_times()[:2]) for node_id, p in processes.items()}

    before_s = used_s()
    begin_s, end_s = _pause(IDLE_S, "leaving the nodes alone")
    seconds = end_s - begin_s
    percent = {n: (now_s - before_s[n]) / seconds * 100 for n, now_s in used_s().items()}
    return IdleProcessor(seconds, percent)


# ---- Backup --------------------------------------------------------------------------------------


def measure_backup(cluster: Cluster) -> Backup:
    path = cluster.directory / "backup.kv"
    with OpenLoop(cluster.primary().port, cluster.keys) as load:
        _pause(WARM_UP_S, "warming up", load.check)
        begin_s = time.monotonic()
        cluster.manager.backup(path, report=_say)
        end_s = time.monotonic()
        writes = load.finish()
    _say("checking the backup")
    verified_s = time.monotonic()
    verify(path)
    verify_s = time.monotonic() - verified_s
    with KVStoreClient(cluster.addresses) as client:
        keys = client.dbsize()
    cluster.stop()  # the restored one is not to share the machine with it
    return Backup(
        keys=keys,
        size_bytes=path.stat().st_size,
        backup_s=end_s - begin_s,
        latency=Latency.of(writes, begin_s, end_s),
        verify_s=verify_s,
        restore_s=_restore(path, cluster, keys),
    )


def _restore(path: Path, cluster: Cluster, keys: int) -> float:
    """The seconds that it took; Raises LoadError if not all is there."""
    restored = ClusterManager(NODES, None, cluster.directory / "restored", ())
    try:
        begin_s = time.monotonic()
        restored.restore(path, report=_say, progress=_say_changes())
        seconds = time.monotonic() - begin_s
        with KVStoreClient([f"{host}:{port}" for host, port in restored.addresses]) as client:
            some = random.sample(range(cluster.keys), min(CHECKED_KEYS, cluster.keys))
            is_whole = client.dbsize() == keys
            if not is_whole or client.mget([key(n) for n in some]) != [value(n) for n in some]:
                raise LoadError("the restored cluster does not hold what was backed up")
    finally:
        restored.stop(report=silent)
    return seconds


# ---- The program ---------------------------------------------------------------------------------

LOAD = "load"
MEASUREMENTS: Mapping[str, Callable[[Cluster], Result]] = {
    LOAD: measure_load,
    "restart": measure_restart,
    "latency": measure_write_latency,
    "hand-over": measure_hand_over,
    "lag": measure_lag,
    "idle-connections": measure_idle_connections,
    "idle-processor": measure_idle_processor,
    "backup": measure_backup,
}


def measure(names: Sequence[str], cluster: Cluster) -> tuple[dict[str, Result], list[Row]]:
    """The results by name, and the table's rows; what could not be measured has missed its targets."""
    results: dict[str, Result] = {}
    rows: list[Row] = []
    for name in names:
        _say(f"---- {name}")
        try:
            cluster.start()
            results[name] = MEASUREMENTS[name](cluster)
        except (LoadError, ManagerError, KVError, OSError, ValueError, psutil.Error) as error:
            rows.append(Row(name, f"not measured: {error}", "to be measured", False))
        else:
            rows += results[name].rows()
    return results, rows


def main() -> int:
    args = _arguments()
    with scratch_directory() as directory:
        document = {"date": today(), "machine": machine_facts(directory), "keys": args.keys}
        cluster = Cluster(directory, args.keys)
        try:
            results, rows = measure(args.only, cluster)
        finally:
            cluster.stop()
    print(table(rows))
    if args.json:
        figures = {name: rounded(asdict(result)) for name, result in results.items()}
        lines = [row._asdict() for row in rows]
        write_document({**document, "table": lines, "figures": figures}, args.json)
    return 1 if any(row.is_met is False for row in rows) else 0


def _arguments() -> argparse.Namespace:
    def some_measurements(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - MEASUREMENTS.keys():
            known = ", ".join(MEASUREMENTS)
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} is none of {known}")
        # Without the keys nothing else means much.
        return [name for name in MEASUREMENTS if name == LOAD or name in chosen]

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--keys", type=int, default=KEYS, metavar="N")
    parser.add_argument(
        "--only",
        type=some_measurements,
        default=list(MEASUREMENTS),
        metavar="NAME,...",
        help=f"which of {', '.join(MEASUREMENTS)}; {LOAD} is always done",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
