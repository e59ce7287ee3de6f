"""Write, sync, answer: the order that promise G1 rests on, read from the system calls of real nodes.

The nodes run under strace. What it prints is taken for what it is: bytes that went to the log, bytes
that went to a socket, and which call had returned when the next was made.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from raft_frames import FrameDecoder, FrameError
from raft_types import AppendReply, Entry, HardState, Message, VoteReply, VoteRequest
from replication_log_format import RECORD_HEADER_BYTES, decode_payload, decode_record_header
from tests.cluster import PATIENCE_S, Cluster, eventually

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

CALLS = "pwrite64,pwritev2,fdatasync,fsync,sendto,sendmsg,write"
BYTES_SHOWN = 2000  # of each call: more than a record here, less than the zeros behind it
# Strace stops a node at each call.
CALM_TIMERS = ("--heartbeat-interval", "0.5", "--election-timeout", "2.5-4.0")
WRITES = 20

_BEGIN = re.compile(r"^(\d+) +(\d+\.\d+) (\w+)\((.*)$")
_RESUMED = re.compile(r"^(\d+) +(\d+\.\d+) <\.\.\. \w+ resumed>")
_TOOK = re.compile(r"<(\d+\.\d+)>$")
_TEXT = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')


class Call(NamedTuple):
    """A system call that has returned. Places are lines of strace's output, times are Unix time."""

    name: str
    begin: int
    begin_s: float
    end: int
    end_s: float
    arguments: str

    @property
    def data(self) -> bytes:
        """The first bytes that were given."""
        found = _TEXT.search(self.arguments)
        return _unescaped(found[1]) if found else b""

    @property
    def file(self) -> str:
        """What the first argument refers to."""
        return _unescaped(self.arguments.split(">", 1)[0].partition("<")[2]).decode()


def _unescaped(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def calls_of(path: Path) -> Iterator[Call]:
    """In the order in which they ended."""
    begun: dict[str, tuple[str, int, float, str]] = {}  # by thread
    for place, line in enumerate(path.read_text().splitlines()):
        if found := _BEGIN.match(line):
            thread, time_s, name, rest = found.groups()
            begun[thread] = name, place, float(time_s), rest
            if rest.endswith("<unfinished ...>"):
                continue
        elif not (found := _RESUMED.match(line)):
            continue
        thread, took = found[1], _TOOK.search(line)
        if thread not in begun or took is None:
            continue  # it was under way at the beginning, or at the end ("<detached ...>")
        name, begin, begin_s, arguments = begun.pop(thread)
        yield Call(name, begin, begin_s, place, begin_s + float(took[1]), arguments)


class Written(NamedTuple):
    """A record of the log that is safe: its write has returned, and a sync after that."""

    end: int
    end_s: float
    hard_state: HardState | None
    entries: list[Entry]


def safe_records(calls: Sequence[Call]) -> list[Written]:
    """The records that were written and synced."""
    safe: list[Written] = []
    pending: dict[str, list[bytes]] = defaultdict(list)
    for call in calls:
        if not call.file.endswith(".seg"):
            continue
        if call.name in ("pwrite64", "pwritev2"):
            pending[call.file].append(call.data)
        if call.name in ("fdatasync", "fsync") or "RWF_DSYNC" in call.arguments:
            for data in pending.pop(call.file, []):
                if (header := _record_header(data)) is not None:
                    length, kind, _ = header
                    payload = data[RECORD_HEADER_BYTES : RECORD_HEADER_BYTES + length]
                    safe.append(Written(call.end, call.end_s, *decode_payload(kind, payload)))
    return safe


def _record_header(data: bytes) -> tuple[int, int, int] | None:
    return decode_record_header(data, 0) if len(data) >= RECORD_HEADER_BYTES else None


class Trace:
    """What one node did, and who it is."""

    def __init__(self, path: Path, status: dict[str, object], members: Sequence[str]) -> None:
        self.calls = list(calls_of(path))
        self.records = safe_records(self.calls)
        self._last_index = int(str(status["last_index"]))  # when strace began
        self._term = int(str(status["term"]))
        self._me = str(status["member_id"])
        self._cluster_id = str(status["cluster_id"])
        self._others = [member for member in members if member != self._me]

    def sent(self) -> Iterator[tuple[Call, Message]]:
        """The messages to peers."""
        for call in self.calls:
            if call.name in ("sendto", "sendmsg") and call.data:
                for other in self._others:
                    decoder = FrameDecoder(self._cluster_id, sender=self._me, to=other)
                    decoder.feed(call.data)
                    try:
                        for message in decoder.take():
                            yield call, message
                    except FrameError:
                        pass  # to somebody else, a client, or a handshake

    def check_promises(self) -> Counter[type[Message]]:
        """Whatever it says of its disk is so before it is said (I9); what it said, how often."""
        count: Counter[type[Message]] = Counter()
        for call, message in self.sent():
            before = [record for record in self.records if record.end < call.begin]
            if isinstance(message, AppendReply) and message.success:
                there = {entry.index for record in before for entry in record.entries}
                claimed = set(range(self._last_index + 1, message.match_index + 1))
                assert claimed <= there, f"{message}: not synced by then: {claimed - there}"
                count[AppendReply] += len(claimed) > 0
            elif isinstance(message, VoteReply) and message.granted and not message.pre_vote:
                assert HardState(message.term, message.to) in self._states(before), message
                count[VoteReply] += 1
            elif isinstance(message, VoteRequest) and not message.pre_vote:
                assert HardState(message.term, self._me) in self._states(before), message
                count[VoteRequest] += 1
        return count

    @staticmethod
    def _states(records: Sequence[Written]) -> set[HardState]:
        return {record.hard_state for record in records if record.hard_state is not None}

    def written_s(self, key: str) -> float:
        """When this key's write was safe."""
        for record in self.records:
            if any(key.encode() in entry.data for entry in record.entries):
                return record.end_s
        return float("inf")


@contextmanager
def traced(process: psutil.Process, path: Path) -> Iterator[None]:
    """Strace watches the process meanwhile."""
    errors = path.with_suffix(".err")
    command = ["strace", "-f", "-ttt", "-T", "-y", "-xx", "-s", str(BYTES_SHOWN)]
    command += ["-e", f"trace={CALLS}", "-o", str(path), "-p", str(process.pid)]
    with errors.open("wb") as file:
        strace = subprocess.Popen(command, stderr=file)
    try:
        eventually(
            lambda: "attached" in errors.read_text() or strace.poll() is not None,
            "strace is there",
            explain=errors.read_text,
        )
        if strace.poll() is not None:
            pytest.skip(f"strace may not watch a process here: {errors.read_text().strip()}")
        yield
    finally:
        strace.terminate()
        strace.wait(PATIENCE_S)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
def test_answer_when_sent_then_a_majority_had_written_and_synced_before(tmp_path: Path) -> None:
    """Write, fdatasync, answer: to clients, to the primary, to candidates (I9, traps T1 and T4)."""
    with Cluster(*CALM_TIMERS) as cluster, ExitStack() as stack:
        cluster.in_step()
        statuses = {node_id: cluster.ask(node_id, "STATUS") for node_id in cluster.node_ids}
        for node_id in cluster.node_ids:
            process = cluster.process(node_id)
            assert process is not None
            stack.enter_context(traced(process, tmp_path / node_id))
        first = cluster.primary()
        with cluster.resp(first) as connection:
            for number in range(WRITES):
                assert connection.ask("SET", f"one-by-one-{number:02}", "v") == "OK"
            assert connection.ask("PING") == "PONG"  # strace has seen the end of what came before
        cluster.kill(first)
        assert cluster.ask(cluster.primary(), "SET after v")["status"] == "OK"
        stack.close()

    members = [str(status["member_id"]) for status in statuses.values()]
    traces = {n: Trace(tmp_path / n, statuses[n], members) for n in cluster.node_ids}
    answers = [call for call in traces[first].calls if call.data == b"+OK\r\n"]
    assert len(answers) == WRITES
    for number, answer in enumerate(answers):
        safe_s = sorted(trace.written_s(f"one-by-one-{number:02}") for trace in traces.values())
        assert safe_s[1] <= answer.begin_s, (
            f"write {number}: answered at {answer.begin_s}, {safe_s}"
        )
    said = {node_id: trace.check_promises() for node_id, trace in traces.items()}
    heard = sum((said[node_id] for node_id in cluster.others(first)), Counter[type[Message]]())
    assert heard[AppendReply] >= WRITES, said
    assert heard[VoteRequest], said
    assert heard[VoteReply], said
