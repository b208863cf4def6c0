"""Which checkpoint a load takes, and what becomes of it when files are damaged: older versions, said loudly.

Rank 0 looks at the directory. What the ranks find damaged while they read they tell each other; then all of them read
again, with the experts' next older versions or the checkpoint before, until all is whole or nothing is left to try.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from moc_ckpt.errors import CheckpointNotFoundError, CorruptionError
from moc_ckpt.integrations.deepspeed.load import Damaged, InMemory, LoadRequest, read
from moc_ckpt.recovery.checks import Damage
from moc_ckpt.recovery.search import Search, Setback, Target
from moc_ckpt.storage.latest import Latest
from moc_ckpt.storage.manifest import Manifest, decode_manifest, encode_manifest
from moc_ckpt.storage.store import Store, open_store

if TYPE_CHECKING:
    from moc_ckpt.integrations.deepspeed.plugin import MocCheckpoint

__all__ = ["Found", "find_and_read"]

logger = logging.getLogger("moc_ckpt")


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that was read.

    Attributes:
        store: the directory.
        manifest: the checkpoint, with the places of what is restored in the end.
        memory: what was read.
        setback: what damage cost.
        plt_cost: how much more PLT the restore costs for it.
    """

    store: Store
    manifest: Manifest
    memory: InMemory
    setback: Setback
    plt_cost: float


class _Order(NamedTuple):
    """What rank 0 tells the others to read."""

    manifest: bytes
    setback: Setback
    plain: bytes | None
    """The checkpoint's own manifest, if that is another."""


def find_and_read(moc: MocCheckpoint, load_dir: str, tag: str | None, request: LoadRequest) -> Found | None:
    """Finds a checkpoint and reads it into host memory; collective. The engine is untouched.

    Args:
        moc: the engine's plugin.
        load_dir: path or URL.
        tag: exactly this checkpoint; None: the one that `latest` names, or the newest before it that can be read.
        request: how to load.

    Returns:
        What was read; None if nothing is saved there.

    Raises:
        MocError: on all ranks: the checkpoint cannot be restored.
    """
    comm = moc.comm
    finder = _Finder(load_dir, tag, moc.config.recovery.require_resume)
    order = comm.from_first("finding the checkpoint", finder.start, wait="commit")
    if order is None:
        return None
    store = comm.agree("opening the directory", lambda: open_store(load_dir), wait="rendezvous")
    while True:
        manifest = decode_manifest(order.manifest, load_dir)
        memory = read(moc, store, manifest, request)
        if isinstance(memory, InMemory):
            break
        answer = comm.from_first(
            "looking for older versions", partial(finder.without, memory.everywhere), wait="commit"
        )
        if isinstance(answer, str):
            _refuse(moc, memory, answer)
        order = answer
    cost = 0.0
    if order.plain is not None and memory.experts is not None:
        undamaged = moc.pec.read(decode_manifest(order.plain, load_dir))
        cost = memory.experts.ledger.plt - undamaged.ledger.plt if undamaged is not None else 0.0
    return Found(store, manifest, memory, order.setback, cost)


def _refuse(moc: MocCheckpoint, damaged: Damaged, why: str) -> NoReturn:
    """Raises on all ranks what each found itself, or what another rank found."""

    def tell() -> None:
        for item in damaged.own:
            raise CorruptionError(f"{item.what}{why}", where=item.where, fix=item.fix)

    moc.comm.agree("reading the checkpoint", tell)
    raise AssertionError("some rank found damage")


class _Finder:
    """One load's search in a directory, told in the log. Belongs to rank 0.

    Args:
        load_dir: path or URL.
        tag: exactly this checkpoint, or None.
        required: it is an error if nothing is saved.
    """

    def __init__(self, load_dir: str, tag: str | None, required: bool) -> None:
        self._dir = load_dir
        self._tag = tag
        self._required = required

    def start(self) -> _Order | None:
        """Returns what to read first; None if nothing is saved."""
        self._search = Search(open_store(self._dir), self._tag)
        target = self._search.start()
        if target is None:
            if self._required:
                raise CheckpointNotFoundError(
                    "nothing is saved here, and moc_checkpoint.recovery.require_resume is set",
                    where=self._dir,
                    fix="check the directory, or unset require_resume for the first run",
                )
            return None
        if self._search.latest is not None:
            _tell(self._search.manifests.store, self._search.latest)
        return _order(target)

    def without(self, damage: Sequence[Damage]) -> _Order | str:
        """Returns what to read instead; a text says why there is nothing."""
        for item in dict.fromkeys(damage):
            logger.warning("DAMAGED: %s\n  where: %s", item.what, item.where)
        answer = self._search.without(damage)
        return answer if isinstance(answer, str) else _order(answer)


def _order(target: Target) -> _Order:
    plain = encode_manifest(target.plain) if target.plain is not None else None
    return _Order(encode_manifest(target.manifest), target.setback, plain)


def _tell(store: Store, latest: Latest) -> None:
    """Says where `latest` does not name what is loaded, or not the newest."""
    manifest, newer = latest.manifest, latest.newer
    if manifest is None:
        assert latest.damage is not None
        logger.warning("DAMAGED: %s\n  where: %s", latest.damage.what, latest.damage.where)
    elif latest.named is None:
        reason = f"is damaged ({latest.damage.what})" if latest.damage is not None else "is missing"
        logger.warning(
            "DAMAGED: the file `latest` in %s %s; going by the manifests, the newest checkpoint is %s, step %d",
            store.url,
            reason,
            manifest.tag,
            manifest.step,
        )
    elif latest.interrupted:
        logger.warning(
            "`latest` in %s names %s: a crash came before it was moved to %s (step %d), which is loaded",
            store.url,
            latest.named,
            manifest.tag,
            manifest.step,
        )
    elif newer is not None:
        logger.warning(
            "`latest` in %s names %s (step %d), but %s (step %d) continues it and is not loaded; give its tag "
            "to load it",
            store.url,
            manifest.tag,
            manifest.step,
            newer.tag,
            newer.step,
        )
