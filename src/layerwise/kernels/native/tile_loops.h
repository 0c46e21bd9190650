// The products of one tile, written once over `Simd`, which every instruction set's file defines before it includes
// this. All of it is in the anonymous namespace, so that each file has copies of its own.
//
// Simd gives:  Floats, Ints (16 lanes), Bytes (64 bytes: 16 lanes of 4);  kChains (float sums per token), kTokens
// (tokens at a time: both decided by the number of registers);  loads, broadcasts, fma, dot, and Weights.
#pragma once

#include "layout.h"

#define LAYERWISE_INLINE inline __attribute__((always_inline))

namespace {

using namespace layerwise;

template <int kBits>
struct Unit {
  static constexpr int columns = kBits == 8 ? 4 : (kBits & 1) ? 32 : (kBits & 2) ? 16 : 8;
  static constexpr int bytes = 2 * columns * kBits;
  static constexpr int chunks = columns / 4;  // a chunk is 4 columns: one byte of code per row and column
  static constexpr int at2 = (kBits & 4) ? 2 * columns * 4 : 0;  // where the 2-bit plane begins
  static constexpr int at1 = at2 + ((kBits & 2) ? 2 * columns * 2 : 0);
};

// Chunk kChunk of a plane kWidth bits wide, its bits moved to bit kTo of each byte.
template <int kWidth, int kTo, int kChunk>
LAYERWISE_INLINE Simd::Bytes plane_chunk(const uint8_t* plane) {
  constexpr int per_line = 8 / kWidth;
  constexpr int shift = kWidth * (kChunk % per_line) - kTo;
  constexpr int mask = ((1 << kWidth) - 1) << kTo;
  return Simd::field<shift, mask>(Simd::load(plane + kLine * (kChunk / per_line)));
}

template <int kBits, int kChunk>
LAYERWISE_INLINE Simd::Bytes chunk_codes(const uint8_t* unit) {
  using U = Unit<kBits>;
  if constexpr (kBits == 8) {
    return Simd::load(unit);
  } else if constexpr (kBits == 4) {
    return plane_chunk<4, 0, kChunk>(unit);
  } else if constexpr (kBits == 2) {
    return plane_chunk<2, 0, kChunk>(unit);
  } else if constexpr (kBits == 3) {
    return Simd::join(plane_chunk<2, 0, kChunk>(unit), plane_chunk<1, 2, kChunk>(unit + U::at1));
  } else if constexpr (kBits == 5) {
    return Simd::join(plane_chunk<4, 0, kChunk>(unit), plane_chunk<1, 4, kChunk>(unit + U::at1));
  } else if constexpr (kBits == 6) {
    return Simd::join(plane_chunk<4, 0, kChunk>(unit), plane_chunk<2, 4, kChunk>(unit + U::at2));
  } else {
    return Simd::join(Simd::join(plane_chunk<4, 0, kChunk>(unit), plane_chunk<2, 4, kChunk>(unit + U::at2)),
                      plane_chunk<1, 6, kChunk>(unit + U::at1));
  }
}

// Calls body(number 0), body(number 1), ... with numbers that the compiler knows.
template <int kNumber>
struct Number {
  static constexpr int value = kNumber;
};

template <int kFrom, int kTo, typename Body>
LAYERWISE_INLINE void each(Body&& body) {
  if constexpr (kFrom < kTo) {
    body(Number<kFrom>());
    each<kFrom + 1, kTo>(body);
  }
}

// The block's scales, and its zeros less the centre.
LAYERWISE_INLINE Simd::Floats block_scale(const Matrix& m, const uint8_t* tile, int64_t block) {
  const uint8_t* from = tile + m.scale_at;
  if (m.scale_kind == kScaleHalf) return Simd::halves(from + block * 2 * kRows);
  return Simd::to_float(Simd::bytes(from + block * kRows));
}

LAYERWISE_INLINE Simd::Floats block_zero(const Matrix& m, const uint8_t* tile, int64_t block) {
  const uint8_t* from = tile + m.zero_at;
  const Simd::Floats centre = Simd::same(float(m.centre));
  if (m.zero_kind == kZeroByte) return Simd::minus(Simd::to_float(Simd::bytes(from + block * kRows)), centre);
  return Simd::minus(Simd::halves(from + block * 2 * kRows), centre);
}

// Software prefetch this far ahead on the one stream of codes, into the second-level cache: measured on Zen 4 against
// the first level (whose few outstanding misses then are the limit) and against the hardware alone, a tenth to a third.
constexpr int kAhead = 4096;

template <int kBytes>
LAYERWISE_INLINE void prefetch(const uint8_t* from) {
  for (int line = 0; line < kBytes; line += kLine) __builtin_prefetch(from + kAhead + line, 0, 2);
}

LAYERWISE_INLINE void store_rows(const Matrix& m, int64_t tile, Simd::Floats value, float* y) {
  const int64_t row = tile * kRows;
  if (m.factor != nullptr) value = Simd::times(value, Simd::floats(m.factor + row));
  if (row + kRows <= m.rows) {
    Simd::store(y + row, value);
    return;
  }
  float rest[kRows];
  Simd::store(rest, value);
  for (int64_t r = row; r < m.rows; ++r) y[r] = rest[r - row];
}

// y = sum over blocks of s (sum_k (q - c) x  -  (z - c) sum_k x), the scale once per block.
template <int kBits, bool kTable, int kCount>
void float_tile(const Matrix& m, const Activations& a, int64_t tile, int64_t token, float* y, int64_t stride) {
  using U = Unit<kBits>;
  const uint8_t* base = m.data + tile * m.tile_bytes;
  const uint8_t* codes = base;
  const Simd::Weights<kBits, kTable> weights(m);
  const int64_t width = a.width;
  Simd::Floats total[kCount];
  for (int t = 0; t < kCount; ++t) total[t] = Simd::same(0.0f);
  const int64_t all = int64_t(m.planes) * m.blocks;
  for (int64_t b = 0; b < all; ++b) {
    const int64_t own = b % m.blocks;
    const Block& block = m.block[own];
    const float* x = a.values + token * width + block.place;
    Simd::Floats sum[kCount][Simd::kChains];
    for (int t = 0; t < kCount; ++t)
      for (int c = 0; c < Simd::kChains; ++c) sum[t][c] = Simd::same(0.0f);
    for (int32_t k = 0; k < block.padded; k += U::columns, codes += U::bytes, x += U::columns) {
      prefetch<U::bytes>(codes);
      each<0, U::chunks>([&](auto chunk) __attribute__((always_inline)) {
        constexpr int c = decltype(chunk)::value;
        const auto prepared = weights.prepare(chunk_codes<kBits, c>(codes));
        each<0, 4>([&](auto column) __attribute__((always_inline)) {
          constexpr int j = decltype(column)::value;
          const Simd::Floats w = weights.template column<j>(prepared);
#pragma GCC unroll 8
          for (int t = 0; t < kCount; ++t) {
            Simd::Floats& s = sum[t][j % Simd::kChains];
            s = Simd::fma(w, Simd::same(x[t * width + 4 * c + j]), s);
          }
        });
      });
    }
    const Simd::Floats scale = block_scale(m, base, b);
    const bool shifted = m.zero_kind != kZeroNone;
    const Simd::Floats zero = shifted ? block_zero(m, base, b) : Simd::same(0.0f);
#pragma GCC unroll 8
    for (int t = 0; t < kCount; ++t) {
      Simd::Floats s = Simd::sum_chains(sum[t]);
      if (shifted) s = Simd::minus(s, Simd::times(zero, Simd::same(a.sums[(token + t) * a.blocks + own])));
      total[t] = Simd::fma(scale, s, total[t]);
    }
  }
  for (int t = 0; t < kCount; ++t) store_rows(m, tile, total[t], y + (token + t) * stride);
}

// The same from int8 activations. What is rounded, and when, is the same on every path: results are equal bit for bit.
template <int kBits, int kCount>
void int8_tile(const Matrix& m, const Activations& a, int64_t tile, int64_t token, float* y, int64_t stride) {
  using U = Unit<kBits>;
  const uint8_t* base = m.data + tile * m.tile_bytes;
  const uint8_t* codes = base;
  const int64_t width = a.width;
  Simd::Floats total[kCount];
  for (int t = 0; t < kCount; ++t) total[t] = Simd::same(0.0f);
  const int64_t all = int64_t(m.planes) * m.blocks;
  for (int64_t b = 0; b < all; ++b) {
    const int64_t own = b % m.blocks;
    const Block& block = m.block[own];
    const int8_t* x = a.codes + token * width + block.place;
    // One or two tokens would wait for the last dot product: they have several sums each, over several units.
    constexpr int chains = kCount <= 2 ? 4 / kCount : 1;
    constexpr int units = chains > U::chunks ? chains / U::chunks : 1;
    Simd::Ints sum[kCount][chains];
    for (int t = 0; t < kCount; ++t)
      for (int c = 0; c < chains; ++c) sum[t][c] = Simd::whole(0);
    const auto add_unit = [&](auto unit) __attribute__((always_inline)) {
      prefetch<U::bytes>(codes);
      each<0, U::chunks>([&](auto chunk) __attribute__((always_inline)) {
        constexpr int c = decltype(chunk)::value;
        constexpr int chain = (decltype(unit)::value * U::chunks + c) % chains;
        const Simd::Bytes q = chunk_codes<kBits, c>(codes);
#pragma GCC unroll 8
        for (int t = 0; t < kCount; ++t) {
          sum[t][chain] = Simd::template dot<kBits>(sum[t][chain], q, x + t * width + 4 * c);
        }
      });
      codes += U::bytes, x += U::columns;
    };
    int32_t k = 0;
    for (; k + units * U::columns <= block.padded; k += units * U::columns) each<0, units>(add_unit);
    for (; k < block.padded; k += U::columns) add_unit(Number<0>());
    const Simd::Floats scale = block_scale(m, base, b);
#pragma GCC unroll 8
    for (int t = 0; t < kCount; ++t) {
      const int64_t at = (token + t) * a.blocks + own;
      const int32_t count = a.counts[at];
      Simd::Ints products = sum[t][0];
      for (int c = 1; c < chains; ++c) products = Simd::plus(products, sum[t][c]);
      Simd::Floats s;
      if (m.zero_kind == kZeroByte) {
        const Simd::Ints zero = Simd::bytes(base + m.zero_at + b * kRows);
        s = Simd::to_float(Simd::minus(products, Simd::times(zero, Simd::whole(count))));
      } else {
        s = Simd::to_float(Simd::minus(products, Simd::whole(m.centre * count)));
        if (m.zero_kind == kZeroHalf) s = Simd::minus(s, Simd::times(block_zero(m, base, b), Simd::same(float(count))));
      }
      total[t] = Simd::fused(Simd::times(scale, Simd::same(a.steps[at])), s, total[t]);
    }
  }
  for (int t = 0; t < kCount; ++t) store_rows(m, tile, total[t], y + (token + t) * stride);
}

// Values as the stored form defines them, (q - z) * s in float32 and planes added in order: equal to it bit for bit.
template <int kBits, bool kTable>
void decode_tile(const Matrix& m, int64_t tile, float* y, int64_t stride) {
  using U = Unit<kBits>;
  const uint8_t* base = m.data + tile * m.tile_bytes;
  const uint8_t* codes = base;
  const Simd::Weights<kBits, kTable> weights(m);
  const int64_t all = int64_t(m.planes) * m.blocks;
  for (int64_t b = 0; b < all; ++b) {
    const Block& block = m.block[b % m.blocks];
    const bool more = b >= m.blocks;
    Simd::Floats scale = block_scale(m, base, b);
    if (m.factor != nullptr) scale = Simd::times(scale, Simd::floats(m.factor + tile * kRows));
    const bool shifted = m.zero_kind != kZeroNone;
    // A float zero must be subtracted from the code itself: the centre would be rounded away from it first.
    const bool whole = m.zero_kind == kZeroHalf;
    const Simd::Floats centre = Simd::same(whole ? float(m.centre) : 0.0f);
    const Simd::Floats zero = !shifted ? Simd::same(0.0f)
                              : whole  ? Simd::halves(base + m.zero_at + b * 2 * kRows)
                                       : block_zero(m, base, b);
    for (int32_t k = 0; k < block.padded; k += U::columns, codes += U::bytes) {
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
          float* to = y + (block.column + place) * stride;
          Simd::store(to, more ? Simd::plus(Simd::floats(to), w) : w);
        });
      });
    }
  }
}

// ---------------------------------------------------------------- from run-time numbers to the templates

template <int kBits, bool kTable>
void float_tiles(const Matrix& m, const Activations& a, int64_t first, int64_t last, float* y, int64_t stride) {
  for (int64_t tile = first; tile < last; ++tile) {
    int64_t t = 0;
    for (; t + Simd::kTokens <= a.tokens; t += Simd::kTokens) {
      float_tile<kBits, kTable, Simd::kTokens>(m, a, tile, t, y, stride);
    }
    if constexpr (Simd::kTokens > 2) {
      for (; t + 2 <= a.tokens; t += 2) float_tile<kBits, kTable, 2>(m, a, tile, t, y, stride);
    }
    for (; t < a.tokens; ++t) float_tile<kBits, kTable, 1>(m, a, tile, t, y, stride);
  }
}

template <int kBits>
void int8_tiles(const Matrix& m, const Activations& a, int64_t first, int64_t last, float* y, int64_t stride) {
  for (int64_t tile = first; tile < last; ++tile) {
    int64_t t = 0;
    for (; t + Simd::kInt8Tokens <= a.tokens; t += Simd::kInt8Tokens) {
      int8_tile<kBits, Simd::kInt8Tokens>(m, a, tile, t, y, stride);
    }
    if constexpr (Simd::kInt8Tokens > 2) {
      for (; t + 2 <= a.tokens; t += 2) int8_tile<kBits, 2>(m, a, tile, t, y, stride);
    }
    for (; t < a.tokens; ++t) int8_tile<kBits, 1>(m, a, tile, t, y, stride);
  }
}

template <int kBits, bool kTable>
void decode_tiles(const Matrix& m, int64_t first, int64_t last, float* y, int64_t stride) {
  for (int64_t tile = first; tile < last; ++tile) {
    decode_tile<kBits, kTable>(m, tile, y + (tile - first) * kRows, stride);
  }
}

// Calls what(Number<bits>) for the matrix's bits.
template <typename What>
LAYERWISE_INLINE void with_bits(const Matrix& m, What&& what) {
  switch (m.bits) {
    case 2: return what(Number<2>());
    case 3: return what(Number<3>());
    case 4: return what(Number<4>());
    case 5: return what(Number<5>());
    case 6: return what(Number<6>());
    case 7: return what(Number<7>());
    default: return what(Number<8>());
  }
}

void multiply_float(const Matrix& m, const Activations& a, int64_t first, int64_t last, float* y, int64_t stride) {
  if (m.table) return float_tiles<4, true>(m, a, first, last, y, stride);
  with_bits(m, [&](auto bits) { float_tiles<decltype(bits)::value, false>(m, a, first, last, y, stride); });
}

void multiply_int8(const Matrix& m, const Activations& a, int64_t first, int64_t last, float* y, int64_t stride) {
  with_bits(m, [&](auto bits) { int8_tiles<decltype(bits)::value>(m, a, first, last, y, stride); });
}

void decode(const Matrix& m, int64_t first, int64_t last, float* y, int64_t stride) {
  if (m.table) return decode_tiles<4, true>(m, first, last, y, stride);
  with_bits(m, [&](auto bits) { decode_tiles<decltype(bits)::value, false>(m, first, last, y, stride); });
}

}  // namespace
