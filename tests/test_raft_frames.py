"""Peer frames as bytes: what is encoded comes back, what is changed on the way does not."""

from __future__ import annotations

import contextlib
import struct
import zlib
from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raft_frames import (
    FRAME_BYTES_MAX,
    HANDSHAKE_BYTES_MAX,
    TERM_MAX,
    FrameDecoder,
    FrameError,
    Hello,
    Refused,
    decode_handshake,
    encode_handshake,
    encode_message,
)
from raft_types import (
    AppendEntries,
    AppendReply,
    Entry,
    EntryKind,
    HashReport,
    Membership,
    Message,
    Room,
    SnapshotChunk,
    SnapshotOutcome,
    SnapshotReply,
    TimeoutNow,
    VoteReply,
    VoteRequest,
)

CLUSTER, A, B, C = "c1" * 8, "0a" * 8, "0b" * 8, "0c" * 8

MESSAGES: list[Message] = [
    AppendEntries(A, B, 3, 7, 2, (Entry(8, 3, EntryKind.COMMAND, b"x" * 9),), 6, 11),
    AppendReply(A, B, 3, False, 0, 11, 7, 5, 2),
    VoteRequest(A, B, 4, 8, 3, True),
    VoteRequest(A, B, 4, 8, 3, False, transfer=True),
    VoteReply(A, B, 4, True, False),
    TimeoutNow(A, B, 4),
    HashReport(A, B, 4, 8, 2**64 - 1, True),
    SnapshotChunk(A, B, 4, 2**64 - 1, 1 << 40, b"\x00state", True),
    SnapshotReply(A, B, 4, 1, 1 << 40, SnapshotOutcome.INSTALLED),
]
each_message = pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)


u64 = st.integers(0, 2**64 - 1)
term = st.integers(0, TERM_MAX)
ids = st.just(A), st.just(B)


@st.composite
def appends(draw: st.DrawFn) -> AppendEntries:
    """Entries that may follow one another, as a leader's log has them."""
    *terms, last_term = sorted(draw(st.lists(term, min_size=2, max_size=7)))
    prev_index = draw(st.integers(0, 2**64 - 10))
    kinds = st.sampled_from([EntryKind.COMMAND, EntryKind.NOOP])
    ends_in_membership = draw(st.booleans())
    entries = [
        Entry(prev_index + i, entry_term, draw(kinds), draw(st.binary()))
        for i, entry_term in enumerate(terms[1:], 1)
    ]
    if entries and ends_in_membership:
        entries[-1] = entries[-1]._replace(kind=EntryKind.MEMBERSHIP, data=Membership().encode())
    return AppendEntries(
        A, B, last_term, prev_index, terms[0], tuple(entries), draw(u64), draw(u64)
    )


messages = st.one_of(
    appends(),
    st.builds(AppendReply, *ids, term, st.booleans(), *[u64] * 5, st.sampled_from(Room)),
    st.builds(VoteRequest, *ids, term, u64, u64, st.booleans()),
    st.builds(VoteReply, *ids, term, st.booleans(), st.booleans()),
    st.builds(HashReport, *ids, term, u64, u64, st.booleans()),
    st.builds(SnapshotChunk, *ids, term, u64, u64, st.binary(), st.booleans()),
    st.builds(SnapshotReply, *ids, term, u64, u64, st.sampled_from(SnapshotOutcome)),
)


def decoder() -> FrameDecoder:
    return FrameDecoder(CLUSTER, sender=A, to=B)


def decode(data: bytes) -> list[Message]:
    frames = decoder()
    frames.feed(data)
    return list(frames.take())


def resealed(frame: bytes, change: Callable[[bytearray], None]) -> bytes:
    """The frame with something changed, and a length and checksum that fit again."""
    inner = bytearray(frame[:-4])
    change(inner)
    struct.pack_into(">I", inner, 0, len(inner))
    return bytes(inner) + struct.pack(">I", zlib.crc32(inner))


@given(messages)
@settings(max_examples=50)
def test_decoder_fed_an_encoded_message_gives_an_equal_one(message: Message) -> None:
    """What goes in comes out, for every type of message."""
    assert decode(encode_message(CLUSTER, message)) == [message]


@given(st.lists(messages, max_size=4), st.lists(st.integers(1, 60), min_size=1))
@settings(max_examples=30)
def test_decoder_fed_in_pieces_of_any_size_gives_the_same_messages(
    sent: list[Message], sizes: list[int]
) -> None:
    """How TCP cuts the stream does not matter."""
    stream = b"".join(encode_message(CLUSTER, m) for m in sent)
    frames, start = decoder(), 0
    got: list[Message] = []

    for i in count():
        if start >= len(stream):
            break
        end = start + sizes[i % len(sizes)]
        frames.feed(stream[start:end])
        got += frames.take()
        start = end

    assert got == sent


@pytest.mark.parametrize(
    ("prev", "entries", "said"),
    [
        ((7, 2), [Entry(9, 3, EntryKind.COMMAND, b"")], "entry 9 of term 3 stands in place of 8"),
        ((7, 2), [Entry(8, 1, EntryKind.COMMAND, b"")], "entry 8 of term 1"),
        ((7, 2), [Entry(8, 2, EntryKind.NOOP, b""), Entry(8, 2, EntryKind.NOOP, b"")], "of 9"),
        ((7, 2), [Entry(8, 4, EntryKind.COMMAND, b"")], "term 4 from a leader of term 3"),
        ((7, 4), [], "term 4 from a leader of term 3"),
        ((7, 2), [Entry(8, 3, EntryKind.MEMBERSHIP, b"[{}]")], "not a membership"),
    ],
)
def test_decoder_fed_entries_that_no_log_can_have_refuses_them(
    prev: tuple[int, int], entries: list[Entry], said: str
) -> None:
    """What core and disk assert of a log is made sure of here, whoever sends (promise G8)."""
    lie = AppendEntries(A, B, 3, *prev, tuple(entries), 0, 0)

    with pytest.raises(FrameError, match=said):
        decode(encode_message(CLUSTER, lie))


def test_decoder_fed_a_term_near_the_highest_number_refuses_it() -> None:
    """No server could ever stand in the next one."""
    assert decode(encode_message(CLUSTER, VoteRequest(A, B, TERM_MAX, 0, 0, False)))

    with pytest.raises(FrameError, match="a frame of term"):
        decode(encode_message(CLUSTER, VoteRequest(A, B, TERM_MAX + 1, 0, 0, False)))


def test_decoder_fed_byte_by_byte_gives_each_message_with_its_last_byte() -> None:
    """A frame that is not complete is waited for; one that is, is not held back."""
    frames = decoder()

    for message in MESSAGES:
        *head, last = (bytes([b]) for b in encode_message(CLUSTER, message))
        for byte in head:
            frames.feed(byte)
            assert list(frames.take()) == []
        frames.feed(last)
        assert list(frames.take()) == [message]


@each_message
def test_decoder_fed_a_frame_with_a_changed_byte_never_gives_a_message(message: Message) -> None:
    """A frame changed on its way is refused, or waits for what its length claims: T13, T68."""
    frame = encode_message(CLUSTER, message)

    for position in range(len(frame)):
        for mask in (0x01, 0x80, 0xFF):
            changed = bytearray(frame)
            changed[position] ^= mask
            with contextlib.suppress(FrameError):
                assert decode(bytes(changed)) == [], f"byte {position} ^ {mask}"


def test_decoder_fed_a_length_of_a_gigabyte_refuses_it_at_once() -> None:
    """The length is checked before there is anything else, so nothing is allocated for it."""
    with pytest.raises(FrameError, match="claims 1073741824 bytes"):
        decode(struct.pack(">I", 1 << 30))
    with pytest.raises(FrameError, match="too few"):
        decode(struct.pack(">I", 3))
    assert decode(struct.pack(">I", FRAME_BYTES_MAX)) == []


def set_bytes(position: int, value: bytes) -> Callable[[bytearray], None]:
    def change(frame: bytearray) -> None:
        frame[position : position + len(value)] = value

    return change


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (set_bytes(4, b"\x01"), "format version 1"),
        (set_bytes(5, b"\x63"), "unknown type 99"),
        (set_bytes(5, b"\x01"), "unknown type 1"),  # a Hello, but the handshake is over
        (set_bytes(6, bytes.fromhex(C)), f"cluster {C}, not {CLUSTER}"),
        (set_bytes(14, bytes.fromhex(C)), f"sender {C}, not {A}"),
        (set_bytes(22, bytes.fromhex(C)), f"receiver {C}, not {B}"),
        (lambda frame: frame.append(0), "body"),
        (lambda frame: frame.pop(), "body"),
        (lambda frame: frame.__delitem__(slice(40, None)), "body"),
    ],
)
def test_decoder_fed_a_well_formed_frame_that_is_wrong_says_what(
    change: Callable[[bytearray], None], text: str
) -> None:
    """Another version, type, cluster, sender, receiver or body is refused by name (T13)."""
    with pytest.raises(FrameError, match=text):
        decode(resealed(encode_message(CLUSTER, MESSAGES[0]), change))


def test_decoder_fed_an_outcome_it_does_not_know_says_so() -> None:
    """A number from the network becomes a name, or nothing."""
    reply = encode_message(CLUSTER, SnapshotReply(A, B, 4, 1, 0, SnapshotOutcome.MORE))

    (decoded,) = decode(reply)
    assert isinstance(decoded, SnapshotReply)
    assert decoded.outcome is SnapshotOutcome.MORE
    with pytest.raises(FrameError, match="9 is not a valid SnapshotOutcome"):
        decode(resealed(reply, set_bytes(len(reply) - 5, b"\x09")))


def test_decoder_fed_a_bad_frame_gives_what_came_before_it_and_nothing_after() -> None:
    """After a bad frame nothing on the connection can be trusted."""
    first, frames = VoteReply(A, B, 1, True, False), decoder()
    good = encode_message(CLUSTER, first)
    frames.feed(good + resealed(good, set_bytes(5, b"\x63")) + good)

    taken = frames.take()
    assert next(taken) == first
    with pytest.raises(FrameError):
        next(taken)
    with pytest.raises(FrameError):
        next(frames.take())


def test_encode_message_keeps_the_bytes_of_format_version_3() -> None:
    """Nodes of two releases talk to each other: another layout needs another version number."""
    reply = AppendReply(A, B, 1, True, 2, 3, 4, 5, 6, Room.SHORT)

    numbers = "".join(f"{n:016x}" for n in range(2, 7))
    assert encode_message(CLUSTER, reply).hex() == (
        f"000000500304{CLUSTER}{A}{B}000000000000000101{numbers}01354183ad"
    )


@given(st.text(max_size=40), st.booleans(), st.integers(0, 65535))
def test_decode_handshake_of_an_encoded_one_gives_it_back_fit_to_print(
    text: str, lease_reads: bool, port: int
) -> None:
    """A stranger's text goes to the log: no line breaks, no control characters, bounded."""
    hello = Hello(CLUSTER, A, B, C, lease_reads, text, "host-ä.example", port)
    refused = Refused(CLUSTER, A, B, C, text * 100)

    name = decode_handshake(encode_handshake(hello))
    reason = decode_handshake(encode_handshake(refused))

    assert isinstance(name, Hello)
    assert isinstance(reason, Refused)
    assert (name.ids, name.boot_id, name.lease_reads) == (hello.ids, C, lease_reads)
    assert (name.host, name.peer_port) == ("host-ä.example", port)
    assert name.node_id == "".join(c if c.isprintable() else "?" for c in text)
    assert reason.reason.isprintable()
    assert len(encode_handshake(refused)) <= HANDSHAKE_BYTES_MAX
