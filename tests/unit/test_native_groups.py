"""The param groups of native checkpoints: they agree with the intervals, and are split anew as DeepSpeed does."""

from __future__ import annotations

import random

import pytest

from moc_ckpt.errors import FormatError, UnsupportedError
from moc_ckpt.plan import native_groups
from moc_ckpt.plan.native_groups import NativeGroup, expand_groups, expert_name, split_name
from moc_ckpt.plan.topology import ParallelLayout
from moc_ckpt.plan.zero_layout import flat_groups, owned_intervals
from moc_ckpt.plan.zero_spec import TensorSpec, ZeroSettings, split_expert_groups
from moc_ckpt.state.fragment import MASTER
from moc_ckpt.state.unit import MoELayer

LAYERS = (MoELayer(0, "a.moe", 4), MoELayer(1, "b.moe", 8))
TAILS = ("up.weight", "up.bias", "down")


def model(seed: int) -> list[TensorSpec]:
    """Dense tensors and experts in two groups, as a user makes them."""
    chance = random.Random(seed)
    specs = [TensorSpec(f"dense{i}", (chance.randint(1, 9),), i % 2) for i in range(5)]
    for layer in LAYERS:
        for tail in range(3):
            shape, group = (chance.randint(1, 7),), 1 if tail == 1 else 0
            for expert in range(layer.num_experts):
                name = expert_name(layer.prefix, expert, TAILS[tail])
                specs.append(TensorSpec(name, shape, group, layer.ordinal, expert))
    # As named_parameters: expert by expert.
    order = {spec: (-1 if spec.layer is None else spec.layer, spec.expert or 0, i) for i, spec in enumerate(specs)}
    return sorted(specs, key=lambda spec: order[spec])


def groups_of(specs: tuple[TensorSpec, ...], ep: int, position: int) -> list[NativeGroup]:
    """The groups as a rank has them."""
    found: dict[int, list[str]] = {}
    options: dict[int, dict[str, object]] = {}
    for spec in specs:
        assert spec.group is not None
        if spec.layer is not None:
            local = LAYERS[spec.layer].num_experts // ep
            if (spec.expert or 0) // local != position:
                continue
            options[spec.group] = {"moe": True, "name": f"ep_size_{ep}", "foreach": None}
        found.setdefault(spec.group, []).append(spec.fqn)
    users = {group: b"1" if TAILS[1] in found[group][0] else b"0" for group in found}
    return [
        NativeGroup(tuple(found[group]), options.get(group, {"name": "x"}), users[group]) for group in sorted(found)
    ]


@pytest.mark.parametrize("limit", [10**9, 60, 21, 9])
@pytest.mark.parametrize("seed", range(6))
def test_groups_are_split_anew_as_deepspeed_does(monkeypatch: pytest.MonkeyPatch, seed: int, limit: int) -> None:
    monkeypatch.setattr(native_groups, "MAX_GROUP_SIZE", limit)
    specs = model(seed)
    shapes = {spec.fqn: spec.shape for spec in specs}
    dtypes = dict.fromkeys(shapes, "bfloat16")
    split = {ep: split_expert_groups(specs, [4, 8], [ep, ep], max_group_size=limit) for ep in (1, 2, 4)}
    for saved in (1, 2, 4):
        for ep in (1, 2, 4):
            recorded = groups_of(split[saved], saved, 0)
            groups, expanded = expand_groups(recorded, LAYERS, shapes, dtypes, saved_ep=saved, ep=ep)
            assert [group.names for group in groups] == [group.names for group in groups_of(split[ep], ep, 0)]
            for position in range(ep):
                mine = [group.names for group in groups_of(tuple(expanded), ep, position)]
                assert mine == [group.names for group in groups_of(split[ep], ep, position)]
            assert {group.options["name"] for group in groups if group.moe} == {f"ep_size_{ep}"}


@pytest.mark.parametrize("seed", range(4))
def test_flat_groups_hold_the_intervals(seed: int) -> None:
    chance = random.Random(seed)
    for ep in (1, 2, 4):
        specs = split_expert_groups(model(seed), [4, 8], [ep, ep])
        numels = [spec.shape[0] for spec in specs]
        settings = ZeroSettings(2, round_robin=chance.random() < 0.5, parameter_alignment=chance.random() < 0.5)
        parallel = ParallelLayout(4, chance.random() < 0.5)
        for rank in range(4):
            arguments = (specs, [4, 8], [ep, ep], parallel, settings, rank)
            flats = flat_groups(*arguments)
            found = {
                (specs[member].fqn, start, stop) for flat in flats for member, start, stop, _ in flat.intervals(numels)
            }
            assert found == {(o.fqn, o.start, o.stop) for o in owned_intervals(*arguments) if o.kind == MASTER}
            for flat in flats:
                held = sum(stop - start for _, start, stop, _ in flat.intervals(numels))
                inner = sum(flat.gaps(numels))
                assert flat.size - flat.padding(numels) - inner <= held <= flat.size - flat.padding(numels)
                assert flat.count == (4 if specs[flat.members[0][0]].layer is None else 4 // ep)


def test_what_does_not_fit_is_refused() -> None:
    specs = model(0)
    shapes = {spec.fqn: spec.shape for spec in specs}
    dtypes = dict.fromkeys(shapes, "bfloat16")
    groups = groups_of(split_expert_groups(specs, [4, 8], [2, 2]), 2, 0)
    backwards = [NativeGroup(group.names[::-1] if group.moe else group.names, group.options) for group in groups]
    expand_groups(backwards, LAYERS, shapes, dtypes, saved_ep=2, ep=2)
    with pytest.raises(UnsupportedError, match="not in the order of the model"):
        expand_groups(backwards, LAYERS, shapes, dtypes, saved_ep=2, ep=4)
    with pytest.raises(FormatError, match="name 41 parameters, the checkpoint has 42"):
        expand_groups(groups[1:] + groups[:1], LAYERS, {**shapes, "new": (1,)}, dtypes, saved_ep=2, ep=2)
    with pytest.raises(FormatError, match="does not have as a trained parameter"):
        expand_groups(groups, LAYERS, {k: v for k, v in shapes.items() if k != "dense0"}, dtypes, saved_ep=2, ep=2)
    assert split_name("dense0") is None
    assert split_name(expert_name("a.moe", 3, "up.bias")) == ("a.moe", 3, "up.bias")
