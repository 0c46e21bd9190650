// Activations, brought into the order of the blocks: as they are, or as digits. Compiled for every instruction set, with
// nothing in it that one of them would round differently, so that all paths multiply the same integers.
#pragma once

#include <math.h>
#include <string.h>

#include "layout.h"
#include "tile_parts.h"

namespace {

using namespace layerwise;

void spread(const float* x, const Block& block, float* to) {
  memcpy(to, x + block.column, size_t(block.length) * sizeof(float));
  for (int k = block.length; k < block.padded; ++k) to[k] = 0.0f;
}

// max |x| as the bits of a float, which are in the order of the floats; what is not finite is the largest.
static inline uint32_t largest_of(const float* x, int length) {
  uint32_t largest = 0;
  for (int k = 0; k < length; ++k) {
    uint32_t bits;
    memcpy(&bits, x + k, 4);
    bits &= 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

static inline float rounded(float v) {  // to a whole number, ties to even; |v| < 2^22
  const float magic = 12582912.0f;  // 1.5 * 2^23
  return (v + magic) - magic;
}

static inline int32_t within(int32_t v, int32_t most) { return v > most ? most : v < -most ? -most : v; }

// One digit of a block. The sum with 1.5 * 2^23 holds the whole number in its low bits; none is beyond 127, since it is
// 127 times the share of the largest.
static inline void one_digit(const float* x, const Block& block, float inverse, int8_t* to, float* count) {
  const float* from = x + block.column;
  const Simd::Floats by = Simd::same(inverse), magic = Simd::same(12582912.0f);
  const Simd::Ints bottom = Simd::whole(0x4b400000);
  Simd::Ints sums = Simd::whole(0);
  int k = 0;
  for (; k + kHalf <= block.length; k += kHalf) {
    const Simd::Ints digits = Simd::minus(Simd::bits(Simd::plus(Simd::times(Simd::floats(from + k), by), magic)), bottom);
    sums = Simd::plus(sums, digits);
    Simd::keep_low(to + k, digits);
  }
  int32_t sum = Simd::sum(sums);
  for (; k < block.length; ++k) {
    to[k] = int8_t(rounded(from[k] * inverse));
    sum += to[k];
  }
  memset(to + k, 0, size_t(block.padded - k));
  *count = float(sum);
}

// The digits of a block, the lowest first, each for itself.
template <int kDigits>
struct Digits {
  alignas(kLine) int8_t of[kDigits][kLongestBlock];
};

// Whole numbers of one block, as digits from -128 to 127.
template <int kDigits>
static inline void block_digits(const float* x, const Block& block, float inverse, Digits<kDigits>& to, float* counts) {
  auto& digit = to.of;
  int32_t count[3] = {};
  for (int k = 0; k < block.length; ++k) {
    const float v = x[block.column + k] * inverse;
    if constexpr (kDigits == 2) {
      const int32_t whole = within(int32_t(rounded(v)), 32639);
      const int32_t high = (whole + 128) >> 8;
      digit[1][k] = int8_t(high);
      digit[0][k] = int8_t(whole - high * 256);
    } else {
      const int32_t upper = within(int32_t(rounded(v * 0.00390625f)), 32639);
      const int32_t high = (upper + 128) >> 8;
      digit[2][k] = int8_t(high);
      digit[1][k] = int8_t(upper - high * 256);
      digit[0][k] = int8_t(within(int32_t(rounded(v - float(upper) * 256.0f)), 127));
    }
  }
  for (int d = 0; d < kDigits; ++d) {
    for (int k = 0; k < block.length; ++k) count[d] += digit[d][k];
    memset(digit[d] + block.length, 0, size_t(block.padded - block.length));
    counts[d] = float(count[d]);
  }
}

// The digits of one block and their sums. Returns the step.
template <int kDigits>
static inline float digits_of(const float* x, const Block& block, Digits<kDigits>& to, float* counts) {
  constexpr float kTop = kDigits == 1 ? 127.0f : kDigits == 2 ? 32639.0f : 8355711.0f;  // every digit 127
  const uint32_t bits = largest_of(x + block.column, block.length);
  float largest;
  memcpy(&largest, &bits, 4);
  // Below the least size 1 / step would overflow: such a block counts as zeros. A step of NaN, where a value is not
  // finite, reaches every output of the token.
  const bool finite = bits < 0x7f800000u, counted = finite && largest >= 1e-30f;
  if (!counted) {
    for (int d = 0; d < kDigits; ++d) {
      memset(to.of[d], 0, size_t(block.padded));
      counts[d] = 0.0f;
    }
    return finite ? 0.0f : NAN;
  }
  if constexpr (kDigits == 1) {
    one_digit(x, block, kTop / largest, to.of[0], counts);
  } else {
    block_digits<kDigits>(x, block, kTop / largest, to, counts);
  }
  return largest / kTop;
}

template <int kDigits>
static inline float whole_sum(const float* counts) {
  float sum = counts[0];
  if constexpr (kDigits > 1) sum += counts[1] * 256.0f;
  if constexpr (kDigits > 2) sum += counts[2] * 65536.0f;
  return sum;
}

// Four columns of every digit of a token in turn, `apart` bytes between them.
template <int kDigits>
static inline void interleave(const Digits<kDigits>& digits, int32_t columns, int64_t apart, uint32_t flip, int8_t* to) {
#pragma GCC unroll 4
  for (int32_t k = 0; k < columns; k += 4) {
    for (int d = 0; d < kDigits; ++d, to += apart) {
      uint32_t four;
      memcpy(&four, digits.of[d] + k, 4);
      four ^= flip;
      memcpy(to, &four, 4);
    }
  }
}

template <int kDigits>
void token_digits(const Matrix& m, const float* x, int64_t token, const Activations& a) {
  Digits<kDigits> digits;
  for (int64_t b = 0; b < m.blocks; ++b) {
    const int64_t at = token * a.blocks + b;
    int8_t* to = a.codes + token * a.stride + m.block[b].place * kDigits;
    a.steps[at] = digits_of<kDigits>(x, m.block[b], digits, a.counts + at * kDigits);
    if constexpr (kDigits == 1) {
      memcpy(to, digits.of[0], size_t(m.block[b].padded));
    } else {
      interleave<kDigits>(digits, m.block[b].padded, 4, 0, to);
    }
    a.sums[at] = whole_sum<kDigits>(a.counts + at * kDigits);
  }
}

// The same for panels: four bytes of a token, then those of the tokens that lie beside it. Tokens first .. last-1 of one
// set, some blocks at a time: few enough for the lines that the tokens share to stay in the first cache, and enough for
// each token's values to be read in runs. Those of the next token are asked for meanwhile.
template <int kDigits>
void tokens_beside(const Matrix& m, const float* x, int64_t stride, int64_t first, int64_t last, const Activations& a) {
  constexpr int kTogether = side_by_side(kDigits), kBand = 8;
  constexpr int kFloats = kLine / int(sizeof(float));
  const uint32_t flip = meets_signed(a) ? 0x80808080u : 0;  // by 128
  Digits<kDigits> digits;
  const int64_t set = first / kTogether;
  for (int64_t band = 0; band < m.blocks; band += kBand) {
    for (int64_t t = first; t < last; ++t) {
      const float *own = x + t * stride, *next = t + 1 < last ? own + stride : own;
      for (int64_t b = band; b < m.blocks && b < band + kBand; ++b) {
        const Block& block = m.block[b];
        for (int k = 0; k < block.length; k += kFloats) __builtin_prefetch(next + block.column + k, 0, 3);
        const int64_t in = t - set * kTogether, at = (b * a.sets + set) * kTogether;
        float counts[kDigits];
        a.steps[at + in] = digits_of<kDigits>(own, block, digits, counts);
        a.sums[at + in] = whole_sum<kDigits>(counts);
        for (int d = 0; d < kDigits; ++d) a.whole[at * kDigits + d * kTogether + in] = int32_t(counts[d]);
        int8_t* to = a.codes + (block.place * a.sets + block.padded * set) * kDigits * kTogether + 4 * in;
        interleave<kDigits>(digits, block.padded, 4 * kTogether, flip, to);
      }
    }
  }
}

template <int kDigits>
void tokens_of(const Matrix& m, const float* x, int64_t stride, int64_t first, int64_t last, const Activations& a) {
  if (a.together == 0) {
    for (int64_t t = first; t < last; ++t) token_digits<kDigits>(m, x + t * stride, t, a);
    return;
  }
  for (int64_t t = first; t < last;) {
    const int64_t next = (t / a.together + 1) * a.together, end = next < last ? next : last;
    tokens_beside<kDigits>(m, x, stride, t, end, a);
    t = end;
  }
}

void quantize(const Matrix& m, const float* x, int64_t stride, int64_t first, int64_t last, const Activations& a) {
  if (a.digits == 1) return tokens_of<1>(m, x, stride, first, last, a);
  if (a.digits == 2) return tokens_of<2>(m, x, stride, first, last, a);
  if (a.digits == 3) return tokens_of<3>(m, x, stride, first, last, a);
  for (int64_t t = first; t < last; ++t) {
    for (int64_t b = 0; b < m.blocks; ++b) spread(x + t * stride, m.block[b], a.values + t * a.stride + m.block[b].place);
  }
}

}  // namespace
