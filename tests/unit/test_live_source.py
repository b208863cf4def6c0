"""Bytes of live tensors, read in windows of any size."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from moc_ckpt.plan.save_plan import plan_save
from moc_ckpt.snapshot.live import LiveSource
from moc_ckpt.state.fragment import Fragment

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "uint8": torch.uint8}


@given(
    st.lists(st.tuples(st.integers(1, 90), st.sampled_from(sorted(DTYPES))), min_size=1, max_size=8),
    st.integers(1, 257),
)
def test_windows_make_the_pack(parts, window):
    generator = torch.Generator().manual_seed(1)
    tensors = [torch.randint(0, 255, (numel,), generator=generator).to(DTYPES[dtype]) for numel, dtype in parts]
    items = [
        (Fragment(f"t{i}", "weight", dtype, (numel,), 0, numel), "dense/m") for i, (numel, dtype) in enumerate(parts)
    ]
    (pack,) = plan_save(items).packs
    expected = np.zeros(pack.nbytes, np.uint8)
    for entry in pack.fragments:
        data = tensors[entry.index].view(torch.uint8).numpy()
        expected[entry.offset : entry.offset + len(data)] = data
    source = LiveSource(pack, [tensors[entry.index] for entry in pack.fragments])
    found = np.full(pack.nbytes, 0xAA, np.uint8)
    for start in range(0, pack.nbytes, window):
        source.read_into(found[start : start + window], start)
    assert np.array_equal(found, expected)
