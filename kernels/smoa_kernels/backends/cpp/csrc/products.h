// The register-tiled products that the delta is made of.
#pragma once

#include "ahead.h"
#include "amx.h"
#include "scheme.h"

namespace smoa {

// Panels that share one pass over the rows of the other operand, and rows of it that one pass takes.
template <typename E>
constexpr int kMaxPanels = Amx<E>::kUsed ? 4 : kRegisters == 32 ? 2 : 1;
template <typename E>
constexpr int kTileRows = Amx<E>::kUsed ? kAmxRows : kRegisters == 32 ? 8 : 5;

// acc[p][r] = panel p of W times row r: sum over the columns.
//   w: panels of `groups` groups, `panel_stride` elements apart.
//   rows: R rows of kGroup * groups elements, `row_stride` elements apart.
//   ahead: memory that is fetched meanwhile.
//   A function of its own, as the compiler else lacks registers for the sums in some of the places that use it.
template <int P, int R, typename E, typename Row>
[[gnu::noinline]] void multiply_in_registers(const E* w, int64_t panel_stride, const Row* rows, int64_t row_stride,
                                     int64_t groups, Ahead& ahead, Floats (&acc)[P][R]) {
  using S = Scheme<E>;
  constexpr int kStep = S::kGroup * kLanes;
  Floats sum[P][R];  // in `acc` itself every step's sums would be stored
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sum[p][r] = zeros();
  const Row* row[R];
  for (int r = 0; r < R; ++r) row[r] = rows + r * row_stride;
  for (int64_t first = 0; first < groups; first += kFetchSteps) {
    ahead.fetch();
    const int64_t end = std::min<int64_t>(first + kFetchSteps, groups);
    for (int64_t j = first; j < end; ++j) {
      const auto part = [&](auto index) {
        typename S::Operand weight[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) weight[p] = S::template weight<index>(w + p * panel_stride + j * kStep);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const auto other = S::template broadcast_row<index>(row[r] + S::kGroup * j);
#pragma GCC unroll 4
          for (int p = 0; p < P; ++p) sum[p][r] = S::multiply_add(sum[p][r], weight[p], other);
        }
      };
      part(std::integral_constant<int, 0>{});
      if constexpr (S::kParts == 2) part(std::integral_constant<int, 1>{});
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[p][r] = sum[p][r];
}

// The same, by what this element type has for it.
template <int P, int R, typename E, typename Row>
inline void multiply_tile(typename Amx<E>::Session& amx, const E* w, int64_t panel_stride, const Row* rows,
                          int64_t row_stride, int64_t groups, Ahead& ahead, Floats (&acc)[P][R]) {
  if constexpr (Amx<E>::kUsed)
    Amx<E>::template multiply<P>(amx, w, panel_stride, rows, row_stride, groups, ahead, acc);
  else
    multiply_in_registers<P, R>(w, panel_stride, rows, row_stride, groups, ahead, acc);
}

// out = W * (B A) for P panels and C columns, a multiple of kGroup; see modulate_panels.
template <int P, int C, typename E>
inline void modulate_columns(const E* w, int64_t panel_stride, const typename Scheme<E>::Factor* a, int64_t a_stride,
                             const typename Scheme<E>::Operand* b, int64_t steps, typename Scheme<E>::Formed* out,
                             int64_t out_stride) {
  using S = Scheme<E>;
  Floats sums[P][C];
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) sums[p][c] = zeros();
  for (int64_t q = 0; q < steps; ++q) {
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) {
      const auto factor = S::spread(a[q * a_stride + c]);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) sums[p][c] = S::multiply_add(sums[p][c], b[q * P + p], factor);
    }
  }
#pragma GCC unroll 4
  for (int p = 0; p < P; ++p)
#pragma GCC unroll 8
    for (int c = 0; c < C; c += S::kGroup)
      S::form(w + p * panel_stride + c * kLanes, &sums[p][c], out + p * out_stride + c * kLanes);
}

// out = W * (B A) for P panels, in both `panel_stride` and `out_stride` elements apart.
//   a: [steps][columns], `a_stride` columns apart; b: [steps][P].
template <int P, typename E>
[[gnu::noinline]] void modulate_panels(const E* w, int64_t panel_stride, const typename Scheme<E>::Factor* a,
                                       int64_t a_stride, const typename Scheme<E>::Operand* b, int64_t steps,
                                       int64_t columns, typename Scheme<E>::Formed* out, int64_t out_stride) {
  constexpr int kColumns = 4, kRest = Scheme<E>::kGroup;
  int64_t j = 0;
  for (; j + kColumns <= columns; j += kColumns)
    modulate_columns<P, kColumns>(w + j * kLanes, panel_stride, a + j, a_stride, b, steps, out + j * kLanes, out_stride);
  for (; j < columns; j += kRest)
    modulate_columns<P, kRest>(w + j * kLanes, panel_stride, a + j, a_stride, b, steps, out + j * kLanes, out_stride);
}

// y[i] += delta[inverse[i]], rounded once, for the i with inverse[i] < live; the others keep their bits.
template <typename E>
inline void add_permuted(E* y, const E* delta, const int32_t* inverse, int64_t live, int64_t size) {
  if (live == size) {
    for (int64_t i = 0; i < size; i += kLanes) {
      const int64_t n = size - i;
      store_first(y + i, add(load_first(y + i, n), gather_first(delta, inverse + i, n)), n);
    }
    return;
  }
  for (int64_t i = 0; i < size; ++i) {
    if (inverse[i] >= live) continue;
    E sum[kLanes];
    store_first(sum, broadcast(widen(y[i]) + widen(delta[inverse[i]])), kLanes);
    y[i] = sum[0];
  }
}

// y[i] = result[inverse[i]].
template <typename E>
inline void put_permuted(E* y, const E* result, const int32_t* inverse, int64_t size) {
  for (int64_t i = 0; i < size; i += kLanes) store_first(y + i, gather_first(result, inverse + i, size - i), size - i);
}

}  // namespace smoa
