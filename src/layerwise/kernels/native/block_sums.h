// Sums of codes times the whole numbers of a few tokens, a block at a time, and what they stand for.
#pragma once

#include "tile_parts.h"

namespace {

struct Scaled {
  Simd::Floats scale, sum;
};

// What a block's sums stand for. What is rounded, and when, is the same on every path. A sum of codes times digits is
// below 255 * 128 * 256 < 2^23, and so is a zero times a sum of digits: both are whole floats, and so is what is between
// them, which makes floats as exact here as integers, and quicker.
template <int kDigits>
LAYERWISE_INLINE Scaled finish(const Matrix& m, const Activations& a, const uint8_t* base, int64_t b, int half,
                               int64_t at, const Simd::Ints* sum) {
  const Simd::Floats zero = m.zero_kind == kZeroByte
                                ? Simd::to_float(Simd::bytes(base + m.places[b].zero + half * kHalf))
                                : Simd::same(float(m.centre));
  Simd::Floats part[kDigits];
  for (int d = 0; d < kDigits; ++d) {
    part[d] = Simd::less(Simd::to_float(sum[d]), zero, Simd::same(a.counts[at * kDigits + d]));
  }
  Simd::Floats s = part[0];
  if constexpr (kDigits > 1) s = Simd::fused(part[1], Simd::same(256.0f), s);
  if constexpr (kDigits > 2) s = Simd::fused(part[2], Simd::same(65536.0f), s);
  if (m.zero_kind == kZeroHalf) {
    const Simd::Floats rest = Simd::minus(half_zero(m, base, b, half), zero);
    s = Simd::minus(s, Simd::times(rest, Simd::same(a.sums[at])));
  }
  return {Simd::times(block_scale(m, base, b, half), Simd::same(a.steps[at])), s};
}

// Sums of one block: kHalves halves from the first unit's at `codes`, kCount tokens. A lone sum would wait for the last
// dot product, so there are several of it.
template <int kBits, int kDigits, int kCount, int kHalves, int kDistance>
struct BlockSums {
  using U = Unit<kBits>;
  static constexpr int kOwn = kHalves * kCount * kDigits;
  static constexpr int kParts = kOwn >= 4 ? 1 : kOwn == 3 ? 2 : 4 / kOwn;
  static constexpr int kUnits = kParts > U::chunks ? kParts / U::chunks : 1;  // at a time: enough chunks for all parts
  Simd::Ints sum[kHalves][kCount][kDigits][kParts];

  // Every index is a number that the compiler knows: an array that a loop counts through would lie in memory.
  template <typename Body>
  static LAYERWISE_INLINE void for_all(Body&& body) {
    each<0, kCount>([&](auto t) __attribute__((always_inline)) {
      each<0, kDigits>([&](auto d) __attribute__((always_inline)) {
        each<0, kHalves>([&](auto h) __attribute__((always_inline)) { body(t, d, h); });
      });
    });
  }

  template <typename Body>
  static LAYERWISE_INLINE void for_totals(Body&& body) {
    each<0, kCount>([&](auto t) __attribute__((always_inline)) {
      each<0, kHalves>([&](auto h) __attribute__((always_inline)) { body(t, h); });
    });
  }

  template <int kUnit>
  LAYERWISE_INLINE void add_unit(const uint8_t* codes, const int8_t* x, int64_t stride) {
    prefetch<2 * U::bytes, kDistance>(codes);
    each<0, U::chunks>([&](auto chunk) __attribute__((always_inline)) {
      constexpr int c = decltype(chunk)::value;
      constexpr int part = (kUnit * U::chunks + c) % kParts;
      Simd::Bytes q[kHalves];
      q[0] = chunk_codes<kBits, c>(codes);
      if constexpr (kHalves > 1) q[1] = chunk_codes<kBits, c>(codes + U::bytes);
      for_all([&](auto t, auto d, auto h) __attribute__((always_inline)) {
        constexpr int digit = decltype(d)::value, half = decltype(h)::value, token = decltype(t)::value;
        Simd::Ints& s = sum[half][token][digit][part];
        s = Simd::template dot<kBits>(s, q[half], x + token * stride + (c * kDigits + digit) * 4);
      });
    });
  }

  LAYERWISE_INLINE void add(const uint8_t* codes, const int8_t* x, int64_t stride, int32_t columns) {
    for_all([&](auto t, auto d, auto h) __attribute__((always_inline)) {
      each<0, kParts>([&](auto p) __attribute__((always_inline)) {
        sum[decltype(h)::value][decltype(t)::value][decltype(d)::value][decltype(p)::value] = Simd::whole(0);
      });
    });
    int32_t k = 0;
    for (; k + kUnits * U::columns <= columns; k += kUnits * U::columns) {
      each<0, kUnits>([&](auto unit) __attribute__((always_inline)) {
        add_unit<decltype(unit)::value>(codes, x, stride);
        codes += 2 * U::bytes, x += U::columns * kDigits;
      });
    }
    if constexpr (kUnits > 1) {
      for (; k < columns; k += U::columns) {
        add_unit<0>(codes, x, stride);
        codes += 2 * U::bytes, x += U::columns * kDigits;
      }
    }
    for_all([&](auto t, auto d, auto h) __attribute__((always_inline)) {
      Simd::Ints* parts = sum[decltype(h)::value][decltype(t)::value][decltype(d)::value];
      each<1, kParts>([&](auto p) __attribute__((always_inline)) {
        parts[0] = Simd::plus(parts[0], parts[decltype(p)::value]);
      });
    });
  }

  // What the sums stand for, added to total(token, half).
  template <typename Total>
  LAYERWISE_INLINE void finish_all(const Matrix& m, const Activations& a, const uint8_t* base, int64_t b, int half,
                                   int64_t token, Total&& total) {
    const int64_t own = b % m.blocks;
    each<0, kCount>([&](auto t) __attribute__((always_inline)) {
      each<0, kHalves>([&](auto h) __attribute__((always_inline)) {
        Simd::Ints whole[kDigits];
        each<0, kDigits>([&](auto d) __attribute__((always_inline)) {
          whole[decltype(d)::value] = sum[decltype(h)::value][decltype(t)::value][decltype(d)::value][0];
        });
        const int64_t at = (token + decltype(t)::value) * a.blocks + own;
        total(t, h, finish<kDigits>(m, a, base, b, half + decltype(h)::value, at, whole));
      });
    });
  }
};

}  // namespace
