"""A load generator for what redis-benchmark cannot send: SET followed by WAIT on one connection.

Each connection sends ``--pipeline`` SETs and one ``WAIT 1`` in one write, and counts them when all
replies are in and WAIT found a replica. One thread, one process, like redis-benchmark.

    python -m benchmarks.wait_load --port 6379 --connections 50 --seconds 3
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import selectors
import socket
import time

from benchmarks.workload import KEY_DIGITS, LoadError, Sample, percentile

WAIT_TIMEOUT_MS = 5000
RECEIVE_BYTES = 64 * 1024
WARM_UP_S = 0.5


class Batches:
    """The bytes of ``pipeline`` SETs and a WAIT, again and again, and of their only good reply.

    Encoded before the measurement, every key once in random order: Python's time while it runs is
    time that the servers on the same machine do not have.
    """

    def __init__(self, prefix: str, value: str, keys: int, pipeline: int) -> None:
        key_bytes = len(prefix) + KEY_DIGITS
        sets = [
            f"*3\r\n$3\r\nSET\r\n${key_bytes}\r\n{prefix}{number:0{KEY_DIGITS}}\r\n"
            f"${len(value)}\r\n{value}\r\n".encode()
            for number in random.sample(range(keys), keys)
        ]
        wait = b"*3\r\n$4\r\nWAIT\r\n$1\r\n1\r\n$4\r\n%d\r\n" % WAIT_TIMEOUT_MS
        starts = range(0, keys - pipeline + 1, pipeline)
        self._requests = itertools.cycle(
            [b"".join([*sets[start : start + pipeline], wait]) for start in starts]
        )
        stored = b"+OK\r\n" * pipeline
        self._good_replies = {stored + b":%d\r\n" % replicas for replicas in (1, 2)}
        self.pipeline = pipeline
        self.reply_bytes = len(stored) + len(b":1\r\n")

    def next_request(self) -> bytes:
        return next(self._requests)

    def check(self, reply: bytes) -> None:
        if reply not in self._good_replies:
            raise LoadError(f"not stored on a replica: {reply[:200]!r}")


class Connection:
    """One connection with one batch in flight."""

    def __init__(self, port: int, batches: Batches) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._batches = batches
        self._received = b""
        self._sent_s = 0.0

    def send(self) -> None:
        """Send the next batch. Batches are a few KiB at most: they fit the socket's buffer."""
        self._received = b""
        self._sent_s = time.perf_counter()
        self.socket.sendall(self._batches.next_request())

    def receive(self) -> float | None:
        """Take what has arrived: the batch's latency in seconds once it is answered, else None."""
        data = self.socket.recv(RECEIVE_BYTES)
        if not data:
            raise LoadError("the server closed the connection")
        self._received += data
        if len(self._received) < self._batches.reply_bytes and not self._received.startswith(b"-"):
            return None
        self._batches.check(self._received)
        return time.perf_counter() - self._sent_s


def run(port: int, connections: int, seconds: float, batches: Batches) -> Sample:
    """Keep every connection busy for ``seconds``, after a warm-up that is not counted."""
    selector = selectors.DefaultSelector()
    for _ in range(connections):
        connection = Connection(port, batches)
        selector.register(connection.socket, selectors.EVENT_READ, connection)
        connection.send()
    latencies_s: list[float] = []
    start_s = time.perf_counter() + WARM_UP_S
    end_s = start_s + seconds
    while (now_s := time.perf_counter()) < end_s:
        for ready, _ in selector.select(WAIT_TIMEOUT_MS / 1000):
            latency_s = ready.data.receive()
            if latency_s is not None:
                ready.data.send()
                if now_s >= start_s:
                    latencies_s.append(latency_s)
    if not latencies_s:
        raise LoadError("nothing was answered")
    for ready in list(selector.get_map().values()):
        ready.data.socket.close()
    return Sample(
        rps=len(latencies_s) * batches.pipeline / seconds,
        p50_ms=percentile(latencies_s, 0.50) * 1000,
        p99_ms=percentile(latencies_s, 0.99) * 1000,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="SET and WAIT 1 against a Redis primary.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=1, help="SETs to one WAIT")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--prefix", default="key:")
    parser.add_argument("--value", default="x" * 16)
    parser.add_argument("--keys", type=int, default=100_000)
    args = parser.parse_args()
    batches = Batches(args.prefix, args.value, args.keys, args.pipeline)
    sample = run(args.port, args.connections, args.seconds, batches)
    print(json.dumps(sample._asdict()))


if __name__ == "__main__":
    main()
