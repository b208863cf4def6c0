"""Nodes on one machine: network namespaces on a common bridge, each with its own name, memory, torchrun and agent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from agent_tools import state_of
from distributed.pool import TIME_SCALE, worker_env

SCRIPT = Path(__file__).with_name("nodes_script.py")
PORT = 29511


def why_not() -> str:
    """Why there can be no namespaces here; empty if there can."""
    if not shutil.which("ip"):
        return "there is no `ip` (iproute2)"
    name = f"moct{os.getpid()}x"
    made = _ip("netns", "add", name, check=False)
    if made.returncode:
        return f"network namespaces are not permitted here: {made.stderr.strip()}"
    try:
        veth = _ip("-n", name, "link", "add", "one", "type", "veth", "peer", "name", "two", check=False)
        return f"veth pairs are not permitted here: {veth.stderr.strip()}" if veth.returncode else ""
    finally:
        _ip("netns", "del", name, check=False)


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=check, timeout=30)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = 60.0) -> Any:
    """What the condition returns once that is true."""
    end = time.monotonic() + seconds * TIME_SCALE
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds:g} s for {what}"
        time.sleep(0.05)
    return found


class Node:
    """One namespace and what runs in it.

    Args:
        net: the network.
        name: its MOC_NODE.
        address: its IPv4 address.
    """

    def __init__(self, net: Network, name: str, address: str) -> None:
        self.net, self.name, self.address = net, name, address
        self.space = f"{net.prefix}{name}"
        self.launcher: subprocess.Popen[bytes] | None = None

    @property
    def memory(self) -> Path:
        """Its directory in shared memory."""
        return self.net.shared / f"moc_ckpt-{os.getuid()}.{self.name}"

    def pids(self) -> list[int]:
        """All processes in it."""
        return [int(word) for word in _ip("netns", "pids", self.space, check=False).stdout.split()]

    def agents(self) -> list[int]:
        """Its agents."""
        return [pid for pid in self.pids() if b"moc_ckpt.persist.agent" in _command(pid)]

    def start(self, life: int, rank: int, master: Node, nodes: int, plugin: dict[str, Any], *more: str) -> None:
        """Runs torchrun with one trainer; its log is FOLDER/log.NAME.LIFE."""
        folder = self.net.folder
        env = worker_env(
            MOC_NODE=self.name, MOC_SHM_DIR=str(self.net.shared), GLOO_SOCKET_IFNAME="eth0", TP_SOCKET_IFNAME="eth0"
        )
        command = ["ip", "netns", "exec", self.space, sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes", str(nodes), "--nproc-per-node", "1", "--node-rank", str(rank), "--max-restarts", "0"]
        command += ["--rdzv-backend", "static", "--rdzv-endpoint", f"{master.address}:{PORT + life}"]
        command += [str(SCRIPT), str(folder), json.dumps(plugin), str(life), *more]
        with (folder / f"log.{self.name}.{life}").open("wb") as log:
            self.launcher = subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True)

    def kill(self, *, but: list[int] | None = None) -> None:
        """SIGKILL to everything in it, but for some; returns when it is dead."""
        spared = set(but or ())
        pids = [pid for pid in self.pids() if pid not in spared]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.launcher is not None and self.launcher.pid in pids:
            self.launcher.wait(30)
        wait_for(lambda: all(state_of(pid) in ("", "Z") for pid in pids), f"the end of {self.name}")

    def signal(self, number: int) -> None:
        """Sends a signal to everything in it."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def wipe(self) -> None:
        """Loses its memory."""
        shutil.rmtree(self.memory)

    def link(self, state: str) -> None:
        """Takes its link up or down: `up`, `down`."""
        _ip("-n", self.space, "link", "set", "eth0", state)

    def log(self, life: int) -> str:
        """What a life has printed."""
        path = self.net.folder / f"log.{self.name}.{life}"
        return path.read_text(errors="replace")[-6000:] if path.exists() else ""


class Network:
    """Nodes on one bridge, which lives in a namespace of its own: nothing of it is seen outside.

    Args:
        folder: what all nodes share: checkpoints, logs, notes.
        names: of the nodes.
    """

    def __init__(self, folder: Path, names: str) -> None:
        self.folder = folder
        self.prefix = f"moct{os.getpid()}"
        self.shared = Path(tempfile.mkdtemp(prefix="moc_n", dir="/dev/shm"))
        self.nodes = {name: Node(self, name, f"10.213.0.{number}") for number, name in enumerate(names, 1)}

    def build(self) -> None:
        """Makes namespaces, bridge and links."""
        switch = f"{self.prefix}sw"
        _ip("netns", "add", switch)
        _ip("-n", switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", switch, "link", "set", "br0", "up")
        for node in self.nodes.values():
            _ip("netns", "add", node.space)
            port = f"port{node.name}"
            peer = ["peer", "name", port, "netns", switch]
            _ip("-n", node.space, "link", "add", "eth0", "type", "veth", *peer)
            _ip("-n", switch, "link", "set", "dev", port, "master", "br0", "up")
            _ip("-n", node.space, "addr", "add", f"{node.address}/24", "dev", "eth0")
            _ip("-n", node.space, "link", "set", "eth0", "up")
            _ip("-n", node.space, "link", "set", "lo", "up")

    def close(self) -> None:
        """Ends every process, then removes everything."""
        for node in self.nodes.values():
            with suppress(Exception):
                node.kill()
            if node.launcher is not None:
                with suppress(subprocess.TimeoutExpired):
                    node.launcher.wait(10)
            _ip("netns", "del", node.space, check=False)
        _ip("netns", "del", f"{self.prefix}sw", check=False)
        shutil.rmtree(self.shared, ignore_errors=True)

    def read(self, what: str, life: int, rank: int) -> Any:
        """What a rank noted; None if it has not."""
        path = self.folder / f"{what}.{life}.{rank}"
        return json.loads(path.read_text()) if path.exists() else None

    def logs(self, life: int) -> str:
        """What all nodes printed in a life."""
        return "\n".join(f"--- {node.name}\n{node.log(life)}" for node in self.nodes.values())


@contextmanager
def network(folder: Path, names: str) -> Iterator[Network]:
    """Nodes of these names; whatever happens, nothing of them stays behind."""
    net = Network(folder, names)
    try:
        net.build()
        yield net
    finally:
        net.close()


def _command(pid: int) -> bytes:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""
