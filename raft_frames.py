"""Peer messages as frames of bytes, and back.

Rule 1: every frame has a length (checked before anything is allocated), a format version, a
checksum, the cluster's id, sender and receiver; so a link may lose a message, never change one.
Rule 2: explicit layouts only; nothing from the network is ever unpickled (raft-traps T13, T68).

Pure: no I/O. The connections are in ``raft_transport.py``.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from enum import IntEnum
from functools import lru_cache
from operator import attrgetter
from typing import Final

from raft_types import (
    AppendEntries,
    AppendReply,
    Entry,
    EntryKind,
    HashReport,
    MemberId,
    Membership,
    Message,
    Room,
    SnapshotChunk,
    SnapshotOutcome,
    SnapshotReply,
    TimeoutNow,
    VoteReply,
    VoteRequest,
    decode_entries,
    encode_entries,
)

FORMAT_VERSION: Final = 3
FRAME_BYTES_MAX: Final = 80 << 20  # the largest request (64 MiB) and its neighbours in a batch
HANDSHAKE_BYTES_MAX: Final = 1024  # who has not said its name yet gets no more memory than this
TEXT_BYTES_MAX: Final = 900  # of a name or a reason in a handshake
# A server that believed the highest number there is could never stand for election again.
TERM_MAX: Final = 1 << 62
PREFIX_BYTES: Final = 4  # the length that each frame begins with


class FrameError(Exception):
    """The bytes on a peer connection are not a frame for this server; the text says which part."""


class FrameType(IntEnum):
    """What a frame's body is; the number is the byte on the wire."""

    HELLO = 1
    REFUSED = 2
    APPEND_ENTRIES = 3
    APPEND_REPLY = 4
    VOTE_REQUEST = 5
    VOTE_REPLY = 6
    HASH_REPORT = 7
    SNAPSHOT_CHUNK = 8
    SNAPSHOT_REPLY = 9
    TIMEOUT_NOW = 10


@dataclass(frozen=True, slots=True)
class _Greeting:
    """What both handshake frames say: who speaks, whom it means, and which process it is."""

    cluster_id: str
    sender: MemberId
    to: MemberId
    boot_id: str  # random for each start of the process

    @property
    def ids(self) -> tuple[str, MemberId, MemberId]:  # as in the header of every frame
        return self.cluster_id, self.sender, self.to


@dataclass(frozen=True, slots=True)
class Hello(_Greeting):
    """The first frame each way."""

    lease_reads: bool  # --read-mode lease, which only works when all members honour it
    node_id: str
    # Where the sender can be dialled, which may be news to the receiver; empty in the answer.
    host: str = ""
    peer_port: int = 0


@dataclass(frozen=True, slots=True)
class Refused(_Greeting):
    """The answer to a Hello that is not accepted; a person reads the reason."""

    reason: str


# A frame: this header, the body, and a CRC32 over both. The length counts what follows it.
_HEADER = struct.Struct(">IBB8s8s8s")  # length, version, type, cluster id, sender, to
_LENGTH = struct.Struct(">I")
_CHECKSUM = struct.Struct(">I")
_FRAME_BYTES_MIN = _HEADER.size + _CHECKSUM.size
_IDS = slice(6, _HEADER.size)  # where the three ids stand in a frame

_HELLO = struct.Struct(">8s?HB")  # boot_id, lease_reads, peer_port, length of host; host, node_id
_REFUSED = struct.Struct(">8s")  # boot_id; reason follows
_APPEND_ENTRIES = struct.Struct(">QQQQQ")  # all numbers of it; encode_entries() follows
_append_numbers = attrgetter("term", "prev_index", "prev_term", "commit_index", "round")
_SNAPSHOT_CHUNK = struct.Struct(">QQQ?")  # all of it but the data, which follows
_chunk_numbers = attrgetter("term", "snapshot_id", "offset", "is_last")


class _FixedBody:
    """The body of a message that is all numbers, in the order of its fields after the ids."""

    def __init__(
        self,
        frame_type: FrameType,
        message: type[Message],
        layout: str,
        make: Callable[..., Message] | None = None,
    ) -> None:
        self.frame_type = frame_type
        self.message = message
        self.make: Callable[..., Message] = make or message
        self.struct = struct.Struct(layout)
        self._names = tuple(f.name for f in fields(message)[2:])

    def values(self, message: Message) -> list[object]:
        """What ``struct`` packs."""
        return [getattr(message, name) for name in self._names]


def _append_reply(sender: MemberId, to: MemberId, *values: int) -> AppendReply:
    term, success, match, round_, prev, hint, hint_term, number = values
    # ValueError for one that is not known here; the usual one needs no such look.
    room = Room(number) if number else Room.PLENTY
    return AppendReply(sender, to, term, bool(success), match, round_, prev, hint, hint_term, room)


def _snapshot_reply(
    sender: MemberId, to: MemberId, term: int, snapshot_id: int, received_bytes: int, outcome: int
) -> SnapshotReply:
    checked = SnapshotOutcome(outcome)  # ValueError for one that is not known here
    return SnapshotReply(sender, to, term, snapshot_id, received_bytes, checked)


_FIXED_BODIES = (
    _FixedBody(FrameType.APPEND_REPLY, AppendReply, ">Q?QQQQQB", _append_reply),
    _FixedBody(FrameType.VOTE_REQUEST, VoteRequest, ">QQQ??"),
    _FixedBody(FrameType.VOTE_REPLY, VoteReply, ">Q??"),
    _FixedBody(FrameType.TIMEOUT_NOW, TimeoutNow, ">Q"),
    _FixedBody(FrameType.HASH_REPORT, HashReport, ">QQQ?"),
    _FixedBody(FrameType.SNAPSHOT_REPLY, SnapshotReply, ">QQQB", _snapshot_reply),
)
_BODY_BY_CLASS = {body.message: body for body in _FIXED_BODIES}
_BODY_BY_TYPE = {int(body.frame_type): body for body in _FIXED_BODIES}


@lru_cache(maxsize=256)
def _raw(hex_id: str) -> bytes:
    raw = bytes.fromhex(hex_id)
    assert len(raw) == 8, f"not an id: {hex_id!r}"
    return raw


def _seal(
    frame_type: FrameType, ids: tuple[str, MemberId, MemberId], body: bytes, more: bytes = b""
) -> bytes:
    """A frame of ``body`` followed by ``more`` (apart, to spare the copy of a big one)."""
    length = _FRAME_BYTES_MIN - _LENGTH.size + len(body) + len(more)
    assert length <= FRAME_BYTES_MAX, f"a frame of {length} bytes would be refused"
    cluster_id, sender, to = ids
    head = _HEADER.pack(
        length, FORMAT_VERSION, frame_type, _raw(cluster_id), _raw(sender), _raw(to)
    )
    checksum = zlib.crc32(more, zlib.crc32(body, zlib.crc32(head)))
    return b"".join((head, body, more, _CHECKSUM.pack(checksum)))


def encode_message(cluster_id: str, message: Message) -> bytes:
    """The message as one frame."""
    ids = (cluster_id, message.sender, message.to)
    if isinstance(message, AppendEntries):
        numbers = _APPEND_ENTRIES.pack(*_append_numbers(message))
        return _seal(FrameType.APPEND_ENTRIES, ids, numbers, encode_entries(message.entries))
    if isinstance(message, SnapshotChunk):
        numbers = _SNAPSHOT_CHUNK.pack(*_chunk_numbers(message))
        return _seal(FrameType.SNAPSHOT_CHUNK, ids, numbers, message.data)
    body = _BODY_BY_CLASS[type(message)]
    return _seal(body.frame_type, ids, body.struct.pack(*body.values(message)))


def _check_length(length: int, bytes_max: int) -> None:
    if length > bytes_max:
        raise FrameError(f"a frame claims {length} bytes; at most {bytes_max} are accepted")
    if length < _FRAME_BYTES_MIN - _LENGTH.size:
        raise FrameError(f"a frame claims {length} bytes, too few for its header")


def _check_frame(frame: bytes, checksum: int) -> int:
    """The type of a frame, which is whole but for its checksum. Raises FrameError."""
    version, frame_type = frame[4], frame[5]
    # First, since a later version may have its checksum elsewhere.
    if version != FORMAT_VERSION:
        raise FrameError(f"a frame of format version {version}; this is {FORMAT_VERSION}")
    if zlib.crc32(frame) != checksum:
        raise FrameError("a frame's checksum is wrong")
    return frame_type


class FrameDecoder:
    """Bytes in, messages out, for one connection on which ``sender`` talks to ``to``."""

    def __init__(self, cluster_id: str, *, sender: MemberId, to: MemberId) -> None:
        self._ids = (cluster_id, sender, to)
        self._raw_ids = _raw(cluster_id) + _raw(sender) + _raw(to)
        self._buffer = bytearray()  # starts with a frame's first byte

    def feed(self, data: bytes | memoryview) -> None:
        """Add what was received, however it was cut."""
        self._buffer += data

    def take(self) -> Iterator[Message]:
        """All messages that are complete by now.

        Raises FrameError at the first bad frame, after the messages before it, and ever after.
        """
        buffer = self._buffer
        while len(buffer) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(buffer)
            _check_length(length, FRAME_BYTES_MAX)
            end = _LENGTH.size + length - _CHECKSUM.size
            if len(buffer) < end + _CHECKSUM.size:
                return
            (checksum,) = _CHECKSUM.unpack_from(buffer, end)
            with memoryview(buffer) as view:
                frame = bytes(view[:end])
            message = self._decode(frame, _check_frame(frame, checksum))
            if message.term > TERM_MAX:
                raise FrameError(f"a frame of term {message.term}")
            del buffer[: end + _CHECKSUM.size]
            yield message

    def _decode(self, frame: bytes, frame_type: int) -> Message:
        if frame[_IDS] != self._raw_ids:
            raise FrameError(self._wrong_id(frame))
        _, sender, to = self._ids
        try:
            if frame_type == FrameType.APPEND_ENTRIES:
                term, index, index_term, *more = _APPEND_ENTRIES.unpack_from(frame, _HEADER.size)
                entries = tuple(decode_entries(frame, _HEADER.size + _APPEND_ENTRIES.size))
                _check_entries(entries, index, index_term, term)
                return AppendEntries(sender, to, term, index, index_term, entries, *more)
            if frame_type == FrameType.SNAPSHOT_CHUNK:
                term, snapshot_id, offset, is_last = _SNAPSHOT_CHUNK.unpack_from(
                    frame, _HEADER.size
                )
                data = frame[_HEADER.size + _SNAPSHOT_CHUNK.size :]
                return SnapshotChunk(sender, to, term, snapshot_id, offset, data, is_last)
            if body := _BODY_BY_TYPE.get(frame_type):
                return body.make(sender, to, *body.struct.unpack(frame[_HEADER.size :]))
        except (struct.error, ValueError) as error:
            raise FrameError(f"a frame's body is wrong: {error}") from error
        raise FrameError(f"a frame of the unknown type {frame_type}")

    def _wrong_id(self, frame: bytes) -> str:
        found = (raw.hex() for raw in _HEADER.unpack_from(frame)[3:])
        pairs = zip(("cluster", "sender", "receiver"), found, self._ids, strict=True)
        wrong = [f"{what} {is_}, not {should}" for what, is_, should in pairs if is_ != should]
        return f"a frame of {' and '.join(wrong)}"


def _check_entries(
    entries: Sequence[Entry], prev_index: int, prev_term: int, leader_term: int
) -> None:
    """Whether they may follow the entry before them, in a log of this leader's.

    Here, so that neither core nor disk has to doubt what it asserts.
    """
    for index, entry in enumerate(entries, prev_index + 1):
        if entry.index != index or entry.term < prev_term:
            raise ValueError(f"entry {entry.index} of term {entry.term} stands in place of {index}")
        prev_term = entry.term
        if entry.kind is EntryKind.MEMBERSHIP:
            Membership.decode(entry.data)
    if prev_term > leader_term:
        raise ValueError(f"an entry of term {prev_term} from a leader of term {leader_term}")


def encode_handshake(message: Hello | Refused) -> bytes:
    """The Hello or Refused as one frame of at most HANDSHAKE_BYTES_MAX."""
    boot_id = _raw(message.boot_id)
    if isinstance(message, Hello):
        host = message.host.encode()[:255]  # a DNS name is no longer
        body = _HELLO.pack(boot_id, message.lease_reads, message.peer_port, len(host))
        name = message.node_id.encode()[: TEXT_BYTES_MAX - len(host)]
        return _seal(FrameType.HELLO, message.ids, body, host + name)
    reason = message.reason.encode()[:TEXT_BYTES_MAX]
    return _seal(FrameType.REFUSED, message.ids, _REFUSED.pack(boot_id), reason)


def handshake_bytes_after(prefix: bytes) -> int:
    """How many bytes follow the first PREFIX_BYTES of a handshake. Raises FrameError."""
    (length,) = _LENGTH.unpack(prefix)
    _check_length(length, HANDSHAKE_BYTES_MAX - _LENGTH.size)
    return int(length)


def decode_handshake(data: bytes) -> Hello | Refused:
    """The inverse of ``encode_handshake``; whether the ids fit is for the caller to see."""
    frame = data[: -_CHECKSUM.size]
    frame_type = _check_frame(frame, *_CHECKSUM.unpack(data[-_CHECKSUM.size :]))
    cluster_id, sender, to = (raw.hex() for raw in _HEADER.unpack_from(frame)[3:])
    try:
        if frame_type == FrameType.HELLO:
            boot_id, lease_reads, port, length = _HELLO.unpack_from(frame, _HEADER.size)
            text = frame[_HEADER.size + _HELLO.size :]
            host, name = _printable(text[:length]), _printable(text[length:])
            return Hello(cluster_id, sender, to, boot_id.hex(), lease_reads, name, host, port)
        if frame_type == FrameType.REFUSED:
            (boot_id,) = _REFUSED.unpack_from(frame, _HEADER.size)
            reason = _printable(frame[_HEADER.size + _REFUSED.size :])
            return Refused(cluster_id, sender, to, boot_id.hex(), reason)
    except struct.error as error:
        raise FrameError(f"a frame's body is wrong: {error}") from error
    raise FrameError(f"a frame of type {frame_type} instead of a handshake")


def _printable(text: bytes) -> str:
    """Text from a stranger, made fit for a log line and a thread's name."""
    return "".join(c if c.isprintable() else "?" for c in text.decode(errors="replace"))
