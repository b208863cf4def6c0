"""Where the arenas of a job are, and its agent's socket, lock and log (DESIGN section 8)."""

from __future__ import annotations

import hashlib
import os
import re
import socket
import stat
import uuid
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

from moc_ckpt.errors import ConfigError, StorageError

__all__ = [
    "UNNAMED",
    "agent_lock_path",
    "agent_log_path",
    "arena_path",
    "find_arenas",
    "job_dir",
    "job_key",
    "named_node",
    "node_name",
    "parse_arena_path",
    "socket_path",
]

UNNAMED = "any."
"""What the keys of jobs begin with that have neither an id nor a directory: nobody can find them again."""

_KEY_CHARS = 40
_NODE_CHARS = 40
_SOCKET_BYTES = 107  # sockaddr_un has 108, one of them for the end
_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]*://")
_NAME = re.compile(r"^[A-Za-z0-9_-][A-Za-z0-9._-]*\Z")
_ARENA = re.compile(r"^(?P<run>.+)\.rank_(?P<rank>\d{5,})\.arena\Z")


def named_node(environ: Mapping[str, str] = os.environ) -> str | None:
    """Returns the name that MOC_NODE gives this node; None if it gives none.

    Args:
        environ: where MOC_NODE is looked up.

    Raises:
        ConfigError: if it is no safe file name of at most 40 characters.
    """
    name = environ.get("MOC_NODE", "").strip()
    if not name:
        return None
    if len(name) > _NODE_CHARS or not _NAME.match(name):
        raise ConfigError(
            f"{name!r} is no name for a node",
            where="MOC_NODE",
            fix=f"give it at most {_NODE_CHARS} letters, digits, '.', '_' and '-', the first of them not a '.'",
        )
    return name


def node_name(environ: Mapping[str, str] = os.environ) -> str:
    """Returns this node's name: MOC_NODE, else the host name. Errors as of `named_node`."""
    return named_node(environ) or socket.gethostname()


def job_key(save_dir: str | os.PathLike[str] | None, environ: Mapping[str, str] = os.environ) -> str:
    """Returns the key that the arenas of a job go by; a restarted job gets the same one.

    Args:
        save_dir: path or URL of the checkpoints. Paths that lead to one directory give one key.
        environ: MOC_JOB_ID in it is the key, with what a file name must not have replaced; two ids never give one key.

    Returns:
        The key, a safe file name of at most 40 characters. Without MOC_JOB_ID and save_dir it is random: then
        nothing in memory can be found again after a restart.
    """
    job = environ.get("MOC_JOB_ID", "").strip()
    if job:
        safe = re.sub(r"[^A-Za-z0-9_-]", "-", job)
        return safe if safe == job and len(job) <= _KEY_CHARS else f"{safe[: _KEY_CHARS - 11]}-{_hash(job)}"
    if save_dir is None or not os.fspath(save_dir):
        return f"{UNNAMED}{uuid.uuid4().hex[:10]}"
    return f"dir.{_hash(_address(os.fspath(save_dir)))}"


def _hash(text: str) -> str:
    return hashlib.blake2b(os.fsencode(text), digest_size=5).hexdigest()


def _address(save_dir: str) -> str:
    """Returns one spelling for all names of a directory or prefix."""
    if save_dir.startswith("file://"):
        save_dir = unquote(urlsplit(save_dir).path)
    elif _SCHEME.match(save_dir):
        return save_dir.rstrip("/")
    return os.path.realpath(Path(save_dir).expanduser())


def job_dir(job: str, *, create: bool) -> Path:
    """Returns the directory of a job's arenas and agent: <base>/moc_ckpt-<uid>/<job>.

    The base is $MOC_SHM_DIR, else /dev/shm. Where MOC_NODE names the node it is <base>/moc_ckpt-<uid>.<node>/<job>: the
    nodes of one machine find nothing of each other. Whatever exists of the two directories must be a real directory, be
    this user's and be closed to others, so that nobody else can read the state or put a file in its place.

    Args:
        job: the job key.
        create: make what is missing. Otherwise the directory may be missing.

    Raises:
        StorageError: if a directory is a link, another user's or open to others, or cannot be made; or if the path
            leaves no room for the name of a Unix socket.
        ConfigError: if MOC_NODE is no safe file name.
        ValueError: if the key is no safe file name.
    """
    if not _NAME.match(job):
        raise ValueError(f"{job!r} is no job key: it must be a file name of letters, digits, '.', '_' and '-'")
    base = Path(os.path.abspath(os.environ.get("MOC_SHM_DIR") or "/dev/shm"))  # noqa: PTH100 (links stay)
    node = named_node()
    top = base / (f"moc_ckpt-{os.getuid()}.{node}" if node else f"moc_ckpt-{os.getuid()}")
    folder = top / job
    too_long = len(os.fsencode(socket_path(folder))) - _SOCKET_BYTES
    if too_long > 0:
        raise StorageError(
            f"the path leaves no room for a Unix socket: it is {too_long} bytes too long",
            where=str(folder),
            fix="name a shorter directory in MOC_SHM_DIR, or a shorter MOC_JOB_ID or MOC_NODE",
        )
    for path in (top, folder):
        if create:
            _make(path)
        if not _is_private(path):
            break
    return folder


def _make(path: Path) -> None:
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        return
    except OSError as exc:
        raise StorageError(
            f"the directory for shared memory cannot be made: {exc.strerror}",
            where=str(path),
            fix="name a directory on a tmpfs that this user may write to in MOC_SHM_DIR",
        ) from exc


def _is_private(path: Path) -> bool:
    """Tells whether the directory exists; refuses one that is not this user's alone."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    except OSError as exc:
        raise StorageError(
            f"the directory for shared memory cannot be used: {exc.strerror}",
            where=str(path),
            fix="name another directory in MOC_SHM_DIR",
        ) from exc
    if not stat.S_ISDIR(status.st_mode):
        problem = "is a link" if stat.S_ISLNK(status.st_mode) else "is no directory"
    elif status.st_uid != os.getuid():
        problem = f"belongs to user {status.st_uid}"
    elif status.st_mode & 0o077:
        problem = f"is open to others (mode {stat.S_IMODE(status.st_mode):04o})"
    else:
        return True
    raise StorageError(
        f"the directory for shared memory {problem}",
        where=str(path),
        fix="look who made it and remove it, or name another directory in MOC_SHM_DIR; nothing was written",
    )


def arena_path(folder: Path, run: str, rank: int) -> Path:
    """Returns the file of a rank's arena.

    Raises:
        ValueError: if the run is no safe file name or the rank is negative.
    """
    if not _NAME.match(run) or rank < 0:
        raise ValueError(f"run {run!r}, rank {rank}: a run must be a file name, a rank must not be negative")
    return folder / f"{run}.rank_{rank:05d}.arena"


def parse_arena_path(path: Path) -> tuple[str, int] | None:
    """Returns the run and the rank in the name of an arena; None for another file."""
    match = _ARENA.match(path.name)
    return (match["run"], int(match["rank"])) if match else None


def find_arenas(folder: Path) -> list[Path]:
    """Returns the arenas of a job, unfinished ones included, in order of run and rank; none if it has no directory."""
    found = {path: parse_arena_path(path) for path in folder.glob("*.arena")}
    return [path for path, key in sorted(found.items(), key=lambda item: item[1] or ("", 0)) if key]


def socket_path(folder: Path) -> Path:
    """Returns the socket of the job's agent on this node."""
    return folder / "agent.sock"


def agent_lock_path(folder: Path) -> Path:
    """Returns the file that the job's agent holds a lock on."""
    return folder / "agent.lock"


def agent_log_path(folder: Path) -> Path:
    """Returns the log of the job's agent."""
    return folder / "agent.log"
