"""Who waits for what, in the driver: each is told once, whatever happens first."""

from __future__ import annotations

from kv_errors import KVError, NoPrimaryError, OutcomeUnknownError
from raft_status import Pending, Waiting
from raft_types import Entry, EntryKind

UNKNOWN, NO_PRIMARY = OutcomeUnknownError("late"), NoPrimaryError("late")


def write(first: int, last: int, deadline_s: float = 100.0, *, blind: bool = False) -> Pending:
    pending = Pending(first, last, 1, deadline_s, lambda _: None)
    pending.blind = blind
    return pending


def read(at_least: int = 0, deadline_s: float = 100.0) -> Pending:
    return Pending(0, at_least, 1, deadline_s, lambda _: None)


def entries(first: int, last: int) -> list[Entry]:
    return [Entry(index, 1, EntryKind.COMMAND, b"") for index in range(first, last + 1)]


def waiting_for(*, writes: tuple[Pending, ...] = (), reads: tuple[Pending, ...] = ()) -> Waiting:
    waiting = Waiting()
    for pending in writes:
        waiting.add_write(pending)
    for reader in reads:
        waiting.add_read(reader)
    return waiting


def errors(pendings: list[Pending]) -> list[KVError | None]:
    return [pending.error for pending in pendings]


def test_write_when_it_is_applied_in_pieces_then_its_replies_gather() -> None:
    """What was proposed at once is answered at once."""
    whole, next_one = write(1, 4), write(5, 5)
    waiting = waiting_for(writes=(whole, next_one))

    assert waiting.applied(entries(1, 2), [b"1", b"2"]) == []
    assert waiting.applied(entries(3, 5), [b"3", b"4", b"5"]) == [whole, next_one]

    assert whole.replies == [b"1", b"2", b"3", b"4"]
    assert next_one.replies == [b"5"]


def test_read_when_it_is_confirmed_then_it_waits_until_that_index_is_applied() -> None:
    """Source: thesis 6.4, steps 4 and 5."""
    early, late, far = read(), read(), read(at_least=9)
    waiting = waiting_for(reads=(early, late, far))

    assert waiting.confirmed(3, [early], applied_index=3) == [early]
    assert waiting.confirmed(5, [late], applied_index=3) == []
    assert waiting.confirmed(5, [far], applied_index=5) == []
    assert waiting.applied(entries(4, 5), [b"", b""]) == [late]
    assert waiting.applied(entries(6, 9), [b""] * 4) == [far]


def test_blind_write_when_the_own_disk_has_it_then_it_is_done() -> None:
    """And no other; what follows on the same log is not."""
    blind, seeing, later = write(1, 1, blind=True), write(2, 2), write(3, 3, blind=True)
    waiting = waiting_for(writes=(blind, seeing, later))

    assert waiting.durable(2) == [blind]
    assert waiting.applied(entries(1, 3), [b"a", b"b", b"c"]) == [seeing, later]


def test_who_waits_too_long_is_given_up_with_the_error_of_its_kind() -> None:
    """A write may still happen; that a read did not is certain (promise G4, raft-traps T47)."""
    old_write, old_read = write(1, 1, 10.0), read(deadline_s=11.0)
    new_write, new_read = write(2, 2, 20.0), read(deadline_s=21.0)
    waiting = waiting_for(writes=(old_write, new_write), reads=(old_read, new_read))

    assert waiting.late(10.5, UNKNOWN, NO_PRIMARY) == [old_write]
    assert waiting.late(15.0, UNKNOWN, NO_PRIMARY) == [old_read]
    assert waiting.late(15.0, UNKNOWN, NO_PRIMARY) == []

    assert errors([old_write, old_read]) == [UNKNOWN, NO_PRIMARY]
    assert errors([new_write, new_read]) == [None, None]


def test_read_that_was_given_up_is_not_done_when_it_is_confirmed_after_all() -> None:
    """The core does not know; to finish it twice would answer its client twice."""
    first, second, third = read(), read(deadline_s=1.0), read()
    waiting = waiting_for(reads=(first, second, third))
    assert waiting.confirmed(7, [first], applied_index=5) == []

    assert waiting.fail(0, UNKNOWN, NO_PRIMARY) == [first, second, third]
    assert waiting.applied(entries(6, 7), [b"", b""]) == []
    assert waiting.confirmed(7, [second, third], applied_index=7) == []


def test_who_waits_when_the_leadership_is_lost_is_given_up_unless_it_is_committed() -> None:
    """A write may be in the log, a read is not; what is committed will be applied all the same."""
    committed, partly, pending, reader = write(1, 2), write(3, 4), write(5, 5), read()
    waiting = waiting_for(writes=(committed, partly, pending), reads=(reader,))

    assert waiting.fail(3, UNKNOWN, NO_PRIMARY) == [partly, pending, reader]
    assert waiting.fail(3, UNKNOWN, NO_PRIMARY) == []
    assert waiting.applied(entries(1, 2), [b"a", b"b"]) == [committed]

    assert errors([committed, partly, pending, reader]) == [None, UNKNOWN, UNKNOWN, NO_PRIMARY]
