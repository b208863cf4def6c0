"""Trains a tiny language model, with the calls in Megatron-DeepSpeed's order."""

from functools import partial

import torch
from megatron import get_args
from megatron.model.gpt_model import GPTModel
from megatron.training import pretrain


class Sequences(torch.utils.data.Dataset):
    """Sequences that a model can learn, each a function of its number."""

    def __init__(self, count, args):
        self.count, self.args = count, args

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(self.args.seed * 1_000_003 + index)
        steps = torch.randint(1, 3, (self.args.seq_length + 1,), generator=generator)
        return {"text": (torch.cumsum(steps, 0) + index) % self.args.vocab_size}


def model_provider(pre_process=True, post_process=True):
    return GPTModel(get_args())


def loss_func(moe_loss, output):
    mean = output.float().mean()
    shown = mean.detach().clone()
    torch.distributed.all_reduce(shown)
    return mean + moe_loss, {"lm loss": shown / torch.distributed.get_world_size()}


def forward_step(data_iterator, model):
    text = next(data_iterator)["text"]
    output, moe_losses = model(text[:, :-1].contiguous(), text[:, 1:].contiguous())
    return output, partial(loss_func, sum(moe_losses) * get_args().moe_loss_coeff)


def datasets_provider(counts):
    return [Sequences(count, get_args()) if count else None for count in counts]


if __name__ == "__main__":
    pretrain(datasets_provider, model_provider, None, forward_step)
