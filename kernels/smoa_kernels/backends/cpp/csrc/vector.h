// Sixteen floats in registers, AVX-512 or AVX2, and the element types that are loaded into them.
#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace smoa {

constexpr int kLanes = 16;  // rows of W in a panel: one Floats

struct Bf16 {
  uint16_t bits;
};
struct Fp16 {
  uint16_t bits;
};

#ifdef __AVX512F__

constexpr int kRegisters = 32;  // that hold a Floats

using Floats = __m512;

inline Floats zeros() { return _mm512_setzero_ps(); }
inline Floats broadcast(float v) { return _mm512_set1_ps(v); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats sum, Floats a, Floats b) { return _mm512_fmadd_ps(a, b, sum); }

// Pairs of bf16, one pair a lane: the first or the second of each.
inline Floats first_of_pairs(const Bf16* p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(p), 16));
}
inline Floats second_of_pairs(const Bf16* p) {
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(p), high));
}

inline Floats widen(__m256i v, Bf16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
inline Floats widen(__m256i v, Fp16) { return _mm512_cvtph_ps(v); }

#ifdef __AVX512BF16__
inline __m256i narrow(Floats v, Bf16) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(v)); }
#else
inline __m256i narrow(Floats v, Bf16) {  // to nearest, ties to even; NaN stays NaN
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i half = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF));
  const __m512i rounded = _mm512_srli_epi32(_mm512_add_epi32(bits, half), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_mask_set1_epi32(rounded, nan, 0x7FC0));
}
#endif
inline __m256i narrow(Floats v, Fp16) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline __mmask16 first_lanes(int64_t n) { return n >= kLanes ? 0xFFFF : static_cast<__mmask16>((1u << n) - 1); }

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats v) { _mm512_storeu_ps(p, v); }
inline Floats load_first(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first_lanes(n), p); }
inline void store_first(float* p, Floats v, int64_t n) { _mm512_mask_storeu_ps(p, first_lanes(n), v); }
template <typename E>
inline Floats load_first(const E* p, int64_t n) {
  return widen(_mm256_maskz_loadu_epi16(first_lanes(n), p), E{});
}
template <typename E>
inline void store_first(E* p, Floats v, int64_t n) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), narrow(v, E{}));
}

inline Floats gather_first(const float* from, const int32_t* index, int64_t n) {
  const __mmask16 lanes = first_lanes(n);
  return _mm512_mask_i32gather_ps(zeros(), lanes, _mm512_maskz_loadu_epi32(lanes, index), from, 4);
}
// Whole aligned words, each the element and a neighbour: a word that holds an element lies in its page.
template <typename E>
inline Floats gather_first(const E* from, const int32_t* index, int64_t n) {
  const int odd = (reinterpret_cast<uintptr_t>(from) & 2) != 0;
  const __mmask16 lanes = first_lanes(n);
  const __m512i at = _mm512_add_epi32(_mm512_maskz_loadu_epi32(lanes, index), _mm512_set1_epi32(odd));
  const __m512i words =
      _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), lanes, _mm512_srli_epi32(at, 1), from - odd, 4);
  const __m512i upper = _mm512_slli_epi32(_mm512_and_si512(at, _mm512_set1_epi32(1)), 4);
  return widen(_mm512_cvtepi32_epi16(_mm512_srlv_epi32(words, upper)), E{});
}

#else

constexpr int kRegisters = 8;

struct Floats {
  __m256 lo, hi;
};

inline Floats zeros() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats broadcast(float v) {
  const __m256 all = _mm256_set1_ps(v);
  return {all, all};
}
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
inline Floats multiply(Floats a, Floats b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
inline Floats multiply_add(Floats sum, Floats a, Floats b) {
  return {_mm256_fmadd_ps(a.lo, b.lo, sum.lo), _mm256_fmadd_ps(a.hi, b.hi, sum.hi)};
}

inline __m256i load_bits(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m256 first_of_pairs(__m256i v) { return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16)); }
inline __m256 second_of_pairs(__m256i v) {
  return _mm256_castsi256_ps(_mm256_and_si256(v, _mm256_set1_epi32(static_cast<int>(0xFFFF0000u))));
}
// Pairs of bf16, one pair a lane: the first or the second of each.
inline Floats first_of_pairs(const Bf16* p) {
  return {first_of_pairs(load_bits(p)), first_of_pairs(load_bits(p + kLanes))};
}
inline Floats second_of_pairs(const Bf16* p) {
  return {second_of_pairs(load_bits(p)), second_of_pairs(load_bits(p + kLanes))};
}

inline __m256 widen(__m128i v, Bf16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
inline __m256 widen(__m128i v, Fp16) { return _mm256_cvtph_ps(v); }
inline __m128i narrow(__m256 v, Bf16) {  // to nearest, ties to even; NaN stays NaN
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF));
  const __m256i rounded = _mm256_srli_epi32(_mm256_add_epi32(bits, half), 16);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i kept = _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(kept), _mm256_extracti128_si256(kept, 1));
}
inline __m128i narrow(__m256 v, Fp16) { return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline Floats load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline void store(float* p, Floats v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
template <typename E>
inline Floats load(const E* p) {
  const auto* half = reinterpret_cast<const __m128i*>(p);
  return {widen(_mm_loadu_si128(half), E{}), widen(_mm_loadu_si128(half + 1), E{})};
}
template <typename E>
inline void store(E* p, Floats v) {
  auto* half = reinterpret_cast<__m128i*>(p);
  _mm_storeu_si128(half, narrow(v.lo, E{}));
  _mm_storeu_si128(half + 1, narrow(v.hi, E{}));
}
template <typename E>
inline Floats load_first(const E* p, int64_t n) {
  if (n >= kLanes) return load(p);
  E whole[kLanes] = {};
  std::memcpy(whole, p, static_cast<size_t>(std::max<int64_t>(n, 0)) * sizeof(E));
  return load(whole);
}
template <typename E>
inline void store_first(E* p, Floats v, int64_t n) {
  if (n >= kLanes) return store(p, v);
  E whole[kLanes];
  store(whole, v);
  std::memcpy(p, whole, static_cast<size_t>(std::max<int64_t>(n, 0)) * sizeof(E));
}

inline __m256 gather(const float* from, __m256i index) { return _mm256_i32gather_ps(from, index, 4); }
// Whole aligned words, each the element and a neighbour: a word that holds an element lies in its page.
template <typename E>
inline __m256 gather(const E* from, __m256i index) {
  const int odd = (reinterpret_cast<uintptr_t>(from) & 2) != 0;
  const __m256i at = _mm256_add_epi32(index, _mm256_set1_epi32(odd));
  const __m256i words = _mm256_i32gather_epi32(reinterpret_cast<const int*>(from - odd), _mm256_srli_epi32(at, 1), 4);
  const __m256i upper = _mm256_slli_epi32(_mm256_and_si256(at, _mm256_set1_epi32(1)), 4);
  const __m256i bits = _mm256_and_si256(_mm256_srlv_epi32(words, upper), _mm256_set1_epi32(0xFFFF));
  return widen(_mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1)), E{});
}
// Beyond the first n it gathers the first one again: a value that nobody stores.
template <typename E>
inline Floats gather_first(const E* from, const int32_t* index, int64_t n) {
  int32_t padded[kLanes];
  if (n < kLanes) {
    std::fill(padded, padded + kLanes, index[0]);
    std::memcpy(padded, index, static_cast<size_t>(n) * sizeof(int32_t));
    index = padded;
  }
  return {gather(from, load_bits(index)), gather(from, load_bits(index + 8))};
}

#endif

inline float widen(float v) { return v; }
inline float widen(Bf16 v) {
  const uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline float widen(Fp16 v) { return _cvtsh_ss(v.bits); }

}  // namespace smoa
