"""Acceptance: what a cluster promises, held against real processes.

    python test_replication.py -v            # or: python -m pytest test_replication.py

Rule 1: every test starts from three healthy nodes of its own cluster, on free ports and in a
temporary directory; no cluster needs to run, and one that does is not touched.
Rule 2: nodes fail as they do in life: SIGKILL for a crash, SIGSTOP for a hang.
Rule 3: what a client was told is what counts: an OK has to be there afterwards, whatever happened.

The parts have tests of their own in ``tests/``. Read on in ``tests/cluster.py``.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
import threading
import time
import unittest
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import ClassVar, Final

from cluster_manager import ClusterManager
from kv_client import JSONValue
from kv_errors import KVError, MismatchError, NotPrimaryError
from raft_frames import Hello
from raft_transport import PeerLink, PeerListener
from raft_types import (
    Entry,
    EntryKind,
    HardState,
    Identity,
    Member,
    MemberId,
    Membership,
    Message,
    VoteReply,
    VoteRequest,
    new_id,
)
from replication_log import ReplicationLog
from tests.cluster import (
    PATIENCE_S,
    SHORT_TIMERS,
    Answer,
    Cluster,
    LineConnection,
    TermWatch,
    eventually,
)

with contextlib.suppress(ImportError):  # unittest is enough to run this file
    import pytest

    pytestmark = [pytest.mark.cluster, pytest.mark.slow]

# A write answered OK is applied by the secondaries within this. Usual are a few milliseconds;
# it has to be less than the heartbeat interval, since they shall not learn of it by that.
REPLICATION_S_MAX: Final = 1.0
# The default timers, as README.md promises them.
HEARTBEAT_S: Final = 2.0
ELECTION_TIMEOUT_S: Final = (5.0, 8.0)
# Two rounds of votes and the new primary's first entry on two disks, on a machine that is busy.
ELECTION_S_MAX: Final = 1.0
# A client asks another node after a third of this without an answer: hung primaries show thus.
IMPATIENT_S: Final = 4.5
KILL_TO_PRIMARY_S_MAX: Final = 1.0


class ClusterTestCase(unittest.TestCase):
    """One cluster for all tests of a class; each finds it healthy."""

    server_args: ClassVar[Sequence[str]] = ()
    cluster: ClassVar[Cluster]

    @classmethod
    def setUpClass(cls) -> None:
        cls.cluster = cls.enterClassContext(Cluster(*cls.server_args))

    def setUp(self) -> None:
        self.cluster.heal()
        self.client = self.enterContext(self.cluster.client())
        self.primary = self.cluster.primary()
        self.secondaries = self.cluster.others(self.primary)

    def assert_applied_everywhere(self, index: int, within_s: float = PATIENCE_S) -> None:
        """All nodes have applied the log up to ``index``, and hold the same data."""

        def applied() -> bool:
            statuses = map(self.cluster.status, self.cluster.node_ids)
            return all(status and status["applied_index"] >= index for status in statuses)

        self.cluster.eventually(applied, f"index {index} is applied by all", within_s)
        self.cluster.in_step()

    def stale_reads(self, node_id: str, *argv: str) -> object:
        """What the node itself holds, without asking the primary."""
        with self.cluster.resp(node_id) as connection:
            self.assertEqual(connection.ask("READONLY"), "OK")
            return connection.ask(*argv)


class TestKVStoreReplication(ClusterTestCase):
    """Roles, redirects, and data that is the same on every node. The default timers."""

    def test_roles_one_primary_and_two_secondaries_that_agree_on_it(self) -> None:
        statuses = [self.cluster.ask(node_id, "STATUS") for node_id in self.cluster.node_ids]

        roles = sorted(status["role"] for status in statuses)
        self.assertEqual(roles, ["PRIMARY", "SECONDARY", "SECONDARY"])
        self.assertEqual({s["primary"]["node_id"] for s in statuses}, {self.primary})
        self.assertEqual({s["cluster_id"] for s in statuses}, {statuses[0]["cluster_id"]})
        self.assertEqual({(s["voters"], s["failures_tolerated"]) for s in statuses}, {(3, 1)})

    def test_primary_answers_reads_and_writes(self) -> None:
        written = self.cluster.ask(self.primary, "SET greeting hello world")
        read = self.cluster.ask(self.primary, "GET greeting")

        self.assertEqual(written["status"], "OK")
        self.assertEqual((read["status"], read["value"]), ("OK", "hello world"))
        self.assertEqual(read["version"], written["version"])

    def test_secondary_refuses_a_write_and_names_the_primary(self) -> None:
        for node_id in self.secondaries:
            answer = self.cluster.ask(node_id, "SET refused value")

            self.assert_redirect(answer, "This node is not primary. Writes not allowed.")
        self.assertEqual(self.cluster.ask(self.primary, "GET refused")["status"], "NOT_FOUND")

    def test_secondary_refuses_a_read_and_names_the_primary(self) -> None:
        self.client.set("readable", "at the primary")
        for node_id in self.secondaries:
            answer = self.cluster.ask(node_id, "GET readable")

            self.assert_redirect(answer, "This node is not primary. Reads not allowed.")

    def assert_redirect(self, answer: Answer, message: str) -> None:
        host, port = self.cluster.address(self.primary)
        self.assertEqual(
            answer,
            {
                "status": "ERROR",
                "code": "NOT_PRIMARY",
                "message": message,
                "primary": {"node_id": self.primary, "host": host, "port": port},
            },
        )

    def test_secondary_redirects_a_redis_client_with_moved(self) -> None:
        for node_id, request in itertools.product(
            self.secondaries, (("GET", "k"), ("SET", "k", "v"))
        ):
            with self.cluster.resp(node_id) as connection:
                reply = connection.ask(*request)

            self.assertIsInstance(reply, NotPrimaryError)
            assert isinstance(reply, NotPrimaryError)
            self.assertEqual((reply.host, reply.port), self.cluster.address(self.primary))

    def test_secondary_answers_stale_reads_to_who_asks_for_them(self) -> None:
        version = self.cluster.ask(self.primary, "SET shared 42")["version"]
        self.assert_applied_everywhere(version)

        for node_id in self.secondaries:
            self.assertEqual(self.stale_reads(node_id, "GET", "shared"), b"42")

    def test_set_reaches_every_secondary_within_a_second(self) -> None:
        answer = self.cluster.ask(self.primary, "SET replicated soon")

        self.assert_applied_everywhere(answer["version"], within_s=REPLICATION_S_MAX)
        for node_id in self.secondaries:
            self.assertEqual(self.stale_reads(node_id, "GET", "replicated"), b"soon")

    def test_delete_reaches_every_secondary_within_a_second(self) -> None:
        version = self.cluster.ask(self.primary, "SET doomed value")["version"]
        self.assert_applied_everywhere(version)

        answer = self.cluster.ask(self.primary, "DELETE doomed")

        self.assertEqual(answer["status"], "OK")
        self.assert_applied_everywhere(version + 1, within_s=REPLICATION_S_MAX)
        for node_id in self.secondaries:
            self.assertIsNone(self.stale_reads(node_id, "GET", "doomed"))
        self.assertEqual(self.cluster.ask(self.primary, "DELETE doomed")["status"], "NOT_FOUND")

    def test_json_comes_back_as_json_and_is_the_same_everywhere(self) -> None:
        value: JSONValue = {
            "name": "Zoë",
            "tags": ["a", 1, None, 2.5],
            "deep": {"er": [[]]},
            "ok": True,
        }

        self.client.set("document", value)

        self.assertEqual(self.client.get("document"), value)
        line = f"SET document {json.dumps(value)}"
        version = self.cluster.ask(self.primary, line)["version"]
        self.assertEqual(self.cluster.ask(self.primary, "GET document")["value"], value)
        self.assert_applied_everywhere(version)
        for node_id in self.secondaries:
            stored = self.stale_reads(node_id, "GET", "document")
            assert isinstance(stored, bytes)
            self.assertEqual(json.loads(stored), value)

    def test_large_binary_value_is_replicated_unchanged(self) -> None:
        value = bytes(range(256)) * 4096  # 1 MiB with every byte in it

        with self.cluster.resp(self.primary) as connection:
            self.assertEqual(connection.ask(b"SET", b"binary\x00key", value), "OK")
            self.assertEqual(connection.ask(b"GET", b"binary\x00key"), value)
        self.cluster.in_step()
        for node_id in self.secondaries:
            self.assertEqual(self.stale_reads(node_id, "GET", "binary\x00key"), value)

    def test_overwritten_value_has_a_higher_version_everywhere(self) -> None:
        first = self.cluster.ask(self.primary, "SET again 1")["version"]
        second = self.cluster.ask(self.primary, "SET again 2")["version"]

        self.assertGreater(second, first)
        self.assert_applied_everywhere(second)
        for node_id in self.secondaries:
            self.assertEqual(self.stale_reads(node_id, "GETS", "again"), [b"2", second])

    def test_concurrent_clients_lose_none_of_their_writes(self) -> None:
        names = [f"client{c}:{i}" for c in range(8) for i in range(50)]

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: self.client.set(name, name), names))

        self.assertEqual(self.client.mget(names), names)
        self.cluster.in_step()
        for node_id in self.secondaries:
            stored = self.stale_reads(node_id, "MGET", *names)
            self.assertEqual(stored, [name.encode() for name in names])

    def test_concurrent_increments_are_all_counted(self) -> None:
        self.client.delete("counter")

        with ThreadPoolExecutor(8) as pool:
            seen = list(pool.map(lambda _: self.client.incr("counter"), range(400)))

        self.assertEqual(sorted(seen), list(range(1, 401)))

    def test_of_concurrent_compare_and_sets_exactly_one_wins(self) -> None:
        self.client.set("contested", "free")
        found = self.client.gets("contested")
        assert found is not None

        def try_it(number: int) -> bool:
            try:
                self.client.cas("contested", number, found.version)
            except MismatchError:
                return False
            return True

        with ThreadPoolExecutor(8) as pool:
            wins = list(pool.map(try_it, range(40)))

        self.assertEqual(wins.count(True), 1)
        self.assertEqual(self.client.get("contested"), wins.index(True))

    def test_expired_key_is_gone_on_every_node(self) -> None:
        self.client.set("fleeting", "value", ttl_s=0.2)

        def gone() -> bool:
            held = [self.stale_reads(n, "EXISTS", "fleeting") for n in self.cluster.node_ids]
            return held == [0, 0, 0]

        self.cluster.eventually(gone, "the key has expired everywhere")
        self.assertIsNone(self.client.get("fleeting"))
        self.cluster.in_step()

    def test_restarted_secondary_catches_up_with_what_it_missed(self) -> None:
        victim = self.secondaries[0]
        self.cluster.kill(victim)
        for i in range(200):
            self.client.set(f"missed:{i}", i)
        version = self.cluster.ask(self.primary, "SET missed:last 1")["version"]

        self.cluster.start(victim)

        self.assert_applied_everywhere(version)
        self.assertEqual(self.stale_reads(victim, "GET", "missed:199"), b"199")
        self.assertEqual(self.cluster.ask(victim, "STATUS")["role"], "SECONDARY")


# ---- Elections ---------------------------------------------------------------------------------


class TestLeaderElection(ClusterTestCase):
    """Who leads, and when. Short timers, where the time itself is not what is tested."""

    server_args: ClassVar[Sequence[str]] = SHORT_TIMERS

    def test_killed_primary_is_replaced_within_a_second_with_the_default_timers(self) -> None:
        with Cluster() as cluster:
            old = cluster.primary()
            cluster.kill(old)
            elapsed_s = seconds_until_replaced(cluster, old)

        self.assertLess(elapsed_s, KILL_TO_PRIMARY_S_MAX)

    def test_hung_primary_is_replaced_within_5_to_8_s_with_the_default_timers(self) -> None:
        shortest_s, longest_s = ELECTION_TIMEOUT_S
        with Cluster() as cluster:
            old = cluster.primary()
            cluster.suspend(old)
            elapsed_s = seconds_until_replaced(cluster, old)

        # The timeout runs from the last heartbeat, which may be one interval before the hang.
        self.assertGreater(elapsed_s, shortest_s - HEARTBEAT_S)
        self.assertLess(elapsed_s, longest_s + ELECTION_S_MAX)

    def test_primary_that_is_told_to_stop_is_replaced_without_an_election_timeout(self) -> None:
        """With the default timers, of which the shortest election timeout is far longer."""
        with Cluster() as cluster:
            old = cluster.primary()
            process = cluster.process(old)
            assert process is not None
            process.terminate()
            elapsed_s = seconds_until_replaced(cluster, old)

            self.assertEqual(process.wait(PATIENCE_S), 0)
        self.assertLess(elapsed_s, ELECTION_TIMEOUT_S[0] / 2)

    def test_old_primary_comes_back_as_a_secondary_and_catches_up(self) -> None:
        self.client.set("before", 1)
        self.cluster.kill(self.primary)
        new = self.cluster.primary(among=self.secondaries)
        version = self.cluster.ask(new, "SET after 2")["version"]

        self.cluster.start(self.primary)

        self.assert_applied_everywhere(version)
        old = self.cluster.ask(self.primary, "STATUS")
        self.assertEqual((old["role"], old["primary"]["node_id"]), ("SECONDARY", new))
        self.assertEqual(self.stale_reads(self.primary, "MGET", "before", "after"), [b"1", b"2"])

    def test_primary_that_hung_answers_nothing_old_when_it_is_back(self) -> None:
        """It believes to lead until it hears of the others, also for what has waited meanwhile."""
        self.client.set("owner", "old")
        address = self.cluster.address(self.primary)
        with LineConnection(address) as reader, LineConnection(address) as writer:
            reader.ask("PING")
            writer.ask("PING")
            self.cluster.suspend(self.primary)
            new = self.cluster.primary(among=self.secondaries)
            self.assertEqual(self.cluster.ask(new, "SET owner new")["status"], "OK")
            reader.send("GET owner")
            writer.send("SET owner late")

            self.cluster.resume(self.primary)
            read, written = reader.answer(), writer.answer()

        # None: the connection was closed, which tells nothing.
        if read is not None:
            self.assertNotEqual(read.get("value"), "old")
        if written is not None:
            self.assertNotEqual(written["status"], "OK")
        self.cluster.in_step()
        self.assertEqual(self.cluster.ask(self.primary, "STATUS")["role"], "SECONDARY")
        self.assertEqual(self.client.get("owner"), "new")

    def test_primary_without_a_majority_stops_answering(self) -> None:
        self.client.set("before", 1)
        self.cluster.suspend(*self.secondaries)

        # Stepping down, it closes its clients' connections, which may be one of these.
        def has_stepped_down() -> bool:
            status = self.cluster.status(self.primary)
            return status is not None and status["role"] != "PRIMARY"

        def refuses(line: str) -> bool:
            with contextlib.suppress(ConnectionError):
                self.assertEqual(self.cluster.ask(self.primary, line)["code"], "NO_PRIMARY")
                return True
            return False

        self.cluster.eventually(has_stepped_down, "it no longer leads")
        for line in ("GET before", "SET during 1"):
            self.cluster.eventually(partial(refuses, line), f"it answers {line}")

    def test_one_node_alone_refuses_reads_and_writes_but_tells_its_status(self) -> None:
        alone = self.secondaries[0]
        self.cluster.kill(self.primary, self.secondaries[1])

        def refuses() -> bool:
            answers = [self.cluster.ask(alone, line) for line in ("SET k v", "GET k")]
            return all(answer.get("code") == "NO_PRIMARY" for answer in answers)

        self.cluster.eventually(refuses, "the last node refuses to serve")
        status = self.cluster.ask(alone, "STATUS")
        self.assertEqual(status["status"], "OK")
        self.assertNotEqual(status["role"], "PRIMARY")

        self.cluster.start(self.primary)
        self.assertTrue(self.client.set("k", "two of three are enough"))

    def test_no_term_has_two_primaries_and_no_node_goes_back_in_terms(self) -> None:
        """Election safety (paper 5.2), seen from outside while primaries are killed and hang."""
        with TermWatch(self.cluster) as watch:
            for fail in (self.cluster.kill, self.cluster.suspend, self.cluster.kill):
                old = watch.await_primary()
                fail(old)
                self.cluster.primary(among=self.cluster.others(old))
                self.cluster.heal()
            watch.await_primary()

        self.assertGreaterEqual(len(watch.primaries), 4)
        for term, node_ids in watch.primaries.items():
            self.assertEqual(len(node_ids), 1, f"term {term} had {node_ids}")
        for node_id, terms in watch.terms.items():
            self.assertEqual(terms, sorted(terms), node_id)

    def test_node_that_has_voted_votes_for_no_other_in_that_term_nor_after_a_restart(self) -> None:
        """Paper 5.2: at most one vote a term; figure 2: votedFor is on disk before the answer."""
        electorate = self.enterContext(Electorate())
        a, b = electorate.candidates

        self.assertTrue(a.asks_for_vote(term=7).granted)
        self.assertFalse(b.asks_for_vote(term=7).granted)

        electorate.restart_voter()

        self.assertFalse(b.asks_for_vote(term=7).granted)
        self.assertTrue(a.asks_for_vote(term=7).granted, "it may say the same again")
        self.assertTrue(b.asks_for_vote(term=8).granted, "a new term is a new vote")

    def test_node_votes_for_no_candidate_whose_log_is_behind_its_own(self) -> None:
        """Paper 5.4.1: the later last term wins, then the longer log."""
        a, b = self.enterContext(Electorate()).candidates

        self.assertFalse(a.asks_for_vote(term=7, last_term=2, last_index=99).granted)
        self.assertFalse(a.asks_for_vote(term=7, last_term=3, last_index=1).granted)
        self.assertTrue(b.asks_for_vote(term=7, last_term=3, last_index=2).granted)

    def test_node_tells_a_candidate_of_a_past_term_the_present_one(self) -> None:
        """Paper figure 2: reply false if term < currentTerm; also after a restart."""
        electorate = self.enterContext(Electorate())
        a, b = electorate.candidates
        self.assertTrue(a.asks_for_vote(term=9).granted)

        electorate.restart_voter()
        reply = b.asks_for_vote(term=8)

        self.assertFalse(reply.granted)
        self.assertEqual(reply.term, 9)


def seconds_until_replaced(cluster: Cluster, old: str) -> float:
    """From now until another node leads and has acknowledged a write."""
    began_s = time.monotonic()
    new = cluster.primary(among=cluster.others(old))
    answer = cluster.ask(new, "SET survives 1")
    elapsed_s = time.monotonic() - began_s
    assert answer["status"] == "OK", answer
    return elapsed_s


class Electorate:
    """A real node, and two fellow voters that the test plays over the peers' protocol."""

    def __init__(self) -> None:
        self.candidates = (Candidate("a"), Candidate("b"))
        self._directory = tempfile.TemporaryDirectory(prefix="kv-voter-")
        # It shall not campaign itself, so its election timeout is longer than the test.
        timers = ("--election-timeout", "60-90")
        self._manager = ClusterManager(1, None, Path(self._directory.name), timers)

    def __enter__(self) -> Electorate:
        (node,) = self._manager.nodes
        cluster_id = new_id()
        voter = Member(new_id(), node.node_id, *node.address, node.peer_port, voter=True)
        members = Membership((voter, *(candidate.member for candidate in self.candidates)))
        disk = ReplicationLog(node.directory)
        disk.save_identity(Identity(cluster_id, voter.member_id, voter.node_id))
        first = Entry(1, 1, EntryKind.MEMBERSHIP, members.encode())
        disk.append(HardState(3, None), [first, Entry(2, 3, EntryKind.NOOP, b"")])
        disk.close()
        self._manager.start_node(node.node_id)
        for candidate in self.candidates:
            candidate.begin(cluster_id, voter)
        return self

    def __exit__(self, *error: object) -> None:
        for candidate in self.candidates:
            candidate.close()
        self._manager.kill_node("node1")
        self._directory.cleanup()

    def restart_voter(self) -> None:
        """kill -9, and again from its disk."""
        self._manager.kill_node("node1")
        self._manager.start_node("node1")


class Candidate:
    """A member of the cluster that only ever asks for votes; the ``PeerHandler`` of its port."""

    def __init__(self, name: str) -> None:
        self._boot_id = new_id()
        self._replies: list[VoteReply] = []
        self._listener = PeerListener(
            "127.0.0.1", 0, boot_id=self._boot_id, lease_reads=False, on_fatal=self._on_fatal
        )
        peer_port = self._listener.address[1]
        self.member = Member(new_id(), name, "127.0.0.1", 1, peer_port, voter=True)
        self.identity = Identity("", self.member.member_id, name)
        self._link: PeerLink | None = None

    def close(self) -> None:
        """Hang up."""
        if self._link is not None:
            self._link.close()
        self._listener.close()

    def begin(self, cluster_id: str, voter: Member) -> None:
        """Listen, and dial the node."""
        self.identity = self.identity._replace(cluster_id=cluster_id)
        self._listener.start(self)
        self._voter_id = voter.member_id
        self._link = PeerLink(
            self.identity,
            voter,
            address=self._listener.address,
            boot_id=self._boot_id,
            lease_reads=False,
            source=lambda member_id, may_wait: None,
            on_up=lambda member_id: None,
            on_peer_dead=lambda member_id: None,
            on_fatal=self._on_fatal,
        )
        self._link.start()

    def asks_for_vote(self, term: int, last_index: int = 100, last_term: int = 6) -> VoteReply:
        """The node's reply. Asked again until it comes: a link may lose what is sent."""
        assert self._link is not None
        link, me = self._link, self.member.member_id
        self._replies.clear()

        def reply() -> VoteReply | None:
            link.post(VoteRequest(me, self._voter_id, term, last_index, last_term, pre_vote=False))
            return next((r for r in self._replies if r.term >= term or not r.granted), None)

        return eventually(reply, f"{self.member.node_id} has an answer for term {term}")

    def on_connected(self, hello: Hello) -> None:
        """The node has dialled back, for its answers."""

    def on_disconnected(self, member_id: MemberId) -> None:
        """The node is gone."""

    def on_messages(self, messages: Sequence[Message]) -> None:
        self._replies += [m for m in messages if isinstance(m, VoteReply) and not m.pre_vote]

    @staticmethod
    def _on_fatal(error: BaseException) -> None:
        raise AssertionError("a peer thread of the test died") from error


# ---- Consistency -------------------------------------------------------------------------------


class Load:
    """Clients that write keys of their own, as fast as they are answered, until the block ends."""

    CLIENTS = 4

    def __init__(self, cluster: Cluster, name: str) -> None:
        self._cluster = cluster
        self._name = name
        self._stop = threading.Event()
        # Appended to by all; one step, so no lock is needed.
        self.acknowledged: list[str] = []
        self.refused: list[KVError] = []
        self._threads = [
            threading.Thread(target=self._write, args=(number,), name=f"load-{number}")
            for number in range(self.CLIENTS)
        ]

    def _write(self, number: int) -> None:
        with self._cluster.client(IMPATIENT_S) as client:
            for i in itertools.count():
                if self._stop.is_set():
                    return
                key = f"{self._name}:{number}:{i}"
                try:
                    client.set(key, key)
                except KVError as error:  # who was told no OK was promised nothing
                    self.refused.append(error)
                else:
                    self.acknowledged.append(key)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        self.await_more(200)
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def await_more(self, count: int = 200) -> None:
        """Wait until that many more writes are acknowledged."""
        target = len(self.acknowledged) + count
        self._cluster.eventually(
            lambda: len(self.acknowledged) >= target, f"{count} more writes are acknowledged"
        )


class TestClusterConsistency(ClusterTestCase):
    """No acknowledged write is lost and no answer is stale, whatever fails. Short timers."""

    server_args: ClassVar[Sequence[str]] = SHORT_TIMERS

    def assert_holds(self, keys: Iterable[str]) -> None:
        """Every key is read through the primary, and is on every node."""
        wanted = list(keys)
        self.assertGreater(len(wanted), 0)
        for chunk in _chunks(wanted, 500):
            self.assertEqual(self.client.mget(chunk), chunk, "acknowledged writes are lost")
        self.cluster.in_step()
        for node_id in self.cluster.node_ids:
            for chunk in _chunks(wanted, 500):
                stored = self.stale_reads(node_id, "MGET", *chunk)
                self.assertEqual(stored, [key.encode() for key in chunk], node_id)

    def test_primary_killed_under_load_loses_no_acknowledged_write(self) -> None:
        with Load(self.cluster, "kill") as load:
            for _ in range(3):
                self.cluster.kill(self.cluster.primary())
                load.await_more()
                self.cluster.heal()

        self.assert_holds(load.acknowledged)

    def test_primary_that_hangs_under_load_and_returns_loses_no_acknowledged_write(self) -> None:
        with Load(self.cluster, "hang") as load:
            old = self.cluster.primary()
            self.cluster.suspend(old)
            self.cluster.primary(among=self.cluster.others(old))
            load.await_more()
            self.cluster.resume(old)
            load.await_more()

        self.assert_holds(load.acknowledged)

    def test_all_nodes_killed_at_once_under_load_keep_every_acknowledged_write(self) -> None:
        with Load(self.cluster, "all") as load:
            self.cluster.kill(*self.cluster.node_ids)
            self.cluster.heal()
            load.await_more()

        self.assert_holds(load.acknowledged)

    def test_secondary_killed_under_load_is_not_noticed_by_clients(self) -> None:
        with Load(self.cluster, "secondary") as load:
            self.cluster.kill(self.cluster.secondaries()[0])
            load.await_more()
            self.cluster.heal()

        self.assertEqual(load.refused, [])
        self.assert_holds(load.acknowledged)

    def test_counter_counts_every_acknowledged_increment_once_across_a_failover(self) -> None:
        """An increment whose answer was lost is asked for again under its serial."""
        self.client.delete("hits")
        acknowledged: list[int] = []
        stop = threading.Event()

        def count() -> None:
            while not stop.is_set():
                acknowledged.append(self.client.incr("hits"))

        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(count) for _ in range(4)]
            try:
                self.wait_for_more(acknowledged)
                self.cluster.kill(self.cluster.primary())
                self.wait_for_more(acknowledged)
            finally:
                stop.set()
        for future in running:
            future.result()

        self.assertEqual(len(set(acknowledged)), len(acknowledged), "no two saw the same number")
        self.assertEqual(self.client.incr("hits", 0), len(acknowledged))

    def test_no_read_is_older_than_an_acknowledged_write_while_primaries_change(self) -> None:
        """Linearizable reads (thesis 6.4), also from a primary that hung and believes to lead."""
        written = [0]  # acknowledged
        stop = threading.Event()
        stale: list[tuple[int, int]] = []
        reads: list[int] = []

        def write() -> None:
            with self.cluster.client(IMPATIENT_S) as client:
                for number in itertools.count(1):
                    if stop.is_set():
                        return
                    with contextlib.suppress(KVError):
                        client.set("register", number)
                        written.append(number)

        def read(node_id: str) -> None:
            # Straight at each node, as clients would that have not heard of a new primary.
            while not stop.is_set():
                at_least = written[-1]
                with contextlib.suppress(OSError):
                    value = self.cluster.ask(node_id, "GET register").get("value")
                    if isinstance(value, int):
                        reads.append(value)
                        if value < at_least:
                            stale.append((at_least, value))

        self.client.set("register", 0)
        with ThreadPoolExecutor(4) as pool:
            running = [pool.submit(write), *(pool.submit(read, n) for n in self.cluster.node_ids)]
            try:
                for fail in (self.cluster.suspend, self.cluster.kill):
                    old = self.cluster.primary()
                    self.wait_for_more(reads)
                    fail(old)
                    self.wait_for_more(written)
                    self.wait_for_more(reads)
                    self.cluster.heal()
            finally:
                stop.set()
        for future in running:
            future.result()

        self.assertEqual(stale, [])

    def wait_for_more(self, gathered: Sequence[object], count: int = 50) -> None:
        """Wait until ``gathered`` has grown by ``count``."""
        target = len(gathered) + count
        self.cluster.eventually(lambda: len(gathered) >= target, "clients get on")

    def test_nodes_of_equal_applied_index_hold_equal_state_after_failovers(self) -> None:
        with Load(self.cluster, "hash") as load:
            old = self.cluster.primary()
            self.cluster.kill(old)
            load.await_more()
            self.cluster.start(old)
            load.await_more()

        self.cluster.heal()
        status = self.cluster.in_step()  # compares the hashes
        self.assertGreaterEqual(status["keys"], len(load.acknowledged))
        for node_id in self.cluster.node_ids:
            self.assertIsNone(self.cluster.ask(node_id, "STATUS")["trouble"])


def _chunks(keys: Sequence[str], size: int) -> list[list[str]]:
    return [list(keys[i : i + size]) for i in range(0, len(keys), size)]


if __name__ == "__main__":
    unittest.main()
