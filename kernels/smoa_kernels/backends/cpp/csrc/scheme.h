// How panels of W are multiplied and modulated, by element type: what differs between the element types is here.
//
// A group is the columns of a row of W that lie side by side in a panel, [groups][16 rows][kGroup columns]. It takes
// kParts steps to multiply one with the same columns of the other operand, whose elements are of type Row.
#pragma once

#include "vector.h"

namespace smoa {

// W * (B A) is formed in fp32 and stays so.
template <typename Element>
struct FloatScheme {
  using Row = float;
  using Formed = float;
  using Operand = Floats;
  using Factor = float;
  static constexpr int kRanks = 1;  // ranks that one step of forming takes
  static Floats multiply_add(Floats sum, Floats a, Floats b) { return smoa::multiply_add(sum, a, b); }
  static Factor join(Element low, Element) { return widen(low); }
  static Operand spread(Factor f) { return broadcast(f); }
  static Operand factor_rows(const Element* low, const Element*, int64_t n) { return load_first(low, n); }
};

// Any type that a load widens to a Floats: one column a group.
template <typename E>
struct Scheme : FloatScheme<E> {
  static constexpr int kGroup = 1, kParts = 1;
  template <int>
  static Floats weight(const E* p) {
    return load_first(p, kLanes);
  }
  template <int>
  static Floats broadcast_row(const float* p) {
    return broadcast(*p);
  }
  static void form(const E* w, const Floats* sums, float* out) { store(out, multiply(sums[0], weight<0>(w))); }
};

#ifdef __AVX512BF16__

// bf16 by dot products of pairs.
template <>
struct Scheme<Bf16> {
  using Row = Bf16;
  using Formed = Bf16;
  using Operand = __m512i;
  using Factor = uint32_t;
  static constexpr int kGroup = 2, kParts = 1, kRanks = 2;
  static Floats multiply_add(Floats sum, Operand a, Operand b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
  }
  template <int>
  static Operand weight(const Bf16* p) {
    return _mm512_loadu_si512(p);
  }
  template <int>
  static Operand broadcast_row(const Bf16* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    return _mm512_set1_epi32(pair);
  }
  static Factor join(Bf16 low, Bf16 high) { return low.bits | static_cast<uint32_t>(high.bits) << 16; }
  static Operand spread(Factor f) { return _mm512_set1_epi32(static_cast<int>(f)); }
  static Operand interleave(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
  }
  static Operand factor_rows(const Bf16* low, const Bf16* high, int64_t n) {
    const __mmask16 lanes = first_lanes(n);
    return interleave(_mm256_maskz_loadu_epi16(lanes, low),
                      high ? _mm256_maskz_loadu_epi16(lanes, high) : _mm256_setzero_si256());
  }
  static void form(const Bf16* w, const Floats* sums, Bf16* out) {
    const Floats first = multiply(sums[0], first_of_pairs(w)), second = multiply(sums[1], second_of_pairs(w));
    _mm512_storeu_si512(out, interleave(narrow(first, Bf16{}), narrow(second, Bf16{})));
  }
};

#else

// bf16 pairs, each half widened by one instruction.
template <>
struct Scheme<Bf16> : FloatScheme<Bf16> {
  static constexpr int kGroup = 2, kParts = 2;
  template <int part>
  static Floats weight(const Bf16* p) {
    return part == 0 ? first_of_pairs(p) : second_of_pairs(p);
  }
  template <int part>
  static Floats broadcast_row(const float* p) {
    return broadcast(p[part]);
  }
  static void form(const Bf16* w, const Floats* sums, float* out) {
    store(out, multiply(sums[0], first_of_pairs(w)));
    store(out + kLanes, multiply(sums[1], second_of_pairs(w)));
  }
};

#endif

}  // namespace smoa
