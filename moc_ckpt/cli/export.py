"""`moc-ckpt export`: one checkpoint as a directory of its own, or for other programs: DeepSpeed's files, or weights."""

from __future__ import annotations

from enum import Enum
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from moc_ckpt.cli.common import (
    AsJson,
    Directory,
    bytes_progress,
    choose_tag,
    integration,
    print_json,
    size,
    stdout,
    what_went_wrong,
)
from moc_ckpt.errors import ConfigError
from moc_ckpt.storage.export import Exported, export_checkpoint
from moc_ckpt.storage.store import open_store
from moc_ckpt.storage.weights import ExportedWeights, export_weights, parse_dtype, parse_size

__all__ = ["Target", "export"]

_SHARD_SIZE = "5GB"
_SHOWN_FILES = 8


class Target(str, Enum):
    """What can be written."""

    MOC = "moc"
    SAFETENSORS = "safetensors"
    DEEPSPEED = "deepspeed"


def export(
    directory: Directory,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Directory to write: a new or an empty one.")],
    to: Annotated[
        Target,
        typer.Option(
            "--to",
            help="moc: a checkpoint that needs no older one; safetensors: the weights, as whole tensors; "
            "deepspeed: what DeepSpeed's own load_checkpoint reads (ZeRO stage 1 or 2).",
        ),
    ],
    tag: Annotated[
        str | None, typer.Option("--tag", help="Checkpoint; without it the one that `latest` names.")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="NAME", help="safetensors: cast to it; without it the run's precision."),
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option("--shard-size", metavar="SIZE", help=f"safetensors: bytes in one file at most [{_SHARD_SIZE}]."),
    ] = None,
    world: Annotated[
        int | None,
        typer.Option("--world", metavar="N", help="deepspeed: ranks that will load it; without it as many as saved."),
    ] = None,
    ep: Annotated[
        int | None,
        typer.Option("--ep", metavar="N", help="deepspeed: their expert-parallel size; without it as saved."),
    ] = None,
    trust: Annotated[
        bool,
        typer.Option("--trust", help="deepspeed: unpickle client_state even if that may run code from the checkpoint."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write one checkpoint elsewhere: whole, without the older tags that it refers to, as DeepSpeed's, or its weights.

    Everything that is read is compared with its checksum. What is written becomes visible at the end.
    """
    with what_went_wrong(as_json):
        if to is not Target.SAFETENSORS and (dtype is not None or shard_size is not None):
            raise ConfigError("--dtype and --shard-size are for --to safetensors", fix="leave them out")
        if to is not Target.DEEPSPEED and (world is not None or ep is not None or trust):
            raise ConfigError("--world, --ep and --trust are for --to deepspeed", fix="leave them out")
        full = parse_dtype(dtype) if dtype is not None else None
        shard_bytes = parse_size(shard_size or _SHARD_SIZE)
        store = open_store(directory)
        tag = choose_tag(store, tag)
        done: Any
        with bytes_progress("exporting") as advance:
            if to is Target.MOC:
                done = export_checkpoint(store, tag, out, advance)
            elif to is Target.DEEPSPEED:
                native = integration("deepspeed.native_export")
                done = native.export_native(
                    store, tag, out, world=world, expert_parallel=ep, trust=trust, progress=advance
                )
            else:
                done = export_weights(store, tag, out, dtype=full, shard_bytes=shard_bytes, progress=advance)
    if isinstance(done, Exported):
        _show_checkpoint(done, as_json)
    elif to is Target.DEEPSPEED:
        _show_native(done, as_json)
    else:
        _show_weights(done, as_json)


def _show_checkpoint(done: Exported, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "to": Target.MOC.value,
                "directory": done.url,
                "tag": done.tag,
                "step": done.step,
                "packs": done.packs,
                "bytes": done.nbytes,
                "stored_bytes": done.stored_bytes,
                "older_tags": list(done.older_tags),
            }
        )
        return
    table = _table()
    table.add_row("checkpoint", Text(f"{done.tag} (step {done.step:,}) in {done.url}"))
    table.add_row("files", f"{size(done.stored_bytes)} in {done.packs} packs and the extra files")
    if done.older_tags:
        table.add_row("taken from", Text(f"{done.tag}, and older tags: {', '.join(done.older_tags)}"))
    stdout().print(table)


def _show_weights(done: ExportedWeights, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "to": Target.SAFETENSORS.value,
                "directory": str(done.path),
                "tag": done.tag,
                "step": done.step,
                "dtype": done.dtype,
                "tensors": done.tensors,
                "bytes": done.nbytes,
                "files": [{"name": name, "bytes": nbytes} for name, nbytes in done.files],
                "older_experts": done.older_experts,
                "overflowed": list(done.overflowed),
            }
        )
        return
    table = _table()
    table.add_row("weights", Text(f"of {done.tag} (step {done.step:,}) in {done.path}"))
    table.add_row("tensors", f"{done.tensors:,}, {size(done.nbytes)}, {done.dtype}")
    names = [name for name, _ in done.files[:_SHOWN_FILES]]
    table.add_row(
        "files", Text(", ".join(names) + (f", … ({len(done.files)})" if len(done.files) > len(names) else ""))
    )
    if done.older_experts:
        table.add_row("experts", f"{done.older_experts:,} from older steps, as the checkpoint has them")
    if done.overflowed:
        shown = ", ".join(done.overflowed[:4]) + (", …" if len(done.overflowed) > 4 else "")
        told = (
            f"{len(done.overflowed)} tensors have values that {done.dtype} cannot hold: {shown}; try --dtype bfloat16"
        )
        table.add_row("warning", Text(told, style="bold yellow"))
    stdout().print(table)


def _show_native(done: Any, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "to": Target.DEEPSPEED.value,
                "directory": str(done.path),
                "tag": done.tag,
                "step": done.step,
                "world": done.world,
                "expert_parallel": done.expert_parallel,
                "zero_stage": done.zero_stage,
                "files": done.files,
                "bytes": done.nbytes,
                "older_experts": done.older_experts,
                "rank_buffers": done.rank_buffers,
            }
        )
        return
    table = _table()
    table.add_row("checkpoint", Text(f"{done.tag} (step {done.step:,}) in {done.path}"))
    table.add_row("for", f"{done.world} ranks, EP {done.expert_parallel}, ZeRO-{done.zero_stage}")
    table.add_row("files", f"{done.files:,}, {size(done.nbytes)}")
    if done.older_experts:
        told = (
            f"{done.older_experts:,} experts are from older steps, as the checkpoint has them: DeepSpeed goes on from "
            "them without a word"
        )
        table.add_row("warning", Text(told, style="bold yellow"))
    if done.rank_buffers:
        told = (
            f"{done.rank_buffers:,} buffers differed between ranks; DeepSpeed's files hold one value of each, that of "
            "the first rank"
        )
        table.add_row("warning", Text(told, style="bold yellow"))
    stdout().print(table)


def _table() -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    return table
