"""The state machine: replies as Redis gives them, versions, the hash, expiry, and what it costs.

Random histories are in ``test_kv_store_model.py``.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from kv_commands import COMMANDS, encode_payload
from kv_errors import BadRequestError, KVError, MismatchError, TooLargeError
from kv_store import (
    EXPIRED_KEYS_BYTES_MAX,
    EXPIRED_PAIRS_MAX,
    HISTORY_ENTRIES,
    VALUE_BYTES_MAX,
    ExpiredKeysError,
    KeyValueStore,
    purge_request,
)
from kv_types import OK, Reply, SimpleString

ROOT = Path(__file__).resolve().parent.parent
NOW = 1_700_000_000_000

NOT_AN_INTEGER = "value is not an integer or out of range"


class Node:
    """A store, the index of its next entry, and a clock that stands still until it is set."""

    def __init__(self) -> None:
        self.store = KeyValueStore()
        self.now_ms = NOW

    def write(self, *argv: bytes) -> Reply:
        """Applies a command as the next entry; an error becomes ``!`` and its text."""
        index = self.store.applied_index + 1
        return told(self.store.apply(index, encode_payload(self.now_ms, argv)))

    def purge(self, *pairs: tuple[bytes, int]) -> Reply:
        return self.write(*purge_request(pairs))

    def read(self, *argv: bytes) -> Reply:
        return told(self.store.read(argv, self.now_ms))

    def do(self, line: str) -> Reply:
        """The same for a line of words without blanks; ``""`` is the empty value."""
        argv = [b"" if word == '""' else word.encode() for word in line.split()]
        is_write = "write" in COMMANDS[argv[0].decode().upper()].flags
        return self.write(*argv) if is_write else self.read(*argv)


def told(reply: Reply) -> Reply:
    return f"!{reply}" if isinstance(reply, KVError) else reply


@pytest.fixture
def node() -> Node:
    return Node()


# ---- Replies ------------------------------------------------------------------------------------

# What is said -> what is answered: +simple string, !error, or JSON (its strings are bulk strings).
# Each block has a store of its own. NOW is 1700000000 s.
# Source: redis-server 7.0.15; IFEQ and DELEX as in Redis 8.4; CAS and GETS are ours.
CONVERSATIONS = """
# get
GET a -> null
SET a 1 -> +OK
GET a -> "1"
SET a "" -> +OK
GET a -> ""

# the case of words
set a 1 -> +OK
gEt a -> "1"
sEt a 2 xx GeT -> "1"

# set nx
SET a 1 NX -> +OK
SET a 2 NX -> null
GET a -> "1"
SET a 2 NX GET -> "1"
GET a -> "1"
SET b 1 NX GET -> null
GET b -> "1"

# set xx
SET a 1 XX -> null
GET a -> null
SET a 1 -> +OK
SET a 2 XX -> +OK
SET a 3 XX GET -> "2"
GET a -> "3"

# set get
SET a 1 GET -> null
SET a 2 GET -> "1"
GET a -> "2"

# set ifeq
SET a 1 IFEQ 1 -> null
GET a -> null
SET a 1 -> +OK
SET a 2 IFEQ x -> null
SET a 2 IFEQ x GET -> "1"
GET a -> "1"
SET a 2 IFEQ 1 -> +OK
SET a 3 IFEQ 2 GET -> "2"
GET a -> "3"
SET a "" IFEQ 3 -> +OK
SET a 4 IFEQ "" -> +OK

# set and the ttl
SET a 1 EX 10 -> +OK
TTL a -> 10
SET a 2 -> +OK
TTL a -> -1
SET a 2 PX 1500 -> +OK
PTTL a -> 1500
SET a 3 KEEPTTL -> +OK
PTTL a -> 1500
SET a 3 NX EX 99 -> null
PTTL a -> 1500
SET a 3 XX -> +OK
TTL a -> -1
SET a 3 EX 5 -> +OK
SET a 4 GET -> "3"
TTL a -> -1
SET a 3 EX 5 -> +OK
SET a 4 IFEQ 3 -> +OK
TTL a -> -1
SET b 3 KEEPTTL -> +OK
TTL b -> -1
SET a 1 EXAT 1700000007 -> +OK
PTTL a -> 7000
SET a 1 PXAT 1700000000007 -> +OK
PTTL a -> 7

# set in the past
SET a 1 -> +OK
SET a 2 PXAT 1700000000000 -> +OK
GET a -> null
DBSIZE -> 0
SET b 1 EXAT 1 -> +OK
EXISTS b -> 0
SET a 1 -> +OK
SET a 2 GET EXAT 1 -> "1"
DBSIZE -> 0

# set refused
SET a 1 NX XX -> !syntax error
SET a 1 EX 1 KEEPTTL -> !syntax error
SET a 1 FOO -> !syntax error
SET a 1 EX 0 -> !invalid expire time in 'set' command
SET a 1 EX 10.5 -> !value is not an integer or out of range
SET a -> !wrong number of arguments for 'set' command
DBSIZE -> 0

# setnx
SETNX a 1 -> 1
SETNX a 2 -> 0
GET a -> "1"

# setex
SETEX a 10 v -> +OK
GET a -> "v"
TTL a -> 10
PSETEX a 2000 w -> +OK
GET a -> "w"
PTTL a -> 2000
SETEX a 0 v -> !invalid expire time in 'setex' command
PSETEX a -1 v -> !invalid expire time in 'psetex' command
SETEX a x v -> !value is not an integer or out of range
GET a -> "w"

# getset
GETSET a 1 -> null
EXPIRE a 9 -> 1
GETSET a 2 -> "1"
TTL a -> -1

# getdel
GETDEL a -> null
SET a 1 -> +OK
GETDEL a -> "1"
EXISTS a -> 0

# mset
SET a 0 EX 9 -> +OK
MSET a 1 b 2 a 3 -> +OK
MGET a b c a -> ["3", "2", null, "3"]
TTL a -> -1
MSET a 1 b -> !wrong number of arguments for 'mset' command
MGET a b -> ["3", "2"]

# append
STRLEN a -> 0
APPEND a xy -> 2
EXPIRE a 9 -> 1
APPEND a z -> 3
STRLEN a -> 3
GET a -> "xyz"
TTL a -> 9
APPEND b "" -> 0
EXISTS b -> 1

# incr
INCR a -> 1
EXPIRE a 9 -> 1
INCRBY a 41 -> 42
DECR a -> 41
DECRBY a 50 -> -9
GET a -> "-9"
TTL a -> 9
DECR b -> -1

# incr at the ends of 64 bits
SET a 9223372036854775807 -> +OK
INCR a -> !increment or decrement would overflow
DECRBY a -1 -> !increment or decrement would overflow
GET a -> "9223372036854775807"
SET a -9223372036854775808 -> +OK
DECR a -> !increment or decrement would overflow
INCRBY a 9223372036854775807 -> -1
DECRBY a -9223372036854775808 -> !decrement would overflow
INCRBY a 1e3 -> !value is not an integer or out of range
GET a -> "-1"

# del
DEL a -> 0
MSET a 1 b 2 c 3 -> +OK
DEL a x a b -> 2
DELETE c -> 1
UNLINK c -> 0
DBSIZE -> 0

# delex
DELEX a -> 0
DELEX a IFEQ 1 -> 0
SET a 1 -> +OK
DELEX a IFEQ 2 -> 0
EXISTS a -> 1
DELEX a IFEQ 1 -> 1
SET a 1 -> +OK
DELEX a -> 1
EXISTS a -> 0

# exists and type
SET a 1 -> +OK
EXISTS a a b -> 2
TYPE a -> +string
TYPE b -> +none

# expire
EXPIRE a 10 -> 0
SET a 1 -> +OK
EXPIRE a 10 -> 1
PTTL a -> 10000
PEXPIRE a 1499 -> 1
TTL a -> 1
PEXPIRE a 1500 -> 1
TTL a -> 2
PEXPIRE a 499 -> 1
TTL a -> 0
EXPIREAT a 1700000005 -> 1
PTTL a -> 5000
PEXPIREAT a 1700000000005 -> 1
PTTL a -> 5
PEXPIREAT a 9223372036854775807 -> 1
PTTL a -> 9223370336854775807
EXPIRE a 9223372036854775807 -> !invalid expire time in 'expire' command
EXPIRE a x -> !value is not an integer or out of range
EXPIRE a 1 FOO -> !Unsupported option FOO
TTL b -> -2
PTTL b -> -2

# expire in the past
MSET a 1 b 1 c 1 d 1 -> +OK
EXPIRE a 0 -> 1
EXPIREAT b -1 -> 1
PEXPIRE c -1 -> 1
PEXPIREAT d 1700000000000 -> 1
DBSIZE -> 0

# expire nx
SET a 1 -> +OK
EXPIRE a 9 NX -> 1
EXPIRE a 8 NX -> 0
TTL a -> 9

# expire xx
SET a 1 -> +OK
EXPIRE a 9 XX -> 0
TTL a -> -1
EXPIRE a 9 -> 1
EXPIRE a 8 XX -> 1
TTL a -> 8

# expire gt
SET a 1 -> +OK
EXPIRE a 9 GT -> 0
TTL a -> -1
EXPIRE a 9 -> 1
EXPIRE a 9 GT -> 0
EXPIRE a 10 GT XX -> 1
EXPIRE a 0 GT -> 0
TTL a -> 10

# expire lt
SET a 1 -> +OK
EXPIRE a 9 LT XX -> 0
EXPIRE a 9 LT -> 1
EXPIRE a 9 LT -> 0
EXPIRE a 10 LT -> 0
EXPIRE a 8 LT -> 1
TTL a -> 8
EXPIRE a -1 LT -> 1
EXISTS a -> 0

# persist
PERSIST a -> 0
SET a 1 -> +OK
PERSIST a -> 0
EXPIRE a 9 -> 1
PERSIST a -> 1
TTL a -> -1

# keys
KEYS * -> []
MSET a1 x a2 x b1 x -> +OK
KEYS * -> ["a1", "a2", "b1"]
KEYS a? -> ["a1", "a2"]
KEYS [!a]1 -> ["a1"]
KEYS x -> []

# flushall
MSET a 1 b 2 -> +OK
EXPIRE a 9 -> 1
FLUSHALL -> +OK
DBSIZE -> 0
FLUSHALL ASYNC -> +OK
SET a 1 KEEPTTL -> +OK
TTL a -> -1

# cas, whose versions are indexes of the log
GETS a -> null
CAS a 5 x -> !the key is missing, not at version 5
CAS a 0 x -> 2
GETS a -> ["x", 2]
CAS a 0 y -> !the key is at version 2, not at version 0
CAS a 2 y -> 4
CAS a 2 z -> !the key is at version 4, not at version 2
EXPIRE a 9 -> 1
CAS a 4 z -> !the key is at version 6, not at version 4
CAS a 6 z -> 8
TTL a -> -1
CAS a x z -> !value is not an integer or out of range
GETS a -> ["z", 8]
"""
BLOCKS = [block.splitlines() for block in CONVERSATIONS.strip().split("\n\n")]


def expectation(text: str) -> object:
    """The reply that an answer in ``CONVERSATIONS`` stands for."""
    if text[0] in "+!":
        return SimpleString(text[1:]) if text[0] == "+" else text

    def bulk(value: object) -> object:
        if isinstance(value, list):
            return [bulk(item) for item in value]
        return value.encode() if isinstance(value, str) else value

    return bulk(json.loads(text))


@pytest.mark.parametrize("steps", [b[1:] for b in BLOCKS], ids=[b[0][2:] for b in BLOCKS])
def test_command_when_said_is_answered_as_redis_does(node: Node, steps: list[str]) -> None:
    """Every command answers as its documentation and a Redis server say."""
    for step in steps:
        line, answer = step.split(" -> ")
        reply, expected = node.do(line), expectation(answer)

        assert (line, reply, type(reply)) == (line, expected, type(expected))
        assert node.store.state_hash == node.store.recompute_state_hash(), line


@pytest.mark.parametrize(
    "value", [b"011", b"+1", b"-0", b"", b" 1", b"1 ", b"1e3", b"1_0", b"x", b"9223372036854775808"]
)
def test_incr_when_the_value_is_no_canonical_integer_is_refused(node: Node, value: bytes) -> None:
    """Only what Redis itself would print as a 64-bit integer is one."""
    node.write(b"SET", b"a", value)

    assert node.write(b"INCR", b"a") == "!" + NOT_AN_INTEGER
    assert node.read(b"GET", b"a") == value


def test_every_data_command_of_the_table_has_a_handler(node: Node) -> None:
    """What the table calls a write can be applied, and what it calls a read can be read."""
    for command in COMMANDS.values():
        argv = [command.name.encode(), *[b"1"] * (abs(command.arity) - 1)]
        if "write" in command.flags:
            node.write(*argv)  # raises ValueError for an unknown command
        elif "read" in command.flags:
            node.read(*argv)


def test_cas_when_refused_tells_the_present_version(node: Node) -> None:
    """A MismatchError carries the version to try again with."""
    node.write(b"SET", b"a", b"1")

    reply = node.store.apply(2, encode_payload(NOW, [b"CAS", b"a", b"7", b"2"]))

    assert isinstance(reply, MismatchError)
    assert reply.version == 1


def test_append_when_the_value_would_pass_512_mb_is_refused(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value may be as long as in Redis (proto-max-bulk-len), and no longer."""
    assert VALUE_BYTES_MAX == 512 * 1024 * 1024
    monkeypatch.setattr("kv_store.VALUE_BYTES_MAX", 4)
    node.write(b"APPEND", b"a", b"1234")

    reply = node.write(b"APPEND", b"a", b"5")

    assert reply == "!string exceeds maximum allowed size (proto-max-bulk-len)"
    assert node.read(b"GET", b"a") == b"1234"


def test_mget_when_the_values_are_more_than_512_mb_is_refused(node: Node) -> None:
    """A value that is named often enough would fill the memory, whatever it weighs itself."""
    count = 32
    value = bytes(VALUE_BYTES_MAX // count)
    node.write(b"SET", b"a", value)
    node.write(b"SET", b"b", b"1")

    assert node.read(b"MGET", *[b"a"] * count, b"none") == [value] * count + [None]
    reply = node.store.read([b"MGET", *[b"a"] * count, b"b"], NOW)
    assert isinstance(reply, TooLargeError)  # as a reply: who reads for many clients must not fail
    assert str(reply) == "the values of one MGET may have 536870912 bytes at most"


def test_value_when_binary_comes_back_unchanged(node: Node) -> None:
    """Keys and values are bytes: none of them is special."""
    everything = bytes(range(256))
    node.write(b"SET", everything, everything[::-1])

    assert node.read(b"GET", everything) == everything[::-1]
    assert node.read(b"KEYS", b"*") == [everything]


# ---- Versions, and writes that change nothing ---------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "SET a 2 NX",
        "SET b 2 XX",
        "SET a 2 IFEQ x",
        "SET a 2 NX GET",
        "SETNX a 2",
        "SET a 2 EX 0",
        "GETDEL b",
        "INCR a",
        "INCRBY a x",
        "DEL b",
        "DELEX a IFEQ y",
        "EXPIRE b 9",
        "EXPIRE a 9 GT",
        "PERSIST a",
        "CAS a 99 x",
        f"PURGE a {NOW - 1}",
        "DEL",
        "MSET a 1 b",
    ],
)
def test_write_when_it_changes_nothing_leaves_version_and_hash(node: Node, line: str) -> None:
    """A write that is refused, or has nothing to do, is not seen in the state."""
    node.do("SET a text")
    before = (node.read(b"GETS", b"a"), node.store.state_hash, node.store.memory_bytes)

    node.do(line)

    assert (node.read(b"GETS", b"a"), node.store.state_hash, node.store.memory_bytes) == before
    assert node.store.applied_index == 2


@pytest.mark.parametrize(
    "line", ["SET a 1", "APPEND a 2", "INCR a", "EXPIRE a 9", "PERSIST a", "MSET a 1", "GETSET a 1"]
)
def test_write_when_it_changes_a_key_gives_it_the_index_as_version(node: Node, line: str) -> None:
    """The version of a key is the log index of its last write, of value or deadline."""
    node.do("SET a 1 EX 5")
    before = node.store.state_hash

    node.do(line)

    reply = node.read(b"GETS", b"a")
    assert isinstance(reply, list)
    assert reply[1] == 2
    assert node.store.state_hash != before


# ---- The log ------------------------------------------------------------------------------------


def test_apply_when_entries_are_not_in_order_asserts(node: Node) -> None:
    """Every entry is applied once, in order: anything else is our bug and stops the node."""
    node.write(b"SET", b"a", b"1")

    for index in (1, 3):
        with pytest.raises(AssertionError):
            node.store.apply(index, encode_payload(NOW, [b"SET", b"a", b"2"]))
        with pytest.raises(AssertionError):
            node.store.skip(index)


@pytest.mark.parametrize(
    "data",
    [b"", b"junk", encode_payload(NOW, [b"LPUSH", b"a"]), encode_payload(NOW, [b"GET", b"a"])],
)
def test_apply_when_the_payload_is_no_write_raises(node: Node, data: bytes) -> None:
    """Bytes that no check lets through are a newer format or damage: going on would diverge."""
    with pytest.raises(ValueError):
        node.store.apply(1, data)


@pytest.mark.parametrize(
    "name",
    [c.name for c in COMMANDS.values() if c.flags >= {"write"} and "internal" not in c.flags],
)
def test_apply_when_arguments_are_wrong_answers_instead_of_raising(node: Node, name: str) -> None:
    """An entry that the check should have refused doesn't stop every node for ever."""
    for argc in range(6):
        index = node.store.applied_index + 1
        reply = node.store.apply(index, encode_payload(NOW, [name.encode(), *[b"x"] * argc]))

        assert not isinstance(reply, KVError) or isinstance(reply, BadRequestError)
        assert node.store.applied_index == index


def test_skip_when_called_moves_index_and_history_only(node: Node) -> None:
    """An entry that is no command counts as applied and changes nothing."""
    node.write(b"SET", b"a", b"1")
    state_hash = node.store.state_hash

    node.store.skip(2)

    assert node.store.applied_index == 2
    assert node.store.hash_at(1) == node.store.hash_at(2) == node.store.state_hash == state_hash


def test_hash_at_when_asked_knows_the_last_indexes_and_no_others(node: Node) -> None:
    """The hash after each of the last 8192 entries can be asked for, older and later ones not."""
    hashes = {0: 0}
    for index in range(1, HISTORY_ENTRIES + 101):
        node.write(b"INCR", b"a")
        hashes[index] = node.store.state_hash

    assert len(set(hashes.values())) == len(hashes)
    oldest = 101
    for index in (-1, 0, oldest - 1, HISTORY_ENTRIES + 101):
        assert node.store.hash_at(index) is None
    for index in (oldest, 5000, HISTORY_ENTRIES + 100):
        assert node.store.hash_at(index) == hashes[index]
    assert KeyValueStore().hash_at(0) == 0
    assert KeyValueStore().hash_at(-1) is None


# ---- The state hash -----------------------------------------------------------------------------


def store_of(*rows: tuple[bytes, bytes, int, int]) -> KeyValueStore:
    """A store with these keys, values, versions and deadlines (0: none), written in this order.

    Versions are log indexes, so another order of writing needs another way into the store.
    """
    store = KeyValueStore()
    for row in rows:
        store._put(*row)
    return store


def test_state_hash_when_keys_were_written_in_another_order_is_the_same() -> None:
    """Equal states have equal hashes, whatever way led there."""
    rows = [(b"k%d" % i, b"v%d" % i, i + 1, NOW + i if i % 3 else 0) for i in range(50)]
    shuffled = rows[:]
    random.Random(7).shuffle(shuffled)
    detour = [(b"k3", b"other", 99, NOW), (b"k4", b"other", 98, 0), *shuffled]

    expected = store_of(*rows).state_hash

    assert store_of(*shuffled).state_hash == expected
    assert store_of(*detour).state_hash == expected
    assert 0 < expected < 2**64


def test_state_hash_when_any_part_differs_is_another() -> None:
    """Key, value, version and deadline all count, and none can pass for a part of its neighbour."""
    states = [
        store_of(),
        store_of((b"ab", b"c", 1, 0)),
        store_of((b"a", b"bc", 1, 0)),
        store_of((b"ab", b"d", 1, 0)),
        store_of((b"ab", b"c", 2, 0)),
        store_of((b"ab", b"c", 1, 5)),
        store_of((b"ab", b"c", 5, 1)),
        store_of((b"a", b"x", 1, 0), (b"b", b"y", 1, 0)),
        store_of((b"a", b"y", 1, 0), (b"b", b"x", 1, 0)),
    ]

    assert len({store.state_hash for store in states}) == len(states)


# ---- Expiry -------------------------------------------------------------------------------------


def test_stamp_when_it_goes_backwards_counts_as_the_last_one(node: Node) -> None:
    """A primary with a slower clock resurrects nothing and gives no shorter lives (promise G5)."""
    node.write(b"SET", b"a", b"1", b"PX", b"100")
    node.now_ms = NOW + 100
    node.write(b"SET", b"other", b"1")
    node.now_ms = NOW - 3_600_000

    assert node.write(b"GETSET", b"a", b"2") is None
    assert node.write(b"SET", b"b", b"1", b"PX", b"50") == OK
    assert node.store.last_stamp_ms == NOW + 100
    assert node.read(b"PTTL", b"b") == 50


@pytest.mark.parametrize(
    ("line", "reply"),
    [
        ("SET a 2 NX", OK),
        ("SET a 2 XX", None),
        ("SET a 2 GET", None),
        ("SET a 2 IFEQ 1", None),
        ("SETNX a 2", 1),
        ("GETSET a 2", None),
        ("GETDEL a", None),
        ("APPEND a 2", 1),
        ("INCR a", 1),
        ("DEL a", 0),
        ("DELEX a IFEQ 1", 0),
        ("EXPIRE a 10", 0),
        ("PERSIST a", 0),
        ("CAS a 1 2", "!the key is missing, not at version 1"),
        ("CAS a 0 2", 2),
    ],
)
def test_write_when_its_key_is_due_finds_no_key(node: Node, line: str, reply: object) -> None:
    """A key whose deadline is at or before the entry's stamp is absent for it, and goes."""
    node.write(b"SET", b"a", b"1", b"PX", b"100")
    node.now_ms = NOW + 100

    assert node.do(line) == reply
    left = node.read(b"PTTL", b"a")  # raises if the old deadline were still there
    assert left == (-1 if node.read(b"EXISTS", b"a") else -2)
    assert node.store.state_hash == node.store.recompute_state_hash()


@pytest.mark.parametrize("line", ["SET a 2 KEEPTTL", "APPEND a 2", "INCR a"])
def test_write_that_keeps_the_ttl_when_the_key_is_due_has_none_to_keep(
    node: Node, line: str
) -> None:
    """KEEPTTL can't bring an expired key's deadline back."""
    node.write(b"SET", b"a", b"1", b"PX", b"100")
    node.now_ms = NOW + 100

    node.do(line)

    assert node.read(b"PTTL", b"a") == -1


def test_write_when_another_key_is_due_leaves_that_one(node: Node) -> None:
    """What an entry doesn't touch stays until something does: apply costs what the entry names."""
    node.write(b"SET", b"a", b"1", b"PX", b"100")
    node.now_ms = NOW + 1000
    node.write(b"SET", b"b", b"1")

    assert node.read(b"DBSIZE") == 2
    assert len(node.store) == 2


def test_purge_when_the_deadline_is_exactly_the_named_one_deletes(node: Node) -> None:
    """The stored deadline must equal the named one and have passed (raft-traps T59)."""
    node.write(b"SET", b"a", b"1", b"PX", b"100")

    replies = [node.purge((b"a", NOW + 100))]  # not due yet
    node.now_ms = NOW + 100
    replies += [node.purge((b"a", NOW + 99)), node.purge((b"a", NOW + 101))]
    before = len(node.store)
    replies.append(node.purge((b"a", NOW + 100), (b"a", NOW + 100), (b"missing", NOW)))

    assert replies == [0, 0, 0, 1]
    assert (before, len(node.store)) == (1, 0)


@pytest.mark.parametrize(
    "line", ["SET a 2", "SET a 2 EX 100", "PERSIST a", "EXPIRE a 100", "DEL a"]
)
def test_purge_when_late_or_twice_does_nothing(node: Node, line: str) -> None:
    """A purge that a former primary proposed can't take what was written since."""
    node.write(b"SET", b"a", b"1", b"PX", b"100")
    node.do(line)
    node.now_ms = NOW + 100
    before = node.store.state_hash

    assert node.purge((b"a", NOW + 100)) == 0
    assert node.purge((b"a", NOW + 100)) == 0
    assert node.store.state_hash == before


@pytest.mark.parametrize(
    "line",
    [
        "GET a",
        "GETS a",
        "STRLEN a",
        "TYPE a",
        "TTL a",
        "PTTL a",
        "MGET b a",
        "EXISTS b a",
        "KEYS a*",
    ],
)
def test_read_when_a_key_is_due_asks_for_the_purge(node: Node, line: str) -> None:
    """No answer rests on a reader's own clock; after the purge the same read says absent."""
    node.do("SET b 1 EX 1000")
    node.do("SET a 1 PX 100")
    node.now_ms = NOW + 99
    alive = node.do(line)
    node.now_ms = NOW + 100
    before = node.store.state_hash

    with pytest.raises(ExpiredKeysError) as caught:
        node.do(line)

    assert list(caught.value.pairs) == [(b"a", NOW + 100)]
    assert node.store.state_hash == before
    node.purge(*caught.value.pairs)
    assert node.do(line) != alive


@pytest.mark.parametrize(
    ("line", "seen"),
    [
        ("GET a", None),
        ("GETS a", None),
        ("STRLEN a", 0),
        ("MGET b a", [b"1", None]),
        ("EXISTS b a", 1),
        ("TYPE a", "none"),
        ("TTL a", -2),
        ("PTTL a", -2),
        ("KEYS *", [b"b"]),
    ],
)
def test_stale_read_when_a_key_is_due_does_not_show_it(node: Node, line: str, seen: object) -> None:
    """It changes nothing: what is due is deleted by the log alone (promise G5)."""
    node.do("SET b 1 EX 1000")
    node.do("SET a 1 PX 100")
    before = node.store.state_hash
    argv = [word.encode() for word in line.split()]

    assert node.store.read_stale(argv, NOW + 100) == seen

    assert node.store.state_hash == before
    assert len(node.store) == 2
    with pytest.raises(ExpiredKeysError):
        node.store.read(argv, NOW + 100)


@pytest.mark.parametrize("line", ["GET b", "MGET b", "EXISTS b c", "KEYS b*", "DBSIZE", "TTL b"])
def test_read_when_only_other_keys_are_due_answers(node: Node, line: str) -> None:
    """A read waits for no purge that its answer doesn't depend on."""
    node.do("SET b 1")
    node.do("SET a 1 PX 100")
    node.now_ms = NOW + 1000

    node.do(line)


def test_read_when_the_clock_is_behind_uses_the_last_stamp(node: Node) -> None:
    """TTL and visibility count from the latest stamp applied if the reader's clock is slower."""
    node.write(b"SET", b"a", b"1", b"PX", b"100")
    node.write(b"SET", b"b", b"1", b"PX", b"500")
    node.now_ms = NOW + 100
    node.write(b"SET", b"c", b"1")
    node.now_ms = NOW - 3_600_000

    assert node.read(b"PTTL", b"b") == 400
    with pytest.raises(ExpiredKeysError):
        node.read(b"GET", b"a")


def test_read_when_the_clock_is_ahead_changes_nothing_for_others(node: Node) -> None:
    """A reader that is an hour ahead asks for a purge, which the log's own time refuses."""
    node.write(b"SET", b"a", b"1", b"PX", b"100")
    with pytest.raises(ExpiredKeysError) as caught:
        node.store.read([b"GET", b"a"], NOW + 3_600_000)

    assert node.purge(*caught.value.pairs) == 0
    assert node.read(b"GET", b"a") == b"1"


def test_keys_when_very_many_are_due_names_some_at_a_time(node: Node) -> None:
    """A KEYS over a mass expiry asks for purges of a bounded size, and ends."""
    for number in range(2 * EXPIRED_PAIRS_MAX + 1):
        node.write(b"SET", b"k%d" % number, b"v", b"PX", b"1")
    node.now_ms = NOW + 1
    sizes = []
    while True:
        try:
            keys = node.read(b"KEYS", b"*")
        except ExpiredKeysError as error:
            sizes.append(len(error.pairs))
            node.purge(*error.pairs)
        else:
            break

    assert keys == []
    assert sizes == [EXPIRED_PAIRS_MAX, EXPIRED_PAIRS_MAX, 1]


def test_due_when_keys_are_large_then_one_purge_deletes_few_of_them(node: Node) -> None:
    """A PURGE is an entry of the log, which has to fit into a frame; a key alone always does."""
    part = EXPIRED_KEYS_BYTES_MAX // 4
    large = [b"%d" % number + bytes(part) for number in range(9)]
    huge = b"huge" + bytes(2 * EXPIRED_KEYS_BYTES_MAX)
    for key in (*large, huge, b"small"):
        node.write(b"SET", key, b"v", b"PX", b"1")
    node.now_ms = NOW + 1
    rounds = []
    while pairs := node.store.due(node.now_ms, 500):
        with pytest.raises(ExpiredKeysError) as caught:
            node.read(b"KEYS", b"*")
        assert sum(len(key) for key, _ in caught.value.pairs[1:]) <= EXPIRED_KEYS_BYTES_MAX
        rounds.append([len(key) for key, _ in pairs])
        node.purge(*pairs)

    assert sum(map(len, rounds)) == 11
    assert [sum(sizes) for sizes in rounds if len(sizes) > 1 and sum(sizes) > 4 * part] == []
    assert [len(huge)] in rounds
    assert node.read(b"KEYS", b"*") == []


def test_due_when_asked_names_the_earliest_until_they_are_purged(node: Node) -> None:
    """The primary learns what to purge, earliest first; a proposal that failed loses nothing."""
    for number in (3, 1, 4, 2):
        node.write(b"SET", b"k%d" % number, b"v", b"PX", b"%d" % number)
    node.write(b"PEXPIREAT", b"k1", b"%d" % (NOW + 1))  # the same deadline again
    node.write(b"PERSIST", b"k2")
    expected = [(b"k1", NOW + 1), (b"k3", NOW + 3)]

    assert node.store.due(NOW, 10) == []
    assert node.store.due(NOW + 3, 10) == expected
    assert node.store.due(NOW + 3, 10) == expected
    assert node.store.due(NOW + 3, 1) == expected[:1]
    node.now_ms = NOW + 3
    node.purge(*expected)
    assert node.store.due(NOW, 10) == []
    assert node.store.due(NOW + 4, 10) == [(b"k4", NOW + 4)]


@pytest.mark.parametrize("line", ["SET a 1 EX 9", "PERSIST a", "SET a 1", "DEL a", "FLUSHALL"])
def test_deadlines_when_replaced_for_ever_do_not_pile_up(node: Node, line: str) -> None:
    """The heap behind ``due`` is bounded by the deadlines there are, not by those there were."""
    for number in range(3000):
        node.write(b"SET", b"a", b"1", b"EX", b"%d" % (number + 1))
        node.do(line)

    assert len(node.store._heap) <= 1003


def test_due_when_deadlines_were_tidied_up_still_names_the_rest(node: Node) -> None:
    """The heap is rebuilt now and then: what is in it must be purged all the same (G5)."""
    for number in range(3000):
        node.write(b"SET", b"k%d" % number, b"1", b"PX", b"%d" % (number + 1))
    for number in range(2999):
        node.do(f"PERSIST k{number}")
    assert len(node.store._heap) < 2000, "it was rebuilt"

    assert [key for key, _ in node.store.due(NOW + 10_000, 10)] == [b"k2999"]


# ---- Memory -------------------------------------------------------------------------------------


def test_memory_bytes_when_everything_is_deleted_is_zero_again(node: Node) -> None:
    """The estimate is kept by adding and taking away, and nothing is lost on the way."""
    node.do("MSET a 1 b 22 c 333")
    three = node.store.memory_bytes
    node.do("EXPIRE a 100")
    node.do("EXPIRE a 200")
    with_deadline = node.store.memory_bytes
    node.do("APPEND b 4444")
    node.do("PERSIST a")

    assert node.store.memory_bytes == three + 4
    assert with_deadline > three > 6
    node.do("EXPIRE c 100")
    node.do("DEL a b c")
    assert node.store.memory_bytes == 0
    node.do("SET a 1 EX 5")
    node.do("FLUSHALL")
    assert node.store.memory_bytes == 0


MEMORY_PROGRAM = """
import json, sys
import psutil
from kv_commands import encode_payload
from kv_store import KeyValueStore

store, process = KeyValueStore(), psutil.Process()
before = process.memory_info().rss
for index in range(1, 1_000_001):
    argv = [b"SET", b"key:%012d" % index, b"v" * 64, *sys.argv[1].encode().split()]
    store.apply(index, encode_payload(1_700_000_000_000, argv))
rss = process.memory_info().rss - before
print(json.dumps({"rss": rss, "estimate": store.memory_bytes}))
"""


@pytest.mark.slow
@pytest.mark.parametrize(("options", "megabytes_max"), [("", 450), ("EX 1000", 600)])
def test_memory_when_a_million_keys_are_held_is_bounded_and_well_estimated(
    options: str, megabytes_max: int
) -> None:
    """A node with a million small keys fits in 600 MB: 150 for log and threads, the rest here."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM, options],
        cwd=ROOT,
        capture_output=True,
        check=True,
        timeout=120,
    )

    measured = json.loads(run.stdout)
    assert measured["rss"] < megabytes_max << 20
    assert measured["estimate"] == pytest.approx(measured["rss"], rel=0.2)
