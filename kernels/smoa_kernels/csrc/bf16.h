// bfloat16 arithmetic in AVX-512 registers, and the register-tiled products that the delta is made of.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace smoa {

using bf16 = uint16_t;

constexpr int kLanes = 16;     // rows of W in a panel: one fp32 register
constexpr int kMaxPanels = 2;  // panels that share one pass over the rows of the other operand

// Rows per register tile, by number of panels: panels * rows accumulators must leave room for the operands.
constexpr int max_tile_rows(int panels) { return panels == 4 ? 6 : 8; }

inline __m512 widen(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}

inline __m256i narrow(__m512 v) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }

inline float widen(bf16 v) {
  uint32_t bits = static_cast<uint32_t>(v) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}

inline __mmask16 first_lanes(int64_t n) { return n >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << n) - 1); }

inline __m256i load_lanes(const bf16* p, __mmask16 lanes) { return _mm256_maskz_loadu_epi16(lanes, p); }

// Two bf16 vectors as pairs (lo, hi) per 32-bit lane, the operand layout of vdpbf16ps.
inline __m512i interleave(__m256i lo, __m256i hi) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(lo), _mm512_slli_epi32(_mm512_cvtepu16_epi32(hi), 16));
}

inline __m512 dot_pairs(__m512 acc, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}

inline __m512i broadcast_pair(const bf16* p) {
  int32_t pair;
  std::memcpy(&pair, p, sizeof pair);
  return _mm512_set1_epi32(pair);
}

// acc[p][r] = panel p of W times row r: sum over column pairs.
//   w: panels of [pairs][16 rows][2 columns], `panel_stride` elements apart.
//   rows: R rows of 2 * pairs elements, `row_stride` elements apart.
//   ahead: memory that is fetched meanwhile, one line per pair.
template <int P, int R>
inline void multiply_tile(const bf16* w, int64_t panel_stride, const bf16* rows, int64_t row_stride, int64_t pairs,
                          const bf16* ahead, __m512 (&acc)[P][R]) {
  for (int p = 0; p < P; ++p)
    for (int r = 0; r < R; ++r) acc[p][r] = _mm512_setzero_ps();
  const bf16* row[R];
  for (int r = 0; r < R; ++r) row[r] = rows + r * row_stride;
  for (int64_t j = 0; j < pairs; ++j) {
    _mm_prefetch(ahead + j * 2 * kLanes, _MM_HINT_T1);
    __m512i weight[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) weight[p] = _mm512_loadu_si512(w + p * panel_stride + j * 2 * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i pair = broadcast_pair(row[r] + 2 * j);
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) acc[p][r] = dot_pairs(acc[p][r], weight[p], pair);
    }
  }
}

// out = W * (B A) for P panels, in the layout of w, rounded once.
//   a: rank pairs of [columns] 32-bit pairs, `a_stride` columns apart; b: [rank pairs][P][16] 32-bit pairs.
template <int P>
inline void modulate_panels(const bf16* w, int64_t panel_stride, const uint32_t* a, int64_t a_stride, const __m512i* b,
                            int rank_pairs, int64_t pairs, bf16* out) {
  const __m512i odd_mask = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  for (int64_t j = 0; j < pairs; ++j) {
    __m512 even[P], odd[P];
    for (int p = 0; p < P; ++p) even[p] = odd[p] = _mm512_setzero_ps();
    for (int q = 0; q < rank_pairs; ++q) {
      const __m512i a_even = _mm512_set1_epi32(static_cast<int>(a[q * a_stride + 2 * j]));
      const __m512i a_odd = _mm512_set1_epi32(static_cast<int>(a[q * a_stride + 2 * j + 1]));
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) {
        even[p] = dot_pairs(even[p], b[q * P + p], a_even);
        odd[p] = dot_pairs(odd[p], b[q * P + p], a_odd);
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const __m512i weight = _mm512_loadu_si512(w + p * panel_stride + j * 2 * kLanes);
      const __m512 w_even = _mm512_castsi512_ps(_mm512_slli_epi32(weight, 16));
      const __m512 w_odd = _mm512_castsi512_ps(_mm512_and_si512(weight, odd_mask));
      const __m512i product = interleave(narrow(_mm512_mul_ps(even[p], w_even)), narrow(_mm512_mul_ps(odd[p], w_odd)));
      _mm512_storeu_si512(out + (p * pairs + j) * 2 * kLanes, product);
    }
  }
}

// y[i] += delta[inverse[i]], rounded once, for the i with inverse[i] < live; the others keep their bits.
//   gathered: room for `size` elements. A second pass over it, as a vector load right after the narrow stores it covers
//   would wait for them to reach the cache.
inline void add_permuted(bf16* y, const bf16* delta, const int64_t* inverse, int64_t live, int64_t size,
                         bf16* gathered) {
  for (int64_t i = 0; i < size; ++i) gathered[i] = delta[inverse[i]];
  const __m512i limit = _mm512_set1_epi64(live);
  for (int64_t i = 0; i < size; i += kLanes) {
    const __mmask16 lanes = first_lanes(size - i);
    const auto low = static_cast<__mmask8>(lanes), high = static_cast<__mmask8>(lanes >> 8);
    const __m512i first = _mm512_maskz_loadu_epi64(low, inverse + i);
    const __m512i second = _mm512_maskz_loadu_epi64(high, inverse + i + 8);
    const unsigned low_live = _mm512_mask_cmplt_epi64_mask(low, first, limit);
    const unsigned high_live = _mm512_mask_cmplt_epi64_mask(high, second, limit);
    const __m512 sum = _mm512_add_ps(widen(load_lanes(y + i, lanes)), widen(load_lanes(gathered + i, lanes)));
    _mm256_mask_storeu_epi16(y + i, static_cast<__mmask16>(low_live | high_live << 8), narrow(sum));
  }
}

}  // namespace smoa
