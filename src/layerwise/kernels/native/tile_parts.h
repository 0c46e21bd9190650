// What the loops of few and of many tokens share: units of codes, their scales, and where results go. Included, like
// them, by every instruction set's file behind its `Simd`, and all of it in the anonymous namespace.
#pragma once

#include <string.h>

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

// Half kHalf of a block's scales, and of its zeros less the centre.
LAYERWISE_INLINE Simd::Floats block_scale(const Matrix& m, const uint8_t* tile, int64_t block, int half) {
  const uint8_t* from = tile + m.places[block].scale;
  if (m.scale_kind == kScaleHalf) return Simd::halves(from + half * 2 * kHalf);
  return Simd::to_float(Simd::bytes(from + half * kHalf));
}

LAYERWISE_INLINE Simd::Floats half_zero(const Matrix& m, const uint8_t* tile, int64_t block, int half) {
  return Simd::halves(tile + m.places[block].zero + half * 2 * kHalf);
}

// How far ahead of a line that meets `kDots` dot products memory is asked for the next ones, into the second-level cache
// (the first has too few outstanding misses). Measured on both cores of a Zen 4, share of the bandwidth of reading, at
// 1, 2, 3-4, 8 and 16 KiB: 8 bits times one digit 85 89 89 70 70 %, 4 bits times one 90 85 65 72 73 %, 4 bits times three
// .. 46 76 80 84 %, 2 bits times one .. 47 75 86 86 %. Quick loops have so many requests in flight by themselves that
// more of them are in the way of one another; slow ones must be told early.
// Widths of several planes take as long as many dot products, for the joining of their codes.
constexpr int dots_of_line(int bits) { return bits == 8 || bits == 4 || bits == 2 ? 8 / bits : 4; }

template <int kDots>
constexpr int kAhead = kDots <= 1 ? 2048 : kDots <= 3 ? 1024 : 12288;

template <int kBytes, int kDistance>
LAYERWISE_INLINE void prefetch(const uint8_t* from) {
  if constexpr (kDistance > 0)
    for (int line = 0; line < kBytes; line += kLine) __builtin_prefetch(from + kDistance + line, 0, 2);
}

LAYERWISE_INLINE void store_rows(const Matrix& m, int64_t tile, int half, Simd::Floats value, const Output& out,
                                 int64_t token) {
  const int64_t row = tile * kRows + half * kHalf;
  float* y = out.y + token * out.stride;
  if (m.factor != nullptr) value = Simd::times(value, Simd::floats(m.factor + row));
  if (row + kHalf <= m.rows) {
    if (out.bias != nullptr) value = Simd::plus(value, Simd::floats(out.bias + row));
    Simd::store(y + row, value);
    return;
  }
  float rest[kHalf];
  Simd::store(rest, value);
  for (int64_t r = row; r < m.rows; ++r) y[r] = rest[r - row] + (out.bias != nullptr ? out.bias[r] : 0.0f);
}

// Whether many tokens meet signed codes (see panel_parts.h).
LAYERWISE_INLINE bool meets_signed(const Activations& a) { return Simd::kShifts && a.shifted; }

// How many tokens are multiplied at a time in large batches, and lie side by side there.
constexpr int side_by_side(int digits) {
  const int most = Simd::kPanelSums / (Simd::kHalves * digits);
  return most > 8 ? 8 : most > 0 ? most : 1;
}

}  // namespace
