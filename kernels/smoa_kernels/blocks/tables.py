"""The rows of the tables that GPU kernels read, and the sizes that fix their launches: one home, without Triton.

A captured CUDA graph keeps addresses, so whatever changes is written into such tables. Kernels take a field by its
place in a row.
"""

from collections import namedtuple

# Elements of a vector load: 16 bytes of the narrowest dtype (fp8).
ALIGNMENT = 16
# Most blocks of one partition: the grid of a launch is fixed, and a block may end in a cut tile.
MAX_BLOCKS = 32
# Tokens of one adapter that share a tile of the modulating kernel.
TILE_TOKENS = 64
# Tokens of one pass over the whole weight: beyond, the product is no longer bound by reading the weight.
PASS_TOKENS = 16


# One slice of a packed layer: addresses of its factors, its rows, and the first of them in the output.
SliceRow = namedtuple("SliceRow", "a b h_out offset")
# What one slot holds of one slice: numbers, and addresses of device memory (0 = there is none).
SlotRow = namedtuple(
    "SlotRow", "partition rank weights table blocks columns padded_cols row_order row_inverse live_rows resident scales"
)
# One block in sorted coordinates: its rows and columns, its first column when padded, its first element.
BlockRow = namedtuple("BlockRow", "row rows col cols padded_col element")
# Tokens of one slot that share a tile: the first position among all tiled tokens, and how many.
TileRow = namedtuple("TileRow", "slot start tokens")
# The whole weight of a slice in sorted order: address, row stride, addresses of its orders and blocks, their number.
SortedRow = namedtuple("SortedRow", "weights stride columns row_order table blocks")


def aligned(size: int) -> int:
    """The next multiple of the alignment."""
    return -(-size // ALIGNMENT) * ALIGNMENT
