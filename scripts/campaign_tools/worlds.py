"""Small real checkpoint directories, and what the states were when they were saved."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist
from distributed import harness, pec_tools
from distributed.pec_tools import Diary
from distributed.zoo import Layer, Row

# Reading a kept state takes longer than a load.
_kept = functools.cache(harness.kept)

ROWS = {
    1: Row("campaign", world=1, stage=1, layers=(Layer(ep=1), Layer(ep=1, k=2))),
    2: Row("campaign", world=2, stage=1, layers=(Layer(ep=2), Layer(ep=2, k=2)), rank_buffers=False),
}
ALONE = ROWS[1].with_model(rank_buffers=False)

Version = tuple[int, int]


@dataclass(frozen=True)
class World:
    """One directory as it was saved.

    Attributes:
        name: of the world.
        root: the directory; never changed.
        kept: where the states of its saves are.
        ranks: that saved it.
        latest: the tag in `latest`.
        bodies: the manifest of each tag.
        files: all files, by path from the root.
        lines: by attempt: the last step of every attempt of its timeline.
    """

    name: str
    root: Path
    kept: Path
    ranks: int
    latest: str
    bodies: dict[str, dict[str, Any]] = field(hash=False)
    files: tuple[str, ...]
    lines: dict[int, dict[int, float]] = field(hash=False)

    def order(self, tag: str) -> Version:
        """The version of a checkpoint's dense state."""
        return self.bodies[tag]["attempt"], self.bodies[tag]["step"]

    def versions(self, tag: str) -> dict[str, Version]:
        """The version of every unit in a checkpoint."""
        return {unit["name"]: (unit["attempt"], unit["step"]) for unit in self.bodies[tag]["units"]}

    @functools.cache  # noqa: B019 (a few worlds live as long as the process)
    def unit_files(self, tag: str) -> dict[str, frozenset[str]]:
        """The files of the packs that each unit of a checkpoint lies in."""
        body, found = self.bodies[tag], {}
        for unit, pack in set(zip(body["fragments"]["unit"], body["fragments"]["pack"], strict=True)):
            inside = [name for name in self.files if name.startswith(body["packs"][pack]["path"] + "/")]
            found.setdefault(body["units"][unit]["name"], set()).update(inside)
        return {name: frozenset(files) for name, files in found.items()}

    @functools.cache  # noqa: B019
    def frame(self, tag: str) -> frozenset[str]:
        """The files without which a checkpoint cannot be restored: all but its experts' packs."""
        body = self.bodies[tag]
        extra = {item["path"] for item in body["extra"].values()}
        if self.ranks > 1:  # another world reads the first rank's small state only
            extra = {path for path in extra if not path.rpartition("/")[2].startswith("rank_") or "rank_00000" in path}
        dense = [files for unit, files in self.unit_files(tag).items() if unit.startswith("dense/")]
        return frozenset({f"{tag}/manifest.json", *extra}).union(*dense)

    def belongs(self, version: Version, tag: str) -> bool:
        """Tells whether a version is in a checkpoint's past."""
        attempt, step = self.order(tag)
        line = self.lines[attempt]
        return version[0] in line and version[1] <= min(line[version[0]], step)

    def restorable(self, tag: str, touched: set[str]) -> bool:
        """Tells whether a checkpoint must load, maybe with older experts, whatever became of the touched files."""
        if self.frame(tag) & touched:
            return False
        return all(
            any(
                self.belongs(self.versions(other)[unit], tag)
                and f"{other}/manifest.json" not in touched
                and not self.unit_files(other)[unit] & touched
                for other in self.bodies
            )
            for unit, files in self.unit_files(tag).items()
            if unit.startswith("expert/") and files & touched
        )


def build(ctx: Any, ranks: int, seed: int) -> Any:
    """A new engine."""
    row = ROWS[2] if ranks == 2 else ALONE
    return pec_tools.build(ctx, row, 1, seed=seed, storage={"keep_last": 0})


def make(ctx: Any, path: str, kind: str) -> None:
    """Saves one directory: a straight line, or one with a rollback; runs on every rank."""
    diary = Diary(ctx, f"{path}/c", f"{path}/kept")
    engine = build(ctx, ctx.world, 1)
    for _ in range(5 if kind == "line" else 3):
        harness.train(engine, 1)
        diary.save(engine)
    if kind == "rollback":
        ctx.barrier()
        engine = build(ctx, ctx.world, 2)
        engine.load_checkpoint(diary.path, tag="global_step2")
        for number in range(3):
            harness.train(engine, 1, data_seed=31)
            diary.save(engine, f"again{number}")


def read_world(name: str, path: Path, ranks: int) -> World:
    """Describes what `make` saved. Nothing here uses the package."""
    root = path / "c"
    bodies = {
        file.parent.name: pec_tools.manifest(str(root), file.parent.name) for file in root.glob("*/manifest.json")
    }
    attempts = [json.loads(file.read_text())["body"] for file in sorted((root / "attempts").iterdir())]
    by_number = {item["attempt"]: item for item in attempts}
    lines: dict[int, dict[int, float]] = {}
    for number in by_number:
        line: dict[int, float] = {}
        limit, at = float("inf"), number
        while at is not None:
            line[at] = limit
            fork = by_number[at]["forked_at_step"]
            limit = limit if fork is None else min(limit, fork)
            at = by_number[at]["parent"]
        lines[number] = line
    files = tuple(sorted(str(file.relative_to(root)) for file in root.rglob("*") if file.is_file()))
    latest = (root / "latest").read_text()
    return World(name, root, path / "kept", ranks, latest, bodies, files, lines)


def make_worlds(ctx: Any, top: Path, pool: Any) -> list[World]:
    """Makes all directories: those of one rank here, that of two ranks in two processes."""
    for name in ("line", "rollback"):
        make(ctx, str(top / name), name)
    pool.run(2, make, path=str(top / "two"), kind="line", deadline=240)
    return [read_world(name, top / name, 2 if name == "two" else 1) for name in ("line", "rollback", "two")]


def wrong(ctx: Any, engine: Any, world: World, tag: str, versions: dict[str, Version]) -> list[str]:
    """How a restored engine differs from what was saved at these versions, element by element."""
    body = world.bodies[tag]
    units = [
        {**unit, "attempt": versions[unit["name"]][0], "step": versions[unit["name"]][1]} for unit in body["units"]
    ]
    diary = Diary(ctx, str(world.root), str(world.kept))
    # Of one rank there is nothing to gather, and torch would pickle every tensor for it.
    with (
        mock.patch.object(dist, "gather_object", lambda mine, everyone, dst: everyone.__setitem__(dst, mine)),
        mock.patch.object(pec_tools, "manifest", lambda *_: {**body, "units": units}),
        mock.patch.object(harness, "kept", _kept),
    ):
        return diary.wrong(engine, tag)


def live_tensors(engine: Any) -> Iterator[Any]:
    """Masters, moments, weights and floating buffers of an engine."""
    yield from engine.optimizer.single_partition_of_fp32_groups
    for state in engine.optimizer.optimizer.state.values():
        yield from (value for value in state.values() if hasattr(value, "fill_") and value.dim())
    yield from engine.module.parameters()
    yield from (buffer for buffer in engine.module.buffers() if buffer.is_floating_point())


def scramble(engine: Any, value: float) -> None:
    """Gives all live tensors one value, so that what a load leaves out shows."""
    import torch

    with torch.no_grad():
        for tensor in live_tensors(engine):
            tensor.fill_(value)


def is_scrambled(engine: Any, value: float) -> bool:
    """Tells whether all of them still have it."""
    import torch

    return all(bool((tensor == torch.tensor(value, dtype=tensor.dtype)).all()) for tensor in live_tensors(engine))
