"""The bytes of live tensors, laid out as a pack plan says.

Saving blocks while it reads live tensors, so nothing may update them meanwhile. The arena takes this
place once snapshots are asynchronous; the writer only knows the protocol (`read_into`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
import torch

from moc_ckpt.plan.save_plan import PackPlan

__all__ = ["LiveSource", "byte_view"]


def byte_view(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a contiguous 1-D tensor as uint8, sharing memory."""
    return tensor.view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8, device=tensor.device)


class LiveSource:
    """A pack's bytes, read from live tensors on any device. Not thread-safe.

    Args:
        pack: the layout.
        tensors: one 1-D contiguous tensor per fragment of the pack, in its order.
    """

    def __init__(self, pack: PackPlan, tensors: Sequence[torch.Tensor]) -> None:
        self._nbytes = pack.nbytes
        self._starts = [item.offset for item in pack.fragments]
        self._bytes = [byte_view(tensor.detach()) for tensor in tensors]

    def read_into(self, dst: np.ndarray, offset: int) -> None:
        """Fills uint8 `dst` with pack bytes [offset, offset + len(dst)); gaps are zeros."""
        stop = offset + len(dst)
        out = torch.from_numpy(dst)
        index = max(bisect_right(self._starts, offset) - 1, 0)
        at = offset
        while at < stop:
            if index >= len(self._starts):
                out[at - offset :].zero_()
                return
            data, start = self._bytes[index], self._starts[index]
            low, high = max(at - start, 0), min(stop - start, data.numel())
            if low < high:
                out[start + low - offset : start + high - offset].copy_(data[low:high])
            after = self._starts[index + 1] if index + 1 < len(self._starts) else self._nbytes
            gap_from, gap_to = max(start + data.numel(), at), min(after, stop)
            if gap_from < gap_to:
                out[gap_from - offset : gap_to - offset].zero_()
            at = min(after, stop) if index + 1 < len(self._starts) else stop
            index += 1
