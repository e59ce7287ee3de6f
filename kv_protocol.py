"""What stands on a client's connection: bytes <-> requests and replies, in RESP and in lines.

Rule 1: no I/O. A parser is fed whatever a socket gave and hands out what is complete; however the
bytes were cut into pieces, the result is the same.
Rule 2: nothing is allocated because a header claims it. What waits in a parser is at most one
request of ``request_bytes_max`` and the last piece fed.
Rule 3: the time is linear in the bytes, whatever the sender does.
Rule 4: a faulty request is an item in its place, a KVError among the requests. After a fault that
leaves no way to find the next request, ``broken`` is set: answer what there is, then close.

The first byte of a connection picks the language: ``*`` is RESP (Redis), all else is lines; but
for ``PING`` with a CR LF, which health checks and redis-benchmark begin with.
Called on the connection's own client thread. Read on in ``kv_commands.py``.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

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
from kv_types import OK, RepeatedReply, Reply, SimpleString, Verbatim

# What a parser hands out: a request's argv, or the error that stands in its place.
Item = list[bytes] | KVError

# Redis' PROTO_INLINE_MAX_SIZE, for every line: headers, inline requests, requests in lines.
LINE_BYTES_MAX: Final = 64 * 1024
# Redis' default proto-max-bulk-len: a larger claim is a broken client, not a large request.
_BULK_BYTES_MAX: Final = 512 * 1024 * 1024
_INT32_MAX: Final = 2**31 - 1
_CRLF: Final = b"\r\n"
_INTEGER = re.compile(rb"0|-?[1-9][0-9]{0,18}")


class _HangUpError(Exception):
    """Close the connection without a word."""


class _Parser:
    """The bytes fed and not yet parsed, joined only when that can lead on.

    A value that arrives in a thousand pieces is so copied twice, not a thousand times.
    """

    def __init__(self) -> None:
        self.broken = False
        self._buffer = b""
        # Fed after ``_buffer``; empty where that is.
        self._tail = bytearray()
        self._tail_has_newline = False
        # What the parser waits for: so many unread bytes, or, where 0, a newline or more bytes
        # than a line may have.
        self._bytes_needed = 0
        self._line_bytes_max = LINE_BYTES_MAX

    def feed(self, data: bytes) -> None:
        """Takes bytes from the connection; those that follow a fatal fault are dropped."""
        if self.broken:
            return
        if not self._buffer:
            self._buffer = data
        else:
            self._tail += data
            self._tail_has_newline = self._tail_has_newline or b"\n" in data

    def _gather(self) -> bytes:
        """The unread bytes if they can lead on, else none."""
        if self._tail:
            unread = len(self._buffer) + len(self._tail)
            if self._bytes_needed:
                if unread < self._bytes_needed:
                    return b""
            elif not self._tail_has_newline and unread <= self._line_bytes_max:
                return b""
            self._buffer += self._tail
            self._tail = bytearray()
            self._tail_has_newline = False
        return self._buffer

    def _break(self) -> None:
        self.broken = True
        self._buffer = b""

    def _header_end(self, buffer: bytes, at: int, what: str) -> int:
        """Where the header at ``at`` has its CRLF; -1 if that has not come yet."""
        end = buffer.find(_CRLF, at, at + LINE_BYTES_MAX + 2)
        if end < 0:
            if len(buffer) - at >= LINE_BYTES_MAX + 2:
                raise ProtocolError(f"Protocol error: too big {what}")
            self._bytes_needed = 0
        return end


# ---- Requests ----------------------------------------------------------------------------------

# For the short way through ``_take_short``: all headers that it knows.
_ARGC = {b"*%d" % argc: argc for argc in range(1, 65)}
_BULK_HEADER = {length: b"$%d" % length for length in range(2048)}
_SPLIT_BYTES_MAX: Final = 2 * LINE_BYTES_MAX


class RequestParser(_Parser):
    """Takes the requests out of what one client sends.

    RESP follows Redis 7.0's ``readQueryFromClient``, inline requests and its error texts included.
    """

    def __init__(self, request_bytes_max: int) -> None:
        super().__init__()
        self.language: Literal["resp", "lines"] | None = None
        self._request_bytes_max = request_bytes_max
        self._line_bytes_max = min(LINE_BYTES_MAX, request_bytes_max)
        # A two-byte argument is 8 bytes on the wire and 43 in memory; without a bound on their
        # number a request could take many times its size.
        self._argc_max = 1024 + request_bytes_max // 32
        # The RESP request that has begun: its arguments so far, how many are missing, the length
        # of the next (-1: its header has not come) and the bytes it had on the wire.
        self._argv: list[bytes] = []
        self._missing = 0
        self._bulk_bytes = -1
        self._request_bytes = 0

    @property
    def has_partial(self) -> bool:
        """Whether a request has begun and not ended."""
        return self._missing > 0 or bool(self._buffer)

    def take(self) -> list[Item]:
        """All requests that are complete; a fatal fault is the last item and sets ``broken``."""
        buffer = self._gather()
        items: list[Item] = []
        if not buffer:
            return items
        if self.language is None:
            self.language = _language_of(buffer)
            self._bytes_needed = 0 if self.language else len(buffer) + 1
            if self.language is None:
                return items
        try:
            if self.language == "resp":
                used = self._take_resp(buffer, items)
            else:
                used = self._take_lines(buffer, items)
        except KVError as error:
            items.append(error)
            self._break()
        except _HangUpError:
            self._break()
        else:
            self._buffer = buffer[used:]
        return items

    # ---- RESP ----

    def _take_resp(self, buffer: bytes, items: list[Item]) -> int:
        """Appends the requests to ``items``; how many bytes were used up."""
        at = 0
        # Once only: splitting the rest again after each long argument would not be linear.
        may_split = len(buffer) <= min(_SPLIT_BYTES_MAX, self._request_bytes_max)
        while at < len(buffer):
            start = at
            if self._missing:
                at = self._take_arguments(buffer, at, items)
            elif buffer[at] != 0x2A:  # "*"
                at = self._take_inline(buffer, at, items)
            elif may_split:
                may_split = False
                at = _take_short(buffer, at, items)
                continue
            else:
                at = self._begin_request(buffer, at)
            if at == start:
                break
        return at

    def _begin_request(self, buffer: bytes, at: int) -> int:
        end = self._header_end(buffer, at, "mbulk count string")
        if end < 0:
            return at
        argc = _header_int(buffer[at + 1 : end])
        if argc is None or argc > _INT32_MAX:
            raise ProtocolError("Protocol error: invalid multibulk length")
        if argc > self._argc_max:
            raise TooLargeError(f"a request may have {self._argc_max} arguments at most")
        self._missing = max(argc, 0)  # *0 and *-1 are requests for nothing
        self._request_bytes = end + 2 - at
        return end + 2

    def _take_arguments(self, buffer: bytes, at: int, items: list[Item]) -> int:
        while self._missing:
            if self._bulk_bytes < 0:
                end = self._header_end(buffer, at, "bulk count string")
                if end < 0:
                    return at
                self._bulk_bytes = self._parse_bulk_header(buffer[at:end])
                at = end + 2
            end = at + self._bulk_bytes
            if len(buffer) < end + 2:
                self._bytes_needed = self._bulk_bytes + 2
                return at
            # As Redis: the two bytes after a bulk are taken for CRLF unseen.
            self._argv.append(buffer[at:end])
            at = end + 2
            self._bulk_bytes = -1
            self._missing -= 1
        items.append(self._argv)
        self._argv = []
        return at

    def _parse_bulk_header(self, header: bytes) -> int:
        if header[:1] != b"$":
            got = (header[:1] or b" ").decode("utf-8", "backslashreplace")
            raise ProtocolError(f"Protocol error: expected '$', got '{got}'")
        length = _header_int(header[1:])
        if length is None or not 0 <= length <= _BULK_BYTES_MAX:
            raise ProtocolError("Protocol error: invalid bulk length")
        self._request_bytes += len(header) + length + 4
        if self._request_bytes > self._request_bytes_max:
            raise _too_large(self._request_bytes_max)
        return length

    def _take_inline(self, buffer: bytes, at: int, items: list[Item]) -> int:
        end = buffer.find(b"\n", at, at + self._line_bytes_max + 1)
        if end < 0:
            if len(buffer) - at > self._line_bytes_max:
                raise ProtocolError("Protocol error: too big inline request")
            self._bytes_needed = 0
            return at
        argv = _split_inline(buffer[at:end])
        if argv:
            items.append(argv)
        return end + 1

    # ---- Lines ----

    def _take_lines(self, buffer: bytes, items: list[Item]) -> int:
        at = 0
        while at < len(buffer):
            end = buffer.find(b"\n", at)
            length = (end if end >= 0 else len(buffer)) - at
            limit = min(LINE_BYTES_MAX, self._request_bytes_max)
            if length > limit and _TAKES_REST.match(buffer, at):
                limit = self._request_bytes_max
            if length > limit:
                raise _too_large(limit)
            if end < 0:
                self._line_bytes_max = limit
                break
            # A value's own "\r" before the newline can't be told from the line's end.
            line = buffer[at:end].removesuffix(b"\r")
            at = end + 1
            try:
                argv = _split_line(line)
            except BadRequestError as error:
                items.append(error)
            else:
                if argv:
                    items.append(argv)
        return at


# What health checks and redis-benchmark begin with, who then expect Redis' answer.
_INLINE_PING: Final = b"PING\r\n"


def _language_of(buffer: bytes) -> Literal["resp", "lines"] | None:
    """The language of a client that begins so; None: there is too little to tell."""
    if buffer[0] == 0x2A or buffer.startswith(_INLINE_PING):  # "*"
        return "resp"
    return None if _INLINE_PING.startswith(buffer) else "lines"


def _take_short(buffer: bytes, at: int, items: list[Item]) -> int:
    """Takes the leading requests that are complete, canonical and short; where they end.

    One split at the CRLFs stands for all the searching. A request is believed only if each of its
    arguments has the very header that it would be sent with; the first that differs (or holds a
    CRLF, or is long, or not all there) is left to the step by step parser, which alone knows the
    faults.
    """
    parts = buffer[at:].split(_CRLF)
    last = len(parts) - 1  # what follows the last CRLF
    begin = 0
    while True:
        argc = _ARGC.get(parts[begin])
        if argc is None:
            break
        end = begin + 1 + 2 * argc
        if end > last:
            break
        argv = parts[begin + 2 : end : 2]
        if parts[begin + 1 : end : 2] != list(map(_BULK_HEADER.get, map(len, argv))):
            break
        items.append(argv)
        begin = end
    return at + sum(map(len, parts[:begin])) + 2 * begin


def _header_int(text: bytes) -> int | None:
    """A 64-bit integer in canonical spelling, None for anything else."""
    if _INTEGER.fullmatch(text):
        number = int(text)
        if -(2**63) <= number < 2**63:
            return number
    return None


def _too_large(bytes_max: int) -> TooLargeError:
    return TooLargeError(f"the request is larger than {bytes_max} bytes")


# Sent by a browser that a web page made call us: Redis' "cross protocol scripting" defence.
_HTTP = re.compile(
    rb"(?:POST |HOST:|(?:GET|HEAD|PUT|PATCH|DELETE|OPTIONS|CONNECT|TRACE) \S+ HTTP/\d)",
    re.IGNORECASE,
)
# The requests whose last argument is the rest of the line, by their number of words before it.
_WORDS_BEFORE_REST: Final = {b"SET": 2, b"CAS": 3}
# They may stand in a SESSION DO, after this many words.
_SESSION_WORDS: Final = 5
_TAKES_REST = re.compile(
    rb"\s{0,8}(?:SESSION\s{1,8}DO\s{1,8}(?:\d{1,19}\s{1,8}){3})?(?:SET|CAS)\s", re.IGNORECASE
)
_LINE_WORD = re.compile(rb'"((?:\\.|[^"\\])*+)"(?=\s|\Z)|([^\s"]\S*+)', re.DOTALL)
# As Redis' sdssplitargs: a quote may open inside a word and must close at its end.
_INLINE_WORD = re.compile(
    rb"""([^\s"']*+)(?:"((?:\\.|[^"\\])*+)"|'((?:\\'|[^'])*+)')?(?=\s|\Z)""", re.DOTALL
)
_BLANKS = re.compile(rb"\s*+")
_ESCAPE = re.compile(rb"\\(?:x([0-9a-fA-F]{2})|(.))", re.DOTALL)
_ESCAPED = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"b": b"\b", b"a": b"\a"}


def _split_line(line: bytes) -> list[bytes]:
    """A line's words, of which one in double quotes may hold blanks; empty for a blank line.

    SET and CAS take the rest of the line verbatim, from the second byte after their last word.
    Raises BadRequestError for quotes that don't close.
    """
    if _HTTP.match(line):
        raise _HangUpError
    argv: list[bytes] = []
    words_before_rest = None
    at = 0
    while len(argv) != words_before_rest:
        at = _skip_blanks(line, at)
        if at == len(line):
            return argv
        word = _LINE_WORD.match(line, at)
        if word is None:
            raise BadRequestError('unbalanced quotes: a word in "..." ends with its quote')
        argv.append(word[2] if word[1] is None else _unescape(word[1]))
        at = word.end()
        if len(argv) == 1:
            words_before_rest = _WORDS_BEFORE_REST.get(argv[0].upper())
        elif len(argv) == _SESSION_WORDS + 1 and argv[0].upper() == b"SESSION":
            words = _WORDS_BEFORE_REST.get(argv[-1].upper())
            words_before_rest = words and _SESSION_WORDS + words
    if at < len(line):
        argv.append(line[at + 1 :])
    return argv


def _split_inline(line: bytes) -> list[bytes]:
    """The words of a request typed into a RESP connection; raises ProtocolError."""
    if _HTTP.match(line):
        raise _HangUpError
    argv: list[bytes] = []
    at = _skip_blanks(line, 0)
    while at < len(line):
        word = _INLINE_WORD.match(line, at)
        if word is None:
            raise ProtocolError("Protocol error: unbalanced quotes in request")
        bare, double, single = word.groups(b"")
        argv.append(bare + _unescape(double) + single.replace(b"\\'", b"'"))
        at = _skip_blanks(line, word.end())
    return argv


def _skip_blanks(line: bytes, at: int) -> int:
    blanks = _BLANKS.match(line, at)
    return blanks.end() if blanks else at


def _unescape(text: bytes) -> bytes:
    return _ESCAPE.sub(_unescape_one, text) if b"\\" in text else text


def _unescape_one(escape: re.Match[bytes]) -> bytes:
    code, char = escape.groups()
    return bytes.fromhex(code.decode()) if code else _ESCAPED.get(char, char)


def encode_request(argv: Sequence[bytes]) -> bytes:
    """A request in RESP."""
    parts = [b"*%d\r\n" % len(argv)]
    parts += [b"$%d\r\n%b\r\n" % (len(arg), arg) for arg in argv]
    return b"".join(parts)


# ---- Replies -----------------------------------------------------------------------------------

_OK_LINE: Final = b"+OK\r\n"
_NULLS: Final = {2: b"$-1\r\n", 3: b"_\r\n"}


def encode_reply(reply: Reply, protocol: int = 2, slot: int = 0) -> bytes:
    """A reply in RESP2 or RESP3; ``slot`` is that of the request's first key, for MOVED."""
    # The order is that of how often they are sent.
    if reply is OK:
        return _OK_LINE
    if isinstance(reply, bytes):
        return b"$%d\r\n%b\r\n" % (len(reply), reply)
    if reply is None:
        return _NULLS[protocol]
    if isinstance(reply, int):
        return b":%d\r\n" % reply
    parts: list[bytes] = []
    _encode_into(parts, reply, protocol, slot)
    return b"".join(parts)


def _encode_into(parts: list[bytes], reply: Reply, protocol: int, slot: int) -> None:
    match reply:
        case SimpleString():
            parts.append(b"+%b\r\n" % _one_line(reply))
        case Verbatim():
            text = _utf8(reply)
            head = b"=%d\r\ntxt:" % (len(text) + 4) if protocol == 3 else b"$%d\r\n" % len(text)
            parts += (head, text, _CRLF)
        case KVError():
            parts.append(b"-%b\r\n" % _one_line(_error_text(reply, slot)))
        case dict():
            parts.append(
                b"%%%d\r\n" % len(reply) if protocol == 3 else b"*%d\r\n" % (2 * len(reply))
            )
            for key, value in reply.items():
                parts.append(encode_reply(key, protocol))
                parts.append(encode_reply(value, protocol, slot))
        case list() | tuple():
            parts.append(b"*%d\r\n" % len(reply))
            parts += [encode_reply(item, protocol, slot) for item in reply]
        case RepeatedReply():
            parts.append(encode_reply(reply.reply, protocol, slot))
        case _:
            raise TypeError(f"{type(reply).__name__} is not a reply")


def _error_text(error: KVError, slot: int) -> str:
    match error:
        case NotPrimaryError():
            return f"{error.resp_code} {slot} {error.host}:{error.port}"
        case MismatchError():
            return f"{error.resp_code} {error.version} {error}"
        case _:
            return f"{error.resp_code} {error}"


def _one_line(text: str) -> bytes:
    return _utf8(text.replace("\r", " ").replace("\n", " "))


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "backslashreplace")  # never fails, not even for lone surrogates


# What an error's first word makes of it at the client; any other is a BadRequestError.
_ERRORS: Final[dict[str, type[KVError]]] = {
    error.resp_code: error
    for error in (
        BadRequestError,
        NoPrimaryError,
        NoSpaceError,
        OutOfMemoryError,
        BusyError,
        NoSessionError,
        OutcomeUnknownError,
        AnswerForgottenError,
    )
}


def decode_error(line: str) -> KVError:
    """The error that a RESP error line stands for. MOVED names no node: its ``node_id`` is empty."""
    word, _, text = line.partition(" ")
    number, _, rest = text.partition(" ")
    if word == NotPrimaryError.resp_code:
        host, _, port = rest.rpartition(":")
        if port.isdecimal():
            return NotPrimaryError("", host, int(port))
    elif word == MismatchError.resp_code:
        if number.isdecimal():
            return MismatchError(rest, int(number))
    elif word in _ERRORS:
        return _ERRORS[word](text)
    return BadRequestError(line)


@dataclass(slots=True)
class _Aggregate:
    """An array, set, map, push or attribute of which elements are still missing."""

    kind: int
    missing: int
    items: list[Reply] = field(default_factory=list)


_DEPTH_MAX: Final = 64
_AGGREGATES: Final = b"*~%>|"
_BLOBS: Final = b"$=!"


class ReplyParser(_Parser):
    """Takes the replies, RESP2 or RESP3, out of what a server sends.

    Errors are items, not raised. Pushes and attributes, for which nobody asked, are dropped.
    """

    def __init__(self) -> None:
        super().__init__()
        self._open: list[_Aggregate] = []  # outermost first
        self._blob = (0, -1)  # kind and length of the blob whose bytes are awaited, if any
        self._fault = ""

    def take(self) -> list[Reply]:
        """All replies that are complete.

        Raises ProtocolError if the server does not speak RESP, once the replies before are taken.
        """
        replies: list[Reply] = []
        buffer = self._gather()
        if buffer:
            try:
                used = self._take_replies(buffer, replies)
            except (ProtocolError, ValueError) as error:
                self._fault = str(error)
                self._break()
            else:
                self._buffer = buffer[used:]
        if self.broken and not replies:
            raise ProtocolError(self._fault)
        return replies

    def _take_replies(self, buffer: bytes, replies: list[Reply]) -> int:
        at = 0
        while at < len(buffer):
            kind, length = self._blob
            if length >= 0:
                end = at + length
                if len(buffer) < end + 2:
                    self._bytes_needed = length + 2
                    break
                self._blob = (0, -1)
                self._place(_blob(kind, buffer[at:end]), replies)
            else:
                end = self._header_end(buffer, at, "line")
                if end < 0:
                    break
                self._take_header(buffer[at], buffer[at + 1 : end], replies)
            at = end + 2
        return at

    def _take_header(self, kind: int, text: bytes, replies: list[Reply]) -> None:
        if kind in _BLOBS and text != b"-1":
            self._blob = (kind, _length(text))
        elif kind in _AGGREGATES and text != b"-1":
            self._begin_aggregate(kind, _length(text), replies)
        else:
            self._place(_scalar(kind, text), replies)

    def _begin_aggregate(self, kind: int, length: int, replies: list[Reply]) -> None:
        if len(self._open) == _DEPTH_MAX:
            raise ProtocolError(f"nested more than {_DEPTH_MAX} deep")
        elements = 2 * length if kind in b"%|" else length
        self._open.append(_Aggregate(kind, elements))
        if not elements:
            self._close_full(replies)

    def _place(self, value: Reply, replies: list[Reply]) -> None:
        """Puts a value where it belongs: into the innermost open aggregate, or out."""
        if not self._open:
            replies.append(value)
            return
        aggregate = self._open[-1]
        aggregate.items.append(value)
        aggregate.missing -= 1
        if not aggregate.missing:
            self._close_full(replies)

    def _close_full(self, replies: list[Reply]) -> None:
        aggregate = self._open.pop()
        if aggregate.kind in b">|":
            return
        items = aggregate.items
        value: Reply = items
        if aggregate.kind == 0x25:  # "%"
            value = {_map_key(key): item for key, item in zip(items[::2], items[1::2], strict=True)}
        self._place(value, replies)


def _map_key(key: Reply) -> bytes:
    if isinstance(key, bytes):
        return key
    if isinstance(key, str):
        return key.encode()
    raise ProtocolError("a map has a key that is no string")


def _length(text: bytes) -> int:
    length = _header_int(text)
    if length is None or length < 0:
        raise ProtocolError(f"{text[:20]!r} is not a length")
    return length


def _blob(kind: int, data: bytes) -> Reply:
    if kind == 0x24:  # "$"
        return data
    text = data.decode("utf-8", "backslashreplace")
    return decode_error(text) if kind == 0x21 else Verbatim(text[4:])  # "!"; "=" with "txt:"


def _scalar(kind: int, text: bytes) -> Reply:
    """The value of a line that is complete in itself; raises ProtocolError or ValueError."""
    match chr(kind):
        case "+":
            return OK if text == b"OK" else SimpleString(text.decode("utf-8", "backslashreplace"))
        case "-":
            return decode_error(text.decode("utf-8", "backslashreplace"))
        case ":" | "(":
            return int(text)
        case "_" | "$" | "*":
            return None
        case "#":
            return int(text == b"t")
        case ",":
            return text  # a double, as it was sent
        case other:
            raise ProtocolError(f"no reply begins with {other!r}")


# ---- Values as JSON, and the replies of the line language --------------------------------------

# json's own recursion ends near 1000 levels, counted from wherever the caller stands; on Python 3.13
# only where the stack of a thread of 1 MiB has long ended, and with it the process.
_JSON_DEPTH_MAX: Final = 256
# In one reply to a line. No other thread runs while the standard library reads or writes JSON: some
# 0.1 s a MiB and, for a value of 64 MiB, longer than a leader may be silent.
LINE_JSON_BYTES_MAX: Final = 1024 * 1024


def json_or_text(value: bytes) -> object:
    """What a stored value stands for: the JSON that it is, else text.

    JSON is strict (no NaN, Infinity or number beyond a float's range) and at most 256 deep. Bytes
    that are not UTF-8 are no JSON; the text keeps them as surrogates (PEP 383).
    """
    try:
        text = value.decode()
    except UnicodeDecodeError:
        return value.decode("utf-8", "surrogateescape")
    if _is_text_too_deep(text):
        return text
    try:
        found: object = _JSON.decode(text)
    except (ValueError, RecursionError):
        return text  # ValueError is also what an integer of more than 4300 digits gives
    return found


def text_or_json_bytes(value: object) -> bytes:
    """What to store so that ``json_or_text`` gives ``value`` again, with its type.

    Text is stored as it is unless it reads as JSON: then, as all else, it becomes JSON.
    Raises ValueError or TypeError for what JSON can't hold.
    """
    if isinstance(value, str):
        try:
            data = value.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            return json.dumps(value).encode()  # lone surrogates can only be escaped
        if json_or_text(data) == value:
            return data
    try:
        data = _dump(_COMPACT_JSON, value)
    except RecursionError:
        data = b""
    if not data or _is_too_deep(value):
        raise ValueError(f"nested more than {_JSON_DEPTH_MAX} deep")
    return data


def reply_size_bytes(reply: Reply) -> int:
    """What a reply weighs; only what may be large counts."""
    if isinstance(reply, RepeatedReply):
        return reply_size_bytes(reply.reply)
    if isinstance(reply, bytes):
        return len(reply)
    return sum(map(reply_size_bytes, reply)) if isinstance(reply, list) else 0


def line_value(reply: Reply) -> object:
    """A reply, or a part of one, as the line language shows it.

    Values are read as JSON where they are JSON, and not more than LINE_JSON_BYTES_MAX. One that is
    not UTF-8 becomes ``{"base64": "..."}``; a JSON value of that very form is shown as text, so
    nothing else does.
    """
    return _line_value(reply, reads_json=reply_size_bytes(reply) <= LINE_JSON_BYTES_MAX)


def _line_value(reply: Reply, *, reads_json: bool) -> object:
    match reply:
        case bytes():
            if not _is_utf8(reply):
                return _base64(reply)
            if not reads_json:
                return reply.decode()
            found = json_or_text(reply)
            looks_binary = isinstance(found, dict) and found.keys() == {"base64"}
            return reply.decode() if looks_binary else found
        case KVError():
            return {"code": reply.code, "message": str(reply)}
        case dict():
            return {
                str(line_key(key)): _line_value(item, reads_json=reads_json)
                for key, item in reply.items()
            }
        case list() | tuple():
            return [_line_value(item, reads_json=reads_json) for item in reply]
        case _:
            return reply


def line_key(key: bytes) -> object:
    """A key as the line language shows it: text whatever it looks like, or base64 as above."""
    return key.decode() if _is_utf8(key) else _base64(key)


def encode_line(fields: Mapping[str, object]) -> bytes:
    """A reply of the line language: one JSON object in one line."""
    return _dump(_LINE_JSON, fields) + b"\n"


# Made once: json.dumps with options of one's own makes an encoder for each call.
_LINE_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
_COMPACT_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _dump(encoder: json.JSONEncoder, value: object) -> bytes:
    try:
        return encoder.encode(value).encode()
    except UnicodeEncodeError:  # a lone surrogate, which valid JSON can hold: "\\ud800"
        return json.dumps(value, allow_nan=False).encode()


def _is_utf8(data: bytes) -> bool:
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _base64(data: bytes) -> object:
    return {"base64": base64.b64encode(data).decode()}


# Strings, arrays and objects that are empty, and the brackets of all others. A string is taken to
# the end of the text if it has none itself, so that no byte is looked at more than twice.
_JSON_TOKEN = re.compile(
    r'"(?:[^"\\]++|\\.)*+"?|\[[ \t\n\r]*+\]|\{[ \t\n\r]*+\}|[\[\]{}]', re.DOTALL
)
_JSON_STEPS: Final = {"[": 1, "{": 1, "]": -1, "}": -1}


def _is_text_too_deep(text: str) -> bool:
    """``_is_too_deep`` of what ``text`` would be as JSON, without a recursion."""
    if text.count("[") + text.count("{") <= _JSON_DEPTH_MAX:
        return False
    depth = 0
    for token in _JSON_TOKEN.finditer(text):
        depth += _JSON_STEPS.get(token[0], 0)
        if depth > _JSON_DEPTH_MAX:
            return True
    return False


def _is_too_deep(value: object) -> bool:
    level: Iterable[object] = [value]
    for _ in range(_JSON_DEPTH_MAX + 1):
        level = [child for item in level for child in _children(item)]
        if not level:
            return False
    return True


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list | tuple) else ()


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):
        raise ValueError(f"{text[:20]} is beyond a float")
    return number


def _refuse(word: str) -> object:
    raise ValueError(f"{word} is not JSON")


_JSON = json.JSONDecoder(parse_float=_finite, parse_constant=_refuse)
