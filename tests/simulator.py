"""The whole node in a made-up world, run by itself: one seed, one history, printed and checked.

``python tests/simulator.py --seed 7`` prints the history of seed 7, one event a line;
``python tests/simulator.py --seed 7 --steps 20000 --nodes 5`` a longer one, of five founders;
``python tests/simulator.py --seed 0 --count 100`` runs a hundred quietly, and prints what happened;
``python tests/simulator.py --seed 7 --shrink`` finds the smallest history of seed 7 that still fails.

What a history is made of: ``sim_cluster.py``. What is checked: ``sim_invariants.py`` and
``sim_clients.py``. The legend is in docs/TESTING_GUIDE.md.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

if __name__ == "__main__":  # as a script, its own folder is where Python would look
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tests.sim_cluster import KINDS, STEPS, Simulation
from tests.sim_invariants import InvalidRunError, ViolationError
from tests.sim_shrink import Case, shrink

# Of a history's steps, one that a client's answer must come of; usual are five times as many.
STEPS_AN_ANSWER = 400


# What a mutant that is itself broken dies of. An assertion is what a cluster dies of.
BROKEN = (AttributeError, ImportError, KeyError, NameError, SyntaxError, TypeError)


def command(seed: int, steps: int, nodes: int | None, without: Collection[str]) -> str:
    """What replays a history."""
    words = f"python tests/simulator.py --seed {seed} --steps {steps}"
    words += f" --nodes {nodes}" if nodes is not None else ""
    return words + (f" --without {','.join(sorted(without))}" if without else "")


def run(
    seed: int,
    trace: Callable[[str], None] | None = None,
    *,
    steps: int = STEPS,
    nodes: int | None = None,
    without: Collection[str] = (),
) -> Counter[str]:
    """Run one history; what happened, counted. Raises ViolationError that tells how to replay,
    or InvalidRunError where clients had so few answers that the run can't be called a passed one.

    ``steps``: of its storm; ``nodes``: founders, else as chance will; ``without``: what is left out.
    """
    simulation = Simulation(seed, trace, nodes=nodes, without=without)
    try:
        happened = simulation.run(steps)
    except Exception as error:  # whatever a node would die of
        failure = ViolationError(
            f"seed={seed} step={simulation.steps} time={simulation.now:.2f}: "
            f"{type(error).__name__} {error}\n"
            f"replay: {command(seed, steps, nodes, without)}"
        )
        failure.step = simulation.steps
        raise failure from error
    if happened["answers"] < steps // STEPS_AN_ANSWER:
        raise InvalidRunError(
            f"seed={seed}: {happened['answers']} answers in {steps} steps are too few\n"
            f"replay: {command(seed, steps, nodes, without)}"
        )
    return happened


def first_violation(seeds: Iterable[int]) -> tuple[int, ViolationError | None]:
    """How many of the histories it took until one failed, and how; None: none did."""
    count = 0
    for count, seed in enumerate(seeds, 1):
        try:
            run(seed)
        except ViolationError as violation:
            return count, violation
        except InvalidRunError:
            continue
    return count, None


def _failure(seed: int, case: Case) -> ViolationError | None:
    steps, nodes, without = case
    try:
        run(seed, steps=steps, nodes=nodes, without=without)
    except ViolationError as failure:
        return failure
    except InvalidRunError:
        return None
    return None


def shrunk(seed: int, case: Case, say: Callable[[str], None]) -> Case:
    """The smallest case that still fails; ``case`` does."""

    def fails(smaller: Case) -> int | None:
        failure = _failure(seed, smaller)
        return None if failure is None else failure.step

    return shrink(case, [*KINDS], fails, say)


def _print(line: str) -> None:
    sys.stdout.write(line + "\n")


def _steps(text: str) -> int:
    steps = int(text)
    if steps < 1:
        raise argparse.ArgumentTypeError("a history has one step at least")
    return steps


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="A cluster in a made-up world.")
    parser.add_argument("--seed", type=int, required=True, help="the history, or the first one")
    parser.add_argument("--count", type=int, help="run that many, and print only the sums")
    parser.add_argument("--steps", type=_steps, default=STEPS, help="how long the storms last")
    parser.add_argument("--nodes", type=int, choices=range(1, 8), help="founders of the cluster")
    parser.add_argument("--without", default="", help=f"leave out, of {','.join(KINDS)}")
    parser.add_argument("--shrink", action="store_true", help="find the smallest failing history")
    return parser.parse_args()


def main() -> int:
    """Print one history, or run many; 1 if one fails, 2 if one is invalid."""
    args = _parsed()
    without = frozenset(args.without.split(",") if args.without else ())
    if without - set(KINDS):
        _print(f"nothing is called {','.join(sorted(without - set(KINDS)))}")
        return 2
    steps, nodes = args.steps, args.nodes
    trace = _print if args.count is None and not args.shrink else None
    happened: Counter[str] = Counter()
    try:
        for seed in range(args.seed, args.seed + (args.count or 1)):
            happened += run(seed, trace, steps=steps, nodes=nodes, without=without)
    except ViolationError as error:
        _print(str(error))
        if args.shrink:
            case = shrunk(seed, Case(steps, nodes, without), _print)
            _print("shrunk, and fails so:")
            _print(str(_failure(seed, case)))
        return 1
    except InvalidRunError as error:
        _print(f"invalid: {error}")
        return 2
    for what, times in sorted(happened.items()):
        _print(f"{times:8d} {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
