// What is made of x and A before the products: sorted and expanded rows, joined ranks.
#pragma once

#include "call.h"

namespace smoa {

// n columns of x in sorted order, padded with zeros.
template <typename E>
inline void sort_columns(const E* x, const int32_t* order, int64_t n, int64_t padded, E* sorted) {
  for (int64_t j = 0; j < n; j += kLanes) store_first(sorted + j, gather_first(x, order + j, n - j), n - j);
  std::fill(sorted + n, sorted + padded, E{});
}

// Columns of x in sorted order, those of each block padded to whole groups, and so those of none where the weight is
// whole.
template <typename E>
inline void sort_row(const E* x, int64_t size, const Partition<E>& part, E* sorted) {
  int64_t col = 0, packed = 0;
  for (int64_t k = 0; k < part.num_blocks; ++k) {
    const Block& block = part.blocks[k];
    sort_columns(x, part.col_order + col, block.cols, block.packed_cols, sorted + packed);
    col += block.cols, packed += block.packed_cols;
  }
  if (part.whole) sort_columns(x, part.col_order + col, size - col, part.packed_cols - packed, sorted + packed);
}

// The rows a_rho * x of one token.
template <typename E>
inline void expand_rows(const E* sorted, const E* a, int64_t a_stride, int64_t rank, const Job<E>& job, int64_t row) {
  const Partition<E>& part = *job.partition;
  for (int64_t k = 0; k < part.num_blocks; ++k) {
    const Block& block = part.blocks[k];
    const E* factors = a + block.col_start;
    const int64_t width = job.width(block), lead = job.lead(block);
    auto* first = job.row(block, row);
    if (width > block.packed_cols) std::fill(first, first + rank * width, typename Scheme<E>::Row{});
    auto* out = first + lead;
    for (int64_t j = 0; j < block.packed_cols; j += kLanes) {
      const int64_t cols = block.cols - j, padded = block.packed_cols - j;
      const Floats x = load_first(sorted + block.packed_col + j, cols);
      for (int64_t rho = 0; rho < rank; ++rho)
        store_first(out + rho * width + j, multiply(x, load_first(factors + rho * a_stride + j, cols)),
                    padded);
    }
  }
}

template <typename E>
inline void copy_row(const E* sorted, int64_t size, typename Scheme<E>::Row* row) {
  for (int64_t j = 0; j < size; j += kLanes) store_first(row + j, load_first(sorted + j, size - j), size - j);
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
  const bool plain = source.position >= job.first_plain;
  if constexpr (std::is_same_v<typename Scheme<E>::Row, E>)
    if (plain) sorted = job.plain_row(source.position);
  sort_row(call.tensors.x + source.token * call.tensors.x_stride, call.h_in, *job.partition, sorted);
  if (source.rank > 0)
    expand_rows(sorted, call.factor_a(job.slice, source.slot), call.h_in, source.rank, job, source.row);
  if constexpr (!std::is_same_v<typename Scheme<E>::Row, E>)
    if (plain) copy_row(sorted, job.partition->packed_cols, job.plain_row(source.position));
}

// What the output of a job's slice adds, in sorted order.
template <typename E>
inline void sort_bias(const Call<E>& call, const Job<E>& job) {
  const Slice<E>& slice = call.slices[job.slice];
  for (int64_t i = 0; i < slice.h_out; ++i)
    job.bias[job.partition->row_inverse[i]] = widen(call.tensors.bias[slice.y_offset + i]);
}

template <typename E>
inline void prepare_item(const Call<E>& call, size_t i, E* sorted) {
  if (i < call.sources.size()) {
    const Row& source = call.sources[i];
    prepare(call, call.jobs[source.job], source, sorted);
    return;
  }
  i -= call.sources.size();
  if (i < call.pairings.size()) {
    const Pairing& p = call.pairings[i];
    const Job<E>& job = call.jobs[p.job];
    const AloneGroup<E>& group = job.groups[p.group];
    join_ranks(call.factor_a(job.slice, group.slot), call.h_in, group.rank, *job.partition, group.a);
    return;
  }
  sort_bias(call, call.jobs[i - call.pairings.size()]);
}

}  // namespace smoa
