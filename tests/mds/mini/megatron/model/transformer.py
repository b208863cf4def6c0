import math

import torch
from deepspeed.moe.layer import MoE

from megatron.core.tensor_parallel import get_cuda_rng_tracker


def dropout_add(hidden, residual, prob: float):
    return residual + torch.nn.functional.dropout(hidden, p=prob, training=True)


dropout_add_fused = torch.jit.script(dropout_add)


class CoreAttention(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.heads = args.num_attention_heads
        self.attention_dropout = torch.nn.Dropout(args.hidden_dropout)

    def forward(self, query_layer, key_layer, value_layer, attention_mask):
        length, batch, heads, width = query_layer.shape
        # obstacle: slices of one tensor have no such view
        query_layer = query_layer.view(length, batch * heads, width).transpose(0, 1)
        key_layer = key_layer.view(length, batch * heads, width).transpose(0, 1)
        value_layer = value_layer.view(length, batch * heads, width).transpose(0, 1)
        scores = query_layer @ key_layer.transpose(1, 2) / math.sqrt(width)
        weights = torch.softmax(scores.masked_fill(attention_mask, float("-inf")), -1)
        with get_cuda_rng_tracker().fork():
            weights = self.attention_dropout(weights)
        return (weights @ value_layer).transpose(0, 1).reshape(length, batch, heads * width)


class ParallelAttention(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        self.heads = args.num_attention_heads
        self.query_key_value = torch.nn.Linear(args.hidden_size, 3 * args.hidden_size)
        self.core_attention = CoreAttention(args)
        self.dense = torch.nn.Linear(args.hidden_size, args.hidden_size)

    def forward(self, hidden, mask):
        mixed = self.query_key_value(hidden)
        mixed = mixed.view(*mixed.shape[:2], 3 * self.heads, -1)
        query, key, value = torch.split(mixed, self.heads, dim=2)
        return self.dense(self.core_attention(query, key, value, mask))


class ParallelMLP(torch.nn.Module):
    def __init__(self, args, moe=False):
        super().__init__()
        self.dense_h_to_4h = torch.nn.Linear(args.hidden_size, 2 * args.hidden_size)
        self.dense_4h_to_h = torch.nn.Linear(2 * args.hidden_size, args.hidden_size)

    def forward(self, hidden):
        return self.dense_4h_to_h(torch.nn.functional.gelu(self.dense_h_to_4h(hidden)))


class ParallelTransformerLayer(torch.nn.Module):
    def __init__(self, args, number):
        super().__init__()
        self.input_layernorm = torch.nn.LayerNorm(args.hidden_size)
        self.self_attention = ParallelAttention(args)
        self.post_attention_layernorm = torch.nn.LayerNorm(args.hidden_size)
        self.prob = args.hidden_dropout
        self.add = dropout_add_fused if args.bias_dropout_fusion else dropout_add
        if number % args.expert_interval == 0:
            self.mlp = MoE(
                args.hidden_size,
                ParallelMLP(args, moe=True),
                num_experts=args.num_experts,
                ep_size=args.moe_expert_parallel_size,
                k=args.topk,
                capacity_factor=1.0,
                min_capacity=2,
                noisy_gate_policy="RSample",
            )
        else:
            self.mlp = ParallelMLP(args)

    def forward(self, hidden, mask):
        hidden = self.residual(self.self_attention(self.input_layernorm(hidden), mask), hidden)
        out, loss = self.post_attention_layernorm(hidden), None
        if isinstance(self.mlp, MoE):
            out, loss, _ = self.mlp(out)
        else:
            out = self.mlp(out)
        return self.residual(out, hidden), loss

    def residual(self, change, hidden):
        return self.add(change, hidden, self.prob) if self.training else hidden + change


class ParallelTransformer(torch.nn.Module):
    def __init__(self, args):
        super().__init__()
        numbers = range(1, args.num_layers + 1)
        self.layers = torch.nn.ModuleList([ParallelTransformerLayer(args, number) for number in numbers])
        self.final_layernorm = torch.nn.LayerNorm(args.hidden_size)

    def forward(self, hidden, mask):
        losses = []
        for layer in self.layers:
            hidden, loss = layer(hidden, mask)
            if loss is not None:
                losses.append(loss)
        return self.final_layernorm(hidden), losses
