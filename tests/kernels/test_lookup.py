"""Looking up rows of a table, wherever in memory the table is."""

from __future__ import annotations

import pytest
import torch
from hf_vq_kernels.lookup import look_up
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

DTYPES = (torch.int8, torch.float16, torch.bfloat16, torch.float32)


def at_offset(table: Tensor, nbytes: int) -> Tensor:
    """A copy whose storage starts `nbytes` after an address that is a multiple of 64."""
    raw = bytearray(table.numel() * table.element_size() + 192)
    start = -torch.frombuffer(raw, dtype=torch.uint8).data_ptr() % 64 + nbytes
    copy = torch.frombuffer(raw, dtype=table.dtype, count=table.numel(), offset=start)
    assert copy.data_ptr() % 64 == nbytes % 64 and copy.storage_offset() == 0
    return copy.view(table.shape).copy_(table)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", [1, 2, 3, 4, 8, 12, 16])
def test_every_alignment(d: int, dtype: torch.dtype) -> None:
    table = (torch.arange(37 * d).view(37, d) % 125).to(dtype)
    flat = torch.randint(0, 37, (50, 3), dtype=torch.int32)
    expected = table[flat.long()].view(50, 3 * d)
    assert torch.equal(look_up(table, flat), expected)
    for nbytes in range(dtype.itemsize, 64, dtype.itemsize):  # as in mapped files
        moved = at_offset(table, nbytes)
        assert torch.equal(look_up(moved, flat), expected)
        assert torch.equal(moved, table)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_part_of_another_tensor(offset: int) -> None:
    whole = torch.randn(4 * 20 + offset)
    table = whole[offset:].view(20, 4)
    flat = torch.arange(19, -1, -1).view(4, 5)
    assert torch.equal(look_up(table, flat), table.flip(0).view(4, 20))
    # an aligned address, in a storage that starts at another
    shifted = at_offset(whole, 64 - 4 * offset)[offset:].view(20, 4)
    assert torch.equal(look_up(shifted, flat), look_up(table, flat))


def test_an_aligned_table_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    table = torch.randn(20, 4)
    assert table.data_ptr() % 16 == 0
    monkeypatch.setattr(Tensor, "clone", None)
    look_up(table, torch.zeros((2, 2), dtype=torch.int64))


def test_without_data_and_compiled() -> None:
    table, flat = torch.randn(20, 4), torch.randint(0, 20, (6, 2))
    assert look_up(table.to("meta"), flat.to("meta")).shape == (6, 8)
    with FakeTensorMode() as mode:
        assert look_up(mode.from_tensor(table), mode.from_tensor(flat)).shape == (6, 8)
    torch._dynamo.reset()
    compiled = torch.compile(look_up, fullgraph=True, backend="eager")
    assert torch.equal(compiled(table, flat), look_up(table, flat))
