"""Damaging files for the readers: seeded, so that a failure can be repeated, with a budget from the environment."""

from __future__ import annotations

import os
import random

EXAMPLES = int(os.environ.get("VOSOPS_FUZZ_EXAMPLES", "0"))


def examples(few):
    """How many damaged files to try: ``few``, or VOSOPS_FUZZ_EXAMPLES."""
    return EXAMPLES or few


def damaged(content, number):
    """The bytes of a file with one to four faults of the kinds that disks, networks and attackers make."""
    choose = random.Random(number)
    data = bytearray(content)
    for _ in range(choose.randint(1, 4)):
        place = choose.randrange(len(data) + 1)
        if choose.random() < 0.5:
            place = min(place, choose.randrange(64))  # headers are where the meaning is
        kind = choose.randrange(7)
        if kind == 0:
            del data[place:]
        elif kind == 1 and data:
            data[min(place, len(data) - 1)] ^= 1 << choose.randrange(8)
        elif kind == 2:
            data[place : place + 4] = choose.choice(
                (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\1\0\0")
            )
        elif kind == 3:
            data[place : place + choose.randrange(1, 40)] = choose.randbytes(choose.randrange(40))
        elif kind == 4:
            data[place:place] = choose.randbytes(choose.randrange(1, 40))
        elif kind == 5:
            data[place:place] = data[: choose.randrange(1, 200)]
        else:
            del data[place : place + choose.randrange(1, 40)]
    return bytes(data)
