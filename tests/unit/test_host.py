"""What the host side of a rank decides without an engine."""

from __future__ import annotations

import pytest

from moc_ckpt.integrations.deepspeed.host import _largest


@pytest.mark.parametrize("most", [0, 1, 2, 3, 8, 100])
def test_the_largest_k_that_fits(most: int) -> None:
    for limit in range(most + 2):
        asked: list[int] = []

        def fits(k: int, limit: int = limit, asked: list[int] = asked) -> bool:
            asked.append(k)
            return k <= limit

        assert _largest(most, fits) == max(1, min(limit, most))
        assert len(asked) <= 8, "each question may plan a whole cycle"
