"""The sections `moc_checkpoint` (DESIGN section 12) and `lazarus` of a ds_config. Pure: neither torch nor deepspeed.

Every key that is listed here works; a key that does not exist is refused with the nearest known name.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from moc_ckpt.errors import ConfigError

__all__ = [
    "CONFIG_KEY",
    "LAZARUS_KEY",
    "HostConfig",
    "LazarusConfig",
    "MocConfig",
    "RecoveryConfig",
    "StorageConfig",
    "TimeoutsConfig",
    "find_config",
    "parse_config",
    "parse_lazarus",
]

CONFIG_KEY = "moc_checkpoint"
LAZARUS_KEY = "lazarus"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class StorageConfig(_Section):
    """How checkpoints lie in storage."""

    checksum: Literal["crc32c"] = Field("crc32c", description="checksum of every fragment and stored chunk")
    keep_last: int = Field(3, ge=0, description="newest checkpoints that retention keeps; 0 keeps all")
    keep_every: int = Field(0, ge=0, description="steps; checkpoints at its multiples are kept for ever; 0: none")


class HostConfig(_Section):
    """Snapshots in host memory, and the node agent that persists them."""

    memory_budget_gib: float | None = Field(
        None, gt=0, description="GiB of shared memory per rank at most; null: as much as the configuration needs"
    )
    keep_committed: bool = Field(
        False,
        description="keep in memory also the newest versions up to the last commit, which experts come back at where "
        "another node is lost: one more full copy of the state",
    )
    linger_s: float = Field(600.0, ge=0, description="s; the node agent lives on for so long after the last trainer")
    writer_threads: int = Field(2, ge=1, le=64, description="threads per rank that checksum and write a pack")
    on_busy: Literal["skip", "wait"] = Field(
        "skip",
        description="what an automatic snapshot or persist does while memory or storage is still busy with older ones; "
        "an explicit save always waits",
    )


class RecoveryConfig(_Section):
    """What `load_checkpoint` may do."""

    memory: bool = Field(
        True,
        description="a run that starts first brings to storage what the memory of the one before it still holds, and "
        "loads from there what it can",
    )
    require_resume: bool = Field(
        False, description="raise where nothing is saved, instead of returning (None, None) as DeepSpeed does"
    )
    trust_client_state: bool = Field(
        False,
        description="let client_state hold any picklable object; loading it then runs code from the checkpoint",
    )


class TimeoutsConfig(_Section):
    """Deadlines of waits, in seconds."""

    rendezvous_s: float = Field(120.0, gt=0, description="s; all ranks arrive at a save or a load within it")
    commit_s: float = Field(600.0, gt=0, description="s; all ranks have written (or read) their part within it")
    exit_s: float = Field(600.0, gt=0, description="s; at its end a process waits so long for saves in flight")


def _check_interval(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise ValueError('must be a number of steps, at least 0, or "auto"')


_Interval = Annotated[int | Literal["auto"], BeforeValidator(_check_interval)]


def _check_k(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError('must be a number of experts, at least 1, or "auto"')


_K = Annotated[int | Literal["auto"], BeforeValidator(_check_k)]


class MocConfig(_Section):
    """All keys of the `moc_checkpoint` section."""

    @property
    def asynchronous(self) -> bool:
        """Tells whether anything goes through host memory; otherwise saves block and need no arena and no agent."""
        return self.save_mode == "async" or bool(self.snapshot_interval) or bool(self.persist_interval)

    enabled: bool = Field(False, description="turns the plugin on; off, DeepSpeed behaves as without the package")
    selection: Literal["sequential", "load_aware", "full"] = Field(
        "sequential",
        description="which experts a save takes; sequential: every expert once per cycle of ceil(N / K) saves, in an "
        "order that balances the ranks; load_aware: those with the most unsaved tokens, everyone within two cycles; "
        "full: all",
    )
    k_snapshot: _K = Field(
        "auto",
        description="experts per MoE layer in a snapshot; auto: all until the copy was measured, then as many as hide "
        "behind the forward and backward pass. Saves that block (save_mode durable without automatic snapshots) take "
        "k_persist experts",
    )
    k_persist: _K = Field(
        "auto",
        description="experts per MoE layer that a checkpoint stores anew, at most k_snapshot; above a layer's N it "
        "means N there; auto: as many as a snapshot takes",
    )
    balance: Literal["fill", "none"] = Field(
        "fill",
        description="snapshots only (see k_snapshot); fill: add experts, the stalest first, where every owner has room "
        "below the most loaded rank",
    )
    snapshot_interval: _Interval = Field(
        0,
        description="steps between automatic snapshots into host memory, 1 for every step; 0: only when "
        "save_checkpoint is called; auto: the smallest that hides behind training",
    )
    persist_interval: _Interval = Field(
        0,
        description="steps between automatic checkpoints in save_dir; 0: only save_checkpoint; auto: as often as "
        "storage sustains, or with mtbf_s the interval that loses the least time",
    )
    save_dir: str | None = Field(
        None,
        min_length=1,
        description="path, file://, s3:// or gs:// of automatic checkpoints; save_checkpoint has its own",
    )
    save_mode: Literal["async", "durable"] = Field(
        "async",
        description="async: save_checkpoint returns once the copy is scheduled, an agent writes and commits it; "
        "durable: it returns after the commit, as DeepSpeed's does",
    )
    preempt_save: bool = Field(
        True,
        description="on SIGTERM to any rank all of them save every expert at the next step, to save_dir or else where "
        "the last save went, and end with status 143; false: SIGTERM is left alone",
    )
    mtbf_s: float | None = Field(
        None, gt=0, description="s; mean time between failures of the whole job, for intervals that are auto"
    )
    sharding: Literal["adaptive", "equal"] = Field(
        "adaptive",
        description="who writes state that several ranks hold alike; equal: each the same share; adaptive: the least "
        "loaded, given what ZeRO and the selection put there",
    )
    max_plt: float = Field(0.0375, gt=0, lt=1, description="proportion of lost tokens that Dynamic-K stays under")
    dynamic_k: bool = Field(True, description="double K after a recovery while the next fault would pass max_plt")
    plt_total_tokens: float | None = Field(
        None, gt=0, description="tokens of the whole training, which PLT is a proportion of; null: the tokens so far"
    )
    save_weights: Literal["derive", "sharded"] = Field(
        "derive",
        description="derive: 16-bit weights are cast from the masters on load (12 B per parameter); "
        "sharded: they are stored as well, split over their replicas, for readers that want weights only",
    )
    storage: StorageConfig = Field(default_factory=StorageConfig, description="see below")
    host: HostConfig = Field(default_factory=HostConfig, description="see below")
    recovery: RecoveryConfig = Field(default_factory=RecoveryConfig, description="see below")
    timeouts: TimeoutsConfig = Field(default_factory=TimeoutsConfig, description="see below")


class LazarusConfig(_Section):
    """Replicated experts, and when they move."""

    optimizer_state: Literal["replicated", "sharded"] = Field(
        "replicated",
        description="replicated: every holder has all optimizer state of an expert, which recovery needs; sharded: the "
        "holders share it out",
    )
    rebalance_interval: int = Field(
        0,
        ge=0,
        description="steps between two decisions about another placement, and the steps over which one has to pay; "
        "0: never",
    )
    fault_threshold: int = Field(
        1,
        ge=1,
        description="nodes that a plan puts every expert on at least, as for moc-ckpt placement; on a single node, "
        "ranks",
    )
    restart_s: float = Field(
        60.0,
        ge=0,
        allow_inf_nan=False,
        description="s; a restart takes so long, which a plan has to save; 0 if the run is going to restart anyway",
    )
    bandwidth_gb_s: float = Field(
        10.0,
        gt=0,
        allow_inf_nan=False,
        description="10^9 bytes per second that a node sends, and receives at the same time",
    )


_Model = TypeVar("_Model", bound=_Section)


def parse_config(section: Mapping[str, Any] | None) -> MocConfig:
    """Validates the section.

    Args:
        section: value of the key `moc_checkpoint` in a ds_config; None where the key is absent.

    Returns:
        The validated configuration; disabled where the key is absent.

    Raises:
        ConfigError: naming every wrong key or value, and the nearest known name of an unknown key.
    """
    if section is None:
        return MocConfig()
    config = _validate(MocConfig, section, CONFIG_KEY, example='{"enabled": true}')
    snapshot, persist = config.k_snapshot, config.k_persist
    if isinstance(snapshot, int) and isinstance(persist, int) and persist > snapshot:
        raise ConfigError(
            f"k_persist is {persist}, above k_snapshot {snapshot}: what is persisted is snapshotted first",
            where=f"ds_config, {CONFIG_KEY}.k_persist",
            fix=f"set k_persist to at most {snapshot}, or raise k_snapshot",
        )
    if config.persist_interval and config.save_dir is None:
        raise ConfigError(
            "persist_interval is set, but not where to save",
            where=f"ds_config, {CONFIG_KEY}.save_dir",
            fix="set save_dir to a directory that all nodes share, or persist_interval to 0",
        )
    if config.save_dir is not None and config.save_dir.startswith("memory://") and config.persist_interval:
        raise ConfigError(
            f"{config.save_dir} lives in one process, and the agent that saves automatically is another one",
            where=f"ds_config, {CONFIG_KEY}.save_dir",
            fix="use a directory or an object store",
        )
    return config


def find_config(settings: Mapping[str, Any]) -> MocConfig:
    """Returns the configuration in a ds_config.

    Args:
        settings: the whole ds_config.

    Raises:
        ConfigError: as `parse_config`, and for a top-level key that is almost the section's name.
    """
    if CONFIG_KEY not in settings:
        for key in settings:
            # Only what cannot be meant for anybody else: "checkpoint", for one, is DeepSpeed's own.
            plain = str(key).lower().replace("-", "_")
            alike = difflib.SequenceMatcher(None, plain, CONFIG_KEY).ratio() > 0.7
            if alike and plain.startswith("mo"):
                raise ConfigError(
                    f"unknown key {key!r}: nothing would be checkpointed by this package",
                    where=f"ds_config, key {key!r}",
                    fix=f"did you mean {CONFIG_KEY!r}?",
                )
    return parse_config(settings.get(CONFIG_KEY))


def parse_lazarus(settings: Mapping[str, Any]) -> LazarusConfig:
    """Returns the section `lazarus` of a ds_config; its defaults where it is absent.

    Args:
        settings: the whole ds_config.

    Raises:
        ConfigError: as `parse_config`.
    """
    section = settings.get(LAZARUS_KEY, {})
    return _validate(LazarusConfig, section, LAZARUS_KEY, example='{"optimizer_state": "replicated"}')


def _validate(model: type[_Model], section: Any, key: str, *, example: str) -> _Model:
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"{key} must be an object, got {type(section).__name__} {section!r}",
            where=f"ds_config, key {key!r}",
            fix=f'write "{key}": {example}',
        )
    try:
        return model.model_validate(dict(section))
    except ValidationError as error:
        raise _explain(error, model, key) from None


def _explain(error: ValidationError, model: type[BaseModel], key: str) -> ConfigError:
    problems, fixes, places = [], [], []
    for item in error.errors():
        path = [str(part) for part in item["loc"]]
        dotted = ".".join([key, *path])
        places.append(dotted)
        if item["type"] == "extra_forbidden":
            known = _known_keys(model, path[:-1])
            near = difflib.get_close_matches(path[-1], known, n=1, cutoff=0.5) or _anywhere(model, path[-1])
            problems.append(f"unknown key {dotted}")
            fixes.append(f"did you mean {near[0]!r}?" if near else f"known keys here: {', '.join(known)}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            problems.append(f"{dotted}: {message}, got {item['input']!r}")
            fixes.append(f"correct {dotted}")
    return ConfigError("; ".join(problems), where=f"ds_config, {', '.join(places)}", fix="; ".join(fixes))


def _known_keys(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation = model.model_fields[part].annotation
        assert isinstance(annotation, type) and issubclass(annotation, BaseModel)
        model = annotation
    return list(model.model_fields)


def _anywhere(model: type[BaseModel], name: str) -> list[str]:
    """Nearest known name in any section, dotted: a key is often right but in the wrong place."""
    dotted = {}
    for key, field in model.model_fields.items():
        dotted[key] = key
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            dotted.update({sub: f"{key}.{sub}" for sub in field.annotation.model_fields})
    return [dotted[near] for near in difflib.get_close_matches(name, dotted, n=1, cutoff=0.5)]
