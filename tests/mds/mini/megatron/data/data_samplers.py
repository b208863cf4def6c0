import torch

from megatron import get_args
from megatron.core import mpu


class InOrder:
    """This rank's micro-batches, from where the run has got to."""

    def __init__(self, total, consumed, micro, rank, world):
        self.total, self.consumed, self.micro, self.rank, self.world = total, consumed, micro, rank, world

    def __len__(self):
        return self.total

    def __iter__(self):
        whole = self.micro * self.world
        for first in range(self.consumed, self.total - whole + 1, whole):
            begin = first + self.rank * self.micro
            yield list(range(begin, begin + self.micro))


def build_pretraining_data_loader(dataset, consumed_samples):
    if dataset is None:
        return None
    args = get_args()
    sampler = InOrder(
        len(dataset),
        consumed_samples,
        args.micro_batch_size,
        mpu.get_data_parallel_rank(),
        mpu.get_data_parallel_world_size(),
    )
    return torch.utils.data.DataLoader(dataset, batch_sampler=sampler, num_workers=args.num_workers)
