import torch
from smoa_kernels.layout import PlainBlocks
from smoa_kernels.partition import Block, Partition, PartitionCache, is_identity, partition_digest, sort_blocks
from smoa_kernels.testing import random_blocks


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int16)


def partition(digest: bytes) -> Partition:
    order = torch.arange(2)
    return Partition(digest, order, order, (Block(0, 2, 0, 2),), PlainBlocks([torch.ones(2, 2)]))


def test_running_example_of_the_docstring():
    row_order, col_order, blocks = sort_blocks(ids(1, 0, 1, 7), ids(0, 1, 0))
    assert row_order.tolist() == [1, 0, 2, 3]
    assert col_order.tolist() == [0, 2, 1]
    assert blocks == (Block(0, 1, 0, 2), Block(1, 3, 2, 3))


def test_native_order_is_ascending_inside_a_block(generator):
    rows, cols = random_blocks(37, 4, generator), random_blocks(23, 4, generator)
    row_order, col_order, blocks = sort_blocks(rows, cols)
    assert sorted(row_order.tolist()) == list(range(37))
    for block in blocks:
        for order, start, end in (
            (row_order, block.row_start, block.row_end),
            (col_order, block.col_start, block.col_end),
        ):
            piece = order[start:end].tolist()
            assert piece == sorted(piece)


def test_blocks_tile_a_prefix_and_leave_out_ids_without_counterpart():
    row_order, col_order, blocks = sort_blocks(ids(5, 5, 9, 2), ids(2, 3, 3, 5))
    assert blocks == (Block(0, 1, 0, 1), Block(1, 3, 1, 2))
    assert row_order.tolist() == [3, 0, 1, 2]
    assert col_order.tolist() == [0, 3, 1, 2]


def test_no_common_id_means_no_block():
    _, _, blocks = sort_blocks(ids(0, 0), ids(1, 1))
    assert blocks == ()


def test_one_block_is_the_native_order():
    row_order, col_order, _ = sort_blocks(ids(0, 0, 0), ids(0, 0))
    assert is_identity(row_order)
    assert is_identity(col_order)


def test_digest_depends_on_content_and_on_the_border_between_rows_and_columns():
    assert partition_digest(ids(0, 1), ids(0)) == partition_digest(ids(0, 1), ids(0))
    assert partition_digest(ids(0, 1), ids(0)) != partition_digest(ids(0), ids(1, 0))


def test_cache_builds_once_and_keeps_the_most_recent_unused():
    built: list[bytes] = []

    def build(digest: bytes) -> Partition:
        built.append(digest)
        return partition(digest)

    cache = PartitionCache(retain=1)
    first = cache.acquire(b"1", lambda: build(b"1"))
    assert cache.acquire(b"1", lambda: build(b"1")) is first
    second = cache.acquire(b"2", lambda: build(b"2"))
    cache.release(first)
    cache.release(second)
    assert cache.nbytes == first.nbytes + second.nbytes  # first is still used once, second is kept unused
    cache.release(first)  # now both are unused and one is kept: the one that was used last
    assert cache.nbytes == first.nbytes
    assert cache.acquire(b"1", lambda: build(b"1")) is first
    assert cache.acquire(b"2", lambda: build(b"2")) is not second
    assert built == [b"1", b"2", b"2"]
