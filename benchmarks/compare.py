"""This cluster, etcd and Redis under the same load, in one run, on this machine.

    python -m benchmarks.compare --quick
    python -m benchmarks.compare --rounds 5 --json FILE --plot FILE

What is measured: requests a second and their latency (p50, p99) as one load process sees them that
is connected to the primary (etcd: the leader). Three nodes each, every write synced to disk on a
majority before it is answered, keys of 15 or 16 bytes, values of 16 and 256. Each system is run in
turn, round after round, and the median over the rounds is shown: machines are noisy, and a slow
minute then hits all. And once, for this cluster only: how long writes stop after a kill of the primary.

How the load compares. All load tools use one thread. This cluster and Redis' GET: redis-benchmark,
random keys. etcd: h2load over gRPC, one key a run. Redis' SET: ``wait_load.py``, which puts a WAIT 1
behind each SET, or each pipeline. "Pipelined" is 16 requests in flight on each connection, for etcd
16 streams.

What is not measured. Clients, nodes and disks share one machine: there is no network, nodes compete
for cores, and three nodes sync to one disk. Redis' GET does not ask a majority whether the primary
still is one, so it is a weaker read than the others'; Redis may also lose a write that WAIT has
seen, when the replica that lacks it is promoted. The other systems stay up, idle, while one is
measured; their heartbeats cost each the same. Long runs (compaction, full disks) are not covered.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmarks.failover import measure_failovers
from benchmarks.report import (
    Cell,
    Results,
    failover_line,
    machine_facts,
    plot,
    table,
    today,
    write_json,
)
from benchmarks.systems import SYSTEMS, System, scratch_directory
from benchmarks.workload import WORKLOADS, LoadError, Workload
from cluster_manager import ManagerError

FAILOVER = "failover"  # as ``--only`` takes it


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    rounds: int
    seconds: float  # a run
    keys: int
    kills: int
    value_bytes: tuple[int, ...]


FULL = Effort(rounds=5, seconds=3.0, keys=100_000, kills=20, value_bytes=(16, 256))
QUICK = Effort(rounds=1, seconds=1.0, keys=10_000, kills=3, value_bytes=(16,))


def main() -> int:
    args = _arguments()
    effort = QUICK if args.quick else FULL
    rounds = args.rounds or effort.rounds
    workloads = [
        w for w in WORKLOADS if args.only in w.name and w.value_bytes in effort.value_bytes
    ]
    with scratch_directory() as directory:
        results = Results(
            date=today(),
            machine=machine_facts(directory),
            load={"seconds": effort.seconds, "rounds": rounds, "keys": effort.keys},
        )
        failed = _measure_load(args.systems, workloads, effort, rounds, directory, results)
        if "kv" in args.systems and args.only in FAILOVER:
            failed |= _measure_failovers(effort, directory, results)
    if results.samples:
        print(table(results))
    if results.failovers_s:
        print(failover_line(results.failovers_s))
    if args.json:
        write_json(results, args.json)
    if args.plot and results.samples:
        plot(results, args.plot)
    return 1 if failed else 0


def _arguments() -> argparse.Namespace:
    names = [system.name for system in SYSTEMS]

    def some_systems(text: str) -> list[str]:
        chosen = text.split(",")
        if unknown := set(chosen) - set(names):
            raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} not in {names}")
        return chosen

    parser = argparse.ArgumentParser(
        description="This cluster, etcd and Redis under the same load, on this machine.",
        epilog=f"workloads: {' '.join(w.name for w in WORKLOADS)} {FAILOVER}",
    )
    parser.add_argument("--quick", action="store_true", help="one round of one second, 16 bytes")
    parser.add_argument("--rounds", type=int, metavar="COUNT", help="runs that a median is of")
    parser.add_argument(
        "--systems",
        type=some_systems,
        default=names,
        metavar="NAME,...",
        help=f"which of {','.join(names)}; a ratio is the first to each other",
    )
    parser.add_argument(
        "--only", default="", metavar="WORD", help="workloads with WORD in the name"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw them there: .svg or .png")
    return parser.parse_args()


def _measure_load(
    names: Sequence[str],
    workloads: Sequence[Workload],
    effort: Effort,
    rounds: int,
    directory: Path,
    results: Results,
) -> bool:
    """Fill in ``results.samples``; True if something could not be measured that should have been."""
    failed = False
    with ExitStack() as stack:
        systems: list[System] = []
        for system in (make() for make in SYSTEMS if make.name in names and workloads):
            if reason := system.missing():
                _say(f"{system.title} is left out: {reason}.")
                continue
            stack.callback(system.stop)
            try:
                _prepare(system, workloads, effort, directory)
            except (LoadError, ManagerError, OSError) as error:
                _say(f"{system.title} is left out: {error}")
                failed = True
                continue
            systems.append(system)
            results.titles[system.name] = system.title
            results.versions[system.name] = system.version()
        for number in range(1, rounds + 1):
            for workload in workloads:
                for system in systems:
                    try:
                        sample = system.measure(workload, effort.keys, effort.seconds)
                    except LoadError as error:
                        _say(f"{system.title}, {workload.title}: {error}")
                        failed = True
                        continue
                    results.samples.setdefault(Cell(workload, system.name), []).append(sample)
                    _say(f"round {number}: {system.title}, {workload.title}: {sample.rps:,.0f} /s")
    return failed


def _prepare(
    system: System, workloads: Sequence[Workload], effort: Effort, directory: Path
) -> None:
    _say(f"{system.title} starts and is filled with {effort.keys:,} keys of each size")
    system.start(directory / system.name)
    for workload in {w.key_prefix: w for w in workloads}.values():
        system.fill(workload, effort.keys)


def _measure_failovers(effort: Effort, directory: Path, results: Results) -> bool:
    try:
        results.failovers_s += measure_failovers(directory / FAILOVER, effort.kills, _say)
    except (LoadError, ManagerError, OSError) as error:
        _say(f"{FAILOVER}: {error}")
        return True
    return False


def _say(text: str) -> None:
    """Progress goes to stderr, so that stdout holds the table alone."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
