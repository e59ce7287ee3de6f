"""Mixed load for a long time: does anything grow?

    python -m benchmarks.soak --minutes 30 --json FILE --plot FILE

Three nodes with a log so short that the state is saved and the log cut every few seconds, and
clients that write, read, count, delete, let keys expire, and connect and leave. Every five seconds
each node's memory, open files, threads and disk are looked at, and how often its log was cut.

Flat means: the median of the last quarter is at most a tenth above that of the second quarter; the
first quarter is for warming up. Exit status 1 if something is not flat, or a counter is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from benchmarks.systems import NODES, scratch_directory, silent
from benchmarks.workload import LoadError, percentile
from cluster_manager import ClusterManager
from cluster_nodes import ask
from kv_client import KVStoreClient

MAX_LOG = "1MiB"
KEYS = 20_000
COUNTERS = 16
WRITERS = 4
PAUSE_S = 0.002  # between two requests of a client: the cluster is busy, not overloaded
SAMPLE_S = 5.0
GROWTH_MAX = 1.10
MEASURES = ("memory MiB", "open files", "threads", "disk MiB")

Series = dict[str, list[float]]  # by measure, a value a sample


@dataclass
class Results:
    """What was seen, sample by sample."""

    seconds: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    cuts: int = 0  # samples between which the log was cut
    nodes: dict[str, Series] = field(default_factory=dict)


class Writer(threading.Thread):
    """One client: a bit of everything, and how long each request took."""

    def __init__(self, nodes: Sequence[str], number: int) -> None:
        super().__init__(name=f"soak-{number}", daemon=True)
        self.random = random.Random(number)
        self.nodes = nodes
        self.stop = threading.Event()
        self.failure: Exception | None = None
        self.counts = [0] * COUNTERS  # increments that were answered
        self.latencies_s: list[float] = []

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                # A client that comes and goes: connections and sessions are opened and closed.
                with KVStoreClient(self.nodes, timeout_s=30) as client:
                    for _ in range(1000):
                        begin_s = time.monotonic()
                        self._request(client)
                        self.latencies_s.append(time.monotonic() - begin_s)
                        if self.stop.wait(PAUSE_S):
                            break
        except Exception as error:  # noqa: BLE001  # told by the main thread
            self.failure = error

    def _request(self, client: KVStoreClient) -> None:
        chance = self.random.random()
        key = f"key:{self.random.randrange(KEYS)}"
        if chance < 0.45:
            client.set(key, "x" * self.random.randrange(1000))
        elif chance < 0.55:
            client.set(f"short:{key}", 1, ttl_s=self.random.uniform(0.1, 10))
        elif chance < 0.70:
            counter = self.random.randrange(COUNTERS)
            client.incr(f"counter:{counter}")
            self.counts[counter] += 1
        elif chance < 0.75:
            client.delete(key)
        elif chance < 0.95:
            client.get(key)
        else:
            client.mget([f"key:{self.random.randrange(KEYS)}" for _ in range(20)])


def main() -> int:
    args = _arguments()
    with scratch_directory() as directory:
        manager = ClusterManager(NODES, None, directory, ("--max-log", MAX_LOG))
        try:
            manager.start(report=silent)
            results = soak(manager, args.minutes * 60, _say)
        finally:
            manager.stop(report=silent)
    if args.json:
        args.json.write_text(json.dumps(asdict(results)) + "\n")
    if args.plot:
        plot(results, args.plot)
    grown = [
        f"{node_id}: {measure} grew from {before:.1f} to {after:.1f}"
        for node_id, series in results.nodes.items()
        for measure in MEASURES
        for before, after in [quarters(series[measure])]
        if after > before * GROWTH_MAX
    ]
    _say("\n".join(grown) or "Nothing grew.")
    return 1 if grown else 0


def soak(manager: ClusterManager, seconds: float, say: Callable[[str], None]) -> Results:
    """Load the cluster and look at it. Raises LoadError if a request fails or a counter is wrong."""
    nodes = [f"{host}:{port}" for host, port in manager.addresses]
    writers = [Writer(nodes, number) for number in range(WRITERS)]
    for writer in writers:
        writer.start()
    results = Results()
    for node in manager.nodes:
        results.nodes[node.node_id] = {measure: [] for measure in MEASURES}
    first_index = _first_index(manager)
    begin_s = time.monotonic()
    while (now_s := time.monotonic() - begin_s) < seconds:
        time.sleep(SAMPLE_S)
        results.seconds.append(round(now_s, 1))
        for status in manager.status().nodes:
            look(manager, status.node_id, status.pid, results.nodes[status.node_id])
        latencies_s = _take_latencies(writers)
        results.p99_ms.append(round(percentile(latencies_s, 0.99) * 1000, 2))
        before, first_index = first_index, _first_index(manager)
        results.cuts += first_index > before
        memory_mib = max(series["memory MiB"][-1] for series in results.nodes.values())
        say(
            f"{now_s:5.0f} s of {seconds:.0f}: {len(latencies_s) / SAMPLE_S:,.0f} requests/s, "
            f"p99 {results.p99_ms[-1]:.1f} ms, {memory_mib:.1f} MiB, "
            f"log cut in {results.cuts} of {len(results.seconds)} samples"
        )
    for writer in writers:
        writer.stop.set()
    for writer in writers:
        writer.join()
    _check_counters(nodes, writers)
    return results


def _take_latencies(writers: Sequence[Writer]) -> list[float]:
    latencies_s: list[float] = []
    for writer in writers:
        if writer.failure is not None:
            raise LoadError(f"a client failed: {writer.failure!r}")
        latencies_s += writer.latencies_s
        writer.latencies_s = []
    return latencies_s


def _first_index(manager: ClusterManager) -> int:
    """Of the log of the first node."""
    return int(str(ask(manager.addresses[0], "STATUS")["first_index"]))


def look(manager: ClusterManager, node_id: str, pid: int | None, series: Series) -> None:
    """Add one sample of a node."""
    process = psutil.Process(pid)
    files = (path.stat() for path in manager.node(node_id).directory.rglob("*"))
    values = (
        process.memory_info().rss / 2**20,
        process.num_fds(),
        process.num_threads(),
        sum(file.st_blocks * 512 for file in files) / 2**20,
    )
    for measure, value in zip(MEASURES, values, strict=True):
        series[measure].append(round(value, 2))


def _check_counters(nodes: Sequence[str], writers: Sequence[Writer]) -> None:
    with KVStoreClient(nodes, timeout_s=30) as client:
        for counter in range(COUNTERS):
            counted = sum(writer.counts[counter] for writer in writers)
            found = client.get(f"counter:{counter}")
            if found != counted:
                raise LoadError(f"counter:{counter} is {found}, but {counted} were answered")


def quarters(values: Sequence[float]) -> tuple[float, float]:
    """The medians of the second and of the last quarter."""
    quarter = max(1, len(values) // 4)
    return statistics.median(values[quarter : 2 * quarter]), statistics.median(values[-quarter:])


def plot(results: Results, path: Path) -> None:
    """Each measure of each node over time, and the latency."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "benchmarks"
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(5, 1, sharex=True, figsize=(9, 11), layout="constrained")
    minutes = [second / 60 for second in results.seconds]
    for row, measure in zip(axes, MEASURES, strict=False):
        for node_id, series in results.nodes.items():
            row.plot(minutes, series[measure], label=node_id)
        row.set_ylabel(measure)
        row.set_ylim(bottom=0)
    axes[-1].plot(minutes, results.p99_ms, color="k")
    axes[-1].set_ylabel("p99 of a request, ms")
    axes[-1].set_ylim(bottom=0)
    axes[-1].set_xlabel("minutes")
    axes[0].legend(loc="lower right", ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
    plt.close(figure)


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Mixed load for a long time: does anything grow?")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="every sample")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="the same as a picture")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
