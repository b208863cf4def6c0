"""Who is asked for what lies in the memory of other nodes, and what comes back."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moc_ckpt.recovery.memory_reads import without
from moc_ckpt.recovery.peer_plan import Offer, Request, answer, encode_requests, plan_requests, taken
from moc_ckpt.recovery.resolver import Piece, Read, RecoveryPlan
from moc_ckpt.state.fragment import Fragment
from moc_ckpt.state.unit import Version
from moc_ckpt.storage.checksum import crc32c
from moc_ckpt.storage.manifest import FragmentRow
from moc_ckpt.transfer import chunks


@given(
    sizes=st.lists(st.integers(0, 40), max_size=8),
    size=st.integers(1, 33),
)
def test_chunks_are_the_bytes_in_pieces_of_one_size(sizes: list[int], size: int) -> None:
    data = np.arange(sum(sizes), dtype=np.uint8)
    views, at = [], 0
    for count in sizes:
        views.append(data[at : at + count])
        at += count
    found = [part.copy() for part in chunks(views, size)]
    assert b"".join(part.tobytes() for part in found) == data.tobytes()
    assert all(len(part) == size for part in found[:-1])
    assert all(0 < len(part) <= size for part in found)


def test_what_is_in_one_array_is_not_copied() -> None:
    data = np.zeros(64, np.uint8)
    assert all(np.shares_memory(part, data) for part in chunks([data], 16))


def manifest_of(*writers: str, rows: list[FragmentRow] | None = None) -> Any:
    """The parts of a manifest that are asked for."""
    return SimpleNamespace(
        packs=[SimpleNamespace(path=f"t/r1-a/packs/{writer}") for writer in writers],
        fragments=rows or [],
        units=[SimpleNamespace(name="dense/a", version=Version(1, 5))],
        tensors=[SimpleNamespace(fqn="a", kind="master", dtype="uint8", shape=(1000,))],
    )


def piece(offset: int, nbytes: int, crc: int | None = None, need: int = 0) -> Piece:
    return Piece(need, 0, nbytes, offset, crc)


def plan_of(*reads: tuple[int, list[Piece]]) -> RecoveryPlan:
    return RecoveryPlan(tuple(Read(pack, tuple(pieces)) for pack, pieces in reads), ("uint8",))


def test_a_pack_is_asked_of_the_node_of_its_writer_by_each_asker_of_another_rank() -> None:
    manifest = manifest_of("rank_00000.dense", "rank_00002.experts", "rank_00003.dense", "strange")
    plan = plan_of(*((pack, [piece(pack, 4), piece(9, 0)]) for pack in range(4)))
    # Ranks 0 and 1 on a node with the memory of 0, ranks 2 and 3 on one with that of 2; that of 3 is nowhere.
    offers = [Offer((0,), 1), Offer((0,), 1), Offer((2,), 1), Offer((2,), 1)]
    asked = [plan_requests(manifest, plan, offers, rank) for rank in range(4)]
    assert asked == [
        {2: [Request(1, piece(1, 4))]},
        {3: [Request(1, piece(1, 4))]},
        {0: [Request(0, piece(0, 4))]},
        {1: [Request(0, piece(0, 4))]},
    ]


def test_nobody_asks_where_nobody_has_it() -> None:
    manifest = manifest_of("rank_00000.dense")
    assert plan_requests(manifest, plan_of((0, [piece(0, 4)])), [Offer((), 4), Offer((), 4)], 0) == {}


class Held:
    """Memory that has what it is given."""

    def __init__(self, rows: dict[tuple[int, int], np.ndarray]) -> None:
        self._rows = rows

    def checksum(self, unit: str, version: Version, fragment: Fragment) -> int | None:
        return None

    def find(self, unit: str, version: Version, fragment: Fragment) -> list[np.ndarray] | None:
        assert (unit, version, fragment.fqn) == ("dense/a", Version(1, 5), "a")
        data = self._rows.get((fragment.start, fragment.stop))
        # In two places, as slots of two extents are.
        return None if data is None else [data[: len(data) // 3], data[len(data) // 3 :]]


@given(data=st.data())
def test_an_answer_holds_what_is_there_and_right(data: st.DataObject) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, 199), max_size=6)) | {0, 200})
    rng = np.random.default_rng(data.draw(st.integers(0, 9)))
    content = rng.integers(0, 256, 200, dtype=np.uint8)
    spans = list(itertools.pairwise(cuts))
    rows = [
        FragmentRow(unit=0, tensor=0, start=a, stop=b, pack=0, offset=a, crc32c=crc32c(content[a:b])) for a, b in spans
    ]
    absent = {span for span in spans if data.draw(st.booleans())}
    spoilt = {span for span in spans if span not in absent and data.draw(st.booleans())}
    memory = {span: content[span[0] : span[1]].copy() for span in spans if span not in absent}
    for span in spoilt:
        memory[span][data.draw(st.integers(0, len(memory[span]) - 1))] ^= 1
    wanted = []
    for row in rows:
        a = data.draw(st.integers(row.start, row.stop - 1))
        b = data.draw(st.integers(a + 1, row.stop))
        wanted.append(Request(0, piece(a, b - a, row.crc32c if (a, b) == (row.start, row.stop) else None)))
    manifest = manifest_of("rank_00000.dense", rows=rows)
    reply = np.concatenate(answer(Held(memory), manifest, encode_requests(wanted)))  # type: ignore[arg-type]
    found = taken(wanted, reply)
    right = [request for request, span in zip(wanted, spans, strict=True) if span not in absent and span not in spoilt]
    assert [request for request, _ in found] == right
    for request, item in found:
        (view,) = item.views
        assert view.tobytes() == content[request.piece.offset : request.piece.offset + request.piece.nbytes].tobytes()
    left = without(plan_of((0, [request.piece for request in wanted])), {(0, request.piece) for request in right})
    assert [item for read in left.reads for item in read.pieces] == [
        request.piece for request in wanted if request not in right
    ]


def test_a_node_without_memory_answers_no() -> None:
    wanted = [Request(0, piece(0, 4)), Request(0, piece(8, 4))]
    (reply,) = answer(None, manifest_of("rank_00000.dense"), encode_requests(wanted))
    assert reply.tolist() == [0, 0]
    assert taken(wanted, reply) == []


def test_what_changed_on_the_way_is_left_out() -> None:
    content = np.arange(8, dtype=np.uint8)
    rows = [FragmentRow(unit=0, tensor=0, start=0, stop=8, pack=0, offset=0, crc32c=crc32c(content))]
    wanted = [Request(0, piece(0, 8, rows[0].crc32c))]
    held: Any = Held({(0, 8): content})
    reply = np.concatenate(answer(held, manifest_of("rank_00000.dense", rows=rows), encode_requests(wanted)))
    reply[-1] ^= 1
    assert taken(wanted, reply) == []


@pytest.mark.parametrize("offset, nbytes", [(4, 8), (0, 9), (900, 4)])
def test_what_no_fragment_holds_is_not_served(offset: int, nbytes: int) -> None:
    content = np.arange(8, dtype=np.uint8)
    rows = [FragmentRow(unit=0, tensor=0, start=0, stop=8, pack=0, offset=0, crc32c=crc32c(content))]
    held: Any = Held({(0, 8): content})
    (flags,) = answer(
        held, manifest_of("rank_00000.dense", rows=rows), encode_requests([Request(0, piece(offset, nbytes))])
    )
    assert flags.tolist() == [0]
