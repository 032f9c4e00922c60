// Products of bf16 panels on the processor's tile unit (AMX). A panel's groups are what the unit takes as they lie: a
// tile is 16 pairs of columns by 16 rows of W.
#pragma once

#include <sys/syscall.h>
#include <unistd.h>

#include "ahead.h"

namespace smoa {

constexpr int kAmxRows = 16;  // rows of the other operand in a tile; all are always read

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

  // Of one thread in one call. Tiles 0 to 3 hold sums, 4 rows of the other operand, 5 pairs of columns; 6 and 7 are 4 and 5 for the columns that
  // are left at the end of a block. The configuration of before comes back: oneDNN keeps its own on the same threads.
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
      for (int tile = 0; tile < 6; ++tile) config.column_bytes[tile] = 64, config.rows[tile] = 16;
      if (rest) {
        config.column_bytes[6] = static_cast<uint16_t>(2 * rest), config.rows[6] = kAmxRows;
        config.column_bytes[7] = 64, config.rows[7] = static_cast<uint8_t>(rest / 2);
      }
      _tile_loadconfig(&config);
    }
  };

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
#define SMOA_STEP(panel, left, right)                          \
  if constexpr (P > panel) {                                   \
    _tile_loadd(right, w + panel * panel_stride, 4 * kLanes);  \
    _tile_dpbf16ps(panel, left, right);                        \
  }
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
};

#endif

}  // namespace smoa
