// What one call has to do: jobs, one per partition, and the tiles of their blocks.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "products.h"
#include "tables.h"

namespace smoa {

constexpr int kTokenChunk = 64;  // tokens whose sums an expanding thread keeps on its stack

struct Row {  // a token's first row of a job: `rank` rows a_rho * x, or the token's x alone when rank is 0
  int32_t job, slot, rank, token;
  int64_t row;
};

template <typename E>
struct ExpandRow {
  const E* b;
  int32_t token;  // index into expand_tokens
};

struct Chunk {
  int64_t first_row, num_rows;
  int32_t first_token, num_tokens;
};

template <typename E>
struct AloneGroup {  // an adapter's tokens that multiply with blocks of their own: resident or modulated ones
  int64_t slot, rank, first_row, first_token, num_tokens;  // first_token: position among the job's tokens
  const int32_t* tokens;
  const E* resident;
  typename Scheme<E>::Factor* a;  // [steps][packed columns], what modulate_panels takes
};

template <typename E>
struct Job {  // one partition of one slice: expanded rows first, then those of each group alone
  int64_t slice = 0;
  const Partition<E>* partition = nullptr;
  typename Scheme<E>::Row* rows = nullptr;   // [blocks][num_rows][packed columns of the block]
  E* delta = nullptr;  // [num_tokens][delta_stride], sorted rows of the layer
  int64_t delta_stride = 0;
  std::vector<ExpandRow<E>> expanded;
  std::vector<int32_t> expand_tokens;
  std::vector<Chunk> chunks;
  std::vector<AloneGroup<E>> groups;
  int64_t plain_rows = 0;
  int64_t num_rows() const { return static_cast<int64_t>(expanded.size()) + plain_rows; }
  int64_t num_tokens() const { return static_cast<int64_t>(expand_tokens.size()) + plain_rows; }
  typename Scheme<E>::Row* row(const Block& block, int64_t i) const {
    return rows + num_rows() * block.packed_col + i * block.packed_cols;
  }
};

template <typename E>
struct Tile {  // some panels of one block: the unit of parallel work
  int32_t job, num_panels;
  const Block* block;
  const E* weights;
  int64_t panel_stride, row_start, num_rows;  // rows of the block from here on
  int64_t groups() const { return block->packed_cols / Scheme<E>::kGroup; }
};

// The panels of the tile that comes next, to be fetched one a pass, the last one again and again when they run out; by
// the tile unit all of them in the first pass.
template <typename E>
struct Ahead {
  const E* weights;
  int64_t panel_stride;
  int32_t num_panels;
  const E* take() {
    const E* now = weights;
    if constexpr (Amx<E>::kUsed)
      weights = nullptr;
    else if (num_panels > 1) weights += panel_stride, --num_panels;
    return now;
  }
};

enum class Way { kExpand, kModulate, kResident };

// CostModel.way of cost.py.
template <typename E>
inline Way choose_way(const Step& step, double tokens, const Entry<E>& entry) {
  if (entry.resident && entry.rank == 0) return Way::kResident;
  const double rank = static_cast<double>(entry.rank);
  const double expand = tokens * rank, modulate = tokens + step.form + step.form_per_rank * rank;
  if (entry.resident && tokens + step.resident < std::min(expand, modulate)) return Way::kResident;
  return modulate < expand ? Way::kModulate : Way::kExpand;
}

struct Pairing {
  int32_t job, group;
};

struct Output {
  int32_t job, position, token;
};

template <typename E>
struct Workspace {
  typename Amx<E>::Session amx;
  E* sorted;  // one row of x
  typename Scheme<E>::Formed* panels;
  typename Scheme<E>::Operand* factors;
};

// f(integral_constant<size>) for a size in 1 .. Max.
template <int Max, typename F>
inline void dispatch_rows(int size, F&& f) {
  if constexpr (Max > 0) {
    if (size == Max)
      f(std::integral_constant<int, Max>{});
    else
      dispatch_rows<Max - 1>(size, f);
  }
}

}  // namespace smoa
