"""Imports a checkout as on CUDA, with stand-ins for apex, where there is neither; prints what it got.

python as_on_cuda.py CHECKOUT
"""

import argparse
import sys
from pathlib import Path
from unittest import mock

import torch
from deepspeed.accelerator import get_accelerator

from moc_ckpt.integrations.megatron_deepspeed import launcher, stand_ins
from moc_ckpt.integrations.megatron_deepspeed.checkout import Checkout

root = Path(sys.argv[1])
sys.path.insert(0, str(root))
type(get_accelerator()).device_name = lambda self, index=None: "cuda"
on = {each.concern.name for each in launcher.install(Checkout(root), ()) if each.status == "on"}
assert {"apex", "fused-kernels", "masked-softmax-fusion"} <= on, on
assert not {"device-count", "scripted-fusion"} & on, on

import megatron.fused_kernels  # noqa: E402
import megatron.model  # noqa: E402
import megatron.optimizer.clip_grads  # noqa: E402
import megatron.optimizer.distrib_optimizer  # noqa: E402
import megatron.training  # noqa: E402
import megatron.utils  # noqa: E402
from megatron.global_vars import set_args  # noqa: E402

assert megatron.optimizer.Adam is stand_ins.FusedAdam
assert megatron.model.RMSNorm is stand_ins.FusedRMSNorm
assert megatron.utils.multi_tensor_applier is stand_ins.multi_tensor_applier
megatron.fused_kernels.load(argparse.Namespace(masked_softmax_fusion=False, rank=0))

set_args(argparse.Namespace(params_dtype=torch.float32))
layer = megatron.model.LayerNorm(16)
values = torch.randn(3, 16)
with mock.patch.object(torch.Tensor, "is_cuda", True):  # else it takes a path for tests
    got = layer(values)
assert torch.equal(got, torch.nn.functional.layer_norm(values, [16], layer.weight, layer.bias, layer.eps))
print("as on CUDA: ok")
