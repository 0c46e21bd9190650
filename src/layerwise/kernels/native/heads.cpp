// Attention of single queries over a cache, as a decoder's new tokens are: softmax(q k^T) v, for one head at a time.
//
// A score is a sum of 16 partial sums, which for several keys at once are brought together in pairs, by halves: three
// instructions a key. Products and sums are rounded by themselves, in one order: all targets give the same bits.
#include <math.h>
#include <string.h>

#include <utility>

#include "parts.h"
#include "vectors.h"

namespace layerwise {

namespace {

// Of the numbers 0, 1, .. of two vectors those whose place in runs of 2 * kStep is in the first half.
template <int kStep>
constexpr int place_of(int i) { return i / kStep * 2 * kStep + i % kStep; }

template <class V, int kStep, size_t... kPlaces>
LAYERWISE_STEP typename V::Floats halved_at(const typename V::Floats& a, const typename V::Floats& b,
                                            std::index_sequence<kPlaces...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, place_of<kStep>(kPlaces)...) +
         __builtin_shufflevector(a, b, (place_of<kStep>(kPlaces) + kStep)...);
#else
  typedef typename V::Ints Ints;
  return __builtin_shuffle(a, b, Ints{place_of<kStep>(kPlaces)...}) +
         __builtin_shuffle(a, b, Ints{(place_of<kStep>(kPlaces) + kStep)...});
#endif
}

// Runs of 2 * kStep numbers of a and b, each added half to half: those of a, then those of b.
template <class V, int kStep>
LAYERWISE_STEP typename V::Floats halved(const typename V::Floats& a, const typename V::Floats& b) {
  return halved_at<V, kStep>(a, b, std::make_index_sequence<V::kLanes>());
}

// The 16 partial sums of q k, as one vector: added half to half as far as they are in several.
template <class V>
LAYERWISE_STEP typename V::Floats partial(const float* q, const float* k, int64_t dim) {
  using Floats = typename V::Floats;
  constexpr int kParts = kSumLanes / V::kLanes;
  Floats sum[kParts] = {};
  for (int64_t i = 0; i < dim; i += kSumLanes) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) sum[p] += V::at(q + i + p * V::kLanes) * V::at(k + i + p * V::kLanes);
  }
#pragma GCC unroll 2
  for (int half = kParts / 2; half > 0; half /= 2) {
#pragma GCC unroll 2
    for (int p = 0; p < half; ++p) sum[p] += sum[p + half];
  }
  return sum[0];
}

// Scores of as many keys as there are lanes; those behind the last one are the last one's.
template <class V>
LAYERWISE_STEP typename V::Floats some_scores(const float* q, const float* k, int64_t count, int64_t dim) {
  typename V::Floats sum[V::kLanes];
#pragma GCC unroll 16
  for (int j = 0; j < V::kLanes; ++j) sum[j] = partial<V>(q, k + (j < count ? j : count - 1) * dim, dim);
  if constexpr (V::kLanes == 16) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) sum[j] = halved<V, 8>(sum[2 * j], sum[2 * j + 1]);
  }
  if constexpr (V::kLanes >= 8) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[j] = halved<V, 4>(sum[2 * j], sum[2 * j + 1]);
  }
#pragma GCC unroll 2
  for (int j = 0; j < 2; ++j) sum[j] = halved<V, 2>(sum[2 * j], sum[2 * j + 1]);
  return halved<V, 1>(sum[0], sum[1]);
}

// kVectors vectors of the result from feature 0 of `values` on; even and odd keys each have sums of their own.
template <class V, int kVectors>
LAYERWISE_STEP void weighted(const float* weights, const float* values, int64_t count, int64_t dim, float times,
                             float* out) {
  using Floats = typename V::Floats;
  Floats even[kVectors] = {}, odd[kVectors] = {};
  int64_t j = 0;
  for (; j + 2 <= count; j += 2, values += 2 * dim) {
#pragma GCC unroll 8
    for (int p = 0; p < kVectors; ++p) {
      even[p] += V::at(values + p * V::kLanes) * weights[j];
      odd[p] += V::at(values + dim + p * V::kLanes) * weights[j + 1];
    }
  }
  if (j < count) {
#pragma GCC unroll 8
    for (int p = 0; p < kVectors; ++p) even[p] += V::at(values + p * V::kLanes) * weights[j];
  }
#pragma GCC unroll 8
  for (int p = 0; p < kVectors; ++p) V::store(out + p * V::kLanes, (even[p] + odd[p]) * times);
}

template <class V>
LAYERWISE_STEP void look(const float* query, const float* keys, const float* values, int64_t count, int64_t dim,
                         float* scores, float* out) {
  using Floats = typename V::Floats;
  constexpr int kParts = kSumLanes / V::kLanes;
  Floats highest = V::same(-INFINITY);
  for (int64_t j = 0; j < count; j += V::kLanes) {
    const Floats found = some_scores<V>(query, keys + j * dim, count - j, dim);
    V::store(scores + j, found);
    highest = found > highest ? found : highest;
  }
  float most = -INFINITY;
  for (int lane = 0; lane < V::kLanes; ++lane) most = highest[lane] > most ? highest[lane] : most;
  for (int64_t j = count; j % kSumLanes; ++j) scores[j] = -INFINITY;
  Floats sum[kParts] = {};
  for (int64_t j = 0; j < count; j += kSumLanes) {
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) {
      const Floats v = exponential<V>(V::at(scores + j + p * V::kLanes), V::same(most));
      V::store(scores + j + p * V::kLanes, v);
      sum[p] += v;
    }
  }
  const float times = 1.0f / sum_of<V>(sum);
  constexpr int kWide = 4;  // with two sums each: half of 16 registers
  int64_t d = 0;
  for (; d + kWide * V::kLanes <= dim; d += kWide * V::kLanes) {
    weighted<V, kWide>(scores, values + d, count, dim, times, out + d);
  }
  for (; d < dim; d += kSumLanes) weighted<V, kParts>(scores, values + d, count, dim, times, out + d);
}

LAYERWISE_STEP void turn(const float* x, const float* cosine, const float* sine, int64_t turned, int64_t dim, float scale,
                         float* out) {
  const int64_t half = turned / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float a = x[i], b = x[half + i];
    out[i] = (a * cosine[i] - b * sine[i]) * scale;
    out[half + i] = (b * cosine[half + i] + a * sine[half + i]) * scale;
  }
  for (int64_t i = turned; i < dim; ++i) out[i] = x[i] * scale;
}

#define HEADS(name, bytes, target)                                                                                    \
  target void turn_##name(const float* x, const float* cosine, const float* sine, int64_t turned, int64_t dim,        \
                          float scale, float* out) {                                                                  \
    turn(x, cosine, sine, turned, dim, scale, out);                                                                   \
  }                                                                                                                   \
  target void look_##name(const float* query, const float* keys, const float* values, int64_t count, int64_t dim,     \
                          float* scores, float* out) {                                                                \
    look<Vector<bytes>>(query, keys, values, count, dim, scores, out);                                                \
  }                                                                                                                   \
  constexpr Heads heads_##name = {turn_##name, look_##name}

HEADS(portable, 16, );
#if defined(LAYERWISE_X86)
HEADS(avx2, 32, __attribute__((target("avx2"))));
HEADS(avx512, 64, __attribute__((target("avx512f,avx512bw,avx512vl"))));
#endif

}  // namespace

const Heads& heads_of(const Path& path) {
#if defined(LAYERWISE_X86)
  if (strcmp(path.name, "avx512") == 0) return heads_avx512;
  if (strcmp(path.name, "avx2") == 0) return heads_avx2;
#endif
  (void)path;
  return heads_portable;
}

}  // namespace layerwise
