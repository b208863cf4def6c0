"""What the host side of a rank decides without an engine."""

from __future__ import annotations

import pytest

from moc_ckpt.errors import ConfigError
from moc_ckpt.integrations.deepspeed.host import Home, _largest, check_homes


@pytest.mark.parametrize("most", [0, 1, 2, 3, 8, 100])
def test_the_largest_k_that_fits(most: int) -> None:
    for limit in range(most + 2):
        asked: list[int] = []

        def fits(k: int, limit: int = limit, asked: list[int] = asked) -> bool:
            asked.append(k)
            return k <= limit

        assert _largest(most, fits) == max(1, min(limit, most))
        assert len(asked) <= 8, "each question may plan a whole cycle"


def test_ranks_find_their_node_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOC_NODE", raising=False)
    plain = Home.here()
    assert plain == Home.here() and not plain.given
    monkeypatch.setenv("MOC_NODE", "a")
    named = Home.here()
    assert named != plain and named == Home.here() and (named.name, named.given) == ("a", True)
    # Memory is one machine's, whatever the nodes on it are called: they share the room in it.
    assert named.memory == plain.memory
    monkeypatch.setenv("MOC_NODE", "a/b")
    with pytest.raises(ConfigError):
        Home.here()


def test_one_name_on_two_machines_is_refused() -> None:
    a, b, elsewhere = Home("a", True, "m1"), Home("b", True, "m1"), Home("a", True, "m2")
    check_homes([a, b, a, b])
    with pytest.raises(ConfigError, match="ranks 1 and 3 are both on a node named 'a'"):
        check_homes([b, a, b, elsewhere])
    # Containers may have one host name and memory apart: nobody has named these.
    check_homes([Home("h", False, "m1"), Home("h", False, "m2")])
    with pytest.raises(ConfigError, match="MOC_NODE"):
        check_homes([Home("h", False, "m1"), Home("h", True, "m1")])
