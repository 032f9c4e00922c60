// The delta of a whole (possibly packed) layer in one call: all slices, partitions and adapters, bfloat16.
//
// Tokens of an adapter are served by one of three exact ways (see cost.py):
//   expand    y_i += sum_rho b_rho,i (W_k (a_rho * x))_i: a row (a_rho * x) per token and rank through W's panels;
//   modulate  y_i += ((W_k * (B A)) x)_i: a copy of the panels times B A, then one row per token;
//   resident  y_i += (dW_k x)_i: the adapter's own panels, one row per token.
// Every output element is computed by one thread in a fixed order, so results do not depend on the schedule.

#include <algorithm>
#include <atomic>
#include <thread>

#include "jobs.h"

namespace smoa {

// Columns of x in sorted order, each block padded to an even number with zeros.
static void sort_row(const bf16* x, const Partition& part, bf16* sorted) {
  const int64_t* order = part.col_order;
  for (int64_t k = 0; k < part.num_blocks; ++k) {
    const Block& block = part.blocks[k];
    for (int64_t j = 0; j < block.cols; ++j) sorted[block.packed_col + j] = x[order[block.col_start + j]];
    if (block.cols & 1) sorted[block.packed_col + block.cols] = 0;
  }
}

// The rows a_rho * x of one token.
static void expand_rows(const bf16* sorted, const bf16* a, int64_t a_stride, int64_t rank, const Job& job,
                        int64_t row) {
  const Partition& part = *job.partition;
  for (int64_t k = 0; k < part.num_blocks; ++k) {
    const Block& block = part.blocks[k];
    const bf16* factors = a + block.col_start;
    bf16* out = job.row(block, row);
    for (int64_t j = 0; j < block.packed_cols(); j += kLanes) {
      const __mmask16 lanes = first_lanes(block.cols - j), padded = first_lanes(block.packed_cols() - j);
      const __m512 x = widen(load_lanes(sorted + block.packed_col + j, lanes));
      for (int64_t rho = 0; rho < rank; ++rho) {
        const __m512 value = _mm512_mul_ps(x, widen(load_lanes(factors + rho * a_stride + j, lanes)));
        _mm256_mask_storeu_epi16(out + rho * block.packed_cols() + j, padded, narrow(value));
      }
    }
  }
}

static void copy_row(const bf16* sorted, const Job& job, int64_t row) {
  const Partition& part = *job.partition;
  for (int64_t k = 0; k < part.num_blocks; ++k) {
    const Block& block = part.blocks[k];
    std::memcpy(job.row(block, row), sorted + block.packed_col, block.packed_cols() * sizeof(bf16));
  }
}

// Ranks of A in pairs: [rank pairs][packed columns], the second of an odd last pair zero.
static void pair_ranks(const bf16* a, int64_t stride, int64_t rank, const Partition& part, uint32_t* pairs) {
  for (int64_t q = 0; q < rank; q += 2, pairs += part.packed_cols) {
    const bf16* low = a + q * stride;
    for (int64_t k = 0; k < part.num_blocks; ++k) {
      const Block& block = part.blocks[k];
      for (int64_t j = 0; j < block.packed_cols(); ++j) {
        const int64_t col = block.col_start + j;
        const bool inside = j < block.cols;
        const uint32_t lo = inside ? low[col] : 0, hi = inside && q + 1 < rank ? low[stride + col] : 0;
        pairs[block.packed_col + j] = lo | hi << 16;
      }
    }
  }
}

static void prepare(const Call& call, const Job& job, const Row& source, bf16* sorted) {
  const Partition& part = *job.partition;
  sort_row(call.x + source.token * call.x_stride, part, sorted);
  if (source.rank == 0)
    copy_row(sorted, job, source.row);
  else
    expand_rows(sorted, call.factor_a(job.slice, source.slot), call.h_in, source.rank, job, source.row);
}

template <int P, int R>
static void expand_tile(const Tile& t, const bf16* rows, const ExpandRow* info, float (*sums)[kMaxPanels][kLanes],
                        int32_t first_token, const bf16* ahead) {
  __m512 acc[P][R];
  multiply_tile<P, R>(t.weights, t.panel_stride, rows, t.block->packed_cols(), t.block->packed_cols() / 2, ahead, acc);
  // Every row's b is a stream of its own, too many for the hardware to foresee: fetch what the next tile needs.
  for (int r = 0; r < R; ++r) _mm_prefetch(info[r].b + t.row_start + P * kLanes, _MM_HINT_T0);
  // A token's ranks follow each other: its sum stays in registers until the next token's row.
  for (int p = 0; p < P; ++p) {
    const __mmask16 lanes = first_lanes(t.num_rows - p * kLanes);
    int32_t token = info[0].token;
    __m512 sum = _mm512_loadu_ps(sums[token - first_token][p]);
    for (int r = 0; r < R; ++r) {
      if (info[r].token != token) {
        _mm512_storeu_ps(sums[token - first_token][p], sum);
        token = info[r].token;
        sum = _mm512_loadu_ps(sums[token - first_token][p]);
      }
      sum = _mm512_fmadd_ps(acc[p][r], widen(load_lanes(info[r].b + t.row_start + p * kLanes, lanes)), sum);
    }
    _mm512_storeu_ps(sums[token - first_token][p], sum);
  }
}

// Puts a token's part of the delta, rounded, where add_output finds it.
template <int P, typename F>
static void store_delta(const Job& job, const Tile& t, int64_t token, F&& value) {
  bf16* delta = job.delta + token * job.delta_stride + t.row_start;
  for (int p = 0; p < P; ++p)
    _mm256_mask_storeu_epi16(delta + p * kLanes, first_lanes(t.num_rows - p * kLanes), narrow(value(p)));
}

template <int P, int R>
static void plain_tile(const Job& job, const Tile& t, const bf16* weights, const bf16* rows, int64_t first_token,
                       const bf16* ahead) {
  __m512 acc[P][R];
  const int64_t pairs = t.block->packed_cols() / 2;
  multiply_tile<P, R>(weights, pairs * 2 * kLanes, rows, t.block->packed_cols(), pairs, ahead, acc);
  for (int r = 0; r < R; ++r) store_delta<P>(job, t, first_token + r, [&](int p) { return acc[p][r]; });
}

// Calls f with the number of rows of each tile: `rows` rows in tiles of nearly equal size, at most R.
template <int R, typename F>
static void for_tiles(int64_t rows, F&& f) {
  const int64_t tiles = (rows + R - 1) / R;
  for (int64_t i = 0, start = 0; i < tiles; ++i) {
    const int64_t end = rows * (i + 1) / tiles;
    dispatch_rows<R>(static_cast<int>(end - start), [&](auto size) { f(start, size); });
    start = end;
  }
}

template <int P>
static void expand_panels(const Job& job, const Tile& t, Ahead ahead) {
  float sums[kTokenChunk][kMaxPanels][kLanes];
  for (const Chunk& chunk : job.chunks) {
    std::memset(sums, 0, chunk.num_tokens * sizeof sums[0]);
    for_tiles<max_tile_rows(P)>(chunk.num_rows, [&](int64_t start, auto size) {
      const int64_t row = chunk.first_row + start;
      expand_tile<P, size>(t, job.row(*t.block, row), &job.expanded[row], sums, chunk.first_token, ahead.take());
    });
    for (int32_t i = 0; i < chunk.num_tokens; ++i)
      store_delta<P>(job, t, chunk.first_token + i, [&](int p) { return _mm512_loadu_ps(sums[i][p]); });
  }
}

// The rows of a group through panels of its own.
template <int P>
static void multiply_group(const Job& job, const Tile& t, const AloneGroup& group, const bf16* weights, Ahead ahead) {
  const bf16* rows = job.row(*t.block, group.first_row);
  for_tiles<max_tile_rows(P)>(group.num_tokens, [&](int64_t start, auto size) {
    plain_tile<P, size>(job, t, weights, rows + start * t.block->packed_cols(), group.first_token + start,
                        ahead.take());
  });
}

template <int P>
static void modulate_group(const Call& call, const Job& job, const Tile& t, const AloneGroup& group,
                           const Workspace& space) {
  __m512i* b = space.factors;
  const bf16* factor = call.factor_b(job.slice, group.slot) + t.row_start;
  const int64_t stride = call.slices[job.slice].h_out;
  const int rank_pairs = static_cast<int>((group.rank + 1) / 2);
  for (int q = 0; q < rank_pairs; ++q) {
    const bf16* low = factor + 2 * q * stride;
    const bool paired = 2 * q + 1 < group.rank;
    for (int p = 0; p < P; ++p) {
      const __mmask16 lanes = first_lanes(t.num_rows - p * kLanes);
      const __m256i high = paired ? load_lanes(low + stride + p * kLanes, lanes) : _mm256_setzero_si256();
      b[q * P + p] = interleave(load_lanes(low + p * kLanes, lanes), high);
    }
  }
  modulate_panels<P>(t.weights, t.panel_stride, group.a_pairs + t.block->packed_col, job.partition->packed_cols, b,
                     rank_pairs, t.block->packed_cols() / 2, space.panels);
  multiply_group<P>(job, t, group, space.panels, {space.panels, 0, 1});
}

// The panels of dW that belong to the tile's panels of W.
template <int P>
static void multiply_resident(const Job& job, const Tile& t, const Tile& next, const AloneGroup& group) {
  const bf16* base = job.partition->weights;
  const bool same = next.job == t.job;
  multiply_group<P>(job, t, group, group.resident + (t.weights - base),
                    {group.resident + ((same ? next : t).weights - base), t.panel_stride, t.num_panels});
}

static void run_tile(const Call& call, size_t index, const Workspace& space) {
  const Tile& t = call.tiles[index];
  const Tile& next = call.tiles[index + 1 < call.tiles.size() ? index + 1 : index];
  const Job& job = call.jobs[t.job];
  dispatch_rows<kMaxPanels>(t.num_panels, [&](auto size) {
    if (!job.chunks.empty()) expand_panels<size>(job, t, {next.weights, next.panel_stride, next.num_panels});
    for (const AloneGroup& group : job.groups) {
      if (group.resident)
        multiply_resident<size>(job, t, next, group);
      else
        modulate_group<size>(call, job, t, group, space);
    }
  });
}

static void prepare_item(const Call& call, size_t i, bf16* sorted) {
  if (i < call.sources.size()) {
    const Row& source = call.sources[i];
    prepare(call, call.jobs[source.job], source, sorted);
    return;
  }
  const Pairing& p = call.pairings[i - call.sources.size()];
  const Job& job = call.jobs[p.job];
  const AloneGroup& group = job.groups[p.group];
  pair_ranks(call.factor_a(job.slice, group.slot), call.h_in, group.rank, *job.partition, group.a_pairs);
}

// One token's delta of one slice onto y. Only here is y written: blocks interleave in it, so tiles that wrote it
// themselves would take each other's cache lines away.
static void add_output(const Call& call, const Output& output, bf16* gathered) {
  const Job& job = call.jobs[output.job];
  const Slice& slice = call.slices[job.slice];
  add_permuted(call.y + output.token * call.y_stride + slice.y_offset, job.delta + output.position * job.delta_stride,
               job.partition->row_inverse, job.partition->live_rows, slice.h_out, gathered);
}

constexpr int kSpins = 2000;  // some tens of microseconds, then the core is offered to others

static void wait_for(const std::atomic<size_t>& done, size_t all) {
  for (int spins = 0; done.load(std::memory_order_acquire) < all; ++spins)
    spins < kSpins ? _mm_pause() : std::this_thread::yield();
}

// Threads take work as they come, and wait only for what another has taken: one that the system does not let run (the
// cores are often shared with the HTTP server) holds up nobody before the end.
static void run(Call& call) {
  const size_t items = call.sources.size() + call.pairings.size();
  // Neighbouring tiles, so that a thread can fetch the next one's weights ahead; enough runs to share them out evenly.
  const size_t run = std::clamp<size_t>(call.tiles.size() / (8 * omp_get_max_threads()), 1, 8);
  std::atomic<size_t> next_item{0}, items_done{0}, next_run{0}, tiles_done{0}, next_output{0};
#pragma omp parallel
  {
    const Workspace space = call.workspace(omp_get_thread_num());
    for (size_t i; (i = next_item.fetch_add(1, std::memory_order_relaxed)) < items;) {
      prepare_item(call, i, space.sorted);
      items_done.fetch_add(1, std::memory_order_release);
    }
    wait_for(items_done, items);
    for (size_t i; (i = next_run.fetch_add(run, std::memory_order_relaxed)) < call.tiles.size();) {
      const size_t end = std::min(i + run, call.tiles.size());
      for (size_t tile = i; tile < end; ++tile) run_tile(call, tile, space);
      tiles_done.fetch_add(end - i, std::memory_order_release);
    }
    wait_for(tiles_done, call.tiles.size());
    for (size_t i; (i = next_output.fetch_add(1, std::memory_order_relaxed)) < call.outputs.size();)
      add_output(call, call.outputs[i], space.sorted);
  }
}

}  // namespace smoa

// Adds the delta to y. Returns 0, or the bytes of scratch needed when `scratch_bytes` is too small: then nothing is
// written.
extern "C" int64_t smoa_delta(const smoa::Layer* layer, const smoa::Step* step, smoa::bf16* y, int64_t y_stride,
                              const smoa::bf16* x, int64_t x_stride, char* scratch, int64_t scratch_bytes) {
  smoa::Call call(*layer, *step, y, y_stride, x, x_stride);
  const int64_t needed = call.place(scratch);
  if (needed > scratch_bytes) return needed;
  smoa::run(call);
  return 0;
}
