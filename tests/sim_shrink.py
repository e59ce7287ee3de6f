"""The smallest history that still fails: fewest nodes, faults and steps.

Rule: a smaller history is another one, for what is left out draws no chance. So each try may fail
in another way than the first; what counts is that it fails. The same failure shrinks the same way.

Called by ``simulator.py --shrink``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Case(NamedTuple):
    """What a history is made from, besides its seed."""

    steps: int
    nodes: int | None
    without: frozenset[str]


Fails = Callable[[Case], int | None]  # at which step; None: it does not


def shrink(case: Case, kinds: list[str], fails: Fails, say: Callable[[str], None]) -> Case:
    """The smallest case found that fails. ``case`` does; ``kinds`` are what can be left out."""
    case = _with_fewer_steps(case, fails, say)
    for nodes in (1, 2, 3):
        smaller = case._replace(nodes=nodes)
        if case.nodes != nodes and fails(smaller) is not None:
            say(f"fails with {nodes} nodes")
            case = smaller
            break
    again = True
    while again:  # what could not be left out may be once something else is
        again = False
        for kind in kinds:
            smaller = case._replace(without=case.without | {kind})
            if kind not in case.without and fails(smaller) is not None:
                say(f"fails without {kind}")
                case, again = smaller, True
        case = _with_fewer_steps(case, fails, say)
    return case


def _with_fewer_steps(case: Case, fails: Fails, say: Callable[[str], None]) -> Case:
    """The shortest storm, first as long as until the failure, then half of it, and so on."""
    failed_at = fails(case)
    assert failed_at is not None
    least, steps = 0, min(case.steps, failed_at)
    if steps < case.steps and fails(case._replace(steps=steps)) is None:
        return case
    while steps - least > 10:
        middle = (least + steps) // 2
        if fails(case._replace(steps=middle)) is None:
            least = middle
        else:
            steps = middle
    if steps < case.steps:
        say(f"fails with {steps} steps")
    return case._replace(steps=steps)
