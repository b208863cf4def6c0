"""The processes of a benchmark that starts its ranks itself, on this machine alone."""

from __future__ import annotations

import os
import socket

__all__ = ["rank_environments"]


def rank_environments(world: int) -> list[dict[str, str]]:
    """Returns the environment of each rank, this process's own included; they meet at a free port of the loopback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
