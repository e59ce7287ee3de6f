"""How long writes stop when the primary's process is killed.

    python -m benchmarks.failover --kills 20 --json FILE

The time runs from just before ``kill -9`` to the answer of the first write that was sent after it,
as one ``KVStoreClient`` sees it that knew the old primary: finding out, the election and the search
for the new primary are all in it. Before the next kill the node is started again and waited for,
until it is a voter that has caught up. A hang or a partition takes the election timeout instead
(5 to 8 s by default) and is not measured here.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.report import (
    failover_line,
    failover_summary,
    machine_facts,
    today,
    write_document,
)
from benchmarks.systems import scratch_directory, silent, start_kv_cluster
from benchmarks.workload import LoadError
from cluster_manager import ClusterManager
from kv_client import KVStoreClient

WRITE_TIMEOUT_S = 60.0


def measure_failovers(directory: Path, kills: int, progress: Callable[[str], None]) -> list[float]:
    """The seconds of each of ``kills`` failovers of a cluster of its own."""
    manager = start_kv_cluster(directory)
    try:
        nodes = [f"{host}:{port}" for host, port in manager.addresses]
        with KVStoreClient(nodes, timeout_s=WRITE_TIMEOUT_S) as client:
            samples_s: list[float] = []
            for number in range(1, kills + 1):
                samples_s.append(_kill_once(manager, client, number))
                progress(f"kill {number} of {kills}: {samples_s[-1]:.2f} s")
                manager.start(report=silent)
                _check_kept(client, number)
        return samples_s
    finally:
        manager.stop(report=silent)


def _kill_once(manager: ClusterManager, client: KVStoreClient, number: int) -> float:
    client.set(f"before:{number}", number)  # the client holds a connection to the primary
    primary = manager.status().primary
    if primary is None:
        raise LoadError("the cluster has no primary")

    start_s = time.monotonic()
    manager.kill_node(primary)
    client.set(f"after:{number}", number)

    return time.monotonic() - start_s


def _check_kept(client: KVStoreClient, kills: int) -> None:
    """No acknowledged write may be lost: otherwise a short failover is worth nothing."""
    for number in range(1, kills + 1):
        for when in ("before", "after"):
            if client.get(f"{when}:{number}") != number:
                raise LoadError(f"kill {number}: the write {when} it is lost")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--json", type=Path, metavar="FILE", help="every kill")
    args = parser.parse_args()
    with scratch_directory() as directory:
        document: dict[str, object] = {"date": today(), "machine": machine_facts(directory)}
        samples_s = measure_failovers(directory, args.kills, print)
    print(failover_line(samples_s))
    if args.json:
        document["failover_s"] = failover_summary(samples_s)
        write_document(document, args.json)


if __name__ == "__main__":
    main()
