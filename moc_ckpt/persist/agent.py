"""`python -m moc_ckpt.persist.agent`: the node's agent, one process per job and node (DESIGN section 9). No torch."""

from __future__ import annotations

import argparse
import faulthandler
import fcntl
import gc
import logging
import logging.handlers
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from moc_ckpt.errors import MocError, StorageError
from moc_ckpt.persist.committer import GRACE_S
from moc_ckpt.persist.process import keep_memory_small, lower_priority
from moc_ckpt.snapshot.places import UNNAMED, agent_lock_path, agent_log_path, node_name, socket_path

__all__ = ["main"]

_LOCK_TRIES_S = 2.0
_LOG_BYTES = 1 << 20

_log = logging.getLogger(__name__)


def main(arguments: list[str] | None = None) -> int:
    """Runs an agent until its job is done.

    Args:
        arguments: the command line; None for this process's.

    Returns:
        Exit status: 0, also where another agent serves the directory already; 1 if this one cannot run.
    """
    parser = argparse.ArgumentParser(prog="moc_ckpt.persist.agent", description=__doc__)
    parser.add_argument("--dir", type=Path, required=True, help="the job's directory in shared memory")
    parser.add_argument("--job", required=True, help="the job key")
    parser.add_argument("--linger", type=float, default=600.0, help="seconds to live on without trainers and work")
    parser.add_argument("--grace", type=float, default=GRACE_S, help="seconds before it commits for rank 0's agent")
    parser.add_argument("--node", help="name of this node; otherwise MOC_NODE, else the host name")
    options = parser.parse_args(arguments)
    folder: Path = options.dir.absolute()
    try:
        options.node = options.node or node_name()
        _check_folder(folder)
        lock = _take_lock(folder)
    except MocError as error:
        print(error, file=sys.stderr)
        return 1
    if lock is None:
        return 0
    _become_daemon()
    log_file, errors = _start_log(folder)
    try:
        return _serve(folder, options)
    except BaseException:
        _log.exception("the agent fails")
        raise
    finally:
        for handler in (log_file, errors):
            logging.getLogger().removeHandler(handler)
        log_file.close()
        if options.job.startswith(UNNAMED) and not errors.seen:
            _remove_folder(folder)
        os.close(lock)


def _serve(folder: Path, options: argparse.Namespace) -> int:
    from moc_ckpt.persist.agent_server import AgentServer, on_signals

    server = AgentServer(
        folder,
        _listen(socket_path(folder)),
        job=options.job,
        node=options.node,
        linger_s=options.linger,
        grace_s=options.grace,
    )
    on_signals(server)
    gc.collect()
    gc.freeze()  # what the modules made is not looked at again, so that full collections are cheap and come in time
    _log.info("serving job %s on %s, process %d", options.job, options.node, os.getpid())
    server.run()
    return 0


def _check_folder(folder: Path) -> None:
    """Refuses a directory that others could have prepared.

    Raises:
        StorageError: if it is not this user's own, private directory.
    """
    try:
        info = os.lstat(folder)
    except OSError as error:
        raise StorageError(
            f"there is no such directory: {error.strerror}", where=str(folder), fix="the trainer makes it"
        ) from error
    if not folder.is_dir() or folder.is_symlink() or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise StorageError(
            "the directory is not a private one of this user", where=str(folder), fix="remove it and start again"
        )


def _take_lock(folder: Path) -> int | None:
    """Takes the agent's lock; None if another agent keeps it (one that only looks at it lets go at once).

    Raises:
        StorageError: if the directory has gone meanwhile.
    """
    path, end = agent_lock_path(folder), time.monotonic() + _LOCK_TRIES_S
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except FileNotFoundError as error:
            raise StorageError("there is no such directory", where=str(folder), fix="the trainer makes it") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # An agent that has ended removes its lock: one on a file that nobody finds keeps nobody out.
            if os.path.samestat(os.fstat(fd), path.lstat()):
                break
        except FileNotFoundError:
            pass
        except BlockingIOError:
            if time.monotonic() >= end:
                os.close(fd)
                return None
            time.sleep(0.05)
        os.close(fd)
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def _become_daemon() -> None:
    """Leaves the trainer's session, terminal and directory, and its share of CPU and disk."""
    with suppress(PermissionError):  # it leads a session already
        os.setsid()
    os.umask(0o077)
    os.chdir("/")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    lower_priority()
    keep_memory_small()


class _Errors(logging.Handler):
    """Notes whether anything went wrong: then the log stays."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen = False

    def emit(self, record: logging.LogRecord) -> None:
        self.seen = True


def _start_log(folder: Path) -> tuple[logging.Handler, _Errors]:
    handler = logging.handlers.RotatingFileHandler(agent_log_path(folder), maxBytes=_LOG_BYTES, backupCount=1)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, errors = logging.getLogger(), _Errors()
    root.addHandler(handler)
    root.addHandler(errors)
    root.setLevel(logging.INFO)
    faulthandler.enable()
    return handler, errors


def _remove_folder(folder: Path) -> None:
    """Removes the directory of an unnamed job, which nobody comes back to, unless it holds more than logs and lock.

    Called with the lock. A trainer makes its arena before it looks for an agent: one that arrives meanwhile either
    shows in the list, or the directory is not empty and stays, and the next agent makes a lock and a log of its own.
    """
    log, lock = agent_log_path(folder), agent_lock_path(folder)
    ours = (log, log.with_name(f"{log.name}.1"), lock)  # the lock last: until then no other agent begins
    try:
        if not set(folder.iterdir()) <= set(ours):
            return
        for path in ours:
            path.unlink(missing_ok=True)
        folder.rmdir()
    except OSError as error:
        print(f"{folder} stays: {error}", file=sys.stderr)


def _listen(path: Path) -> socket.socket:
    """Binds the socket; whoever left one behind is gone, since this process has the lock."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    finally:
        os.umask(before)
    listener.listen(128)
    return listener


if __name__ == "__main__":
    sys.exit(main())
