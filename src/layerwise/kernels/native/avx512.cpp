// AVX-512 F, BW, VL and VNNI: a tile's 16 rows are one register.
#include <immintrin.h>

#include "layout.h"

namespace {

struct Simd {
  using Floats = __m512;
  using Ints = __m512i;
  using Bytes = __m512i;
  static constexpr int kChains = 4;      // an addition takes four cycles: four sums keep the unit busy
  static constexpr int kTokens = 4;      // 16 sums of 32 registers
  static constexpr int kSums = 24;       // of 32 registers
  static constexpr int kPanelSums = 24;
  static constexpr bool kSplits = false;
  static constexpr bool kShifts = true;
  static constexpr int kSparseTokens = 8;
  static constexpr int kHalves = 2;

  static inline Bytes load(const uint8_t* from) { return _mm512_load_si512(from); }
  static inline void keep(uint8_t* to, Bytes v) { _mm512_store_si512(to, v); }
  static inline Bytes join(Bytes a, Bytes b) { return _mm512_or_si512(a, b); }

  template <int kShift, int kMask>
  static inline Bytes field(Bytes v) {
    // Shifts of 16 bits carry bits over from the neighbouring byte; the mask takes them away.
    if constexpr (kShift > 0) v = _mm512_srli_epi16(v, kShift);
    if constexpr (kShift < 0) v = _mm512_slli_epi16(v, -kShift);
    return _mm512_and_si512(v, _mm512_set1_epi8(char(kMask)));
  }

  // For trellis.h.
  template <int kBack>
  static inline Bytes turned(Bytes own, Bytes other) { return _mm512_alignr_epi32(own, other, 16 - kBack); }
  template <int kShift>
  static inline Bytes shifted(Bytes v) {
    return kShift > 0 ? _mm512_srli_epi16(v, kShift > 0 ? kShift : 0) : _mm512_slli_epi16(v, kShift < 0 ? -kShift : 0);
  }
  template <int kMask>
  static inline Bytes select(Bytes a, Bytes b) {
    return _mm512_ternarylogic_epi32(b, a, _mm512_set1_epi8(char(kMask)), 0xd8);  // over b: the mask is needed again
  }

  template <int kBit>
  static inline __mmask64 has(Bytes v) { return _mm512_test_epi8_mask(v, _mm512_set1_epi8(char(1 << kBit))); }

  // Written out: this file is compiled for processors without VBMI as well, which take the other table.
  struct Permuted {
    static constexpr bool kAtOnce = true;
    __m512i values[4];

    explicit inline Permuted(const uint8_t* from)
        : values{_mm512_loadu_si512(from), _mm512_loadu_si512(from + 64), _mm512_loadu_si512(from + 128),
                 _mm512_loadu_si512(from + 192)} {}

    template <int kTop>
    inline Bytes at(Bytes state, Bytes top) const {
      constexpr int kBit = kTop < 8 ? kTop : 7;
      const __mmask64 last = has<kBit>(kTop < 8 ? top : state);
      Bytes low = state, high = state;  // of seven bits each
      __asm__("vpermi2b %2, %1, %0" : "+v"(low) : "v"(values[0]), "v"(values[1]));
      __asm__("vpermi2b %2, %1, %0" : "+v"(high) : "v"(values[2]), "v"(values[3]));
      return _mm512_mask_blend_epi8(last, low, high);
    }
  };

  // Sixteen values at a time, of which the upper bits of a state choose.
  struct Shuffled {
    static constexpr bool kAtOnce = false;
    const uint8_t* values;

    template <int kNumber>
    inline Bytes sixteen() const {
      return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(values + 16 * kNumber)));
    }

    template <int kBit, int kNumber>
    inline Bytes chosen(Bytes place, const __mmask64* bit) const {
      if constexpr (kBit == 0) {
        return _mm512_mask_shuffle_epi8(_mm512_shuffle_epi8(sixteen<kNumber>(), place), bit[0], sixteen<kNumber + 1>(),
                                        place);
      } else {
        return _mm512_mask_blend_epi8(bit[kBit], chosen<kBit - 1, kNumber>(place, bit),
                                      chosen<kBit - 1, kNumber + (1 << kBit)>(place, bit));
      }
    }

    inline Bytes of(Bytes state) const {
      const __mmask64 bit[4] = {has<4>(state), has<5>(state), has<6>(state), has<7>(state)};
      return chosen<3, 0>(_mm512_and_si512(state, _mm512_set1_epi8(15)), bit);
    }
  };

  template <typename What>
  static inline void look_up(const uint8_t* values, What&& what) {
    if (__builtin_cpu_supports("avx512vbmi")) {
      what(Permuted(values));
    } else {
      what(Shuffled{values});
    }
  }

  static inline Floats same(float v) { return _mm512_set1_ps(v); }
  static inline Ints whole(int32_t v) { return _mm512_set1_epi32(v); }
  static inline Floats floats(const float* from) { return _mm512_loadu_ps(from); }
  static inline Floats halves(const uint8_t* from) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static inline Ints bytes(const uint8_t* from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static inline Ints ints(const int32_t* from) { return _mm512_load_si512(from); }
  static inline void keep_minus(int32_t* to, Ints v) {  // -v in the lower half of every lane, 0 in the upper
    _mm512_store_si512(to, _mm512_and_si512(_mm512_sub_epi32(whole(0), v), whole(0xffff)));
  }
  static inline void keep_ints(int32_t* to, Ints v) { _mm512_store_si512(to, v); }
  static inline Ints times_low(Ints v, int32_t by) { return _mm512_madd_epi16(v, whole(by)); }  // of 16 bits each
  static inline Ints bits(Floats v) { return _mm512_castps_si512(v); }
  static inline void keep_low(int8_t* to, Ints v) {  // the low byte of every lane
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(v));
  }
  static inline Floats to_float(Ints v) { return _mm512_cvtepi32_ps(v); }
  static inline Floats plus(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static inline Floats minus(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
  static inline Floats times(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static inline Ints plus(Ints a, Ints b) { return _mm512_add_epi32(a, b); }
  static inline Ints minus(Ints a, Ints b) { return _mm512_sub_epi32(a, b); }
  static inline Ints times(Ints a, Ints b) { return _mm512_mullo_epi32(a, b); }
  static inline Floats fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static inline Floats fused(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static inline Floats less(Floats c, Floats a, Floats b) { return _mm512_fnmadd_ps(a, b, c); }  // c - a b
  static inline int32_t sum(Ints v) { return _mm512_reduce_add_epi32(v); }
  static inline Floats sum_chains(const Floats* s) { return plus(plus(s[0], s[1]), plus(s[2], s[3])); }
  static inline void store(float* to, Floats v) { _mm512_storeu_ps(to, v); }

  // Sixteen columns of kept values: those at `from`, spread to the lanes of the bits of `mask`.
  template <int kKind>
  static inline Floats kept(const uint8_t* from, uint32_t mask, Ints low, int up, Floats floor) {
    Floats v;
    if constexpr (kKind == layerwise::kHalfValues) {
      v = halves(from);
    } else if constexpr (kKind == layerwise::kBrainValues) {
      const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
      v = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
    } else {
      const Ints code = bytes(from), sign = _mm512_and_si512(_mm512_sll_epi32(code, _mm_cvtsi32_si128(up)), whole(INT32_MIN));
      const Floats size = plus(to_float(_mm512_and_si512(code, low)), floor);
      v = _mm512_castsi512_ps(_mm512_xor_si512(_mm512_castps_si512(size), sign));
    }
    return _mm512_maskz_expand_ps(__mmask16(mask), v);
  }

  // Unsigned codes times signed activations, four columns of every row; the instruction does not saturate.
  template <int kBits>
  static inline Ints dot(Ints sum, Bytes codes, const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    // Written out: with the intrinsic, GCC 12 copies every sum twice in each round of a loop, or leaves it in memory.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(_mm512_set1_epi32(four)));
    return sum;
  }

  // Signed codes times activations that are shifted to 0 .. 255.
  static inline Ints shifted_dot(Ints sum, Bytes codes, Ints shifted) {
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(shifted), "v"(codes));
    return sum;
  }
  static inline Bytes spread(Ints v) { return _mm512_mullo_epi32(v, whole(0x01010101)); }  // a lane's byte to all four
  static inline Bytes less_bytes(Bytes a, Bytes b) { return _mm512_sub_epi8(a, b); }
  template <int kShift>
  static inline Ints left(Ints v) { return _mm512_slli_epi32(v, kShift); }

  // Codes of up to four bits are looked up (the permutation reads the low four bits of a lane, so nothing is masked);
  // wider ones are centred as bytes and widened with their sign.
  template <int kBits, bool kTable>
  struct Weights {
    static constexpr bool kLookUp = kTable || kBits <= 4;
    __m512 levels;
    __m512i centre;

    explicit inline Weights(const layerwise::Matrix& m)
        : levels(_mm512_loadu_ps(m.levels)), centre(_mm512_set1_epi8(char(m.centre))) {}

    inline Bytes prepare(Bytes codes) const {
      if constexpr (kLookUp) return codes;
      return _mm512_sub_epi8(codes, centre);
    }

    template <int kColumn>
    inline Floats column(Bytes v) const {
      if constexpr (kLookUp) {
        if constexpr (kColumn > 0) v = _mm512_srli_epi32(v, 8 * kColumn);
        return _mm512_permutexvar_ps(v, levels);
      } else {
        if constexpr (kColumn < 3) v = _mm512_slli_epi32(v, 24 - 8 * kColumn);
        return _mm512_cvtepi32_ps(_mm512_srai_epi32(v, 24));
      }
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
  __m512i sum[4] = {_mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512(), _mm512_setzero_si512()};
  size_t at = 0;
  for (; at + 4 * kLine <= bytes; at += 4 * kLine) {
    for (int i = 0; i < 4; ++i) {
      __builtin_prefetch(data + at + kReadAhead + i * kLine);
      sum[i] = _mm512_xor_si512(sum[i], _mm512_loadu_si512(data + at + i * kLine));
    }
  }
  const __m512i all = _mm512_xor_si512(_mm512_xor_si512(sum[0], sum[1]), _mm512_xor_si512(sum[2], sum[3]));
  return uint64_t(_mm512_reduce_add_epi64(all));
}

}  // namespace

namespace layerwise {
const Path kAvx512 = {"avx512", multiply, decode, read_lines, dots, side_by_side, sparse, quantize};
}
