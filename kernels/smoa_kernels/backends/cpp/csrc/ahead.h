// Memory that is fetched while something else is multiplied.
#pragma once

#include "vector.h"

namespace smoa {

constexpr int kFetchSteps = 16;  // groups of columns between two calls of fetch(): a step of the tile unit

// The panels of the tile that comes next, a few lines at every step of the products of this one: so memory is read all
// the time, by products that find everything in the cache too.
struct Ahead {
  static constexpr int64_t kLine = 64;
  const char* next = nullptr;
  int64_t left = 0, size = 0, gap = 0, panels = 0;  // bytes of this panel, of each, between two; panels after this one
  int64_t lines = 0;                                // of one step

  Ahead() = default;
  // Panels of `panel` elements, `stride` apart, for `steps` calls of fetch().
  template <typename E>
  Ahead(const E* weights, int64_t panel, int64_t stride, int64_t num_panels, int64_t steps)
      : next(reinterpret_cast<const char*>(weights)), left(panel * static_cast<int64_t>(sizeof(E))), size(left),
        gap((stride - panel) * static_cast<int64_t>(sizeof(E))), panels(num_panels - 1),
        lines((num_panels * ((size + kLine - 1) / kLine) + steps - 1) / steps) {}

  void fetch() {
    for (int64_t i = 0; i < lines; ++i) {
      if (left <= 0) {
        if (panels <= 0) return;
        --panels, next += gap + left, left = size;  // `left` is negative where a panel does not end with its last line
      }
      _mm_prefetch(next, _MM_HINT_T1);
      next += kLine, left -= kLine;
    }
  }
};

}  // namespace smoa
