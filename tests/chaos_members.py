"""How members come and go and the leadership is handed over: the rounds of chaos about a cluster's shape.

The letters are those of the fault model; what a round may do is in ``chaos_stage.py``.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from cluster_manager import ManagerError
from tests.chaos_disks import fill, unfill
from tests.chaos_links import CLIENT, FAIR, INSIDE, Weather
from tests.chaos_stage import CUT, NotDoneError, Stage
from tests.cluster import Answer, LineConnection, eventually

# Less than the election timeout: heartbeats are answered late, but not too late.
NEWS_LATE_S: Final = 0.6
# So long clients are held back, until all that they wrote is on all nodes.
QUIET_S: Final = (0.1, 0.3)
UNHEARD_TRIES: Final = 5
REMOVED_WITHIN_S: Final = 5.0
# A large value takes so long that the next ones wait, and heartbeats still come in time.
SLOW_BYTES_PER_S: Final = 150_000
LAG_ENTRIES: Final = 3


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
    try:
        cluster.manager.remove(leaving, report=stage.tell)
    except ManagerError as error:  # it says no rather than risk a majority
        stage.heal()
        if leaving in cluster.node_ids:
            raise NotDoneError(f"remove {leaving} refused: {error}") from error
    stage.hold(0.0, 0.5)
    stage.network.heal()
    with socket.create_server((INSIDE, peer_port)):
        _add(stage, leaving)


def _add(stage: Stage, node_id: str) -> None:
    """As soon as it is let in."""
    _until_done(stage, "add", stage.cluster.manager.add, node_id)


def _until_done(stage: Stage, what: str, change: Callable[..., None], node_id: str) -> None:
    """Ask the manager for this change of a node until it is not refused."""

    def is_done() -> bool:
        try:
            change(node_id, report=stage.tell)
        except ManagerError as error:
            stage.tell(f"{what} {node_id} refused: {error}")
            return False
        return True

    stage.cluster.eventually(is_done, f"{what} {node_id}")


def _elected(stage: Stage, dead: str) -> str:
    """Who says first that it leads now; it has committed nothing of its own yet."""
    cluster = stage.cluster

    def leads() -> str | None:
        for node_id in cluster.others(dead):
            if (cluster.status(node_id) or {}).get("role") == "PRIMARY":
                return node_id
        return None

    elected = cluster.eventually(leads, "one is elected")
    stage.tell(f"{elected} is elected")
    return elected


def members_after_election(stage: Stage) -> None:
    """F12: who is just elected is told to let two members go, back to back; then they come again."""
    cluster = stage.cluster
    dead = cluster.primary()
    stage.tell(f"kill {dead}, the primary")
    cluster.kill(dead)
    elected = _elected(stage, dead)
    leaving = [dead, stage.one(cluster.others(dead, elected))]
    try:
        for node_id in leaving:
            _remove_at_once(stage, elected, node_id)
    finally:
        listed = {member["node_id"] for member in _members(stage)}
        gone = [node_id for node_id in leaving if node_id not in listed]
        for node_id in gone:
            _add(stage, node_id)
    if gone != leaving:
        raise NotDoneError(f"of {leaving} only {gone} were removed")


def _remove_at_once(stage: Stage, primary: str, node_id: str) -> None:
    """Ask until it is done, without a pause: a change waits for the one before, and for a no-op."""
    answers: list[str] = []

    def removed() -> bool:
        try:
            answer = stage.cluster.ask(primary, f"MEMBER REMOVE {node_id}")
        except OSError as error:
            answer = {"status": str(error)}
        answers.append(str(answer.get("code", answer["status"])))
        return answers[-1] in ("OK", "NOTPRIMARY")

    with contextlib.suppress(AssertionError):
        eventually(removed, f"{node_id} is removed", REMOVED_WITHIN_S)
    stage.tell(f"remove {node_id}: {answers}")


def _members(stage: Stage) -> Sequence[Answer]:
    members: Sequence[Answer] = stage.cluster.ask(stage.cluster.primary(), "MEMBER LIST")["members"]
    return members


def replace(stage: Stage) -> None:
    """F12: a node is lost with its disk, the primary too, and replaced, right after the election."""
    cluster = stage.cluster
    primary = cluster.primary()
    lost = stage.one([primary, *cluster.node_ids])
    stage.tell(f"{lost} is lost (primary {primary})")
    cluster.kill(lost)
    shutil.rmtree(cluster.node(lost).directory)
    _elected(stage, lost)
    _until_done(stage, "replace", cluster.manager.replace, lost)


def transfer(stage: Stage) -> None:
    """F13: the leadership is handed over again and again, also to who is hung, or dead."""
    _hand_over_again(stage, ["well", "well", "well", "hung", "dead"])


def transfer_unpaused(stage: Stage) -> None:
    """F13: the same, and no process is paused."""
    _hand_over_again(stage, ["well", "well", "well", "dead"])


def _hand_over_again(stage: Stage, states: Sequence[str]) -> None:
    cluster = stage.cluster
    taken_over = 0
    for _ in range(stage.rng.randint(2, 5)):
        primary = cluster.primary()
        target = stage.one(cluster.others(primary))
        state = stage.rng.choice(states)
        if state == "hung":
            cluster.suspend(target)
        elif state == "dead":
            cluster.kill(target)
        stage.tell(f"hand over from {primary} to {target}, which is {state}")
        taken_over += _hand_over(stage, primary, target)["status"] == "OK"
        if state == "hung":
            cluster.resume(target)
        elif state == "dead":
            cluster.start(target)
        stage.hold(0.1, 0.7)
    if not taken_over:
        raise NotDoneError("nobody took over")


def _hand_over(stage: Stage, primary: str, target: str) -> Answer:
    """What the primary answers."""
    try:
        answer = stage.cluster.ask(primary, f"FAILOVER TO {target}")
    except OSError as error:
        answer = {"status": "UNKNOWN", "message": str(error)}
    stage.tell(f"{primary} answers {answer}")
    return answer


def transfer_lagging(stage: Stage) -> None:
    """F13: the leadership is handed to who lacks entries: it has to get them first, in time or not."""
    cluster = stage.cluster
    primary = cluster.primary()
    target = stage.one(cluster.others(primary))
    slow = Weather(bytes_per_s=SLOW_BYTES_PER_S)
    stage.weather("slow", [(primary, target)], slow)

    def lag() -> int:
        ends = [(cluster.status(n) or {}).get("last_index", 0) for n in (primary, target)]
        return int(ends[0] - ends[1])

    refusal = fill(stage, lambda: lag() >= LAG_ENTRIES)
    entries = lag()
    if refusal is not None or entries < 1:
        raise NotDoneError(f"{target} does not lag: {refusal}")
    stage.tell(f"hand over from {primary} to {target}, which lacks {entries} entries")
    if stage.rng.random() < 0.5:
        stage.network.heal()
    answer = _hand_over(stage, primary, target)
    stage.network.heal()
    unfill(stage)
    if answer["status"] != "OK" and "not taken over in time" not in answer.get("message", ""):
        raise NotDoneError(f"it was not handed over: {answer}")


def transfer_unheard(stage: Stage) -> None:
    """F13: the leadership is handed over, and who had it hears nothing of that for a while."""
    cluster = stage.cluster
    clients = stage.between([CLIENT], cluster.node_ids)

    def leads(node_id: str) -> bool:
        return (cluster.status(node_id) or {}).get("role") == "PRIMARY"

    for _ in range(UNHEARD_TRIES):
        primary = cluster.primary()
        others = cluster.others(primary)
        target = stage.one(others)
        # An entry under way would have to reach the target first, and the news that it has would
        # be late as well.
        stage.weather("quiet", clients, CUT)
        stage.hold(*QUIET_S)
        stage.weather("late", stage.between(others, [primary]), Weather(delay_s=NEWS_LATE_S))
        stage.tell(f"hand over from {primary} to {target}")
        with LineConnection(cluster.address(primary)) as connection:
            connection.send(f"FAILOVER TO {target}")
            with contextlib.suppress(AssertionError):
                eventually(partial(leads, target), f"{target} leads", within_s=NEWS_LATE_S / 2)
            unheard = leads(target) and leads(primary)
            stage.weather("clients are back", clients, FAIR)
            if unheard:
                stage.tell(f"{target} leads, and {primary} has not heard of it")
                stage.hold(NEWS_LATE_S, NEWS_LATE_S + 0.5)
                return
            stage.network.heal()
            with contextlib.suppress(OSError):
                stage.tell(f"{primary} answers {connection.answer()}")  # until then it is busy
    raise NotDoneError("who led heard of it, or who was to lead did so too late, each time")
