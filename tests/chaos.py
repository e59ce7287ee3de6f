"""Real processes under load while everything fails around them; what their clients saw is judged.

    python -m tests.chaos --class kill --seconds 60      # or: all, several names; --list
    python -m tests.chaos --class kill -- --replication async    # must fail: that promises less

Rule 1: a pass is a run in which enough was done of everything, enough failed, and every history
has an explanation. Too little traffic, in all or of one kind, no fault, faults that mostly came to
nothing, or a history that nobody could decide make a run *invalid*: exit status 2, not 0.
Rule 2: in the end everything is healed, and then all nodes must have the same state, every
acknowledged write must be there, and no node may hold more than when it started. Nor may there be no
answer for longer than what failed explains.
Rule 3: a run that fails keeps its histories and the nodes' directories and logs, and says where.

Clients and their verdicts are in ``chaos_workloads.py``, classes of faults in ``chaos_classes.py``,
links in ``chaos_links.py``, the checkers in ``linearizability.py``.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import re
import secrets
import signal
import statistics
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from kv_errors import BusyError, NoPrimaryError
from tests.chaos_classes import CLASSES
from tests.chaos_links import Network
from tests.chaos_stage import CannotTestError, ChaosCluster, FaultClass, Rounds, Stage, repeat
from tests.chaos_workloads import Load, Notes
from tests.cluster import eventually
from tests.linearizability import to_json

# Less than this many answers a second, over the whole run, proves nothing.
OPERATIONS_PER_S_MIN: Final = 40
# A run goes on this long before the first fault, and after the last.
QUIET_S: Final = 1.0
LOOK_S: Final = 0.02
# Around the moment when a new primary is first seen: the pause that its election was for clients.
FAILOVER_WINDOW_S: Final = 0.5
# Files of the log, connections that are just ending.
HANDLES_MORE_MAX: Final = 12
THREADS_MORE_MAX: Final = 6

EXIT_FAILED: Final = 1
EXIT_INVALID: Final = 2
EXIT_INTERRUPTED: Final = 128 + signal.SIGINT
INTERRUPTED: Final = "interrupted"

# What a node says when others fail, not itself.
ALWAYS_EXPECTED: Final = ("refused by the peer", "was removed from the cluster")
# Whatever fails, there may be no primary for a while, or too much may wait for it.
ALWAYS_REFUSED: Final = (NoPrimaryError.code, BusyError.code)
_TROUBLE: Final = re.compile(r" (?:ERROR|CRITICAL) |^Traceback|Exception ignored")


@dataclass
class Result:
    """One run of one class."""

    name: str
    seed: int
    seconds: float = 0.0
    rounds: Rounds = field(default_factory=Rounds)
    counts: dict[str, int] = field(default_factory=dict)
    failovers_s: list[float] = field(default_factory=list)
    longest_s: float = 0.0
    problems: list[str] = field(default_factory=list)  # the store is wrong
    doubts: list[str] = field(default_factory=list)  # the run proves nothing
    kept: Path | None = None

    @property
    def verdict(self) -> str:
        return "FAILED" if self.problems else "INVALID" if self.doubts else "passed"

    @property
    def exit_status(self) -> int:
        return EXIT_FAILED if self.problems else EXIT_INVALID if self.doubts else 0


class Watch:
    """Asks every node who leads, all the time: when each term's primary was first seen."""

    def __init__(self, cluster: ChaosCluster) -> None:
        self._cluster = cluster
        self._stop = threading.Event()
        self.primaries: dict[int, dict[str, float]] = {}  # by term: who, and when first seen
        self._threads = [
            threading.Thread(target=self._look, args=(node_id,), name=f"watch-{node_id}")
            for node_id in cluster.node_ids
        ]

    def _look(self, node_id: str) -> None:
        while not self._stop.wait(LOOK_S):
            status = self._cluster.status(node_id)
            if status and status["role"] == "PRIMARY":
                seen = self.primaries.setdefault(int(str(status["term"])), {})
                seen.setdefault(str(status["node_id"]), time.monotonic())

    def problems(self) -> list[str]:
        """Terms with two primaries (invariant I1)."""
        twice = {term: seen for term, seen in self.primaries.items() if len(seen) > 1}
        return [f"term {term} had the primaries {sorted(seen)}" for term, seen in twice.items()]

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def pauses(answered: Sequence[float], began: float, ended: float) -> list[tuple[float, float]]:
    """The spans of time without any answer, from one answer to the next."""
    moments = [began, *sorted(at for at in answered if began < at < ended), ended]
    return list(itertools.pairwise(moments))


def failovers(spans: Sequence[tuple[float, float]], watch: Watch, began: float) -> list[float]:
    """Seconds without an answer around each change of primary."""
    seen = sorted(min(nodes.values()) for nodes in watch.primaries.values())
    longest = []
    for moment in (at for at in seen[1:] if at > began):
        near = [
            end - start
            for start, end in spans
            if start <= moment + FAILOVER_WINDOW_S and end >= moment - FAILOVER_WINDOW_S
        ]
        longest.append(max(near, default=0.0))
    return longest


# ---- What nodes hold and say -------------------------------------------------------------------


def holdings(cluster: ChaosCluster) -> dict[str, tuple[int, int]]:
    """Descriptors and threads of each node."""
    found = {}
    for node_id in cluster.node_ids:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process := cluster.process(node_id):
                found[node_id] = process.num_fds(), process.num_threads()
    return found


def leftovers(cluster: ChaosCluster, before: dict[str, tuple[int, int]]) -> list[str]:
    """Nodes that hold more than any did before the load, though the clients have gone."""
    handles_max = max(handles for handles, _ in before.values()) + HANDLES_MORE_MAX
    threads_max = max(threads for _, threads in before.values()) + THREADS_MORE_MAX

    def too_much() -> list[str]:
        return [
            f"{node_id} holds {handles} descriptors (at most {handles_max} expected) and "
            f"{threads} threads ({threads_max})"
            for node_id, (handles, threads) in holdings(cluster).items()
            if handles > handles_max or threads > threads_max
        ]

    with contextlib.suppress(AssertionError):
        eventually(lambda: not too_much(), "nodes let go of what clients used")
    return too_much()


def trouble_in_logs(cluster: ChaosCluster, expected: Sequence[str]) -> list[str]:
    """Errors and tracebacks in the nodes' logs, but for those that the faults ask for."""
    found = []
    for path in sorted(cluster.manager.data_dir.glob("*.log")):
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
            if _TROUBLE.search(line) and not any(
                word in line for word in (*ALWAYS_EXPECTED, *expected)
            ):
                found.append(f"{path.name}:{number}: {line}")
    return found


def wrong_refusals(notes: Notes, fault: FaultClass) -> list[str]:
    """Errors that clients were told, though nothing that failed can be a cause of them."""
    return [
        f"a client was told {code}, which these faults can't cause: {text}"
        for code, text in notes.refusals.items()
        if code not in (*ALWAYS_REFUSED, *fault.refusals)
    ]


# ---- One run -----------------------------------------------------------------------------------


def run(
    fault: FaultClass,
    seconds: float,
    seed: int,
    *,
    server_args: Sequence[str] = (),
    server_script: Path | None = None,
) -> Result:
    """Run one class for so long, heal, and judge. Nothing is left running."""
    result = Result(fault.name, seed)
    network = Network(seed)
    cluster = ChaosCluster(
        network,
        *fault.server_args,
        *server_args,
        nodes=fault.nodes,
        server_script=server_script or fault.server_script,
    )
    notes = Notes()
    stage = Stage(cluster, network, seed, until=0.0)
    try:
        if fault.loses_power:
            cluster.record_writes()
        cluster.heal()
        _run(fault, seconds, stage, notes, result)
    except CannotTestError as error:
        result.doubts.append(str(error))
    except KeyboardInterrupt:
        result.doubts.append(INTERRUPTED)
    except Exception as error:  # noqa: BLE001 - whatever it is, this run is no pass
        result.problems.append("".join(traceback.format_exception(error)))
    finally:
        network.heal()
        if result.exit_status:
            result.kept = keep(cluster, notes, stage, result)
        stop(cluster, remove=not result.exit_status)
        network.close()
    return result


def _run(fault: FaultClass, seconds: float, stage: Stage, notes: Notes, result: Result) -> None:
    cluster = stage.cluster
    before = holdings(cluster)
    load = Load(cluster.manager.addresses, notes, result.seed)
    with Watch(cluster) as watch:
        with load:
            time.sleep(QUIET_S)
            began = time.monotonic()
            stage.until = began + seconds
            result.rounds = repeat(fault, stage)
            ended = time.monotonic()
            time.sleep(QUIET_S)
        cluster.heal()
        cluster.in_step()
    with cluster.client() as final:
        problems = load.check(final)
    result.seconds = ended - began
    result.counts = notes.counts
    spans = pauses(notes.answered, began, ended)
    result.longest_s = max(end - start for start, end in spans)
    result.failovers_s = failovers(spans, watch, began)
    result.doubts = [p for p in problems if "undecided:" in p]
    result.problems += [p for p in problems if "undecided:" not in p]
    result.problems += watch.problems()
    result.problems += leftovers(cluster, before)
    result.problems += trouble_in_logs(cluster, fault.expected)
    result.problems += wrong_refusals(notes, fault)
    if result.longest_s > fault.pause_s_max:
        result.problems.append(
            f"nobody had an answer for {result.longest_s:.1f} s; {fault.pause_s_max:g} s are the most"
        )
    if notes.counts["ok"] < OPERATIONS_PER_S_MIN * result.seconds:
        result.doubts.append(f"too little traffic: {notes.counts}")
    result.doubts += load.lacking(result.seconds)
    result.doubts += result.rounds.doubts()


def keep(cluster: ChaosCluster, notes: Notes, stage: Stage, result: Result) -> Path:
    """Write down what happened beside the nodes' logs; where that is."""
    lines = (to_json(operation) for operation in notes.operations)
    (cluster.directory / "history.jsonl").write_text("".join(f"{line}\n" for line in lines))
    faults = (f"{at:.6f} {what}\n" for at, what in stage.told)
    (cluster.directory / "faults.txt").write_text("".join(faults))
    told = "\n".join([*result.problems, *result.doubts])
    (cluster.directory / "verdict.txt").write_text(f"{result.name} seed={result.seed}\n{told}\n")
    return cluster.directory


def stop(cluster: ChaosCluster, *, remove: bool) -> None:
    """Kill all nodes; without ``remove`` the directory stays."""
    if remove:
        cluster.close()
        return
    for node_id in cluster.node_ids:
        if cluster.process(node_id) is not None:
            cluster.manager.kill_node(node_id)


# ---- Command line ------------------------------------------------------------------------------

HEADINGS: Final = (
    *("class", "rounds", "ok", "definite", "unknown", "failovers"),
    *("failover, median", "longest", "longest pause", "verdict"),
)


def row(result: Result) -> list[str]:
    """The cells of the table, as in ``HEADINGS``."""
    times = result.failovers_s
    return [
        result.name,
        str(result.rounds.done.total()),
        *(f"{result.counts.get(name, 0):,}" for name in ("ok", "definite", "unknown")),
        str(len(times)),
        f"{statistics.median(times):.2f} s" if times else "-",
        f"{max(times):.2f} s" if times else "-",
        f"{result.longest_s:.2f} s",
        result.verdict,
    ]


def table(results: Sequence[Result]) -> str:
    """The results as a table in Markdown."""
    lines = [HEADINGS, ["---"] + ["--:"] * (len(HEADINGS) - 2) + ["---"], *map(row, results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def described(fault: FaultClass) -> str:
    """A line a round: what fails in it."""
    texts = [(one.__doc__ or one.__name__).partition("\n")[0] for one in fault.rounds]
    return "\n".join([f"{fault.name}:", *(f"  {text}" for text in texts)])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    names = ", ".join(fault.name for fault in CLASSES)
    parser.add_argument(
        "--class", dest="names", default="all", help=f"names with commas between, or all: {names}"
    )
    parser.add_argument("--list", action="store_true", help="what each class does, and no more")
    parser.add_argument("--seconds", type=float, default=60.0, help="for each class")
    parser.add_argument("--seed", type=int, help="of what fails when; the rest is up to chance")
    parser.add_argument("server_args", nargs="*", help="given to the nodes, after --")
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the classes; the exit status of the worst."""
    parser = _parser()
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(map(described, CLASSES)))
        return 0
    wanted = [name.strip() for name in options.names.split(",")]
    known = {fault.name: fault for fault in CLASSES}
    if unknown := [name for name in wanted if name not in known and name != "all"]:
        parser.error(f"there is no class {', '.join(unknown)}")
    seed = secrets.randbelow(10**6) if options.seed is None else options.seed
    results = []
    for fault in CLASSES if "all" in wanted else [known[name] for name in wanted]:
        print(f"{fault.name}: {options.seconds:g} s, seed {seed} ...", flush=True)
        result = run(fault, options.seconds, seed, server_args=options.server_args)
        results.append(result)
        print(f"  {' | '.join(row(result)[1:])}", flush=True)
        print(f"  {result.rounds}")
        for text in (*result.problems, *result.doubts):
            print(f"  {text}")
        if result.kept:
            print(f"  everything about it is kept in {result.kept}")
        if INTERRUPTED in result.doubts:
            return EXIT_INTERRUPTED
    print(table(results))
    statuses = {result.exit_status for result in results}
    return next((s for s in (EXIT_FAILED, EXIT_INVALID) if s in statuses), 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
