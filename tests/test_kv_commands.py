"""The command table, the checks that need no state, payloads, slots and patterns."""

from __future__ import annotations

import re
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kv_commands import (
    COMMANDS,
    INT64_MAX,
    INT64_MIN,
    KEY_BYTES_MAX,
    PATTERN_BYTES_MAX,
    Once,
    acting,
    check,
    crc16_slot,
    decode_payload,
    encode_payload,
    glob_match,
    is_blind,
    keys_of,
    lookup,
    parse_delex,
    parse_expire,
    parse_increment,
    parse_int,
    parse_set,
)
from kv_errors import BadRequestError, TooLargeError

NOW_MS = 1_800_000_000_000


def words(line: str) -> list[bytes]:
    return [word.encode() for word in line.split()]


def refusal(line: str) -> str:
    """What ``check`` says against a request, empty if nothing."""
    try:
        check(words(line))
    except BadRequestError as error:
        return str(error)
    return ""


# ---- The table ---------------------------------------------------------------------------------


def test_table_when_read_then_each_row_agrees_with_its_usage() -> None:
    """A row's arity and keys are those that its usage shows."""
    for name, command in COMMANDS.items():
        required = re.sub(r"\[.*\]", "", command.usage).split()

        assert command.name == name == name.upper() == required[0]
        assert abs(command.arity) == len(required), command.usage
        if name != "QUIT":  # takes arguments and ignores them, as in Redis
            assert (command.arity < 0) == ("[" in command.usage), command.usage
        assert bool(command.first_key) == (required[1:2] == ["key"]), command.usage
        assert command.summary.endswith("."), command.usage


def test_table_when_read_then_what_touches_keys_is_either_read_or_write() -> None:
    """The server routes by these flags: a key command without one would bypass the log."""
    for command in COMMANDS.values():
        assert not command.flags - {"write", "read", "fast", "admin", "blind", "internal"}
        assert not {"read", "write"} <= command.flags
        if command.first_key:
            assert command.flags & {"read", "write"}, command.name


@pytest.mark.parametrize("word", ["GET", "get", "gEt"])
def test_lookup_when_case_differs_then_same_row(word: str) -> None:
    """Command names are ASCII case-insensitive (redis-facts 3.7)."""
    assert lookup([word.encode(), b"k"]) is COMMANDS["GET"]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        ([b"foo"], "unknown command 'foo', with args beginning with: "),
        (
            [b"Foo", b"bar", b"baz"],
            "unknown command 'Foo', with args beginning with: 'bar' 'baz' ",
        ),
        ([b"get"], "wrong number of arguments for 'get' command"),
        ([b"GET", b"a", b"b"], "wrong number of arguments for 'get' command"),
        ([b"mset", b"a"], "wrong number of arguments for 'mset' command"),
        ([b""], "unknown command '', with args beginning with: "),
        ([b"\xff"], r"unknown command '\xff', with args beginning with: "),
    ],
)
def test_lookup_when_refused_then_words_are_those_of_redis(argv: list[bytes], text: str) -> None:
    """Clients show these texts, and some look into them (redis-facts 3.5)."""
    with pytest.raises(BadRequestError) as caught:
        lookup(argv)

    assert str(caught.value) == text


def test_lookup_when_unknown_request_is_huge_then_error_stays_short() -> None:
    """An error quotes at most 128 bytes of the name and about as much of the arguments."""
    with pytest.raises(BadRequestError) as caught:
        lookup([b"x" * 10_000, b"y" * 100, b"z" * 10_000, b"never shown"])

    assert len(str(caught.value)) < 350
    assert "never" not in str(caught.value)


def test_lookup_when_internal_then_unknown() -> None:
    """A client can't purge: PURGE trusts the deadlines that it names."""
    assert "internal" in COMMANDS["PURGE"].flags
    assert refusal("PURGE k 1").startswith("unknown command 'PURGE'")


@pytest.mark.parametrize(
    ("line", "keys"),
    [("GET a", "a"), ("MSET a 1 b 2", "a b"), ("DEL a b c", "a b c"), ("SET a b EX 1", "a"),
     ("PING a", ""), ("KEYS a", "")],
)  # fmt: skip
def test_keys_of_when_asked_then_names_all_keys(line: str, keys: str) -> None:
    """Key positions follow first, last and step."""
    argv = words(line)

    assert keys_of(lookup(argv), argv) == words(keys)


@pytest.mark.parametrize(
    ("line", "blind"),
    [
        ("SET k v", True),
        ("set k v ex 10", True),
        ("SET k v KEEPTTL", True),
        ("MSET a 1 b 2", True),
        ("FLUSHALL", True),
        ("SETEX k 1 v", True),
        ("SET k v NX", False),
        ("SET k v XX", False),
        ("SET k v GET", False),
        ("SET k v IFEQ old", False),
        ("SETNX k v", False),
        ("INCR k", False),
        ("DEL k", False),
        ("CAS k 0 v", False),
        ("GET k", False),
    ],
)
def test_is_blind_when_reply_may_depend_on_state_then_false(line: str, blind: bool) -> None:
    """Only a write that answers OK whatever there is may be answered before it is applied."""
    assert is_blind(words(line)) is blind


# ---- Arguments ---------------------------------------------------------------------------------


@given(st.integers(INT64_MIN, INT64_MAX))
def test_parse_int_when_canonical_then_its_number(number: int) -> None:
    """Every signed 64-bit integer has exactly one spelling."""
    assert parse_int(str(number).encode()) == number


@pytest.mark.parametrize(
    "text",
    [" 11", "11 ", "011", "+11", "-0", "", "-", "1e3", "1_0", "0x1", "1.0", "--1", "1\n", "\u0663",
     str(2**63), str(-(2**63) - 1), "9" * 5000],
)  # fmt: skip
def test_parse_int_when_not_canonical_then_refused(text: str) -> None:
    """Python's int() would take some of these (redis-facts 3.1)."""
    with pytest.raises(BadRequestError, match="value is not an integer"):
        parse_int(text.encode())


NOT_AN_INTEGER = "value is not an integer or out of range"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("SET k v NX XX", "syntax error"),
        ("SET k v NX IFEQ a", "syntax error"),
        ("SET k v IFEQ", "syntax error"),
        ("SET k v EX", "syntax error"),
        ("SET k v EX 1 PX 1", "syntax error"),
        ("SET k v EX 1 KEEPTTL", "syntax error"),
        ("SET k v FOO", "syntax error"),
        ("SET k v EX 0", "invalid expire time in 'set' command"),
        ("SET k v PXAT -1", "invalid expire time in 'set' command"),
        ("SET k v EX 9223372036854775807", "invalid expire time in 'set' command"),
        ("SET k v PX 9223372036854775807", "invalid expire time in 'set' command"),
        ("SET k v EX abc", NOT_AN_INTEGER),
        ("SET k v EX 10.5", NOT_AN_INTEGER),
        ("SETEX k 0 v", "invalid expire time in 'setex' command"),
        ("PSETEX k -1 v", "invalid expire time in 'psetex' command"),
        ("SETEX k x v", NOT_AN_INTEGER),
        ("MSET a 1 b", "wrong number of arguments for 'mset' command"),
        ("INCRBY k +1", NOT_AN_INTEGER),
        ("DECRBY k -9223372036854775808", "decrement would overflow"),
        ("EXPIRE k 1 NX XX", "NX and XX, GT or LT options at the same time are not compatible"),
        ("EXPIRE k 1 NX GT", "NX and XX, GT or LT options at the same time are not compatible"),
        ("EXPIRE k 1 GT LT", "GT and LT options at the same time are not compatible"),
        ("EXPIRE k 1 FOO", "Unsupported option FOO"),
        ("EXPIRE k abc", NOT_AN_INTEGER),
        ("EXPIRE k 9223372036854775807", "invalid expire time in 'expire' command"),
        ("PEXPIRE k 9223372036854775807", "invalid expire time in 'pexpire' command"),
        ("EXPIREAT k 9223372036854775807", "invalid expire time in 'expireat' command"),
        ("DELEX k IFNE v", "syntax error"),
        ("DELEX k IFEQ", "syntax error"),
        ("CAS k x v", NOT_AN_INTEGER),
        ("CAS k -1 v", "expected version is negative"),
        ("FLUSHALL NOW", "syntax error"),
        ("PING a b", "wrong number of arguments for 'ping' command"),
        # What Redis takes:
        ("SET k v nx get", ""),
        ("SET k v KEEPTTL KEEPTTL", ""),
        ("SET k v EX 10 GET XX", ""),
        ("SET k v IFEQ NX GET", ""),
        ("SET k v EXAT 1", ""),
        ("EXPIRE k -1 XX GT", ""),
        ("PEXPIREAT k 9223372036854775807", ""),
        ("FLUSHALL async", ""),
        ("MSET a 1 a 2", ""),
        ("CAS k 0 v", ""),
    ],
)
def test_check_when_no_state_is_needed_then_answers_as_redis(line: str, text: str) -> None:
    """What can be refused before a proposal is, in Redis' words (redis-facts 3.1, 3.3, 3.5)."""
    assert refusal(line) == text


NOT_SERIALS = "session, serial and first unanswered serial are positive integers"
NOT_IN_ORDER = "serials begin with 1, and the first unanswered is not after its own"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("SESSION FOO", "unknown subcommand 'FOO'. Try HELP SESSION."),
        ("SESSION OPEN now", "wrong number of arguments for 'session|open' command"),
        ("SESSION CLOSE", "wrong number of arguments for 'session|close' command"),
        ("SESSION CLOSE x", NOT_AN_INTEGER),
        ("SESSION DO", "wrong number of arguments for 'session|do' command"),
        ("SESSION DO 1 1 1", "wrong number of arguments for 'session|do' command"),
        ("SESSION DO 1 1 1 SET k", "wrong number of arguments for 'set' command"),
        ("SESSION DO 1 1 1 SET k v EX 0", "invalid expire time in 'set' command"),
        ("SESSION DO 1 1 1 GET k", "'get' is no write, and needs no session"),
        ("SESSION DO 1 1 1 PING", "'ping' is no write, and needs no session"),
        (
            "SESSION DO 1 1 1 PURGE k 5",
            "unknown command 'PURGE', with args beginning with: 'k' '5' ",
        ),
        ("SESSION DO 1 1 1 SESSION OPEN", "SESSION DO cannot run another SESSION"),
        ("SESSION DO x 1 1 INCR n", NOT_SERIALS),
        ("SESSION DO 1 -1 1 INCR n", NOT_SERIALS),
        ("SESSION DO 1 1_0 1 INCR n", NOT_SERIALS),
        (f"SESSION DO {'1' * 5000} 1 1 INCR n", NOT_SERIALS),
        ("SESSION DO 1 0 0 INCR n", NOT_IN_ORDER),
        ("SESSION DO 1 1 0 INCR n", NOT_IN_ORDER),
        ("SESSION DO 1 1 2 INCR n", NOT_IN_ORDER),
        ("SESSION DO 1 9223372036854775808 1 INCR n", NOT_IN_ORDER),
        ("session open", ""),
        ("session close 5", ""),
        ("session do 0 9223372036854775807 1 set k v nx", ""),
    ],
)
def test_check_of_a_session_when_no_state_is_needed_then_answers_before_the_log(
    line: str, text: str
) -> None:
    """Neither its own faults nor those of the command in it become an entry."""
    assert refusal(line) == text


def test_acting_when_in_a_session_then_is_the_command_in_it() -> None:
    """What a request does to the data is asked of this one."""
    assert acting(words("session do 1 2 1 set k v")) == words("set k v")
    for line in ("set k v", "session open", "mset a 1 b 2 c 3"):
        assert acting(words(line)) == words(line)


@pytest.mark.parametrize(
    "line",
    [
        "SET {} v",
        "INCR {}",
        "MSET a 1 {} 2",
        "DEL a {}",
        "EXPIRE {} 9",
        "SESSION DO 1 1 1 SET {} v",
    ],
)
def test_check_of_a_write_when_a_key_is_too_long_then_refused(line: str) -> None:
    """KEYS compares a pattern with all of a key, and no other thread runs meanwhile."""
    longest = "k" * KEY_BYTES_MAX

    assert refusal(line.format(longest)) == ""
    with pytest.raises(TooLargeError, match="a key may have 65536 bytes at most"):
        check(words(line.format(longest + "k")))


def test_check_when_only_values_are_long_or_nothing_is_written_then_passed() -> None:
    """The limit is not for values; and to read a key that can't be there does no harm."""
    longer = "k" * (KEY_BYTES_MAX + 1)

    for line in ("SET k {}", "MSET a {} b {}", "GET {}", "MGET a {}"):
        assert refusal(line.format(longer, longer)) == ""


def test_check_when_passed_then_returns_the_row() -> None:
    """One call serves the server for both."""
    assert check([b"set", b"k", b"v"]) is COMMANDS["SET"]


def test_parse_set_when_options_are_given_then_all_are_found() -> None:
    """Options come in any order and case."""
    options = parse_set(words("SET k v px 1500 GET ifeq old"))

    assert options.get
    assert options.if_equal == b"old"
    assert not options.is_unconditional
    assert options.expiry is not None
    assert options.expiry.deadline_ms(NOW_MS) == NOW_MS + 1500


@pytest.mark.parametrize(
    ("line", "deadline_ms"),
    [
        ("EXPIRE k 10", NOW_MS + 10_000),
        ("PEXPIRE k 10", NOW_MS + 10),
        ("EXPIREAT k 10", 10_000),
        ("PEXPIREAT k 10", 10),
        ("EXPIRE k -10", NOW_MS - 10_000),
    ],
)
def test_parse_expire_when_unit_differs_then_deadline_is_in_ms(line: str, deadline_ms: int) -> None:
    """Seconds or milliseconds, from now or from 1970: the store sees one absolute deadline."""
    assert parse_expire(words(line)).expiry.deadline_ms(NOW_MS) == deadline_ms


def test_parse_expire_when_conditions_are_given_then_told_apart() -> None:
    """NX, XX, GT and LT each have their own field."""
    fields = ("if_none", "if_some", "if_later", "if_earlier")
    for position, word in enumerate(("NX", "xx", "GT", "lt")):
        options = parse_expire(words(f"EXPIRE k 1 {word}"))

        assert [getattr(options, name) for name in fields] == [i == position for i in range(4)]


def test_parse_delex_when_no_condition_then_none() -> None:
    """None is "whatever there is"; an empty value is a condition like any other."""
    assert parse_delex([b"DELEX", b"k"]) is None
    assert parse_delex([b"DELEX", b"k", b"ifeq", b""]) == b""


@pytest.mark.parametrize(
    ("line", "amount"), [("INCR k", 1), ("DECR k", -1), ("INCRBY k 5", 5), ("decrby k -5", 5)]
)
def test_parse_increment_when_decrement_then_negative(line: str, amount: int) -> None:
    """All four are one addition."""
    assert parse_increment(words(line)) == amount


# ---- Payloads ----------------------------------------------------------------------------------

ARGVS = st.lists(st.binary(max_size=40), min_size=1, max_size=12)


@given(st.integers(0, 2**64 - 1), ARGVS)
def test_payload_when_decoded_then_as_encoded(now_ms: int, argv: list[bytes]) -> None:
    """Any argv goes into the log and comes out of it unchanged."""
    assert decode_payload(encode_payload(now_ms, argv)) == (now_ms, argv, None)


SERIALS = st.integers(1, INT64_MAX)


def in_session(once: Once, argv: list[bytes]) -> list[bytes]:
    return [b"session", b"Do", *(b"%d" % number for number in once), *argv]


@given(st.integers(0, 2**64 - 1), st.tuples(SERIALS, SERIALS, SERIALS), ARGVS)
def test_payload_when_in_a_session_then_decoded_as_the_command_and_its_serial(
    now_ms: int, numbers: tuple[int, int, int], argv: list[bytes]
) -> None:
    """What acts and what makes it once come out apart; without a session nothing is added."""
    once = (numbers[0], max(numbers[1:]), min(numbers[1:]))

    payload = encode_payload(now_ms, in_session(once, argv))

    assert decode_payload(payload) == (now_ms, argv, once)
    assert payload.endswith(encode_payload(now_ms, argv))


@pytest.mark.slow
@given(ARGVS, st.sampled_from([None, (1, 2, 1)]), st.binary(min_size=1, max_size=5))
def test_payload_when_cut_or_extended_then_refused(
    argv: list[bytes], once: Once | None, more: bytes
) -> None:
    """A payload says its own length: nothing shorter or longer passes for a command."""
    payload = encode_payload(NOW_MS, in_session(once, argv) if once else argv)

    for length in range(len(payload)):
        with pytest.raises(ValueError, match="payload"):
            decode_payload(payload[:length])
    with pytest.raises(ValueError, match="payload"):
        decode_payload(payload + more)


@given(
    st.binary(max_size=60)
    | st.binary(max_size=60).map(lambda tail: b"\x01" + tail)
    | st.binary(max_size=60).map(lambda tail: b"\x02" + bytes(23) + b"\x01\x01" + tail)
)
def test_payload_when_garbage_then_refused_or_canonical(data: bytes) -> None:
    """Whatever is taken for a payload is the one encoding of what it holds."""
    try:
        now_ms, argv, once = decode_payload(data)
    except ValueError:
        return
    if once is None or 1 <= once[2] <= once[1] <= INT64_MAX:  # as ``check`` would have it
        assert encode_payload(now_ms, in_session(once, argv) if once else argv) == data


def test_payload_when_counts_are_absurd_then_refused_without_allocating() -> None:
    """A count is held against the length before anything is made of it."""
    with pytest.raises(ValueError, match="lengths are cut short"):
        decode_payload(struct.pack(">BQI", 1, 0, 2**32 - 1))
    with pytest.raises(ValueError, match="unknown payload format 3"):
        decode_payload(b"\x03" + encode_payload(0, [b"PING"])[1:])


# ---- Slots and patterns ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "slot"),
    [
        (b"123456789", 0x31C3),
        (b"", 0),
        (b"foo", 12182),
        (b"{foo}.bar", 12182),
        (b"a{foo}{bar}", 12182),
    ],
)
def test_crc16_slot_when_known_then_equal(key: bytes, slot: int) -> None:
    """Source: Redis cluster specification; 0x31C3 is CRC16/XMODEM's check value."""
    assert crc16_slot(key) == slot


def test_crc16_slot_when_tag_is_empty_or_open_then_whole_key_counts() -> None:
    """Only a non-empty tag groups keys. Source: Redis cluster specification, "Hash tags"."""
    assert crc16_slot(b"{}foo") != crc16_slot(b"{}bar")
    assert crc16_slot(b"{foo") != crc16_slot(b"foo")
    assert crc16_slot(b"x{{foo}}") == crc16_slot(b"{foo")


@pytest.mark.parametrize(
    ("pattern", "text", "matches"),
    [
        (b"*", b"", True),
        (b"", b"", True),
        (b"h?llo", b"hello", True),
        (b"h?llo", b"hllo", False),
        (b"?", b"\n", True),
        (b"h[ae]llo", b"hallo", True),
        (b"h[^e]llo", b"hello", False),
        (b"[!a]", b"b", False),
        (b"[!a]", b"!", True),
        (b"[c-a]", b"b", True),
        (b"[a", b"a", True),
        (b"[a-", b"-", True),
        (b"[", b"[", False),
        (b"[]", b"]", False),
        (b"[^]", b"x", True),
        (b"[\\]]", b"]", True),
        (b"a\\*", b"a*", True),
        (b"a\\*", b"ab", False),
        (b"\\", b"\\", True),
        (b"\xff*", b"\xff\x00\xfe", True),
        (b"foo", b"foobar", False),
        (b"A", b"a", False),
    ],
)
def test_glob_when_matched_then_as_redis(pattern: bytes, text: bytes, matches: bool) -> None:
    """Not fnmatch: ``[!a]`` is literal, an open class is closed by the end (redis-facts 3.3)."""
    assert glob_match(pattern, text) is matches


def reference_glob(pattern: bytes, text: bytes) -> bool:
    """Redis' stringmatchlen, read off its C: exponential, and as plain as can be."""
    if not pattern:
        return not text
    char, rest = pattern[:1], pattern[1:]
    if char == b"*":
        return any(reference_glob(rest, text[skip:]) for skip in range(len(text) + 1))
    if not text:
        return False
    if char == b"[":
        fits, rest = reference_class(rest, text[0])
    elif char == b"\\" and rest:
        fits, rest = rest[0] == text[0], rest[1:]
    else:
        fits = char in (b"?", text[:1])
    return fits and reference_glob(rest, text[1:])


def reference_class(rest: bytes, byte: int) -> tuple[bool, bytes]:
    negated = rest.startswith(b"^")
    rest = rest[negated:]
    fits = False
    while rest and not rest.startswith(b"]"):
        if rest[:1] == b"\\" and len(rest) >= 2:
            fits |= rest[1] == byte
            rest = rest[2:]
        elif len(rest) >= 3 and rest[1:2] == b"-":
            low, high = sorted((rest[0], rest[2]))
            fits |= low <= byte <= high
            rest = rest[3:]
        else:
            fits |= rest[0] == byte
            rest = rest[1:]
    return fits != negated, rest[1:]


GLOB_BYTES = st.lists(st.sampled_from(list(b"ab*?[]^-\\!.\n"))).map(bytes)


@pytest.mark.slow
@given(GLOB_BYTES.map(lambda p: p[:8]), GLOB_BYTES.map(lambda t: t[:6]))
def test_glob_when_compared_with_a_slow_reference_then_equal(pattern: bytes, text: bytes) -> None:
    """The compiled pattern decides as Redis does. Source: redis util.c, stringmatchlen."""
    assert glob_match(pattern, text) is reference_glob(pattern, text)


def test_glob_when_many_stars_nearly_match_then_not_exponential() -> None:
    """A backtracking matcher would not end this test: 20 stars over 20,000 bytes."""
    assert not glob_match(b"*a" * 20 + b"*b", b"a" * 20_000)
    assert glob_match(b"*a" * 20 + b"*b", b"a" * 20_000 + b"b")


def test_glob_when_pattern_is_long_then_refused() -> None:
    """What compiling costs is bounded, whoever asks."""
    with pytest.raises(TooLargeError):
        glob_match(b"a" * (PATTERN_BYTES_MAX + 1), b"a")
    assert refusal("KEYS " + "a" * (PATTERN_BYTES_MAX + 1))
    assert not refusal("KEYS " + "a" * PATTERN_BYTES_MAX)
