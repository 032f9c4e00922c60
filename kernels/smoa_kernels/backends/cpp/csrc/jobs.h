// What one call has to do: jobs, one per partition, and the tiles of their blocks.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "fours.h"
#include "products.h"
#include "tables.h"

namespace smoa {

constexpr int kTokenChunk = 64;  // tokens whose sums an expanding thread keeps on its stack

struct Row {  // a token of a job: `rank` rows a_rho * x from `row` on; x alone at its position where that is wanted
  int32_t job, slot, rank, token, position;
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
  int64_t slot, rank, first_token, num_tokens;  // first_token: position among the job's tokens
  const int32_t* tokens;
  const E* resident;
  typename Scheme<E>::Factor* a;  // [steps][packed columns], what modulate_panels takes
};

template <typename E>
struct Job {  // one partition of one slice; its tokens: those that expand, then each group alone, then those without delta
  int64_t slice = 0;
  const Partition<E>* partition = nullptr;
  typename Scheme<E>::Row* rows = nullptr;   // expanded: [blocks][rows][packed columns of the block]
  typename Scheme<E>::Row* plain = nullptr;  // x in sorted order: [tokens from first_plain on][plain_stride]
  int64_t first_plain = 0, plain_stride = 0;
  E* result = nullptr;  // [num_tokens][result_stride], sorted rows of the layer
  int64_t result_stride = 0;
  float* bias = nullptr;  // in sorted order, null where there is none
  bool gridded = false;   // expanded rows are padded to whole tiles of the columns of the whole weight
  std::vector<int64_t> first_column;  // of each block's expanded rows, among the columns of all
  int64_t columns = 0, widest = 0;    // of all blocks' expanded rows, and of the widest block's
  std::vector<ExpandRow<E>> expanded;
  std::vector<int32_t> expand_tokens;
  std::vector<Chunk> chunks;
  std::vector<AloneGroup<E>> groups;
  std::vector<int32_t> bare;  // tokens that get the base product only
  int64_t alone_tokens = 0;
  int64_t num_expanding() const { return static_cast<int64_t>(expand_tokens.size()); }
  int64_t first_bare() const { return num_expanding() + alone_tokens; }
  int64_t num_tokens() const { return first_bare() + static_cast<int64_t>(bare.size()); }
  // Columns that an expanded row of a block has, and those before its own.
  int64_t lead(const Block& block) const { return gridded ? block.packed_col % kAmxColumns : 0; }
  int64_t width(const Block& block) const {
    return gridded ? (lead(block) + block.packed_cols + kAmxColumns - 1) & ~int64_t{kAmxColumns - 1} : block.packed_cols;
  }
  typename Scheme<E>::Row* row(const Block& block, int64_t i) const {
    return rows + static_cast<int64_t>(expanded.size()) * first_column[&block - partition->blocks] + i * width(block);
  }
  typename Scheme<E>::Row* plain_row(int64_t position) const { return plain + (position - first_plain) * plain_stride; }
};

template <typename E>
struct Tile {  // some panels of one block: the unit of parallel work
  int32_t job, num_panels;
  const Block* block;
  const E* weights;
  int64_t first_panel, row_start, num_rows;  // rows of the block from here on
};

template <typename E>
struct Tensors {  // what one run of a call reads and writes
  E* y = nullptr;
  int64_t y_stride = 0;
  const E* x = nullptr;
  int64_t x_stride = 0;
  const E* bias = nullptr;  // of the output, null for none
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

struct Batch {  // of sources or outputs of one job, that are permuted together
  size_t first;
  int count;  // kFour or 1
};

template <typename E>
struct Workspace {
  typename Amx<E>::Session amx;
  E* sorted[kFour];  // rows of x
  E* mixed;          // the elements of four rows
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
