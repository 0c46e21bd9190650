// The products of one tile, written once over `Simd`, which every instruction set's file defines before it includes
// this. All of it is in the anonymous namespace, so that each file has copies of its own.
//
// Simd gives:  Floats, Ints (16 lanes), Bytes (64 bytes: 16 lanes of 4);  kChains (float sums per token), kTokens
// (tokens at a time from float activations), kSums (int32 sums at a time, decided like both by the number of registers),
// kHalves (registers of a tile at a time: 2 where an activation is worth loading once for both);  loads, broadcasts,
// fma, dot, and Weights.
#pragma once

#include "block_sums.h"
#include "panel_loops.h"
#include "tile_parts.h"
#include "trellis_loops.h"

namespace {

// ---------------------------------------------------------------- places in a table times floats

// y = sum over blocks of s sum_k levels[q] x, the scale once per block.
template <int kCount>
void table_tile(const Matrix& m, const Activations& a, int64_t tile, int64_t token, const Output& out) {
  using U = Unit<4>;
  const uint8_t* base = m.data + tile * m.tile_bytes;
  const Simd::Weights<4, true> weights(m);
  for (int half = 0; half < 2; ++half) {
    Simd::Floats total[kCount];
    for (int t = 0; t < kCount; ++t) total[t] = Simd::same(0.0f);
    const int64_t all = int64_t(m.planes) * m.blocks;
    for (int64_t b = 0; b < all; ++b) {
      const Block& block = m.block[b % m.blocks];
      const uint8_t* codes = base + m.places[b].codes + half * U::bytes;
      const float* x = a.values + token * a.stride + block.place;
      Simd::Floats sum[kCount][Simd::kChains];
      for (int t = 0; t < kCount; ++t)
        for (int c = 0; c < Simd::kChains; ++c) sum[t][c] = Simd::same(0.0f);
      for (int32_t k = 0; k < block.padded; k += U::columns, codes += 2 * U::bytes, x += U::columns) {
        if (half == 0) prefetch<2 * U::bytes, kAhead<8>>(codes);
        each<0, U::chunks>([&](auto chunk) __attribute__((always_inline)) {
          constexpr int c = decltype(chunk)::value;
          const auto prepared = weights.prepare(chunk_codes<4, c>(codes));
          each<0, 4>([&](auto column) __attribute__((always_inline)) {
            constexpr int j = decltype(column)::value;
            const Simd::Floats w = weights.template column<j>(prepared);
#pragma GCC unroll 8
            for (int t = 0; t < kCount; ++t) {
              Simd::Floats& s = sum[t][j % Simd::kChains];
              s = Simd::fma(w, Simd::same(x[t * a.stride + 4 * c + j]), s);
            }
          });
        });
      }
      const Simd::Floats scale = block_scale(m, base, b, half);
      for (int t = 0; t < kCount; ++t) total[t] = Simd::fma(scale, Simd::sum_chains(sum[t]), total[t]);
    }
    for (int t = 0; t < kCount; ++t) store_rows(m, tile, half, total[t], out, token + t);
  }
}

// ---------------------------------------------------------------- codes times whole numbers

// A few tokens: the codes are decoded for each of them again, in registers.
template <int kBits, int kDigits, int kCount>
void few_tokens(const Matrix& m, const Activations& a, int64_t tile, int64_t token, const Output& out) {
  constexpr int kHalves = Simd::kHalves, kDistance = kAhead<dots_of_line(kBits) * kDigits * kCount>;
  using Sums = BlockSums<kBits, kDigits, kCount, kHalves, kDistance>;
  const uint8_t* base = m.data + tile * m.tile_bytes;
  const int64_t all = int64_t(m.planes) * m.blocks;
  for (int half = 0; half < 2; half += kHalves) {
    Simd::Floats total[kCount][kHalves];
    Sums::for_totals([&](auto t, auto h) __attribute__((always_inline)) {
      total[decltype(t)::value][decltype(h)::value] = Simd::same(0.0f);
    });
    for (int64_t b = 0; b < all; ++b) {
      const Block& block = m.block[b % m.blocks];
      const uint8_t* codes = base + m.places[b].codes;
      if (half == 0 && b % 2 == 0) prefetch<3 * kLine, kDistance>(base + m.places[b].scale);
      const int8_t* x = a.codes + token * a.stride + block.place * kDigits;
      Sums sums;
      sums.add(codes + half * Unit<kBits>::bytes, x, a.stride, block.padded);
      sums.finish_all(m, a, base, b, half, token, [&](auto t, auto h, Scaled v) __attribute__((always_inline)) {
        Simd::Floats& own = total[decltype(t)::value][decltype(h)::value];
        own = Simd::fused(v.scale, v.sum, own);
      });
    }
    Sums::for_totals([&](auto t, auto h) __attribute__((always_inline)) {
      store_rows(m, tile, half + decltype(h)::value, total[decltype(t)::value][decltype(h)::value],
                 out, token + decltype(t)::value);
    });
  }
}

// ---------------------------------------------------------------- the matrix itself

// Values as the stored form defines them, (q - z) * s in float32 and planes added in order: equal to it bit for bit.
template <int kBits, bool kTable>
void decode_tile(const Matrix& m, int64_t tile, float* y, int64_t stride) {
  using U = Unit<kBits>;
  const uint8_t* base = m.data + tile * m.tile_bytes;
  const Simd::Weights<kBits, kTable> weights(m);
  const int64_t all = int64_t(m.planes) * m.blocks;
  for (int64_t b = 0; b < all; ++b) {
    const Block& block = m.block[b % m.blocks];
    const bool more = b >= m.blocks;
    const uint8_t* first = base + m.places[b].codes;
    alignas(kLine) uint8_t wide[kBits == 8 ? kLongestBlock * kRows : 1];
    if (kBits == 8 && m.trellis) {
      spread_trellis(m, base, b, wide);
      first = wide;
    }
    for (int half = 0; half < 2; ++half) {
      const uint8_t* codes = first + half * U::bytes;
      Simd::Floats scale = block_scale(m, base, b, half);
      if (m.factor != nullptr) scale = Simd::times(scale, Simd::floats(m.factor + tile * kRows + half * kHalf));
      // A float zero must be subtracted from the code itself: the centre would be rounded away from it first.
      const bool whole = m.zero_kind == kZeroHalf;
      const Simd::Floats centre = Simd::same(float(m.centre));
      Simd::Floats zero = Simd::same(0.0f);
      if (whole) zero = half_zero(m, base, b, half);
      if (m.zero_kind == kZeroByte) {
        zero = Simd::minus(Simd::to_float(Simd::bytes(base + m.places[b].zero + half * kHalf)), centre);
      }
      for (int32_t k = 0; k < block.padded; k += U::columns, codes += 2 * U::bytes) {
        each<0, U::chunks>([&](auto chunk) __attribute__((always_inline)) {
          constexpr int c = decltype(chunk)::value;
          const auto prepared = weights.prepare(chunk_codes<kBits, c>(codes));
          each<0, 4>([&](auto column) __attribute__((always_inline)) {
            constexpr int j = decltype(column)::value;
            const int32_t place = k + 4 * c + j;
            if (place >= block.length) return;
            Simd::Floats w = weights.template column<j>(prepared);
            if (whole) w = Simd::plus(w, centre);
            w = Simd::times(Simd::minus(w, zero), scale);
            float* to = y + (block.column + place) * stride + half * kHalf;
            Simd::store(to, more ? Simd::plus(Simd::floats(to), w) : w);
          });
        });
      }
    }
  }
}

// ---------------------------------------------------------------- from run-time numbers to the templates

void table_tiles(const Matrix& m, const Activations& a, int64_t first, int64_t last, const Output& out) {
  for (int64_t tile = first; tile < last; ++tile) {
    int64_t t = 0;
    for (; t + Simd::kTokens <= a.tokens; t += Simd::kTokens) table_tile<Simd::kTokens>(m, a, tile, t, out);
    for (; t < a.tokens; ++t) table_tile<1>(m, a, tile, t, out);
  }
}

template <int kBits, int kDigits>
void whole_tiles(const Matrix& m, const Activations& a, int64_t first, int64_t last, const Output& out) {
  constexpr int kMost = Simd::kSums / (Simd::kHalves * kDigits);
  for (int64_t tile = first; tile < last; ++tile) {
    if (a.together > 0) {
      if (meets_signed(a)) {
        many_tokens<kBits, kDigits, Simd::kShifts>(m, a, tile, out);
      } else {
        many_tokens<kBits, kDigits, false>(m, a, tile, out);
      }
      continue;
    }
    int64_t t = 0;
    if constexpr (kBits == 8) {
      if (m.trellis) {
        if constexpr (kMost >= 2)
          for (; t + 2 <= a.tokens; t += 2) few_of_trellis<kDigits, 2>(m, a, tile, t, out);
        for (; t < a.tokens; ++t) few_of_trellis<kDigits, 1>(m, a, tile, t, out);
        continue;
      }
    }
    if constexpr (kMost >= 8)
      for (; t + 8 <= a.tokens; t += 8) few_tokens<kBits, kDigits, 8>(m, a, tile, t, out);
    if constexpr (kMost >= 4)
      for (; t + 4 <= a.tokens; t += 4) few_tokens<kBits, kDigits, 4>(m, a, tile, t, out);
    if constexpr (kMost >= 2)
      for (; t + 2 <= a.tokens; t += 2) few_tokens<kBits, kDigits, 2>(m, a, tile, t, out);
    for (; t < a.tokens; ++t) few_tokens<kBits, kDigits, 1>(m, a, tile, t, out);
  }
}

// Calls what(Number<bits>) for the bits of what is multiplied.
template <typename What>
LAYERWISE_INLINE void with_bits(const Matrix& m, What&& what) {
  switch (m.trellis ? 8 : m.bits) {
    case 2: return what(Number<2>());
    case 3: return what(Number<3>());
    case 4: return what(Number<4>());
    case 5: return what(Number<5>());
    case 6: return what(Number<6>());
    case 7: return what(Number<7>());
    default: return what(Number<8>());
  }
}

void multiply(const Matrix& m, const Activations& a, int64_t first, int64_t last, const Output& out) {
  if (m.table) return table_tiles(m, a, first, last, out);
  with_bits(m, [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    if (a.digits == 1) return whole_tiles<kBits, 1>(m, a, first, last, out);
    if (a.digits == 2) return whole_tiles<kBits, 2>(m, a, first, last, out);
    return whole_tiles<kBits, 3>(m, a, first, last, out);
  });
}

// Dot products of what the first cache holds, as many at a time as there are sums, and nothing else.
int64_t dots(int64_t rounds, int32_t* found) {
  constexpr int kOwn = Simd::kPanelSums < 16 ? Simd::kPanelSums : 16;
  Simd::Ints sum[kOwn];
  alignas(kLine) uint8_t bytes[kLine];
  memset(bytes, 3, sizeof(bytes));
  int8_t x[4 * kOwn];
  memset(x, 1, sizeof(x));
#pragma GCC unroll 16
  for (int i = 0; i < kOwn; ++i) sum[i] = Simd::whole(i);
  for (int64_t round = 0; round < rounds; ++round) {
    __asm__ volatile("" : : "r"(bytes), "r"(x) : "memory");  // or the compiler would work part of it out beforehand
    const Simd::Bytes codes = Simd::load(bytes);
#pragma GCC unroll 16
    for (int i = 0; i < kOwn; ++i) sum[i] = Simd::template dot<7>(sum[i], codes, x + 4 * i);
  }
#pragma GCC unroll 16
  for (int i = 1; i < kOwn; ++i) sum[0] = Simd::plus(sum[0], sum[i]);
  memcpy(found, &sum[0], sizeof(*found));
  return rounds * kOwn * kLine;
}

void decode(const Matrix& m, int64_t first, int64_t last, float* y, int64_t stride) {
  with_bits(m, [&](auto bits) {
    constexpr int kBits = decltype(bits)::value;
    for (int64_t tile = first; tile < last; ++tile) {
      float* to = y + (tile - first) * kRows;
      if constexpr (kBits == 4) {
        if (m.table) {
          decode_tile<4, true>(m, tile, to, stride);
          continue;
        }
      }
      decode_tile<kBits, false>(m, tile, to, stride);
    }
  });
}

}  // namespace
