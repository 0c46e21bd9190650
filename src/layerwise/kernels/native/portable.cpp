// Plain C++ for every other processor, and what the other paths are held against.
#include <math.h>
#include <string.h>

#include "half.h"
#include "layout.h"

namespace {

struct Simd {
  struct Floats {
    float lane[16];
  };
  struct Ints {
    int32_t lane[16];
  };
  struct Bytes {
    uint8_t byte[64];
  };
  static constexpr int kChains = 2;
  static constexpr int kTokens = 1;
  static constexpr int kSums = 1;
  static constexpr int kPanelSums = 1;
  static constexpr bool kSplits = false;
  static constexpr bool kShifts = false;
  static constexpr int kSparseTokens = 1;
  static constexpr int kHalves = 1;

#define LAYERWISE_LANES(type, value)                     \
  type out;                                              \
  for (int r = 0; r < 16; ++r) out.lane[r] = (value);    \
  return out

  static inline Bytes load(const uint8_t* from) {
    Bytes out;
    memcpy(out.byte, from, 64);
    return out;
  }
  static inline void keep(uint8_t* to, const Bytes& v) { memcpy(to, v.byte, 64); }
  static inline Bytes join(Bytes a, Bytes b) {
    for (int i = 0; i < 64; ++i) a.byte[i] |= b.byte[i];
    return a;
  }
  template <int kShift, int kMask>
  static inline Bytes field(Bytes v) {
    for (int i = 0; i < 64; ++i) {
      v.byte[i] = uint8_t((kShift >= 0 ? v.byte[i] >> (kShift & 7) : v.byte[i] << (-kShift & 7)) & kMask);
    }
    return v;
  }

  // For trellis.h.
  template <int kBack>
  static inline Bytes turned(const Bytes& own, const Bytes& other) {
    Bytes out;
    memcpy(out.byte, other.byte + 64 - 4 * kBack, 4 * kBack);
    memcpy(out.byte + 4 * kBack, own.byte, 64 - 4 * kBack);
    return out;
  }
  template <int kShift>
  static inline Bytes shifted(const Bytes& v) { return field<kShift, 255>(v); }
  template <int kMask>
  static inline Bytes select(Bytes a, const Bytes& b) {
    for (int i = 0; i < 64; ++i) a.byte[i] = uint8_t((a.byte[i] & kMask) | (b.byte[i] & ~kMask));
    return a;
  }

  struct Plain {
    static constexpr bool kAtOnce = false;
    const uint8_t* values;

    inline Bytes of(Bytes state) const {
      for (int i = 0; i < 64; ++i) state.byte[i] = values[state.byte[i]];
      return state;
    }
  };

  template <typename What>
  static inline void look_up(const uint8_t* values, What&& what) { what(Plain{values}); }

  static inline Floats same(float v) { LAYERWISE_LANES(Floats, v); }
  static inline Ints whole(int32_t v) { LAYERWISE_LANES(Ints, v); }
  static inline Floats floats(const float* from) { LAYERWISE_LANES(Floats, from[r]); }
  static inline Floats halves(const uint8_t* from) {
    uint16_t half[16];
    memcpy(half, from, 32);
    LAYERWISE_LANES(Floats, half_to_float(half[r]));
  }
  static inline Ints bytes(const uint8_t* from) { LAYERWISE_LANES(Ints, from[r]); }
  static inline Ints ints(const int32_t* from) { LAYERWISE_LANES(Ints, from[r]); }
  static inline void keep_minus(int32_t* to, const Ints& v) {  // -v in the lower half of every lane, 0 in the upper
    for (int r = 0; r < 16; ++r) to[r] = -v.lane[r] & 0xffff;
  }
  static inline Ints times_low(const Ints& v, int32_t by) { LAYERWISE_LANES(Ints, int16_t(v.lane[r]) * int16_t(by)); }
  static inline Ints bits(const Floats& v) {
    Ints out;
    memcpy(out.lane, v.lane, 64);
    return out;
  }
  static inline void keep_low(int8_t* to, const Ints& v) {  // the low byte of every lane
    for (int r = 0; r < 16; ++r) to[r] = int8_t(v.lane[r]);
  }
  static inline Floats to_float(Ints v) { LAYERWISE_LANES(Floats, float(v.lane[r])); }
  static inline Floats plus(Floats a, Floats b) { LAYERWISE_LANES(Floats, a.lane[r] + b.lane[r]); }
  static inline Floats minus(Floats a, Floats b) { LAYERWISE_LANES(Floats, a.lane[r] - b.lane[r]); }
  static inline Floats times(Floats a, Floats b) { LAYERWISE_LANES(Floats, a.lane[r] * b.lane[r]); }
  static inline Ints plus(Ints a, Ints b) { LAYERWISE_LANES(Ints, a.lane[r] + b.lane[r]); }
  static inline Ints minus(Ints a, Ints b) { LAYERWISE_LANES(Ints, a.lane[r] - b.lane[r]); }
  static inline Ints times(Ints a, Ints b) { LAYERWISE_LANES(Ints, a.lane[r] * b.lane[r]); }
  static inline Floats fma(Floats a, Floats b, Floats c) { LAYERWISE_LANES(Floats, a.lane[r] * b.lane[r] + c.lane[r]); }
  // Where the result must be that of the fused instruction: exact, and slow without one.
  static inline Floats fused(Floats a, Floats b, Floats c) {
    LAYERWISE_LANES(Floats, fmaf(a.lane[r], b.lane[r], c.lane[r]));
  }
  static inline Floats less(Floats c, Floats a, Floats b) { LAYERWISE_LANES(Floats, c.lane[r] - a.lane[r] * b.lane[r]); }
  static inline int32_t sum(const Ints& v) {
    int32_t sum = 0;
    for (int32_t lane : v.lane) sum += lane;
    return sum;
  }
  static inline Floats sum_chains(const Floats* s) { return plus(s[0], s[1]); }
  static inline void store(float* to, Floats v) { memcpy(to, v.lane, 64); }
#undef LAYERWISE_LANES

  // Sixteen columns of kept values: those at `from`, spread to the lanes of the bits of `mask`.
  template <int kKind>
  static inline Floats kept(const uint8_t* from, uint32_t mask, const Ints& low, int up, const Floats& floor) {
    Floats out;
    for (int r = 0; r < 16; ++r) {
      out.lane[r] = 0.0f;
      if ((mask >> r & 1) == 0) continue;
      if constexpr (kKind == layerwise::kCodeValues) {
        const float size = float(*from & low.lane[r]) + floor.lane[r];
        out.lane[r] = (uint32_t(*from) << up) >> 31 ? -size : size;
        from += 1;
      } else {
        uint16_t half;
        memcpy(&half, from, 2);
        const uint32_t brain = uint32_t(half) << 16;
        memcpy(&out.lane[r], &brain, 4);
        if constexpr (kKind == layerwise::kHalfValues) out.lane[r] = half_to_float(half);
        from += 2;
      }
    }
    return out;
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
    for (int r = 0; r < 16; ++r) {
      for (int j = 0; j < 4; ++j) sum.lane[r] += int32_t(codes.byte[4 * r + j]) * x[j];
    }
    return sum;
  }

  template <int kBits, bool kTable>
  struct Weights {
    const layerwise::Matrix& m;

    explicit inline Weights(const layerwise::Matrix& matrix) : m(matrix) {}
    inline const Bytes& prepare(const Bytes& codes) const { return codes; }

    template <int kColumn>
    inline Floats column(const Bytes& v) const {
      Floats out;
      for (int r = 0; r < 16; ++r) {
        const int code = v.byte[4 * r + kColumn];
        out.lane[r] = kTable ? m.levels[code & 15] : float(code - m.centre);
      }
      return out;
    }
  };
};

}  // namespace

#include "activations.h"
#include "sparse_loops.h"
#include "tile_loops.h"

namespace {

uint64_t read_lines(const uint8_t* data, size_t bytes) {
  uint64_t sum[8] = {};
  for (size_t at = 0; at + kLine <= bytes; at += kLine) {
    uint64_t line[8];
    memcpy(line, data + at, kLine);
    for (int i = 0; i < 8; ++i) sum[i] ^= line[i];
  }
  uint64_t all = 0;
  for (int i = 0; i < 8; ++i) all ^= sum[i];
  return all;
}

}  // namespace

namespace layerwise {
const Path kPortable = {"portable", multiply, decode, read_lines, dots, side_by_side, sparse, quantize};
}
