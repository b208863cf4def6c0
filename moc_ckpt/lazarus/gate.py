"""Top-k gating: which experts a token goes to, with what weight, and the auxiliary loss. As DeepSpeed defines them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moc_ckpt.errors import ConfigError

__all__ = ["Routing", "TopKGate"]

# DeepSpeed's width of the noise that "Jitter" multiplies tokens with.
_JITTER = 1e-2


class Routing(NamedTuple):
    """What a gate decided for T tokens.

    Attributes:
        experts: [T, k] int64, global expert ids, -1 for a token that goes nowhere; not differentiable.
        weights: [T, k], what the experts' outputs are multiplied with; float32, or float64 for float64 tokens.
        loss: the auxiliary loss over these tokens, a scalar.
    """

    experts: Tensor
    weights: Tensor
    loss: Tensor


class TopKGate(nn.Module):
    """Routes each token to the k experts of the largest probability.

    Args:
        hidden_size: of a token.
        num_experts: E.
        k: experts per token.
        noisy_gate_policy: None, "None", "Jitter" (training: tokens times noise) or "RSample" (k = 1, training: the
            expert is drawn with the gate's probabilities).
        top2_2nd_expert_sampling: k = 2: the second expert is drawn, with the probabilities of those left.
        where: the layer's name, for messages.
    """

    def __init__(
        self,
        hidden_size: int,
        num_experts: int,
        *,
        k: int = 1,
        noisy_gate_policy: str | None = None,
        top2_2nd_expert_sampling: bool = True,
        where: str = "MoE layer",
    ) -> None:
        super().__init__()
        if not 1 <= k <= num_experts:
            raise ConfigError(f"k={k}: a token goes to 1 to {num_experts} experts", where=where)
        if noisy_gate_policy not in (None, "None", "Jitter", "RSample"):
            raise ConfigError(
                f"there is no noisy_gate_policy {noisy_gate_policy!r}", where=where, fix="use None, Jitter or RSample"
            )
        self.wg = nn.Linear(hidden_size, num_experts, bias=False)
        self.k = k
        self.num_experts = num_experts
        self.noisy_gate_policy = noisy_gate_policy
        self.top2_2nd_expert_sampling = top2_2nd_expert_sampling
        self._where = where

    def forward(
        self, tokens: Tensor, used: Tensor | None = None, on_choice: Callable[[Tensor], object] | None = None
    ) -> Routing:
        """Decides for T tokens; rank-local, and without waiting for the device.

        Args:
            tokens: [T, hidden_size].
            used: [T], k = 1 only; a token whose entry is 0 goes nowhere.
            on_choice: called with the experts as soon as they are known, before weights and loss are computed.
        """
        if used is not None and self.k > 1:
            raise ConfigError(
                f"used_token has no meaning with k={self.k}", where=self._where, fix="pass it with k=1 alone"
            )
        # As in DeepSpeed single precision whatever the layer's is; doubles stay doubles.
        precise = torch.promote_types(tokens.dtype, torch.float32)
        tokens = tokens.to(precise)
        if self.noisy_gate_policy == "Jitter" and self.training:
            tokens = tokens * torch.empty_like(tokens).uniform_(1 - _JITTER, 1 + _JITTER)
        logits = F.linear(tokens, self.wg.weight.to(precise))
        probabilities = F.softmax(logits, dim=1)
        chosen = self._choose(logits.detach(), probabilities.detach())
        taken = None if used is None else (used.reshape(-1, 1) != 0)
        experts = chosen if taken is None else torch.where(taken, chosen, -1)
        if on_choice is not None:
            on_choice(experts)
        weights = probabilities.gather(1, chosen)
        # The loss counts the first choices of top-1 and top-2, and all choices from top-3 on.
        counted = chosen if self.k > 2 else chosen[:, :1]
        hits = torch.zeros_like(probabilities.detach()).scatter_(1, counted, 1.0)
        if taken is not None:
            hits, weights = hits * taken, weights * taken
        average = torch.mean if len(tokens) else torch.sum  # without tokens the loss is 0; the mean of none is NaN
        loss = (average(probabilities, 0) * average(hits, 0)).sum() * self.num_experts / counted.shape[1]
        if self.k > 1:
            weights = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).eps)
        return Routing(experts, weights, loss)

    def _choose(self, logits: Tensor, probabilities: Tensor) -> Tensor:
        """Returns the experts of every token, [T, k]."""
        if self.k == 1:
            drawn = self.noisy_gate_policy == "RSample" and self.training
            return (logits + _gumbel(logits) if drawn else probabilities).argmax(1, keepdim=True)
        if self.k == 2:
            first = probabilities.argmax(1, keepdim=True)
            # DeepSpeed samples in evaluation as well.
            rest = logits + _gumbel(logits) if self.top2_2nd_expert_sampling else logits
            return torch.cat([first, rest.scatter(1, first, float("-inf")).argmax(1, keepdim=True)], dim=1)
        return probabilities.topk(self.k, dim=1).indices


def _gumbel(like: Tensor) -> Tensor:
    """Returns noise whose addition to logits makes the largest one a draw with their softmax."""
    tiny = torch.finfo(like.dtype).tiny
    return -(-torch.rand_like(like).clamp_(min=tiny).log_()).clamp_(min=tiny).log_()
