"""What exactly-once costs: SET as it is and under a session, in turns on one cluster.

    python -m benchmarks.session_load --connections 50 --rounds 50 --json FILE

Each connection has one batch in flight, and in the second case a session of its own: every SET
carries the next serial and frees the answers to the batch before. Both cases are sent by the same
code, by one process with one thread. They change places every half second: what else the machine
does then hits both alike, and the ratio holds where the figures do not. Processor time is that of
the three nodes together.
"""

from __future__ import annotations

import argparse
import json
import random
import selectors
import socket
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil

from benchmarks.report import machine_facts, today, write_document
from benchmarks.systems import scratch_directory, silent, start_kv_cluster
from benchmarks.workload import KEY_DIGITS, LoadError
from cluster_manager import ClusterManager
from cluster_nodes import ask

KEYS = 100_000
VALUE = b"x" * 16
SLICE_S = 0.5
RECEIVE_BYTES = 64 * 1024


class Measured(NamedTuple):
    """One slice."""

    rps: float
    cpu_us: float  # of all nodes, a request


class Pair(NamedTuple):
    """Two slices that followed each other."""

    plain: Measured
    in_sessions: Measured


def _bulks(*words: bytes) -> bytes:
    return b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


class Connection:
    """SETs, ``pipeline`` at a time; under a session if there is one."""

    def __init__(self, port: int, pipeline: int, session: int | None) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pipeline = pipeline
        self._good_reply = b"+OK\r\n" * pipeline
        self._received = b""
        self._sets = [
            _bulks(b"SET", f"key:{number:0{KEY_DIGITS}}".encode(), VALUE)
            for number in random.sample(range(KEYS), 1000)
        ]
        self._in_session = session is not None
        self._head = b"*3\r\n"
        if session is not None:
            self._head = b"*8\r\n" + _bulks(b"SESSION", b"DO", b"%d" % session)
        self._serial = 0

    def send(self) -> None:
        """Send the next batch. Batches are a few KiB at most: they fit the socket's buffer."""
        parts = []
        first = b"%d" % (self._serial + 1)
        for _ in range(self._pipeline):
            self._serial += 1
            parts.append(self._head)
            if self._in_session:
                parts.append(_bulks(b"%d" % self._serial, first))
            parts.append(self._sets[self._serial % 1000])
        self.socket.sendall(b"".join(parts))

    def receive(self) -> int:
        """Take what has arrived: how many requests are answered with that."""
        data = self.socket.recv(RECEIVE_BYTES)
        if not data:
            raise LoadError("the server closed the connection")
        self._received += data
        if not self._good_reply.startswith(self._received):
            raise LoadError(f"not stored: {self._received[:200]!r}")
        if len(self._received) < len(self._good_reply):
            return 0
        self._received = b""
        return self._pipeline


def drive(connections: Sequence[Connection], seconds: float) -> float:
    """Keep all of them busy for a while; requests a second."""
    with selectors.DefaultSelector() as selector:
        begin_s = time.perf_counter()
        end_s = begin_s + seconds
        for connection in connections:
            selector.register(connection.socket, selectors.EVENT_READ, connection)
            connection.send()
        count, busy = 0, len(connections)
        while busy:
            for ready, _ in selector.select():
                answered = ready.data.receive()
                count += answered
                if answered and time.perf_counter() < end_s:
                    ready.data.send()
                elif answered:
                    busy -= 1
        return count / (time.perf_counter() - begin_s)


def compare(manager: ClusterManager, connections: int, pipeline: int, rounds: int) -> list[Pair]:
    """As many pairs as rounds; which of the two comes first changes from one to the next."""
    primary = manager.status().primary
    if primary is None:
        raise LoadError("the cluster has no primary")
    node = manager.node(primary)
    pids = [json.loads(node.pid_file.read_bytes())["pid"] for node in manager.nodes]
    processes = [psutil.Process(pid) for pid in pids]

    def opened() -> int:
        session = ask(node.address, "SESSION OPEN")["session"]
        assert isinstance(session, int)
        return session

    plain = [Connection(node.port, pipeline, None) for _ in range(connections)]
    in_sessions = [Connection(node.port, pipeline, opened()) for _ in range(connections)]

    def measure(load: Sequence[Connection]) -> Measured:
        before_s = sum(sum(process.cpu_times()[:2]) for process in processes)
        rps = drive(load, SLICE_S)
        cpu_s = sum(sum(process.cpu_times()[:2]) for process in processes) - before_s
        return Measured(round(rps), round(cpu_s / (rps * SLICE_S) * 1e6, 1))

    for load in (plain, in_sessions):
        drive(load, 2.0)
    pairs = []
    for number in range(rounds):
        slices = {}
        for with_session in (number % 2 == 0, number % 2 == 1):
            slices[with_session] = measure(in_sessions if with_session else plain)
        pairs.append(Pair(slices[False], slices[True]))
    return pairs


def summary(pairs: Sequence[Pair]) -> dict[str, float]:
    """What the pairs come to: medians, and between which ratios half of the pairs lie."""
    low, ratio, high = statistics.quantiles((s.rps / p.rps for p, s in pairs), n=4)
    cpu = statistics.median(s.cpu_us / p.cpu_us for p, s in pairs)
    figures = {"ratio": ratio, "ratio_low": low, "ratio_high": high, "cpu_ratio": cpu}
    return {name: round(figure, 3) for name, figure in figures.items()}


def show(pairs: Sequence[Pair], figures: Mapping[str, float]) -> None:
    """Print the medians, and the ratios."""
    for name, found in zip(("plain", "in sessions"), zip(*pairs, strict=True), strict=True):
        rps, cpu_us = (statistics.median(column) for column in zip(*found, strict=True))
        print(f"{name}: {rps:,.0f} requests/s, {cpu_us:.0f} us of the nodes' processor time each")
    low, high = figures["ratio_low"], figures["ratio_high"]
    print(f"ratio: {figures['ratio']:.3f} (half of the pairs: {low:.3f} to {high:.3f})")
    print(f"processor time: {figures['cpu_ratio']:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--connections", type=int, default=50)
    parser.add_argument("--pipeline", type=int, default=1, help="SETs in flight on a connection")
    parser.add_argument("--rounds", type=int, default=60, help="of half a second for each case")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every slice")
    args = parser.parse_args()
    with scratch_directory() as directory:
        machine = machine_facts(directory)
        manager = start_kv_cluster(directory)
        try:
            pairs = compare(manager, args.connections, args.pipeline, args.rounds)
        finally:
            manager.stop(report=silent)
    figures = summary(pairs)
    show(pairs, figures)
    if args.json:
        load = {"connections": args.connections, "pipeline": args.pipeline, "slice_s": SLICE_S}
        slices = [{name: side._asdict() for name, side in pair._asdict().items()} for pair in pairs]
        document = {"date": today(), "machine": machine, "load": load, "summary": figures}
        write_document({**document, "pairs": slices}, args.json)


if __name__ == "__main__":
    main()
