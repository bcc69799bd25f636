"""A port for ranks to meet at."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved_port() -> Iterator[int]:
    """A free port of 127.0.0.1. In the block no other process gets it, unless it asks for this number, as rank 0 does.

    A port that was free a moment ago may be another program's by the time that rank 0 listens on it.
    """
    with socket.socket() as holder:
        # It is bound but does not listen, so a listener that shares addresses, too, as torch's store does, may have it.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
