// The inner loops of encoders that round to grids of integers; what they compute is said in encoding/loops.py, whose
// functions they repeat bit for bit. Here they need no compiler at run time, which takes a second and 130 MB to load.
//
// Additions in the order written, no fused products; a rounding to the nearest even integer is an addition and a
// subtraction. Every loop over independent sums is innermost, so that it may take vectors without changing an order.
#include <string.h>

#include "parts.h"

namespace layerwise {

namespace {

#define LAYERWISE_STEP inline __attribute__((always_inline))

constexpr double kRound64 = 6755399441055744.0;  // 1.5 * 2^52
constexpr float kRound32 = 12582912.0f;          // 1.5 * 2^23
constexpr int kLanes = 16;

template <class T>
LAYERWISE_STEP T greater(T a, T b) {
  return b > a ? b : a;
}

template <class T>
LAYERWISE_STEP T less(T a, T b) {
  return b < a ? b : a;
}

LAYERWISE_STEP double nearest_code(double value, double step, double zero, double top) {
  const double level = less(greater(value / step, -1.0 - zero), top + 1.0 - zero);
  return less(greater((level + kRound64) - kRound64 + zero, 0.0), top);
}

LAYERWISE_STEP void best_candidates(const Candidates& c) {
  for (int64_t i = 0; i < c.rows; ++i) {
    const float* row = c.weight + i * c.columns;
    for (int64_t g = 0; g < c.groups; ++g) {
      const float* step = c.step + (i * c.groups + g) * c.candidates;
      const float* zero = c.zero + (i * c.groups + g) * c.candidates;
      const int64_t first = g * c.width, last = less(first + c.width, c.columns);
      float least = 0.0f;
      int64_t best = -1;
      for (int64_t k0 = 0; k0 < c.candidates; k0 += kLanes) {
        const int lanes = int(less<int64_t>(kLanes, c.candidates - k0));
        float s[kLanes], z[kLanes], inverse[kLanes], error[kLanes];
        for (int k = 0; k < kLanes; ++k) {
          s[k] = k < lanes ? step[k0 + k] : 1.0f;
          z[k] = k < lanes ? zero[k0 + k] : 0.0f;
          inverse[k] = 1.0f / s[k];
          error[k] = 0.0f;
        }
        for (int64_t j = first; j < last; ++j) {
          const float w = row[j], h = c.importance[j];
          for (int k = 0; k < kLanes; ++k) {
            const float level = (w * inverse[k] + kRound32) - kRound32 + z[k];
            const float d = w - (less(greater(level, 0.0f), c.top) - z[k]) * s[k];
            error[k] += h * d * d;
          }
        }
        for (int k = 0; k < lanes; ++k) {
          if (best < 0 || error[k] < least) {
            least = error[k];
            best = k0 + k;
          }
        }
      }
      c.best[i * c.groups + g] = best;
    }
  }
}

LAYERWISE_STEP void nearest_codes(const Nearest& n) {
  for (int64_t i = 0; i < n.rows; ++i) {
    const float *row = n.weight + i * n.columns, *step = n.step + i * n.groups, *zero = n.zero + i * n.groups;
    uint8_t* codes = n.codes + i * n.columns;
    for (int64_t g = 0; g < n.groups; ++g) {
      const int64_t last = less((g + 1) * n.width, n.columns);
      const double s = step[g], z = zero[g];
      for (int64_t j = g * n.width; j < last; ++j) codes[j] = uint8_t(int32_t(nearest_code(row[j], s, z, n.top)));
    }
  }
}

LAYERWISE_STEP void round_columns(const Tile& t) {
  for (int64_t b = t.width - 1; b >= 0; --b) {
    const int64_t j = t.first + b, g = t.group_of[j];
    const float *weight = t.weight + j * t.rows, *step = t.step + g * t.rows, *zero = t.zero + g * t.rows;
    double *change = t.change + j * t.rows, *carried = t.carried + b * t.rows;
    uint8_t* codes = t.codes + j * t.rows;
    const int64_t last = t.first_row + t.height;
    for (int64_t i = t.first_row; i < last; ++i) {
      const float s = step[i], z = zero[i];
      const double w = weight[i];
      const double code = nearest_code(w - carried[i], s, z, t.top);
      codes[i] = uint8_t(int32_t(code));
      change[i] = double(s * (float(code) - z)) - w;
    }
    for (int64_t k = 0; k < b; ++k) {
      const double factor = t.lower[b * t.width + k];
      double* into = t.carried + k * t.rows;
      for (int64_t i = t.first_row; i < last; ++i) into[i] += change[i] * factor;
    }
  }
}

#define GRIDS(name, target)                                            \
  target void best_##name(const Candidates& c) { best_candidates(c); } \
  target void nearest_##name(const Nearest& n) { nearest_codes(n); }   \
  target void columns_##name(const Tile& t) { round_columns(t); }      \
  constexpr Grids grids_##name = {best_##name, nearest_##name, columns_##name}

GRIDS(portable, );
#if defined(LAYERWISE_X86)
GRIDS(avx2, __attribute__((target("avx2"))));
GRIDS(avx512, __attribute__((target("avx512f,avx512bw,avx512vl"))));
#endif

}  // namespace

const Grids& grids_of(const Path& path) {
#if defined(LAYERWISE_X86)
  if (strcmp(path.name, "avx512") == 0) return grids_avx512;
  if (strcmp(path.name, "avx2") == 0) return grids_avx2;
#endif
  (void)path;
  return grids_portable;
}

}  // namespace layerwise
