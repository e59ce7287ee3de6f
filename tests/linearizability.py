"""Did the clients of a store see one register a key, a counter, a list, a bank? Pure functions over histories.

Rule 1: an unknown outcome stays unknown: such an operation may take effect at any time after its
call, or never. An operation that ended in a definite error does not belong into a history: it was
never done, and if what it wrote is read all the same, that is a value nobody wrote.
Rule 2: only ``LINEARIZABLE`` is a pass. A search that was given up is ``UNDECIDED``.
Rule 3: nothing here knows a socket, a clock or a thread; a history in, a verdict out.

Registers are searched as by Wing and Gong, with the memory of Lowe ("Testing for linearizability",
2017), one key at a time, which is enough: linearizability is local (Herlihy and Wing 1990). Fast up
to 8 clients and 200 operations a key; use many keys, and write every value once. Known versions make
the search short, since they say in which order writes took effect.
"""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from itertools import pairwise
from typing import Final

# About ten seconds of one core and a few hundred MB, for what would take for ever.
STEPS_MAX: Final = 1_000_000

Value = str | int | None  # None: there is no such key


class Kind(StrEnum):
    READ = "read"
    WRITE = "write"
    CAS = "cas"
    DELETE = "delete"
    INCREMENT = "increment"  # by 1
    APPEND = "append"


@dataclass(frozen=True, slots=True)
class Operation:
    """A call of a client and what it was told. Times are seconds of one clock for all clients."""

    client: int
    kind: Kind
    key: str
    called_at: float
    ended_at: float | None  # None: the outcome is unknown
    argument: Value = None  # what is written, compared-and-set or appended
    # READ: the value. CAS: was it swapped? DELETE: was there a value? INCREMENT: the new value.
    result: Value = None
    # A compare-and-set compares the value or the version (0: no such key), whichever is given.
    expected: Value = None
    expected_version: int | None = None
    # Of the value that was written, read, or found by a compare-and-set that failed, where told.
    version: int | None = None

    @property
    def is_known(self) -> bool:
        return self.ended_at is not None

    def __str__(self) -> str:
        times = f"{self.called_at:.6f}..{'?' if self.ended_at is None else f'{self.ended_at:.6f}'}"
        names = ("argument", "expected", "expected_version", "result", "version")
        told = {name: getattr(self, name) for name in names}
        words = [f"{name}={value!r}" for name, value in told.items() if value is not None]
        return " ".join([f"client {self.client}", times, self.kind, self.key, *words])


def to_json(operation: Operation) -> str:
    """One line of a history file."""
    return json.dumps(asdict(operation))


def from_json(line: str) -> Operation:
    """The operation of one line of a history file."""
    fields = json.loads(line)
    return Operation(**{**fields, "kind": Kind(fields["kind"])})


class Outcome(StrEnum):
    LINEARIZABLE = "linearizable"
    VIOLATION = "violation"
    UNDECIDED = "undecided"  # given up: no pass, and no failure of the store


@dataclass(frozen=True, slots=True)
class Verdict:
    outcome: Outcome
    steps: int
    reason: str = ""


# ---- Registers ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Register:
    """The one key's state, as far as the operations before it tell."""

    value: Value = None
    version: int | None = 0  # None: not told yet; 0: there is no such key
    floor: int = 0  # the highest version told so far
    others: frozenset[int] = frozenset()  # that a version which is not told yet cannot be

    @property
    def exists(self) -> bool:
        return self.version != 0


class _Model:
    """What each operation does to the register; knows which versions the whole history tells."""

    def __init__(self, operations: Sequence[Operation]) -> None:
        # Versions of writes in the order in which they took effect: they increase.
        self._told = sorted(
            o.version for o in operations if o.version is not None and _writes(o) and o.is_known
        )

    def step(self, state: _Register, operation: Operation) -> _Register | None:
        """The state after ``operation``; None if it cannot have answered so in this state."""
        match operation.kind:
            case Kind.READ:
                if operation.result != state.value:
                    return None
                return self._seen(state, operation.version)
            case Kind.WRITE:
                return self._written(state, operation)
            case Kind.CAS:
                return self._compared(state, operation)
            case Kind.DELETE:
                return self._deleted(state, operation)
            case _:
                raise ValueError(f"no operation of a register: {operation}")

    def _seen(self, state: _Register, version: int | None) -> _Register | None:
        """The state, now that its version is told."""
        if version is None or version == state.version:
            return state
        if state.version is not None or version <= state.floor or version in state.others:
            return None
        if self._skips_one(state.floor, version):
            return None
        return _Register(state.value, version, version)

    def _written(self, state: _Register, operation: Operation) -> _Register | None:
        version = operation.version
        if version is None or not operation.is_known:
            return _Register(operation.argument, None, state.floor)
        if version <= state.floor or self._skips_one(state.floor, version - 1):
            return None
        return _Register(operation.argument, version, version)

    def _skips_one(self, floor: int, version: int) -> bool:
        """Is a version told of a write after ``floor``, up to ``version``? It would come too late."""
        return bisect_right(self._told, version) != bisect_right(self._told, floor)

    def _compared(self, state: _Register, operation: Operation) -> _Register | None:
        if operation.is_known and not operation.result:
            return self._differed(state, operation)
        if operation.expected_version is not None:
            found = self._seen(state, operation.expected_version)
        else:
            found = state if state.value == operation.expected else None
        # One of unknown outcome that does not swap is one that never happened.
        return None if found is None else self._written(found, operation)

    def _differed(self, state: _Register, operation: Operation) -> _Register | None:
        """The state after a compare-and-set that found something else than what it named."""
        compared = operation.expected_version
        if compared is None:
            differs = state.value != operation.expected
            return self._seen(state, operation.version) if differs else None
        found = self._seen(state, operation.version)
        if found is None or found.version == compared:
            return None
        if found.version is None and self._seen(found, compared) is not None:
            return replace(found, others=found.others | {compared})
        return found

    @staticmethod
    def _deleted(state: _Register, operation: Operation) -> _Register | None:
        if not operation.is_known:
            return _Register(None, 0, state.floor) if state.exists else None
        if bool(operation.result) != state.exists:
            return None
        return _Register(None, 0, state.floor)


def _writes(operation: Operation) -> bool:
    return operation.kind is Kind.WRITE or (operation.kind is Kind.CAS and bool(operation.result))


def _only_looks(operation: Operation) -> bool:
    if operation.kind is Kind.READ:
        return True
    return operation.is_known and operation.kind is not Kind.WRITE and not operation.result


class _Event:
    """A call or an end, in a list from which pairs are lifted and put back (Lowe's)."""

    __slots__ = ("after", "before", "bit", "end", "operation")

    def __init__(self, operation: Operation, bit: int) -> None:
        self.operation = operation
        self.bit = bit
        self.end: _Event | None = None  # of a call: where it ended; None for an end, and if unknown
        self.before: _Event = self
        self.after: _Event = self

    def lift(self) -> None:
        for event in filter(None, (self, self.end)):
            event.before.after, event.after.before = event.after, event.before

    def put_back(self) -> None:
        for event in filter(None, (self.end, self)):
            event.before.after = event.after.before = event


def _linked(operations: Sequence[Operation]) -> _Event:
    """The events in order of time in a ring; its head, which is no event."""
    timed: list[tuple[float, int, _Event]] = []
    for number, operation in enumerate(operations):
        call = _Event(operation, 1 << number)
        timed.append((operation.called_at, 0, call))
        if operation.ended_at is not None:
            assert operation.called_at <= operation.ended_at, str(operation)
            call.end = _Event(operation, 0)
            timed.append((operation.ended_at, 1, call.end))
    # At one moment calls stand before ends: two that touch are taken as concurrent.
    timed.sort(key=lambda item: item[:2])
    head = last = _Event(Operation(-1, Kind.READ, "", 0, 0), 0)
    for _, _, event in timed:
        last.after, event.before = event, last
        last = event
    last.after, head.before = head, last
    return head


def check_register(operations: Sequence[Operation], steps_max: int = STEPS_MAX) -> Verdict:
    """Is there an order of these operations on one key that explains every answer?

    The order keeps that an operation which ended before another was called stands before it. The
    key does not exist at first. Reads of unknown outcome say nothing and are left out.
    """
    asked = [o for o in operations if o.is_known or o.kind is not Kind.READ]
    assert len({o.key for o in asked}) <= 1, "one key at a time: see check_registers()"
    model, head = _Model(asked), _linked(asked)
    todo = sum(o.is_known for o in asked)
    state, done, steps = _Register(), 0, 0
    taken: list[tuple[_Event, _Register]] = []  # with the state before
    seen: set[tuple[int, _Register]] = set()
    longest: tuple[int, str] = (-1, "")
    event = head.after
    while todo:
        steps += 1
        if steps > steps_max:
            return Verdict(Outcome.UNDECIDED, steps, f"given up after {steps_max:,} steps")
        if event.bit:  # a call
            after = model.step(state, event.operation)
            if after is not None and (done | event.bit, after) not in seen:
                done |= event.bit
                seen.add((done, after))
                taken.append((event, state))
                todo -= event.operation.is_known
                state = after
                event.lift()
                event = head.after
            else:
                event = event.after
            continue
        # Somebody's end, or the end of all, and nothing that was called before it fits next.
        if len(taken) > longest[0]:
            longest = len(taken), _stuck(taken, state, head)
        while taken:
            event, before = taken.pop()
            event.put_back()
            done ^= event.bit
            todo += event.operation.is_known
            told_nothing, state = before == state, before
            # A look that tells nothing new fits here in every order that goes on from here, so
            # that there is no need to try another in its place.
            if not (told_nothing and _only_looks(event.operation)):
                break
        else:
            return Verdict(Outcome.VIOLATION, steps, longest[1])
        event = event.after
    return Verdict(Outcome.LINEARIZABLE, steps)


def _stuck(taken: Sequence[tuple[_Event, _Register]], state: _Register, head: _Event) -> str:
    """The words for a dead end: what was explained last, and what cannot come next."""
    lines = [f"{len(taken)} operations explained; then the register is {state}"]
    lines += [f"  explained: {event.operation}" for event, _ in taken[-3:]]
    event = head.after
    while event.bit:
        lines.append(f"  impossible next: {event.operation}")
        event = event.after
    return "\n".join(lines)


def by_key(operations: Iterable[Operation]) -> dict[str, list[Operation]]:
    """The operations of each key."""
    keys: defaultdict[str, list[Operation]] = defaultdict(list)
    for operation in operations:
        keys[operation.key].append(operation)
    return dict(keys)


def check_registers(
    operations: Iterable[Operation], steps_max: int = STEPS_MAX
) -> dict[str, Verdict]:
    """A verdict for each key."""
    return {key: check_register(ops, steps_max) for key, ops in by_key(operations).items()}


# ---- Others, each the list of what is wrong ----------------------------------------------------


def check_counter(operations: Sequence[Operation]) -> list[str]:
    """What is wrong with a counter that begins at 0 and is only incremented, by 1, and read.

    Increments that are known count once, those that are unknown once or not at all; nobody who
    starts later sees less. The last read, after everything, gives the final value.
    """
    problems = []
    adds = [o for o in operations if o.kind is Kind.INCREMENT]
    calls = sorted(o.called_at for o in adds)
    ends = sorted(o.ended_at for o in adds if o.ended_at is not None)
    twice = Counter(o.result for o in adds if o.is_known)
    problems += [f"{n} increments were answered {value}" for value, n in twice.items() if n > 1]
    known = [(o.called_at, o.ended_at, _number(o), o) for o in operations if o.ended_at is not None]
    for called_at, ended_at, value, one in known:
        least = bisect_left(ends, called_at) + (one.kind is Kind.INCREMENT)
        most = bisect_right(calls, ended_at)
        if not least <= value <= most:
            problems.append(f"not within {least} and {most}: {one}")
    ended = deque(sorted(known, key=lambda item: item[1]))
    highest, seen_by = 0, ""
    for called_at, _, value, one in sorted(known, key=lambda item: item[0]):
        while ended and ended[0][1] < called_at:
            _, _, earlier, by = ended.popleft()
            if earlier > highest:
                highest, seen_by = earlier, str(by)
        if value < highest + (one.kind is Kind.INCREMENT):
            problems.append(f"goes back: {seen_by}\n  then {one}")
    return problems


def _number(operation: Operation) -> int:
    """What the counter was, as told; 0 where nobody had counted yet."""
    return operation.result if isinstance(operation.result, int) else 0


@dataclass(frozen=True, slots=True)
class ListRead:
    """All elements of a list, as one client read them."""

    called_at: float
    ended_at: float
    elements: tuple[str, ...]


def check_set_full(appends: Sequence[Operation], reads: Sequence[ListRead]) -> list[str]:
    """What is wrong with a list to which each element is appended once: nothing lost, made up or
    doubled, nothing seen before it was asked for, and every read a beginning of each later one.

    ``appends`` are those that are known and unknown; the elements are their arguments.
    """
    problems = []
    asked = {str(o.argument): o for o in appends}
    assert len(asked) == len(appends), "each element is appended once"
    for read in reads:
        there = set(read.elements)
        doubled = [e for e, n in Counter(read.elements).items() if n > 1]
        strange = [e for e in there if e not in asked or asked[e].called_at > read.ended_at]
        lost = [
            e
            for e, o in asked.items()
            if o.ended_at is not None and o.ended_at < read.called_at and e not in there
        ]
        for what, elements in (("doubled", doubled), ("made up", strange), ("lost", lost)):
            if elements:
                problems.append(f"{what} in the read at {read.called_at:.6f}: {sorted(elements)}")
    return problems + list(_out_of_order(reads))


def _out_of_order(reads: Sequence[ListRead]) -> Iterator[str]:
    """Reads of which neither is a beginning of the other, and reads that go back."""
    lengths = sorted(reads, key=lambda read: len(read.elements))
    for shorter, longer in pairwise(lengths):
        if longer.elements[: len(shorter.elements)] != shorter.elements:
            yield f"reads at {shorter.called_at:.6f} and {longer.called_at:.6f} differ in order"
    longest: ListRead | None = None
    ends = iter(sorted(reads, key=lambda read: read.ended_at))
    ended = next(ends, None)
    for read in sorted(reads, key=lambda read: read.called_at):
        while ended is not None and ended.ended_at < read.called_at:
            if longest is None or len(ended.elements) > len(longest.elements):
                longest = ended
            ended = next(ends, None)
        if longest is not None and len(read.elements) < len(longest.elements):
            yield (
                f"the read at {read.called_at:.6f} has fewer elements than "
                f"the one that ended at {longest.ended_at:.6f}"
            )


def check_bank(reads: Iterable[Sequence[int]], total: int) -> list[str]:
    """What is wrong with balances between which money is only moved, as they were read at once."""
    problems = []
    for balances in reads:
        if sum(balances) != total:
            problems.append(f"the sum is {sum(balances)}, not {total}: {list(balances)}")
        if any(balance < 0 for balance in balances):
            problems.append(f"overdrawn: {list(balances)}")
    return problems
