"""RESP and lines: what is taken out of the bytes, however they come, and what is put on the wire."""

from __future__ import annotations

import json
import math
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from unittest.mock import Mock, patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

import kv_protocol
from kv_errors import (
    AnswerForgottenError,
    BadRequestError,
    BusyError,
    KVError,
    MismatchError,
    NoPrimaryError,
    NoSessionError,
    NoSpaceError,
    NotPrimaryError,
    OutcomeUnknownError,
    OutOfMemoryError,
    ProtocolError,
    TooLargeError,
)
from kv_protocol import (
    LINE_BYTES_MAX,
    LINE_JSON_BYTES_MAX,
    Item,
    ReplyParser,
    RequestParser,
    encode_line,
    encode_reply,
    encode_request,
    json_or_text,
    line_key,
    line_value,
    reply_size_bytes,
    text_or_json_bytes,
)
from kv_types import OK, RepeatedReply, Reply, SimpleString, Verbatim

MEBIBYTE = 1024 * 1024
PING = b"*1\r\n$4\r\nPING\r\n"


def pieces(data: bytes, size: int) -> Iterator[bytes]:
    return (data[at : at + size] for at in range(0, len(data), size))


def parse(chunks: Iterable[bytes], request_bytes_max: int = MEBIBYTE) -> tuple[list[object], bool]:
    """What a connection makes of ``chunks``: the items, errors as (type, text), and whether it ends."""
    parser = RequestParser(request_bytes_max)
    items: list[object] = []
    for chunk in chunks:
        parser.feed(chunk)
        items += map(comparable, parser.take())
        unread = len(parser._buffer) + len(parser._tail)
        assert unread <= request_bytes_max + LINE_BYTES_MAX + 2
    return items, parser.broken


def comparable(item: Item) -> object:
    return (type(item).__name__, str(item)) if isinstance(item, KVError) else item


def outcome(data: bytes, request_bytes_max: int = MEBIBYTE) -> tuple[list[object], bool]:
    """As ``parse``, after making sure that neither cuts nor the way of parsing change it."""
    whole = parse([data], request_bytes_max)
    for size in (1, 10):
        assert parse(pieces(data, size), request_bytes_max) == whole
    assert parse_step_by_step([data], request_bytes_max) == whole
    return whole


def parse_step_by_step(
    chunks: Iterable[bytes], request_bytes_max: int
) -> tuple[list[object], bool]:
    """As ``parse``, without the short way for short requests."""
    with patch.object(kv_protocol, "_SPLIT_BYTES_MAX", 0):
        return parse(chunks, request_bytes_max)


# ---- RESP requests -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        [b"PING"],
        [b"SET", b"k", b""],
        [b"SET", b"", b"\r\n$3\r\n*1\r\n"],
        [b"SET", b"\x00\xff", b"x" * 3000],
        [b"MSET", *[b"%d" % i for i in range(200)]],
    ],
)
def test_resp_when_well_formed_then_argv_is_what_was_sent(argv: list[bytes]) -> None:
    """Arguments are any bytes of any length (redis-facts 3.7)."""
    data = PING + encode_request(argv) + PING

    assert outcome(data) == ([[b"PING"], argv, [b"PING"]], False)


@pytest.mark.parametrize(
    ("data", "items"),
    [
        (b"\r\n\n\r\n", []),
        (b"*0\r\n*-1\r\n*-10\r\n", []),
        (b"PING\n", [[b"PING"]]),
        (b"  PING \t x \r\n", [[b"PING", b"x"]]),
        (b'echo "a b"\r\n', [[b"echo", b"a b"]]),
        (b"echo 'a\\'b\\n'\r\n", [[b"echo", b"a'b\\n"]]),
        (b'echo "\\x41\\n\\"\\q"\r\n', [[b"echo", b'A\n"q']]),
        (b"echo foo\"bar\" ''\r\n", [[b"echo", b"foobar", b""]]),
        (b"*2\r\n$4\r\nECHO\r\n$1\r\nzXX", [[b"ECHO", b"z"]]),
    ],
)
def test_resp_when_unusual_then_taken_as_redis_takes_it(data: bytes, items: list[object]) -> None:
    """Inline requests, empty ones and unchecked bulk ends (redis-facts 3.7, seen on 7.0.15)."""
    assert outcome(PING + data + PING) == ([[b"PING"], *items, [b"PING"]], False)


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"*abc\r\n", "invalid multibulk length"),
        (b"*+1\r\n", "invalid multibulk length"),
        (b"*01\r\n", "invalid multibulk length"),
        (b"*\r\n", "invalid multibulk length"),
        (b"*2147483648\r\n", "invalid multibulk length"),
        (b"*99999999999999999999\r\n", "invalid multibulk length"),
        (b"*1\r\n$abc\r\n", "invalid bulk length"),
        (b"*1\r\n$-1\r\n", "invalid bulk length"),
        (b"*1\r\n$+4\r\n", "invalid bulk length"),
        (b"*1\r\n$04\r\nPING\r\n", "invalid bulk length"),
        (b"*1\r\n$ 4\r\n", "invalid bulk length"),
        (b"*1\r\n$536870913\r\n", "invalid bulk length"),
        (b"*1\r\nPING\r\n", "expected '$', got 'P'"),
        (b"*1\r\n+PING\r\n", "expected '$', got '+'"),
        (b"*1\r\n:1\r\n", "expected '$', got ':'"),
        (b"*1\r\n*1\r\n$4\r\nPING\r\n", "expected '$', got '*'"),
        (b"*1\r\n\r\n", "expected '$', got ' '"),
        (b'PING "a\r\n', "unbalanced quotes in request"),
        (b'PING "foo"bar\r\n', "unbalanced quotes in request"),
        (b"PING 'a\\'\r\n", "unbalanced quotes in request"),
    ],
)
def test_resp_when_malformed_then_words_of_redis_and_the_end(data: bytes, text: str) -> None:
    """The error is the last item: what came before is answered, what follows is not read."""
    fault = ("ProtocolError", f"Protocol error: {text}")

    assert outcome(PING + data + PING) == ([[b"PING"], fault], True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"P" * (LINE_BYTES_MAX + 1), "too big inline request"),
        (b"*" + b"1" * (LINE_BYTES_MAX + 2), "too big mbulk count string"),
        (b"*1\r\n$" + b"1" * (LINE_BYTES_MAX + 2), "too big bulk count string"),
    ],
)
def test_resp_when_a_line_does_not_end_then_cut_off(data: bytes, text: str) -> None:
    """64 KiB without a line's end are no header, whatever follows (redis-facts 3.7)."""
    fault = ("ProtocolError", f"Protocol error: {text}")

    assert outcome(PING + data) == outcome(PING + data + b"\r\n") == ([[b"PING"], fault], True)


@pytest.mark.parametrize(
    "line", [b"POST / HTTP/1.1\r\n", b"post x\n", b"Host: x\r\n", b"GET / HTTP/1.1\r\n"]
)
@pytest.mark.parametrize("start", [PING, b"PING\n"])
def test_either_language_when_a_browser_calls_then_closed_without_a_word(
    line: bytes, start: bytes
) -> None:
    """A web page must not be able to make a browser write (redis-facts 3.7)."""
    assert outcome(start + line + b"SET k v\r\n") == ([[b"PING"]], True)


def test_resp_when_request_is_at_the_limit_then_taken_and_one_byte_more_refused() -> None:
    """The limit is on a request's bytes, not on what comes in one go."""
    request = encode_request([b"SET", b"k", b"v" * 500])

    taken, broken = outcome(request * 5, len(request))
    refused = outcome(PING + request, len(request) - 1)

    assert len(taken) == 5
    assert not broken
    assert refused == ([[b"PING"], ("TooLargeError", f"the request is larger than {len(request) - 1} bytes")], True)  # fmt: skip


@pytest.mark.parametrize(
    "claim", [b"*1\r\n$500000000\r\n", b"*1000000000\r\n", b"*1048577\r\n$4\r\n"]
)
@pytest.mark.parametrize("request_bytes_max", [64 * MEBIBYTE, 1024 * MEBIBYTE])
def test_resp_when_header_claims_much_then_nothing_is_allocated(
    claim: bytes, request_bytes_max: int
) -> None:
    """Memory follows the bytes that came, not those that were announced."""
    tracemalloc.start()
    try:
        parse([claim], request_bytes_max)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()

    assert peak_bytes < 100_000


def test_resp_when_arguments_are_many_then_counted_before_they_come() -> None:
    """Tiny arguments take far more memory than bytes: their number has a limit too."""
    assert outcome(b"*100000\r\n", 1000) == (
        [("TooLargeError", "a request may have 1055 arguments at most")],
        True,
    )
    assert outcome(b"*1048577\r\n", 64 * MEBIBYTE) == ([], False)  # Redis takes this one


@pytest.mark.slow
def test_resp_when_a_megabyte_comes_in_tiny_pieces_then_linear() -> None:
    """A value in 64,000 pieces is not copied 64,000 times, nor is a line: 30 GB would take longer."""
    value = b"v" * (4 * MEBIBYTE)
    began_s = time.process_time()

    resp = parse(pieces(encode_request([b"SET", b"k", value]), 64), 8 * MEBIBYTE)
    line = parse(pieces(b"SET k " + value + b"\n", 64), 8 * MEBIBYTE)

    assert resp == line == ([[b"SET", b"k", value]], False)
    assert time.process_time() - began_s < 5


@pytest.mark.slow
def test_resp_when_many_are_pipelined_then_linear() -> None:
    """No request makes the rest be copied or split again, not even one the short way refuses."""
    odd = b"*2\r\n$4\r\nECHO\r\n$2\r\n\r\n\r\n"
    began_s = time.process_time()

    items, _ = parse([odd * 5000])
    many, _ = parse([PING * 50_000])

    assert len(items) == 5000
    assert len(many) == 50_000
    assert time.process_time() - began_s < 5


def test_parser_when_broken_then_takes_and_keeps_nothing_more() -> None:
    """After a fatal fault the sender's bytes are dropped: it can't fill the memory."""
    parser = RequestParser(MEBIBYTE)
    parser.feed(b"*x\r\n")

    first, second = parser.take(), parser.take()
    parser.feed(PING)

    assert len(first) == 1
    assert second == parser.take() == []
    assert not parser._buffer


TOKENS = st.sampled_from(
    [b"*1\r\n", b"*2\r\n", b"*3\r\n", b"*0\r\n", b"*-1\r\n", b"*9999999\r\n", b"$4\r\n", b"$0\r\n",
     b"$1\r\n", b"$-1\r\n", b"$99999\r\n", b"PING\r\n", b"SET k v v\n", b"\r\n", b"\n", b"\r", b" ",
     b'"', b"'", b"\\", b"*", b"$", b"4", b"x", b"SET ", b"CAS k 1 ", PING,
     encode_request([b"SET", b"key", b"value"]), b"\x00\xff", b"POST ", b"Host:"]
)  # fmt: skip
STREAMS = st.lists(TOKENS | st.binary(max_size=8), max_size=20).map(b"".join)


@pytest.mark.slow
@given(STREAMS, st.lists(st.integers(1, 12), max_size=60), st.sampled_from([20, 60, MEBIBYTE]))
def test_parser_when_fed_anything_in_any_pieces_then_same_outcome(
    data: bytes, sizes: list[int], request_bytes_max: int
) -> None:
    """Nothing but items comes out; where the network cuts has no say; both ways agree."""
    chunks = []
    rest = data
    for size in sizes:
        chunks.append(rest[:size])
        rest = rest[size:]
    chunks.append(rest)

    whole = parse([data], request_bytes_max)

    assert parse(chunks, request_bytes_max) == whole
    assert parse_step_by_step(chunks, request_bytes_max) == whole


@given(st.lists(st.lists(st.binary(max_size=30), min_size=1, max_size=70), max_size=5))
def test_request_when_encoded_then_parsed_as_it_was(requests: list[list[bytes]]) -> None:
    """What a client of ours sends, a server of ours reads."""
    data = b"".join(map(encode_request, requests))

    assert parse([data]) == (requests, False)


# ---- Lines -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "argv"),
    [
        (b"GET k", [b"GET", b"k"]),
        (b"  get \t k  ", [b"get", b"k"]),
        (b"SET k hello  world ", [b"SET", b"k", b"hello  world "]),
        (b"set k  v", [b"set", b"k", b" v"]),
        (b"SET k ", [b"SET", b"k", b""]),
        (b"SET k", [b"SET", b"k"]),
        (b"SET", [b"SET"]),
        (b"SET k \"quoted\" 'v'", [b"SET", b"k", b"\"quoted\" 'v'"]),
        (b'SET "a b" v w', [b"SET", b"a b", b"v w"]),
        (b'SET "a\\"b\\\\\\x00" v', [b"SET", b'a"b\\\x00', b"v"]),
        (b'SET k {"a": [1, 2]}', [b"SET", b"k", b'{"a": [1, 2]}']),
        (b"CAS k 7 new value", [b"CAS", b"k", b"7", b"new value"]),
        (b"CAS k 7", [b"CAS", b"k", b"7"]),
        (b'DELETE "a b" c"d it\'s', [b"DELETE", b"a b", b'c"d', b"it's"]),
        (b'GET ""', [b"GET", b""]),
        (b"SET \xc3\xa9 \xff", [b"SET", b"\xc3\xa9", b"\xff"]),
        (b"SESSION OPEN", [b"SESSION", b"OPEN"]),
        (b"session do 7 2 1 set k a  'b", [*b"session do 7 2 1 set k".split(), b"a  'b"]),
        (b"SESSION  DO 7 2 1 CAS k 5 a b", [*b"SESSION DO 7 2 1 CAS k 5".split(), b"a b"]),
        (b'SESSION DO 7 2 1 DEL "a b" c', [*b"SESSION DO 7 2 1 DEL".split(), b"a b", b"c"]),
        (b"SESSION DO 7 2 1", b"SESSION DO 7 2 1".split()),
    ],
)
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_line_when_split_then_value_is_verbatim(
    line: bytes, argv: list[bytes], ending: bytes
) -> None:
    """SET and CAS take the rest of the line; a key in double quotes may hold blanks."""
    assert outcome(b"PING\n" + line + ending) == ([[b"PING"], argv], False)


def test_line_when_blank_then_ignored() -> None:
    """Pressing Enter in ``nc`` is no request."""
    assert outcome(b"\n  \r\n\t\nPING\n\n") == ([[b"PING"]], False)


@pytest.mark.parametrize("line", [b'SET "k v', b'GET "k"v', b'"', b'CAS "k\\" 1 v'])
def test_line_when_quotes_are_unbalanced_then_only_that_line_is_refused(line: bytes) -> None:
    """A slip of a person at a terminal does not cost the connection."""
    items, broken = outcome(b"PING\n" + line + b"\nPING\n")

    assert items[::2] == [[b"PING"], [b"PING"]]
    assert str(items[1]).startswith("('BadRequestError', 'unbalanced quotes")
    assert not broken


def test_language_when_first_byte_is_no_star_then_lines_for_good() -> None:
    """A connection speaks one language: a later ``*`` is a word like any other."""
    parser = RequestParser(MEBIBYTE)
    parser.feed(b"PING\n*1\r\n")

    assert parser.take() == [[b"PING"], [b"*1"]]
    assert parser.language == "lines"


@pytest.mark.parametrize(
    ("begin", "language"),
    [
        (b"PING\r\n", "resp"),
        (b"PING\r\nGET k\r\n", "resp"),
        (b"PING\n", "lines"),
        (b"ping\r\n", "lines"),
        (b"PING x\r\n", "lines"),
        (b"PI\n", "lines"),
        (b"P", None),
        (b"PING\r", None),
    ],
)
def test_language_when_a_health_check_begins_with_ping_then_resp(
    begin: bytes, language: str | None
) -> None:
    """As HAProxy's and redis-benchmark's: an inline request, and ``+PONG`` is expected."""
    for chunks in ([begin], pieces(begin, 1)):
        parser = RequestParser(MEBIBYTE)
        taken: list[object] = []
        for chunk in chunks:
            parser.feed(chunk)
            taken += parser.take()

        assert parser.language == language
        assert parser.has_partial is (language is None)
        assert bool(taken) is (language is not None)


def test_language_when_nothing_has_come_then_open() -> None:
    """Until the first byte the server can't know how to talk."""
    parser = RequestParser(MEBIBYTE)
    parser.feed(b"")

    assert parser.take() == []
    assert parser.language is None
    parser.feed(b"*")
    parser.take()
    assert parser.language == "resp"


def test_line_when_longer_than_64_kib_then_only_a_value_may_be() -> None:
    """The limit of a line is 64 KiB, that of a SET or CAS the request's; else the end."""
    value = b"v" * (LINE_BYTES_MAX + 100)

    assert parse([b"cas k 0 " + value + b"\n"]) == ([[b"cas", b"k", b"0", value]], False)
    once = b"session do 1234567 12 11 set k".split()
    assert parse(pieces(b" ".join([*once, value]) + b"\n", 999)) == ([[*once, value]], False)
    for data in (b"GET " + value, b"GET " + value + b"\n"):
        for chunks in ([b"PING\n" + data], pieces(b"PING\n" + data, 1000)):
            items, broken = parse(chunks)
            assert items == [
                [b"PING"],
                ("TooLargeError", f"the request is larger than {LINE_BYTES_MAX} bytes"),
            ]
            assert broken


@pytest.mark.parametrize("ending", [b"", b"\n", b"x" * LINE_BYTES_MAX])
def test_line_when_value_is_over_the_limit_then_refused(ending: bytes) -> None:
    """A line that never ends is cut off as soon as it is too long, newline or not."""
    data = b"SET k " + b"v" * LINE_BYTES_MAX + b"v" * 100 + ending
    fault = ("TooLargeError", f"the request is larger than {LINE_BYTES_MAX + 50} bytes")

    assert parse([data], LINE_BYTES_MAX + 50) == ([fault], True)
    assert parse(pieces(data, 999), LINE_BYTES_MAX + 50) == ([fault], True)


# ---- Replies -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "resp2", "resp3"),
    [
        (OK, b"+OK\r\n", b"+OK\r\n"),
        (SimpleString("OK"), b"+OK\r\n", b"+OK\r\n"),
        (SimpleString("a\r\nb"), b"+a  b\r\n", b"+a  b\r\n"),
        (b"", b"$0\r\n\r\n", b"$0\r\n\r\n"),
        (b"a\r\n", b"$3\r\na\r\n\r\n", b"$3\r\na\r\n\r\n"),
        (-5, b":-5\r\n", b":-5\r\n"),
        (None, b"$-1\r\n", b"_\r\n"),
        (Verbatim("r\u00e9"), b"$3\r\nr\xc3\xa9\r\n", b"=7\r\ntxt:r\xc3\xa9\r\n"),
        ([], b"*0\r\n", b"*0\r\n"),
        ((1, [None]), b"*2\r\n:1\r\n*1\r\n$-1\r\n", b"*2\r\n:1\r\n*1\r\n_\r\n"),
        ({b"a": 1}, b"*2\r\n$1\r\na\r\n:1\r\n", b"%1\r\n$1\r\na\r\n:1\r\n"),
        (BadRequestError("no\nway"), b"-ERR no way\r\n", b"-ERR no way\r\n"),
        (MismatchError("changed", 7), b"-MISMATCH 7 changed\r\n", b"-MISMATCH 7 changed\r\n"),
        (NoPrimaryError(), b"-CLUSTERDOWN no primary is known\r\n",
         b"-CLUSTERDOWN no primary is known\r\n"),
        ([NotPrimaryError("n2", "::1", 6380)], b"*1\r\n-MOVED 99 ::1:6380\r\n",
         b"*1\r\n-MOVED 99 ::1:6380\r\n"),
        (RepeatedReply(None, 7), b"$-1\r\n", b"_\r\n"),
        (RepeatedReply(MismatchError("x", 7), 9), b"-MISMATCH 7 x\r\n", b"-MISMATCH 7 x\r\n"),
    ],
)  # fmt: skip
def test_reply_when_encoded_then_as_redis_writes_it(
    reply: Reply, resp2: bytes, resp3: bytes
) -> None:
    """Null, maps and verbatim text are what RESP2 and RESP3 differ in (redis-facts 3.6)."""
    assert encode_reply(reply, 2, slot=99) == resp2
    assert encode_reply(reply, 3, slot=99) == resp3


def test_reply_when_not_a_reply_then_our_bug() -> None:
    """A float or a str would be a slip of ours: it must not reach the wire as something else."""
    for wrong in (1.5, "text"):
        with pytest.raises(TypeError):
            encode_reply(wrong)  # type: ignore[arg-type]


def shape(reply: Reply) -> object:
    """A reply with the types made visible: ``OK == "OK"`` and errors compare by identity."""
    match reply:
        case KVError():
            return type(reply), str(reply)
        case list() | tuple():
            return [shape(item) for item in reply]
        case dict():
            return {key: shape(value) for key, value in reply.items()}
        case _:
            return type(reply), reply


def in_resp2(reply: Reply) -> Reply:
    """What RESP2 leaves of a reply."""
    match reply:
        case Verbatim():
            return reply.encode()
        case list() | tuple():
            return [in_resp2(item) for item in reply]
        case dict():
            return [part for key, value in reply.items() for part in (key, in_resp2(value))]
        case _:
            return reply


ONE_LINE = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"))
SCALARS = (
    st.none()
    | st.integers(-(2**63), 2**63 - 1)
    | st.binary(max_size=20)
    | ONE_LINE.map(SimpleString)
    | ONE_LINE.map(Verbatim)
    | ONE_LINE.map(BadRequestError)
    | ONE_LINE.map(OutcomeUnknownError)
    | st.builds(MismatchError, ONE_LINE, st.integers(0, 2**63 - 1))
)
REPLIES = st.recursive(
    SCALARS,
    lambda part: (
        st.lists(part, max_size=4) | st.dictionaries(st.binary(max_size=5), part, max_size=3)
    ),
    max_leaves=8,
)


def replies_of(chunks: Iterable[bytes]) -> list[object]:
    """What a client makes of ``chunks``; a fault of the protocol ends it as its last item."""
    parser = ReplyParser()
    replies: list[object] = []
    try:
        for chunk in chunks:
            parser.feed(chunk)
            replies += map(shape, parser.take())
        replies += map(shape, parser.take())
    except ProtocolError as error:
        assert parser.broken
        replies.append(str(error))
    return replies


@pytest.mark.slow
@given(st.lists(REPLIES, max_size=4), st.integers(1, 9))
def test_reply_when_encoded_and_parsed_then_unchanged(replies: list[Reply], size: int) -> None:
    """A client reads what a server wrote, in both versions, however it is cut."""
    resp2 = b"".join(encode_reply(reply, 2) for reply in replies)
    resp3 = b"".join(encode_reply(reply, 3) for reply in replies)

    assert replies_of([resp3]) == replies_of(pieces(resp3, size)) == list(map(shape, replies))
    assert replies_of([resp2]) == [shape(in_resp2(reply)) for reply in replies]


@pytest.mark.parametrize(
    ("line", "kind", "text"),
    [
        ("ERR no such thing", BadRequestError, "no such thing"),
        ("CLUSTERDOWN no primary is known", NoPrimaryError, "no primary is known"),
        ("UNKNOWN may be done", OutcomeUnknownError, "may be done"),
        ("NOSPACE disk is full", NoSpaceError, "disk is full"),
        ("OOM too much", OutOfMemoryError, "too much"),
        ("BUSY later", BusyError, "later"),
        ("NOSESSION gone", NoSessionError, "gone"),
        ("FORGOTTEN was done", AnswerForgottenError, "was done"),
        ("WRONGTYPE Operation against", BadRequestError, "WRONGTYPE Operation against"),
        ("MOVED nonsense", BadRequestError, "MOVED nonsense"),
        ("MISMATCH x y", BadRequestError, "MISMATCH x y"),
        ("", BadRequestError, ""),
    ],
)
def test_error_when_read_then_its_class_is_that_of_its_first_word(
    line: str, kind: type[KVError], text: str
) -> None:
    """What is definite and what is unknown survives the wire (promise G4)."""
    assert replies_of([b"-" + line.encode() + b"\r\n"]) == [(kind, text)]


def test_moved_when_read_then_names_the_address() -> None:
    """The address may hold colons (IPv6); the node's name is not on the wire."""
    parser = ReplyParser()
    parser.feed(b"-MOVED 866 ::1:6381\r\n-MISMATCH 12 other version\r\n")

    moved, mismatch = parser.take()

    assert isinstance(moved, NotPrimaryError)
    assert (moved.node_id, moved.host, moved.port) == ("", "::1", 6381)
    assert isinstance(mismatch, MismatchError)
    assert (mismatch.version, str(mismatch)) == (12, "other version")


def test_resp3_when_pushed_or_annotated_then_only_replies_remain() -> None:
    """Pushes and attributes are dropped wherever they stand; other types become the nearest of ours."""
    data = (
        b">2\r\n+message\r\n$1\r\nx\r\n"
        b"|1\r\n+ttl\r\n:3\r\n*2\r\n|1\r\n+a\r\n*1\r\n:1\r\n:1\r\n#t\r\n"
        b"~1\r\n,1.5\r\n%1\r\n+k\r\n#f\r\n(12345678901234567890\r\n!7\r\nERR bad\r\n*-1\r\n>0\r\n"
    )

    replies = [
        [(int, 1), (int, 1)],
        [(bytes, b"1.5")],
        {b"k": (int, 0)},
        (int, 12345678901234567890),
        (BadRequestError, "bad"),
        (type(None), None),
    ]
    assert replies_of([data]) == replies
    assert replies_of(pieces(data, 1)) == replies


@pytest.mark.parametrize(
    "data",
    [b"HTTP/1.1 400\r\n", b"?\r\n", b":x\r\n", b"$x\r\n", b"$-2\r\n", b"*+1\r\n", b"\r\n",
     b"*1\r\n" * 1000, b"%1\r\n:1\r\n:2\r\n", b"+" + b"x" * (LINE_BYTES_MAX + 2),
     b":" + b"9" * 5000 + b"\r\n", b"-MOVED 1 h:" + b"9" * 5000 + b"\r\n"],
)  # fmt: skip
def test_reply_parser_when_not_resp_then_raises_after_what_was_good(data: bytes) -> None:
    """Good replies are handed out first, then every call raises: the connection is of no more use."""
    parser = ReplyParser()
    parser.feed(b"+OK\r\n" + data)

    assert parser.take() == [OK]
    for _ in range(2):
        parser.feed(b"+OK\r\n")
        with pytest.raises(ProtocolError):
            parser.take()


@pytest.mark.slow
@given(
    st.lists(
        st.sampled_from([b"*2\r\n", b"%1\r\n", b">1\r\n", b"|1\r\n", b"$2\r\n", b"$-1\r\n", b"=5\r\n",
                         b"!3\r\n", b"ab\r\n", b":1\r\n", b"+OK\r\n", b"-ERR x\r\n", b"_\r\n", b"*0\r\n"])
        | st.binary(max_size=6)
    ).map(b"".join),
    st.integers(1, 9),
)  # fmt: skip
def test_reply_parser_when_fed_anything_then_replies_or_protocol_error(
    data: bytes, size: int
) -> None:
    """Garbage never surprises the client, and cuts have no say."""
    assert replies_of([data]) == replies_of(pieces(data, size))


@pytest.mark.slow
def test_reply_parser_when_array_is_large_then_linear() -> None:
    """KEYS of a large store arrives in many pieces; none is parsed twice."""
    keys: list[Reply] = [b"key:%d" % i for i in range(50_000)]
    began_s = time.process_time()

    (reply,) = replies_of(pieces(encode_reply(keys), 256))

    assert reply == shape(keys)
    assert time.process_time() - began_s < 5


# ---- JSON --------------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda part: st.lists(part, max_size=4) | st.dictionaries(st.text(), part, max_size=4),
    max_leaves=10,
)  # fmt: skip
TRICKY_TEXTS = st.sampled_from(
    ["", "1", "-0", "null", "NaN", '"x"', '"', "{}", "[1", " 1 ", "1e999", "\udc80", "\ud800",
     '"\udcff"', "\udcc3\udca9", "\ufeff1", "[" * 5000, "[" * 300 + "]" * 300, "9" * 5000, "\x00"]
)  # fmt: skip


@pytest.mark.slow
@given(JSON_VALUES | TRICKY_TEXTS)
def test_json_when_stored_then_comes_back_with_its_type(value: object) -> None:
    """``"1"`` stays text and 1 stays a number; a text is stored as it is where that is enough."""
    stored = text_or_json_bytes(value)
    found = json_or_text(stored)

    assert (found, type(found)) == (value, type(value))
    if isinstance(value, str) and value.isalpha() and value not in ("null", "true", "false", "NaN"):
        assert stored == value.encode()


@given(st.binary(max_size=30))
def test_json_when_bytes_are_anything_then_readable_and_text_is_lossless(data: bytes) -> None:
    """What is not JSON can be stored back, byte for byte."""
    found = json_or_text(data)

    if isinstance(found, str) and not data.strip().startswith(b'"'):
        assert text_or_json_bytes(found) == data


def nested(depth: int, value: object) -> object:
    """``value`` in so many lists."""
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b'{"a": [1, 2.5, null]}', {"a": [1, 2.5, None]}),
        (b' "x" ', "x"),
        (b"hello", "hello"),
        (b"NaN", "NaN"),
        (b"[Infinity]", "[Infinity]"),
        (b"1e999", "1e999"),
        (b"01", "01"),
        (b"9" * 5000, "9" * 5000),
        (b"[" * 100_000, "[" * 100_000),
        (b"[" * 300 + b"]" * 300, "[" * 300 + "]" * 300),
        (b"[" * 256 + b"1" + b"]" * 256, nested(256, 1)),
        (b"[" * 257 + b"1" + b"]" * 257, "[" * 257 + "1" + "]" * 257),
        (b"[" * 257 + b"]" * 257, nested(256, [])),
        (b'{"a":' * 257 + b"{ }" + b"}" * 257, '{"a":' * 257 + "{ }" + "}" * 257),
        (b"[" + b"[[1]]," * 300 + b"{}]", [[[1]]] * 300 + [{}]),
        (b'["' + b'\\"[' * 300 + b'"]', ['"[' * 300]),
        (b'"\\\\", ' + b"[" * 300, '"\\\\", ' + "[" * 300),
        (b'"\xff"', '"\udcff"'),
        (b"", ""),
    ],
)
def test_json_when_not_strict_or_a_bomb_then_text(data: bytes, found: object) -> None:
    """Python's json takes NaN, and breaks on depth and digits; here they are text (redis-facts 4)."""
    assert json_or_text(data) == found


@pytest.mark.parametrize("text", ["[" * 258, '[{"a":' * 15_000, '["]",' * 300, "[1, " * 257 + "]"])
def test_json_when_nested_too_deep_then_the_recursive_reader_never_sees_it(
    text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Python 3.13 it outgrows the stack of a server's thread, and the process dies."""
    reader = Mock()
    monkeypatch.setattr("kv_protocol._JSON", reader)

    assert json_or_text(text.encode()) == text
    assert not reader.decode.called


@pytest.mark.parametrize("tail", [b'"' + b'\\"' * 500_000, b"[ " * 200 + b" " * 500_000, b'"\\'])
def test_json_when_it_has_many_brackets_then_the_time_is_linear(tail: bytes) -> None:
    """A string that never ends, full of escaped quotes, is looked through once."""
    data = b"[" + b"[]," * 300 + tail
    began_s = time.process_time()

    assert json_or_text(data) == data.decode()
    assert time.process_time() - began_s < 5


def test_json_when_value_cannot_be_json_then_refused() -> None:
    """The client hears of it before anything is sent."""
    for value in (math.nan, [math.inf], nested(300, []), nested(5300, []), 10**5000):
        with pytest.raises(ValueError):
            text_or_json_bytes(value)
    with pytest.raises(TypeError):
        text_or_json_bytes({1, 2})


@pytest.mark.parametrize(
    ("reply", "shown"),
    [
        (b'{"a": 1}', {"a": 1}),
        (b"plain", "plain"),
        (b"\xff\x00", {"base64": "/wA="}),
        (b'{"base64": "/wA="}', '{"base64": "/wA="}'),
        ([b"1", None, 7, OK], [1, None, 7, "OK"]),
        ({b"k": Verbatim("text")}, {"k": "text"}),
        ([BusyError("later")], [{"code": "BUSY", "message": "later"}]),
    ],
)
def test_line_value_when_shown_then_json_text_or_base64(reply: Reply, shown: object) -> None:
    """An object with only "base64" in it is always bytes that are no text."""
    assert line_value(reply) == shown


def test_line_value_when_very_large_then_text_even_if_it_is_json() -> None:
    """While a large document is read or written as JSON, no other thread of the node runs."""
    digits = LINE_JSON_BYTES_MAX // 2
    largest, larger = b"[%b]" % (b"1" * (LINE_JSON_BYTES_MAX - 2)), b'"%b"' % (b"1" * digits)

    assert line_value(larger) == "1" * digits
    assert line_value([larger, b"1"]) == ["1" * digits, 1]
    assert line_value([larger, larger, b"1"]) == [larger.decode(), larger.decode(), "1"]
    assert line_value(largest + b" ") == (largest + b" ").decode()


def test_size_of_a_reply_counts_values_wherever_they_are() -> None:
    """An answer that is given again weighs what it did the first time."""
    values: Reply = [b"12345", 7, None, [b"678"]]

    assert reply_size_bytes(values) == reply_size_bytes(RepeatedReply(values, 9)) == 8


def test_line_key_when_it_looks_like_json_then_still_text() -> None:
    """Keys are names: the key ``1`` is not a number."""
    assert [line_key(key) for key in (b"1", b"a b", b"\xff")] == ["1", "a b", {"base64": "/w=="}]


@pytest.mark.slow
@given(st.dictionaries(st.text(), st.binary(max_size=20).map(line_value), max_size=4))
def test_line_when_encoded_then_one_line_of_json(fields: dict[str, object]) -> None:
    """Whatever is in the values, the reply is one line that any JSON reader takes."""
    line = encode_line(fields)

    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert json.loads(line) == fields


def test_line_when_text_is_not_ascii_then_readable() -> None:
    """UTF-8 is written as such; a lone surrogate, which JSON can name, is escaped."""
    assert (
        encode_line({"status": "OK", "value": "\u00e9"})
        == b'{"status": "OK", "value": "\xc3\xa9"}\n'
    )
    assert encode_line({"value": json_or_text(b'"\\ud800"')}) == b'{"value": "\\ud800"}\n'


def test_too_large_when_sent_then_an_error_like_any_other() -> None:
    """Redis clients know no word for it: ERR, and the connection ends."""
    assert encode_reply(TooLargeError("too large")) == b"-ERR too large\r\n"
