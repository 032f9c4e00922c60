import torch
from hypothesis import given
from hypothesis import strategies as st
from smoa_kernels.blocks.layout import PlainBlocks
from smoa_kernels.blocks.partition import Block, Partition, PartitionCache, is_identity, partition_digest, sort_blocks
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


block_ids = st.lists(st.integers(0, 4), min_size=1, max_size=9)


@given(block_ids, block_ids)
def test_any_blocks_become_rectangles_that_hold_what_shares_an_id(rows, cols):
    row_order, col_order, blocks = sort_blocks(ids(*rows), ids(*cols))
    assert sorted(row_order.tolist()) == list(range(len(rows)))
    assert sorted(col_order.tolist()) == list(range(len(cols)))
    same = torch.tensor(rows)[:, None] == torch.tensor(cols)[None, :]
    tiled = torch.zeros(len(rows), len(cols), dtype=torch.bool)
    end = (0, 0)
    for block in blocks:
        assert (block.row_start, block.col_start) == end
        assert block.rows > 0
        assert block.cols > 0
        end = (block.row_end, block.col_end)
        tiled[block.row_start : block.row_end, block.col_start : block.col_end] = True
    assert torch.equal(same[row_order][:, col_order], tiled)


@given(st.integers(0, 2), st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=20))
def test_any_order_of_use_keeps_what_is_used_and_the_last_left(retain, events):
    cache = PartitionCache(retain)
    users, left = {}, []
    held = {}
    for name, coming in events:
        if coming:
            held[name] = cache.acquire(name.encode(), lambda name=name: partition(name.encode()))
            users[name] = users.get(name, 0) + 1
            left = [other for other in left if other != name]
        elif users.get(name):
            cache.release(held[name])
            users[name] -= 1
            if not users[name]:
                left = [*left, name][-retain:] if retain else []
        expected = {name for name, count in users.items() if count} | set(left)
        assert {found.digest.decode() for found in cache.held} == expected
        assert all(found.users == users.get(found.digest.decode(), 0) for found in cache.held)
