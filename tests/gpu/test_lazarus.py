"""LazarusMoE on a device: kernels, layer, grouped GEMM and what the host waits for; skipped where there is none."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lazarus_tools as tools  # noqa: E402

from moc_ckpt.lazarus.layer import LazarusMoE  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the kernels cannot be compiled here"),
]

DEVICE = "cuda"


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    """Single precision is single precision."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def expert(hidden: int, wide: int, bias: bool = True) -> Any:
    from torch import nn

    return nn.Sequential(nn.Linear(hidden, wide, bias=bias), nn.GELU(), nn.Linear(wide, hidden, bias=bias))


def single(k: int, *, hidden: int = 64, experts: int = 6, **kwargs: Any) -> LazarusMoE:
    """A layer of this process alone (a process group may exist)."""
    return LazarusMoE(hidden, lambda: expert(hidden, 96), experts, k=k, top2_2nd_expert_sampling=False, **kwargs)


@pytest.mark.parametrize(
    ("ranks", "experts", "k", "tokens", "hidden"),
    [
        (1, 1, 1, 1, 1),
        (1, 8, 2, 1000, 129),
        (2, 8, 1, 4097, 512),
        (2, 8, 2, 2048, 4096),
        (3, 5, 3, 777, 40),
        (8, 64, 6, 1500, 256),
        (16, 256, 8, 700, 72),
        (64, 128, 2, 300, 8),
        (64, 256, 2, 100, 8),  # too large for the plan's kernel
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_kernels_equal_torch(ranks: int, experts: int, k: int, tokens: int, hidden: int, dtype: Any) -> None:
    for seed in range(2):
        tools.compare(DEVICE, ranks, experts, k, tokens, hidden, seed, dtype)


def gradients(layer: LazarusMoE, tokens: Any, used: Any = None) -> list[Any]:
    """Outputs and all gradients, in single precision on the CPU."""
    mine = tokens.detach().clone().requires_grad_()
    output, loss, counts = layer(mine, used)
    wanted = (output.float().square().sum() + loss).to(torch.float32)
    grads = torch.autograd.grad(wanted, [mine, *layer.parameters()])
    return [value.detach().float().cpu() for value in (output, loss, counts, *grads)]


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("kernels", [True, False])
def test_layer_equals_the_cpu(k: int, kernels: bool) -> None:
    torch.manual_seed(0)
    layer = single(k)
    tokens = torch.randn(5, 61, 64)
    used = (torch.rand(305) < 0.8).float() if k == 1 else None
    wanted = gradients(layer, tokens, used)
    layer = layer.to(DEVICE)
    layer.deepspeed_moe.exchange.use_kernels = kernels
    got = gradients(layer, tokens.to(DEVICE), None if used is None else used.to(DEVICE))
    for one, two in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_grouped_gemm_equals_the_loop(packed: bool, bias: bool) -> None:
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no grouped GEMM kernel before compute capability 9.0")
    torch.manual_seed(0)
    layer = LazarusMoE(128, lambda: expert(128, 256, bias), 5).to(DEVICE, torch.bfloat16)
    experts = layer.deepspeed_moe.experts
    if packed:
        experts.pack()
    for counts in ([300, 0, 17, 1, 706], [0, 0, 0, 0, 5], [64] * 5):
        tokens = torch.randn(sum(counts), 128, device=DEVICE, dtype=torch.bfloat16)
        results = []
        for experts.compute in ("loop", "grouped", "grouped"):
            mine = tokens.clone().requires_grad_()
            out = experts(mine, counts, torch.tensor(counts, device=DEVICE))
            grads = torch.autograd.grad(out.float().square().mean(), [mine, *experts.parameters()])
            results.append([out, *grads])
        for one, two, again in zip(*results, strict=True):
            torch.testing.assert_close(one, two, rtol=3e-2, atol=3e-2 * float(one.abs().max()))
            assert torch.equal(two, again), "the same bits every time"


def test_the_host_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch raises where anything in forward or backward waits for the device, but for the event of the split sizes."""
    layer = single(2, hidden=128).to(DEVICE, torch.bfloat16)
    tokens = torch.randn(512, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)

    def step() -> None:
        output, loss, _ = layer(tokens)
        torch.autograd.backward([output, loss], [torch.ones_like(output), torch.ones_like(loss)])

    waits: list[int] = []
    real = torch.cuda.Event.synchronize
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda self: (waits.append(1), real(self))[1])
    for compute in ("loop", "grouped"):
        layer.deepspeed_moe.experts.compute = compute
        step()  # compiles, and makes buffers
        torch.cuda.synchronize()
        del waits[:]
        torch.cuda.set_sync_debug_mode("error")
        try:
            step()
            with pytest.raises(RuntimeError):  # the check itself is checked
                float(tokens.sum())
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert waits == [1], compute


def test_the_host_does_not_wait_for_packing() -> None:
    """The copy of split sizes has a stream of its own: what is queued behind the plan goes on meanwhile."""
    layer = single(1, hidden=128).to(DEVICE, torch.bfloat16)
    tokens = torch.randn(512, 128, device=DEVICE, dtype=torch.bfloat16)
    exchange = layer.deepspeed_moe.exchange
    layer(tokens)
    torch.cuda.synchronize()
    routes = exchange.begin(torch.zeros(512, 1, dtype=torch.int64, device=DEVICE))
    routes.plan()
    torch.cuda._sleep(10**9)  # what is queued after the plan
    queued = torch.cuda.Event()
    queued.record()
    assert sum(routes._sizes()[:1]) == 512
    assert not queued.query(), "the host waited for work that was queued after the plan"
    torch.cuda.synchronize()


def test_two_steps_have_the_same_bits() -> None:
    layer = single(2, hidden=128).to(DEVICE, torch.bfloat16)
    tokens = torch.randn(999, 128, device=DEVICE, dtype=torch.bfloat16)
    for one, two in zip(gradients(layer, tokens), gradients(layer, tokens), strict=True):
        assert torch.equal(one, two)
