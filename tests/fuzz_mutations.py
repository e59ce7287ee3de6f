"""Bytes changed at random: what a broken sender, a bad disk or an attacker might make of good ones.

Rule 1: all chance comes from the ``random.Random`` given, so an input can be made again.
Rule 2: an input stays short, so that thousands of them a second can be tried.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Final

INPUT_BYTES_MAX: Final = 256 << 10

# Where lengths, counts and comparisons go wrong.
_NUMBERS: Final = (
    *(0, 1, 2, 3, 7, 8, 127, 128, 255, 256, 511, 512, 1023, 4096, 65535, 65536),
    *(2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1),
)

Mutation = Callable[[random.Random, bytearray], None]


def _somewhere(rng: random.Random, data: bytearray) -> slice:
    """A part of the data, short more often than long."""
    start = rng.randint(0, len(data))
    return slice(start, start + rng.choice((1, 2, 4, 8, 64, 512, 4096)))


def _flip_bit(rng: random.Random, data: bytearray) -> None:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def _set_byte(rng: random.Random, data: bytearray) -> None:
    if data:
        data[rng.randrange(len(data))] = rng.choice((0, 1, 10, 13, 32, 34, 127, 128, 255))


def _zero_part(rng: random.Random, data: bytearray) -> None:
    part = _somewhere(rng, data)
    data[part] = bytes(len(data[part]))


def _delete_part(rng: random.Random, data: bytearray) -> None:
    del data[_somewhere(rng, data)]


def _insert_noise(rng: random.Random, data: bytearray) -> None:
    at = rng.randint(0, len(data))
    data[at:at] = rng.randbytes(rng.choice((1, 2, 5, 20, 600)))


def _repeat_part(rng: random.Random, data: bytearray) -> None:
    # Many times, for what recurses or is not linear.
    part = _somewhere(rng, data)
    data[part.stop : part.stop] = data[part] * rng.choice((1, 2, 10, 300, 3000))


def _move_part(rng: random.Random, data: bytearray) -> None:
    moved = bytes(data[_somewhere(rng, data)])
    at = rng.randint(0, len(data))
    data[at : at + len(moved)] = moved


def _cut_end(rng: random.Random, data: bytearray) -> None:
    del data[rng.randint(0, len(data)) :]


def _set_binary_number(rng: random.Random, data: bytearray) -> None:
    width = rng.choice((1, 2, 4, 8))
    number = rng.choice(_NUMBERS) % (1 << 8 * width)
    at = rng.randint(0, max(0, len(data) - width))
    data[at : at + width] = number.to_bytes(width, "big")


def _set_written_number(rng: random.Random, data: bytearray) -> None:
    """Put another number where one stands in digits."""
    digits = [at for at, byte in enumerate(data[:4096]) if 0x30 <= byte <= 0x39]
    if not digits:
        return
    start = end = rng.choice(digits)
    while end < len(data) and 0x30 <= data[end] <= 0x39:
        end += 1
    number = str(rng.choice(_NUMBERS) + rng.randint(-1, 1)) * rng.choice((1, 1, 1, 250))
    data[start:end] = number.encode()


_MUTATIONS: Final[tuple[Mutation, ...]] = (
    *(_flip_bit, _flip_bit, _set_byte, _zero_part, _delete_part, _insert_noise, _repeat_part),
    *(_move_part, _cut_end, _set_binary_number, _set_written_number),
)


def mutated(
    rng: random.Random, data: bytes, words: Sequence[bytes] = (), changes_max: int = 6
) -> bytes:
    """The data after a few random changes; ``words`` are put in too, as they are."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, changes_max)):
        if words and rng.random() < 0.3:
            part = _somewhere(rng, changed)
            word = rng.choice(words) * rng.choice((1, 1, 1, 1, 2, 2000))
            changed[part.start : rng.choice((part.start, part.stop))] = word
        else:
            rng.choice(_MUTATIONS)(rng, changed)
        del changed[INPUT_BYTES_MAX:]
    return bytes(changed)
