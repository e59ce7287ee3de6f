"""Many long histories of the simulation, spread over the cores: ``make sim``.

Rule 1: it prints how far it is, then what happened how often, and what of the core was never taken.
Rule 2: it goes on after a failure, and ends with the commands that replay each; the exit status is 1.
Rule 3: tracing which lines are taken makes a history take four times as long, so only the first ones
are traced, each in a process in which tracing begins before the core is imported.

``python -m tests.sim_batch --seeds 1000 --steps 20000``
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import coverage
from rich.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
CORE = ["raft_core.py", "raft_members.py", "raft_progress.py", "raft_log.py"]
TRACED_CHUNK = 5  # seeds that a process traces

# What can't be taken unless the driver or the core is wrong, with the reason.
UNREACHABLE = [
    r'raise TypeError\(f"not a message for the core',  # the driver takes HashReports out
    # Of the log: the core asks for no entry that it does not hold.
    "if not self.first_index - 1 <= index <= self.last_index:",
    # A disk that forgets what it synced: nobody survives that; test_raft_core.py has it noticed.
    r"self\._followers\.note_loss",
    "def note_loss|def troubles|def _loss",
    # What no server that keeps to the protocol sends; test_raft_core.py makes it up.
    "if self.leader_id not in .None, sender.:|if message.prev_index >= base and",
    "if entry.index <= self.commit_index:|if message.match_index > self.log.last_index or",
]


def _data(directory: str, suffix: str | None = None) -> coverage.Coverage:
    files = [str(ROOT / name) for name in CORE]
    measured = coverage.Coverage(
        data_file=f"{directory}/taken", data_suffix=suffix, branch=True, include=files
    )
    for pattern in UNREACHABLE:
        measured.exclude(pattern)
    return measured


def _run(seed: int, steps: int) -> tuple[Counter[str], str]:
    """What happened, and what failed or was invalid."""
    from tests.sim_invariants import InvalidRunError, ViolationError
    from tests.simulator import run

    try:
        return run(seed, steps=steps), ""
    except ViolationError as failure:
        return Counter(), str(failure)
    except InvalidRunError as invalid:
        return Counter(), f"invalid: {invalid}"


def _run_one(task: tuple[int, int]) -> tuple[int, Counter[str], list[str]]:
    counts, failure = _run(*task)
    return 1, counts, [failure] if failure else []


def _run_traced(task: tuple[list[int], int, str]) -> tuple[int, Counter[str], list[str]]:
    """In a process of its own."""
    seeds, steps, directory = task
    measured = _data(directory, suffix=f"{seeds[0]}")
    measured.start()
    counts: Counter[str] = Counter()
    failures = []
    for seed in seeds:
        happened, failure = _run(seed, steps)
        counts += happened
        failures += [failure] if failure else []
    measured.stop()
    measured.save()
    return len(seeds), counts, failures


def _results(
    args: argparse.Namespace, directory: str
) -> Iterator[tuple[int, Counter[str], list[str]]]:
    context = multiprocessing.get_context("spawn")
    seeds = [*range(args.first_seed, args.first_seed + args.seeds)]
    traced, others = seeds[: args.traced], seeds[args.traced :]
    chunks = [traced[i : i + TRACED_CHUNK] for i in range(0, len(traced), TRACED_CHUNK)]
    with context.Pool(args.jobs, maxtasksperchild=1) as pool:
        tasks = [(chunk, args.steps, directory) for chunk in chunks]
        yield from pool.imap_unordered(_run_traced, tasks)
    with context.Pool(args.jobs) as pool:
        yield from pool.imap_unordered(_run_one, [(seed, args.steps) for seed in others])


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Many histories of the simulated cluster.")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=20_000, help="how long each storm lasts")
    parser.add_argument("--traced", type=int, default=100, help="seeds that count for coverage")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    return parser.parse_args()


def main() -> int:
    """Run them all; 1 if one fails, or the core's coverage is not whole."""
    args = _parsed()
    began = time.monotonic()
    counts: Counter[str] = Counter()
    failures: list[str] = []
    ended = 0
    with tempfile.TemporaryDirectory(prefix="sim-") as directory:
        with Progress() as progress:
            bar = progress.add_task(f"{args.seeds} seeds x {args.steps} steps", total=args.seeds)
            for done, happened, failed in _results(args, directory):
                counts += happened
                for failure in failed:
                    progress.console.print(failure, markup=False, highlight=False)
                failures += failed
                progress.advance(bar, done)
                ended += done
                if not progress.console.is_terminal and ended % 50 < done:
                    sys.stdout.write(f"{ended} of {args.seeds} seeds\n")
                    sys.stdout.flush()
        for what, times in sorted(counts.items()):
            sys.stdout.write(f"{times:12,d} {what}\n")
        percent = 100.0
        if args.traced:
            measured = _data(directory)
            measured.combine([directory])
            percent = measured.report(show_missing=True)
    verdict = f"{len(failures)} of {args.seeds} seeds failed or were invalid"
    sys.stdout.write(f"{verdict}, in {time.monotonic() - began:.0f} s\n")
    for failure in failures:
        sys.stdout.write(f"{failure}\n")
    return 1 if failures or percent < 100 else 0


if __name__ == "__main__":
    sys.exit(main())
