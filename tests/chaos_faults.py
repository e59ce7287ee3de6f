"""How processes, links and clients fail: the rounds of chaos that come from outside of the disks.

The letters are those of the fault model; what a round may do is in ``chaos_stage.py``.
"""

from __future__ import annotations

import contextlib
import resource
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import psutil

from tests.chaos_links import CLIENT, Weather
from tests.chaos_stage import CUT, ELECTION_TIMEOUT_S, CannotTestError, Stage, end
from tests.cluster import ANSWER_S, RespConnection

IDLE_COUNT: Final = 10_000
IDLE_THREADS: Final = 8
IDLE_WITHIN_S: Final = 60.0


# ---- Processes ---------------------------------------------------------------------------------


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
