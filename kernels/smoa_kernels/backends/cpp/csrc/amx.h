// Products of bf16 panels on the processor's tile unit (AMX). A panel's groups are what the unit takes as they lie: a
// tile is 16 pairs of columns by 16 rows of W.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "ahead.h"

namespace smoa {

constexpr int kAmxRows = 16;     // rows of the other operand in a tile; all are always read
constexpr int kAmxColumns = 32;  // of bf16 in a tile
constexpr int kTilesAhead = 2;   // that are on their way to the nearest cache
constexpr int kSweepTiles = 6;   // of the other operand that one sweep over a panel can take

// What `Amx<E>::sweep` multiplies a panel with: tiles of rows over all columns, then tiles of rows over a part of them.
template <typename E>
struct Sweep {
  const E* whole;
  const E* part;
  int64_t whole_stride, part_stride;
  int whole_tiles, part_tiles;       // kSweepTiles together at most
  int64_t steps, part_step, part_end;  // all columns, and those of `part`, in tiles of kAmxColumns
};

struct NoSession {};

// Element types that the tile unit does not take.
template <typename E>
struct Amx {
  static constexpr bool kUsed = false;
  static bool permitted() { return true; }
  using Session = NoSession;
};

#ifdef __AMX_BF16__

template <>
struct Amx<Bf16> {
  static constexpr bool kUsed = true;

  struct alignas(64) Config {  // what ldtilecfg reads
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t column_bytes[16] = {};
    uint8_t rows[16] = {};
  };

  // Whether the system lets this process use the tiles; asked once, for all of its threads.
  static bool permitted() {
    constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  }

  // Of one thread in one call. Tiles 0 to 3 hold sums, 4 rows of the other operand, 5 pairs of columns; 6 and 7 are 4 and
  // 5 for the columns that are left at the end of a block. A sweep has sums in 0 to 5, pairs of columns in 6, rows in 7.
  // The configuration of before comes back: oneDNN keeps its own on the same threads.
  struct Session {
    Config before;
    int64_t rest = -1;

    Session() { _tile_storeconfig(&before); }
    ~Session() { _tile_loadconfig(&before); }
    Session(const Session&) = delete;
    void configure(int64_t columns) {
      if (columns % 32 == rest) return;
      rest = columns % 32;
      Config config;
      for (int tile = 0; tile < 8; ++tile) config.column_bytes[tile] = 64, config.rows[tile] = 16;
      if (rest) {
        config.column_bytes[6] = static_cast<uint16_t>(2 * rest), config.rows[6] = kAmxRows;
        config.column_bytes[7] = 64, config.rows[7] = static_cast<uint8_t>(rest / 2);
      }
      _tile_loadconfig(&config);
    }
  };

  // Into the nearest cache: a load of a tile that finds nothing there holds up all products after it.
  static void fetch_tile(const Bf16* tile, int64_t row_bytes = 64) {
    for (int row = 0; row < kAmxRows; ++row)
      _mm_prefetch(reinterpret_cast<const char*>(tile) + row_bytes * row, _MM_HINT_T0);
  }

  // acc[p][r] = panel p of W times row r, of kAmxRows rows in memory; see multiply_tile.
  template <int P>
  [[gnu::noinline]] static void multiply(Session& session, const Bf16* w, int64_t panel_stride, const Bf16* rows,
                                         int64_t row_stride, int64_t groups, Ahead& ahead,
                                         Floats (&acc)[P][kAmxRows]) {
    constexpr int64_t kPairs = kFetchSteps, kTile = kPairs * 2 * kLanes;
    session.configure(2 * groups);
    _tile_zero(0);
    if constexpr (P > 1) _tile_zero(1);
    if constexpr (P > 2) _tile_zero(2);
    if constexpr (P > 3) _tile_zero(3);
    const int64_t row_bytes = row_stride * 2, whole = groups / kPairs;
    for (int64_t j = 0; j < whole; ++j, w += kTile, rows += 2 * kPairs) {
      ahead.fetch();
#define SMOA_STEP(panel, left, right)                           \
  if constexpr (P > panel) {                                    \
    fetch_tile(w + panel * panel_stride + kTilesAhead * kTile); \
    _tile_loadd(right, w + panel * panel_stride, 4 * kLanes);   \
    _tile_dpbf16ps(panel, left, right);                         \
  }
      fetch_tile(rows + kTilesAhead * 2 * kPairs, row_bytes);
      _tile_loadd(4, rows, row_bytes);
      SMOA_STEP(0, 4, 5) SMOA_STEP(1, 4, 5) SMOA_STEP(2, 4, 5) SMOA_STEP(3, 4, 5)
    }
    if (groups % kPairs) {
      _tile_loadd(6, rows, row_bytes);
      SMOA_STEP(0, 6, 7) SMOA_STEP(1, 6, 7) SMOA_STEP(2, 6, 7) SMOA_STEP(3, 6, 7)
    }
#undef SMOA_STEP
    _tile_stored(0, acc[0], sizeof(Floats));
    if constexpr (P > 1) _tile_stored(1, acc[1], sizeof(Floats));
    if constexpr (P > 2) _tile_stored(2, acc[2], sizeof(Floats));
    if constexpr (P > 3) _tile_stored(3, acc[3], sizeof(Floats));
  }

  // acc[i] = the panel times tile i of the rows, first those over all columns. Each of its elements is read once.
  static void sweep(Session& session, const Bf16* panel, const Sweep<Bf16>& rows, Ahead& ahead,
                    Floats (&acc)[kSweepTiles][kAmxRows]) {
    session.configure(0);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    _tile_zero(4);
    _tile_zero(5);
    const Bf16* operand[kSweepTiles];
    const int wholes = rows.whole_tiles, all = wholes + rows.part_tiles;
    for (int i = 0; i < wholes; ++i) operand[i] = rows.whole + i * kAmxRows * rows.whole_stride;
    for (int i = wholes; i < all; ++i)
      operand[i] = rows.part + (i - wholes) * kAmxRows * rows.part_stride - rows.part_step * kAmxColumns;
    const int64_t whole_bytes = rows.whole_stride * 2, part_bytes = rows.part_stride * 2;
#define SMOA_STEP(tile)                                                                        \
  if (count > tile) {                                                                          \
    _tile_loadd(7, operand[tile] + j * kAmxColumns, tile < wholes ? whole_bytes : part_bytes); \
    _tile_dpbf16ps(tile, 7, 6);                                                                \
  }
    for (int64_t j = 0; j < rows.steps; ++j) {
      const int count = j >= rows.part_step && j < rows.part_end ? all : wholes;
      ahead.fetch();
      fetch_tile(panel + (j + kTilesAhead) * kAmxColumns * kLanes);
      _tile_loadd(6, panel + j * kAmxColumns * kLanes, 4 * kLanes);
      SMOA_STEP(0) SMOA_STEP(1) SMOA_STEP(2) SMOA_STEP(3) SMOA_STEP(4) SMOA_STEP(5)
    }
#undef SMOA_STEP
    if (all > 0) _tile_stored(0, acc[0], sizeof(Floats));
    if (all > 1) _tile_stored(1, acc[1], sizeof(Floats));
    if (all > 2) _tile_stored(2, acc[2], sizeof(Floats));
    if (all > 3) _tile_stored(3, acc[3], sizeof(Floats));
    if (all > 4) _tile_stored(4, acc[4], sizeof(Floats));
    if (all > 5) _tile_stored(5, acc[5], sizeof(Floats));
  }
};

#endif

}  // namespace smoa
