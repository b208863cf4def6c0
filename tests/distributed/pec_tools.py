"""What the tests of partial checkpoints share: an oracle that keeps every save, and what manifests say about experts.

Nothing here uses the package: manifests are read as JSON, states through `oracle.py`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distributed import harness, oracle
from distributed.harness import ON

Place = tuple[int, int]
"""(layer, expert)."""
Version = tuple[int, int]
"""(attempt, step)."""

#: Hangs show here as a failure after this many seconds, not after the rendezvous deadline.
DEADLINE = 120.0


def build(ctx: Any, row: Any, k: Any, *, seed: int = 1, config: dict[str, Any] | None = None, **plugin: Any) -> Any:
    """A new engine, as after a relaunch; `k` is k_persist, None leaves it out. Faults do not raise K."""
    harness.reset()
    section = {**ON, "dynamic_k": False, **({} if k is None else {"k_persist": k}), **plugin}
    return harness.build(row, world=ctx.world, seed=seed, plugin=section, config=config)


def row_experts(row: Any) -> list[int]:
    """Number of experts of each MoE layer of a zoo row."""
    from distributed import zoo

    return [layer.experts for layer in (zoo.ROWS[row] if isinstance(row, str) else row).layers]


# ------------------------------------------------------------------------------------------- manifests


def manifest(path: str, tag: str | None = None) -> dict[str, Any]:
    """The manifest of a tag, or of the one that `latest` names."""
    name = Path(path, "latest").read_text() if tag is None else tag
    return json.loads(Path(path, name, "manifest.json").read_text())["body"]


def tags(path: str) -> list[str]:
    """The committed checkpoints."""
    return sorted(file.parent.name for file in Path(path).glob("*/manifest.json"))


def versions(body: dict[str, Any]) -> dict[Place, Version]:
    """The version of every expert in a manifest."""
    out = {}
    for unit in body["units"]:
        if unit["name"].startswith("expert/"):
            _, layer, expert = unit["name"].split("/")
            out[int(layer), int(expert)] = (unit["attempt"], unit["step"])
    return out


def written(body: dict[str, Any]) -> set[Place]:
    """The experts of which a checkpoint's own save wrote bytes, by the paths of its packs."""
    own = f"{body['tag']}/{body['save_id']}/"
    table = body["fragments"]
    out = set()
    for unit, pack in zip(table["unit"], table["pack"], strict=True):
        parts = body["units"][unit]["name"].split("/")
        if parts[0] == "expert" and body["packs"][pack]["path"].startswith(own):
            out.add((int(parts[1]), int(parts[2])))
    return out


def everyone(experts: list[int]) -> set[Place]:
    """All experts of layers of so many."""
    return {(layer, expert) for layer, count in enumerate(experts) for expert in range(count)}


def cycle(experts: int, k: int) -> int:
    """Saves until every expert of a layer was saved."""
    return -(-experts // min(k, experts))


class Waiting:
    """How many saves ago each expert was last saved, by what the manifests of one directory say."""

    def __init__(self, experts: list[int]) -> None:
        self.experts = experts
        self.ages: dict[Place, int] = {}
        #: Per save: the experts that it took.
        self.taken: list[set[Place]] = []

    def saw(self, body: dict[str, Any]) -> set[Place]:
        """Take in the next checkpoint; the experts that it took."""
        took = written(body)
        assert took == {p for p, v in versions(body).items() if v == (body["attempt"], body["step"])} or (
            # Saved twice at one step: the older bytes of that step are as good.
            took <= {p for p, v in versions(body).items() if v[1] == body["step"]}
        )
        self.taken.append(took)
        for place in everyone(self.experts):
            self.ages[place] = 0 if place in took else self.ages.get(place, 10**6) + 1
        return took

    def sizes(self) -> list[int]:
        """How many experts of each layer the last save took."""
        return [sum(ordinal == layer for ordinal, _ in self.taken[-1]) for layer in range(len(self.experts))]

    def longest(self, layer: int) -> int:
        """The longest that an expert of a layer waits now."""
        return max(age for (ordinal, _), age in self.ages.items() if ordinal == layer)


class Cycles:
    """What `sequential` promises: a layer takes everyone once, at most K at a time, before anyone comes again.

    A full save changes nothing: where a layer is in its cycle stays. When K or the owners change, the rest of the
    cycle comes first, in as few saves as the new K allows.
    """

    def __init__(self, experts: list[int]) -> None:
        self.experts = experts
        self.pending: list[set[int]] = [set() for _ in experts]

    def broken(self, took: set[Place], k: int) -> list[str]:
        """Take in a save; how it breaks the promise."""
        out = []
        if took == everyone(self.experts):
            return out
        for layer, count in enumerate(self.experts):
            mine, most = {expert for ordinal, expert in took if ordinal == layer}, min(k, count)
            waiting = self.pending[layer] or set(range(count))
            if most == count:
                if not waiting <= mine:
                    out.append(f"layer {layer}: {sorted(mine)} although K is N")
                self.pending[layer] = set()
                continue
            left = -(-len(waiting) // most) - 1
            if not (mine and mine <= waiting and len(mine) <= most and len(waiting - mine) <= left * most):
                out.append(f"layer {layer}: took {sorted(mine)} of {sorted(waiting)} at K {k}")
            self.pending[layer] = waiting - mine
        return out


def verified(path: str, tag: str) -> list[str]:
    """What `verify` finds in a checkpoint (this one asks the package)."""
    from moc_ckpt.storage.store import open_store
    from moc_ckpt.storage.verify import verify

    return [f"{tag}: {problem.what} ({problem.file})" for problem in verify(open_store(path), tag).problems]


# ---------------------------------------------------------------------------------------- kept states


def disturb(engine: Any) -> None:
    """Give what no optimizer touches in an expert (frozen parameters, buffers) a value of this step.

    A function of (global name, step): replicas stay alike, and every version has its own value.
    """
    import torch

    names = oracle.global_names(engine.module)
    tensors = [*engine.module.named_parameters(), *engine.module.named_buffers()]
    with torch.no_grad():
        for name, tensor in tensors:
            if oracle.set_expert_of(names[name]) is not None and not tensor.requires_grad:
                tensor.fill_(0.5 + 0.01 * engine.global_steps + 0.0001 * (sum(map(ord, names[name])) % 97))


class Diary:
    """The oracle's states of all saves into one directory: a file per save, for every world and process.

    Args:
        ctx: the case's context.
        path: the checkpoint directory.
        beside: where the states are kept; shared by the cases of a test.
    """

    def __init__(self, ctx: Any, path: str, beside: str) -> None:
        self.ctx, self.path, self.beside = ctx, path, beside
        if ctx.rank == 0:
            Path(beside).mkdir(parents=True, exist_ok=True)

    def save(self, engine: Any, tag: str | None = None, **options: Any) -> dict[str, Any]:
        """Save, keep what the oracle sees; the manifest."""
        disturb(engine)
        if options.pop("full", False):
            assert engine.moc.save(self.path, tag, full=True) is True
        else:
            assert engine.save_checkpoint(self.path, tag=tag, **options) is True
        body = manifest(self.path, tag or f"global_step{engine.global_steps}")
        harness.keep(self.ctx, engine, self._file((body["attempt"], body["step"])))
        return body

    def note(self, engine: Any, attempt: int) -> None:
        """Keep what the oracle sees of the live state, for saves whose manifest is not there yet."""
        harness.keep(self.ctx, engine, self._file((attempt, engine.global_steps)))

    def _file(self, version: Version) -> str:
        return f"{self.beside}/{version[0]}-{version[1]}.pt"

    def wrong(self, engine: Any, tag: str | None = None, *, scalars: bool = True, cast: bool = False) -> list[str]:
        """How the engine differs from what the manifest promises, element by element; at most 12 lines.

        Every expert must be the kept state of the version that the manifest names for it; all else, hyperparameters,
        generators and counters included, the kept state of the checkpoint's own version.

        Args:
            engine: a restored engine.
            tag: the checkpoint.
            scalars: compare the optimizer's groups and the loss scaler too; False if their layout is another (ZeRO
                stage, precision).
            cast: the engine has another precision than the run that saved: weights are compared with the masters.
        """
        body = manifest(self.path, tag)
        newest = harness.kept(self._file((body["attempt"], body["step"])))
        prefixes = [layer["prefix"] for layer in body["moe_layers"]]
        old = {
            place: harness.kept(self._file(version))
            for place, version in versions(body).items()
            if version != (body["attempt"], body["step"])
        }

        def source(name: str) -> dict[str, Any]:
            found = oracle.set_expert_of(name)
            if found is None:
                return newest
            layer = next(i for i, prefix in enumerate(prefixes) if found[0].startswith(prefix + "."))
            return old.get((layer, found[1]), newest)

        out = []
        promised = {}
        for name, entry in newest["global"].items():
            then = source(name)["global"][name]
            # Steps and hyperparameters belong to the optimizer's groups, not to experts.
            promised[name] = {**then, "step": entry["step"], "hyper": entry["hyper"]}
        whole = oracle.global_state(engine, self.ctx)
        out += oracle.global_differences(promised if whole is not None else None, whole)
        out += self._local(engine, newest, source, scalars=scalars, cast=cast)
        if cast:
            out += oracle.weights_differ_from_masters(oracle.local_state(engine), promised)
        return out[:12]

    def _local(self, engine: Any, newest: dict[str, Any], source: Any, *, scalars: bool, cast: bool) -> list[str]:
        mine = oracle.local_state(engine)
        same = len(newest["locals"]) == self.ctx.world
        out = []
        for section in ("weights", "buffers"):
            for name, tensor in mine[section].items():
                if cast and section == "weights" and name not in mine["frozen"]:
                    continue
                ranks = source(name)["locals"]
                if same and len(ranks) == self.ctx.world and name in ranks[self.ctx.rank][section]:
                    ranks = [ranks[self.ctx.rank]]
                held = [rank[section][name] for rank in ranks if name in rank[section]]
                if not any(oracle.bits_equal(value.to(tensor.dtype) if cast else value, tensor) for value in held):
                    some = [value.flatten()[:3].tolist() for value in (tensor, held[0])]
                    out.append(f"{section} {name}: {some[0]}, not {some[1]}")
        theirs = newest["locals"][self.ctx.rank if same else 0]
        skip = ["weights", "buffers", "volatile"] + ([] if same else ["rng"])
        skip += [] if same and scalars else ["param_groups", "scaler"]
        return out + oracle.local_differences(theirs, mine, skip=tuple(skip))

    def load(self, engine: Any, tag: str | None = None, **options: Any) -> list[str]:
        """Load and compare."""
        where, _ = engine.load_checkpoint(self.path, tag=tag)
        assert where is not None, f"nothing to load: {sorted(map(str, Path(self.path).glob('*')))}"
        return self.wrong(engine, tag, **options)
