"""megatron-core's GPTModel with DeepSpeed's MoE layer, or one with replicated experts, in every n-th transformer layer.

Initial weights are a function of (seed, parameter name with the global expert number): every expert starts
differently (DeepSpeed copies one expert for all), and the same model starts the same at any world size.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from deepspeed.utils import groups
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

__all__ = ["ExpertMlp", "MoeInterface", "MoeMlp", "TorchAttention", "build_model", "moe_layers", "parameter_counts"]

_LOCAL_EXPERT = re.compile(r"(?<=\.deepspeed_experts\.)\d+(?=\.)")
_RESIDUAL_OUTPUTS = ("linear_proj.weight", "linear_fc2.weight")


class TorchAttention(MegatronModule):
    """Causal attention with torch's fused kernel; its dropout draws from the default generator of the device."""

    def __init__(self, config: TransformerConfig, **_: Any) -> None:
        super().__init__(config=config)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Attend.

        Args:
            query: [sequence, batch, heads, width], as key and value.
            key: see query.
            value: see query.

        Returns:
            [sequence, batch, heads x width].
        """
        dropout = self.config.attention_dropout if self.training else 0.0
        rows = [tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)]
        out = F.scaled_dot_product_attention(*rows, dropout_p=dropout, is_causal=True)
        return out.permute(2, 0, 1, 3).flatten(2)


class ExpertMlp(MLP):
    """megatron-core's MLP as one expert of DeepSpeed's MoE."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(
            config,
            MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ffn_hidden_size=config.ffn_hidden_size,
        )
        self.register_state_dict_post_hook(_drop_extra_state)

    def __deepcopy__(self, memo: dict[int, Any]) -> ExpertMlp:
        return type(self)(self.config)  # process groups cannot be copied; the weights are set later anyway

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Apply the expert.

        Args:
            hidden_states: [expert-parallel ranks, 1, capacity, hidden].

        Returns:
            The same shape; the output bias is added here, because DeepSpeed ignores a returned one.
        """
        output, bias = super().forward(hidden_states.reshape(-1, hidden_states.shape[-1]))
        if bias is not None:
            output = output + bias
        return output.view_as(hidden_states)


def _drop_extra_state(module: torch.nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for key in [key for key in state if key.startswith(prefix) and key.endswith("_extra_state")]:
        del state[key]


class MoeInterface:
    """What an MoE layer needs beside its own forward to be a megatron-core MLP; comes before the layer's class.

    Attributes:
        token_counts: tokens routed to each expert since `take_counts` (this rank, before capacity drops).
        aux_loss: the load-balancing loss of the last forward pass, of this rank's tokens.
        expert_ids: global ids of the local experts, in their order.
        num_local_experts: how many they are.
    """

    token_counts: torch.Tensor | None = None
    aux_loss: torch.Tensor
    expert_ids: tuple[int, ...]
    num_local_experts: int

    def forward(self, hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, None]:
        """Route, apply the experts, and remember the token counts.

        Args:
            hidden_states: [sequence, batch, hidden].

        Returns:
            The output, and no bias.
        """
        output, self.aux_loss, counts = super().forward(hidden_states)  # type: ignore[misc]
        if self.training:  # type: ignore[attr-defined]
            self.token_counts = counts.clone() if self.token_counts is None else self.token_counts + counts
        return output, None

    def take_counts(self) -> torch.Tensor | None:
        """Return the token counts since the last call, and start again at zero."""
        counts, self.token_counts = self.token_counts, None
        return counts


class MoeMlp(MoeInterface, MoE):
    """DeepSpeed's MoE with the interface of a megatron-core MLP."""

    def __init__(self, config: TransformerConfig, args: argparse.Namespace) -> None:
        super().__init__(
            hidden_size=config.hidden_size,
            expert=ExpertMlp(config),
            num_experts=args.num_experts,
            ep_size=args.moe_expert_parallel_size,
            k=args.topk,
            capacity_factor=args.moe_train_capacity_factor,
            eval_capacity_factor=args.moe_eval_capacity_factor,
            min_capacity=args.moe_min_capacity,
            drop_tokens=not args.disable_moe_token_dropping,
        )


def build_model(args: argparse.Namespace, vocab_size: int, device: torch.device, swap_groups: bool) -> GPTModel:
    """Build the model on the device, with its initial weights set.

    Args:
        args: settled arguments.
        vocab_size: padded vocabulary.
        device: where the parameters live.
        swap_groups: DeepSpeed's `use_data_before_expert_parallelism`.
    """
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    config = TransformerConfig(
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        num_attention_heads=args.num_attention_heads,
        ffn_hidden_size=args.ffn_hidden_size,
        hidden_dropout=args.hidden_dropout,
        attention_dropout=args.attention_dropout,
        use_cpu_initialization=device.type == "cpu",
        perform_initialization=False,
        params_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
    )
    numbers = [n for n in range(1, args.num_layers + 1) if args.num_experts > 1 and n % args.expert_interval == 0]
    moe = iter(_moe_specs(args, len(numbers)))
    layers = []
    for number in range(1, args.num_layers + 1):
        layer = get_gpt_layer_local_spec()
        layer.submodules.self_attention.submodules.core_attention = TorchAttention
        if number in numbers:
            layer.submodules.mlp = next(moe)
        layers.append(layer)
    model = GPTModel(
        config,
        TransformerBlockSubmodules(layer_specs=layers, layer_norm=WrappedTorchNorm),
        vocab_size=vocab_size,
        max_sequence_length=args.max_position_embeddings,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    ).to(device)
    if args.num_experts > 1 and not args.lazarus:
        name = f"ep_size_{args.moe_expert_parallel_size}"
        if name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(
                args.moe_expert_parallel_size, use_data_before_expert_parallel_=swap_groups
            )
        local = args.num_experts // args.moe_expert_parallel_size
        first = groups._get_expert_parallel_rank(name) * local
        for module in moe_layers(model):
            module.expert_ids = tuple(range(first, first + local))
    _initialise(model, args)
    return model


def _moe_specs(args: argparse.Namespace, count: int) -> list[ModuleSpec]:
    """Return what makes each MoE layer."""
    if not args.lazarus:
        return [ModuleSpec(module=MoeMlp, params={"args": args})] * count
    from gpt_moe.lazarus import ReplicatedMoeMlp, place_experts

    return [
        ModuleSpec(module=ReplicatedMoeMlp, params={"args": args, "layer": layer, "placement": placement})
        for layer, placement in enumerate(place_experts(args, count))
    ]


def moe_layers(model: torch.nn.Module) -> list[Any]:
    """Return the MoE layers (`MoeInterface`), in order; each has the global `expert_ids` of its local experts.

    Args:
        model: the GPTModel.
    """
    return [module for module in model.modules() if isinstance(module, MoeInterface)]


def parameter_counts(model: torch.nn.Module, num_experts: int) -> tuple[int, int]:
    """Return the whole model's parameters, counting all ranks' experts: (all, in experts).

    Args:
        model: the GPTModel.
        num_experts: experts per layer over all ranks.
    """
    dense = sum(parameter.numel() for parameter in model.parameters() if getattr(parameter, "allreduce", True))
    experts = 0
    for layer in moe_layers(model):
        local = sum(p.numel() for p in layer.parameters() if not getattr(p, "allreduce", True))
        experts += local // layer.num_local_experts * num_experts
    return dense + experts, experts


@torch.no_grad()
def _initialise(model: torch.nn.Module, args: argparse.Namespace) -> None:
    ids = {
        f"{prefix}.deepspeed_moe.experts.deepspeed_experts.{local}": str(expert)
        for prefix, module in model.named_modules()
        if isinstance(module, MoeInterface)
        for local, expert in enumerate(module.expert_ids)
    }
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)  # norms one, biases zero
            continue
        local = _LOCAL_EXPERT.search(name)
        if local:
            name = name[: local.start()] + ids[name[: local.end()]] + name[local.end() :]
        digest = hashlib.blake2b(f"{args.seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator(device=parameter.device)
        generator.manual_seed(int.from_bytes(digest, "big") >> 1)
        if name.endswith("gate.wg.weight"):
            bound = 1 / math.sqrt(parameter.shape[1])  # as torch.nn.Linear
            parameter.uniform_(-bound, bound, generator=generator)
        else:
            deeper = math.sqrt(2 * args.num_layers) if name.endswith(_RESIDUAL_OUTPUTS) else 1.0
            parameter.normal_(0.0, args.init_method_std / deeper, generator=generator)
