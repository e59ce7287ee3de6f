"""How members come and go and the leadership is handed over: the rounds of chaos about a cluster's shape.

The letters are those of the fault model; what a round may do is in ``chaos_stage.py``.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Final

from cluster_manager import ManagerError
from tests.chaos_links import INSIDE, Weather
from tests.chaos_stage import Stage
from tests.cluster import LineConnection, eventually

# Less than the election timeout: heartbeats are answered late, but not too late.
NEWS_LATE_S: Final = 0.6


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
