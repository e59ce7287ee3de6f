"""The checkers themselves: what is right is accepted, what is wrong rejected, what takes too long
neither."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.linearizability import (
    Kind,
    ListRead,
    Operation,
    Outcome,
    Value,
    by_key,
    check_bank,
    check_counter,
    check_register,
    check_registers,
    check_set_full,
    from_json,
    to_json,
)


def op(kind: Kind, start: float, end: float | None, argument: Value = None, **more) -> Operation:
    """One operation on the key k, each by a client of its own."""
    return Operation(0, kind, "k", start, end, argument, **more)


def read(start: float, end: float, result: Value, **more) -> Operation:
    return op(Kind.READ, start, end, result=result, **more)


def write(start: float, end: float | None, value: Value, **more) -> Operation:
    return op(Kind.WRITE, start, end, value, **more)


def cas(start: float, end: float | None, old: Value, new: Value, done: bool = True) -> Operation:
    return op(Kind.CAS, start, end, new, expected=old, result=done)


def failed_cas(start: float, end: float, compared: int, told: int | None = None) -> Operation:
    """A compare-and-set that is told that the version is not ``compared``."""
    return op(Kind.CAS, start, end, 9, expected_version=compared, result=False, version=told)


def delete(start: float, end: float | None, existed: bool = True) -> Operation:
    return op(Kind.DELETE, start, end, result=existed)


def increment(start: float, end: float | None, result: int | None = None) -> Operation:
    return op(Kind.INCREMENT, start, end, result=result)


# ---- Registers ---------------------------------------------------------------------------------

GOOD = {
    "nothing happened": [],
    "absent at first": [read(0, 1, None)],
    "what was written": [write(0, 1, 1), read(2, 3, 1)],
    "old or new while it is written": [
        write(0, 1, 1),
        write(2, 6, 2),
        read(3, 4, 1),
        read(4.5, 5, 2),
    ],
    "two writes at once in either order": [write(0, 3, 1), write(1, 2, 2), read(4, 5, 1)],
    "a value written again": [
        write(0, 1, 1),
        write(2, 9, 1),
        write(2, 9, 2),
        read(3, 4, 2),
        read(5, 6, 1),
    ],
    "unknown, and seen at once": [write(0, None, 1), read(1, 2, 1)],
    "unknown, and seen late": [write(0, None, 1), read(1, 2, None), read(3, 4, 1)],
    "unknown, and never done": [write(0, None, 1), read(1, 2, None)],
    "unknown, over a later one": [write(0, None, 1), write(1, 2, 2), read(3, 4, 2), read(5, 6, 1)],
    "compared and set": [write(0, 1, 1), cas(2, 3, 1, 2), read(4, 5, 2)],
    "one of two winners": [write(0, 1, 1), cas(2, 5, 1, 2), cas(3, 4, 1, 3, done=False)],
    "unknown swap that was done": [write(0, 1, 1), cas(2, None, 1, 2), read(3, 4, 2)],
    "unknown swap that was not": [write(0, 1, 1), cas(2, None, 1, 2), read(3, 4, 1)],
    "set where there was nothing": [cas(0, 1, None, 1), cas(2, 3, None, 2, done=False)],
    "deleted": [write(0, 1, 1), delete(2, 3), read(4, 5, None), delete(6, 7, existed=False)],
    "unknown deletion, late": [write(0, 1, 1), delete(2, None), read(3, 4, 1), read(5, 6, None)],
    "versions": [write(0, 3, 1, version=7), write(1, 2, 2, version=9), read(4, 5, 2, version=9)],
    "version of an unknown write": [write(0, None, 1), read(1, 2, 1, version=5)],
    "swap of a version": [
        write(0, 1, 1, version=4),
        op(Kind.CAS, 2, 3, 2, expected_version=4, result=True, version=5),
        op(Kind.CAS, 4, 5, 3, expected_version=4, result=False, version=5),
        read(6, 7, 2, version=5),
    ],
    "swap of version 0": [op(Kind.CAS, 0, 1, 2, expected_version=0, result=True, version=5)],
    "no swap, and the version is told": [write(0, 1, 1), failed_cas(2, 3, 4, told=5)],
    "no swap, and the version is told later": [
        write(0, 1, 1),
        failed_cas(2, 3, 4),
        failed_cas(4, 5, 6),
        read(6, 7, 1, version=5),
    ],
    "no swap, and the same version of a later write": [
        write(0, 1, 1),
        failed_cas(2, 3, 4),
        write(4, 5, 2),
        read(6, 7, 2, version=4),
    ],
}

BAD = {
    "stale read": [write(0, 1, 1), write(2, 3, 2), read(4, 5, 1)],
    "lost write": [write(0, 1, 1), read(2, 3, None)],
    "a value never written": [write(0, 1, 1), read(2, 3, 9)],
    "a value of the future": [read(0, 1, 1), write(2, 3, 1)],
    "read back and forth": [
        write(0, 1, 1),
        write(2, 9, 2),
        read(3, 4, 2),
        read(5, 6, 1),
    ],
    "swap done twice": [write(0, 1, 1), cas(2, 3, 1, 2), write(4, 5, 1), read(6, 7, 2)],
    "two winners of one swap": [write(0, 1, 1), cas(2, 5, 1, 2), cas(3, 4, 1, 3)],
    "a swap that should have been": [write(0, 1, 1), cas(2, 3, 1, 2, done=False)],
    "a swap that should not have been": [write(0, 1, 1), cas(2, 3, 5, 2)],
    "update lost after an unknown one": [
        write(0, 1, 1),
        cas(2, None, 1, 2),
        read(3, 4, 2),
        read(5, 6, 1),
    ],
    "unknown, done twice": [
        write(0, None, 1),
        read(1, 2, 1),
        write(3, 4, 2),
        read(5, 6, 1),
    ],
    "unknown, before its call": [read(0, 1, 1), write(2, None, 1)],
    "deleted twice": [write(0, 1, 1), delete(2, 3), delete(4, 5)],
    "deletion lost": [write(0, 1, 1), delete(2, 3), read(4, 5, 1)],
    "a deletion that found nothing": [write(0, 1, 1), delete(2, 3, existed=False)],
    "two read different orders": [
        write(0, 9, 1),
        write(0, 9, 2),
        read(1, 2, 1),
        read(3, 4, 2),
        read(5, 6, 1),
    ],
    "a version twice": [write(0, 3, 1, version=7), write(1, 2, 2, version=7)],
    "versions against time": [write(0, 1, 1, version=9), write(2, 3, 2, version=7)],
    "another's version": [write(0, 1, 1, version=9), read(2, 3, 1, version=8)],
    "swap of an old version": [
        write(0, 1, 1, version=4),
        write(2, 3, 2, version=5),
        op(Kind.CAS, 4, 5, 3, expected_version=4, result=True, version=6),
    ],
    "two winners of one version": [
        write(0, 1, 1, version=4),
        op(Kind.CAS, 2, 5, 2, expected_version=4, result=True),
        op(Kind.CAS, 3, 4, 3, expected_version=4, result=True),
    ],
    "no swap of the very version that it finds": [write(0, 1, 1), failed_cas(2, 3, 4, told=4)],
    "no swap of what is not there": [failed_cas(0, 1, 0, told=0)],
    "no swap of the version that a read finds": [
        write(0, 1, 1),
        failed_cas(2, 3, 4),
        read(4, 5, 1, version=4),
    ],
    "no swap, and then a swap of the same": [
        write(0, 1, 1),
        failed_cas(2, 3, 4),
        op(Kind.CAS, 4, 5, 2, expected_version=4, result=True, version=5),
    ],
}


@pytest.mark.parametrize("name", GOOD)
def test_register_when_an_order_explains_all_answers_then_is_accepted(name: str) -> None:
    assert check_register(GOOD[name]).outcome is Outcome.LINEARIZABLE


@pytest.mark.parametrize("name", BAD)
def test_register_when_no_order_explains_the_answers_then_is_rejected(name: str) -> None:
    verdict = check_register(BAD[name])

    assert verdict.outcome is Outcome.VIOLATION
    assert "impossible next" in verdict.reason


# Of one key each: written by hand, or (``...-async-...``) as clients of a store saw it that answers
# before it replicates, whose nodes were killed.
HISTORIES = sorted(Path(__file__).with_name("histories").glob("*.jsonl"))


@pytest.mark.parametrize("path", HISTORIES, ids=lambda path: path.stem)
def test_history_that_a_broken_store_produced_is_rejected(path: Path) -> None:
    """Whatever is made of the checkers: what they once caught they catch."""
    history = list(map(from_json, path.read_text().splitlines()))

    if path.name.startswith("counter"):
        assert check_counter(history)
    else:
        assert check_register(history).outcome is Outcome.VIOLATION


def test_register_when_the_search_is_given_up_then_it_is_no_pass() -> None:
    verdict = check_register(GOOD["old or new while it is written"], steps_max=3)

    assert verdict.outcome is Outcome.UNDECIDED


def test_registers_are_checked_key_by_key() -> None:
    history = [write(0, 1, 1), replace(read(2, 3, None), key="other")]

    verdicts = check_registers(history)

    assert {key: v.outcome for key, v in verdicts.items()} == {
        "k": Outcome.LINEARIZABLE,
        "other": Outcome.LINEARIZABLE,
    }
    assert by_key(history) == {"k": history[:1], "other": history[1:]}


def test_history_when_written_to_lines_comes_back_the_same() -> None:
    for operation in itertools.chain.from_iterable([*GOOD.values(), *BAD.values()]):
        assert from_json(to_json(operation)) == operation


# ---- Registers: against a simulation, and against every order there is -------------------------


def simulated(
    seed: int, clients: int, count: int, unknown: float, versions: bool
) -> list[Operation]:
    """A history of a register that is right: each operation takes effect between call and end.

    ``unknown`` is the share of operations whose answers are lost, half of them undone.
    """
    rng = random.Random(seed)
    value: Value = None
    version = 0
    # Moments of effect in order; each client's operations do not overlap.
    free_at = [rng.random() for _ in range(clients)]
    plan = []
    for number in range(count):
        client = rng.randrange(clients)
        called_at = free_at[client] + rng.expovariate(2.0)
        lost = rng.random() < unknown
        effect_at = called_at + rng.expovariate(0.2 if lost else 1.0)
        ended_at = effect_at + rng.expovariate(1.0)
        free_at[client] = called_at + 1.0 if lost else ended_at
        plan.append((effect_at, called_at, ended_at, client, lost, number))
    history = []
    for index, planned in enumerate(sorted(plan), start=1):
        _, called_at, ended_at, client, lost, number = planned
        kind = rng.choice([Kind.READ, Kind.READ, Kind.WRITE, Kind.CAS, Kind.DELETE])
        argument = number if kind in (Kind.WRITE, Kind.CAS) else None
        expected: Value = value if rng.random() < 0.6 else rng.randrange(count)
        swaps = kind is Kind.CAS and expected == value
        result: Value = {Kind.READ: value, Kind.CAS: swaps, Kind.DELETE: version != 0}.get(kind)
        if not lost or rng.random() < 0.5:
            if kind is Kind.WRITE or swaps:
                value, version = argument, index
            elif kind is Kind.DELETE:
                value, version = None, 0
        history.append(
            Operation(
                client,
                kind,
                "k",
                called_at,
                None if lost else ended_at,
                argument,
                None if lost else result,
                expected if kind is Kind.CAS else None,
                version=version if versions and version and not lost else None,
            )
        )
    return history


def corrupted(history: Sequence[Operation], rng: random.Random) -> list[Operation]:
    """The history with one read that answers what nobody wrote."""
    reads = [i for i, o in enumerate(history) if o.kind is Kind.READ and o.is_known]
    changed = list(history)
    if reads:
        position = rng.choice(reads)
        changed[position] = replace(changed[position], result=-1)
    return changed


def explained_by_some_order(history: Sequence[Operation]) -> bool:
    """The definition, tried out: every subset of the unknown, in every order that time allows."""
    known = [o for o in history if o.is_known]
    unknown = [o for o in history if not o.is_known and o.kind is not Kind.READ]
    for count in range(len(unknown) + 1):
        for chosen in itertools.combinations(unknown, count):
            if any(map(_explains, itertools.permutations([*known, *chosen]))):
                return True
    return False


@dataclass
class Written:
    """A value that was written (``version`` 0: that there is none), and what its version may be."""

    value: Value
    version: int | None = None  # None: not told
    others: set[int] = field(default_factory=set)  # that it is not

    def tells(self, version: int | None) -> bool:
        """Can its version be this? From now on it is."""
        if version is not None and self.version is None:
            self.version = version
        return version in (None, self.version)


def _explains(order: Sequence[Operation]) -> bool:
    for earlier, later in itertools.combinations(order, 2):
        if later.ended_at is not None and later.ended_at < earlier.called_at:
            return False
    states = [Written(None, 0)]
    if not all(_explained(one, states) for one in order):
        return False
    told = [s.version for s in states if s.value is not None and s.version is not None]
    return (
        all(0 < earlier < later for earlier, later in itertools.pairwise(told))
        and all(version > 0 for version in told)
        and not any(state.version in state.others for state in states)
    )


def _explained(one: Operation, states: list[Written]) -> bool:
    """Can the last of the states have led to this answer? What it wrote is added to them."""
    state, told = states[-1], one.version if one.is_known else None
    if one.kind is Kind.READ:
        return one.result == state.value and state.tells(told)
    if one.kind is Kind.DELETE:
        states.append(Written(None, 0))
        return not one.is_known or one.result == (state.value is not None)
    if one.kind is Kind.CAS:
        compared = one.expected_version
        if one.is_known and not one.result:
            if compared is not None:
                state.others.add(compared)
            return (compared is not None or one.expected != state.value) and state.tells(told)
        if not (state.tells(compared) if compared is not None else one.expected == state.value):
            return not one.is_known
    states.append(Written(one.argument, told))
    return True


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**9), versions=st.booleans(), clients=st.integers(1, 8))
def test_register_when_simulated_is_accepted_and_with_a_wrong_read_rejected(
    seed: int, versions: bool, clients: int
) -> None:
    history = simulated(seed, clients, count=120, unknown=0.03, versions=versions)
    wrong = corrupted(history, random.Random(seed))

    assert check_register(history).outcome is Outcome.LINEARIZABLE
    if wrong != history:
        assert check_register(wrong).outcome is Outcome.VIOLATION


@st.composite
def small_histories(draw: st.DrawFn) -> list[Operation]:
    """Up to five operations with answers drawn at random: a quarter of them can be explained.

    In half of the histories versions are told, and then by half of the operations.
    """
    history = []
    versions = draw(st.booleans())
    for number in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from([Kind.READ, Kind.WRITE, Kind.CAS, Kind.DELETE]))
        start = draw(st.integers(0, 6))
        lost = draw(st.integers(0, 4)) == 0
        value = st.sampled_from([None, 1, 2])
        version = st.sampled_from([None, None, None, 0, 1, 2] if versions else [None])
        written = draw(st.sampled_from([1, 2])) if kind in (Kind.WRITE, Kind.CAS) else None
        result: Value = draw(value) if kind is Kind.READ else draw(st.booleans())
        compared = draw(version) if kind is Kind.CAS else None
        history.append(
            Operation(
                number,
                kind,
                "k",
                start,
                None if lost else start + draw(st.integers(0, 4)),
                written,
                None if lost or kind is Kind.WRITE else result,
                draw(value) if kind is Kind.CAS and compared is None else None,
                compared,
                None if lost or kind is Kind.DELETE else draw(version),
            )
        )
    return history


@settings(max_examples=600, deadline=None)
@given(history=small_histories())
def test_register_verdict_is_the_one_of_trying_every_order(history: list[Operation]) -> None:
    expected = Outcome.LINEARIZABLE if explained_by_some_order(history) else Outcome.VIOLATION

    assert check_register(history).outcome is expected


# ---- Counters, lists, banks --------------------------------------------------------------------


def test_counter_when_counted_once_each_then_is_accepted() -> None:
    history = [
        read(0, 1, None),
        increment(1, 3, 2),
        increment(1, 4, 1),
        increment(5, None),
        read(6, 7, 2),
        read(8, 9, 3),
    ]

    assert check_counter(history) == []


@pytest.mark.parametrize(
    ("history", "word"),
    [
        ([increment(0, 1, 1), increment(2, 3, 1)], "answered 1"),
        ([increment(0, 1, 1), increment(2, 3, 2), read(4, 5, 1)], "not within"),
        ([increment(0, 1, 1), read(2, 3, 2)], "not within"),
        ([increment(0, 1, 2)], "not within"),
        ([increment(0, None), read(1, 2, 1), read(3, 4, 0)], "goes back"),
        ([increment(0, None), increment(0, None), read(1, 2, 2), read(3, 4, 1)], "goes back"),
        ([increment(0, None), read(1, 2, 2)], "not within"),
    ],
    ids=("one lost", "read too low", "twice", "too high", "back to 0", "back", "unknown twice"),
)
def test_counter_when_it_goes_wrong_then_is_rejected(history: list[Operation], word: str) -> None:
    assert any(word in problem for problem in check_counter(history))


def append(start: float, end: float | None, element: str) -> Operation:
    return op(Kind.APPEND, start, end, element)


def test_set_full_when_all_that_was_acknowledged_is_there_once_then_is_accepted() -> None:
    appends = [append(0, 1, "a"), append(0, None, "b"), append(2, 3, "c"), append(2, None, "d")]
    reads = [ListRead(0.5, 2.5, ("b",)), ListRead(4, 5, ("b", "a", "c"))]

    assert check_set_full(appends, reads) == []


@pytest.mark.parametrize(
    ("elements", "word"),
    [
        (("a",), "lost"),
        (("a", "b", "a"), "doubled"),
        (("a", "b", "x"), "made up"),
        (("a", "b", "later"), "made up"),
    ],
)
def test_set_full_when_the_list_is_wrong_then_is_rejected(
    elements: tuple[str, ...], word: str
) -> None:
    appends = [append(0, 1, "a"), append(1, 2, "b"), append(9, 10, "later")]

    assert any(word in problem for problem in check_set_full(appends, [ListRead(3, 4, elements)]))


def test_set_full_when_reads_disagree_or_go_back_then_is_rejected() -> None:
    appends = [append(0, None, "a"), append(0, None, "b")]

    swapped = [ListRead(1, 2, ("a", "b")), ListRead(3, 4, ("b", "a"))]
    shorter = [ListRead(1, 2, ("a", "b")), ListRead(3, 4, ("a",))]
    assert any("order" in problem for problem in check_set_full(appends, swapped))
    assert any("fewer" in problem for problem in check_set_full(appends, shorter))


def test_bank_when_money_appears_vanishes_or_is_owed_then_is_rejected() -> None:
    assert check_bank([(5, 5), (0, 10)], total=10) == []
    assert len(check_bank([(5, 6)], total=10)) == 1
    assert len(check_bank([(4, 5)], total=10)) == 1
    assert len(check_bank([(-1, 11)], total=10)) == 1
