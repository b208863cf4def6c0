"""Each rank reads only its own ranges: every byte that the kernel hands out of a pack object is counted.

What a rank needs is taken from its optimizer (the oracle's view of it), where that lies from the manifest's JSON, and
the sub-chunks of the packs from their own metadata: nothing of the package plans what is expected here.

The bound, which is met exactly. Of each pack a rank reads
- every sub-chunk that holds a byte that it needs, once: its payload and 4 bytes of checksum;
- of every object that holds such a sub-chunk, the index: 16 bytes per sub-chunk of a full object, and 4;
- where it needs no whole fragment with bytes in an object, the sub-chunks of that object's smallest fragment as well,
  the witness that the object is the manifest's.
So beside what it needs a rank reads less than two sub-chunks per run of needed bytes, one witness and one index per
object; and nothing at all of a pack of which it needs nothing.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest

from distributed import harness, oracle, zoo
from distributed.pec_tools import DEADLINE, build, manifest
from distributed.pool import Pool
from distributed.zoo import Layer

pytestmark = pytest.mark.distributed

WORLD = 4
#: Large enough that most ranks need several sub-chunks of a pack, and none needs all of them.
SIZES = {"hidden": 48, "ffn": 96}
WIDTH = {"float32": 4, "bfloat16": 2, "int64": 8}
CRC = 4


def row_of(ep: int, stage: int) -> zoo.Row:
    """Two MoE layers of one expert-parallel size: DP of the experts is 4 / EP."""
    layers = (Layer(ep=ep), Layer(ep=ep, k=2, residual=True))
    return zoo.ROWS["z2_bf16"].with_model(stage=stage, layers=layers, **SIZES)


class Need(NamedTuple):
    """Elements [start, stop) of a logical tensor; stop None: all of it."""

    fqn: str
    kind: str
    start: int
    stop: int | None


def needs_of(engine: Any) -> list[Need]:
    """What a rank has to read: its parts of masters and moments, its frozen parameters and its buffers."""
    names = oracle.global_names(engine.module)
    by_id = {id(param): names[name] for name, param in engine.module.named_parameters()}
    out = []
    for param, start, stop, _, tensors, _ in oracle._pieces(engine):
        out += [Need(by_id[id(param)], kind, start, stop) for kind in ("master", *tensors)]
    mine = oracle.local_state(engine)
    out += [Need(name, "weight", 0, None) for name in sorted({*mine["frozen"], *mine["buffers"]})]
    return out


@contextmanager
def pack_reads() -> Iterator[list[tuple[str, int, int]]]:
    """Notes (object, offset, bytes) of all that the kernel hands this process out of pack objects."""
    reads: list[tuple[str, int, int]] = []
    preadv, read_bytes = os.preadv, Path.read_bytes

    def counted(fd: int, views: Any, offset: int, *flags: Any) -> int:
        count = preadv(fd, views, offset, *flags)
        name = str(Path(f"/proc/self/fd/{fd}").readlink())
        if "/packs/" in name:
            reads.append((name, offset, count))
        return count

    def whole(path: Path) -> bytes:
        data = read_bytes(path)
        if "/packs/" in str(path) and path.name != "zarr.json":
            reads.append((str(path), 0, len(data)))
        return data

    with mock.patch.object(os, "preadv", counted), mock.patch.object(Path, "read_bytes", whole):
        yield reads


def case_save(ctx: Any, path: str, fine: bool) -> None:
    """A checkpoint with one expert per layer of its own and the others of an older one."""
    from moc_ckpt.storage import pack_layout, pack_write

    engine = build(ctx, row_of(2, 2), 1)
    with ExitStack() as grain:
        if fine:  # sub-chunks of 4 KiB, objects of 64 KiB
            for name, value in (("_SMALL_PACK", 1), ("MAX_CHUNK", 4096), ("_LEAST_BLOCKS", 1)):
                grain.enter_context(mock.patch.object(pack_layout, name, value))
            grain.enter_context(mock.patch.object(pack_write, "SHARD_BYTES", 64 << 10))
        for _ in range(2):
            harness.train(engine, 1)
            engine.save_checkpoint(path)


def case_load(ctx: Any, path: str, ep: int, stage: int) -> tuple[list[Need], list[tuple[str, int, int]]]:
    engine = build(ctx, row_of(ep, stage), 1, seed=2)
    with pack_reads() as reads:
        where, _ = engine.load_checkpoint(path)
    assert where is not None and where.endswith("global_step2")
    return needs_of(engine), reads


class PackGrid:
    """The sub-chunks of one pack, by its own metadata."""

    def __init__(self, root: str, path: str, nbytes: int) -> None:
        meta = json.loads(Path(root, path, "zarr.json").read_text())
        self.root = f"{root}/{path}/c"
        self.nbytes = nbytes
        self.chunk = meta["codecs"][0]["configuration"]["chunk_shape"][0]
        self.per_object = meta["chunk_grid"]["configuration"]["chunk_shape"][0] // self.chunk
        #: Aligned packs have the checksum in a block of its own.
        self.frame = self.chunk + (4096 if self.chunk % 4096 == 0 and nbytes > self.chunk else CRC)

    def chunks(self, start: int, stop: int) -> range:
        """The sub-chunks with bytes in [start, stop)."""
        return range(start // self.chunk, -(-stop // self.chunk)) if stop > start else range(0)

    def read_of(self, chunk: int) -> tuple[str, int, int]:
        """What reading a sub-chunk asks the kernel for."""
        number, position = divmod(chunk, self.per_object)
        return f"{self.root}/{number}", position * self.frame, self.chunk + CRC

    def index_of(self, number: int) -> tuple[str, int, int]:
        """What reading an object's index asks the kernel for."""
        nbytes = 16 * self.per_object + CRC
        name = f"{self.root}/{number}"
        return name, Path(name).stat().st_size - nbytes, nbytes


class Stored:
    """Where a checkpoint has everything, from its manifest's JSON."""

    def __init__(self, path: str) -> None:
        body = manifest(path)
        self.grids = [PackGrid(path, pack["path"], pack["nbytes"]) for pack in body["packs"]]
        table = body["fragments"]
        columns = ("tensor", "pack", "start", "stop", "offset")
        #: (fqn, kind) -> (start, stop, pack, first byte, bytes per element)
        self.where: dict[tuple[str, str], list[tuple[int, int, int, int, int]]] = {}
        self.in_pack: list[list[tuple[int, int]]] = [[] for _ in self.grids]
        for tensor, pack, start, stop, offset in zip(*(table[name] for name in columns), strict=True):
            record = body["tensors"][tensor]
            width = WIDTH[record["dtype"]]
            place = (start, stop, pack, offset, width)
            self.where.setdefault((record["fqn"], record["kind"]), []).append(place)
            if stop > start:
                self.in_pack[pack].append((offset, offset + (stop - start) * width))

    def pieces(self, need: Need) -> Iterator[tuple[int, int, int, bool]]:
        """(pack, first byte, one past the last, it is a whole fragment) of all that a need reads."""
        for start, stop, pack, offset, width in self.where.get((need.fqn, need.kind), []):
            low = max(start, need.start)
            high = stop if need.stop is None else min(stop, need.stop)
            if low < high:
                yield (
                    pack,
                    offset + (low - start) * width,
                    offset + (high - start) * width,
                    (low, high) == (start, stop),
                )

    def expected(self, needs: list[Need]) -> tuple[int, int, Counter[tuple[str, int, int]]]:
        """Bytes that are needed, bytes of all sub-chunks with a needed byte, and every read that the bound allows."""
        reads: Counter[tuple[str, int, int]] = Counter()
        chunks: dict[int, set[int]] = {}
        known: dict[int, set[int]] = {}
        nbytes = 0
        for need in needs:
            for pack, start, stop, whole in self.pieces(need):
                nbytes += stop - start
                found = set(self.grids[pack].chunks(start, stop))
                chunks.setdefault(pack, set()).update(found)
                if whole:
                    known.setdefault(pack, set()).update(chunk // self.grids[pack].per_object for chunk in found)
        own = 0
        for pack, found in chunks.items():
            grid = self.grids[pack]
            reads.update(grid.read_of(chunk) for chunk in found)
            own += sum(min(grid.chunk, grid.nbytes - chunk * grid.chunk) for chunk in found)
            objects = {chunk // grid.per_object for chunk in found}
            indexed = set(objects)
            for number in objects - known.get(pack, set()):
                low, high = number * grid.per_object * grid.chunk, (number + 1) * grid.per_object * grid.chunk
                start, stop = min(
                    (item for item in self.in_pack[pack] if item[0] < high and item[1] > low),
                    key=lambda item: item[1] - item[0],
                )
                witness = set(grid.chunks(start, stop))
                reads.update(grid.read_of(chunk) for chunk in witness)
                indexed |= {chunk // grid.per_object for chunk in witness}
            reads.update(grid.index_of(number) for number in indexed)
        return nbytes, own, reads


@pytest.mark.parametrize(
    ("ep", "stage"), [(2, 2), (4, 2), (1, 2), (2, 1)], ids=["same", "EP 2 to 4", "EP 2 to 1", "ZeRO 2 to 1"]
)
@pytest.mark.parametrize("fine", [True, False], ids=["many sub-chunks", "small packs"])
def test_each_rank_reads_only_its_own_ranges(pool: Pool, tmp_path: Path, ep: int, stage: int, fine: bool) -> None:
    path = os.path.realpath(tmp_path / "c")
    pool.run(WORLD, case_save, path=path, fine=fine, deadline=DEADLINE)
    stored = Stored(path)
    grids = stored.grids
    assert {grid.chunk for grid in grids} == {4096} if fine else all(grid.chunk == grid.nbytes for grid in grids)
    assert not fine or any(grid.nbytes > 2 * grid.chunk * grid.per_object for grid in grids), "several objects"
    assert any("global_step1/" in grid.root for grid in grids), "experts of an older checkpoint"
    every = sum(grid.nbytes for grid in grids)
    partitioned = sum(
        (stop - start) * width
        for (_, kind), places in stored.where.items()
        if kind != "weight"
        for start, stop, _, _, width in places
    )
    needed = 0
    for needs, reads in pool.run(WORLD, case_load, path=path, ep=ep, stage=stage, deadline=DEADLINE):
        nbytes, own, expected = stored.expected(needs)
        assert Counter(map(tuple, reads)) == expected
        needed += sum(
            stop - start for need in needs if need.kind != "weight" for _, start, stop, _ in stored.pieces(need)
        )
        assert 0 < nbytes <= own <= sum(count for _, _, count in reads)
        if fine:
            # Four ranks, so about a quarter each: the rounding does not hide a rank that reads what others own.
            assert sum(count for _, _, count in reads) < 0.45 * every
    # ZeRO's partitions are disjoint: together the ranks need every byte of masters and moments once.
    assert needed == partitioned
