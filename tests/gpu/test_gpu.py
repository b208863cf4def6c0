"""The GPU cases of run_gpu.py under pytest; skipped, with the reason, where there is no CUDA device."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

import run_gpu

pytestmark = pytest.mark.gpu


def _gpus() -> int:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: fp16 loss scaling, FusedAdam and NCCL cannot run here")
    return int(torch.cuda.device_count())


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """One launch for all cases."""
    out = tmp_path_factory.mktemp("gpu") / "out.json"
    status = run_gpu.launch(_gpus(), [], str(out))
    assert out.exists(), f"no case finished, exit status {status}"
    yield json.loads(out.read_text())


@pytest.mark.parametrize("name", list(run_gpu.cases(1)))
def test_exact_on_gpu(report: dict[str, Any], name: str) -> None:
    assert name in report["cases"], "the job ended before this case"
    case = report["cases"][name]
    assert case["wrong"] == {}
    if "fp16" in name and name.startswith((run_gpu.PREFIX, run_gpu.ASYNC_PREFIX, run_gpu.NATIVE_PREFIX)):
        assert case["skipped_before"] >= 1, "no overflow: the case does not show that it is not counted"
    elif "fp16" in name:
        assert case["skipped_before"] >= 1, "no overflow before the save: the case proves nothing"
        assert case["skipped"] > case["skipped_before"], "no overflow after the load"
