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

// One thread's work on one tile: P of its panels, in sums of fp32.
template <int P, typename E>
struct TileRun {
  using S = Scheme<E>;
  const Call<E>& call;
  const Job<E>& job;
  const Tile<E>& tile;
  Workspace<E>& space;
  Ahead ahead;  // the next tile's panels of W

  int64_t columns(int p) const { return tile.num_rows - p * kLanes; }

  // A token's part of the result, rounded, where write_output finds it.
  template <typename F>
  void store_result(int64_t position, F&& value) const {
    const int64_t row = tile.row_start;
    E* result = job.result + position * job.result_stride + row;
    for (int p = 0; p < P; ++p) {
      const Floats bias = job.bias ? load_first(job.bias + row + p * kLanes, columns(p)) : zeros();
      store_first(result + p * kLanes, add(value(p), bias), columns(p));
    }
  }

  // The base product of the tokens from `position` on, as many as there is room for.
  template <int R>
  void multiply_base(int64_t position, Floats (&acc)[P][R]) {
    multiply_tile(space.amx, tile.weights - tile.block->packed_col * kLanes, tile.block->stride,
                  job.plain_row(position), job.plain_stride, job.partition->packed_cols / S::kGroup, ahead, acc);
  }

  // f(position, sums) for the base product of `count` tokens.
  template <typename F>
  void for_base(int64_t position, int64_t count, F&& f) {
    for_tiles<E>(count, [&](int64_t start, auto room, auto rows) {
      Floats acc[P][room];
      multiply_base(position + start, acc);
      for (int r = 0; r < rows; ++r) f(position + start + r, [&](int p) { return acc[p][r]; });
    });
  }

  // `count` rows of at most R, of a chunk's tokens from first_token on.
  template <int R, typename Count>
  void expand(int64_t first_row, Count count, float (*sums)[kMaxPanels<E>][kLanes], int32_t first_token) {
    const int64_t width = job.width(*tile.block);
    Floats acc[P][R];
    multiply_tile(space.amx, tile.weights - job.lead(*tile.block) * kLanes, tile.block->stride,
                  job.row(*tile.block, first_row), width, width / S::kGroup, ahead, acc);
    add_expanded(first_row, count, acc, sums, first_token);
  }

  // The products of `count` rows times their b, into the sums of a chunk's tokens.
  template <int R, typename Count>
  void add_expanded(int64_t first_row, Count count, const Floats (&acc)[P][R], float (*sums)[kMaxPanels<E>][kLanes],
                    int32_t first_token) const {
    const ExpandRow<E>* info = &job.expanded[first_row];
    // Every row's b is a stream of its own, too many for the hardware to foresee: fetch what the next tile needs.
    for (int r = 0; r < count; ++r) _mm_prefetch(info[r].b + tile.row_start + P * kLanes, _MM_HINT_T0);
    // A token's ranks follow each other: its sum stays in registers until the next token's row.
    for (int p = 0; p < P; ++p) {
      int32_t token = info[0].token;
      Floats sum = load(sums[token - first_token][p]);
      for (int r = 0; r < count; ++r) {
        if (info[r].token != token) {
          store(sums[token - first_token][p], sum);
          token = info[r].token;
          sum = load(sums[token - first_token][p]);
        }
        sum = multiply_add(sum, acc[p][r], load_first(info[r].b + tile.row_start + p * kLanes, columns(p)));
      }
      store(sums[token - first_token][p], sum);
    }
  }

  // The sums before any expanded row, or after the first of them; returns how many.
  int64_t begin_sums(const Chunk& chunk, float (*sums)[kMaxPanels<E>][kLanes]) {
    if constexpr (Amx<E>::kUsed && P == 1)
      if (call.sweeping()) return sweep(chunk, sums);
    std::memset(sums, 0, chunk.num_tokens * sizeof sums[0]);
    if (call.whole)
      for_base(chunk.first_token, chunk.num_tokens, [&](int64_t position, auto&& base) {
        for (int p = 0; p < P; ++p) store(sums[position - chunk.first_token][p], base(p));
      });
    return 0;
  }

  // Base products and the first expanded rows while the panel is read.
  int64_t sweep(const Chunk& chunk, float (*sums)[kMaxPanels<E>][kLanes]) {
    const Block& block = *tile.block;
    const int64_t rows = chunk.num_rows, first = block.packed_col / kAmxColumns;
    Sweep<E> operands;
    operands.whole = job.plain_row(chunk.first_token), operands.whole_stride = job.plain_stride;
    operands.part = job.row(block, chunk.first_row), operands.part_stride = job.width(block);
    operands.whole_tiles = (chunk.num_tokens + kAmxRows - 1) / kAmxRows;
    operands.part_tiles = static_cast<int>(
        std::min<int64_t>((rows + kAmxRows - 1) / kAmxRows, kSweepTiles - operands.whole_tiles));
    operands.steps = job.partition->packed_cols / kAmxColumns;
    operands.part_step = first, operands.part_end = first + job.width(block) / kAmxColumns;
    Floats acc[kSweepTiles][kAmxRows];
    Amx<E>::sweep(space.amx, tile.weights - block.packed_col * kLanes, operands, ahead, acc);
    for (int32_t i = 0; i < chunk.num_tokens; ++i) store(sums[i][0], acc[i / kAmxRows][i % kAmxRows]);
    const int64_t done = std::min<int64_t>(rows, operands.part_tiles * kAmxRows);
    for (int64_t start = 0; start < done; start += kAmxRows) {
      const Floats(&part)[1][kAmxRows] =
          reinterpret_cast<const Floats(&)[1][kAmxRows]>(acc[operands.whole_tiles + start / kAmxRows]);
      add_expanded(chunk.first_row + start, static_cast<int>(std::min<int64_t>(done - start, kAmxRows)), part, sums,
                   chunk.first_token);
    }
    return done;
  }

  void expand_all() {
    float sums[kTokenChunk][kMaxPanels<E>][kLanes];
    for (const Chunk& chunk : job.chunks) {
      const int64_t done = begin_sums(chunk, sums);
      for_tiles<E>(chunk.num_rows - done, [&](int64_t start, auto room, auto count) {
        expand<room>(chunk.first_row + done + start, count, sums, chunk.first_token);
      });
      for (int32_t i = 0; i < chunk.num_tokens; ++i)
        store_result(chunk.first_token + i, [&](int p) { return load(sums[i][p]); });
    }
  }

  // The rows of a group through panels of its own, of elements M, `panel_stride` apart.
  template <typename M>
  void multiply_group(const AloneGroup<E>& group, const M* panels, int64_t panel_stride, Ahead& own) {
    for_tiles<M>(group.num_tokens, [&](int64_t start, auto room, auto count) {
      const int64_t position = group.first_token + start;
      Floats acc[P][room];
      multiply_tile(space.amx, panels, panel_stride, job.plain_row(position) + tile.block->packed_col, job.plain_stride,
                    tile.block->packed_cols / Scheme<M>::kGroup, own, acc);
      if (call.whole) {
        Floats base[P][room];
        multiply_base(position, base);
        for (int p = 0; p < P; ++p)
          for (int r = 0; r < count; ++r) acc[p][r] = add(acc[p][r], base[p][r]);
      }
      for (int r = 0; r < count; ++r) store_result(position + r, [&](int p) { return acc[p][r]; });
    });
  }

  void modulate(const AloneGroup<E>& group) {
    const E* factor = call.factor_b(job.slice, group.slot) + tile.row_start;
    const int64_t stride = call.slices[job.slice].h_out, steps = call.steps(group.rank);
    for (int64_t q = 0; q < steps; ++q) {
      const E* low = factor + q * S::kRanks * stride;
      const E* high = q * S::kRanks + 1 < group.rank ? low + stride : nullptr;
      for (int p = 0; p < P; ++p)
        space.factors[q * P + p] =
            S::factor_rows(low + p * kLanes, high ? high + p * kLanes : nullptr, columns(p));
    }
    const int64_t formed = tile.block->packed_cols * kLanes;
    modulate_panels<P>(tile.weights, tile.block->stride, group.a + tile.block->packed_col, job.partition->packed_cols,
                       space.factors, steps, tile.block->packed_cols, space.panels, formed);
    multiply_group(group, static_cast<const typename S::Formed*>(space.panels), formed, ahead);
  }

  // The panels of dW that belong to the tile's panels of W.
  void multiply_resident(const AloneGroup<E>& group, const Tile<E>& next) {
    const Tile<E>& coming = next.job == tile.job ? next : tile;
    const int64_t panel = coming.block->packed_cols * kLanes;
    Ahead own(group.resident + own_panels(coming), panel, panel, coming.num_panels,
              fetches(group.num_tokens, tile.block->packed_cols));
    multiply_group(group, group.resident + own_panels(tile), tile.block->packed_cols * kLanes, own);
  }

  static int64_t own_panels(const Tile<E>& t) {
    return t.block->alone + t.first_panel * t.block->packed_cols * kLanes;
  }

  // How often the product of so many rows fetches something; at least once.
  static int64_t fetches(int64_t rows, int64_t packed_cols) {
    const int64_t passes = (rows + kTileRows<E> - 1) / kTileRows<E>;
    return std::max<int64_t>(passes * (packed_cols / (S::kGroup * kFetchSteps)), 1);
  }

  // Every product but those of resident blocks reads W, and fetches the next tile's.
  void look_ahead(const Tile<E>& next) {
    const int64_t whole = job.partition->packed_cols;
    int64_t steps = call.whole ? fetches(job.num_tokens(), whole) : 0;
    for (const Chunk& chunk : job.chunks) steps += fetches(chunk.num_rows, tile.block->packed_cols);
    for (const AloneGroup<E>& group : job.groups)
      if (!group.resident) steps += fetches(group.num_tokens, tile.block->packed_cols);
    if (steps == 0) return;
    const int64_t packed = call.whole ? next.block->stride / kLanes : next.block->packed_cols;
    ahead = Ahead(next.weights - (call.whole ? next.block->packed_col * kLanes : 0), packed * kLanes,
                  next.block->stride, next.num_panels, steps);
  }

  void run(const Tile<E>& next) {
    look_ahead(next);
    if (tile.block->cols == 0) {  // rows that belong to no block
      for_base(0, job.num_tokens(), [&](int64_t i, auto&& base) { store_result(i, base); });
      return;
    }
    if (!job.chunks.empty()) expand_all();
    for (const AloneGroup<E>& group : job.groups) {
      if (group.resident)
        multiply_resident(group, next);
      else
        modulate(group);
    }
    if (!job.bare.empty())
      for_base(job.first_bare(), static_cast<int64_t>(job.bare.size()),
               [&](int64_t i, auto&& base) { store_result(i, base); });
  }
};

template <typename E>
static void run_tile(const Call<E>& call, size_t index, Workspace<E>& space) {
  const Tile<E>& t = call.tiles[index];
  const Tile<E>& next = call.tiles[index + 1 < call.tiles.size() ? index + 1 : index];
  dispatch_rows<kMaxPanels<E>>(t.num_panels, [&](auto size) {
    TileRun<size, E>{call, call.jobs[t.job], t, space, {}}.run(next);
  });
}

// A batch of results into y. Only here is y written: blocks interleave in it, so tiles that wrote it themselves would take
// each other's cache lines away.
template <typename E>
static void write_output(const Call<E>& call, const Batch& batch, E* mixed) {
  const Output* outputs = &call.outputs[batch.first];
  const Job<E>& job = call.jobs[outputs->job];
  const Slice<E>& slice = call.slices[job.slice];
  const int32_t* inverse = job.partition->row_inverse;
  const int64_t live = job.partition->live_rows;
  const auto y = [&](int k) { return call.tensors.y + outputs[k].token * call.tensors.y_stride + slice.y_offset; };
  const auto result = [&](int k) { return job.result + outputs[k].position * job.result_stride; };
  if constexpr (kTakesFours<E>)
    if (batch.count == kFour) {
      mix({result(0), result(1), result(2), result(3)}, call.whole ? slice.h_out : live, mixed);
      if (call.whole)
        put_permuted(mixed, inverse, slice.h_out, {y(0), y(1), y(2), y(3)});
      else
        add_permuted(mixed, inverse, live, slice.h_out, {y(0), y(1), y(2), y(3)});
      return;
    }
  if (call.whole)
    put_permuted(y(0), result(0), inverse, slice.h_out);
  else
    add_permuted(y(0), result(0), inverse, live, slice.h_out);
}

constexpr int64_t kBeginBytes = 384 << 10;  // of weights that a thread fetches while x is prepared: a part of its cache

// This thread's share of the first band's panels, which follow each other in the whole weight, in `steps` parts. A guess of
// what it will begin with: tiles go to whoever asks first.
template <typename E>
static Ahead begin_ahead(const Call<E>& call, int64_t steps) {
  if (!call.whole || call.tiles.empty() || steps == 0) return {};
  const Tile<E>& first = call.tiles[0];
  const int64_t band = first.block->panels() * first.block->stride;
  const int64_t share = std::min<int64_t>(band / omp_get_num_threads(), kBeginBytes / sizeof(E));
  const E* begin = first.weights - first.block->packed_col * kLanes + omp_get_thread_num() * share;
  return Ahead(begin, share, 0, 1, steps);
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
  const size_t items = call.source_batches.size() + call.pairings.size() + (call.tensors.bias ? call.jobs.size() : 0);
  // Neighbouring tiles, so that a thread can fetch the next one's weights ahead; enough runs to share them out evenly.
  const size_t run = std::clamp<size_t>(call.tiles.size() / (16 * omp_get_max_threads()), 1, 8);
  std::atomic<size_t> next_item{0}, items_done{0}, next_run{0}, tiles_done{0}, next_output{0};
#pragma omp parallel
  {
    Workspace<E> space = call.workspace(omp_get_thread_num());
    Ahead first = begin_ahead(call, static_cast<int64_t>(call.sources.size()) / omp_get_num_threads());
    for (size_t i; (i = next_item.fetch_add(1, std::memory_order_relaxed)) < items;) {
      prepare_item(call, i, space, first);
      items_done.fetch_add(1, std::memory_order_release);
    }
    wait_for(items_done, items);
    for (size_t i; (i = next_run.fetch_add(run, std::memory_order_relaxed)) < call.tiles.size();) {
      const size_t end = std::min(i + run, call.tiles.size());
      for (size_t tile = i; tile < end; ++tile) run_tile(call, tile, space);
      tiles_done.fetch_add(end - i, std::memory_order_release);
    }
    wait_for(tiles_done, call.tiles.size());
    for (size_t i; (i = next_output.fetch_add(1, std::memory_order_relaxed)) < call.output_batches.size();)
      write_output(call, call.output_batches[i], space.mixed);
  }
}

using Element = SMOA_ELEMENT;

}  // namespace smoa

// What a step does in a layer, to be run as often as it comes; the tables have to stay as long. With `whole` it is the
// layer's output: then every slice needs a partition whose weight is whole, and those of the step's adapters have to be
// these. Else it is the delta.
extern "C" void* smoa_new_call(const smoa::Layer<smoa::Element>* layer, const smoa::Step* step, int64_t whole) {
  return new smoa::Call<smoa::Element>(*layer, *step, whole != 0);
}

extern "C" void smoa_delete_call(void* call) { delete static_cast<smoa::Call<smoa::Element>*>(call); }

// Writes the output, or adds the delta to y. Returns 0, or the bytes of scratch needed when `scratch_bytes` is too small:
// then nothing is written.
//   bias: [H_out] in native order, null for none; of the output.
extern "C" int64_t smoa_run_call(void* handle, smoa::Element* y, int64_t y_stride, const smoa::Element* x,
                                 int64_t x_stride, char* scratch, int64_t scratch_bytes, const smoa::Element* bias) {
  auto& call = *static_cast<smoa::Call<smoa::Element>*>(handle);
  call.tensors = {y, y_stride, x, x_stride, bias};
  const int64_t needed = call.place(scratch);
  if (needed > scratch_bytes) return needed;
  smoa::run(call);
  return 0;
}

// Whether this process may use what the kernel was built for; to be asked before the first call.
extern "C" int64_t smoa_permitted() { return smoa::Amx<smoa::Element>::permitted(); }

// Whether products are made by the tile unit.
extern "C" int64_t smoa_uses_tiles() { return smoa::Amx<smoa::Element>::kUsed; }

// Threads that a call would use.
extern "C" int64_t smoa_threads() { return omp_get_max_threads(); }
