"""The agent's client, without an agent."""

from __future__ import annotations

import os
import resource
import socket
import time
from collections.abc import Iterator

import pytest

from moc_ckpt.persist.client import _ready

HIGH = 1500


@pytest.fixture
def high_socket() -> Iterator[tuple[socket.socket, socket.socket]]:
    """A pair of sockets, the first with a descriptor that `select` refuses."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard <= HIGH:
        pytest.skip(f"at most {hard} open files are allowed here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, HIGH + 10), hard))
    first, second = socket.socketpair()
    os.dup2(first.fileno(), HIGH)
    high = socket.socket(fileno=HIGH)
    try:
        yield high, second
    finally:
        for sock in (high, first, second):
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_processes_with_thousands_of_open_files(high_socket: tuple[socket.socket, socket.socket]) -> None:
    high, other = high_socket
    begin = time.monotonic()
    _ready([high], [], 0.05)
    assert time.monotonic() - begin >= 0.04
    other.send(b"!")
    begin = time.monotonic()
    _ready([high], [], 10.0)
    _ready([], [high], 10.0)
    assert time.monotonic() - begin < 5.0
