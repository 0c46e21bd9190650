// A panel, the activations that meet it, and the sums of some tokens with it. See panel_loops.h.
//
// Where the instruction takes bytes of which one is signed and the other is not, the codes may be the signed ones: less
// their zeros, with activations that are shifted by 128 to 0 .. 255. The sums then begin with -128 times the sum of the
// codes, the same for all tokens, instead of a multiplication for each of them:
//
//     sum_k (q_k - z) d_k = sum_k (q_k - z) (d_k + 128) - 128 sum_k (q_k - z)
//
// Codes that are too far from their zeros for a byte are taken less something else, and the rest as otherwise.
//
// Simd gives besides:  kPanelSums (int32 sums at a time), kSplits (whether codes of eight bits cost more than others),
// kShifts (whether codes may be signed here), and what that takes.
#pragma once

#include "trellis.h"

namespace {

struct Panel {
  alignas(kLine) uint8_t wide[kLongestBlock * kRows];  // codes as bytes, in units of 8 bits
  alignas(kLine) float scale[kRows];
  alignas(kLine) float rest[kRows];    // of a zero of 16 bits: what is left of it without the centre
  alignas(kLine) int32_t minus[kRows];  // whole zeros or the centre, negated, in the lower 16 bits of a lane
  alignas(kLine) int32_t start[kRows];  // where codes are signed: what their sums begin with
  alignas(kLine) uint8_t offset[2 * kLine];  //   and what is taken from the codes, which is not in `minus`
  const uint8_t* stored;               // the codes as the matrix has them, and as bytes: `wide`, or the same where
  const uint8_t* codes;                //   the matrix has bytes; of a trellis both are `wide`
  int32_t columns;
  bool has_rest, has_minus;
};

// Of tokens that lie side by side, in one block.
struct Given {
  const int8_t* x;       // [columns / 4, digits, side by side, 4]
  const int32_t* whole;  // [digits, side by side]
  const float *steps, *sums;

  template <int kDigits>
  LAYERWISE_INLINE void step_over(int64_t columns, int64_t sets = 1) {
    constexpr int kTogether = side_by_side(kDigits);
    x += sets * columns * kDigits * kTogether, whole += sets * kDigits * kTogether;
    steps += sets * kTogether, sums += sets * kTogether;
  }

  LAYERWISE_INLINE void next_token() { x += 4, ++whole, ++steps, ++sums; }
};

template <int kBits, bool kSigned>
constexpr bool kDecodes = kSigned || kBits < 8;  // into `wide`

template <int kBits, bool kSigned>
LAYERWISE_INLINE void prepare_panel(const Matrix& m, const uint8_t* base, int64_t b, Panel& panel) {
  panel.stored = base + m.places[b].codes;
  panel.codes = kDecodes<kBits, kSigned> ? panel.wide : panel.stored;
  panel.columns = m.block[b % m.blocks].padded;
  if (kBits == 8 && m.trellis) {
    spread_trellis(m, base, b, panel.wide);
    panel.stored = panel.codes = panel.wide;
  }
  panel.has_rest = m.zero_kind == kZeroHalf, panel.has_minus = !kSigned || !m.narrow;
  const Simd::Floats centre = Simd::same(float(m.centre));
  for (int half = 0; half < 2; ++half) {
    Simd::store(panel.scale + half * kHalf, block_scale(m, base, b, half));
    const Simd::Ints zero = m.zero_kind == kZeroByte ? Simd::bytes(base + m.places[b].zero + half * kHalf)
                                                     : Simd::whole(m.centre);
    if constexpr (kSigned) {
      const Simd::Ints offset = m.narrow ? zero : Simd::whole(kBits == 8 ? 128 : 0);
      Simd::keep(panel.offset + half * kLine, Simd::spread(offset));
      Simd::keep_minus(panel.minus + half * kHalf, Simd::minus(zero, offset));
    } else {
      Simd::keep_minus(panel.minus + half * kHalf, zero);
    }
    if (panel.has_rest) {
      Simd::store(panel.rest + half * kHalf, Simd::minus(half_zero(m, base, b, half), centre));
    }
  }
}

// The sums of kCount tokens and one block. Plain loops over plain arrays, in functions that are not inlined: written
// otherwise, GCC 12 keeps some of the sums in memory and moves the others about in every round (measured: half of the
// speed). The results are those of `finish`: integers in another order, and the same roundings.
template <int kWidth, int kDigits, int kCount, bool kSigned>
struct PanelSums {
  static constexpr int kHalves = Simd::kHalves, kTogether = side_by_side(kDigits);
  static constexpr int kChunk = 4 * kDigits * kTogether;  // bytes of activations
  Simd::Ints sum[kCount][kDigits][kHalves];

  // A sum of codes less their zeros begins with minus the zero times the sum of the digits, or of signed codes with a
  // number of the row. What that is the first tokens find out, and add it themselves.
  LAYERWISE_INLINE void begin(const Panel& panel, const Given& given, int half) {
    if constexpr (kSigned) {
      begin_at(Simd::ints(panel.start + half * kHalf), Simd::ints(panel.start + (half + kHalves - 1) * kHalf));
      if (panel.has_minus) add_minus(panel, given, half);
    } else {
      begin_at(Simd::whole(0), Simd::whole(0));
      add_minus(panel, given, half);
    }
  }

  LAYERWISE_INLINE void begin_at(Simd::Ints first, Simd::Ints last) {
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h)
#pragma GCC unroll 32
      for (int t = 0; t < kCount; ++t)
#pragma GCC unroll 4
        for (int d = 0; d < kDigits; ++d) sum[t][d][h] = h == 0 ? first : last;
  }

  LAYERWISE_INLINE void add_each(Simd::Ints first, Simd::Ints last) {
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h)
#pragma GCC unroll 32
      for (int t = 0; t < kCount; ++t)
#pragma GCC unroll 4
        for (int d = 0; d < kDigits; ++d) sum[t][d][h] = Simd::plus(sum[t][d][h], h == 0 ? first : last);
  }

  LAYERWISE_INLINE void add_minus(const Panel& panel, const Given& given, int half) {
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h) {
      const Simd::Ints minus = Simd::ints(panel.minus + (half + h) * kHalf);
#pragma GCC unroll 32
      for (int t = 0; t < kCount; ++t)
#pragma GCC unroll 4
        for (int d = 0; d < kDigits; ++d)
          sum[t][d][h] = Simd::plus(sum[t][d][h], Simd::times_low(minus, given.whole[d * kTogether + t]));
    }
  }

  static LAYERWISE_INLINE Simd::Ints dot(Simd::Ints sum, Simd::Bytes codes, const int8_t* x) {
    if constexpr (kSigned) {
      int32_t four;
      memcpy(&four, x, 4);
      return Simd::shifted_dot(sum, codes, Simd::whole(four));
    } else {
      return Simd::template dot<kWidth>(sum, codes, x);
    }
  }

  LAYERWISE_INLINE void add(const Simd::Bytes* q, const int8_t* x) {
#pragma GCC unroll 32
    for (int t = 0; t < kCount; ++t)
#pragma GCC unroll 4
      for (int d = 0; d < kDigits; ++d)
#pragma GCC unroll 2
        for (int h = 0; h < kHalves; ++h)
          sum[t][d][h] = dot(sum[t][d][h], q[h], x + (d * kTogether + t) * 4);
  }

  LAYERWISE_INLINE void finish(const Panel& panel, const Given& given, int half, float* totals) {
    if (panel.has_rest) return finish_as<true>(panel, given, half, totals);
    finish_as<false>(panel, given, half, totals);
  }

  template <bool kRest>
  LAYERWISE_INLINE void finish_as(const Panel& panel, const Given& given, int half, float* totals) {
#pragma GCC unroll 2
    for (int h = 0; h < kHalves; ++h) {
      const int first = (half + h) * kHalf;
      const Simd::Floats scale = Simd::floats(panel.scale + first);
#pragma GCC unroll 32
      for (int t = 0; t < kCount; ++t) {
        Simd::Floats s = Simd::to_float(sum[t][0][h]);
        if constexpr (kDigits > 1) s = Simd::fused(Simd::to_float(sum[t][1][h]), Simd::same(256.0f), s);
        if constexpr (kDigits > 2) s = Simd::fused(Simd::to_float(sum[t][2][h]), Simd::same(65536.0f), s);
        if constexpr (kRest) {
          s = Simd::minus(s, Simd::times(Simd::floats(panel.rest + first), Simd::same(given.sums[t])));
        }
        float* own = totals + t * kRows + first;
        Simd::store(own, Simd::fused(Simd::times(scale, Simd::same(given.steps[t])), s, Simd::floats(own)));
      }
    }
  }
};

// What is asked of memory while a block is multiplied: a line a round, as far as there are any, or two with few tokens.
struct Ahead {
  const uint8_t *line, *last;

  template <bool kTwo>
  LAYERWISE_INLINE void ask() {
    __builtin_prefetch(line, 0, 2);
    if constexpr (kTwo) __builtin_prefetch(line + kLine, 0, 2);
    line += line < last ? (kTwo ? 2 : 1) * kLine : 0;
  }
};

}  // namespace
