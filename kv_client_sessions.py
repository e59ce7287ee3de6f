"""Client sessions: what is sent twice under one serial is done once, and answered the same.

Rule 1: part of the replicated state. Who is in it, and when a session goes, depends on the log
alone: on its order, and on the stamps of its entries. No clock, no node of its own opinion.
Rule 2: a serial stands for one write of one client. What came of its execution is kept until the
client says that it has the answer (``first_unanswered``); a serial before that is refused.
Rule 3: a repeated serial changes nothing, so that states do not depend on how often clients ask.
Rule 4: an unknown session is an error, never a new one: what it had done would be done again.
Rule 5: all is bounded: sessions, their bytes, and what each may leave unanswered.

Source: thesis 6.3. Called by ``kv_store.py`` while it applies an entry, and under the same lock.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Final
from zlib import crc32

from kv_commands import Once
from kv_errors import AnswerForgottenError, BusyError, KVError, NoSessionError
from kv_protocol import ReplyParser, encode_reply
from kv_types import RepeatedReply, Reply

Write = Callable[[Sequence[bytes], int, int], Reply]  # argv, effective now in ms, log index

# Since the last write that was new: a client that was silent for longer opens another session.
SESSION_TTL_MS: Final = 3_600_000
# At more than either, those go that were not used for longest.
SESSIONS_MAX: Final = 10_000
SESSIONS_BYTES_MAX: Final = 64 * 1024 * 1024
# Of one session: how far serials may be ahead of the first unanswered one, and how much is kept of
# their answers, all that goes with them included.
SERIALS_MAX: Final = 4096
ANSWERS_BYTES_MAX: Final = 1024 * 1024
# What they take beside the bytes of answers. Calibrated against the RSS.
SESSION_OVERHEAD_BYTES: Final = 440
ANSWER_OVERHEAD_BYTES: Final = 90

_NEVER_MS: Final = 2**63
# An answer is kept as one piece of bytes, whose CRC is its part of the state's hash: session, serial,
# the first unanswered serial from then on, index and stamp of the entry that did it; then the answer
# in RESP3, or nothing where it is too large to keep. A CRC finds what a bug or a bad disk does at a
# quarter of the time of a cryptographic hash, and every write in a session takes one.
_ANSWER_HEADER = struct.Struct(">QQQQQ")
_pack_answer = _ANSWER_HEADER.pack
_pack_session = struct.Struct(">QQ").pack
# A session as a row: when it was opened; then its answers in their order, each with its length.
_OPENED = struct.Struct(">Q")
_LENGTH = struct.Struct(">I")


class ClientSession:
    """What is known of one client: which of its serials were done, and what came of them.

    Invariant: the last of ``answers`` is the one that set ``used_ms`` and ``first_unanswered``;
    none is for a serial before that.
    """

    __slots__ = (
        *("answers", "answers_bytes", "answers_hash"),
        *("first_unanswered", "hash", "id", "last_serial", "opened_ms", "used_ms"),
    )

    def __init__(self, session_id: int, opened_ms: int) -> None:
        self.id = session_id  # the index of the entry that opened it
        self.hash = crc32(_pack_session(session_id, opened_ms))
        self.opened_ms = opened_ms  # stamp of that entry
        self.used_ms = opened_ms  # stamp of the last answer
        self.first_unanswered = 1
        self.last_serial = 0  # the highest that was done
        self.answers: dict[int, bytes] = {}  # by serial, in the order of the log
        # Sums over them.
        self.answers_bytes = 0
        self.answers_hash = 0

    @classmethod
    def from_row(cls, session_id: int, data: bytes) -> ClientSession:
        """The session as it was when ``to_row`` gave ``data``.

        Raises ValueError or struct.error for bytes that it never gives.
        """
        (opened_ms,) = _OPENED.unpack_from(data)
        session = cls(session_id, opened_ms)
        start = _OPENED.size
        while start < len(data):
            (size,) = _LENGTH.unpack_from(data, start)
            start += _LENGTH.size
            answer = data[start : start + size]
            start += size
            _, serial, first_unanswered, _, stamp_ms = _ANSWER_HEADER.unpack_from(answer)
            session.add(serial, answer)
            session.first_unanswered, session.used_ms = first_unanswered, stamp_ms
        if start != len(data):
            raise ValueError(f"the last answer of session {session_id} is cut short")
        return session

    def to_row(self) -> bytes:
        """All of it but the id."""
        parts = [_OPENED.pack(self.opened_ms)]
        for answer in self.answers.values():
            parts += (_LENGTH.pack(len(answer)), answer)
        return b"".join(parts)

    @property
    def used_index(self) -> int:
        """Of the entry that used it last."""
        if not self.answers:
            return self.id
        index: int = _ANSWER_HEADER.unpack_from(next(reversed(self.answers.values())))[3]
        return index

    def add(self, serial: int, answer: bytes) -> None:
        """An answer that is not there yet."""
        self.answers[serial] = answer
        self.answers_bytes += ANSWER_OVERHEAD_BYTES + len(answer)
        self.answers_hash += crc32(answer)
        if serial > self.last_serial:
            self.last_serial = serial

    def forget_before(self, first_unanswered: int) -> None:
        """The client has the answers to all serials before this one."""
        assert first_unanswered <= self.last_serial < self.first_unanswered + SERIALS_MAX
        for serial in range(self.first_unanswered, first_unanswered):
            answer = self.answers.pop(serial, None)
            if answer is not None:
                self.answers_bytes -= ANSWER_OVERHEAD_BYTES + len(answer)
                self.answers_hash -= crc32(answer)
        self.first_unanswered = first_unanswered

    def first_answer(self, serial: int, first_unanswered: int) -> RepeatedReply | None:
        """What was answered when ``serial`` was done; None if it is to be done now.

        Raises AnswerForgottenError, or BusyError: it was not done, and may come again.
        """
        answer = self.answers.get(serial)
        if answer is not None:
            encoded = answer[_ANSWER_HEADER.size :]
            if not encoded:
                raise AnswerForgottenError("it was done once; its answer was too large to keep")
            parser = ReplyParser()
            parser.feed(encoded)
            (reply,) = parser.take()
            return RepeatedReply(reply, index=_ANSWER_HEADER.unpack_from(answer)[3])
        if serial < self.first_unanswered:
            raise AnswerForgottenError(
                f"serials before {self.first_unanswered} were reported as answered; if {serial} was"
                " done, then once"
            )
        if serial - max(first_unanswered, self.first_unanswered) >= SERIALS_MAX:
            raise BusyError(f"{SERIALS_MAX} serials of the session are unanswered; try again")
        return None


class ClientSessions:
    """All sessions, those used last at the end.

    What changes them returns by how much the sum of their hashes changes. That is part of the
    state's hash, which is kept elsewhere.
    """

    def __init__(self, touch: Callable[[int], object]) -> None:
        """``touch`` is told the id of a session that is about to change."""
        self._touch = touch
        self.memory_bytes = 0
        self.expires_ms = _NEVER_MS  # none expires before this stamp
        self._sessions: OrderedDict[int, ClientSession] = OrderedDict()

    def __len__(self) -> int:
        return len(self._sessions)

    def open(self, index: int, now_ms: int) -> int:
        """A new session, whose id is ``index``."""
        if not self._sessions:
            self.expires_ms = now_ms + SESSION_TTL_MS
        self._touch(index)
        session = self._sessions[index] = ClientSession(index, now_ms)
        self.memory_bytes += SESSION_OVERHEAD_BYTES
        return session.hash + self._make_room()

    def close(self, session_id: int) -> int:
        """Forget the session and all its answers. Raises NoSessionError."""
        session = self._sessions.get(session_id)
        if session is None:
            raise _no_session(session_id)
        self._touch(session_id)
        del self._sessions[session_id]
        self.memory_bytes -= SESSION_OVERHEAD_BYTES + session.answers_bytes
        return -(session.hash + session.answers_hash)

    def expire(self, now_ms: int) -> int:
        """Close those whose time is over. Called when ``expires_ms`` has come."""
        change = 0
        while self._sessions:
            oldest = self._oldest()
            self.expires_ms = oldest.used_ms + SESSION_TTL_MS
            if self.expires_ms > now_ms:
                return change
            change += self.close(oldest.id)
        self.expires_ms = _NEVER_MS
        return change

    def do_once(
        self, once: Once, write: Write, argv: Sequence[bytes], now_ms: int, index: int
    ) -> tuple[Reply, int]:
        """The reply to ``write(argv, now_ms, index)``, which is called unless it was before.

        Raises NoSessionError, AnswerForgottenError or BusyError: it was not called now.
        """
        session_id, serial, first_unanswered = once
        session = self._sessions.get(session_id)
        if session is None:
            raise _no_session(session_id)
        answers = session.answers
        if serial in answers or not 0 <= serial - session.first_unanswered < SERIALS_MAX:
            first_answer = session.first_answer(serial, first_unanswered)
            if first_answer is not None:
                return first_answer, 0
        try:
            reply = write(argv, now_ms, index)
        except KVError as error:
            reply = error  # is an answer too, and stays the same when asked again
        self._touch(session_id)
        old_bytes, old_hash = session.answers_bytes, session.answers_hash
        if first_unanswered > session.last_serial:  # the usual case: the client has them all
            answers.clear()
            session.answers_bytes = session.answers_hash = 0
            session.first_unanswered = first_unanswered
        elif first_unanswered > session.first_unanswered:
            session.forget_before(first_unanswered)
        else:
            first_unanswered = session.first_unanswered
        answer = _pack_answer(session_id, serial, first_unanswered, index, now_ms)
        if not isinstance(reply, bytes) or (
            session.answers_bytes + len(reply) <= ANSWERS_BYTES_MAX
        ):
            answer += encode_reply(reply, 3)
        session.add(serial, answer)
        session.used_ms = now_ms
        self._sessions.move_to_end(session_id)
        self.memory_bytes += session.answers_bytes - old_bytes
        change = session.answers_hash - old_hash
        if self.memory_bytes > SESSIONS_BYTES_MAX:
            change += self._make_room()
        return reply, change

    # ---- To the disk and back ----

    def row(self, session_id: int) -> tuple[int, bytes] | None:
        """The session as the disk keeps it; None if there is none."""
        session = self._sessions.get(session_id)
        return None if session is None else (session_id, session.to_row())

    def load(self, rows: Iterable[tuple[int, bytes]]) -> None:
        """Put in what ``row`` gave. Raises ValueError or struct.error for what it never gives."""
        found = [ClientSession.from_row(session_id, data) for session_id, data in rows]
        for session in sorted(found, key=attrgetter("used_index")):
            self._sessions[session.id] = session
            self.memory_bytes += SESSION_OVERHEAD_BYTES + session.answers_bytes
        if found:
            self.expires_ms = self._oldest().used_ms + SESSION_TTL_MS

    def state_hash(self) -> int:
        """The sum of all hashes, as they are kept."""
        return sum(session.hash + session.answers_hash for session in self._sessions.values())

    def recompute_state_hash(self) -> int:
        """The same from the answers, for audits."""
        sessions = self._sessions.values()
        return sum(s.hash + sum(map(crc32, s.answers.values())) for s in sessions)

    def _make_room(self) -> int:
        # The session that is being used is the last, and alone far below the limits.
        change = 0
        while len(self._sessions) > SESSIONS_MAX or self.memory_bytes > SESSIONS_BYTES_MAX:
            change += self.close(self._oldest().id)
        return change

    def _oldest(self) -> ClientSession:
        return next(iter(self._sessions.values()))


def _no_session(session_id: int) -> NoSessionError:
    return NoSessionError(f"there is no session {session_id} (any more): open another")
