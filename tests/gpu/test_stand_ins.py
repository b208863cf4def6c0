"""What stands in for apex, on a device: the same comparisons with plain PyTorch as in the unit tests."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")

from unit.test_stand_ins import (  # noqa: E402, F401
    test_fused_adam,
    test_fused_sgd,
    test_l2norm,
    test_layer_norm_and_its_gradients,
    test_rms_norm,
    test_scale,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device to compare the stand-ins on"),
]


@pytest.fixture
def device() -> str:
    torch.manual_seed(3)
    return "cuda"
