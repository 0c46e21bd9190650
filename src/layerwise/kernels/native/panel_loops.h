// Products of many tokens. The tokens that are multiplied at a time lie side by side (see layout.h), a block of the tile
// becomes a *panel* of bytes in the first cache while its first tokens are multiplied, and the totals of all tokens stay
// there too. Of the time of a block of 128 columns, 16 rows and a token, 32 dot products are what must be done; a
// multiplication of floats and a fused one are what its step and its scale add, on the same two units of a Zen 4: 94 of
// 100 dot products are the most, and 93 are reached (a multiplication of 16 bits is added by zeros of 8-bit codes).
#pragma once

#include "panel_parts.h"

namespace {

// Adds the block's part of `sets` sets of tokens to totals [tokens, 32]: of all tokens of a set, or, of a last one that
// is not full, of kCount. The activations of a block lie side by side, set after set.
template <int kWidth, int kDigits, int kCount, bool kSigned>
__attribute__((noinline)) Ahead panel_sets(const Panel& panel, Given given, float* totals, int64_t sets, Ahead ahead) {
  constexpr int kHalves = Simd::kHalves;
  using Sums = PanelSums<kWidth, kDigits, kCount, kSigned>;
  const int64_t bytes = int64_t(panel.columns) * kRows;
  do {
    for (int half = 0; half < 2; half += kHalves) {
      Sums sums;
      sums.begin(panel, given, half);
      const int8_t* x = given.x;
      const uint8_t* codes = panel.codes + half * kLine;
      const uint8_t* end = codes + bytes;
      do {  // a block has columns: a loop that might not run at all would have its sums copied about
        Simd::Bytes q[kHalves];
#pragma GCC unroll 2
        for (int h = 0; h < kHalves; ++h) q[h] = Simd::load(codes + h * kLine);
        ahead.ask<Simd::kShifts && !kSigned>();
        sums.add(q, x);
        codes += 2 * kLine, x += Sums::kChunk;
      } while (codes != end);
      sums.finish(panel, given, half, totals);
    }
    given.template step_over<kDigits>(panel.columns);
    totals += Sums::kTogether * kRows;
  } while (--sets != 0);
  return ahead;
}

// The same for a block's first tokens: between their products, which leave the other units of the processor idle, its
// codes are decoded, and kept for the other tokens.
template <int kBits, int kWidth, int kDigits, bool kSigned>
__attribute__((noinline)) Ahead first_tokens(Panel& panel, const Given& given, float* totals, Ahead ahead) {
  constexpr int kHalves = Simd::kHalves;
  using U = Unit<kBits>;
  using Sums = PanelSums<kWidth, kDigits, side_by_side(kDigits), kSigned>;
  for (int half = 0; half < 2; half += kHalves) {
    Sums sums;
    Simd::Ints of_codes[kHalves];  // sums
    if constexpr (kSigned) {
      sums.begin_at(Simd::whole(0), Simd::whole(0));
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h) of_codes[h] = Simd::whole(0);
    } else {
      sums.begin(panel, given, half);
    }
    const int8_t* x = given.x;
    uint8_t* wide = panel.wide + half * kLine;
    const uint8_t* codes = panel.stored + half * U::bytes;
    const uint8_t* end = codes + int64_t(panel.columns / U::columns) * 2 * U::bytes;
    do {
      each<0, U::chunks>([&](auto chunk) __attribute__((always_inline)) {
        constexpr int c = decltype(chunk)::value;
        Simd::Bytes q[kHalves];
        q[0] = chunk_codes<kBits, c>(codes);
        if constexpr (kHalves > 1) q[1] = chunk_codes<kBits, c>(codes + U::bytes);
#pragma GCC unroll 2
        for (int h = 0; h < kHalves; ++h) {
          if constexpr (kSigned) {
            q[h] = Simd::less_bytes(q[h], Simd::load(panel.offset + (half + h) * kLine));
            of_codes[h] = Simd::shifted_dot(of_codes[h], q[h], Simd::whole(0x01010101));
          }
          Simd::keep(wide + h * kLine, q[h]);
        }
        ahead.ask<Simd::kShifts && !kSigned>();
        sums.add(q, x);
        wide += 2 * kLine, x += Sums::kChunk;
      });
      codes += 2 * U::bytes;
    } while (codes != end);
    if constexpr (kSigned) {
#pragma GCC unroll 2
      for (int h = 0; h < kHalves; ++h) {
        of_codes[h] = Simd::minus(Simd::whole(0), Simd::template left<7>(of_codes[h]));
        Simd::keep_ints(panel.start + (half + h) * kHalf, of_codes[h]);
      }
      sums.add_each(of_codes[0], of_codes[kHalves - 1]);
      if (panel.has_minus) sums.add_minus(panel, given, half);
    }
    sums.finish(panel, given, half, totals);
  }
  return ahead;
}

template <int kDigits>
LAYERWISE_INLINE Given given_of(const Matrix& m, const Activations& a, int64_t block, int64_t token) {
  constexpr int kTogether = side_by_side(kDigits);
  const int64_t set = token / kTogether, at = (block * a.sets + set) * kTogether;
  const int64_t place = m.block[block].place * a.sets + m.block[block].padded * set;
  return {a.codes + place * kDigits * kTogether, a.whole + at * kDigits, a.steps + at, a.sums + at};
}

constexpr int kPanelTokens = 144;  // whose totals lie in the first cache, beside a panel

constexpr int64_t kWriteAhead = 16;  // tokens: with rows of a power of two their lines share places in the first cache

template <int kBits, int kDigits, bool kSigned>
void many_tokens(const Matrix& m, const Activations& a, int64_t tile, const Output& out) {
  constexpr int kTogether = side_by_side(kDigits), kFit = kPanelTokens / kTogether * kTogether;
  constexpr int kWidth = Simd::kSplits && kBits < 8 ? 7 : 8;  // of a code, to the dot product
  Panel panel;
  alignas(kLine) float totals[kPanelTokens * kRows];
  const uint8_t* base = m.data + tile * m.tile_bytes;
  const int64_t all = int64_t(m.planes) * m.blocks;
  // As many rounds as are needed, alike: a last one of few tokens would decode everything for little.
  const int64_t rounds = (a.tokens + kFit - 1) / kFit;
  const int64_t each_round = (a.tokens + rounds * kTogether - 1) / (rounds * kTogether) * kTogether;
  for (int64_t first = 0; first < a.tokens; first += each_round) {
    const int64_t last = first + each_round < a.tokens ? first + each_round : a.tokens;
    memset(totals, 0, size_t((last - first + kTogether - 1) / kTogether * kTogether) * kRows * sizeof(float));
    for (int64_t b = 0; b < all; ++b) {
      prepare_panel<kBits, kSigned>(m, base, b, panel);
      // The codes of the next block and their scales.
      const int64_t bytes = int64_t(panel.columns) * kRows * (kBits == 8 ? m.bits : kBits) / 8;
      const uint8_t* behind = base + m.places[b].codes + bytes;
      Ahead ahead = {behind, behind + bytes + 2 * kLine};
      Given given = given_of<kDigits>(m, a, b % m.blocks, first);
      float* own = totals;
      int64_t left = last - first;
      const auto done = [&](int64_t tokens) __attribute__((always_inline)) {
        left -= tokens, own += tokens * kRows;
      };
      if (kDecodes<kBits, kSigned>) {
        ahead = first_tokens<kBits, kWidth, kDigits, kSigned>(panel, given, own, ahead);
        given.template step_over<kDigits>(panel.columns), done(kTogether);
      }
      if (const int64_t sets = left > 0 ? left / kTogether : 0) {
        ahead = panel_sets<kWidth, kDigits, kTogether, kSigned>(panel, given, own, sets, ahead);
        given.template step_over<kDigits>(panel.columns, sets), done(sets * kTogether);
      }
      // A set that is not full is multiplied as if it were, where that is quicker than token by token.
      if (kTogether > 4 ? left > 4 : left > 1) {
        panel_sets<kWidth, kDigits, kTogether, kSigned>(panel, given, own, 1, ahead);
        left = 0;
      } else if (kTogether > 4 && left > 2) {
        panel_sets<kWidth, kDigits, kTogether < 4 ? kTogether : 4, kSigned>(panel, given, own, 1, ahead);
        left = 0;
      }
      for (; left > 0; given.next_token(), done(1)) panel_sets<kWidth, kDigits, 1, kSigned>(panel, given, own, 1, ahead);
    }
    for (int64_t t = first; t < last; ++t) {
      if (t + kWriteAhead < last) {
        __builtin_prefetch(out.y + (t + kWriteAhead) * out.stride + tile * kRows, 1, 3);
        __builtin_prefetch(out.y + (t + kWriteAhead) * out.stride + tile * kRows + kHalf, 1, 3);
      }
      for (int half = 0; half < 2; ++half) {
        if (tile * kRows + half * kHalf >= m.rows) break;
        store_rows(m, tile, half, Simd::floats(totals + (t - first) * kRows + half * kHalf), out, t);
      }
    }
  }
}

}  // namespace
