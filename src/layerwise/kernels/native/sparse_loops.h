// Products with matrices of which some entries are kept, straight from a mask and the run of kept values: sixteen columns
// at a time the values that belong to them are spread to their lanes, zero elsewhere, and meet the activations of some
// tokens. Lane j sums the columns j, 16 + j, ... in order, products and sums rounded one by one, and the lanes are added
// in pairs: the bits are the same on every path, for any number of tokens and of threads.
#pragma once

#include "tile_parts.h"

namespace {

LAYERWISE_INLINE float lane_sum(Simd::Floats v) {
  float lanes[kHalf];
  Simd::store(lanes, v);
  for (int width = kHalf / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  return lanes[0];
}

// Rows row .. row + kBeside-1 and tokens token .. token + kCount-1: an activation is loaded once for all these rows.
template <int kKind, int kCount, int kBeside>
void sparse_rows(const Sparse& m, const float* x, int64_t stride, int64_t token, int64_t row, const Output& out) {
  constexpr int kBytes = kKind == kCodeValues ? 1 : 2;
  Simd::Floats total[kBeside][kCount];
  const uint8_t* at[kBeside];
  const uint16_t* mask[kBeside];
#pragma GCC unroll 8
  for (int r = 0; r < kBeside; ++r) {
    at[r] = m.values + m.starts[row + r] * kBytes;
    mask[r] = m.mask + (row + r) * m.words;
#pragma GCC unroll 8
    for (int t = 0; t < kCount; ++t) total[r][t] = Simd::same(0.0f);
  }
  // The rows after these are asked for while these are multiplied: so many streams at once are not seen as such.
  const int64_t ahead = row + 2 * kBeside <= m.rows ? (m.starts[row + kBeside] - m.starts[row]) * kBytes : 0;
  const Simd::Ints low = Simd::whole((1 << (m.bits - 1)) - 1);
  const int up = 32 - int(m.bits);
  const float* from = x + token * stride;
  for (int64_t g = 0; g < m.groups; ++g) {
    const int64_t first = g * m.group_words, last = first + m.group_words < m.words ? first + m.group_words : m.words;
    Simd::Floats sum[kBeside][kCount], floor[kBeside];
#pragma GCC unroll 8
    for (int r = 0; r < kBeside; ++r) {
      floor[r] = Simd::same(kKind == kCodeValues ? m.floor[(row + r) * m.groups + g] : 0.0f);
#pragma GCC unroll 8
      for (int t = 0; t < kCount; ++t) sum[r][t] = Simd::same(0.0f);
    }
    for (int64_t word = first; word < last; ++word) {
      Simd::Floats w[kBeside];
#pragma GCC unroll 8
      for (int r = 0; r < kBeside; ++r) {
        const uint32_t kept = mask[r][word];
        __builtin_prefetch(at[r] + ahead, 0, 2);
        w[r] = Simd::template kept<kKind>(at[r], kept, low, up, floor[r]);
        at[r] += __builtin_popcount(kept) * kBytes;
      }
#pragma GCC unroll 8
      for (int t = 0; t < kCount; ++t) {
        const Simd::Floats own = Simd::floats(from + t * stride + word * kHalf);
#pragma GCC unroll 8
        for (int r = 0; r < kBeside; ++r) sum[r][t] = Simd::plus(sum[r][t], Simd::times(w[r], own));
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kBeside; ++r) {
      const Simd::Floats scale = Simd::same(kKind == kCodeValues ? m.scale[(row + r) * m.groups + g] : 1.0f);
#pragma GCC unroll 8
      for (int t = 0; t < kCount; ++t) total[r][t] = Simd::plus(total[r][t], Simd::times(scale, sum[r][t]));
    }
  }
  for (int r = 0; r < kBeside; ++r) {
    const float bias = out.bias != nullptr ? out.bias[row + r] : 0.0f;
    for (int t = 0; t < kCount; ++t) out.y[(token + t) * out.stride + row + r] = lane_sum(total[r][t]) + bias;
  }
}

template <int kKind, int kCount>
void sparse_tokens(const Sparse& m, const float* x, int64_t stride, int64_t token, int64_t first, int64_t last,
                   const Output& out) {
  constexpr int kBeside = kCount > 1 ? 2 : 4;
  int64_t row = first;
  for (; row + kBeside <= last; row += kBeside) sparse_rows<kKind, kCount, kBeside>(m, x, stride, token, row, out);
  for (; row < last; ++row) sparse_rows<kKind, kCount, 1>(m, x, stride, token, row, out);
}

template <int kKind>
void sparse_kind(const Sparse& m, const float* x, int64_t stride, int64_t tokens, int64_t first, int64_t last,
                 const Output& out) {
  int64_t t = 0;
  if constexpr (Simd::kSparseTokens >= 8)
    for (; t + 8 <= tokens; t += 8) sparse_tokens<kKind, 8>(m, x, stride, t, first, last, out);
  if constexpr (Simd::kSparseTokens >= 4)
    for (; t + 4 <= tokens; t += 4) sparse_tokens<kKind, 4>(m, x, stride, t, first, last, out);
  if constexpr (Simd::kSparseTokens >= 2)
    for (; t + 2 <= tokens; t += 2) sparse_tokens<kKind, 2>(m, x, stride, t, first, last, out);
  for (; t < tokens; ++t) sparse_tokens<kKind, 1>(m, x, stride, t, first, last, out);
}

void sparse(const Sparse& m, const float* x, int64_t stride, int64_t tokens, int64_t first, int64_t last,
            const Output& out) {
  if (m.kind == kHalfValues) return sparse_kind<kHalfValues>(m, x, stride, tokens, first, last, out);
  if (m.kind == kBrainValues) return sparse_kind<kBrainValues>(m, x, stride, tokens, first, last, out);
  sparse_kind<kCodeValues>(m, x, stride, tokens, first, last, out);
}

}  // namespace
