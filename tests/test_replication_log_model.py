"""The durable log beside a plain list: both hold the same, whatever happens."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import replication_log
from raft_types import ENTRY_OVERHEAD_BYTES, Entry, HardState
from replication_log import Recovered, ReplicationLog
from tests.log_files import IDENTITY, PowerLossDisk, entry, segments


class LogMachine(RuleBasedStateMachine):
    """The log beside a plain list; whatever happens, both hold the same."""

    segment_bytes_max = 400

    def __init__(self) -> None:
        super().__init__()
        self.temporary = tempfile.TemporaryDirectory()
        self.directory = Path(self.temporary.name)
        self.power = PowerLossDisk()
        self.hard_state = HardState(0, None)
        self.first = 1  # index of the model's first entry
        self.base_term = 0
        self.model: list[Entry] = []
        self.log = self._open()
        self.log.save_identity(IDENTITY)

    def _open(self) -> ReplicationLog:
        return ReplicationLog(
            self.directory,
            segment_bytes_max=self.segment_bytes_max,
            tail_bytes_max=200,
            disk=self.power.disk(),
        )

    @property
    def last(self) -> int:
        return self.first + len(self.model) - 1

    def _batch(self, back: int, count: int, step: int, size: int) -> tuple[HardState, list[Entry]]:
        """A hard state and entries that replace the last ``back`` ones."""
        term = self.hard_state.term + step
        hard_state = HardState(term, None) if step else self.hard_state
        if term == 0:
            return HardState(0, None), []
        first = max(self.first, self.last + 1 - back)
        data = bytes(size) + b"%d" % term
        return hard_state, [entry(index, term, data) for index in range(first, first + count)]

    def _appended(self, hard_state: HardState, batch: list[Entry]) -> None:
        if batch:
            self.model[batch[0].index - self.first :] = batch
        self.hard_state = hard_state

    def _dropped(self, first: int) -> None:
        if first > self.first:
            self.base_term = self.model[first - 1 - self.first].term
            del self.model[: first - self.first]
            self.first = first

    def _did_reset(self, index: int, term: int) -> None:
        self.first, self.base_term, self.model = index + 1, term, []

    @rule(
        back=st.integers(0, 8),
        count=st.integers(0, 5),
        step=st.integers(0, 2),
        size=st.sampled_from([0, 10, 700]),
        repeat=st.booleans(),
    )
    def append(self, back: int, count: int, step: int, size: int, repeat: bool) -> None:
        hard_state, batch = self._batch(back, count, step, size)
        changed = hard_state != self.hard_state or repeat
        self.log.append(hard_state if changed else None, batch)
        self._appended(hard_state, batch)

    @precondition(lambda self: self.hard_state.term > 0)
    @rule()
    def vote(self) -> None:
        self.hard_state = HardState(self.hard_state.term, IDENTITY.member_id)
        self.log.append(self.hard_state, [])

    @rule(ahead=st.integers(-2, 30))
    def drop(self, ahead: int) -> None:
        index = self.first + ahead
        first = self.log.drop_before(index)
        assert self.first <= first <= max(self.first, min(index, self.last + 1))
        self._dropped(first)

    @rule(index=st.integers(1, 40), back=st.integers(0, 2))
    def reset(self, index: int, back: int) -> None:
        term = max(0, self.hard_state.term - back)
        self.log.reset(index, term)
        self._did_reset(index, term)

    @rule()
    def reopen(self) -> None:
        self.log.close()
        self.log = self._open()
        assert self.log.identity == IDENTITY
        self._check_recovered()

    def _lose_power(self, fate: st.DataObject) -> Recovered:
        self.log.close()
        self.power.lose_power(self.directory, lambda low, high: fate.draw(st.integers(low, high)))
        self.log = self._open()
        return self.log.recovered

    @rule(
        fate=st.data(),
        back=st.integers(0, 8),
        count=st.integers(1, 5),
        size=st.sampled_from([0, 10, 700]),
        syncs=st.integers(0, 3),
    )
    def lose_power_in_append(
        self, fate: st.DataObject, back: int, count: int, size: int, syncs: int
    ) -> None:
        """What was acknowledged is there; of what was being written all, or nothing."""
        hard_state, batch = self._batch(back, count, 1, size)
        self.power.syncs_left = syncs
        done = False
        with suppress(OSError):
            self.log.append(hard_state, batch)
            done = True
        recovered = self._lose_power(fate)
        if done or recovered.hard_state == hard_state:
            self._appended(hard_state, batch)
        self._check_recovered()

    @rule(fate=st.data(), ahead=st.integers(1, 30), syncs=st.integers(0, 3))
    def lose_power_in_drop(self, fate: st.DataObject, ahead: int, syncs: int) -> None:
        """Some of what was to be dropped is there, or nothing of it; all else is."""
        index = self.first + ahead
        self.power.syncs_left = syncs
        with suppress(OSError):
            self._dropped(self.log.drop_before(index))
        first = self._lose_power(fate).first_index
        assert self.first <= first <= max(self.first, index)
        self._dropped(first)
        self._check_recovered()

    @rule(fate=st.data(), index=st.integers(1, 40), syncs=st.integers(0, 5))
    def lose_power_in_reset(self, fate: st.DataObject, index: int, syncs: int) -> None:
        """The old log, or the new one."""
        term = self.hard_state.term
        self.power.syncs_left = syncs
        done = False
        with suppress(OSError):
            self.log.reset(index, term)
            done = True
        recovered = self._lose_power(fate)
        found = recovered.first_index, recovered.base_term, recovered.last_index
        if done or found == (index + 1, term, index):
            self._did_reset(index, term)
        self._check_recovered()

    def _check_recovered(self) -> None:
        recovered = self.log.recovered
        runs: list[tuple[int, int]] = []
        for item in self.model:
            if not runs or runs[-1][1] != item.term:
                runs.append((item.index, item.term))
        assert recovered.hard_state == self.hard_state
        assert (recovered.first_index, recovered.last_index) == (self.first, self.last)
        assert recovered.base_term == self.base_term
        assert recovered.term_runs == tuple(runs)
        count = len(recovered.tail)
        assert list(recovered.tail) == self.model[len(self.model) - count :]
        tail_bytes = [ENTRY_OVERHEAD_BYTES + len(item.data) for item in self.model[::-1]]
        assert sum(tail_bytes[:count]) <= 200
        assert count > 0 or not self.model or tail_bytes[0] > 200

    @rule(fate=st.data(), bytes_max=st.sampled_from([0, 60, 300, 1 << 20]))
    @precondition(lambda self: self.model)
    def read(self, fate: st.DataObject, bytes_max: int) -> None:
        first = fate.draw(st.integers(self.first, self.last))
        last = fate.draw(st.integers(first, self.last))
        found = self.log.read(first, last, bytes_max)
        assert found
        assert found == self.model[first - self.first :][: len(found)]
        assert len(found) == 1 or bytes_max >= sum(
            ENTRY_OVERHEAD_BYTES + len(item.data) for item in found
        )

    @invariant()
    def everything_is_there(self) -> None:
        assert (self.log.first_index, self.log.last_index) == (self.first, self.last)
        files_bytes = [path.stat().st_size for path in segments(self.directory)]
        assert self.log.size_bytes == sum(files_bytes)
        if self.model:
            assert self.log.read(self.first, self.last, 1 << 30) == self.model

    def teardown(self) -> None:
        self.log.close()
        self.temporary.cleanup()


@pytest.mark.slow
@pytest.mark.parametrize("segment_bytes_max", [400, 4000])
def test_log_when_used_in_any_way_then_it_equals_a_plain_list(
    segment_bytes_max: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Appends, replacements, restarts and power losses in any order (hypothesis prints them)."""
    monkeypatch.setattr(LogMachine, "segment_bytes_max", segment_bytes_max)
    monkeypatch.setattr(replication_log, "_ZEROS_BYTES", 1500)
    run_state_machine_as_test(
        LogMachine, settings=settings(max_examples=60, stateful_step_count=30, deadline=None)
    )
