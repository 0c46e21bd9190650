// Blocks of a trellis (encoding/trellis.py): codes of 1 to 5 bits that become codes of eight, of which the loops know all
// else. The value of a code is that of its row's state, the last eight bits of its own code and those of the rows above
// it, and a tile is a strip: its rows are a ring.
//
// The bits of a state are put together a line at a time, as the codes lie, while a line still has several chunks:
// a line of fields beside itself, some lanes on, becomes two lines of fields twice as wide,
//
//     even  f0 | g0 << w, f2 | g2 << w, ...        odd  f1 | g1 << w, ...        g the fields of the rows above
//
// and with fields of 4, 2 or 1 bits that is all there is to it, until they have eight. With 3 and 5 bits the bits of a
// state come in another order than the form's, to which the table is brought when the matrix is made (pack.cpp):
//
//     3 bits, planes P of 2 and H of 1, from the lowest   P of the row, of two rows above, of the row above, H, H above
//     5 bits, planes F of 4 and H of 1                    F, three bits of F above, H
//
// Simd gives:  turned (lanes of a half moved on, the last of the other half before them), shifted (bytes; bits that come
// over from a neighbour are anything), select (by bits), and `look_up`, which calls what it is given with a table. One
// that is looked up in many steps does so for a whole block, when all its states are there; else (kAtOnce) each state is
// looked up in the registers where it was put together, and its last bit need not be put there.
#pragma once

#include <type_traits>

#include "tile_parts.h"

namespace {

// Both halves of a line.
struct Both {
  Simd::Bytes half[2];
};

template <int kBack>
LAYERWISE_INLINE Both above(const Both& v) {
  return {{Simd::template turned<kBack>(v.half[0], v.half[1]), Simd::template turned<kBack>(v.half[1], v.half[0])}};
}

template <int kShift>
LAYERWISE_INLINE Both shifted(const Both& v) {
  if constexpr (kShift == 0) return v;
  return {{Simd::template shifted<kShift>(v.half[0]), Simd::template shifted<kShift>(v.half[1])}};
}

// The bits of kMask from a, the others from b.
template <int kMask>
LAYERWISE_INLINE Both select(const Both& a, const Both& b) {
  return {{Simd::template select<kMask>(a.half[0], b.half[0]), Simd::template select<kMask>(a.half[1], b.half[1])}};
}

constexpr int low_fields(int width) { return width == 1 ? 0x55 : width == 2 ? 0x33 : 0x0f; }

template <int kWidth>
LAYERWISE_INLINE Both even_fields(const Both& line, const Both& above) {
  return select<low_fields(kWidth)>(line, shifted<-kWidth>(above));
}

template <int kWidth>
LAYERWISE_INLINE Both odd_fields(const Both& line, const Both& above) {
  return select<low_fields(kWidth)>(shifted<kWidth>(line), above);
}

constexpr int kOwn = 8;  // as the place of a state's last bit: it has it already

// In place of a table: the states.
struct States {
  template <int kTop>
  LAYERWISE_INLINE Simd::Bytes at(Simd::Bytes state, Simd::Bytes top) const {
    if constexpr (kTop == kOwn) return state;
    if constexpr (kTop == 7) return Simd::template select<0x7f>(state, top);
    return Simd::template select<0x7f>(state, Simd::template shifted<kTop - 7>(top));
  }
};

// Where the codes of a chunk go: into units of eight bits.
struct Wide {
  uint8_t* codes;

  template <int kChunk>
  LAYERWISE_INLINE void take(const Both& own) {
    Simd::keep(codes + 2 * kChunk * kLine, own.half[0]), Simd::keep(codes + (2 * kChunk + 1) * kLine, own.half[1]);
  }
};

// The codes of a unit's chunks, handed to `taker` one after the other.
template <class Table, class Taker>
struct Spread {
  const Table& table;
  Taker& taker;

  // The last bit of the state is bit kTop of `top`.
  template <int kChunk, int kTop>
  LAYERWISE_INLINE void put(const Both& state, const Both& top) const {
    taker.template take<kChunk>({{table.template at<kTop>(state.half[0], top.half[0]),
                                  table.template at<kTop>(state.half[1], top.half[1])}});
  }

  // A line of fields of kWidth bits, those of the chunks kFirst, kFirst + kStep, ...
  template <int kWidth, int kBack, int kFirst, int kStep>
  LAYERWISE_INLINE void double_up(const Both& line) const {
    if constexpr (kWidth == 8) {
      put<kFirst, kOwn>(line, line);
    } else {
      const Both before = above<kBack>(line);
      double_up<2 * kWidth, 2 * kBack, kFirst, 2 * kStep>(even_fields<kWidth>(line, before));
      double_up<2 * kWidth, 2 * kBack, kFirst + kStep, 2 * kStep>(odd_fields<kWidth>(line, before));
    }
  }

  template <int kLineNumber>
  LAYERWISE_INLINE void three_bits(const Both& p, const Both& h, const Both& h_above) const {
    const Both one = above<1>(p), two = above<2>(p), even = even_fields<2>(p, two), odd = odd_fields<2>(p, two);
    three_bits_of<kLineNumber, 0>(even, one, h, h_above), three_bits_of<kLineNumber, 1>(odd, one, h, h_above);
    three_bits_of<kLineNumber, 2>(even, one, h, h_above), three_bits_of<kLineNumber, 3>(odd, one, h, h_above);
  }

  template <int kLineNumber, int kField>
  LAYERWISE_INLINE void three_bits_of(const Both& low, const Both& one, const Both& h, const Both& h_above) const {
    constexpr int chunk = 4 * kLineNumber + kField;
    const Both high = select<0x30>(shifted<2 * kField - 4>(one), shifted<chunk - 6>(h));
    put<chunk, chunk>(select<0x0f>(shifted<kField / 2 * 4>(low), high), h_above);
  }

  template <int kLineNumber>
  LAYERWISE_INLINE void five_bits(const Both& f, const Both& h) const {
    constexpr int chunk = 2 * kLineNumber;
    const Both one = above<1>(f);
    put<chunk, chunk>(even_fields<4>(f, one), h), put<chunk + 1, chunk + 1>(odd_fields<4>(f, one), h);
  }
};

// Memory is not asked for ahead: a stream as slow as this one the processor sees by itself, and asking it is in the way
// (measured from memory, two threads of a Zen 4: 6 % of the time at 2 bits, 18 % at 4).
template <int kBits, class Table, class Taker>
LAYERWISE_INLINE void spread_unit(const Table& table, const uint8_t* codes, Taker& taker) {
  using U = Unit<kBits>;
  const Spread<Table, Taker> spread = {table, taker};
  const auto line = [codes](int at) __attribute__((always_inline)) {
    return Both{{Simd::load(codes + at), Simd::load(codes + U::bytes + at)}};
  };
  if constexpr (kBits == 3) {
    const Both h = line(U::at1), h_above = above<1>(h);
    spread.template three_bits<0>(line(0), h, h_above), spread.template three_bits<1>(line(kLine), h, h_above);
  } else if constexpr (kBits == 5) {
    const Both h = line(U::at1);
    spread.template five_bits<0>(line(0), h), spread.template five_bits<1>(line(kLine), h);
    spread.template five_bits<2>(line(2 * kLine), h), spread.template five_bits<3>(line(3 * kLine), h);
  } else {
    spread.template double_up<kBits, 1, 0, 1>(line(0));
  }
}

template <int kBits, class Table>
__attribute__((noinline)) void spread_units(const Table& given, const uint8_t* codes, int32_t columns, uint8_t* wide) {
  using U = Unit<kBits>;
  const Table table = given;  // in registers: what is written might be what a reference refers to
  const uint8_t* end = codes + int64_t(columns / U::columns) * 2 * U::bytes;
  for (; codes != end; codes += 2 * U::bytes, wide += U::columns * kRows) {
    Wide taker = {wide};
    spread_unit<kBits>(table, codes, taker);
  }
}

template <class Table>
__attribute__((noinline)) void look_up_all(const Table& given, uint8_t* wide, int32_t columns) {
  const Table table = given;
  for (uint8_t* end = wide + int64_t(columns) * kRows; wide != end; wide += kLine) {
    Simd::keep(wide, table.of(Simd::load(wide)));
  }
}

// Calls what(Number<bits>) for the bits of a trellis.
template <typename What>
LAYERWISE_INLINE void with_trellis_bits(const Matrix& m, What&& what) {
  switch (m.bits) {
    case 1: return what(Number<1>());
    case 2: return what(Number<2>());
    case 3: return what(Number<3>());
    case 4: return what(Number<4>());
    default: return what(Number<5>());
  }
}

template <class Table>
constexpr bool kAtOnce = std::remove_reference_t<Table>::kAtOnce;

// Block b of a tile of a trellis as codes of eight bits, values and 128, in their units: columns * kRows bytes.
inline void spread_trellis(const Matrix& m, const uint8_t* base, int64_t b, uint8_t* wide) {
  const uint8_t* codes = base + m.places[b].codes;
  const int32_t columns = m.block[b].padded;
  Simd::look_up(m.values, [&](const auto& table) {
    with_trellis_bits(m, [&](auto bits) {
      constexpr int kBits = decltype(bits)::value;
      if constexpr (kAtOnce<decltype(table)>) {
        spread_units<kBits>(table, codes, columns, wide);
      } else {
        spread_units<kBits>(States(), codes, columns, wide);
      }
    });
    if constexpr (!kAtOnce<decltype(table)>) look_up_all(table, wide, columns);
  });
}

}  // namespace
