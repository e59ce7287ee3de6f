"""The command table, and everything about a command that can be said without knowing the state.

Rule 1: one table. Names, arities, flags, key positions and help texts stand here and nowhere else.
Rule 2: ``check`` finds every fault that does not depend on the stored data or a clock, so that a
bad request is refused before it is proposed, and the same parsers serve ``kv_store.py`` at apply.
Rule 3: pure functions of their arguments; error texts and number rules are those of Redis 7.

Called on client threads (check) and on the applier (parse, decode). Read on in ``kv_store.py``.
"""

from __future__ import annotations

import binascii
import functools
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from kv_errors import BadRequestError, TooLargeError
from kv_types import Reply, SimpleString

INT64_MAX: Final = 2**63 - 1
INT64_MIN: Final = -(2**63)

# ---- The table ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Command:
    """One row of the table.

    ``arity`` counts the name too; negative means "at least" (Redis' convention). Keys stand at
    ``first_key``, ``first_key + key_step`` ... up to ``last_key`` (-1: the end; 0: no keys).
    ``since`` is the Redis version that brought the command, or ours.

    Flags: ``write`` goes through the log; ``read`` is answered from the store; ``fast`` is O(1) a
    key; ``admin`` is for operators; ``blind`` is a write that may be answered without looking at
    the state (see ``is_blind``); ``internal`` is written by the servers themselves only.
    """

    name: str
    arity: int
    flags: frozenset[str]
    first_key: int
    last_key: int
    key_step: int
    group: str
    since: str
    usage: str
    summary: str


_Keys = tuple[int, int, int]
_NONE: Final[_Keys] = (0, 0, 0)
_ONE: Final[_Keys] = (1, 1, 1)
_ALL: Final[_Keys] = (1, -1, 1)
_PAIRS: Final[_Keys] = (1, -1, 2)
_OWN = "kv-0.1"

# By group: usage (its first word is the name), arity, flags, keys, since, summary.
# fmt: off
_TABLE: Final[dict[str, tuple[tuple[str, int, str, _Keys, str, str], ...]]] = {
    "string": (
        ("GET key", 2, "read fast", _ONE, "1.0.0", "The value of a key, or null."),
        ("GETS key", 2, "read fast", _ONE, _OWN, "The value of a key and its version, or null."),
        ("MGET key [key ...]", -2, "read fast", _ALL, "1.0.0", "The values of several keys."),
        ("STRLEN key", 2, "read fast", _ONE, "2.2.0", "The length of a value in bytes."),
        ("SET key value [NX|XX|IFEQ old] [GET] [EX s|PX ms|EXAT s|PXAT ms|KEEPTTL]", -3, "write",
         _ONE, "1.0.0", "Sets a key, if the condition holds; drops its expiry without KEEPTTL."),
        ("CAS key expected-version value", 4, "write fast", _ONE, _OWN,
         "Sets a key if its version is the expected one (0: no such key); the new version."),
        ("SETNX key value", 3, "write fast", _ONE, "1.0.0", "Sets a key unless it exists."),
        ("SETEX key seconds value", 4, "write blind", _ONE, "2.0.0", "Sets a key with an expiry."),
        ("PSETEX key milliseconds value", 4, "write blind", _ONE, "2.6.0",
         "Sets a key with an expiry in milliseconds."),
        ("GETSET key value", 3, "write fast", _ONE, "1.0.0", "Sets a key; its former value."),
        ("GETDEL key", 2, "write fast", _ONE, "6.2.0", "Deletes a key; its former value."),
        ("MSET key value [key value ...]", -3, "write blind", _PAIRS, "1.0.1",
         "Sets several keys at once."),
        ("APPEND key value", 3, "write fast", _ONE, "2.0.0", "Appends to a value; its new length."),
        ("INCR key", 2, "write fast", _ONE, "1.0.0", "Adds one to an integer; the result."),
        ("DECR key", 2, "write fast", _ONE, "1.0.0", "Takes one from an integer; the result."),
        ("INCRBY key increment", 3, "write fast", _ONE, "1.0.0", "Adds to an integer; the result."),
        ("DECRBY key decrement", 3, "write fast", _ONE, "1.0.0",
         "Subtracts from an integer; the result."),
    ),
    "generic": (
        ("DEL key [key ...]", -2, "write", _ALL, "1.0.0", "Deletes keys; how many there were."),
        ("DELETE key [key ...]", -2, "write", _ALL, _OWN, "The same as DEL."),
        ("UNLINK key [key ...]", -2, "write fast", _ALL, "4.0.0", "The same as DEL."),
        ("DELEX key [IFEQ value]", -2, "write fast", _ONE, "8.4.0",
         "Deletes a key if it holds the value; 1 or 0."),
        ("EXISTS key [key ...]", -2, "read fast", _ALL, "1.0.0", "How many of the keys exist."),
        ("TYPE key", 2, "read fast", _ONE, "1.0.0", "The type of a key's value: string or none."),
        ("KEYS pattern", 2, "read", _NONE, "1.0.0", "All keys that match a glob pattern."),
        ("TTL key", 2, "read fast", _ONE, "1.0.0",
         "Seconds until a key expires; -1 without expiry, -2 without key."),
        ("PTTL key", 2, "read fast", _ONE, "2.6.0", "As TTL, in milliseconds."),
        ("EXPIRE key seconds [NX|XX|GT|LT]", -3, "write fast", _ONE, "1.0.0",
         "Sets the time a key has left; 1, or 0 if not done."),
        ("PEXPIRE key milliseconds [NX|XX|GT|LT]", -3, "write fast", _ONE, "2.6.0",
         "As EXPIRE, in milliseconds."),
        ("EXPIREAT key unix-seconds [NX|XX|GT|LT]", -3, "write fast", _ONE, "1.2.0",
         "Sets the moment a key expires; 1, or 0 if not done."),
        ("PEXPIREAT key unix-milliseconds [NX|XX|GT|LT]", -3, "write fast", _ONE, "2.6.0",
         "As EXPIREAT, in milliseconds."),
        ("PERSIST key", 2, "write fast", _ONE, "2.2.0", "Drops a key's expiry; 1, or 0 if none."),
        ("PURGE key deadline [key deadline ...]", -3, "write internal", _PAIRS, _OWN,
         "Deletes keys whose deadline is still the one named and has passed."),
    ),
    "session": (
        ("SESSION subcommand [argument ...]", -2, "write", _NONE, _OWN,
         "OPEN, CLOSE id, or DO id serial first-unanswered command: a write that is done once."),
    ),
    "connection": (
        ("PING [message]", -1, "fast", _NONE, "1.0.0", "PONG, or the message."),
        ("ECHO message", 2, "fast", _NONE, "1.0.0", "The message."),
        ("HELLO [2|3 [SETNAME name]]", -1, "fast", _NONE, "6.0.0",
         "Chooses RESP2 or RESP3; who the server is."),
        ("SELECT index", 2, "fast", _NONE, "1.0.0", "Chooses a database: there is only 0."),
        ("CLIENT subcommand [argument ...]", -2, "", _NONE, "2.4.0", "About this connection."),
        ("READONLY", 1, "fast", _NONE, "3.0.0", "Lets a secondary answer reads, maybe stale ones."),
        ("READWRITE", 1, "fast", _NONE, "3.0.0", "Takes READONLY back."),
        ("RESET", 1, "fast", _NONE, "6.2.0", "Puts the connection back as it was when opened."),
        ("QUIT", -1, "fast", _NONE, "1.0.0", "Closes the connection."),
    ),
    "server": (
        ("STATUS", 1, "", _NONE, _OWN, "This node's role, term and indexes."),
        ("CLUSTER [subcommand]", -1, "", _NONE, "3.0.0", "As STATUS, with all members."),
        ("MEMBER subcommand [argument ...]", -2, "admin", _NONE, _OWN,
         "Lists or changes who belongs to the cluster."),
        ("FAILOVER [TO node-id]", -1, "admin", _NONE, _OWN,
         "Lets another voter lead, without an election timeout."),
        ("BACKUP", 1, "admin", _NONE, _OWN,
         "Sends the whole state, then closes the connection."),
        ("HELP [command]", -1, "", _NONE, _OWN, "The commands, or one of them."),
        ("INFO [section ...]", -1, "", _NONE, "1.0.0", "The server's figures, as text."),
        ("ROLE", 1, "fast", _NONE, "2.8.12", "Whether this node is the primary, and of whom."),
        ("COMMAND [subcommand [argument ...]]", -1, "", _NONE, "2.8.13", "This table."),
        ("CONFIG subcommand [argument ...]", -2, "admin", _NONE, "2.0.0", "The settings."),
        ("DBSIZE", 1, "read fast", _NONE, "1.0.0", "How many keys there are."),
        ("FLUSHALL [ASYNC|SYNC]", -1, "write blind", _NONE, "1.0.0", "Deletes every key."),
        ("TIME", 1, "fast", _NONE, "2.6.0", "The node's clock: seconds and microseconds."),
        ("WAIT numreplicas timeout-ms", 3, "", _NONE, "3.0.0",
         "How many other voters hold this connection's last write."),
    ),
}
# fmt: on

COMMANDS: Final[Mapping[str, Command]] = MappingProxyType(
    {
        (name := usage.split()[0]): Command(
            name, arity, frozenset(flags.split()), *keys, group, since, usage, summary
        )
        for group, rows in _TABLE.items()
        for usage, arity, flags, keys, since, summary in rows
    }
)

# What a client may ask for. Both usual spellings are keys, which saves most calls an upper().
_BY_WORD: Final[dict[bytes, Command]] = {
    word: command
    for command in COMMANDS.values()
    if "internal" not in command.flags
    for word in (command.name.encode(), command.name.lower().encode())
}


def lookup(argv: Sequence[bytes]) -> Command:
    """The row of a client's request, its arity checked; ``argv`` is not empty.

    Raises BadRequestError for an unknown (or internal) command and for a wrong arity.
    """
    command = _BY_WORD.get(argv[0]) or _BY_WORD.get(argv[0].upper())
    if command is None:
        raise BadRequestError(_unknown_command_text(argv))
    arity = command.arity
    if (len(argv) != arity) if arity > 0 else (len(argv) < -arity):
        raise wrong_arity(command.name)
    return command


def wrong_arity(name: str) -> BadRequestError:
    """The error for a wrong number of arguments, as Redis words it."""
    return BadRequestError(f"wrong number of arguments for '{name.lower()}' command")


def _unknown_command_text(argv: Sequence[bytes]) -> str:
    # As Redis: name and arguments are cut so that the error stays a line whatever was sent.
    args = ""
    for arg in argv[1:]:
        if len(args) >= 128:
            break
        args += f"'{_printable(arg[: 128 - len(args)])}' "
    return f"unknown command '{_printable(argv[0][:128])}', with args beginning with: {args}"


def _printable(text: bytes) -> str:
    return text.decode("utf-8", "backslashreplace")


def keys_of(command: Command, argv: Sequence[bytes]) -> list[bytes]:
    """The keys that a request of the right arity names."""
    if not command.first_key:
        return []
    end = len(argv) if command.last_key < 0 else command.last_key + 1
    return list(argv[command.first_key : end : command.key_step])


def is_blind(argv: Sequence[bytes]) -> bool:
    """Whether a checked request's reply is OK whatever the store holds."""
    command = lookup(argv)
    if command.name == "SET":
        options = parse_set(argv)
        return options.is_unconditional and not options.get
    return "blind" in command.flags


# ---- Arguments ---------------------------------------------------------------------------------

_INTEGER = re.compile(rb"0|-?[1-9][0-9]{0,18}")
_SYNTAX_ERROR = "syntax error"


def parse_int(text: bytes) -> int:
    """A signed 64-bit integer in its one canonical spelling: no blank, plus or leading zero.

    Raises BadRequestError. Python's ``int`` would take " 11", "1_0", "+1" and other scripts' digits.
    """
    if _INTEGER.fullmatch(text):
        number = int(text)
        if INT64_MIN <= number <= INT64_MAX:
            return number
    raise BadRequestError("value is not an integer or out of range")


@dataclass(frozen=True, slots=True)
class Expiry:
    """A time to live (relative) or a moment (``is_absolute``, Unix time), in milliseconds."""

    ms: int
    is_absolute: bool

    def deadline_ms(self, now_ms: int) -> int:
        """The moment of expiry in Unix milliseconds; may lie in the past."""
        return self.ms if self.is_absolute else now_ms + self.ms


# Milliseconds a unit, and whether it counts from 1970.
_EXPIRY_OPTIONS: Final = {
    b"EX": (1000, False),
    b"PX": (1, False),
    b"EXAT": (1000, True),
    b"PXAT": (1, True),
}
_EXPIRY_COMMANDS: Final = {
    "EXPIRE": (1000, False),
    "PEXPIRE": (1, False),
    "EXPIREAT": (1000, True),
    "PEXPIREAT": (1, True),
    "SETEX": (1000, False),
    "PSETEX": (1, False),
}
# Redis refuses now + ttl > 2^63-1. A bound of its own (146 million years) keeps the clock out of
# it: whether a request is good is known before it is proposed, and is the same on every node.
_TTL_MS_MAX: Final = 2**62


def _parse_expiry(amount: bytes, unit_ms: int, is_absolute: bool, command: str) -> Expiry:
    ms = parse_int(amount) * unit_ms
    if not INT64_MIN <= ms <= (INT64_MAX if is_absolute else _TTL_MS_MAX):
        raise _invalid_expire_time(command)
    return Expiry(ms, is_absolute)


def _invalid_expire_time(command: str) -> BadRequestError:
    return BadRequestError(f"invalid expire time in '{command.lower()}' command")


@dataclass(frozen=True, slots=True)
class SetOptions:
    """The options of SET; ``if_equal`` is the value that IFEQ asks for."""

    if_missing: bool = False  # NX
    if_exists: bool = False  # XX
    if_equal: bytes | None = None
    get: bool = False
    keep_ttl: bool = False
    expiry: Expiry | None = None

    @property
    def is_unconditional(self) -> bool:
        """Whether the key is set whatever it holds."""
        return not (self.if_missing or self.if_exists or self.if_equal is not None)


_PLAIN_SET = SetOptions()


def parse_set(argv: Sequence[bytes]) -> SetOptions:
    """The options of a SET, SETEX or PSETEX; raises BadRequestError."""
    if len(argv) == 3:
        return _PLAIN_SET
    name = argv[0].upper().decode()
    if name != "SET":
        expiry = _parse_expiry(argv[2], *_EXPIRY_COMMANDS[name], name)
        if expiry.ms <= 0:
            raise _invalid_expire_time(name)
        return SetOptions(expiry=expiry)
    flags: set[bytes] = set()
    values: dict[bytes, bytes] = {}  # of the options that take one
    rest = iter(argv[3:])
    for word in rest:
        option = word.upper()
        if option in {b"NX", b"XX", b"GET", b"KEEPTTL"}:
            flags.add(option)
        elif option == b"IFEQ" or option in _EXPIRY_OPTIONS:
            value = next(rest, None)
            if value is None:
                raise BadRequestError(_SYNTAX_ERROR)
            values[option] = value
        else:
            raise BadRequestError(_SYNTAX_ERROR)
    return _set_options(flags, values)


def _set_options(flags: set[bytes], values: dict[bytes, bytes]) -> SetOptions:
    if_equal = values.pop(b"IFEQ", None)
    conditions = (b"NX" in flags) + (b"XX" in flags) + (if_equal is not None)
    # What is left in ``values`` says when to expire.
    if conditions > 1 or len(values) + (b"KEEPTTL" in flags) > 1:
        raise BadRequestError(_SYNTAX_ERROR)
    expiry = None
    for option, amount in values.items():
        expiry = _parse_expiry(amount, *_EXPIRY_OPTIONS[option], "set")
        if expiry.ms <= 0:
            raise _invalid_expire_time("set")
    return SetOptions(
        if_missing=b"NX" in flags,
        if_exists=b"XX" in flags,
        if_equal=if_equal,
        get=b"GET" in flags,
        keep_ttl=b"KEEPTTL" in flags,
        expiry=expiry,
    )


@dataclass(frozen=True, slots=True)
class ExpireOptions:
    """When an EXPIRE or one of its kin lets the key expire, and on which conditions.

    A key without expiry counts as one that never ends: GT refuses it, LT takes it.
    """

    expiry: Expiry
    if_none: bool = False  # NX: only if the key has no expiry
    if_some: bool = False  # XX: only if it has one
    if_later: bool = False  # GT: only if the new deadline is later
    if_earlier: bool = False  # LT


def parse_expire(argv: Sequence[bytes]) -> ExpireOptions:
    """The arguments of EXPIRE, PEXPIRE, EXPIREAT or PEXPIREAT; raises BadRequestError."""
    flags = {word.upper() for word in argv[3:]}
    for word in argv[3:]:
        if word.upper() not in {b"NX", b"XX", b"GT", b"LT"}:
            raise BadRequestError(f"Unsupported option {_printable(word[:128])}")
    if b"NX" in flags and len(flags) > 1:
        raise BadRequestError("NX and XX, GT or LT options at the same time are not compatible")
    if {b"GT", b"LT"} <= flags:
        raise BadRequestError("GT and LT options at the same time are not compatible")
    name = argv[0].upper().decode()
    expiry = _parse_expiry(argv[2], *_EXPIRY_COMMANDS[name], name)
    return ExpireOptions(expiry, b"NX" in flags, b"XX" in flags, b"GT" in flags, b"LT" in flags)


def parse_delex(argv: Sequence[bytes]) -> bytes | None:
    """The value that DELEX asks for, None if it deletes whatever there is."""
    if len(argv) == 2:
        return None
    if len(argv) != 4 or argv[2].upper() != b"IFEQ":
        raise BadRequestError(_SYNTAX_ERROR)
    return argv[3]


def parse_expected_version(argv: Sequence[bytes]) -> int:
    """The version that a CAS expects; 0 stands for "no such key". Raises BadRequestError."""
    version = parse_int(argv[2])
    if version < 0:
        raise BadRequestError("expected version is negative")
    return version


def parse_increment(argv: Sequence[bytes]) -> int:
    """What INCR, DECR, INCRBY or DECRBY adds; raises BadRequestError."""
    name = argv[0].upper()
    amount = parse_int(argv[2]) if len(argv) > 2 else 1
    if not name.startswith(b"DECR"):
        return amount
    if amount == INT64_MIN:
        raise BadRequestError("decrement would overflow")
    return -amount


# SESSION DO id serial first-unanswered; the command itself follows.
_SESSION_WORDS: Final = 5
# Those three numbers: the session, the serial of the command, and the first serial whose answer the
# client has not seen.
Once = tuple[int, int, int]


def acting(argv: Sequence[bytes]) -> Sequence[bytes]:
    """The command that acts: of a checked SESSION DO the one that it runs, else ``argv``."""
    if len(argv) > _SESSION_WORDS and argv[0].upper() == b"SESSION":
        return argv[_SESSION_WORDS:]
    return argv


def _check_session(argv: Sequence[bytes]) -> None:
    word = argv[1].upper()
    if word == b"DO":
        _check_session_do(argv)
    elif word not in {b"OPEN", b"CLOSE"}:
        text = _printable(argv[1][:128])
        raise BadRequestError(f"unknown subcommand '{text}'. Try HELP SESSION.")
    elif len(argv) != (2 if word == b"OPEN" else 3):
        raise wrong_arity(f"session|{word.decode()}")
    elif word == b"CLOSE":
        parse_int(argv[2])


def _check_session_do(argv: Sequence[bytes]) -> None:
    if len(argv) <= _SESSION_WORDS:
        raise wrong_arity("session|do")
    # Not ``parse_int``, which takes thrice the time.
    session_id, serial, first_unanswered = argv[2:_SESSION_WORDS]
    if not (session_id.isdigit() and serial.isdigit() and first_unanswered.isdigit()) or (
        len(session_id) + len(serial) + len(first_unanswered) > 60
    ):
        raise BadRequestError("session, serial and first unanswered serial are positive integers")
    if not 1 <= int(first_unanswered) <= int(serial) <= INT64_MAX >= int(session_id):
        raise BadRequestError("serials begin with 1, and the first unanswered is not after its own")
    if argv[_SESSION_WORDS].upper() == b"SESSION":
        raise BadRequestError("SESSION DO cannot run another SESSION")
    command = check(argv[_SESSION_WORDS:])
    if "write" not in command.flags:
        raise BadRequestError(f"'{command.name.lower()}' is no write, and needs no session")


def _check_mset(argv: Sequence[bytes]) -> None:
    if len(argv) % 2 == 0:
        raise wrong_arity("mset")


def _check_keys(argv: Sequence[bytes]) -> None:
    compile_glob(argv[1])


def _check_ping(argv: Sequence[bytes]) -> None:
    if len(argv) > 2:
        raise wrong_arity("ping")


def _check_flushall(argv: Sequence[bytes]) -> None:
    if len(argv) > 2 or (len(argv) == 2 and argv[1].upper() not in {b"ASYNC", b"SYNC"}):
        raise BadRequestError(_SYNTAX_ERROR)


_CHECKS: Final[dict[str, Callable[[Sequence[bytes]], object]]] = {
    "SET": parse_set,
    "SETEX": parse_set,
    "PSETEX": parse_set,
    "CAS": parse_expected_version,
    "DELEX": parse_delex,
    "INCRBY": parse_increment,
    "DECRBY": parse_increment,
    "EXPIRE": parse_expire,
    "PEXPIRE": parse_expire,
    "EXPIREAT": parse_expire,
    "PEXPIREAT": parse_expire,
    "KEYS": _check_keys,
    "MSET": _check_mset,
    "SESSION": _check_session,
    "PING": _check_ping,
    "FLUSHALL": _check_flushall,
}


# No other thread runs while KEYS compares its pattern with one key: for a key of 16 MiB up to a
# minute. Only here: ``apply`` takes longer ones, which a log from before this limit may hold.
KEY_BYTES_MAX: Final = 64 * 1024


def check(argv: Sequence[bytes]) -> Command:
    """``lookup``, and every check of the arguments that needs no state; raises BadRequestError."""
    command = lookup(argv)
    check_arguments = _CHECKS.get(command.name)
    if check_arguments is not None:
        check_arguments(argv)
    if "write" in command.flags:
        for key in keys_of(command, argv):
            if len(key) > KEY_BYTES_MAX:
                raise TooLargeError(f"a key may have {KEY_BYTES_MAX} bytes at most")
    return command


# ---- Payloads: a command as the log holds it ---------------------------------------------------

_PAYLOAD_FORMAT: Final = 1
_PAYLOAD_HEADER = struct.Struct(">BQI")  # format, now_ms, argc; then argc lengths, then the args
# Nearly all commands are this short, and a ready Struct halves the cost of packing.
_SHORT_HEADERS = tuple(struct.Struct(f">BQI{argc}I") for argc in range(8))
_ONCE_FORMAT: Final = 2
_ONCE_HEADER = struct.Struct(">BQQQBQI")  # format and a Once; then a payload of format 1
_SHORT_ONCE_HEADERS = tuple(struct.Struct(f">BQQQBQI{argc}I") for argc in range(8))


def encode_payload(now_ms: int, argv: Sequence[bytes]) -> bytes:
    """A checked command and its stamp as ``Entry.data``."""
    argc = len(argv)
    if argc > _SESSION_WORDS and argv[0].upper() == b"SESSION" and argv[1].upper() == b"DO":
        return _encode_once(now_ms, argv)
    header = _SHORT_HEADERS[argc] if argc < 8 else struct.Struct(f">BQI{argc}I")
    return header.pack(_PAYLOAD_FORMAT, now_ms, argc, *map(len, argv)) + b"".join(argv)


def _encode_once(now_ms: int, argv: Sequence[bytes]) -> bytes:
    once = int(argv[2]), int(argv[3]), int(argv[4])
    argv = argv[_SESSION_WORDS:]
    argc = len(argv)
    header = _SHORT_ONCE_HEADERS[argc] if argc < 8 else struct.Struct(f">BQQQBQI{argc}I")
    start = header.pack(_ONCE_FORMAT, *once, _PAYLOAD_FORMAT, now_ms, argc, *map(len, argv))
    return start + b"".join(argv)


def decode_payload(data: bytes) -> tuple[int, list[bytes], Once | None]:
    """The stamp, the command, and under which serial it is done once, if under any.

    Raises ValueError for bytes that ``encode_payload`` never made.
    """
    once, start = None, _PAYLOAD_HEADER.size
    if len(data) < start:
        raise ValueError("a payload's header is cut short")
    payload_format, now_ms, argc = _PAYLOAD_HEADER.unpack_from(data)
    if payload_format == _ONCE_FORMAT:
        start = _ONCE_HEADER.size
        if len(data) < start:
            raise ValueError("a payload's header is cut short")
        header = _ONCE_HEADER.unpack_from(data)
        _, session_id, serial, first_unanswered, payload_format, now_ms, argc = header
        once = (session_id, serial, first_unanswered)
    if payload_format != _PAYLOAD_FORMAT:
        raise ValueError(f"unknown payload format {payload_format}")
    at, start = start, start + 4 * argc
    if not argc or len(data) < start:
        raise ValueError(f"a payload's {argc} lengths are cut short")
    argv = []
    for length in struct.unpack_from(f">{argc}I", data, at):
        argv.append(data[start : start + length])
        start += length
    if start != len(data):
        raise ValueError(f"a payload of {len(data)} bytes says that it has {start}")
    return now_ms, argv, once


# ---- What COMMAND tells ------------------------------------------------------------------------

# Our flags in Redis' words; the others are for ourselves.
_REDIS_FLAGS: Final = {"write": "write", "read": "readonly", "admin": "admin", "fast": "fast"}


def command_row(command: Command) -> Reply:
    """What COMMAND and COMMAND INFO tell of it."""
    flags = [SimpleString(word) for flag, word in _REDIS_FLAGS.items() if flag in command.flags]
    first, last, step = command.first_key, command.last_key, command.key_step
    name = command.name.lower().encode()
    return [name, command.arity, flags, first, last, step, [], [], [], []]


def command_doc(command: Command) -> Reply:
    """What COMMAND DOCS tells of it."""
    return {
        b"summary": command.summary.encode(),
        b"since": command.since.encode(),
        b"group": command.group.encode(),
        b"arguments": _arguments(command),
    }


def _arguments(command: Command) -> Reply:
    """As redis-cli shows them in its help: all in one, for that is how the table has them."""
    _, _, text = command.usage.partition(" ")
    return [{b"name": text.encode(), b"type": b"string"}] if text else []


# ---- Slots and patterns ------------------------------------------------------------------------


def crc16_slot(key: bytes) -> int:
    """The cluster slot of a key, 0..16383; only a non-empty ``{tag}`` in it counts, if any.

    Source: Redis cluster specification, "Key distribution model" and "Hash tags".
    """
    opening = key.find(b"{")
    if opening >= 0:
        closing = key.find(b"}", opening + 1)
        if closing > opening + 1:
            key = key[opening + 1 : closing]
    return binascii.crc_hqx(key, 0) & 16383


# Compiling costs time and memory for each byte of a pattern, and longest keys are about this.
PATTERN_BYTES_MAX: Final = 4096


def glob_match(pattern: bytes, text: bytes) -> bool:
    """Whether a Redis glob matches all of ``text``; see ``compile_glob``."""
    return compile_glob(pattern).fullmatch(text) is not None


@functools.lru_cache(maxsize=64)
def compile_glob(pattern: bytes) -> re.Pattern[bytes]:
    r"""A Redis glob (``* ? [abc] [^a] [a-c] \x``) as a regular expression for ``fullmatch``.

    Each ``*`` with the fixed part after it becomes an atomic group: the first place where that
    part fits is as good as any later one, so no star is ever tried again once passed. That is the
    two-pointer matcher's rule, and bounds the steps by len(pattern) * len(text).

    Raises TooLargeError. Source: redis ``util.c``, stringmatchlen.
    """
    if len(pattern) > PATTERN_BYTES_MAX:
        raise TooLargeError(f"a pattern may have {PATTERN_BYTES_MAX} bytes at most")
    pieces = [b""]  # fixed parts; there is a star between each and the next
    at = 0
    while at < len(pattern):
        char = pattern[at : at + 1]
        at += 1
        if char == b"*":
            pieces.append(b"")
        elif char == b"?":
            pieces[-1] += b"."
        elif char == b"[":
            piece, at = _translate_class(pattern, at)
            pieces[-1] += piece
        else:
            if char == b"\\" and at < len(pattern):
                char = pattern[at : at + 1]
                at += 1
            pieces[-1] += re.escape(char)
    if len(pieces) == 1:
        return re.compile(pieces[0], re.DOTALL)
    first, *middle, last = pieces
    stars = b"".join(b"(?>.*?%b)" % piece for piece in middle if piece)
    # The last part must stand at the end, so its star may not stop at the first fit.
    return re.compile(first + stars + b".*" + last, re.DOTALL)


def _translate_class(pattern: bytes, at: int) -> tuple[bytes, int]:
    """The class that starts after ``[``, as a regular expression, and where it ends.

    A class that is never closed goes on to the end of the pattern; an empty one matches nothing.
    """
    is_negated = pattern[at : at + 1] == b"^"
    at += is_negated
    ranges = []
    while at < len(pattern) and pattern[at] != 0x5D:  # "]"
        if pattern[at] == 0x5C and at + 1 < len(pattern):  # a backslash
            ranges.append((pattern[at + 1], pattern[at + 1]))
            at += 2
        elif pattern[at + 1 : at + 2] == b"-" and at + 2 < len(pattern):
            ranges.append((pattern[at], pattern[at + 2]))
            at += 3
        else:
            ranges.append((pattern[at], pattern[at]))
            at += 1
    if not ranges:
        return (b"." if is_negated else b"(?!)"), at + 1
    inside = b"".join(b"\\x%02x-\\x%02x" % (min(pair), max(pair)) for pair in ranges)
    return b"[%b%b]" % (b"^" if is_negated else b"", inside), at + 1
