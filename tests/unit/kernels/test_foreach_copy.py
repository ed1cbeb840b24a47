from __future__ import annotations

import pytest
import torch

from rayft.kernels.foreach_copy import BLOCK, ForeachCopy, blocks


def test_each_call_copies_what_the_sources_are_then() -> None:
    sources = [torch.randn(3, 5), torch.randn(7)]
    flat = torch.zeros(40)
    targets = [flat[8:23].view(3, 5), flat[24:31]]
    copies = ForeachCopy(targets, sources)
    for _ in range(2):
        sources[0].normal_()
        copies()
        assert all(map(torch.equal, targets, sources))
    used = torch.zeros(40, dtype=torch.bool)
    used[8:23] = used[24:31] = True
    assert not flat[~used].any()


def test_nothing_to_copy() -> None:
    ForeachCopy([], [])()


def test_the_table_covers_each_tensor_once() -> None:
    sources = [torch.zeros(2 * BLOCK + 3), torch.zeros(5), torch.zeros(BLOCK)]
    targets = [torch.zeros_like(source) for source in sources]
    rows = blocks(targets, sources).tolist()
    assert [count for *_, count in rows] == [BLOCK, BLOCK, 3, 5, BLOCK]
    for column, tensors in enumerate((sources, targets)):
        first = tensors[0].data_ptr()
        assert [row[column] for row in rows[:3]] == [first + 4 * BLOCK * block for block in range(3)]
        assert [row[column] for row in rows[3:]] == [one.data_ptr() for one in tensors[1:]]


@pytest.mark.parametrize(
    ("target", "source"), [(torch.zeros(3), torch.zeros(4)), (torch.zeros(2, 3), torch.zeros(3, 2).t())]
)
def test_tensors_that_can_not_be_copied_as_they_lie(target: torch.Tensor, source: torch.Tensor) -> None:
    with pytest.raises(AssertionError):
        ForeachCopy([target], [source])
