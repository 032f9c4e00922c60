// Four rows of 16-bit elements permuted together: they are mixed first, so that one place of a gather brings all four. Row
// by row a gather takes four times as many places.
#pragma once

#include "vector.h"

namespace smoa {

constexpr int kFour = 4;

#ifdef __AVX512BW__

template <typename E>
constexpr bool kTakesFours = sizeof(E) == 2;

// Of two registers joined, the element that comes to each place: of places 0 to 31 by `at`.
template <typename F>
inline __m512i places(F&& at) {
  alignas(64) uint16_t from[32];
  for (int i = 0; i < 32; ++i) from[i] = static_cast<uint16_t>(at(i));
  return _mm512_load_si512(from);
}

inline __m512i join(__m256i low, __m256i high) { return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1); }

// mixed[i][k] = rows[k][i] for i < n; `mixed` has room for whole steps of sixteen.
template <typename E>
inline void mix(const E* const (&rows)[kFour], int64_t n, E* mixed) {
  const __m512i first = places([](int i) { return i % 4 * 16 + i / 4; });  // elements 0 to 7 of each row
  const __m512i second = _mm512_add_epi16(first, _mm512_set1_epi16(8));
  for (int64_t i = 0; i < n; i += kLanes, mixed += kFour * kLanes) {
    const __mmask16 lanes = first_lanes(n - i);
    const __m512i low = join(_mm256_maskz_loadu_epi16(lanes, rows[0] + i), _mm256_maskz_loadu_epi16(lanes, rows[1] + i));
    const __m512i high = join(_mm256_maskz_loadu_epi16(lanes, rows[2] + i), _mm256_maskz_loadu_epi16(lanes, rows[3] + i));
    _mm512_storeu_si512(mixed, _mm512_permutex2var_epi16(low, first, high));
    _mm512_storeu_si512(mixed + 2 * kLanes, _mm512_permutex2var_epi16(low, second, high));
  }
}

// f(i, lanes, elements) for i = 0, 16, ...: elements[k] holds what row k has at index[i], index[i + 1], ...
template <typename E, typename F>
inline void for_permuted(const E* mixed, const int32_t* index, int64_t n, F&& f) {
  const __m512i low = places([](int i) { return i % 16 * 4 + i / 16; });  // of rows 0 and 1
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(2));
  for (int64_t i = 0; i < n; i += kLanes) {
    const __mmask16 lanes = first_lanes(n - i);
    const __m512i at = _mm512_maskz_loadu_epi32(lanes, index + i);
    const __m512i first = _mm512_i32gather_epi64(_mm512_castsi512_si256(at), mixed, 8);
    const __m512i second = _mm512_i32gather_epi64(_mm512_extracti64x4_epi64(at, 1), mixed, 8);
    const __m512i ab = _mm512_permutex2var_epi16(first, low, second);
    const __m512i cd = _mm512_permutex2var_epi16(first, high, second);
    const __m256i elements[kFour] = {_mm512_castsi512_si256(ab), _mm512_extracti64x4_epi64(ab, 1),
                                     _mm512_castsi512_si256(cd), _mm512_extracti64x4_epi64(cd, 1)};
    f(i, lanes, elements);
  }
}

// rows[k][i] = what row k has at index[i].
template <typename E>
inline void put_permuted(const E* mixed, const int32_t* index, int64_t n, E* const (&rows)[kFour]) {
  for_permuted(mixed, index, n, [&](int64_t i, __mmask16 lanes, const __m256i(&elements)[kFour]) {
    for (int k = 0; k < kFour; ++k) _mm256_mask_storeu_epi16(rows[k] + i, lanes, elements[k]);
  });
}

// rows[k][i] += what row k has at index[i], rounded once, for the i with index[i] < live; the others keep their bits.
template <typename E>
inline void add_permuted(const E* mixed, const int32_t* index, int64_t live, int64_t n, E* const (&rows)[kFour]) {
  const __m512i end = _mm512_set1_epi32(static_cast<int>(live));
  for_permuted(mixed, index, n, [&](int64_t i, __mmask16 lanes, const __m256i(&elements)[kFour]) {
    const __mmask16 inside = _mm512_mask_cmplt_epi32_mask(lanes, _mm512_maskz_loadu_epi32(lanes, index + i), end);
    for (int k = 0; k < kFour; ++k) {
      E* row = rows[k] + i;
      const Floats before = widen(_mm256_maskz_loadu_epi16(inside, row), E{});
      _mm256_mask_storeu_epi16(row, inside, narrow(add(before, widen(elements[k], E{})), E{}));
    }
  });
}

#else

template <typename E>
constexpr bool kTakesFours = false;

#endif

}  // namespace smoa
