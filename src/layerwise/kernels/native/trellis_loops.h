// A few tokens and a trellis. Many of them are multiplied by panels, as codes of eight bits are (panel_parts.h).
#pragma once

#include "block_sums.h"
#include "trellis.h"

namespace {

// Codes of a trellis that meet one token as they are looked up.
template <int kDigits>
struct Dotted {
  const int8_t* x;
  Simd::Ints sum[2][kDigits];

  template <int kChunk>
  LAYERWISE_INLINE void take(const Both& codes) {
    each<0, kDigits>([&](auto digit) __attribute__((always_inline)) {
      constexpr int d = decltype(digit)::value;
      sum[0][d] = Simd::template dot<8>(sum[0][d], codes.half[0], x + (kChunk * kDigits + d) * 4);
      sum[1][d] = Simd::template dot<8>(sum[1][d], codes.half[1], x + (kChunk * kDigits + d) * 4);
    });
  }
};

// One token that meets its codes in registers.
template <int kBits, int kDigits, class Table>
__attribute__((noinline)) void one_of_trellis(const Table& given, const Matrix& m, const Activations& a, int64_t tile,
                                              int64_t token, const Output& out) {
  using U = Unit<kBits>;
  const Table table = given;
  const uint8_t* base = m.data + tile * m.tile_bytes;
  Simd::Floats total[2] = {Simd::same(0.0f), Simd::same(0.0f)};
  for (int64_t b = 0; b < m.blocks; ++b) {
    Dotted<kDigits> dotted = {a.codes + token * a.stride + m.block[b].place * kDigits, {}};
    each<0, kDigits>([&](auto d) __attribute__((always_inline)) {
      dotted.sum[0][decltype(d)::value] = dotted.sum[1][decltype(d)::value] = Simd::whole(0);
    });
    const uint8_t* codes = base + m.places[b].codes;
    for (int32_t k = 0; k < m.block[b].padded; k += U::columns, codes += 2 * U::bytes) {
      spread_unit<kBits>(table, codes, dotted);
      dotted.x += U::columns * kDigits;
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const Scaled v = finish<kDigits>(m, a, base, b, half, token * a.blocks + b, dotted.sum[half]);
      total[half] = Simd::fused(v.scale, v.sum, total[half]);
    }
  }
  for (int half = 0; half < 2; ++half) store_rows(m, tile, half, total[half], out, token);
}

// One or two tokens and a trellis: a block becomes codes of eight bits in the first cache, and is multiplied there, but
// where a token can meet them as they come.
template <int kDigits, int kCount>
void few_of_trellis(const Matrix& m, const Activations& a, int64_t tile, int64_t token, const Output& out) {
  if constexpr (kCount == 1) {
    bool done = false;
    Simd::look_up(m.values, [&](const auto& table) {
      if constexpr (kAtOnce<decltype(table)>) {
        with_trellis_bits(m, [&](auto bits) {
          one_of_trellis<decltype(bits)::value, kDigits>(table, m, a, tile, token, out);
        });
        done = true;
      }
    });
    if (done) return;
  }
  constexpr int kHalves = Simd::kHalves;
  using Sums = BlockSums<8, kDigits, kCount, kHalves, 0>;
  alignas(kLine) uint8_t wide[kLongestBlock * kRows];
  Simd::Floats total[2][kCount];
  for (int half = 0; half < 2; ++half)
    for (int t = 0; t < kCount; ++t) total[half][t] = Simd::same(0.0f);
  const uint8_t* base = m.data + tile * m.tile_bytes;
  for (int64_t b = 0; b < m.blocks; ++b) {
    spread_trellis(m, base, b, wide);
    const int8_t* x = a.codes + token * a.stride + m.block[b].place * kDigits;
    each<0, 2 / kHalves>([&](auto part) __attribute__((always_inline)) {
      constexpr int half = decltype(part)::value * kHalves;
      Sums sums;
      sums.add(wide + half * kLine, x, a.stride, m.block[b].padded);
      sums.finish_all(m, a, base, b, half, token, [&](auto t, auto h, Scaled v) __attribute__((always_inline)) {
        Simd::Floats& own = total[half + decltype(h)::value][decltype(t)::value];
        own = Simd::fused(v.scale, v.sum, own);
      });
    });
  }
  for (int half = 0; half < 2; ++half)
    for (int t = 0; t < kCount; ++t) store_rows(m, tile, half, total[half][t], out, token + t);
}

}  // namespace
