"""Where the files of a checkpoint lie, and reading what exists (DESIGN section 10)."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import msgspec

from moc_ckpt.errors import (
    CheckpointNotFoundError,
    CorruptionError,
    FormatError,
    MocError,
    StorageError,
    UnsupportedError,
)
from moc_ckpt.state.unit import Version
from moc_ckpt.storage.checksum import crc32c
from moc_ckpt.storage.envelope import open_envelope, seal_envelope
from moc_ckpt.storage.manifest import ExtraRecord, Manifest, Part, decode_manifest, decode_part, encode_part
from moc_ckpt.storage.store import Store

__all__ = [
    "ATTEMPTS",
    "EVENTS",
    "LATEST",
    "LOCK",
    "STATE",
    "CheckpointSummary",
    "Outcome",
    "PartsStatus",
    "check_save_id",
    "check_tag",
    "extra_key",
    "failure_key",
    "latest_tag",
    "list_checkpoints",
    "list_tags",
    "load_manifest",
    "manifest_key",
    "new_save_id",
    "outcome_key",
    "pack_key",
    "pack_rank",
    "part_key",
    "part_version",
    "parts_status",
    "pointer_key",
    "read_extra",
    "read_outcome",
    "read_parts",
    "save_prefix",
    "write_extra",
    "write_failure",
    "write_outcome",
    "write_part",
]

LATEST = "latest"
ATTEMPTS = "attempts"
EVENTS = "events"
LOCK = "commit.lock"
"""Held by a commit, by the opening of an attempt and by garbage collection."""
STATE = "state.msgpack"
"""The extra file that a commit merges from the parts."""
_MANIFEST = "manifest.json"
_OUTCOME = "outcome.json"
_MOST_FAILURES = 4
_RESERVED = frozenset({LATEST, ATTEMPTS, EVENTS, LOCK, "lock"})
_SAVE_ID = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_-]{0,63}$")
_PACK = re.compile(r"/packs/rank_(\d{5,})\.(?:dense|experts)$")
_PART = re.compile(r"/parts/rank_(\d{5,})\.json$")
_FAILURE = re.compile(r"/parts/rank_(\d{5,})\.failed\.json$")
_NATIVE = re.compile(r"(_model_states|_optim_states)\.pt$")


@dataclass(frozen=True, slots=True)
class CheckpointSummary:
    """One committed checkpoint in a directory.

    Attributes:
        tag: its name.
        step: engine.global_steps.
        attempt: attempt that saved it.
        created: time of the commit in seconds since 1970; 0.0 if the manifest cannot be read.
        save_id: the save that it is from.
        nbytes: bytes of all tensors.
        stored_bytes: bytes of the packs of this tag itself, and of its extra files.
        parameters: number of parameters.
        error: why the manifest cannot be read; empty if it can.
    """

    tag: str
    step: int
    attempt: int
    created: float
    save_id: str
    nbytes: int
    stored_bytes: int
    parameters: int
    error: str = ""

    @property
    def order(self) -> tuple[int, int, float]:
        """As `Manifest.order`."""
        return self.attempt, self.step, self.created


class PartsStatus(NamedTuple):
    """How far the ranks of a save are.

    Attributes:
        done: ranks whose part is there.
        failed: what went wrong, by rank.
    """

    done: set[int]
    failed: dict[int, str]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How a save ended, for those who wait for it.

    Attributes:
        committed: the checkpoint exists.
        error: why it does not; empty if it does.
        attempt: attempt of the save.
        step: engine.global_steps of the save.
        stored_bytes: bytes that it added to the storage.
    """

    committed: bool
    error: str = ""
    attempt: int = 0
    step: int = 0
    stored_bytes: int = 0


class _Failure(msgspec.Struct, frozen=True):
    rank: int
    what: str
    where: str = ""
    fix: str = ""


def check_tag(tag: str) -> str:
    """Returns `tag` if it can name a checkpoint: one path component that nothing else uses.

    Raises:
        StorageError: if it cannot.
    """
    if not tag or "/" in tag or "\\" in tag or "\0" in tag or tag.startswith(".") or tag in _RESERVED:
        raise StorageError(
            f"{tag!r} cannot be the name (tag) of a checkpoint",
            fix=f"use a name without '/' that does not start with '.' and is none of {', '.join(sorted(_RESERVED))}",
        )
    return tag


def new_save_id() -> str:
    """Returns a random id for a save."""
    return uuid.uuid4().hex


def check_save_id(save_id: str) -> str:
    """Returns `save_id` if it can be one.

    Raises:
        StorageError: if it cannot.
    """
    if not _SAVE_ID.match(save_id):
        raise StorageError(f"{save_id!r} is not a save id", fix="use what new_save_id() returns")
    return save_id


def save_prefix(tag: str, save_id: str) -> str:
    """Returns the directory of one save."""
    return f"{check_tag(tag)}/{check_save_id(save_id)}"


def manifest_key(tag: str) -> str:
    """Returns the key of a checkpoint's manifest."""
    return f"{check_tag(tag)}/{_MANIFEST}"


def part_key(tag: str, save_id: str, rank: int) -> str:
    """Returns the key of what one rank reports about its part of a save."""
    return f"{save_prefix(tag, save_id)}/parts/rank_{rank:05d}.json"


def failure_key(tag: str, save_id: str, rank: int) -> str:
    """Returns the key of the note that a rank cannot finish its part of a save."""
    return f"{save_prefix(tag, save_id)}/parts/rank_{rank:05d}.failed.json"


def outcome_key(tag: str, save_id: str) -> str:
    """Returns the key of the note how a save ended."""
    return f"{save_prefix(tag, save_id)}/{_OUTCOME}"


def pointer_key(tag: str, save_id: str) -> str:
    """Returns the key of the note that a commit is about to move `latest`; it is gone when that is done."""
    return f"{save_prefix(tag, save_id)}/latest.pending"


def pack_key(tag: str, save_id: str, rank: int, which: str) -> str:
    """Returns the directory of a pack; `which` is `dense` or `experts`."""
    if which not in ("dense", "experts"):
        raise ValueError(f"a pack is 'dense' or 'experts', not {which!r}")
    return f"{save_prefix(tag, save_id)}/packs/rank_{rank:05d}.{which}"


def pack_rank(path: str) -> int | None:
    """Returns the rank that a pack was written for; None if the path is not as `pack_key` makes them."""
    found = _PACK.search(path)
    return int(found[1]) if found else None


def extra_key(tag: str, save_id: str, name: str) -> str:
    """Returns the key of a file beside the packs; `name` may contain '/'."""
    return f"{save_prefix(tag, save_id)}/extra/{name}"


def write_part(store: Store, part: Part) -> None:
    """Publishes what one rank wrote, after its packs are durable.

    Raises:
        StorageError: if it cannot be written.
    """
    store.write(part_key(part.tag, part.save_id, part.rank), encode_part(part))


def read_parts(store: Store, tag: str, save_id: str) -> list[Part]:
    """Returns the parts of a save that are there, by rank.

    Raises:
        CorruptionError: if one is damaged.
        FormatError: if one is of a newer format version.
    """
    parts = []
    for key in store.list(f"{save_prefix(tag, save_id)}/parts"):
        data = store.read(key) if _PART.search(key) else None
        if data is not None:
            parts.append(decode_part(data, store.locate(key)))
    return sorted(parts, key=lambda part: part.rank)


def part_version(store: Store, tag: str) -> Version | None:
    """Returns the newest version that parts below a tag are of; None if none can be read.

    It tells what a checkpoint was whose manifest is damaged.
    """
    found: list[Version] = []
    for key in store.list(tag):
        data = store.read(key) if _PART.search(key) else None
        if data is not None:
            try:
                found.append(decode_part(data, store.locate(key)).version)
            except StorageError:
                continue
    return max(found, default=None)


def parts_status(store: Store, tag: str, save_id: str) -> PartsStatus:
    """Returns which ranks have finished or failed, from one listing; reads the failures' notes only.

    Raises:
        StorageError: if the store cannot be listed.
    """
    status = PartsStatus(set(), {})
    for key in store.list(f"{save_prefix(tag, save_id)}/parts"):
        if found := _PART.search(key):
            status.done.add(int(found[1]))
        elif found := _FAILURE.search(key):
            status.failed[int(found[1])] = _failure_text(store, key)
    return status


def _failure_text(store: Store, key: str) -> str:
    where = store.locate(key)
    try:
        failure = open_envelope(store.read(key) or b"", _Failure, where)
    except StorageError as error:
        return f"it failed, and the note about it cannot be read: {error.what}"
    return str(MocError(failure.what, where=failure.where, fix=failure.fix))


def write_failure(store: Store, tag: str, save_id: str, rank: int, error: BaseException | str) -> None:
    """Notes that a rank cannot finish its part, so that nobody waits for it.

    Raises:
        StorageError: if it cannot be written.
    """
    if isinstance(error, MocError):
        failure = _Failure(rank, error.what, error.where, error.fix)
    else:
        failure = _Failure(rank, error if isinstance(error, str) else f"{type(error).__name__}: {error}")
    store.write(failure_key(tag, save_id, rank), seal_envelope(failure))


def write_outcome(store: Store, tag: str, save_id: str, outcome: Outcome) -> None:
    """Notes how a save ended. The manifest decides whether the checkpoint exists; this saves others from asking.

    Raises:
        StorageError: if it cannot be written.
    """
    store.write(outcome_key(tag, save_id), seal_envelope(outcome))


def read_outcome(store: Store, tag: str, save_id: str) -> Outcome | None:
    """Returns how a save ended, None if nobody has noted it yet.

    Raises:
        CorruptionError: if the note is damaged.
        FormatError: if it is of a newer format version.
    """
    key = outcome_key(tag, save_id)
    data = store.read(key)
    return None if data is None else open_envelope(data, Outcome, store.locate(key))


def write_extra(store: Store, tag: str, save_id: str, name: str, data: bytes) -> ExtraRecord:
    """Writes a file beside the packs.

    Returns:
        Its record, for the part.

    Raises:
        StorageError: if it cannot be written.
    """
    key = extra_key(tag, save_id, name)
    store.write(key, data)
    return ExtraRecord(key, len(data), crc32c(data))


def read_extra(store: Store, record: ExtraRecord) -> bytes:
    """Returns the bytes of a file beside the packs, checked.

    Raises:
        CorruptionError: if it is missing or damaged.
    """
    data = store.read(record.path)
    where = store.locate(record.path)
    fix = "restore from another checkpoint (`moc-ckpt inspect` lists them)"
    if data is None:
        raise CorruptionError("a file of the checkpoint is missing", where=where, fix=fix)
    if len(data) != record.nbytes:
        raise CorruptionError(f"the file has {len(data):,} bytes instead of {record.nbytes:,}", where=where, fix=fix)
    if (actual := crc32c(data)) != record.crc32c:
        raise CorruptionError(
            f"checksum mismatch: stored crc32c {record.crc32c:08x}, data has {actual:08x}", where=where, fix=fix
        )
    return data


def latest_tag(store: Store) -> str | None:
    """Returns the tag that `latest` names, None if there is no such file.

    Raises:
        CorruptionError: if the file is empty or not text: training must not start from scratch because of it.
    """
    data = store.read(LATEST)
    if data is None:
        return None
    tag = data.decode(errors="replace").strip()
    if not tag or "\ufffd" in tag:
        tags = list_tags(store)
        raise CorruptionError(
            "the file `latest` is damaged",
            where=store.locate(LATEST),
            fix=f"name the tag that you want ({', '.join(tags) or 'there is none'}), or write it into the file",
        )
    return tag


def list_tags(store: Store) -> list[str]:
    """Returns the tags that have a manifest, readable or not, sorted by name."""
    names = [name for name in store.list_dirs() if name not in _RESERVED and not name.startswith(".")]
    return [name for name in names if store.exists(manifest_key(name))]


def list_checkpoints(store: Store, known: Iterable[Manifest] = ()) -> list[CheckpointSummary]:
    """Returns the committed checkpoints, the newest first (`Manifest.order`); those that cannot be read come last.

    Args:
        store: the checkpoint root.
        known: manifests that were read just now, and are not read again.

    Raises:
        StorageError: if the store cannot be listed.
    """
    found = []
    read = {manifest.tag: manifest for manifest in known}
    for tag in list_tags(store):
        try:
            found.append(_summarize(read.get(tag) or load_manifest(store, tag)))
        except StorageError as exc:
            found.append(CheckpointSummary(tag, 0, 0, 0.0, "", 0, 0, 0, error=exc.what))
    return sorted(found, key=lambda item: item.order, reverse=True)


def _summarize(manifest: Manifest) -> CheckpointSummary:
    return CheckpointSummary(
        tag=manifest.tag,
        step=manifest.step,
        attempt=manifest.attempt,
        created=manifest.created,
        save_id=manifest.save_id,
        nbytes=manifest.nbytes,
        stored_bytes=manifest.added_bytes,
        parameters=manifest.parameters,
    )


def load_manifest(store: Store, tag: str) -> Manifest:
    """Reads the manifest of a checkpoint.

    Args:
        store: the checkpoint root.
        tag: the checkpoint's name.

    Returns:
        The manifest, checked.

    Raises:
        CheckpointNotFoundError: if there is no such checkpoint; lists those that there are, and says if a save with
            this tag was not finished.
        UnsupportedError: if DeepSpeed itself wrote the checkpoint.
        CorruptionError: if it is damaged.
        FormatError: if it is of a newer format version.
    """
    key = manifest_key(tag)
    data = store.read(key)
    if data is None:
        _explain_missing(store, tag)
    manifest = decode_manifest(data, store.locate(key))
    if manifest.tag != tag:
        raise FormatError(
            f"the manifest is of checkpoint {manifest.tag!r}, not {tag!r}",
            where=store.locate(key),
            fix=f"name the directory {manifest.tag!r} again: manifests refer to each other by tag",
        )
    return manifest


def _explain_missing(store: Store, tag: str) -> NoReturn:
    if not store.root_exists():
        raise CheckpointNotFoundError(
            "the checkpoint directory does not exist", where=store.url, fix="check the path and the mount"
        )
    keys = store.list(tag)
    if any(_NATIVE.search(key) for key in keys):
        raise UnsupportedError(
            f"checkpoint {tag!r} was written by DeepSpeed itself",
            where=store.locate(tag),
            fix="make one of this package out of it (`moc-ckpt import`) and load that; or load it with the plugin "
            "switched off (moc_checkpoint.enabled: false), then save with it switched on",
        )
    tags = list_tags(store)
    there = f"there are: {', '.join(tags)}" if tags else "there is no checkpoint in this directory"
    saves = sorted({key.split("/")[1] for key in keys if _PART.search(key) or "/packs/" in key})
    if saves:
        raise CheckpointNotFoundError(
            f"checkpoint {tag!r} was not finished: {_count_parts(keys)}, but it was never committed"
            + _failures(store, keys),
            where=store.locate(tag),
            fix=f"use another one ({there})",
        )
    raise CheckpointNotFoundError(f"there is no checkpoint {tag!r}", where=store.url, fix=there)


def _failures(store: Store, keys: list[str]) -> str:
    told = [(int(found[1]), _failure_text(store, key)) for key in keys if (found := _FAILURE.search(key))]
    return "".join(f"; rank {rank} failed: {text}" for rank, text in sorted(told)[:_MOST_FAILURES])


def _count_parts(keys: list[str]) -> str:
    count = len({key for key in keys if _PART.search(key)})
    return f"{count} rank{'s' if count != 1 else ''} wrote a part"
