"""The trees that the tests run on, and a place for what a test writes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from mds import runs
from mds.runs import Place, Tree


@pytest.fixture(scope="session", params=["mini", "real"])
def tree(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """The miniature, and a real checkout where one is named."""
    if request.param == "mini":
        return runs.mini()
    if not runs.REAL:
        pytest.skip(runs.NO_REAL)
    return runs.real(tmp_path_factory.mktemp("corpus"))


@pytest.fixture
def here(tree: Tree, tmp_path: Path) -> Iterator[Place]:
    """A directory of this test and its own shared memory."""
    with runs.place(tree, tmp_path) as found:
        yield found
