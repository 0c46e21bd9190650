// What a transformer block does with rows of floats between its products: sums, norms, GELU, gates.
//
// Products and sums are rounded by themselves (no fused ones), in one order: all targets give the same bits.
#include <math.h>
#include <string.h>

#include "parts.h"
#include "vectors.h"

namespace layerwise {

namespace {

// `width` is a multiple of 16. The row lies in the first cache from the first pass on.
template <class V>
LAYERWISE_STEP void normalize(const float* x, const float* y, int64_t width, const float* weight, const float* shift,
                              float epsilon, float* sum, float* out) {
  using Floats = typename V::Floats;
  constexpr int kParts = kSumLanes / V::kLanes;
  float* kept = sum != nullptr ? sum : out;
  Floats all[kParts] = {}, squares[kParts] = {};
  for (int64_t i = 0; i < width; i += kSumLanes) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const int64_t at = i + p * V::kLanes;
      Floats v = V::at(x + at);
      if (y != nullptr) v += V::at(y + at);
      V::store(kept + at, v);
      all[p] += v;
    }
  }
  const float mean = sum_of<V>(all) / float(width);
  for (int64_t i = 0; i < width; i += kSumLanes) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const Floats v = V::at(kept + i + p * V::kLanes) - mean;
      squares[p] += v * v;
    }
  }
  const float inverse = 1.0f / sqrtf(sum_of<V>(squares) / float(width) + epsilon);
  for (int64_t i = 0; i < width; i += V::kLanes) {
    Floats v = (V::at(kept + i) - mean) * inverse * V::at(weight + i);
    if (shift != nullptr) v += V::at(shift + i);
    V::store(out + i, v);
  }
}

// The same without a mean: sum / sqrt(mean of squares + epsilon) * weight + shift.
template <class V>
LAYERWISE_STEP void scale(const float* x, const float* y, int64_t width, const float* weight, const float* shift,
                          float epsilon, float* sum, float* out) {
  using Floats = typename V::Floats;
  constexpr int kParts = kSumLanes / V::kLanes;
  float* kept = sum != nullptr ? sum : out;
  Floats squares[kParts] = {};
  for (int64_t i = 0; i < width; i += kSumLanes) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const int64_t at = i + p * V::kLanes;
      Floats v = V::at(x + at);
      if (y != nullptr) v += V::at(y + at);
      V::store(kept + at, v);
      squares[p] += v * v;
    }
  }
  const float inverse = 1.0f / sqrtf(sum_of<V>(squares) / float(width) + epsilon);
  for (int64_t i = 0; i < width; i += V::kLanes) {
    Floats v = V::at(kept + i) * inverse * V::at(weight + i);
    if (shift != nullptr) v += V::at(shift + i);
    V::store(out + i, v);
  }
}

template <class V>
LAYERWISE_STEP void add(const float* x, const float* y, int64_t width, float* out) {
  for (int64_t i = 0; i < width; i += V::kLanes) V::store(out + i, V::at(x + i) + V::at(y + i));
}

// x times the probability that a normal variable is below x: max(x, 0) - a tail(a), a = |x|. The tail is a polynomial in
// t = 2 a / 5.5 - 1, fitted so that the largest error of a tail(a) is least (1.3e-7); behind 5.5 it is below 1.1e-7.
constexpr float kEnd = 5.5f;
constexpr float kTail[] = {2.979774261e-03f,  -2.500806190e-02f, 9.455793351e-02f,  -2.068080455e-01f,
                           2.718897462e-01f,  -1.771654040e-01f, -5.139722303e-02f, 2.184348404e-01f,
                           -1.630588472e-01f, -3.492520005e-02f, 1.332054287e-01f,  -4.907513782e-02f,
                           -4.350793362e-02f, 3.013109043e-02f,  5.327594467e-03f,  -5.580551922e-03f};
constexpr int kTerms = int(sizeof(kTail) / sizeof(kTail[0]));

template <class V, int kVectors>
LAYERWISE_STEP void gelu_at(float* x) {  // several vectors at a time: a step of the polynomial waits for the one before
  using Floats = typename V::Floats;
  Floats a[kVectors], t[kVectors], p[kVectors];
  const Floats end = V::same(kEnd);
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
    a[i] = V::size(V::at(x + i * V::kLanes));
    a[i] = end < a[i] ? end : a[i];  // written so that NaN stays NaN
    t[i] = a[i] * (2.0f / kEnd) - 1.0f;
    p[i] = t[i] * kTail[kTerms - 1] + kTail[kTerms - 2];
  }
#pragma GCC unroll 32
  for (int k = kTerms - 3; k >= 0; --k) {
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; ++i) p[i] = p[i] * t[i] + kTail[k];
  }
#pragma GCC unroll 8
  for (int i = 0; i < kVectors; ++i) {
    const Floats v = V::at(x + i * V::kLanes);
    V::store(x + i * V::kLanes, (v < 0.0f ? Floats{} : v) - a[i] * p[i]);
  }
}

template <class V>
LAYERWISE_STEP void gelu(float* x, int64_t count) {
  constexpr int kVectors = 4;
  int64_t i = 0;
  for (; i + kVectors * V::kLanes <= count; i += kVectors * V::kLanes) gelu_at<V, kVectors>(x + i);
  for (; i < count; i += V::kLanes) {
    const int64_t left = count - i < V::kLanes ? count - i : V::kLanes;
    float row[V::kLanes] = {};
    memcpy(row, x + i, size_t(left) * sizeof(float));
    gelu_at<V, 1>(row);
    memcpy(x + i, row, size_t(left) * sizeof(float));
  }
}

// x / (1 + e^-x) times `by`. Of e^-|x| no power is too large.
template <class V>
LAYERWISE_STEP void gated_at(const float* x, const float* by, float* out) {
  using Floats = typename V::Floats;
  const Floats v = V::at(x), zero = {};
  const Floats e = exponential<V>(zero - V::size(v), zero), one = V::same(1.0f);
  V::store(out, v * (v < 0.0f ? e : one) / (one + e) * V::at(by));
}

template <class V>
LAYERWISE_STEP void gated(const float* x, const float* by, int64_t count, float* out) {
  int64_t i = 0;
  for (; i + V::kLanes <= count; i += V::kLanes) gated_at<V>(x + i, by + i, out + i);
  if (i == count) return;
  float rows[3][V::kLanes] = {};
  const size_t left = size_t(count - i) * sizeof(float);
  memcpy(rows[0], x + i, left), memcpy(rows[1], by + i, left);
  gated_at<V>(rows[0], rows[1], rows[2]);
  memcpy(out + i, rows[2], left);
}

#define ROWS(name, bytes, target)                                                                              \
  target void normalize_##name(const float* x, const float* y, int64_t width, const float* weight,             \
                               const float* shift, float epsilon, float* sum, float* out) {                    \
    normalize<Vector<bytes>>(x, y, width, weight, shift, epsilon, sum, out);                                   \
  }                                                                                                            \
  target void scale_##name(const float* x, const float* y, int64_t width, const float* weight,                 \
                           const float* shift, float epsilon, float* sum, float* out) {                        \
    scale<Vector<bytes>>(x, y, width, weight, shift, epsilon, sum, out);                                       \
  }                                                                                                            \
  target void add_##name(const float* x, const float* y, int64_t width, float* out) {                          \
    add<Vector<bytes>>(x, y, width, out);                                                                      \
  }                                                                                                            \
  target void gelu_##name(float* x, int64_t count) { gelu<Vector<bytes>>(x, count); }                          \
  target void gated_##name(const float* x, const float* by, int64_t count, float* out) {                       \
    gated<Vector<bytes>>(x, by, count, out);                                                                   \
  }                                                                                                            \
  constexpr Rows rows_##name = {normalize_##name, scale_##name, add_##name, gelu_##name, gated_##name}

ROWS(portable, 16, );
#if defined(LAYERWISE_X86)
ROWS(avx2, 32, __attribute__((target("avx2"))));
ROWS(avx512, 64, __attribute__((target("avx512f,avx512bw,avx512vl"))));
#endif

}  // namespace

const Rows& rows_of(const Path& path) {
#if defined(LAYERWISE_X86)
  if (strcmp(path.name, "avx512") == 0) return rows_avx512;
  if (strcmp(path.name, "avx2") == 0) return rows_avx2;
#endif
  (void)path;
  return rows_portable;
}

}  // namespace layerwise
