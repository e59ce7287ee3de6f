"""The stage of a chaos run: a cluster behind a network that misbehaves, and what a round may use.

A round is a function of a ``Stage``; rounds are in ``chaos_faults.py``, ``chaos_disks.py`` and
``chaos_members.py``, and ``chaos_classes.py`` says which of them make up a class.

Rule 1: a round begins with a healthy cluster; whoever runs it heals the cluster afterwards.
Rule 2: faults come from outside, as in life: signals, limits of the system, the links of
``chaos_links.py``, small disks, damaged files, hostile clients. No node knows that it is tested;
but for a stall, a sync that fails and a death between two steps, which nothing outside can cause, the
server is patched (``failpoint_server.py``); and for a loss of power its system calls are recorded.
Rule 3: what a majority must not lose is never taken from a majority: disks are wiped and damaged
one at a time, when the others have everything, or agree that its member is none any more.
Rule 4: a round whose fault was refused, or came to nothing, says so: it does not count.
"""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import psutil

from cluster_manager import SERVER_SCRIPT, ClusterManager, ManagerError
from tests.chaos_links import OUTSIDE, Link, Network, Weather
from tests.cluster import PATIENCE_S, SHORT_TIMERS, Answer, Cluster
from tests.failpoint_server import DISK, VARIABLE
from tests.power_loss import compile_recorder, contents, fill, seen

ELECTION_TIMEOUT_S: Final = 1.0
CUT: Final = Weather(cut=True)
BAD: Final = Weather(delay_s=0.02, jitter_s=0.015, lose=0.02, repeat=0.02)


class CannotTestError(Exception):
    """The machine does not let this fault be caused: the run proves nothing."""


class NotDoneError(Exception):
    """The cluster refused what was to happen, or it came to nothing: this round proves nothing."""


class ChaosCluster(Cluster):
    """Nodes that meet each other and their clients only over a network that misbehaves."""

    def __init__(
        self, network: Network, *server_args: str, nodes: int, server_script: Path = SERVER_SCRIPT
    ) -> None:
        self._network = network
        super().__init__(*SHORT_TIMERS, f"--advertise-host={OUTSIDE}", *server_args, nodes=nodes)
        self.manager = ClusterManager(
            nodes,
            None,
            self.directory / "data",
            (*SHORT_TIMERS, f"--advertise-host={OUTSIDE}", *server_args),
            spawn=self._spawn,
            server_script=server_script,
        )
        # With ``FAILPOINT_SERVER``: what the disks of processes do, and where nodes that are started
        # next are to die.
        self._disk_troubles = self.directory / "disk-troubles"
        self._disk_troubles.mkdir()
        self.failpoints: dict[str, str] = {}
        self.spawned: dict[str, psutil.Popen] = {}  # the last process of each node
        # If writes are recorded: by what, and what each node's directory held when it was started.
        self._recorder: Path | None = None
        self._before: dict[str, dict[str, bytes]] = {}

    def _spawn(self, command: Sequence[str], **more: Any) -> psutil.Popen:
        flags = dict(w.removeprefix("--").split("=", 1) for w in command if "=" in w)
        node_id = flags["node-id"]
        self._network.serve(node_id, int(flags["port"]), int(flags["peer-port"]))
        env = {**os.environ, DISK: str(self._disk_troubles)}
        if point := self.failpoints.pop(node_id, None):
            env[VARIABLE] = point
        if self._recorder is not None:
            self._before[node_id] = contents(Path(flags["data-dir"]))
            env["LD_PRELOAD"] = str(self._recorder)
            env["KV_POWER_PREFIX"] = str(self.manager.data_dir)
            env["KV_POWER_JOURNALS"] = str(self._journals)
        process = self.spawned[node_id] = psutil.Popen(command, env=env, **more)
        return process

    # ---- Disks ----

    def hangs(self, process: psutil.Process) -> Path:
        """As long as there is this file, the process' log waits for its disk."""
        return self._disk_troubles / str(process.pid)

    def fails(self, process: psutil.Process) -> Path:
        """If there is this file, the process' next sync fails."""
        return self._disk_troubles / f"{process.pid}.fails"

    @property
    def _journals(self) -> Path:
        return self.directory / "journals"

    def record_writes(self) -> None:
        """Of the nodes that are started from now on, so that they can lose their power."""
        self._recorder = compile_recorder(self.directory)
        if self._recorder is None:
            raise CannotTestError("it takes a C compiler to record what nodes write")
        self._journals.mkdir()

    def lose_power(self, node_ids: Iterable[str], rng: random.Random) -> int:
        """Of all of these at once; how many bytes of theirs were not safe."""
        processes = {n: p for n in node_ids if (p := self.process(n)) is not None}
        end(self, processes, psutil.Process.kill)
        unsafe_bytes = 0
        for node_id, process in processes.items():
            directory = self.node(node_id).directory
            disk = seen(directory, self._before[node_id], self._journals / str(process.pid))
            fill(directory, disk.after_loss(rng))
            unsafe_bytes += disk.unsafe_bytes
        return unsafe_bytes

    def address(self, node_id: str) -> tuple[str, int]:
        """Where the test itself asks: past the network."""
        return self.manager.node(node_id).reached_at

    def status(self, node_id: str) -> Answer | None:
        with contextlib.suppress(ManagerError, ValueError):  # it is no node just now
            return super().status(node_id)
        return None


class Stage:
    """What a round may use."""

    def __init__(self, cluster: ChaosCluster, network: Network, seed: int, until: float) -> None:
        self.cluster = cluster
        self.network = network
        self.rng = random.Random(seed)
        self.until = until  # by the monotonic clock
        self.told: list[tuple[float, str]] = []

    def tell(self, what: str) -> None:
        """Note what is done now, for who reads the failure."""
        self.told.append((time.monotonic(), what))

    def hold(self, low_s: float, high_s: float) -> None:
        """Let it be so for a while, but hardly longer than the run."""
        left_s = max(0.5, self.until - time.monotonic())
        time.sleep(min(self.rng.uniform(low_s, high_s), left_s))

    def choose(self, *options: Callable[[], None]) -> None:
        self.rng.choice(options)()

    def one(self, node_ids: Sequence[str]) -> str:
        return self.rng.choice(node_ids)

    def weather(self, what: str, links: Iterable[Link], weather: Weather) -> None:
        links = list(links)
        self.tell(f"{what}: {' '.join('->'.join(link) for link in links)}")
        self.network.change(links, weather)

    def heal(self) -> None:
        """All links are well, all nodes run, vote and have caught up. Raises ManagerError."""
        self.tell("heal")
        self.network.heal()
        self.cluster.heal()

    # ---- Links ----

    def between(self, some: Iterable[str], others: Iterable[str]) -> list[Link]:
        """The links from the ones to the others, and not back."""
        others = list(others)
        return [(a, b) for a in some for b in others if a != b]

    def both_ways(self, some: Iterable[str], others: Iterable[str]) -> list[Link]:
        some, others = list(some), list(others)
        return self.between(some, others) + self.between(others, some)

    def all_links(self) -> list[Link]:
        return self.between(self.cluster.node_ids, self.cluster.node_ids)


def end(cluster: Cluster, node_ids: Iterable[str], how: Callable[[psutil.Process], None]) -> None:
    """End these nodes at once, none after the other, and wait until they have let go of all."""
    processes = [p for p in map(cluster.process, node_ids) if p is not None]
    for process in processes:
        how(process)

    # Not by the command line or the state of the process, which tell it before it has let go.
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
    assert not alive, f"still there: {alive}"


@dataclass(frozen=True, slots=True)
class FaultClass:
    """A kind of trouble, and the cluster that it is made for."""

    name: str
    rounds: tuple[Callable[[Stage], None], ...]  # one of them each time
    nodes: int = 3
    server_args: tuple[str, ...] = ()
    server_script: Path = SERVER_SCRIPT
    loses_power: bool = False  # what its nodes write is recorded
    is_mixed: bool = False  # the weather is bad in half of the rounds, whatever else fails
    # Without any answer: some elections that come to nothing, and a majority that a round takes away.
    pause_s_max: float = 15.0
    # The codes of errors that clients may be told, besides that there is no primary now.
    refusals: tuple[str, ...] = ()
    # What the nodes may log as an error, besides what any failing neighbour makes them say.
    expected: tuple[str, ...] = ()


@dataclass
class Rounds:
    """The rounds of a run, by name."""

    done: Counter[str] = field(default_factory=Counter)
    undone: Counter[str] = field(default_factory=Counter)  # they came to nothing

    def __str__(self) -> str:
        parts = [
            f"{', '.join(f'{n} {name}' for name, n in sorted(counts.items()))}{what}"
            for counts, what in ((self.done, ""), (self.undone, " came to nothing"))
            if counts
        ]
        return "; ".join(parts)

    def doubts(self) -> list[str]:
        """Why what failed is too little to prove something."""
        if not self.done:
            return ["nothing failed"]
        doubts = []
        if self.undone.total() > self.done.total():
            doubts.append(f"most rounds came to nothing: {dict(self.undone)}")
        doubts += [
            f"{name} came to nothing each time, {count} times"
            for name, count in self.undone.items()
            if count > 1 and name not in self.done
        ]
        return doubts


def repeat(fault: FaultClass, stage: Stage) -> Rounds:
    """Round after round until the time is over: each kind once before one comes again.

    However little time there is, each kind comes once.
    """
    rounds = Rounds()
    deck = stage.rng.sample(fault.rounds, len(fault.rounds))
    kinds_left = len(deck)
    while time.monotonic() < stage.until or kinds_left > 0:
        deck = deck or stage.rng.sample(fault.rounds, len(fault.rounds))
        one = deck.pop()
        kinds_left -= 1
        if fault.is_mixed and stage.rng.random() < 0.5:
            stage.weather("bad weather", stage.all_links(), BAD)
        try:
            one(stage)
        except NotDoneError as error:
            stage.tell(f"it came to nothing: {error}")
            rounds.undone[one.__name__] += 1
        else:
            rounds.done[one.__name__] += 1
        stage.heal()
        stage.hold(0.2, 0.8)
    return rounds
