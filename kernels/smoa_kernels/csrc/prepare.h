// What is made of x and A before the products: sorted and expanded rows, joined ranks.
#pragma once

#include "call.h"

namespace smoa {

// Columns of x in sorted order, each block padded to whole groups with zeros.
template <typename E>
inline void sort_row(const E* x, const Partition<E>& part, E* sorted) {
  const int32_t* order = part.col_order;
  for (int64_t k = 0; k < part.num_blocks; ++k) {
    const Block& block = part.blocks[k];
    E* out = sorted + block.packed_col;
    for (int64_t j = 0; j < block.cols; j += kLanes)
      store_first(out + j, gather_first(x, order + block.col_start + j, block.cols - j), block.cols - j);
    std::fill(out + block.cols, out + block.packed_cols, E{});
  }
}

// The rows a_rho * x of one token.
template <typename E>
inline void expand_rows(const E* sorted, const E* a, int64_t a_stride, int64_t rank, const Job<E>& job, int64_t row) {
  const Partition<E>& part = *job.partition;
  for (int64_t k = 0; k < part.num_blocks; ++k) {
    const Block& block = part.blocks[k];
    const E* factors = a + block.col_start;
    auto* out = job.row(block, row);
    for (int64_t j = 0; j < block.packed_cols; j += kLanes) {
      const int64_t cols = block.cols - j, padded = block.packed_cols - j;
      const Floats x = load_first(sorted + block.packed_col + j, cols);
      for (int64_t rho = 0; rho < rank; ++rho)
        store_first(out + rho * block.packed_cols + j, multiply(x, load_first(factors + rho * a_stride + j, cols)),
                    padded);
    }
  }
}

template <typename E>
inline void copy_row(const E* sorted, const Job<E>& job, int64_t row) {
  const Partition<E>& part = *job.partition;
  for (int64_t k = 0; k < part.num_blocks; ++k) {
    const Block& block = part.blocks[k];
    auto* out = job.row(block, row);
    for (int64_t j = 0; j < block.packed_cols; j += kLanes)
      store_first(out + j, load_first(sorted + block.packed_col + j, block.packed_cols - j), block.packed_cols - j);
  }
}

// A as modulate_panels takes it: [steps][packed columns], the ranks that a last step lacks are zero.
template <typename E>
inline void join_ranks(const E* a, int64_t stride, int64_t rank, const Partition<E>& part,
                       typename Scheme<E>::Factor* joined) {
  using S = Scheme<E>;
  for (int64_t q = 0; q < rank; q += S::kRanks, joined += part.packed_cols) {
    const E* low = a + q * stride;
    const bool paired = S::kRanks == 2 && q + 1 < rank;
    for (int64_t k = 0; k < part.num_blocks; ++k) {
      const Block& block = part.blocks[k];
      for (int64_t j = 0; j < block.packed_cols; ++j) {
        const int64_t col = block.col_start + j;
        const bool inside = j < block.cols;
        joined[block.packed_col + j] = S::join(inside ? low[col] : E{}, inside && paired ? low[stride + col] : E{});
      }
    }
  }
}

template <typename E>
inline void prepare(const Call<E>& call, const Job<E>& job, const Row& source, E* sorted) {
  sort_row(call.x + source.token * call.x_stride, *job.partition, sorted);
  if (source.rank == 0)
    copy_row(sorted, job, source.row);
  else
    expand_rows(sorted, call.factor_a(job.slice, source.slot), call.h_in, source.rank, job, source.row);
}

template <typename E>
inline void prepare_item(const Call<E>& call, size_t i, E* sorted) {
  if (i < call.sources.size()) {
    const Row& source = call.sources[i];
    prepare(call, call.jobs[source.job], source, sorted);
    return;
  }
  const Pairing& p = call.pairings[i - call.sources.size()];
  const Job<E>& job = call.jobs[p.job];
  const AloneGroup<E>& group = job.groups[p.group];
  join_ranks(call.factor_a(job.slice, group.slot), call.h_in, group.rank, *job.partition, group.a);
}

}  // namespace smoa
