"""How nodes, links, disks and clients fail: each fault class as one round of it, to be repeated.

Rule 1: a round begins with a healthy cluster; whoever runs it heals the cluster afterwards.
Rule 2: faults come from outside, as in life: signals, limits of the system, the links of
``chaos_links.py``, small disks, damaged files, hostile clients. No node knows that it is tested;
but for a stall, which nothing outside can cause without a disk of its own, the calls of the log are
patched (``failpoint_server.py``).
Rule 3: what a majority must not lose is never taken from a majority: disks are wiped and damaged
one at a time, when the others have everything.

The letters are those of the fault model.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import psutil

from cluster_manager import SERVER_SCRIPT, ClusterManager, ManagerError
from kv_config import EXIT_CONFIG
from kv_errors import KVError
from raft_watch import DISK_FLOOR_BYTES
from tests.chaos_links import CLIENT, INSIDE, OUTSIDE, Link, Network, Weather
from tests.cluster import (
    ANSWER_S,
    PATIENCE_S,
    SHORT_TIMERS,
    Answer,
    Cluster,
    LineConnection,
    RespConnection,
    eventually,
)
from tests.failpoint_server import HANGS

STALLING_SERVER: Final = Path(__file__).with_name("failpoint_server.py")
ELECTION_TIMEOUT_S: Final = 1.0
# Less than the election timeout: heartbeats are answered late, but not too late.
NEWS_LATE_S: Final = 0.6
SMALL_LOG: Final = ("--max-log", "1MiB")
SMALL_MEMORY: Final = ("--max-memory", "16MiB")
SMALL_DISK_BYTES: Final = 384 * 1024 * 1024
# The node's own limit of descriptors has to allow that; it lowers --max-clients otherwise.
MANY_CLIENTS: Final = ("--max-clients", "11000")
IDLE_COUNT: Final = 10_000
IDLE_THREADS: Final = 8
IDLE_WITHIN_S: Final = 60.0
FILLER_BYTES: Final = 50_000
FILLER_COUNT: Final = 1000
CUT: Final = Weather(cut=True)


class CannotTestError(Exception):
    """The machine does not let this fault be caused: the run proves nothing."""


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
        # With ``STALLING_SERVER``: the log of the process whose number is a file here waits.
        self.stalled = self.directory / "stalled"
        self.stalled.mkdir()

    def _spawn(self, command: Sequence[str], **more: Any) -> psutil.Popen:
        flags = dict(w.removeprefix("--").split("=", 1) for w in command if "=" in w)
        self._network.serve(flags["node-id"], int(flags["port"]), int(flags["peer-port"]))
        return psutil.Popen(command, env={**os.environ, HANGS: str(self.stalled)}, **more)

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


# ---- Processes ---------------------------------------------------------------------------------


def end(cluster: Cluster, node_ids: Iterable[str], how: Callable[[psutil.Process], None]) -> None:
    """End these nodes at once, none after the other, and wait until they have let go of all."""
    processes = [p for p in map(cluster.process, node_ids) if p is not None]
    for process in processes:
        how(process)

    # Not by the command line or the state of the process, which tell it before it has let go.
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
    assert not alive, f"still there: {alive}"


def kill_primary(stage: Stage) -> None:
    """F1: SIGKILL to the primary, and another one leads before it is back."""
    primary = stage.cluster.primary()
    stage.tell(f"kill {primary}, the primary")
    stage.cluster.kill(primary)
    stage.cluster.primary(among=stage.cluster.others(primary))
    stage.hold(0.5, 1.0)


def kill(stage: Stage) -> None:
    """F1: SIGKILL to one, the primary, a majority, all at once."""
    cluster = stage.cluster
    nodes = list(cluster.node_ids)
    primary = cluster.primary()
    majority = stage.rng.sample(nodes, len(nodes) // 2 + 1)
    victims = stage.rng.choice([[primary], [primary], [stage.one(nodes)], majority, nodes])
    stage.tell(f"kill {' '.join(victims)} (primary {primary})")
    end(cluster, victims, psutil.Process.kill)
    stage.hold(0.1, 2.0)


def pause(stage: Stage) -> None:
    """F3: the primary is stopped for less than an election timeout, or for longer, and goes on."""
    primary = stage.cluster.primary()
    timeouts = stage.rng.choice([0.5, 0.5, 2.0, 2.0, 10.0])
    stage.tell(f"suspend {primary} for {timeouts} election timeouts")
    stage.cluster.suspend(primary)
    stage.hold(timeouts * ELECTION_TIMEOUT_S, timeouts * ELECTION_TIMEOUT_S)
    stage.cluster.resume(primary)
    stage.hold(0.5, 1.0)


def restart_all(stage: Stage) -> None:
    """F16: the whole cluster stops, orderly or not, and starts in any order."""
    cluster = stage.cluster
    orderly = stage.rng.random() < 0.5
    stage.tell("stop all" if orderly else "kill all")
    nodes = cluster.node_ids
    end(cluster, nodes, psutil.Process.terminate if orderly else psutil.Process.kill)
    order = stage.rng.sample(nodes, len(nodes))
    for node_id in order:
        stage.tell(f"start {node_id}")
        cluster.start(node_id)
        stage.hold(0.0, 0.7)


# ---- Links -------------------------------------------------------------------------------------


def partition(stage: Stage) -> None:
    """F4: the primary or a secondary alone, or the nodes split in two. Clients reach them all."""
    nodes = list(stage.cluster.node_ids)
    primary = stage.cluster.primary()
    side = stage.rng.choice(
        [[primary], [primary], [stage.one(nodes)], stage.rng.sample(nodes, len(nodes) // 2)]
    )
    rest = [node for node in nodes if node not in side]
    stage.weather("cut", stage.both_ways(side, rest), CUT)
    stage.hold(1.0, 4.0)


def one_way(stage: Stage) -> None:
    """F4: dead in one direction alone, the other is well."""
    cluster = stage.cluster
    primary = cluster.primary()
    others = cluster.others(primary)
    links = stage.rng.choice(
        [
            stage.between([primary], others),
            stage.between(others, [primary]),
            [stage.rng.choice(stage.all_links())],
            [(primary, others[0]), (others[1], primary)],
        ]
    )
    stage.weather("cut one way", links, CUT)
    stage.hold(1.0, 4.0)


def chain(stage: Stage) -> None:
    """F4: each node sees only those beside it; with five in a ring, every node a majority."""
    nodes = stage.rng.sample(stage.cluster.node_ids, len(stage.cluster.node_ids))
    ring = len(nodes) > 3
    near = set()
    for place, node in enumerate(nodes):
        if place + 1 < len(nodes) or ring:
            beside = nodes[(place + 1) % len(nodes)]
            near |= {(node, beside), (beside, node)}
    stage.weather("cut", [link for link in stage.all_links() if link not in near], CUT)
    stage.hold(2.0, 5.0)


def swizzle(stage: Stage) -> None:
    """F4: nodes are cut off one after the other, and come back in another order."""
    nodes = stage.cluster.node_ids
    some = stage.rng.sample(nodes, stage.rng.randint(2, len(nodes)))
    for node in some:
        stage.weather("cut", stage.both_ways([node], nodes), CUT)
        stage.hold(0.1, 0.8)
    for node in stage.rng.sample(some, len(some)):
        stage.weather("join", stage.both_ways([node], nodes), Weather())
        stage.hold(0.1, 0.8)


def delay(stage: Stage) -> None:
    """F5: everything takes 75 ms more, give or take 50, or one node's links a second."""
    if stage.rng.random() < 0.7:
        clients = stage.between([CLIENT], stage.cluster.node_ids)
        links = stage.all_links() + clients * stage.rng.randint(0, 1)
        stage.weather("75 ms", links, Weather(delay_s=0.075, jitter_s=0.05))
    else:
        far = stage.one(stage.cluster.node_ids)
        links = stage.both_ways([far], stage.cluster.node_ids)
        stage.weather("1 s", links, Weather(delay_s=1.0, jitter_s=0.3))
    stage.hold(2.0, 5.0)


def loss(stage: Stage) -> None:
    """F5: frames are lost, a fifth or half of them, others come twice; or the line is slow."""
    weather = stage.rng.choice(
        [
            Weather(lose=0.2, repeat=0.1),
            Weather(lose=0.5, repeat=0.1),
            Weather(lose=0.2, delay_s=0.05, jitter_s=0.05),
            Weather(bytes_per_s=20_000),
        ]
    )
    stage.weather(f"{weather}", stage.all_links(), weather)
    stage.hold(2.0, 5.0)


def reset(stage: Stage) -> None:
    """F4, F14: connections break with an RST, or one end does not notice; peers and clients."""
    for _ in range(stage.rng.randint(2, 8)):
        wanted = set(stage.rng.sample(stage.all_links(), 2))
        if stage.rng.random() < 0.4:
            wanted |= set(stage.between([CLIENT], stage.cluster.node_ids))
        if stage.rng.random() < 0.7:
            stage.tell("reset connections")
            stage.network.reset(lambda link, wanted=wanted: link in wanted)  # type: ignore[misc]
        else:
            stage.tell("half-open connections")
            stage.network.half_open(lambda link, wanted=wanted: link in wanted)  # type: ignore[misc]
        stage.hold(0.1, 0.8)


# ---- Disks -------------------------------------------------------------------------------------


def fill(stage: Stage, done: Callable[[], bool]) -> KVError | None:
    """Write large values until ``done``; the error, if the cluster refuses them before."""
    with stage.cluster.client() as client:
        for number in range(FILLER_COUNT):
            if done():
                return None
            try:
                client.set(f"filler:{number}", "x" * FILLER_BYTES)
            except KVError as error:
                if error.definite:
                    return error
    raise AssertionError(f"{FILLER_COUNT} large values changed nothing")


def unfill(stage: Stage) -> None:
    with stage.cluster.client() as client:
        client.delete(*(f"filler:{number}" for number in range(FILLER_COUNT)))


def snapshot(stage: Stage) -> None:
    """F6: a follower misses more than the log keeps, and is killed while it gets the state."""
    cluster = stage.cluster
    follower = stage.one(cluster.secondaries())
    seen = cluster.status(follower) or {"last_index": 0}
    stage.weather("cut", stage.both_ways([follower], cluster.node_ids), CUT)

    def cut_behind() -> bool:
        others = filter(None, map(cluster.status, cluster.others(follower)))
        return any(
            s["role"] == "PRIMARY" and s["first_index"] > seen["last_index"] + 1 for s in others
        )

    refusal = fill(stage, cut_behind)
    assert refusal is None, str(refusal)
    unfill(stage)
    stage.tell(f"{follower} is behind the log")
    slow = Weather(bytes_per_s=2_000_000)
    stage.weather("slow", stage.both_ways([follower], cluster.node_ids), slow)
    for _ in range(stage.rng.randint(1, 3)):
        stage.hold(0.0, 1.5)
        stage.tell(f"kill {follower}")
        cluster.kill(follower)
        cluster.start(follower)


def disk_error(stage: Stage) -> None:
    """F7: every write of one node fails from now on, so that it has to end; then the disk is well."""
    victim = stage.one([stage.cluster.primary(), *stage.cluster.node_ids])
    process = stage.cluster.process(victim)
    assert process is not None
    stage.tell(f"writes of {victim} fail")
    process.rlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    eventually(lambda: stage.cluster.process(victim) is None, f"{victim} ends")
    stage.hold(0.1, 1.0)


def disk_stall(stage: Stage) -> None:
    """F7: the log's writes wait for 0.1 to 10 s: the primary's, a secondary's, all secondaries'."""
    cluster = stage.cluster
    primary = cluster.primary()
    others = cluster.others(primary)
    victims = stage.rng.choice([[primary], [primary], [stage.one(others)], others])
    seconds = 10 ** stage.rng.uniform(-1.0, 1.0)
    stage.tell(f"disk of {' '.join(victims)} stalls for {seconds:.1f} s (primary {primary})")
    processes = [p for p in map(cluster.process, victims) if p is not None]
    marks = [cluster.stalled / str(process.pid) for process in processes]
    for mark in marks:
        mark.touch()
    stage.hold(seconds, seconds)
    for mark in marks:
        mark.unlink()
    stage.hold(0.2, 1.0)


@contextmanager
def small_disk(cluster: ChaosCluster, node_id: str) -> Iterator[Path]:
    """Kill the node; its directory lies on a small disk in memory meanwhile, with what it held."""
    directory = cluster.node(node_id).directory
    aside = directory.with_name(f"{node_id}.aside")
    cluster.kill(node_id)
    shutil.copytree(directory, aside)
    size = f"size={SMALL_DISK_BYTES}"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(directory)]
    done = subprocess.run(command, capture_output=True, check=False, text=True)
    if done.returncode:
        raise CannotTestError(f"it takes the right to mount a disk: {done.stderr.strip()}")
    try:
        shutil.copytree(aside, directory, dirs_exist_ok=True)
        shutil.rmtree(aside)
        yield directory
    finally:
        if cluster.process(node_id) is not None:
            cluster.kill(node_id)
        shutil.copytree(directory, aside, dirs_exist_ok=True)
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
        shutil.rmtree(directory)
        aside.rename(directory)


def disk_full(stage: Stage) -> None:
    """F7, F15: no room on a node's disk (ENOSPC), or almost none; later there is some again.

    A secondary waits for room, and a primary makes way or refuses. One may be killed meanwhile, and
    started with its disk still full.
    """
    cluster = stage.cluster
    primary = cluster.primary()
    victim = stage.one([primary, *cluster.node_ids])
    with small_disk(cluster, victim) as directory:
        cluster.start(victim)
        cluster.heal()
        if victim == primary:
            with contextlib.suppress(OSError):
                cluster.ask(cluster.primary(), f"FAILOVER TO {victim}")
        almost = victim == primary and stage.rng.random() < 0.5
        status = os.statvfs(directory)
        size_bytes = status.f_bavail * status.f_frsize - (DISK_FLOOR_BYTES // 2 if almost else 0)
        ballast = directory / "ballast"
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        stage.tell(f"the disk of {victim} is {'almost ' * almost}full")

        def has_failed() -> bool:
            trouble = (cluster.status(victim) or {}).get("trouble") or ""
            return "are refused" in trouble if almost else "the disk is full" in trouble

        refusal = fill(stage, has_failed)
        stage.tell(f"refused: {refusal}" if refusal else f"{victim} waits for room")
        stage.hold(0.2, 2.0)
        if stage.rng.random() < 0.3:
            stage.tell(f"{victim} is started with its disk full")
            cluster.kill(victim)
            cluster.start(victim)
        ballast.unlink()
        stage.tell(f"the disk of {victim} has room")
        cluster.heal()

        def has_room() -> bool:
            status = cluster.status(victim)
            return status is not None and "full" not in (status["trouble"] or "")

        eventually(has_room, f"{victim} notices that there is room")
        unfill(stage)
        stage.hold(0.2, 1.0)


def wipe(stage: Stage) -> None:
    """F11: a node loses its directory, and comes back by the same command as a new member."""
    cluster = stage.cluster
    victim = stage.one([cluster.primary(), *cluster.node_ids])
    others_have_all(stage, victim)
    stage.tell(f"wipe {victim}")
    shutil.rmtree(cluster.node(victim).directory)
    cluster.start(victim)
    stage.hold(0.0, 1.0)


def others_have_all(stage: Stage, victim: str) -> None:
    """Kill ``victim``, and wait until what it helped to commit is on the others' disks."""
    cluster = stage.cluster
    cluster.kill(victim)
    others = cluster.others(victim)
    cluster.primary(among=others)
    highest = max(s["last_index"] for s in filter(None, map(cluster.status, others)))

    def level() -> bool:
        seen = list(map(cluster.status, others))
        return all(s is not None and s["commit_index"] >= highest for s in seen)

    cluster.eventually(level, f"the others have everything without {victim}")


def damage(stage: Stage) -> None:
    """F8: a bit of a node's log or state is flipped; a node that refuses to start is wiped.

    Not in the last records, where a flipped bit looks like a record that was not written to its
    end: the node cuts that off, but here it had been acknowledged, which Raft does not survive.
    """
    cluster = stage.cluster
    victim = stage.one(cluster.secondaries())
    others_have_all(stage, victim)
    files = sorted(cluster.node(victim).directory.rglob("*"))
    files = [path for path in files if path.is_file() and path.stat().st_size > 1000]
    path = stage.rng.choice(files)
    data = bytearray(path.read_bytes())
    place = stage.rng.randrange(len(data.rstrip(bytes(1))) // 2)
    data[place] ^= 1 << stage.rng.randrange(8)
    path.write_bytes(data)
    stage.tell(f"{victim}: {path.name} has a bit flipped at {place} of {len(data)}")
    cluster.start(victim)
    process = cluster.process(victim)

    def decided() -> bool:
        return cluster.process(victim) is None or cluster.status(victim) is not None

    cluster.eventually(decided, f"{victim} serves or refuses")
    if cluster.process(victim) is None:
        stage.tell(f"{victim} refuses to start: wiped")
        ended = process.wait(1) if process else None
        assert ended in (None, EXIT_CONFIG), f"{victim} ended with {ended}"
        shutil.rmtree(cluster.node(victim).directory)


def memory(stage: Stage) -> None:
    """F15: the memory is full: definite errors, and deletions make room."""
    stage.tell("fill the memory")
    refusal = fill(stage, lambda: False)
    assert refusal is not None
    stage.tell(f"refused: {refusal}")
    stage.hold(0.5, 2.0)
    unfill(stage)


# ---- Members and leadership --------------------------------------------------------------------


def members(stage: Stage) -> None:
    """F12: a member leaves and another comes, the primary too, while links are slow or lossy.

    It comes at another port, and the next one may come at the port that is free now: so all but
    one of the addresses that clients know from the beginning are always right.
    """
    cluster = stage.cluster
    leaving = stage.one([cluster.primary(), *cluster.node_ids])
    if stage.rng.random() < 0.5:
        weather = Weather(delay_s=0.03, jitter_s=0.03, lose=0.05)
        stage.weather("poor", stage.all_links(), weather)
    peer_port = cluster.node(leaving).peer_port  # nobody calls it when the member is gone
    with contextlib.ExitStack() as taken:
        for what, change in (("remove", cluster.manager.remove), ("add", cluster.manager.add)):
            try:
                change(leaving, report=stage.tell)
            except ManagerError as error:  # it says no rather than risk a majority
                stage.tell(f"{what} {leaving} refused: {error}")
            stage.hold(0.0, 0.5)
            if leaving not in cluster.node_ids:
                stage.network.heal()
                if what == "remove":
                    taken.enter_context(socket.create_server((INSIDE, peer_port)))


def transfer(stage: Stage) -> None:
    """F13: the leadership is handed over again and again, also to who is hung, or dead."""
    cluster = stage.cluster
    for _ in range(stage.rng.randint(2, 5)):
        primary = cluster.primary()
        target = stage.one(cluster.others(primary))
        state = stage.rng.choice(["well", "well", "well", "hung", "dead"])
        if state == "hung":
            cluster.suspend(target)
        elif state == "dead":
            cluster.kill(target)
        stage.tell(f"hand over from {primary} to {target}, which is {state}")
        with contextlib.suppress(OSError):
            cluster.ask(primary, f"FAILOVER TO {target}")
        if state == "hung":
            cluster.resume(target)
        elif state == "dead":
            cluster.start(target)
        stage.hold(0.1, 0.7)


def transfer_unheard(stage: Stage) -> None:
    """F13: the leadership is handed over, and who had it hears nothing of that for a while."""
    cluster = stage.cluster
    primary = cluster.primary()
    others = cluster.others(primary)
    target = stage.one(others)

    def leads() -> bool:
        return (cluster.status(target) or {}).get("role") == "PRIMARY"

    # Where the target still lacks an entry, the news that it has it comes too late as well.
    for _ in range(5):
        stage.weather("late", stage.between(others, [primary]), Weather(delay_s=NEWS_LATE_S))
        stage.tell(f"hand over from {primary} to {target}, which is known at {primary} later")
        with LineConnection(cluster.address(primary)) as connection:
            connection.send(f"FAILOVER TO {target}")
            with contextlib.suppress(AssertionError):
                eventually(leads, f"{target} leads", within_s=NEWS_LATE_S / 2)
        if leads():
            stage.tell(f"{target} leads")
            stage.hold(NEWS_LATE_S, NEWS_LATE_S + 0.5)
            return
        stage.network.heal()
        stage.hold(0.2, 0.4)


# ---- Clients -----------------------------------------------------------------------------------


def connect_idle(stack: contextlib.ExitStack, victim: tuple[str, int]) -> int:
    """Connect so many clients that say nothing more, or as many as the limit of files allows.

    Each waits until it is served: what is not accepted yet overruns the backlog, and the kernel
    tries that again only after a second, and then two.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    wanted = min(IDLE_COUNT, hard // 2)
    deadline = time.monotonic() + IDLE_WITHIN_S

    def connect(thread: int) -> int:
        source = f"127.0.0.{10 + thread}", 0  # each has its own ports to call from
        for done in range(wanted // IDLE_THREADS):
            if time.monotonic() > deadline:
                return done
            sock = stack.enter_context(socket.create_connection(victim, ANSWER_S, source))
            sock.sendall(b"*1\r\n$4\r\nPING\r\n")
            assert sock.recv(100) == b"+PONG\r\n"
        return wanted // IDLE_THREADS

    with ThreadPoolExecutor(IDLE_THREADS, thread_name_prefix="idle") as pool:
        count = sum(pool.map(connect, range(IDLE_THREADS)))
    if count < wanted:
        raise CannotTestError(f"{count} of {wanted} idle clients within {IDLE_WITHIN_S:g} s")
    return count


def clients(stage: Stage) -> None:
    """F14: clients that vanish, hang, read slowly, send garbage, too much, or nothing."""
    victim = stage.cluster.address(stage.cluster.primary())
    stage.tell(f"hostile clients at {victim}")
    with contextlib.ExitStack() as stack:

        def connect() -> socket.socket:
            return stack.enter_context(socket.create_connection(victim, timeout=5.0))

        stage.tell(f"{connect_idle(stack, victim)} clients are idle")
        with RespConnection(victim) as connection:
            assert connection.ask("PING") == "PONG"
        for piece in (
            stage.rng.randbytes(5000),
            b"*3\r\n$3\r\nSET\r\n$1\r\n",
            b"*1\r\n$999999999999\r\n",
            b"*2147483647\r\n" + b"$1\r\n" * 100,
            b"\r\n" * 5000,
            b"SET half-a-line ",
        ):
            with contextlib.suppress(OSError):
                connect().sendall(piece)
        greedy = [connect() for _ in range(3)]
        for sock in greedy:  # asks and never reads
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError, ConnectionError):
                while sock.send(b"*2\r\n$3\r\nGET\r\n$6\r\nhunted\r\n" * 1000):
                    pass
        slow = connect()
        for byte in b"*1\r\n$4\r\nPI":
            slow.sendall(bytes([byte]))
            stage.hold(0.02, 0.1)
    reset(stage)
    stage.network.heal()
    with RespConnection(stage.cluster.address(stage.cluster.primary())) as connection:
        assert connection.ask("PING") == "PONG"


# ---- The table ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class FaultClass:
    """A kind of trouble, and the cluster that it is made for."""

    name: str
    rounds: tuple[Callable[[Stage], None], ...]  # one of them each time
    nodes: int = 3
    server_args: tuple[str, ...] = ()
    server_script: Path = SERVER_SCRIPT
    # What the nodes may log as an error, besides what any failing neighbour makes them say.
    expected: tuple[str, ...] = ()


DISK_WORDS: Final = ("File too large", "Errno 27", "can't be saved")
STALL_WORDS: Final = ("the disk hangs",)
FULL_WORDS: Final = ("the disk is", "the disk hangs", "No space left", "can't be saved")
DAMAGE_WORDS: Final = ("can't start", "damaged", "checksum")

SINGLE: Final = (
    FaultClass("kill-primary", (kill_primary,)),
    FaultClass("kill", (kill,)),
    FaultClass("pause", (pause,)),
    FaultClass("partition", (partition,)),
    FaultClass("one-way", (one_way,)),
    FaultClass("ring", (chain, swizzle), nodes=5),
    FaultClass("chain", (chain, swizzle)),
    FaultClass("delay", (delay,)),
    FaultClass("loss", (loss,)),
    FaultClass("snapshot", (snapshot,), server_args=SMALL_LOG),
    FaultClass("disk-error", (disk_error,), expected=DISK_WORDS),
    FaultClass("disk-stall", (disk_stall,), server_script=STALLING_SERVER, expected=STALL_WORDS),
    FaultClass("disk-full", (disk_full,), server_args=SMALL_LOG, expected=FULL_WORDS),
    FaultClass("damage", (damage,), expected=DAMAGE_WORDS),
    FaultClass("wipe", (wipe,)),
    FaultClass("members", (members,)),
    FaultClass("transfer", (transfer, transfer_unheard)),
    FaultClass("clients", (clients, reset), server_args=MANY_CLIENTS),
    FaultClass("memory", (memory,), server_args=SMALL_MEMORY),
    FaultClass("restart-all", (restart_all,)),
)
# Those that need a cluster, a server or rights of their own.
APART: Final = ("ring", "memory", "disk-stall", "disk-full")
CLASSES: Final = (
    *SINGLE,
    FaultClass(
        "mixed",
        tuple(r for c in SINGLE for r in c.rounds if c.name not in APART),
        server_args=SMALL_LOG + MANY_CLIENTS,
        expected=DISK_WORDS + DAMAGE_WORDS,
    ),
)


def repeat(fault: FaultClass, stage: Stage) -> int:
    """Round after round until the time is over; how many there were."""
    count = 0
    while time.monotonic() < stage.until:
        stage.rng.choice(fault.rounds)(stage)
        count += 1
        stage.heal()
        stage.hold(0.2, 0.8)
    return count
