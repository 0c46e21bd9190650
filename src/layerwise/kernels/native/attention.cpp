// Attention over short sequences, as encoders of sentences have: softmax(q k^T scale) v for every sequence and head.
//
// A head's keys are turned over once, so that scores of 32 keys lie side by side; four queries go through them at a
// time, and their scores never leave the first cache. Written in vectors of 16 floats that the compiler lowers to what
// each target has. Products and sums are rounded by themselves (no fused ones), in one order, so that all targets give
// the same bits.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "parts.h"

namespace layerwise {

namespace {

// Vectors are passed between inlined functions only, whatever their registers are.
#pragma GCC diagnostic ignored "-Wpsabi"
#define INLINE inline __attribute__((always_inline))

constexpr int kLanes = 16;
constexpr int kQueries = 4;   // at a time
constexpr int kVectors = 2;   // side by side
constexpr int kWide = kLanes * kVectors;

typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));

INLINE void fill(Floats& to, float value) {
  for (int i = 0; i < kLanes; ++i) to[i] = value;
}

// e^(x - highest) of what is no higher, to about a 10 millionth of it; nothing below e^-87. NaN stays NaN.
INLINE Floats exponential(Floats x, float highest) {
  Floats least;
  fill(least, -87.0f);
  x = x - highest;
  const auto small = x < least;
  x = small ? least : x;
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // the whole number in the low bits
  const Floats whole = shifted - 12582912.0f;
  const Floats r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
  Floats p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Ints bits;
  memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits - 0x4b400000 + 127) << 23;
  Floats power;
  memcpy(&power, &bits, sizeof(power));
  return small ? Floats{} : p * power;
}

INLINE Floats vector_at(const float* from) {
  Floats v;
  memcpy(&v, from, sizeof(v));
  return v;
}

INLINE float largest(const float* row, int64_t wide) {
  Floats most = vector_at(row);
  for (int64_t j = kLanes; j < wide; j += kLanes) {
    const Floats v = vector_at(row + j);
    most = v > most ? v : most;
  }
  float highest = most[0];
  for (int i = 1; i < kLanes; ++i) highest = most[i] > highest ? most[i] : highest;
  return highest;
}

// Scores into weights; returns their sum.
INLINE float weigh(float* row, int64_t wide, float highest) {
  Floats sum = {};
  for (int64_t j = 0; j < wide; j += kLanes) {
    const Floats p = exponential(vector_at(row + j), highest);
    sum += p;
    memcpy(row + j, &p, sizeof(p));
  }
  float lanes[kLanes];
  memcpy(lanes, &sum, sizeof(lanes));
  for (int step = kLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  }
  return lanes[0];
}

struct Room {
  float *keys, *scores;
};

// to[q][v] = the sum over `count` of left[q] (rows `stride` apart) times the rows of `right` (`width` apart).
INLINE void product(const float* left, int64_t stride, const float* right, int64_t width, int64_t count,
                    Floats (&to)[kQueries][kVectors]) {
  static_assert(kQueries == 4 && kVectors == 2, "the sums are named, so that they stay in registers");
  Floats a0 = {}, a1 = {}, b0 = {}, b1 = {}, c0 = {}, c1 = {}, d0 = {}, d1 = {};
  const float *a = left, *b = a + stride, *c = b + stride, *d = c + stride;
  for (int64_t i = 0; i < count; ++i, right += width) {
    const Floats low = vector_at(right), high = vector_at(right + kLanes);
    a0 += low * a[i], a1 += high * a[i];
    b0 += low * b[i], b1 += high * b[i];
    c0 += low * c[i], c1 += high * c[i];
    d0 += low * d[i], d1 += high * d[i];
  }
  to[0][0] = a0, to[0][1] = a1, to[1][0] = b0, to[1][1] = b1;
  to[2][0] = c0, to[2][1] = c1, to[3][0] = d0, to[3][1] = d1;
}

INLINE void one_head(const Attention& a, int64_t sequence, int64_t head, const Room& room) {
  const float* q = a.q + sequence * a.q_stride[0] + head * a.q_stride[1];
  const float* k = a.k + sequence * a.k_stride[0] + head * a.k_stride[1];
  const float* v = a.v + sequence * a.v_stride[0] + head * a.v_stride[1];
  const int64_t wide = (a.keys + kWide - 1) / kWide * kWide, dim = a.dim;
  for (int64_t j = 0; j < a.keys; ++j) {
    for (int64_t d = 0; d < dim; ++d) room.keys[d * wide + j] = k[j * a.k_stride[2] + d];
  }
  for (int64_t d = 0; d < dim; ++d) {
    for (int64_t j = a.keys; j < wide; ++j) room.keys[d * wide + j] = 0.0f;
  }
  for (int64_t first = 0; first < a.queries; first += kQueries) {
    const int64_t own = a.queries - first < kQueries ? a.queries - first : kQueries;
    float left[kQueries][kLongestHead];
    for (int64_t t = 0; t < kQueries; ++t) {
      const float* from = q + (first + (t < own ? t : 0)) * a.q_stride[2];
      for (int64_t d = 0; d < dim; ++d) left[t][d] = from[d] * a.scale;
    }
    Floats sum[kQueries][kVectors];
    for (int64_t j = 0; j < wide; j += kWide) {
      product(left[0], kLongestHead, room.keys + j, wide, dim, sum);
      for (int t = 0; t < kQueries; ++t) memcpy(room.scores + t * wide + j, sum[t], sizeof(sum[t]));
    }
    float inverse[kQueries];
    for (int64_t t = 0; t < own; ++t) {
      float* row = room.scores + t * wide;
      const uint8_t* seen = a.mask;
      if (seen != nullptr) seen += sequence * a.mask_stride[0] + (first + t) * a.mask_stride[1];
      for (int64_t j = 0; seen != nullptr && j < a.keys; ++j) row[j] = seen[j] ? row[j] : -INFINITY;
      for (int64_t j = a.keys; j < wide; ++j) row[j] = -INFINITY;
      const float highest = largest(row, wide);
      const bool any = highest != -INFINITY;
      const float total = weigh(row, wide, any ? highest : 0.0f);
      inverse[t] = any ? 1.0f / total : 0.0f;
    }
    for (int64_t d = 0; d < dim; d += kWide) {
      product(room.scores, wide, v + d, a.v_stride[2], a.keys, sum);
      for (int64_t t = 0; t < own; ++t) {
        float* to = a.out + ((sequence * a.queries + first + t) * a.heads + head) * dim + d;
        for (int i = 0; i < kVectors; ++i) sum[t][i] *= inverse[t];
        memcpy(to, sum[t], sizeof(sum[t]));
      }
    }
  }
}

INLINE void heads_of(const Attention& a, int64_t first, int64_t last, const Room& room) {
  for (int64_t i = first; i < last; ++i) one_head(a, i / a.heads, i % a.heads, room);
}

void heads_portable(const Attention& a, int64_t first, int64_t last, const Room& room) { heads_of(a, first, last, room); }

#if defined(LAYERWISE_X86)
__attribute__((target("avx2"))) void heads_avx2(const Attention& a, int64_t first, int64_t last, const Room& room) {
  heads_of(a, first, last, room);
}

__attribute__((target("avx512f,avx512bw,avx512vl"))) void heads_avx512(const Attention& a, int64_t first, int64_t last,
                                                                       const Room& room) {
  heads_of(a, first, last, room);
}
#endif

void attend_part(void* data, int part, int parts) {
  auto& a = *static_cast<Attention*>(data);
  const int64_t all = a.sequences * a.heads, first = all * part / parts, last = all * (part + 1) / parts;
  if (first == last) return;
  const size_t wide = size_t((a.keys + kWide - 1) / kWide * kWide);
  auto* memory = static_cast<float*>(aligned_memory((size_t(a.dim) + kQueries) * wide * sizeof(float)));
  if (memory == nullptr) {
    __atomic_store_n(&a.failed, 1, __ATOMIC_RELAXED);
    return;
  }
  const Room room = {memory, memory + size_t(a.dim) * wide};
#if defined(LAYERWISE_X86)
  if (strcmp(a.path, "avx512") == 0) {
    heads_avx512(a, first, last, room);
  } else if (strcmp(a.path, "avx2") == 0) {
    heads_avx2(a, first, last, room);
  } else {
    heads_portable(a, first, last, room);
  }
#else
  heads_portable(a, first, last, room);
#endif
  free(memory);
}

}  // namespace

int attend(Attention& a, int threads) {
  const bool sound = a.sequences > 0 && a.heads > 0 && a.queries > 0 && a.keys > 0 && a.keys <= kMostKeys &&
                     a.dim > 0 && a.dim <= kLongestHead && a.dim % kWide == 0;
  if (!sound) return 4;
  a.failed = 0;
  parallel(threads < 1 ? 1 : threads, attend_part, &a);
  return a.failed ? 3 : 0;
}

}  // namespace layerwise
