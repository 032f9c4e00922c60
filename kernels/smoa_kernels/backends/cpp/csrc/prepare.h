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

// Of four rows that are mixed.
template <typename E>
inline void sort_columns(const E* mixed, const int32_t* order, int64_t n, int64_t padded, E* const (&sorted)[kFour]) {
  put_permuted(mixed, order, n, sorted);
  for (E* row : sorted) std::fill(row + n, row + padded, E{});
}

// f(first column in sorted order, how many, where they stand, how many are there with the padding): the columns of each
// block, padded to whole groups, and so those of none where the weight is whole.
template <typename E, typename F>
inline void for_columns(int64_t size, const Partition<E>& part, F&& f) {
  int64_t col = 0, packed = 0;
  for (int64_t k = 0; k < part.num_blocks; ++k) {
    const Block& block = part.blocks[k];
    f(col, block.cols, packed, block.packed_cols);
    col += block.cols, packed += block.packed_cols;
  }
  if (part.whole) f(col, size - col, packed, part.packed_cols - packed);
}

// x of a batch's tokens in sorted order.
template <typename E>
inline void sort_rows(const Call<E>& call, const Job<E>& job, const Row* sources, int count, E* mixed,
                      E* const (&sorted)[kFour]) {
  const int32_t* order = job.partition->col_order;
  const auto x = [&](int k) { return call.tensors.x + sources[k].token * call.tensors.x_stride; };
  if constexpr (kTakesFours<E>)
    if (count == kFour) {
      mix({x(0), x(1), x(2), x(3)}, call.h_in, mixed);
      for_columns(call.h_in, *job.partition, [&](int64_t col, int64_t n, int64_t packed, int64_t padded) {
        sort_columns(mixed, order + col, n, padded,
                     {sorted[0] + packed, sorted[1] + packed, sorted[2] + packed, sorted[3] + packed});
      });
      return;
    }
  for_columns(call.h_in, *job.partition, [&](int64_t col, int64_t n, int64_t packed, int64_t padded) {
    sort_columns(x(0), order + col, n, padded, sorted[0] + packed);
  });
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
inline void prepare(const Call<E>& call, const Batch& batch, const Workspace<E>& space, Ahead& ahead) {
  constexpr bool kSame = std::is_same_v<typename Scheme<E>::Row, E>;
  const Row* sources = &call.sources[batch.first];
  const Job<E>& job = call.jobs[sources->job];
  const auto plain = [&](int k) { return k < batch.count && sources[k].position >= job.first_plain; };
  E* sorted[kFour];
  for (int k = 0; k < kFour; ++k) {
    sorted[k] = space.sorted[k];
    if constexpr (kSame)
      if (plain(k)) sorted[k] = job.plain_row(sources[k].position);
  }
  sort_rows(call, job, sources, batch.count, space.mixed, sorted);
  for (int k = 0; k < batch.count; ++k) {
    ahead.fetch();
    const Row& source = sources[k];
    if (source.rank > 0)
      expand_rows(sorted[k], call.factor_a(job.slice, source.slot), call.h_in, source.rank, job, source.row);
    if constexpr (!kSame)
      if (plain(k)) copy_row(sorted[k], job.partition->packed_cols, job.plain_row(source.position));
  }
}

// What the output of a job's slice adds, in sorted order.
template <typename E>
inline void sort_bias(const Call<E>& call, const Job<E>& job) {
  const Slice<E>& slice = call.slices[job.slice];
  for (int64_t i = 0; i < slice.h_out; ++i)
    job.bias[job.partition->row_inverse[i]] = widen(call.tensors.bias[slice.y_offset + i]);
}

template <typename E>
inline void prepare_item(const Call<E>& call, size_t i, const Workspace<E>& space, Ahead& ahead) {
  if (i < call.source_batches.size()) {
    prepare(call, call.source_batches[i], space, ahead);
    return;
  }
  i -= call.source_batches.size();
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
