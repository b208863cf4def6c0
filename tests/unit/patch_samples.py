"""A source tree with the structure that the patches of Megatron-DeepSpeed go by, in many styles; it does not run."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

# Functions are lists of pieces that may change places; a tab is one level of indentation.
_TRAINING = [
    """
def _create_ds_config_dict():
\targs = get_args()
\treturn read(args.deepspeed_config)
""",
    """
def pretrain(provider, data_post_process=None):
\tmodel, optimizer, scheduler = setup_model_and_optimizer(provider)
\tif get_args().compression_training:
\t\t# once more
\t\tmodel = [redundancy_clean(model[0])]
\treturn model
""",
    """
{decorator}def setup_model_and_optimizer(provider, {extra}teacher=False):
\t'''Sets up.'''
\tmodel = provider()
\tif get_args().compression_training:
\t\tmodel = [init_compression(model[0], {{}})]
\treturn model, None, None
""",
    """
{decorator}def train_step(forward_step_func, data_iterator, {extra}model=None):
\treturn forward_step_func(data_iterator, model)
""",
    """
def train(forward_step_func, model, optimizer, {extra}schedule=None):
\tfor _ in range(10):
\t\ttrain_step(forward_step_func, None, model=model)
\treturn 10
""",
    """
def evaluate(model):
\tif model is None: return None
\telif get_args().vision_pretraining:
\t\tcompute_feature_bank(model)
\telse:
\t\tpass
""",
    """
def build_train_valid_test_data_iterators(
\t\tprovider, {extra}more=()):
\treturn iter(provider()), None, None
""",
]

_ARGUMENTS = [
    """
def parse_args(extra_args_provider=None, ignore_unknown_args=False):
\tparser = argparse.ArgumentParser()
\tparser = _add_args(parser)

\t# Parse.
\tif ignore_unknown_args:
\t\targs, _ = parser.parse_known_args()
\telse:
\t\targs = parser.parse_args()
\treturn args
""",
    """
def _add_args(parser):
\tgroup = parser.add_argument_group(title='all')
\tgroup.add_argument('--no-masked-softmax-fusion', action='store_false',
\t\t\t\t\t   dest='masked_softmax_fusion')
\tgroup.add_argument('--no-gradient-accumulation-fusion', action='store_false', dest='gradient_accumulation_fusion')
\tgroup.add_argument('--no-bias-gelu-fusion', dest='bias_gelu_fusion', action='store_false')
\tgroup.add_argument('--kill-switch-file', type=str, default=None)
\treturn parser
""",
]

_CHECKPOINTING = [
    """
def _universal_checkpoint_info(model):
\treturn dict(model[0].universal_checkpoint_info())
""",
    """
{decorator}def save_checkpoint(iteration, model, optimizer, {extra}scheduler=None):
\targs = get_args()
\tstate_dict = {{}}
\tstate_dict['args'] = args
\tstate_dict["checkpoint_version"] = 3.0
\tstate_dict['iteration'] = iteration
\tstate_dict['tokens'] = args.consumed_train_tokens
\tstate_dict[INFO] = _universal_checkpoint_info(model)
\tif args.deepspeed:
\t\tmodel[0].save_checkpoint(args.save,
\t\t\t\t\t\t\t\t client_state=state_dict)
\tbarrier()
""",
    """
def load_checkpoint(model, optimizer, {extra}load_arg='load'):
\targs = get_args()
\t_, state = model[0].load_checkpoint(args.load)
\tif not args.no_load_rng:
\t\tset_rng(state)
\treturn state['iteration']
""",
]

_INITIALIZE = [
    """
def _initialize_distributed():
\targs = get_args()
\tdevice_count = get_accelerator().device_count()
\tif device_count > 0:
\t\tassert args.local_rank == args.rank % device_count
""",
    """
def _other():
\tdevice_count = 5
""",
]

_SAMPLERS = [
    """
def build_pretraining_data_loader(dataset, consumed_samples, {extra}more=None):
\tif dataset is None:
\t\treturn None
\treturn torch.utils.data.DataLoader(dataset, pin_memory=True)
""",
    """
class Sampler:
\tdef __len__(self):
\t\treturn 3
""",
]

_KERNELS = [
    """
def load(args):
\t# How to compile.
\tflags = []
\tdef build(name):
\t\treturn cpp_extension.load(name=name, extra_cuda_cflags=flags)

\tif args.masked_softmax_fusion:
\t\tbuild("softmax")
"""
]

_TRANSFORMER = [
    """
class CoreAttention(Module):
\tdef __init__(self, config):
\t\tself.config = config

{method_decorator}\tdef forward(self, {query}, key_layer,
\t\t\t\tvalue_layer, mask):
\t\t# scores
\t\t{query} = {query}.view(4, -1)
\t\treturn {query} @ key_layer
""",
    """
class Other(Module):
\tdef forward(self, x):
\t\treturn x
""",
]

_LANGUAGE = [
    """
class TransformerLanguageModel(Module):
\tdef state_dict_for_save_checkpoint(self, prefix='', keep_vars=False):
\t\tstate, moe_state_dict = self.encoder.state_dict(), {{}}
\t\tfor key in list(state):
\t\t\tif 'expert' in key:
\t\t\t\tmoe_state_dict[self._encoder_key+key] = state.pop(key)
\t\treturn state
"""
]

_UTILS = [
    """
{decorator}def found_kill_switch():
\targs = get_args()
\treturn args.kill_switch_file is not None and os.path.exists(args.kill_switch_file)
"""
]

_PACKAGE = ["\n__all__ = []\n"]

_HEADS = {
    "megatron/training.py": "'''Trains.'''\nimport torch\n"
    "from megatron.model.vision.knn_monitor import compute_feature_bank\n"
    "from deepspeed.compression.compress import (init_compression,\n\t\t\tredundancy_clean)\n",
    "megatron/arguments.py": "import argparse\n",
    "megatron/checkpointing.py": "# Name: J\xf6rg\nINFO = 'universal_checkpoint_info'\n",
    "megatron/initialize.py": "from deepspeed.accelerator import get_accelerator\n",
    "megatron/data/data_samplers.py": "import torch\n",
    "megatron/fused_kernels/__init__.py": "from torch.utils import cpp_extension\n",
    "megatron/model/transformer.py": "from torch.nn import Module\n",
    "megatron/model/language_model.py": "from torch.nn import Module\n",
    "megatron/__init__.py": "# A package.\nfrom __future__ import annotations\n\nimport os\n",
    "megatron/global_vars.py": "",
    "megatron/utils.py": "import os\n",
    "megatron/optimizer/__init__.py": "from apex.optimizers import FusedAdam as Adam\n",
}

_PIECES = {
    "megatron/training.py": _TRAINING,
    "megatron/arguments.py": _ARGUMENTS,
    "megatron/checkpointing.py": _CHECKPOINTING,
    "megatron/initialize.py": _INITIALIZE,
    "megatron/data/data_samplers.py": _SAMPLERS,
    "megatron/fused_kernels/__init__.py": _KERNELS,
    "megatron/model/transformer.py": _TRANSFORMER,
    "megatron/model/language_model.py": _LANGUAGE,
    "megatron/__init__.py": _PACKAGE,
    "megatron/global_vars.py": ["\ndef get_args():\n\treturn None\n"],
    "megatron/utils.py": _UTILS,
    "megatron/optimizer/__init__.py": [],
}


@dataclass(frozen=True)
class Style:
    """How a tree is written.

    Attributes:
        newline: line end.
        indent: one level.
        final: the last line of each file has a line end.
        decorators: functions have decorators of their own.
        extra: they have more parameters.
        query: name of the attention's first input.
        encoding: of the files; other than UTF-8 it is declared.
        bom: files begin with a byte order mark.
        seed: of the order of functions.
    """

    newline: str = "\n"
    indent: str = "    "
    final: bool = True
    decorators: bool = False
    extra: bool = False
    query: str = "query_layer"
    encoding: str = "utf-8"
    bom: bool = False
    seed: int = 0


def sources(style: Style = Style()) -> dict[str, bytes]:
    """Returns the files of a tree."""
    order = random.Random(style.seed)
    return {file: _write(file, list(pieces), style, order) for file, pieces in _PIECES.items()}


def _write(file: str, pieces: list[str], style: Style, order: random.Random) -> bytes:
    if style.seed:
        order.shuffle(pieces)
    values = {
        "decorator": "@staticmethod\n@(lambda f: f)\n" if style.decorators else "",
        "method_decorator": "\t@torch.no_grad()  # no gradients\n" if style.decorators else "",
        "extra": "one=1, *, two=2, " if style.extra else "",
        "query": style.query,
    }
    head = _HEADS[file] if style.encoding == "utf-8" else f"# coding: {style.encoding}\n{_HEADS[file]}"
    text = head + "".join(piece.format(**values) for piece in pieces)
    if not style.final:
        text = text.rstrip("\n")
    data = text.replace("\t", style.indent).replace("\n", style.newline).encode(style.encoding)
    return b"\xef\xbb\xbf" + data if style.bom and style.encoding == "utf-8" else data


def write(root: Path, files: Mapping[str, bytes]) -> Path:
    """Writes a tree."""
    for file, data in files.items():
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(data)
    return root


def read(root: Path) -> dict[str, bytes]:
    """Reads all files of a tree, also such as should not be there."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
