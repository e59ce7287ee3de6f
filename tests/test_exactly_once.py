"""Sessions as clients meet them: both languages, other people's libraries, nodes that are killed.

What the state machine does with them is in ``test_client_sessions.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import redis

from kv_errors import AnswerForgottenError, MismatchError, NoSessionError, NotPrimaryError
from kv_types import OK
from tests.cluster import SHORT_TIMERS, Answer, Cluster, LineConnection, RespConnection

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


@pytest.fixture(scope="module")
def single() -> Iterator[Cluster]:
    """One node that leads itself."""
    with Cluster(*SHORT_TIMERS, nodes=1) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def shared_trio() -> Iterator[Cluster]:
    """Three nodes for all tests of this module."""
    with Cluster(*SHORT_TIMERS) as cluster:
        yield cluster


@pytest.fixture
def trio(shared_trio: Cluster) -> Cluster:
    """Three nodes, all healthy when the test begins."""
    shared_trio.heal()
    return shared_trio


def opened(connection: RespConnection) -> str:
    session = connection.ask("SESSION", "OPEN")
    assert isinstance(session, int)
    return str(session)


# ---- Two languages -----------------------------------------------------------------------------


def test_resp_when_a_serial_comes_again_then_the_same_answer(single: Cluster) -> None:
    """Any client that can send words can have its writes done once."""
    with single.resp("node1") as connection:
        session = opened(connection)
        do = ("SESSION", "DO", session)
        assert connection.ask("DEL", "n") in (0, 1)

        for _ in range(3):
            assert connection.ask(*do, "1", "1", "INCR", "n") == 1
        assert connection.ask(*do, "2", "2", "set", "n", "x", "GET") == b"1"
        assert connection.ask(*do, "2", "2", "set", "n", "x", "GET") == b"1"
        assert isinstance(connection.ask(*do, "1", "1", "INCR", "n"), AnswerForgottenError)
        refused = connection.ask(*do, "3", "3", "CAS", "n", "0", "y")
        assert isinstance(refused, MismatchError)
        connection.ask("DEL", "n")
        again = connection.ask(*do, "3", "3", "CAS", "n", "0", "y")
        assert isinstance(again, MismatchError)
        assert (str(again), again.version) == (str(refused), refused.version)
        assert connection.ask("SESSION", "CLOSE", session) == 1
        assert isinstance(connection.ask(*do, "3", "3", "INCR", "n"), NoSessionError)


def test_pipeline_when_it_mixes_all_kinds_then_each_is_answered_in_its_place(
    single: Cluster,
) -> None:
    """Writes in sessions, writes without, reads and faults, in one piece."""
    with single.resp("node1") as connection:
        session = opened(connection)
        for request in (
            "SET n 5",
            f"SESSION DO {session} 1 1 INCR n",
            "INCR n",
            f"SESSION DO {session} 1 1 INCR n",
            f"SESSION DO {session} 2 1 GET n",
            "GET n",
        ):
            connection.send(*request.split())
        replies = connection.replies()

        assert [next(replies) for _ in range(4)] == [OK, 6, 7, 6]
        assert str(next(replies)) == "'get' is no write, and needs no session"
        assert next(replies) == b"7"


def test_lines_when_a_serial_comes_again_then_the_same_answer_and_version(single: Cluster) -> None:
    """A person with ``nc`` sees the fields of the command itself, as they were the first time."""
    with LineConnection(single.address("node1")) as connection:
        session = connection.ask("SESSION OPEN")["session"]

        first = connection.ask(f'SESSION DO {session} 1 1 SET k {{"a":  "b c"}}')
        assert connection.ask("GET k") == first | {"value": {"a": "b c"}}
        connection.ask("SET k other")
        assert connection.ask(f'session do {session} 1 1 set k {{"a":  "b c"}}') == first
        assert connection.ask("GET k")["value"] == "other"
        assert connection.ask(f"SESSION DO {session} 2 2 DELETE k") == {
            "status": "OK",
            "deleted": 1,
        }
        assert connection.ask(f"SESSION DO {session} 2 2 DELETE k")["deleted"] == 1
        assert connection.ask(f"SESSION DO {session} 1 1 DELETE k")["code"] == "FORGOTTEN"
        assert connection.ask(f"SESSION CLOSE {session}") == {"status": "OK", "closed": 1}
        assert connection.ask(f"SESSION DO {session} 3 3 DELETE k")["code"] == "NO_SESSION"


def test_redis_py_when_it_sends_serials_then_its_own_retries_are_harmless(single: Cluster) -> None:
    """An unmodified Redis library: what it repeats by itself after a lost connection counts once."""
    host, port = single.address("node1")
    with redis.Redis(host=host, port=port) as client:
        session = client.execute_command("SESSION", "OPEN")
        client.delete("hits")

        for serial in (1, 2, 2, 3, 3, 3):
            hits = client.execute_command("SESSION", "DO", session, serial, serial, "INCR", "hits")
            assert hits == serial


def test_status_when_sessions_are_open_then_tells_how_many(single: Cluster) -> None:
    """An operator sees when they pile up."""
    with LineConnection(single.address("node1")) as connection:
        before = connection.ask("STATUS")["sessions"]
        session = connection.ask("SESSION OPEN")["session"]
        assert connection.ask("STATUS")["sessions"] == before + 1
        connection.ask(f"SESSION CLOSE {session}")
        assert connection.ask("STATUS")["sessions"] == before


def test_memory_when_full_then_a_session_may_be_opened_to_delete_under() -> None:
    """What a write does is asked of the command that the session runs."""
    with (
        Cluster("--max-memory", "20kb", nodes=1) as cluster,
        LineConnection(cluster.address("node1")) as connection,
    ):
        assert connection.ask(f"SET k {'x' * 30_000}")["status"] == "OK"
        session = connection.ask("SESSION OPEN")["session"]

        refused = connection.ask(f"SESSION DO {session} 1 1 SET l v")
        assert refused["code"] == "OUT_OF_MEMORY"
        assert connection.ask(f"SESSION DO {session} 2 2 DELETE k")["deleted"] == 1
        assert connection.ask(f"SESSION DO {session} 3 3 SET l v")["status"] == "OK"


# ---- Several nodes -----------------------------------------------------------------------------


def test_serial_when_it_comes_again_to_the_next_primary_then_the_same_answer(
    trio: Cluster,
) -> None:
    """Every node knows what was done, not just the one that did it (fault-model M13)."""
    old = trio.primary()
    others = trio.others(old)
    with trio.resp(others[0]) as connection:
        assert isinstance(connection.ask("SESSION", "OPEN"), NotPrimaryError)
    answers: dict[str, Answer] = {}
    session = trio.ask(old, "SESSION OPEN")["session"]
    requests = [
        f"SESSION DO {session} 1 1 INCR once",
        f"SESSION DO {session} 2 1 APPEND once x",
        f"SESSION DO {session} 3 1 SET once-too a value",
        f"SESSION DO {session} 4 1 INCR once",
    ]
    for request in requests:
        answers[request] = trio.ask(old, request)
    assert answers[requests[3]]["code"] == "BAD_REQUEST"

    trio.kill(old)
    new = trio.primary(among=others)
    for request in requests:
        assert trio.ask(new, request) == answers[request]

    trio.heal()
    trio.kill(*trio.node_ids)  # what is known comes from the disks
    trio.heal()
    for request in requests:
        assert trio.ask(trio.primary(), request) == answers[request]
    assert trio.ask(trio.primary(), "GET once")["value"] == "1x"
    trio.in_step()
