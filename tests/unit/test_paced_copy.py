"""The compiled loop that issues copies, over a driver of the test's own: order, window, hand-over, errors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import pytest

pytest.importorskip("torch")

from hypothesis import given, settings
from hypothesis import strategies as st

from moc_ckpt.snapshot.device_copy import PacedCopy, load_paced_copy

pytestmark = pytest.mark.skipif(load_paced_copy() is None, reason="installed without a C compiler: torch issues copies")

NOT_READY = 600
STREAMS = 101, 102


class Driver:
    """Two streams and their events, which the test's clock advances: a piece is done some looks after it was issued."""

    def __init__(self, slowness: int = 2, fail: tuple[str, int] = ("", 0)) -> None:
        self.slowness = slowness
        self.fail = fail
        self.queues: dict[int, list[tuple[str, tuple[int, ...]]]] = {stream: [] for stream in STREAMS}
        self.recorded: dict[int, int] = {}
        self.done: dict[int, int] = {}
        self.copied: list[tuple[int, int, int]] = []
        self.most = 0
        self.in_flight = 0
        self.calls = {"copy": 0, "record": 0, "wait": 0, "query": 0}
        self.kept = (
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_size_t, ctypes.c_uint64)(
                self.copy
            ),
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64)(self.record),
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint)(self.wait),
            ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_uint64)(self.query),
        )

    def addresses(self) -> list[int]:
        return [ctypes.cast(function, ctypes.c_void_p).value or 0 for function in self.kept]

    def _failing(self, name: str) -> bool:
        self.calls[name] += 1
        return self.fail == (name, self.calls[name])

    def copy(self, target: int, source: int, nbytes: int, stream: int) -> int:
        self.queues[stream].append(("copy", (target, source, nbytes)))
        return 700 if self._failing("copy") else 0

    def record(self, event: int, stream: int) -> int:
        self.recorded[event] = self.recorded.get(event, 0) + 1
        self.queues[stream].append(("record", (event, self.recorded[event])))
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        return 701 if self._failing("record") else 0

    def wait(self, stream: int, event: int, flags: int) -> int:
        # A stream waits for what is recorded now, whatever is recorded later.
        self.queues[stream].append(("wait", (event, self.recorded[event])))
        return 702 if self._failing("wait") else 0

    def query(self, event: int) -> int:
        if self._failing("query"):
            return 703
        if self.done.get(event, 0) < self.recorded[event] and self.calls["query"] % self.slowness == 0:
            self.advance()
        return 0 if self.done.get(event, 0) >= self.recorded[event] else NOT_READY

    def advance(self) -> None:
        """Does the work up to the next record, of whichever stream can go on."""
        for queue in self.queues.values():
            while queue:
                what, detail = queue[0]
                if what == "wait" and self.done.get(detail[0], 0) < detail[1]:
                    break
                queue.pop(0)
                if what == "copy":
                    self.copied.append((detail[0], detail[1], detail[2]))
                elif what == "record":
                    self.done[detail[0]] = detail[1]
                    self.in_flight -= 1
                    return

    def finish(self) -> None:
        while any(self.queues.values()):
            before = sum(map(len, self.queues.values()))
            self.advance()
            assert sum(map(len, self.queues.values())) < before, "the streams wait for each other"


def issue(
    driver: Driver, runs: Sequence[tuple[int, int, int]], *, piece: int, window: int, deadline_s: float = 5.0
) -> tuple[int, int]:
    paced = PacedCopy(load_paced_copy(), driver.addresses())
    return paced(STREAMS, [1000 + number for number in range(window)], runs, piece, deadline_s)


@settings(deadline=None, max_examples=150)
@given(
    sizes=st.lists(st.integers(1, 300), max_size=12),
    piece=st.integers(1, 200),
    window=st.integers(2, 7),
    slowness=st.integers(1, 2),
)
def test_every_byte_once_in_order_and_never_more_than_the_window(
    sizes: list[int], piece: int, window: int, slowness: int
) -> None:
    runs, at = [], 0
    for size in sizes:
        runs.append((10_000 + 2 * at, 5_000_000 + 3 * at, size))
        at += size
    driver = Driver(slowness)
    pieces = -(-sum(sizes) // piece)
    if slowness > 1 and pieces > 200:
        piece = max(piece, sum(sizes) // 100)
        pieces = -(-sum(sizes) // piece)
    code, last = issue(driver, runs, piece=piece, window=window)
    assert code == 0
    assert last == (max(pieces, 1) - 1) % 2
    # The stream that is said to end last does.
    tail = driver.queues[STREAMS[last]][-1:]
    driver.finish()
    if pieces > 1:
        assert tail and tail[0][0] == "record" and driver.done[tail[0][1][0]] == tail[0][1][1]
    expected = [(source + n, target + n) for source, target, size in runs for n in range(size)]
    found = [(source + n, target + n) for target, source, size in driver.copied for n in range(size)]
    assert found == expected
    assert driver.most <= window
    assert driver.calls["record"] == pieces
    assert driver.calls["wait"] == max(pieces - 1, 0)


def test_the_other_stream_goes_on_after_every_piece() -> None:
    driver = Driver()
    assert issue(driver, [(1000, 2000, 100)], piece=30, window=8) == (0, 1)
    assert [what for what, _ in driver.queues[STREAMS[0]]] == ["copy", "record", "wait", "copy", "record"]
    assert [what for what, _ in driver.queues[STREAMS[1]]] == ["wait", "copy", "record", "wait", "copy", "record"]


@pytest.mark.parametrize(
    ("fail", "code"), [(("copy", 3), 700), (("record", 2), 701), (("wait", 2), 702), (("query", 1), 703)]
)
def test_what_the_driver_refuses_is_passed_on(fail: tuple[str, int], code: int) -> None:
    driver = Driver(fail=fail)
    assert issue(driver, [(1000, 2000, 100)], piece=10, window=3)[0] == code


def test_a_device_that_hangs_is_given_up() -> None:
    driver = Driver(slowness=10**9)
    assert issue(driver, [(1000, 2000, 100)], piece=10, window=3, deadline_s=0.2)[0] == -1
    assert driver.calls["record"] == 3
