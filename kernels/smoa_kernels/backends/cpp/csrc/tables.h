// What Python hands over (see launch.py): the tables of a layer and of a step. Every field is 64 bits wide.
#pragma once

#include "scheme.h"

namespace smoa {

struct Block {
  int64_t row_start, rows, col_start, cols, packed_col, packed_cols;
  int64_t weight, stride;  // in Partition::weights: the first element, and from panel to panel
  int64_t alone;           // the first element where blocks stand one after the other, their panels too
  int64_t panels() const { return (rows + kLanes - 1) / kLanes; }
};

template <typename E>
struct Partition {
  const int32_t *row_inverse, *col_order;  // sorted position of a native row; native column at a sorted position
  const Block* blocks;  // then, where the weight is whole, one without columns for the rows that belong to no block
  const E* weights;
  int64_t num_blocks, num_bands, packed_cols, live_rows;  // sorted rows from live_rows on belong to no block
  int64_t whole;  // the blocks lie where they belong in the whole sorted weight, whose rows have packed_cols elements
};

template <typename E>
struct Entry {
  int64_t partition, rank;  // index of the layer's partition, -1 = nothing; rank 0 = no factors
  const E* resident;     // blocks of dW one after the other, null unless they are held
};

template <typename E>
struct Slice {
  const E *a, *b;  // [S, R, H_in], [S, R, H_out]
  int64_t h_out, y_offset, whole;  // whole: index of the partition whose weight is, -1 for none
};

template <typename E>
struct Layer {
  const Slice<E>* slices;
  const Entry<E>* entries;  // [slices][S]
  const Partition<E>* partitions;
  int64_t num_slices, num_slots, num_partitions, max_rank, h_in;
};

struct Group {
  int64_t slot, start, end;
};

struct Step {
  const Group* groups;
  const int32_t* token_order;
  int64_t num_groups, num_tokens;
  double form, form_per_rank, resident;  // see CostModel in cost.py
};

}  // namespace smoa
