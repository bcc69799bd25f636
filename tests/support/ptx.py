"""What the tests ask of PTX, the assembly from which a GPU's machine code is made."""

from __future__ import annotations

import re


def reads_before_a_barrier(ptx: str) -> list[str]:
    """The reads of one place in shared memory, which is the same for all threads, that come behind a store and before
    the next barrier. Threads would race for what such a place holds."""
    found, stored = [], False
    for line in ptx.splitlines():
        if ".entry" in line or "bar.sync" in line:
            stored = False
        elif re.search(r"\bst\.shared", line):
            stored = True
        elif stored and re.search(r"\bld\.shared\S*\s+[^\[]*\[_Z\w+(\+\d+)?\]", line):
            found.append(line.strip())
    return found
