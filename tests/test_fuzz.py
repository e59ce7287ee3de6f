"""A few seconds of fuzzing for every place where bytes come in, and proof that a finding is told.

The long run is `make fuzz`. What it once found is a test of the module that was wrong.
"""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

import raft_frames
from tests.fuzz import Coverage, fuzz, main, make_input
from tests.fuzz_targets import TARGETS, Target

SEED = 20261124
# By target: about half a second each.
EXECUTIONS = {
    "requests": 200,
    "commands": 300,
    "replies": 1000,
    "frames": 3000,
    "handshakes": 5000,
    "log": 150,
    "sealed-log": 150,
    "state": 150,
    "backup": 40,
    "sealed-backup": 40,
    "config": 300,
    "client-port": 50,
    "peer-port": 150,
}
LIVE = ("client-port", "peer-port")


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.cluster] * (name in LIVE)) for name in TARGETS],
)
def test_target_when_fed_changed_bytes_then_takes_them_as_it_must(name: str) -> None:
    """Refused by name, or taken as what they are; the table of ``fuzz_targets.py`` says which."""
    with TARGETS[name]() as target:
        outcome = fuzz(target, SEED, executions=EXECUTIONS[name])

    if outcome.finding is not None:
        number, data, error = outcome.finding
        raise AssertionError(f"seed={SEED} execution={number}: {data.hex()}") from error
    assert outcome.executions == EXECUTIONS[name]


def test_input_when_made_again_then_the_same() -> None:
    """A seed is enough to see a failure again."""
    with TARGETS["frames"]() as one, TARGETS["frames"]() as other:
        for number in range(20):
            assert make_input(one, 5, number) == make_input(other, 5, number)
        assert make_input(one, 5, 1) != make_input(one, 6, 1)


class Lock(Target):
    """Opens to one word, of which each letter is a line of its own."""

    name = "lock"

    def make(self, rng: random.Random) -> bytes:
        return rng.randbytes(4)

    def run(self, data: bytes) -> None:
        if data[:1] == b"f":
            if data[1:2] == b"u":
                if data[2:3] == b"z":
                    raise AssertionError("open")
                return
            return


def test_coverage_when_an_input_gets_further_then_later_ones_go_on_from_there() -> None:
    """Chance alone would try 16 million words."""
    with Lock() as target:
        guided = fuzz(target, 1, executions=60_000, coverage=Coverage([__file__]))
        blind = fuzz(target, 1, executions=60_000, coverage=Coverage([]))

    assert guided.finding is not None
    assert guided.finding.data[:3] == b"fuz"
    assert guided.kept >= 2
    assert blind.finding is None


def test_runner_when_a_target_fails_then_it_keeps_the_input_and_says_how_to_replay_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A fuzzer that can't fail proves nothing."""

    def trusting(data: bytes, offset: int) -> list[object]:
        raise KeyError(data[offset])

    monkeypatch.setattr(raft_frames, "decode_entries", trusting)
    options = ["--target", "frames", "--seconds", "20", "--seed", "1", "--findings", str(tmp_path)]

    assert main(options) == 1

    said = capsys.readouterr().out
    replay = re.search(r"replay: python -m tests\.fuzz (--target frames --input \S+)", said)
    assert replay is not None, said
    with pytest.raises((KeyError, IndexError)):
        main(replay[1].split())
    monkeypatch.undo()
    assert main(replay[1].split()) == 0
