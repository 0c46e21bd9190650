// AVX2, FMA and F16C: a tile's 16 rows are two registers.
#include <immintrin.h>

#include "layout.h"

namespace {

// For every set of eight lanes: how many of them lie below each lane, which is the place of that lane's value.
struct Places {
  uint8_t of[256][8] = {};

  constexpr Places() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int lane = 0, below = 0; lane < 8; ++lane) {
        of[mask][lane] = uint8_t(below);
        below += mask >> lane & 1;
      }
    }
  }
};

constexpr Places kPlaces;

struct Simd {
  struct Floats {
    __m256 low, high;
  };
  struct Ints {
    __m256i low, high;
  };
  using Bytes = Ints;
  static constexpr int kChains = 2;  // times two halves
  static constexpr int kTokens = 2;  // 8 sums of 16 registers
  static constexpr int kSums = 4;    // 8 of 16 registers
  static constexpr int kPanelSums = 4;
  static constexpr bool kSplits = true;  // codes of eight bits are cut in two
  static constexpr bool kShifts = false;
  static constexpr int kSparseTokens = 2;
  static constexpr int kHalves = 1;

  static inline __m256i half(const void* from) { return _mm256_load_si256(static_cast<const __m256i*>(from)); }
  static inline Bytes load(const uint8_t* from) { return {half(from), half(from + 32)}; }
  static inline void keep(uint8_t* to, Bytes v) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), v.low);
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + 32), v.high);
  }
  static inline Bytes join(Bytes a, Bytes b) {
    return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)};
  }

  template <int kShift, int kMask>
  static inline Bytes field(Bytes v) {
    if constexpr (kShift > 0) v = {_mm256_srli_epi16(v.low, kShift), _mm256_srli_epi16(v.high, kShift)};
    if constexpr (kShift < 0) v = {_mm256_slli_epi16(v.low, -kShift), _mm256_slli_epi16(v.high, -kShift)};
    const __m256i mask = _mm256_set1_epi8(char(kMask));
    return {_mm256_and_si256(v.low, mask), _mm256_and_si256(v.high, mask)};
  }

  // For trellis.h.
  template <int kBack>
  static inline __m256i turned_half(__m256i own, __m256i before) {
    const __m256i between = _mm256_permute2x128_si256(before, own, 0x21);
    if constexpr (kBack == 4) return between;
    return _mm256_alignr_epi8(own, between, (16 - 4 * kBack) & 15);
  }
  template <int kBack>
  static inline Bytes turned(Bytes own, Bytes other) {
    return {turned_half<kBack>(own.low, other.high), turned_half<kBack>(own.high, own.low)};
  }
  template <int kShift>
  static inline Bytes shifted(Bytes v) {
    if constexpr (kShift > 0) return {_mm256_srli_epi16(v.low, kShift), _mm256_srli_epi16(v.high, kShift)};
    return {_mm256_slli_epi16(v.low, -kShift), _mm256_slli_epi16(v.high, -kShift)};
  }
  template <int kMask>
  static inline Bytes select(Bytes a, Bytes b) {
    const __m256i mask = _mm256_set1_epi8(char(kMask));
    return {_mm256_or_si256(_mm256_and_si256(mask, a.low), _mm256_andnot_si256(mask, b.low)),
            _mm256_or_si256(_mm256_and_si256(mask, a.high), _mm256_andnot_si256(mask, b.high))};
  }

  // Sixteen values at a time, of which the upper bits of a state choose. A shuffle gives 0 where a state's last bit is
  // set: so the values of the lower and the upper half of the states only meet.
  struct Shuffled {
    static constexpr bool kAtOnce = false;
    const uint8_t* values;

    template <int kBit, int kNumber>
    inline __m256i chosen(__m256i place, const __m256i* bit) const {
      if constexpr (kBit < 0) {
        const auto* from = reinterpret_cast<const __m128i*>(values + 16 * kNumber);
        return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(from)), place);
      } else {
        return _mm256_blendv_epi8(chosen<kBit - 1, kNumber>(place, bit),
                                  chosen<kBit - 1, kNumber + (1 << kBit)>(place, bit), bit[kBit]);
      }
    }

    inline __m256i half_of(__m256i state) const {
      const __m256i bit[3] = {_mm256_slli_epi16(state, 3), _mm256_slli_epi16(state, 2), _mm256_slli_epi16(state, 1)};
      const __m256i upper = _mm256_xor_si256(state, _mm256_set1_epi8(char(0x80)));
      return _mm256_or_si256(chosen<2, 0>(state, bit), chosen<2, 8>(upper, bit));
    }

    inline Bytes of(Bytes state) const { return {half_of(state.low), half_of(state.high)}; }
  };

  template <typename What>
  static inline void look_up(const uint8_t* values, What&& what) { what(Shuffled{values}); }

  static inline Floats same(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static inline Ints whole(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
  static inline Floats floats(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static inline Floats halves(const uint8_t* from) {
    const auto* at = reinterpret_cast<const __m128i*>(from);
    return {_mm256_cvtph_ps(_mm_loadu_si128(at)), _mm256_cvtph_ps(_mm_loadu_si128(at + 1))};
  }
  static inline Ints bytes(const uint8_t* from) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from))),
            _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8)))};
  }
  static inline Ints ints(const int32_t* from) { return {half(from), half(from + 8)}; }
  static inline void keep_minus(int32_t* to, Ints v) {  // -v in the lower half of every lane, 0 in the upper
    const __m256i none = _mm256_setzero_si256(), low = _mm256_set1_epi32(0xffff);
    auto* at = reinterpret_cast<__m256i*>(to);
    _mm256_store_si256(at, _mm256_and_si256(_mm256_sub_epi32(none, v.low), low));
    _mm256_store_si256(at + 1, _mm256_and_si256(_mm256_sub_epi32(none, v.high), low));
  }
  static inline Ints times_low(Ints v, int32_t by) {  // of 16 bits each
    const __m256i spread = _mm256_set1_epi32(by);
    return {_mm256_madd_epi16(v.low, spread), _mm256_madd_epi16(v.high, spread)};
  }
  static inline Ints bits(Floats v) { return {_mm256_castps_si256(v.low), _mm256_castps_si256(v.high)}; }
  static inline void keep_low(int8_t* to, Ints v) {  // the low byte of every lane, whose value fits into it
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(v.low, v.high), 0xd8);
    const __m128i packed = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), packed);
  }
  static inline Floats to_float(Ints v) { return {_mm256_cvtepi32_ps(v.low), _mm256_cvtepi32_ps(v.high)}; }
  static inline Floats plus(Floats a, Floats b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
  }
  static inline Floats minus(Floats a, Floats b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
  }
  static inline Floats times(Floats a, Floats b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
  }
  static inline Ints plus(Ints a, Ints b) {
    return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
  }
  static inline Ints minus(Ints a, Ints b) {
    return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)};
  }
  static inline Ints times(Ints a, Ints b) {
    return {_mm256_mullo_epi32(a.low, b.low), _mm256_mullo_epi32(a.high, b.high)};
  }
  static inline Floats fma(Floats a, Floats b, Floats c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  static inline Floats fused(Floats a, Floats b, Floats c) { return fma(a, b, c); }
  static inline Floats less(Floats c, Floats a, Floats b) {  // c - a b
    return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
  }
  static inline int32_t sum(Ints v) {
    int32_t lanes[8], sum = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), _mm256_add_epi32(v.low, v.high));
    for (int32_t lane : lanes) sum += lane;
    return sum;
  }
  static inline Floats sum_chains(const Floats* s) { return plus(s[0], s[1]); }
  static inline void store(float* to, Floats v) {
    _mm256_storeu_ps(to, v.low);
    _mm256_storeu_ps(to + 8, v.high);
  }

  // Eight columns of kept values: those at `from`, spread to the lanes of the bits of `mask`.
  template <int kKind>
  static inline __m256 kept_half(const uint8_t* from, uint32_t mask, __m256i low, int up, __m256 floor) {
    __m256 v;
    if constexpr (kKind == layerwise::kHalfValues) {
      v = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    } else if constexpr (kKind == layerwise::kBrainValues) {
      const __m128i words = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
      v = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(words), 16));
    } else {
      const __m256i code = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
      const __m256i sign = _mm256_and_si256(_mm256_sll_epi32(code, _mm_cvtsi32_si128(up)), _mm256_set1_epi32(INT32_MIN));
      const __m256 size = _mm256_add_ps(_mm256_cvtepi32_ps(_mm256_and_si256(code, low)), floor);
      v = _mm256_xor_ps(size, _mm256_castsi256_ps(sign));
    }
    const __m256i bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i here = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(int(mask)), bit), bit);
    const __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPlaces.of[mask]));
    return _mm256_and_ps(_mm256_permutevar8x32_ps(v, _mm256_cvtepu8_epi32(places)), _mm256_castsi256_ps(here));
  }

  template <int kKind>
  static inline Floats kept(const uint8_t* from, uint32_t mask, Ints low, int up, Floats floor) {
    constexpr int kBytes = kKind == layerwise::kCodeValues ? 1 : 2;
    const uint8_t* behind = from + __builtin_popcount(mask & 255) * kBytes;
    return {kept_half<kKind>(from, mask & 255, low.low, up, floor.low),
            kept_half<kKind>(behind, mask >> 8, low.high, up, floor.high)};
  }

  // `maddubs` adds two products in 16 bits and saturates: codes up to 127 are safe (2 * 127 * 127 = 32258). Those of
  // eight bits are cut in two, the top bit by itself (2 * 128 * 127 = 32512), and the parts meet in 32 bits only.
  template <int kBits>
  static inline __m256i dot_half(__m256i sum, __m256i codes, __m256i x) {
    const __m256i ones = _mm256_set1_epi16(1);
    if constexpr (kBits == 8) {
      const __m256i top = _mm256_set1_epi8(char(0x80));
      const __m256i high = _mm256_maddubs_epi16(_mm256_and_si256(codes, top), x);
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(high, ones));
      codes = _mm256_andnot_si256(top, codes);
    }
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), ones));
  }

  // Of signed codes, which are not here.
  static Ints shifted_dot(Ints sum, Bytes codes, Ints shifted);
  static void keep_ints(int32_t* to, Ints v);
  static Bytes spread(Ints v);
  static Bytes less_bytes(Bytes a, Bytes b);
  template <int kShift>
  static Ints left(Ints v);

  template <int kBits>
  static inline Ints dot(Ints sum, Bytes codes, const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    const __m256i spread = _mm256_set1_epi32(four);
    return {dot_half<kBits>(sum.low, codes.low, spread), dot_half<kBits>(sum.high, codes.high, spread)};
  }

  template <int kBits, bool kTable>
  struct Weights {
    __m256 levels[2];
    __m256i centre;

    explicit inline Weights(const layerwise::Matrix& m)
        : levels{_mm256_loadu_ps(m.levels), _mm256_loadu_ps(m.levels + 8)},
          centre(_mm256_set1_epi8(char(m.centre))) {}

    inline Bytes prepare(Bytes codes) const {
      if constexpr (kTable) return codes;
      return {_mm256_sub_epi8(codes.low, centre), _mm256_sub_epi8(codes.high, centre)};
    }

    template <int kColumn>
    inline __m256 half_column(__m256i v) const {
      if constexpr (kTable) {  // two tables of eight, chosen by bit 3 of the code
        const __m256i place = _mm256_srli_epi32(v, 8 * kColumn);
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(v, 28 - 8 * kColumn));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(levels[0], place), _mm256_permutevar8x32_ps(levels[1], place),
                                upper);
      } else {
        if constexpr (kColumn < 3) v = _mm256_slli_epi32(v, 24 - 8 * kColumn);
        return _mm256_cvtepi32_ps(_mm256_srai_epi32(v, 24));
      }
    }

    template <int kColumn>
    inline Floats column(Bytes v) const {
      return {half_column<kColumn>(v.low), half_column<kColumn>(v.high)};
    }
  };
};

}  // namespace

#include "activations.h"
#include "sparse_loops.h"
#include "tile_loops.h"

namespace {

constexpr int kReadAhead = 4096;

uint64_t read_lines(const uint8_t* data, size_t bytes) {
  __m256i sum[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
  for (size_t at = 0; at + 2 * kLine <= bytes; at += 2 * kLine) {
    __builtin_prefetch(data + at + kReadAhead);
    __builtin_prefetch(data + at + kReadAhead + kLine);
    for (int i = 0; i < 4; ++i) {
      const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(data + at + 32 * i));
      sum[i] = _mm256_xor_si256(sum[i], v);
    }
  }
  alignas(32) uint64_t words[4];
  const __m256i all = _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
  _mm256_store_si256(reinterpret_cast<__m256i*>(words), all);
  return words[0] + words[1] + words[2] + words[3];
}

}  // namespace

namespace layerwise {
const Path kAvx2 = {"avx2", multiply, decode, read_lines, dots, side_by_side, sparse, quantize};
}
