"""Native DeepSpeed checkpoints: DeepSpeed alone goes on from an export, and we from DeepSpeed's own, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from distributed import harness, oracle, zoo
from distributed._worker import seed_everything
from distributed.harness import ON
from distributed.pool import Pool
from distributed.zoo import Layer

pytestmark = pytest.mark.distributed

STEPS = 4


def uniform(ep: int) -> tuple[Layer, ...]:
    """Three MoE layers of one expert-parallel size."""
    return (Layer(ep=ep), Layer(experts=8, ep=ep, k=2), Layer(ep=ep, residual=True))


def row_of(base: str = "z2_bf16", ep: int = 2, **more: Any) -> zoo.Row:
    """A zoo row that DeepSpeed itself can restore: one expert-parallel size, and buffers alike on all ranks."""
    return zoo.ROWS[base].with_model(layers=uniform(ep), rank_buffers=False, **more)


def verb(*arguments: str) -> dict[str, Any]:
    """Run `moc-ckpt` here, without a process group; what it printed as JSON."""
    from moc_ckpt.cli.main import app

    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def case_save(ctx: Any, row: zoo.Row, path: str, plugin: dict[str, Any] | None, ref: str | None = None) -> None:
    engine = harness.build(row, world=ctx.world, seed=1, plugin=plugin)
    harness.train(engine, 5)
    if ref is not None:
        harness.keep(ctx, engine, ref)
    engine.save_checkpoint(path, tag="t", client_state={"epoch": 3})


def case_resume(
    ctx: Any, row: zoo.Row, path: str, plugin: dict[str, Any] | None, ref: str, compare: bool
) -> dict[str, Any]:
    """Load into an engine that has trained something else, and go on; compared with what an earlier case kept."""
    engine = harness.build(row, world=ctx.world, seed=2, plugin=plugin)
    assert (getattr(engine, "moc", None) is None) == (plugin is None)
    harness.train(engine, 2, data_seed=99)
    _, client = engine.load_checkpoint(path)
    wrong: list[str] = []
    if compare:
        wrong = harness.differences_from_kept(ctx, engine, ref, skip=("rng", "counters"))
    else:
        harness.keep(ctx, engine, ref)
    # DeepSpeed keeps no generators.
    seed_everything(500 + ctx.rank)
    return {
        "wrong": wrong,
        "epoch": client["epoch"],
        "steps": (engine.global_steps, engine.global_samples, engine.skipped_steps),
        "losses": harness.train(engine, STEPS),
    }


def same_resume(pool: Pool, row: zoo.Row, world: int, ours: str, native: str, ref: str) -> None:
    """Both directories, each with the software that wrote its format, must lead to the same run."""
    mine = pool.run(world, case_resume, row=row, path=ours, plugin=ON, ref=ref, compare=False)
    theirs = pool.run(world, case_resume, row=row, path=native, plugin=None, ref=ref, compare=True)
    for rank, (one, other) in enumerate(zip(mine, theirs, strict=True)):
        assert other["wrong"] == [], f"rank {rank}"
        assert one == other, f"rank {rank}"
        assert one["epoch"] == 3 and len(one["losses"]) >= STEPS


SOURCE = (4, 2)


@pytest.fixture(scope="module")
def source(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One checkpoint of world 4, EP 2, ZeRO-2, bf16."""
    path = str(tmp_path_factory.mktemp("native") / "ours")
    pool.run(SOURCE[0], case_save, row=row_of(ep=SOURCE[1]), path=path, plugin=ON)
    return path


@pytest.mark.parametrize(("world", "ep"), [(4, 2), (4, 4), (2, 2), (2, 1), (1, 1)])
def test_deepspeed_alone_goes_on_at_any_world(pool: Pool, source: str, ckpt_dir: str, world: int, ep: int) -> None:
    native = f"{ckpt_dir}/native"
    asked = [] if (world, ep) == SOURCE else ["--world", str(world), "--ep", str(ep)]
    done = verb("export", source, native, "--to", "deepspeed", *asked)
    assert (done["world"], done["expert_parallel"], done["older_experts"], done["rank_buffers"]) == (world, ep, 0, 0)
    assert sorted(item.name for item in Path(ckpt_dir).iterdir()) == ["native"]
    assert done["files"] == len(list(Path(native, "t").iterdir())) == 4 + 8 + 4 + 1 + world
    same_resume(pool, row_of(ep=ep), world, source, native, f"{ckpt_dir}/ref.pt")


ROWS = {
    "z1_bf16": row_of("z1_bf16"),
    "z2_fp32": row_of("z2_fp32"),
    "z1_fp32": row_of("z1_fp32"),
    "z2_fp16": row_of("z2_fp16"),
    "round_robin": row_of("z2_bf16_round_robin"),
    "aligned": row_of("z2_bf16_aligned"),
    "data_first": row_of("z2_bf16_data_first"),
    "client_adamw": row_of("z2_bf16_client_adamw"),
    "z1_fp16": row_of("z2_fp16", stage=1),
    "adam": row_of("z2_bf16_client_adamw", optimizer="client_adam"),
    "amsgrad": row_of("z1_fp32_amsgrad"),
    "sgd": row_of("z2_bf16_sgd"),
    "plain_sgd": row_of("z2_bf16_sgd", optimizer="client_plain_sgd"),
    "cpu_adam": row_of("z2_bf16_cpu_adam"),
    "z1_cpu_adam": row_of("z2_bf16_cpu_adam", stage=1),
    "fp16_cpu_adam": row_of("z2_bf16_cpu_adam", dtype="fp16", poison=(2, 8)),
    "fused": row_of(optimizer="fused"),
}


@pytest.mark.parametrize("name", ROWS)
def test_deepspeed_alone_goes_on_from_each_kind(pool: Pool, ckpt_dir: str, name: str) -> None:
    ours, native, ref = (f"{ckpt_dir}/{what}" for what in ("ours", "native", "ref.pt"))
    pool.run(4, case_save, row=ROWS[name], path=ours, plugin=ON)
    verb("export", ours, native, "--to", "deepspeed")
    same_resume(pool, ROWS[name], 4, ours, native, ref)
    if name in ("round_robin", "aligned", "data_first", "amsgrad", "sgd", "plain_sgd", "cpu_adam"):
        verb("export", ours, f"{native}2", "--to", "deepspeed", "--world", "2", "--ep", "1")
        same_resume(pool, ROWS[name].with_model(layers=uniform(1)), 2, ours, f"{native}2", ref)


def case_save_partly(ctx: Any, row: zoo.Row, path: str, mode: str) -> None:
    """Three saves of one expert per layer each, beside the first full one."""
    plugin = {**ON, "selection": "sequential", "k_persist": 1, "k_snapshot": 1, "save_mode": mode}
    engine = harness.build(row, world=ctx.world, seed=1, plugin=plugin)
    for number in range(3):
        harness.train(engine, 1)
        engine.save_checkpoint(path, tag=f"t{number}", client_state={"epoch": 3})
        engine.moc.wait()


@pytest.mark.parametrize("mode", ["durable", "async"])
def test_older_experts_are_exported_as_they_are_and_told(pool: Pool, ckpt_dir: str, mode: str) -> None:
    """And parameters that are frozen outside experts, which DeepSpeed writes twice."""
    row = row_of(freeze=("odd", "blocks.0.norm"), frozen=False)
    ours, native = f"{ckpt_dir}/ours", f"{ckpt_dir}/native"
    pool.run(4, case_save_partly, row=row, path=ours, mode=mode)
    assert verb("export", ours, native, "--to", "deepspeed")["older_experts"] == 16 - 3
    same_resume(pool, row, 4, ours, native, f"{ckpt_dir}/ref.pt")


def refusal(*arguments: str) -> tuple[int, str]:
    """The exit status and the text of a `moc-ckpt` that refuses."""
    from moc_ckpt.cli.main import app

    result = CliRunner().invoke(app, list(arguments))
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (zoo.ROWS["z2_bf16"], "several expert-parallel sizes (1, 2, 4)"),
        (row_of("z0_bf16"), "ZeRO stage 0"),
        (row_of("z1_bf16_fp32acc"), "BF16_Optimizer"),
    ],
    ids=["mixed", "stage0", "bf16_optimizer"],
)
def test_what_cannot_be_exported_is_refused_by_name(pool: Pool, ckpt_dir: str, row: zoo.Row, words: str) -> None:
    pool.run(4, case_save, row=row, path=f"{ckpt_dir}/ours", plugin=ON)
    status, text = refusal("export", f"{ckpt_dir}/ours", f"{ckpt_dir}/native", "--to", "deepspeed")
    assert status == 2 and words in text and "what to do" in text
    assert [item.name for item in Path(ckpt_dir).iterdir()] == ["ours"]


def test_wrong_use_of_an_export(source: str, ckpt_dir: str) -> None:
    out = f"{ckpt_dir}/native"
    for options, words in (
        (["--world", "6", "--ep", "4"], "expert-parallel size 4 does not divide 6 ranks"),
        (["--world", "3", "--ep", "3"], "does not divide the 4 experts of blocks.0.moe"),
        (["--world", "0"], "--world 0 is no number of ranks"),
        (["--dtype", "bf16"], "--dtype and --shard-size are for --to safetensors"),
    ):
        status, text = refusal("export", source, out, "--to", "deepspeed", *options)
        assert status == 2 and words in text, text
    assert refusal("export", source, out, "--to", "moc", "--ep", "2")[0] == 2
    assert list(Path(ckpt_dir).iterdir()) == []
    Path(out).mkdir()
    Path(out, "mine").touch()
    status, text = refusal("export", source, out, "--to", "deepspeed")
    assert status == 2 and "not empty" in text
    assert [item.name for item in Path(ckpt_dir).rglob("*")] == ["native", "mine"]


def test_damage_leaves_nothing_behind(source: str, ckpt_dir: str) -> None:
    import shutil

    ours = Path(ckpt_dir, "ours")
    shutil.copytree(source, ours)
    pack = next(item for item in sorted(ours.rglob("rank_00002.experts/c/*")) if item.is_file())
    data = bytearray(pack.read_bytes())
    data[100] ^= 1
    pack.write_bytes(data)
    status, text = refusal("export", str(ours), f"{ckpt_dir}/native", "--to", "deepspeed")
    assert status == 1 and "rank_00002.experts" in text
    assert [item.name for item in Path(ckpt_dir).iterdir()] == ["ours"]


# From stage 2 on DeepSpeed gives all ranks rank 0's frozen experts, so only stage 1 has some here.
IMPORTS = {
    "z2_bf16": row_of(frozen=False, freeze=("odd", "blocks.0.norm")),
    "z1_bf16": row_of("z1_bf16"),
    "z2_fp32": row_of("z2_fp32", frozen=False),
    "z2_fp16": row_of("z2_fp16", frozen=False),
    "round_robin": row_of("z2_bf16_round_robin", frozen=False),
    "aligned": row_of("z2_bf16_aligned", frozen=False),
    "data_first": row_of("z2_bf16_data_first", frozen=False),
    "z1_fp16": row_of("z2_fp16", stage=1),
    "adam": row_of("z2_bf16_client_adamw", optimizer="client_adam", frozen=False),
    "amsgrad": row_of("z1_fp32_amsgrad"),
    "sgd": row_of("z2_bf16_sgd", frozen=False),
    "plain_sgd": row_of("z2_bf16_sgd", optimizer="client_plain_sgd", frozen=False),
    "cpu_adam": row_of("z2_bf16_cpu_adam", frozen=False),
    "z1_cpu_adam": row_of("z2_bf16_cpu_adam", stage=1),
    "fused": row_of(optimizer="fused", frozen=False),
}


@pytest.mark.parametrize("name", IMPORTS)
def test_we_go_on_from_deepspeeds_own(pool: Pool, ckpt_dir: str, name: str) -> None:
    """As DeepSpeed does in the same world; and in another as DeepSpeed does from an export of the import."""
    native, ours, again, ref = (f"{ckpt_dir}/{what}" for what in ("native", "ours", "again", "ref.pt"))
    row = IMPORTS[name]
    pool.run(4, case_save, row=row, path=native, plugin=None)
    done = verb("import", native, ours)
    assert (done["tag"], done["world"], done["expert_parallel"], done["experts"]) == ("t", 4, 2, 16)
    assert done["underived"] == 0 and sorted(item.name for item in Path(ckpt_dir).iterdir()) == ["native", "ours"]
    verb("verify", ours)
    same_resume(pool, row, 4, ours, native, ref)
    verb("export", ours, again, "--to", "deepspeed", "--world", "2", "--ep", "1")
    same_resume(pool, row.with_model(layers=uniform(1)), 2, ours, again, ref)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (zoo.ROWS["z2_bf16"].with_model(rank_buffers=False), "do not have one expert-parallel size (1, 2, 4)"),
        (row_of("z0_bf16"), "no optimizer state of ZeRO stage 1 or 2"),
        (row_of("z0_fp32"), "no optimizer state of ZeRO stage 1 or 2"),
        (row_of("z1_bf16_fp32acc"), "not that of ZeRO stage 1 or 2"),
    ],
    ids=["mixed", "stage0_bf16", "stage0_fp32", "bf16_optimizer"],
)
def test_what_another_kind_of_run_saved_cannot_be_imported(pool: Pool, ckpt_dir: str, row: zoo.Row, words: str) -> None:
    pool.run(4, case_save, row=row, path=f"{ckpt_dir}/native", plugin=None)
    status, text = refusal("import", f"{ckpt_dir}/native", f"{ckpt_dir}/ours")
    assert status == 2 and words in text and "what to do" in text, text
    assert [item.name for item in Path(ckpt_dir).iterdir()] == ["native"]


@pytest.fixture(scope="module")
def deepspeeds(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> str:
    """One checkpoint of DeepSpeed's own: world 4, EP 2, ZeRO-2, bf16."""
    path = str(tmp_path_factory.mktemp("deepspeeds") / "native")
    pool.run(4, case_save, row=row_of(), path=path, plugin=None)
    return path


@pytest.fixture
def native(deepspeeds: str, tmp_path: Path) -> Path:
    """A copy of it to be spoilt, in a directory of its own."""
    import shutil

    return Path(shutil.copytree(deepspeeds, tmp_path / "native"))


def change(path: Path, edit: Any) -> None:
    """Rewrite one of DeepSpeed's files."""
    import torch

    data = torch.load(path, weights_only=False)
    edit(data)
    torch.save(data, path)


MODEL = "mp_rank_00_model_states.pt"


class ByName:
    """Pickled as Python 3.11.0 to 3.11.3 pickle the member of an enum: by getattr."""

    def __init__(self, owner: Any, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


def test_members_of_enums_are_read_from_every_python(native: Path, tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import ZeroStageEnum

    for path in (native / "t").glob("*optim_states.pt"):
        member = ByName(ZeroStageEnum, "gradients")
        change(path, lambda data, member=member: data["optimizer_state_dict"].update(zero_stage=member))
    verb("import", str(native), str(tmp_path / "ours"))
    verb("verify", str(tmp_path / "ours"))
    change(path, lambda data: data["optimizer_state_dict"].update(zero_stage=ByName(ZeroStageEnum, "mro")))
    status, text = refusal("import", str(native), str(tmp_path / "other"))
    assert status == 2 and "needs unpickling of builtins.getattr" in text


def test_objects_need_trust(native: Path, tmp_path: Path) -> None:
    from fractions import Fraction

    change(native / "t" / MODEL, lambda data: data.update(third=Fraction(1, 3)))
    status, text = refusal("import", str(native), str(tmp_path / "ours"))
    assert status == 2 and "fractions.Fraction" in text and "--trust" in text
    verb("import", str(native), str(tmp_path / "ours"), "--trust")
    status, text = refusal("export", str(tmp_path / "ours"), str(tmp_path / "again"), "--to", "deepspeed")
    assert status == 2 and "fractions.Fraction" in text and "--trust" in text
    assert sorted(item.name for item in tmp_path.iterdir()) == ["native", "ours"]
    verb("export", str(tmp_path / "ours"), str(tmp_path / "again"), "--to", "deepspeed", "--trust")
    found: list[Any] = []
    change(tmp_path / "again" / "t" / MODEL, lambda data: found.append(data["third"]))
    assert found == [Fraction(1, 3)]


def test_weights_that_are_no_casts_are_kept(native: Path, tmp_path: Path) -> None:
    import torch

    change(native / "t" / MODEL, lambda data: data["module"]["head.bias"].add_(1))
    name = "blocks.1.moe.deepspeed_moe.experts.deepspeed_experts.5.up.bias"
    change(native / "t" / "layer_1_expert_5_mp_rank_00_model_states.pt", lambda data: data[name].add_(1))
    assert verb("import", str(native), str(tmp_path / "ours"))["underived"] == 2
    verb("verify", str(tmp_path / "ours"))
    verb("export", str(tmp_path / "ours"), str(tmp_path / "again"), "--to", "deepspeed")
    for file in sorted(item.name for item in (native / "t").glob("*model_states.pt")):
        one, other = (torch.load(top / "t" / file, weights_only=False) for top in (native, tmp_path / "again"))
        one, other = one.get("module", one), other.get("module", other)
        assert one.keys() == other.keys()
        assert [name for name in one if not oracle.bits_equal(one[name], other[name])] == []


@pytest.mark.parametrize(
    ("spoil", "status", "words"),
    [
        ("optimizer", 2, "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"),
        ("expert", 2, "experts in its MoE layers, there are files of"),
        ("truncated", 1, "cannot be read"),
        ("mixed", 1, "not of one checkpoint"),
        ("keys", 1, "do not fit together"),
        ("stage3", 2, "ZeRO stage 3"),
        ("tensor_parallel", 2, "tensor-parallel ranks"),
        ("auto_ep", 2, "AutoEP"),
        ("elastic", 2, "elastic_checkpoint"),
        ("unstepped", 2, "before the first step"),
        ("ours", 2, "a checkpoint of moc_ckpt already"),
        ("latest", 2, "no file `latest`"),
        ("tag", 2, "there is no checkpoint 'other'"),
    ],
)
def test_what_cannot_be_imported_is_refused_by_name(
    native: Path, tmp_path: Path, spoil: str, status: int, words: str
) -> None:
    tag = native / "t"
    file = tag / "bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt"
    options = ["--tag", "other"] if spoil == "tag" else []
    if spoil == "optimizer":
        file.unlink()
    elif spoil == "expert":
        (tag / "layer_1_expert_5_mp_rank_00_model_states.pt").unlink()
    elif spoil == "truncated":
        file.write_bytes(file.read_bytes()[:2000])
    elif spoil == "mixed":
        change(file, lambda data: data["optimizer_state_dict"]["group_paddings"].__setitem__(0, 7))
    elif spoil == "keys":
        change(tag / MODEL, lambda data: data["module"].pop("head.bias"))
    elif spoil == "stage3":
        (tag / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    elif spoil == "tensor_parallel":
        (tag / "mp_rank_01_model_states.pt").touch()
    elif spoil == "auto_ep":
        change(tag / MODEL, lambda data: data.update(ds_autoep_layers=[{"layer": 0}]))
    elif spoil == "elastic":
        change(file, lambda data: data["optimizer_state_dict"].update(base_optimizer_state=[]))
    elif spoil == "unstepped":
        change(file, lambda data: data["optimizer_state_dict"]["base_optimizer_state"]["state"].clear())
    elif spoil == "ours":
        (tag / "manifest.json").touch()
    elif spoil == "latest":
        (native / "latest").unlink()
    found, text = refusal("import", str(native), str(tmp_path / "ours"), *options)
    assert found == status and words in text, text
    assert [item.name for item in tmp_path.iterdir()] == ["native"]


def test_the_plugin_says_how_to_load_deepspeeds_own(deepspeeds: str) -> None:
    status, text = refusal("inspect", deepspeeds, "t")
    assert status == 2 and "moc-ckpt import" in text


@pytest.mark.parametrize("changes", [{}, {"optimizer": "client_adagrad", "groups": 1}], ids=["adamw", "adagrad"])
def test_a_model_without_experts_goes_both_ways(pool: Pool, ckpt_dir: str, changes: dict[str, Any]) -> None:
    """With Adagrad too, which DeepSpeed can do with one param group only."""
    row = zoo.ROWS["z2_bf16"].with_model(layers=(), rank_buffers=False, **changes)
    native, ours, again, ref = (f"{ckpt_dir}/{what}" for what in ("native", "ours", "again", "ref.pt"))
    pool.run(2, case_save, row=row, path=native, plugin=None)
    assert verb("import", native, ours)["experts"] == 0
    same_resume(pool, row, 2, ours, native, ref)
    assert verb("export", ours, again, "--to", "deepspeed", "--world", "4")["expert_parallel"] == 1
    same_resume(pool, row, 4, ours, again, ref)
