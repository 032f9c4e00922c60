import pytest
import torch
from smoa_kernels.backends.cpp.packed import PANEL_ROWS, PackedBlocks
from smoa_kernels.blocks.layout import PlainBlocks


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("store", [PlainBlocks, PackedBlocks])
@pytest.mark.parametrize(
    "shapes",
    [[], [(3, 5)], [(16, 4), (16, 4)], [(20, 5), (19, 4)], [(1, 1), (33, 2), (16, 3)]],
    ids=["none", "one", "equal", "sizes apart by one", "mixed"],
)
def test_every_block_comes_back_as_it_was(store, shapes, dtype, generator):
    blocks = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    held = store(blocks)
    for k, block in enumerate(blocks):
        assert torch.equal(held.block(k), block)
    assert held.nbytes >= sum(block.nbytes for block in blocks)


def test_the_weight_of_a_single_plain_block_is_not_copied():
    weight = torch.ones(4, 6)
    assert PlainBlocks([weight]).block(0).data_ptr() == weight.data_ptr()


def test_equal_plain_blocks_are_one_tensor():
    held = PlainBlocks([torch.ones(2, 3), torch.zeros(2, 3)])
    assert held.stacked is not None
    assert held.stacked.shape == (2, 2, 3)
    assert held.nbytes == held.stacked.nbytes


def test_packed_running_example_of_the_docstring():
    block = torch.arange(100.0).reshape(20, 5).bfloat16()
    packed = PackedBlocks([block])
    panels = packed.weights.view(2, 3, PANEL_ROWS, 2)
    assert packed.packed_cols == 6
    assert packed.table.tolist() == [[0, 20, 0, 5, 0, 6, 0, 96, 0]]
    assert panels[1, 1, 2].tolist() == block[18, 2:4].tolist()
    assert not panels[1, :, 4:].any()  # rows 20 to 31
    assert not panels[:, 2, :, 1].any()  # column 5


def test_packed_table_follows_the_blocks():
    packed = PackedBlocks([torch.ones(17, 3).bfloat16(), torch.ones(2, 4).bfloat16()])
    assert packed.table.tolist() == [[0, 17, 0, 3, 0, 4, 0, 64, 0], [17, 2, 3, 4, 4, 4, 128, 64, 128]]
    assert packed.packed_cols == 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_only_bfloat16_has_its_columns_in_pairs(dtype):
    block = torch.arange(100.0).reshape(20, 5).to(dtype)
    packed = PackedBlocks([block])
    assert packed.table.tolist() == [[0, 20, 0, 5, 0, 5, 0, 80, 0]]
    assert torch.equal(packed.weights.view(2, 5, PANEL_ROWS)[0, 3], block[:16, 3])


def test_blocks_inside_a_whole_weight(generator):
    """Two blocks in 23 rows and 8 columns; the last 3 rows and the last column belong to none."""
    whole = torch.randn(23, 8, generator=generator).bfloat16()
    blocks = [whole[:17, :3], whole[17:20, 3:7]]
    packed = PackedBlocks(blocks, [whole[:17], whole[17:20], whole[20:]])
    assert [packed.block(k).tolist() for k in range(2)] == [block.tolist() for block in blocks]
    assert packed.packed_cols == 32  # 4 + 4 + 1, then zeros up to whole tiles
    stride, alone = 16 * 32, 2 * 16 * 4  # the second block's panels if the first one's were alone
    assert packed.table.tolist() == [
        [0, 17, 0, 3, 0, 4, 0, stride, 0],
        [17, 3, 3, 4, 4, 4, 2 * stride + 4 * 16, stride, alone],
        [20, 3, 0, 0, 0, 0, 3 * stride, stride, 0],
    ]
    last = packed.weights[3 * stride :].view(16, 16, 2)
    assert last[:2, :3].transpose(0, 1).flatten(1).tolist() == [[*row[:3], 0.0] for row in whole[20:].tolist()]
    assert last[4, :3, 0].tolist() == whole[20:, 7].tolist()
