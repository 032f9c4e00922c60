// The delta of a whole (possibly packed) layer in one call: all slices, partitions and adapters of one element type.
//
// Tokens of an adapter are served by one of three exact ways (see cost.py):
//   expand    y_i += sum_rho b_rho,i (W_k (a_rho * x))_i: a row (a_rho * x) per token and rank through W's panels;
//   modulate  y_i += ((W_k * (B A)) x)_i: a copy of the panels times B A, then one row per token;
//   resident  y_i += (dW_k x)_i: the adapter's own panels, one row per token.
// Every output element is computed by one thread in a fixed order, so results do not depend on the schedule.

#include <algorithm>
#include <atomic>
#include <thread>

#include "prepare.h"

namespace smoa {

// `count` rows of at most R.
template <int P, int R, typename E, typename Count>
static void expand_tile(const Tile<E>& t, const typename Scheme<E>::Row* rows, const ExpandRow<E>* info, Count count,
                        float (*sums)[kMaxPanels<E>][kLanes], int32_t first_token, const E* ahead) {
  Floats acc[P][R];
  multiply_tile<P, R>(t.weights, t.panel_stride, rows, t.block->packed_cols, t.groups(), ahead, acc);
  // Every row's b is a stream of its own, too many for the hardware to foresee: fetch what the next tile needs.
  for (int r = 0; r < count; ++r) _mm_prefetch(info[r].b + t.row_start + P * kLanes, _MM_HINT_T0);
  // A token's ranks follow each other: its sum stays in registers until the next token's row.
  for (int p = 0; p < P; ++p) {
    const int64_t n = t.num_rows - p * kLanes;
    int32_t token = info[0].token;
    Floats sum = load(sums[token - first_token][p]);
    for (int r = 0; r < count; ++r) {
      if (info[r].token != token) {
        store(sums[token - first_token][p], sum);
        token = info[r].token;
        sum = load(sums[token - first_token][p]);
      }
      sum = multiply_add(sum, acc[p][r], load_first(info[r].b + t.row_start + p * kLanes, n));
    }
    store(sums[token - first_token][p], sum);
  }
}

// Puts a token's part of the delta, rounded, where add_output finds it.
template <int P, typename E, typename F>
static void store_delta(const Job<E>& job, const Tile<E>& t, int64_t token, F&& value) {
  E* delta = job.delta + token * job.delta_stride + t.row_start;
  for (int p = 0; p < P; ++p) store_first(delta + p * kLanes, value(p), t.num_rows - p * kLanes);
}

// Calls f(first row, room, rows) for each tile: `rows` rows in tiles of nearly equal size. Rows and room are the same
// constant where products are made in registers.
template <typename E, typename F>
static void for_tiles(int64_t rows, F&& f) {
  constexpr int R = kTileRows<E>;
  const int64_t tiles = (rows + R - 1) / R;
  for (int64_t i = 0, start = 0; i < tiles; ++i) {
    const int64_t end = rows * (i + 1) / tiles;
    if constexpr (Amx<E>::kUsed)
      f(start, std::integral_constant<int, R>{}, static_cast<int>(end - start));
    else
      dispatch_rows<R>(static_cast<int>(end - start), [&](auto size) { f(start, size, size); });
    start = end;
  }
}

template <int P, typename E>
static void expand_panels(const Job<E>& job, const Tile<E>& t, Ahead<E> ahead) {
  float sums[kTokenChunk][kMaxPanels<E>][kLanes];
  for (const Chunk& chunk : job.chunks) {
    std::memset(sums, 0, chunk.num_tokens * sizeof sums[0]);
    for_tiles<E>(chunk.num_rows, [&](int64_t start, auto room, auto count) {
      const int64_t row = chunk.first_row + start;
      expand_tile<P, room>(t, job.row(*t.block, row), &job.expanded[row], count, sums, chunk.first_token, ahead.take());
    });
    for (int32_t i = 0; i < chunk.num_tokens; ++i)
      store_delta<P>(job, t, chunk.first_token + i, [&](int p) { return load(sums[i][p]); });
  }
}

// The rows of a group through panels of its own, of elements M.
template <int P, typename M, typename E>
static void multiply_group(const Job<E>& job, const Tile<E>& t, const AloneGroup<E>& group, const M* panels,
                           Ahead<M> ahead) {
  const auto* rows = job.row(*t.block, group.first_row);
  const int64_t row_size = t.block->packed_cols;
  for_tiles<M>(group.num_tokens, [&](int64_t start, auto room, auto count) {
    Floats acc[P][room];
    multiply_tile<P, room>(panels, t.panel_stride, rows + start * row_size, row_size, row_size / Scheme<M>::kGroup,
                           ahead.take(), acc);
    for (int r = 0; r < count; ++r)
      store_delta<P>(job, t, group.first_token + start + r, [&](int p) { return acc[p][r]; });
  });
}

template <int P, typename E>
static void modulate_group(const Call<E>& call, const Job<E>& job, const Tile<E>& t, const AloneGroup<E>& group,
                           const Workspace<E>& space) {
  using S = Scheme<E>;
  const E* factor = call.factor_b(job.slice, group.slot) + t.row_start;
  const int64_t stride = call.slices[job.slice].h_out, steps = call.steps(group.rank);
  for (int64_t q = 0; q < steps; ++q) {
    const E* low = factor + q * S::kRanks * stride;
    const E* high = q * S::kRanks + 1 < group.rank ? low + stride : nullptr;
    for (int p = 0; p < P; ++p)
      space.factors[q * P + p] = S::factor_rows(low + p * kLanes, high ? high + p * kLanes : nullptr,
                                                t.num_rows - p * kLanes);
  }
  modulate_panels<P>(t.weights, t.panel_stride, group.a + t.block->packed_col, job.partition->packed_cols,
                     space.factors, steps, t.block->packed_cols, space.panels);
  multiply_group<P>(job, t, group, static_cast<const typename S::Formed*>(space.panels), {space.panels, 0, 1});
}

// The panels of dW that belong to the tile's panels of W.
template <int P, typename E>
static void multiply_resident(const Job<E>& job, const Tile<E>& t, const Tile<E>& next, const AloneGroup<E>& group) {
  const E* base = job.partition->weights;
  const Tile<E>& coming = next.job == t.job ? next : t;
  multiply_group<P>(job, t, group, group.resident + (t.weights - base),
                    {group.resident + (coming.weights - base), coming.panel_stride, coming.num_panels});
}

template <typename E>
static void run_tile(const Call<E>& call, size_t index, Workspace<E>& space) {
  const Tile<E>& t = call.tiles[index];
  const Tile<E>& next = call.tiles[index + 1 < call.tiles.size() ? index + 1 : index];
  const Job<E>& job = call.jobs[t.job];
  space.amx.configure(t.block->packed_cols);
  dispatch_rows<kMaxPanels<E>>(t.num_panels, [&](auto size) {
    if (!job.chunks.empty())
      expand_panels<size>(job, t, Ahead<E>{next.weights, next.panel_stride, next.num_panels});
    for (const AloneGroup<E>& group : job.groups) {
      if (group.resident)
        multiply_resident<size>(job, t, next, group);
      else
        modulate_group<size>(call, job, t, group, space);
    }
  });
}

// One token's delta of one slice onto y. Only here is y written: blocks interleave in it, so tiles that wrote it
// themselves would take each other's cache lines away.
template <typename E>
static void add_output(const Call<E>& call, const Output& output) {
  const Job<E>& job = call.jobs[output.job];
  const Slice<E>& slice = call.slices[job.slice];
  add_permuted(call.y + output.token * call.y_stride + slice.y_offset, job.delta + output.position * job.delta_stride,
               job.partition->row_inverse, job.partition->live_rows, slice.h_out);
}

constexpr int kSpins = 2000;  // some tens of microseconds, then the core is offered to others

static void wait_for(const std::atomic<size_t>& done, size_t all) {
  for (int spins = 0; done.load(std::memory_order_acquire) < all; ++spins)
    spins < kSpins ? _mm_pause() : std::this_thread::yield();
}

// Threads take work as they come, and wait only for what another has taken: one that the system does not let run (the
// cores are often shared with the HTTP server) holds up nobody before the end.
template <typename E>
static void run(const Call<E>& call) {
  const size_t items = call.sources.size() + call.pairings.size();
  // Neighbouring tiles, so that a thread can fetch the next one's weights ahead; enough runs to share them out evenly.
  const size_t run = std::clamp<size_t>(call.tiles.size() / (8 * omp_get_max_threads()), 1, 8);
  std::atomic<size_t> next_item{0}, items_done{0}, next_run{0}, tiles_done{0}, next_output{0};
#pragma omp parallel
  {
    Workspace<E> space = call.workspace(omp_get_thread_num());
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
      add_output(call, call.outputs[i]);
  }
}

using Element = SMOA_ELEMENT;

}  // namespace smoa

// Adds the delta to y. Returns 0, or the bytes of scratch needed when `scratch_bytes` is too small: then nothing is
// written.
extern "C" int64_t smoa_delta(const smoa::Layer<smoa::Element>* layer, const smoa::Step* step, smoa::Element* y,
                              int64_t y_stride, const smoa::Element* x, int64_t x_stride, char* scratch,
                              int64_t scratch_bytes) {
  smoa::Call<smoa::Element> call(*layer, *step, y, y_stride, x, x_stride);
  const int64_t needed = call.place(scratch);
  if (needed > scratch_bytes) return needed;
  smoa::run(call);
  return 0;
}

// Whether this process may use what the kernel was built for; to be asked before the first call.
extern "C" int64_t smoa_permitted() { return smoa::Amx<smoa::Element>::permitted(); }

// Threads that a call would use.
extern "C" int64_t smoa_threads() { return omp_get_max_threads(); }
