// NEON of 64-bit ARM: a tile's 16 rows are four registers. Included by neon.cpp and neon_dot.cpp, which is compiled for
// processors with the dot-product extension and says so with LAYERWISE_DOT; all of it is in the anonymous namespace.
#pragma once

#include <arm_neon.h>

#include "layout.h"

namespace {

// For every set of eight lanes: how many of them lie below each lane, which is the place of that lane's value. A lane
// that is not in the set has a place that a look-up finds nothing at, which is 0, and nothing at twice the place either.
struct KeptPlaces {
  uint8_t of[256][8] = {};

  constexpr KeptPlaces() {
    for (int mask = 0; mask < 256; ++mask) {
      for (int lane = 0, below = 0; lane < 8; ++lane) {
        const int here = mask >> lane & 1;
        of[mask][lane] = uint8_t(here ? below : 127);
        below += here;
      }
    }
  }
};

constexpr KeptPlaces kPlaces;

#define LAYERWISE_ONE(f, a) {{f(a.q[0]), f(a.q[1]), f(a.q[2]), f(a.q[3])}}
#define LAYERWISE_TWO(f, a, b) {{f(a.q[0], b.q[0]), f(a.q[1], b.q[1]), f(a.q[2], b.q[2]), f(a.q[3], b.q[3])}}
#define LAYERWISE_THREE(f, a, b, c) \
  {{f(a.q[0], b.q[0], c.q[0]), f(a.q[1], b.q[1], c.q[1]), f(a.q[2], b.q[2], c.q[2]), f(a.q[3], b.q[3], c.q[3])}}
#define LAYERWISE_WITH(f, a, v) {{f(a.q[0], v), f(a.q[1], v), f(a.q[2], v), f(a.q[3], v)}}

struct Simd {
  struct Floats {
    float32x4_t q[4];
  };
  struct Ints {
    int32x4_t q[4];
  };
  struct Bytes {
    uint8x16_t q[4];
  };
  static constexpr int kChains = 2;  // times four registers
  static constexpr int kTokens = 2;  // 16 sums of 32 registers
  static constexpr int kSums = 4;    // 16 of 32 registers
  static constexpr int kPanelSums = 4;
  static constexpr bool kSplits = true;  // codes of eight bits take more than a dot product
  static constexpr bool kShifts = false;
  static constexpr int kSparseTokens = 2;
  static constexpr int kHalves = 1;

  static inline Bytes load(const uint8_t* from) {
    return {{vld1q_u8(from), vld1q_u8(from + 16), vld1q_u8(from + 32), vld1q_u8(from + 48)}};
  }
  static inline void keep(uint8_t* to, Bytes v) {
    vst1q_u8(to, v.q[0]), vst1q_u8(to + 16, v.q[1]), vst1q_u8(to + 32, v.q[2]), vst1q_u8(to + 48, v.q[3]);
  }
  static inline Bytes join(Bytes a, Bytes b) { return LAYERWISE_TWO(vorrq_u8, a, b); }

  template <int kShift, int kMask>
  static inline uint8x16_t field_of(uint8x16_t v) {
    constexpr int kLeft = kShift < 0 ? -kShift : 0, kRight = kShift > 0 ? kShift : 0;
    if constexpr (kRight > 0) v = vshrq_n_u8(v, kRight);
    if constexpr (kLeft > 0) v = vshlq_n_u8(v, kLeft);
    if constexpr (kMask == (255 >> kRight << kLeft & 255)) return v;  // nothing else is left
    return vandq_u8(v, vdupq_n_u8(kMask));
  }
  template <int kShift, int kMask>
  static inline Bytes field(Bytes v) {
    return LAYERWISE_ONE((field_of<kShift, kMask>), v);
  }

  // For trellis.h.
  template <int kBack>
  static inline uint8x16_t turned_quarter(uint8x16_t own, uint8x16_t before) {
    if constexpr (kBack == 4) return before;
    return vextq_u8(before, own, (16 - 4 * kBack) & 15);
  }
  template <int kBack>
  static inline Bytes turned(Bytes own, Bytes other) {
    return {{turned_quarter<kBack>(own.q[0], other.q[3]), turned_quarter<kBack>(own.q[1], own.q[0]),
             turned_quarter<kBack>(own.q[2], own.q[1]), turned_quarter<kBack>(own.q[3], own.q[2])}};
  }
  template <int kShift>
  static inline Bytes shifted(Bytes v) {
    return field<kShift, (kShift > 0 ? 255 >> kShift : 255 << -kShift & 255)>(v);
  }
  template <int kMask>
  static inline Bytes select(Bytes a, Bytes b) {
    const uint8x16_t mask = vdupq_n_u8(kMask);
    return {{vbslq_u8(mask, a.q[0], b.q[0]), vbslq_u8(mask, a.q[1], b.q[1]), vbslq_u8(mask, a.q[2], b.q[2]),
             vbslq_u8(mask, a.q[3], b.q[3])}};
  }

  // Sixty-four values at a time; a place beyond them leaves what is there.
  struct Permuted {
    static constexpr bool kAtOnce = false;
    uint8x16x4_t values[4];

    explicit inline Permuted(const uint8_t* from)
        : values{vld1q_u8_x4(from), vld1q_u8_x4(from + 64), vld1q_u8_x4(from + 128), vld1q_u8_x4(from + 192)} {}

    inline uint8x16_t quarter_of(uint8x16_t state) const {
      uint8x16_t found = vqtbl4q_u8(values[0], state);
      found = vqtbx4q_u8(found, values[1], vsubq_u8(state, vdupq_n_u8(64)));
      found = vqtbx4q_u8(found, values[2], vsubq_u8(state, vdupq_n_u8(128)));
      return vqtbx4q_u8(found, values[3], vsubq_u8(state, vdupq_n_u8(192)));
    }

    inline Bytes of(Bytes state) const { return LAYERWISE_ONE(quarter_of, state); }
  };

  template <typename What>
  static inline void look_up(const uint8_t* values, What&& what) { what(Permuted(values)); }

  static inline Floats same(float v) { return {{vdupq_n_f32(v), vdupq_n_f32(v), vdupq_n_f32(v), vdupq_n_f32(v)}}; }
  static inline Ints whole(int32_t v) { return {{vdupq_n_s32(v), vdupq_n_s32(v), vdupq_n_s32(v), vdupq_n_s32(v)}}; }
  static inline Floats floats(const float* from) {
    return {{vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)}};
  }
  static inline void store(float* to, Floats v) {
    vst1q_f32(to, v.q[0]), vst1q_f32(to + 4, v.q[1]), vst1q_f32(to + 8, v.q[2]), vst1q_f32(to + 12, v.q[3]);
  }
  static inline Floats widened(uint8x16_t low, uint8x16_t high) {  // from fp16
    const float16x8_t a = vreinterpretq_f16_u8(low), b = vreinterpretq_f16_u8(high);
    return {{vcvt_f32_f16(vget_low_f16(a)), vcvt_high_f32_f16(a), vcvt_f32_f16(vget_low_f16(b)), vcvt_high_f32_f16(b)}};
  }
  static inline Floats halves(const uint8_t* from) { return widened(vld1q_u8(from), vld1q_u8(from + 16)); }
  static inline Ints bytes_of(uint8x16_t v) {
    const uint16x8_t low = vmovl_u8(vget_low_u8(v)), high = vmovl_high_u8(v);
    return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_high_u16(low)),
             vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))), vreinterpretq_s32_u32(vmovl_high_u16(high))}};
  }
  static inline Ints bytes(const uint8_t* from) { return bytes_of(vld1q_u8(from)); }
  static inline Ints ints(const int32_t* from) {
    return {{vld1q_s32(from), vld1q_s32(from + 4), vld1q_s32(from + 8), vld1q_s32(from + 12)}};
  }
  static inline void keep_minus(int32_t* to, Ints v) {  // -v in the lower half of every lane, 0 in the upper
    const int32x4_t low = vdupq_n_s32(0xffff);
    const Ints minus = LAYERWISE_ONE(vnegq_s32, v), kept = LAYERWISE_WITH(vandq_s32, minus, low);
    vst1q_s32(to, kept.q[0]), vst1q_s32(to + 4, kept.q[1]), vst1q_s32(to + 8, kept.q[2]), vst1q_s32(to + 12, kept.q[3]);
  }
  static inline Ints times_low(Ints v, int32_t by) {  // of 16 bits each
    const int16x4_t spread = vdup_n_s16(int16_t(by));
    return {{vmull_s16(vmovn_s32(v.q[0]), spread), vmull_s16(vmovn_s32(v.q[1]), spread),
             vmull_s16(vmovn_s32(v.q[2]), spread), vmull_s16(vmovn_s32(v.q[3]), spread)}};
  }
  static inline Ints bits(Floats v) { return LAYERWISE_ONE(vreinterpretq_s32_f32, v); }
  static inline void keep_low(int8_t* to, Ints v) {  // the low byte of every lane
    const int16x8_t low = vmovn_high_s32(vmovn_s32(v.q[0]), v.q[1]), high = vmovn_high_s32(vmovn_s32(v.q[2]), v.q[3]);
    vst1q_s8(to, vmovn_high_s16(vmovn_s16(low), high));
  }
  static inline Floats to_float(Ints v) { return LAYERWISE_ONE(vcvtq_f32_s32, v); }
  static inline Floats plus(Floats a, Floats b) { return LAYERWISE_TWO(vaddq_f32, a, b); }
  static inline Floats minus(Floats a, Floats b) { return LAYERWISE_TWO(vsubq_f32, a, b); }
  static inline Floats times(Floats a, Floats b) { return LAYERWISE_TWO(vmulq_f32, a, b); }
  static inline Ints plus(Ints a, Ints b) { return LAYERWISE_TWO(vaddq_s32, a, b); }
  static inline Ints minus(Ints a, Ints b) { return LAYERWISE_TWO(vsubq_s32, a, b); }
  static inline Ints times(Ints a, Ints b) { return LAYERWISE_TWO(vmulq_s32, a, b); }
  static inline Floats fma(Floats a, Floats b, Floats c) { return LAYERWISE_THREE(vfmaq_f32, c, a, b); }
  static inline Floats fused(Floats a, Floats b, Floats c) { return fma(a, b, c); }
  static inline Floats less(Floats c, Floats a, Floats b) { return LAYERWISE_THREE(vfmsq_f32, c, a, b); }  // c - a b
  static inline int32_t sum(Ints v) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(v.q[0], v.q[1]), vaddq_s32(v.q[2], v.q[3])));
  }
  static inline Floats sum_chains(const Floats* s) { return plus(s[0], s[1]); }

  static inline int32x4_t picked(int32x4_t v, uint32x4_t here) {  // 0 elsewhere
    return vandq_s32(v, vreinterpretq_s32_u32(here));
  }

  // Sixteen columns of kept values: those at `from`, spread to the lanes of the bits of `mask`.
  template <int kKind>
  static inline Floats kept(const uint8_t* from, uint32_t mask, Ints low, int up, Floats floor) {
    const uint8x8_t first = vld1_u8(kPlaces.of[mask & 255]), second = vld1_u8(kPlaces.of[mask >> 8]);
    const int below = __builtin_popcount(mask & 255);
    if constexpr (kKind == layerwise::kCodeValues) {
      const uint8x16_t places = vcombine_u8(first, vadd_u8(second, vdup_n_u8(uint8_t(below))));
      const Ints code = bytes_of(vqtbl1q_u8(vld1q_u8(from), places));
      const Ints moved = LAYERWISE_WITH(vshlq_s32, code, vdupq_n_s32(up));
      const Ints sign = LAYERWISE_WITH(vandq_s32, moved, vdupq_n_s32(INT32_MIN));
      const Ints magnitude = LAYERWISE_TWO(vandq_s32, code, low);
      const Ints size = bits(plus(to_float(magnitude), floor)), v = LAYERWISE_TWO(veorq_s32, size, sign);
      alignas(16) static constexpr uint32_t kBits[4] = {1, 2, 4, 8};
      const uint32x4_t bit = vld1q_u32(kBits), all = vdupq_n_u32(mask);
      const Ints here = {{picked(v.q[0], vtstq_u32(all, bit)), picked(v.q[1], vtstq_u32(all, vshlq_n_u32(bit, 4))),
                          picked(v.q[2], vtstq_u32(all, vshlq_n_u32(bit, 8))),
                          picked(v.q[3], vtstq_u32(all, vshlq_n_u32(bit, 12)))}};
      return LAYERWISE_ONE(vreinterpretq_f32_s32, here);
    } else {
      const uint8x16_t upper = vreinterpretq_u8_u16(vdupq_n_u16(0x0100));  // of the two bytes of a value
      const auto both = [&](uint8x8_t place) __attribute__((always_inline)) {
        const uint8x16_t own = vcombine_u8(vzip1_u8(place, place), vzip2_u8(place, place));
        return vorrq_u8(vshlq_n_u8(own, 1), upper);
      };
      const uint8x16_t values = vqtbl1q_u8(vld1q_u8(from), both(first));
      const uint8x16_t others = vqtbl1q_u8(vld1q_u8(from + 2 * below), both(second));
      if constexpr (kKind == layerwise::kHalfValues) return widened(values, others);
      const uint16x8_t a = vreinterpretq_u16_u8(values), b = vreinterpretq_u16_u8(others), none = vdupq_n_u16(0);
      return {{vreinterpretq_f32_u16(vzip1q_u16(none, a)), vreinterpretq_f32_u16(vzip2q_u16(none, a)),
               vreinterpretq_f32_u16(vzip1q_u16(none, b)), vreinterpretq_f32_u16(vzip2q_u16(none, b))}};
    }
  }

  // Both factors are signed here. Codes of up to seven bits are so as they are; of those of eight bits 128 is taken, and
  // 128 times the sum of the activations added, which is the same for all rows: sum q x = sum (q - 128) x + 128 sum x.
#if defined(LAYERWISE_DOT)
  static inline int32x4_t sums_of_four(int8x16_t x) { return vdotq_s32(vdupq_n_s32(0), vdupq_n_s8(1), x); }

  template <int kBits>
  static inline int32x4_t dot_quarter(int32x4_t sum, int8x16_t codes, int8x16_t x) {
    return vdotq_s32(sum, codes, x);
  }
#else
  static inline int32x4_t sums_of_four(int8x16_t x) { return vpaddlq_s16(vpaddlq_s8(x)); }

  // Two products fit into 16 bits where a code is up to 127 (2 * 127 * 128 = 32512), and not where it may be -128.
  template <int kBits>
  static inline int32x4_t dot_quarter(int32x4_t sum, int8x16_t codes, int8x16_t x) {
    const int16x8_t low = vmull_s8(vget_low_s8(codes), vget_low_s8(x)), high = vmull_high_s8(codes, x);
    if constexpr (kBits < 8) return vpadalq_s16(sum, vpaddq_s16(low, high));
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
  }
#endif

  template <int kBits>
  static inline Ints dot(Ints sum, Bytes codes, const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    const int8x16_t spread = vreinterpretq_s8_s32(vdupq_n_s32(four));
    if constexpr (kBits == 8) {
      const int32x4_t more = vshlq_n_s32(sums_of_four(spread), 7);
      sum = LAYERWISE_WITH(vaddq_s32, sum, more);
      codes = LAYERWISE_WITH(veorq_u8, codes, vdupq_n_u8(128));
    }
    const auto quarter = [&](int32x4_t own, uint8x16_t code) __attribute__((always_inline)) {
      return dot_quarter<kBits>(own, vreinterpretq_s8_u8(code), spread);
    };
    return LAYERWISE_TWO(quarter, sum, codes);
  }

  // Of signed codes with shifted activations, which are not here.
  static Ints shifted_dot(Ints sum, Bytes codes, Ints shifted);
  static void keep_ints(int32_t* to, Ints v);
  static Bytes spread(Ints v);
  static Bytes less_bytes(Bytes a, Bytes b);
  template <int kShift>
  static Ints left(Ints v);

  // The codes of a column for all rows come to lie in one register each; levels are looked up byte by byte.
  template <int kBits, bool kTable>
  struct Weights {
    uint8x16x4_t level;  // the lowest bytes of the 16 levels, the next ones, ...
    uint8x16_t centre;

    explicit inline Weights(const layerwise::Matrix& m)
        : level(vld4q_u8(reinterpret_cast<const uint8_t*>(m.levels))), centre(vdupq_n_u8(uint8_t(m.centre))) {}

    inline Bytes prepare(Bytes codes) const {
      if constexpr (!kTable) codes = LAYERWISE_WITH(vsubq_u8, codes, centre);
      const uint8x16_t even[2] = {vuzp1q_u8(codes.q[0], codes.q[1]), vuzp1q_u8(codes.q[2], codes.q[3])};
      const uint8x16_t odd[2] = {vuzp2q_u8(codes.q[0], codes.q[1]), vuzp2q_u8(codes.q[2], codes.q[3])};
      return {{vuzp1q_u8(even[0], even[1]), vuzp1q_u8(odd[0], odd[1]), vuzp2q_u8(even[0], even[1]),
               vuzp2q_u8(odd[0], odd[1])}};
    }

    template <int kColumn>
    inline Floats column(Bytes v) const {
      const uint8x16_t codes = v.q[kColumn];
      if constexpr (kTable) {
        const uint8x16_t b0 = vqtbl1q_u8(level.val[0], codes), b1 = vqtbl1q_u8(level.val[1], codes);
        const uint8x16_t b2 = vqtbl1q_u8(level.val[2], codes), b3 = vqtbl1q_u8(level.val[3], codes);
        const uint16x8_t low[2] = {pairs(vzip1q_u8(b0, b1)), pairs(vzip2q_u8(b0, b1))};
        const uint16x8_t high[2] = {pairs(vzip1q_u8(b2, b3)), pairs(vzip2q_u8(b2, b3))};
        return {{four(vzip1q_u16(low[0], high[0])), four(vzip2q_u16(low[0], high[0])),
                 four(vzip1q_u16(low[1], high[1])), four(vzip2q_u16(low[1], high[1]))}};
      } else {
        const int8x16_t own = vreinterpretq_s8_u8(codes);
        const int16x8_t low = vmovl_s8(vget_low_s8(own)), high = vmovl_high_s8(own);
        return to_float({{vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)),
                          vmovl_high_s16(high)}});
      }
    }

    static inline uint16x8_t pairs(uint8x16_t v) { return vreinterpretq_u16_u8(v); }
    static inline float32x4_t four(uint16x8_t v) { return vreinterpretq_f32_u16(v); }
  };
};

#undef LAYERWISE_ONE
#undef LAYERWISE_TWO
#undef LAYERWISE_THREE
#undef LAYERWISE_WITH

}  // namespace

#include "activations.h"
#include "sparse_loops.h"
#include "tile_loops.h"

namespace {

uint64_t read_lines(const uint8_t* data, size_t bytes) {
  uint64x2_t sum[4] = {vdupq_n_u64(0), vdupq_n_u64(0), vdupq_n_u64(0), vdupq_n_u64(0)};
  for (size_t at = 0; at + kLine <= bytes; at += kLine) {
    __builtin_prefetch(data + at + 4096);
    for (int i = 0; i < 4; ++i) sum[i] = veorq_u64(sum[i], vreinterpretq_u64_u8(vld1q_u8(data + at + 16 * i)));
  }
  const uint64x2_t all = veorq_u64(veorq_u64(sum[0], sum[1]), veorq_u64(sum[2], sum[3]));
  return vgetq_lane_u64(all, 0) ^ vgetq_lane_u64(all, 1);
}

}  // namespace
