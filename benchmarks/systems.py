"""The three systems: how each is started, filled, put under load, checked and stopped.

Rule 1: three nodes each, on 127.0.0.1 and free ports, data in a directory of their own.
Rule 2: every system syncs each write to disk on a majority before it answers. Redis has no such
mode; nearest is ``appendfsync always`` with ``WAIT 1`` behind each SET.
Rule 3: a run counts only if the data is there afterwards: load tools take errors for answers.
Rule 4: processes are stopped by the handle or the manager that started them, never by name.
"""

from __future__ import annotations

import base64
import csv
import http.client
import json
import math
import random
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import psutil
import redis

from benchmarks.workload import LoadError, Sample, Workload, key, percentile
from cluster_manager import ClusterManager
from cluster_nodes import ask

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "benchmarks" / "data"
MEMORY_FILESYSTEMS = {"tmpfs", "ramfs"}
NODES = 3
HOST = "127.0.0.1"
START_S_MAX = 60.0
STOP_S_MAX = 10.0
FILL_KEYS = 100  # keys a request while filling; etcd takes at most 128 operations a transaction
CHECKED_KEYS = 500
H2LOAD_WARM_UP = "500ms"


class System(Protocol):
    """What compare.py needs of each of the three."""

    name: str  # as ``--systems`` takes it
    title: str

    def missing(self) -> str | None:
        """A sentence about the program that is not installed, or None."""

    def start(self, directory: Path) -> None:
        """Start the nodes; returns when all of them take part."""

    def version(self) -> str: ...

    def fill(self, workload: Workload, keys: int) -> None:
        """Write every key that ``workload`` may touch once."""

    def measure(self, workload: Workload, keys: int, seconds: float) -> Sample:
        """Put it under load for about ``seconds``. Raises LoadError for a run that does not count."""

    def stop(self) -> None: ...


# ---- Where the data is ---------------------------------------------------------------------------


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory on a disk, removed at the end."""
    DATA.mkdir(exist_ok=True)
    _require_disk(DATA)
    directory = Path(tempfile.mkdtemp(dir=DATA))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _require_disk(directory: Path) -> None:
    """Stop here if ``directory`` is in memory, where fsync costs nothing and means nothing."""
    mounts = {Path(p.mountpoint): p.fstype for p in psutil.disk_partitions(all=True)}
    nearest = next((d for d in (directory, *directory.parents) if d in mounts), None)
    if nearest and mounts[nearest] in MEMORY_FILESYSTEMS:
        sys.exit(f"{directory} is on {mounts[nearest]}, not on a disk: fsync would cost nothing")


# ---- Processes and ports -------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now; held together so that all are different."""
    sockets = [socket.create_server((HOST, 0)) for _ in range(count)]
    ports: list[int] = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def missing_program(*programs: str) -> str | None:
    absent = [p for p in programs if shutil.which(p) is None]
    return f"{' and '.join(absent)} not found on the PATH" if absent else None


def run_tool(argv: Sequence[str], timeout_s: float = 600) -> str:
    """The standard output of a program. Raises LoadError with its words if it failed."""
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    if done.returncode != 0:
        raise LoadError(f"{argv[0]} failed: {(done.stderr or done.stdout).strip()[-500:]}")
    return done.stdout


def wait_until(ready: Callable[[], bool], what: str) -> None:
    """Return as soon as ``ready``; raises LoadError after START_S_MAX."""
    deadline = time.monotonic() + START_S_MAX
    while time.monotonic() < deadline:
        try:
            if ready():
                return
        except (OSError, LoadError, redis.RedisError):
            pass  # not listening yet
        time.sleep(0.05)
    raise LoadError(f"{what} did not come up within {START_S_MAX:.0f} s")


class Processes:
    """Child processes, each with a log file in its directory."""

    def __init__(self) -> None:
        self._children: list[subprocess.Popen[bytes]] = []

    def spawn(self, argv: Sequence[str], log: Path) -> None:
        with log.open("wb") as output:
            child = subprocess.Popen(argv, stdout=output, stderr=output, stdin=subprocess.DEVNULL)
        self._children.append(child)

    def stop(self) -> None:
        for child in self._children:
            child.terminate()
        for child in self._children:
            try:
                child.wait(STOP_S_MAX)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._children.clear()


# ---- What speaks RESP: this cluster and Redis ----------------------------------------------------


def fill_by_resp(port: int, workload: Workload, keys: int) -> None:
    value = b"." * workload.value_bytes
    with redis.Redis(host=HOST, port=port) as client:
        for first in range(0, keys, FILL_KEYS):
            numbers = range(first, min(first + FILL_KEYS, keys))
            client.execute_command("MSET", *_pairs(workload, numbers, value))


def _pairs(workload: Workload, numbers: Iterable[int], value: bytes) -> list[bytes]:
    return [part for number in numbers for part in (key(workload, number), value)]


def check_by_resp(port: int, workload: Workload, keys: int, value: bytes, requests: float) -> None:
    """Raise LoadError unless about as many keys hold ``value`` as ``requests`` random SETs leave.

    n draws from k keys leave out a share of exp(-n/k); half of the rest is asked for, so that
    chance alone cannot fail a run of a few thousand requests.
    """
    expected = 1 - math.exp(-requests / keys)
    numbers = random.sample(range(keys), min(CHECKED_KEYS, keys))
    with redis.Redis(host=HOST, port=port) as client:
        held = client.execute_command("MGET", *(key(workload, number) for number in numbers))
    found = sum(stored == value for stored in held) / len(numbers)
    if found < expected / 2:
        raise LoadError(f"{found:.0%} of the keys were written, {expected:.0%} were sent")


class RedisBenchmark:
    """redis-benchmark with a fixed duration instead of its fixed number of requests."""

    def __init__(self) -> None:
        self._rps: dict[Workload, float] = {}  # as last seen

    def run(self, port: int, workload: Workload, keys: int, seconds: float) -> Sample:
        """Run for about ``seconds``; the first run of a workload is preceded by a short trial."""
        value = random_value(workload)
        if workload not in self._rps:
            trial = 300 + 50 * workload.connections * workload.pipeline
            self._rps[workload] = self._once(port, workload, keys, trial, value).rps
        requests = max(1000, int(self._rps[workload] * seconds))
        sample = self._once(port, workload, keys, requests, value)
        self._rps[workload] = sample.rps
        if workload.op == "SET":
            check_by_resp(port, workload, keys, value.encode(), requests)
        return sample

    @staticmethod
    def _once(port: int, workload: Workload, keys: int, requests: int, value: str) -> Sample:
        command = [workload.op, f"{workload.key_prefix}__rand_int__"]
        output = run_tool(
            [
                "redis-benchmark",
                *("-h", HOST, "-p", str(port), "--csv", "-e"),
                *("-c", str(workload.connections), "-P", str(workload.pipeline)),
                *("-n", str(requests), "-r", str(keys)),
                *command,
                *([value] if workload.op == "SET" else []),
            ]
        )
        # With -e an error reply is printed to the same output as the table.
        lines = [line for line in output.splitlines() if line.startswith('"')]
        if "Error from server" in output or len(lines) != 2:
            raise LoadError(f"redis-benchmark: {output.strip()[-500:]}")
        row = dict(zip(*csv.reader(lines), strict=True))
        return Sample(float(row["rps"]), float(row["p50_latency_ms"]), float(row["p99_latency_ms"]))


def random_value(workload: Workload) -> str:
    """Another one for each run, so that the check after it sees this run's writes only."""
    return random.randbytes(workload.value_bytes // 2).hex()


# ---- This cluster --------------------------------------------------------------------------------


def start_kv_cluster(directory: Path) -> ClusterManager:
    """Three nodes of this project with their default settings, all of them voters."""
    manager = ClusterManager(nodes=NODES, base_port=None, data_dir=directory)
    manager.start(report=silent)
    return manager


def silent(_: str) -> None:
    """What the manager reports while it works is not part of the table."""


class KVCluster:
    """This project's cluster with its default settings, under redis-benchmark."""

    name = "kv"
    title = "this cluster"

    def __init__(self) -> None:
        self._manager: ClusterManager | None = None
        self._load = RedisBenchmark()

    def missing(self) -> str | None:
        return missing_program("redis-benchmark")

    def start(self, directory: Path) -> None:
        self._manager = start_kv_cluster(directory)

    def version(self) -> str:
        assert self._manager is not None
        return str(ask(self._manager.addresses[0], "STATUS")["version"])

    def _primary_port(self) -> int:
        assert self._manager is not None
        primary = self._manager.status().primary
        if primary is None:
            raise LoadError("the cluster has no primary")
        return self._manager.node(primary).port

    def fill(self, workload: Workload, keys: int) -> None:
        fill_by_resp(self._primary_port(), workload, keys)

    def measure(self, workload: Workload, keys: int, seconds: float) -> Sample:
        return self._load.run(self._primary_port(), workload, keys, seconds)

    def stop(self) -> None:
        if self._manager is not None:
            self._manager.stop(report=silent)


# ---- Redis ---------------------------------------------------------------------------------------


class RedisReplicas:
    """A Redis primary and two replicas, every write synced and waited for on one replica.

    GET is plain GET: the primary does not ask whether it still is one. That promise is weaker than
    a linearizable read, and no Redis command makes it stronger.
    """

    name = "redis"
    title = "Redis + WAIT 1"

    def __init__(self) -> None:
        self._ports: list[int] = []
        self._processes = Processes()
        self._load = RedisBenchmark()

    def missing(self) -> str | None:
        return missing_program("redis-server", "redis-benchmark")

    def start(self, directory: Path) -> None:
        self._ports = free_ports(NODES)
        for port in self._ports:
            data = directory / str(port)
            data.mkdir(parents=True)
            replica = [] if port == self._ports[0] else ["--replicaof", HOST, str(self._ports[0])]
            self._processes.spawn(
                [
                    *("redis-server", "--bind", HOST, "--port", str(port), "--dir", str(data)),
                    *("--appendonly", "yes", "--appendfsync", "always"),
                    # No rewrite or snapshot in the middle of a measurement.
                    *("--save", "", "--auto-aof-rewrite-percentage", "0"),
                    *("--repl-diskless-sync-delay", "0", *replica),
                ],
                data / "log",
            )
        wait_until(self._replicas_online, "Redis")

    def _replicas_online(self) -> bool:
        with redis.Redis(host=HOST, port=self._ports[0]) as client:
            replication = client.execute_command("INFO", "replication")
        return all(
            replication.get(f"slave{n}", {}).get("state") == "online" for n in range(NODES - 1)
        )

    def version(self) -> str:
        with redis.Redis(host=HOST, port=self._ports[0]) as client:
            return str(client.execute_command("INFO", "server")["redis_version"])

    def fill(self, workload: Workload, keys: int) -> None:
        fill_by_resp(self._ports[0], workload, keys)

    def measure(self, workload: Workload, keys: int, seconds: float) -> Sample:
        if workload.op == "GET":
            return self._load.run(self._ports[0], workload, keys, seconds)
        value = random_value(workload)
        output = run_tool(
            [
                *(sys.executable, "-m", "benchmarks.wait_load"),
                *("--port", str(self._ports[0]), "--seconds", str(seconds)),
                *("--connections", str(workload.connections)),
                *("--pipeline", str(workload.pipeline)),
                *("--prefix", workload.key_prefix, "--value", value, "--keys", str(keys)),
            ]
        )
        sample = Sample(**json.loads(output))
        check_by_resp(self._ports[0], workload, keys, value.encode(), sample.rps * seconds)
        return sample

    def stop(self) -> None:
        self._processes.stop()


# ---- etcd ----------------------------------------------------------------------------------------


class EtcdCluster:
    """etcd with its default settings, under h2load: gRPC is HTTP/2 with bodies one can write by hand.

    h2load sends one body a run, so a run writes or reads one key, among all those that ``fill`` has
    made. Random keys, sent by a slower generator, cost etcd up to 6 %: this way favours etcd.
    A pipelined request is a stream of its own, which is how gRPC clients share a connection.
    """

    name = "etcd"
    title = "etcd"

    def __init__(self) -> None:
        self._directory = Path()
        self._ports: list[int] = []  # for clients
        self._leader_port = 0
        self._processes = Processes()

    def missing(self) -> str | None:
        return missing_program("etcd", "h2load")

    def start(self, directory: Path) -> None:
        self._directory = directory
        directory.mkdir(parents=True)
        ports = free_ports(2 * NODES)
        self._ports = ports[:NODES]
        peers = [f"http://{HOST}:{port}" for port in ports[NODES:]]
        for number, (port, peer) in enumerate(zip(self._ports, peers, strict=True)):
            client = f"http://{HOST}:{port}"
            self._processes.spawn(
                [
                    *("etcd", "--name", f"n{number}", "--data-dir", str(directory / f"n{number}")),
                    *("--listen-client-urls", client, "--advertise-client-urls", client),
                    *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
                    "--initial-cluster",
                    ",".join(f"n{n}={url}" for n, url in enumerate(peers)),
                    *("--logger", "zap", "--log-level", "error"),
                ],
                directory / f"n{number}.log",
            )
        wait_until(self._find_leader, "etcd")

    def _find_leader(self) -> bool:
        for port in self._ports:
            status = self._ask(port, "maintenance/status", {})
            if status.get("leader", "0") == status["header"]["member_id"]:
                self._leader_port = port
        return self._leader_port != 0

    @staticmethod
    def _ask(port: int, method: str, body: Mapping[str, object]) -> dict[str, dict[str, str]]:
        """One request to the JSON gateway, which is too slow for load but handy for all else."""
        connection = http.client.HTTPConnection(HOST, port, timeout=START_S_MAX)
        try:
            connection.request("POST", f"/v3/{method}", json.dumps(body))
            answer: dict[str, dict[str, str]] = json.load(connection.getresponse())
        finally:
            connection.close()
        if "error" in answer:
            raise LoadError(f"etcd: {answer['error']}")
        return answer

    def version(self) -> str:
        return str(self._ask(self._leader_port, "maintenance/status", {})["version"])

    def fill(self, workload: Workload, keys: int) -> None:
        value = base64.b64encode(b"." * workload.value_bytes).decode()
        for first in range(0, keys, FILL_KEYS):
            puts = [
                {"requestPut": {"key": base64.b64encode(key(workload, n)).decode(), "value": value}}
                for n in range(first, min(first + FILL_KEYS, keys))
            ]
            self._ask(self._leader_port, "kv/txn", {"success": puts})

    def measure(self, workload: Workload, keys: int, seconds: float) -> Sample:
        self._find_leader()
        chosen = key(workload, random.randrange(keys))
        fields = [chosen]
        if workload.op == "SET":
            fields.append(random_value(workload).encode())
        body = self._directory / "request"
        body.write_bytes(grpc_message(fields))
        log = self._directory / "latencies"
        log.unlink(missing_ok=True)
        revision_before = self._revision(chosen)

        output = run_tool(
            [
                *("h2load", "-t", "1", "-c", str(workload.connections)),
                *("-m", str(workload.pipeline), "-d", str(body), "--log-file", str(log)),
                *("-D", f"{seconds * 1000:.0f}ms", "--warm-up-time", H2LOAD_WARM_UP),
                *("-H", "content-type: application/grpc", "-H", "te: trailers"),
                f"http://{HOST}:{self._leader_port}/etcdserverpb.KV/"
                + {"SET": "Put", "GET": "Range"}[workload.op],
            ]
        )

        latencies_us = [int(line.split()[2]) for line in log.read_text().splitlines()]
        if not latencies_us:
            raise LoadError(f"h2load: {output.strip()[-500:]}")
        if workload.op == "SET":
            self._check_written(len(latencies_us), self._revision(chosen) - revision_before)
        else:
            self._check_read(workload, len(latencies_us), output)
        return Sample(
            rps=len(latencies_us) / seconds,
            p50_ms=percentile(latencies_us, 0.50) / 1000,
            p99_ms=percentile(latencies_us, 0.99) / 1000,
        )

    def _revision(self, chosen: bytes) -> int:
        """etcd counts every write that was applied, in all keys."""
        body = {"key": base64.b64encode(chosen).decode()}
        return int(self._ask(self._leader_port, "kv/range", body)["header"]["revision"])

    @staticmethod
    def _check_written(answered: int, written: int) -> None:
        if written < answered:  # those of the warm-up come on top
            raise LoadError(f"etcd wrote {written} of {answered} requests")

    @staticmethod
    def _check_read(workload: Workload, answered: int, output: str) -> None:
        """gRPC says 200 to everything; only an answer that carries the value was a success."""
        received = next(line for line in output.splitlines() if line.startswith("traffic:"))
        data_bytes = int(received.split("(")[-1].split(")")[0])
        if data_bytes < answered * workload.value_bytes:
            raise LoadError(f"etcd answered without the value: {received}")

    def stop(self) -> None:
        self._processes.stop()


def grpc_message(fields: Sequence[bytes]) -> bytes:
    """A message of length-delimited fields 1, 2, ..., uncompressed, as gRPC frames it.

    PutRequest is (key, value), RangeRequest is (key): etcd's rpc.proto.
    """
    body = b"".join(
        _varint(number << 3 | 2) + _varint(len(field)) + field
        for number, field in enumerate(fields, start=1)
    )
    return struct.pack(">BI", 0, len(body)) + body


def _varint(number: int) -> bytes:
    encoded = b""
    while number > 0x7F:
        encoded += bytes([number & 0x7F | 0x80])
        number >>= 7
    return encoded + bytes([number])


SYSTEMS: tuple[type[System], ...] = (KVCluster, EtcdCluster, RedisReplicas)
