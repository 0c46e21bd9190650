// Attention over short sequences, as encoders of sentences have: softmax(q k^T scale) v for every sequence and head.
//
// 32 queries of a head are turned over, so that their scores of a key lie side by side: the largest score, the weights
// and their sum are then found for all of them at once, and no sum goes across lanes. Scores never leave the first
// caches. Products and sums are rounded by themselves (no fused ones), in one order: all targets give the same bits.
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "parts.h"
#include "vectors.h"

namespace layerwise {

namespace {

constexpr int kWide = 32;  // queries at a time, and features

struct Room {
  float *queries, *scores, *weights;  // [dim, 32], [keys, 32], [32]: of what the weights sum to, the inverse
};

// to[r][..32] = times[r] * the sum over i < count of left[r * r_step + i * i_step] * right[i * width + ..32]. As many
// rows at a time as there are registers for their sums.
template <class V, int kRows>
LAYERWISE_STEP void rows_product(const float* left, int64_t r_step, int64_t i_step, const float* right, int64_t width,
                                 int64_t count, const float* times, float* to, int64_t to_step) {
  constexpr int kParts = kWide / V::kLanes;
  typename V::Floats sum[kRows][kParts];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int p = 0; p < kParts; ++p) sum[r][p] = typename V::Floats{};
  for (int64_t i = 0; i < count; ++i, right += width, left += i_step) {
#pragma GCC unroll 8
    for (int p = 0; p < kParts; ++p) {
      const typename V::Floats own = V::at(right + p * V::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sum[r][p] += own * left[r * r_step];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int p = 0; p < kParts; ++p) {
      if (times != nullptr) sum[r][p] *= times[r];
      V::store(to + r * to_step + p * V::kLanes, sum[r][p]);
    }
  }
}

template <class V>
LAYERWISE_STEP void product(const float* left, int64_t r_step, int64_t i_step, const float* right, int64_t width,
                            int64_t count, const float* times, float* to, int64_t to_step, int64_t rows) {
  constexpr int kRows = V::kLanes / 4;
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    rows_product<V, kRows>(left + r * r_step, r_step, i_step, right, width, count, times ? times + r : times,
                           to + r * to_step, to_step);
  }
  for (; r < rows; ++r) {
    rows_product<V, 1>(left + r * r_step, r_step, i_step, right, width, count, times ? times + r : times,
                       to + r * to_step, to_step);
  }
}

// Scores [keys, 32] into weights before their division by what they sum to, whose inverse is found: 0 for a query that
// sees nothing.
template <class V>
LAYERWISE_STEP void weigh(float* scores, int64_t keys, float* inverse) {
  using Floats = typename V::Floats;
  for (int at = 0; at < kWide; at += V::kLanes) {
    float* own = scores + at;
    Floats highest = V::at(own);
    for (int64_t j = 1; j < keys; ++j) {
      const Floats v = V::at(own + j * kWide);
      highest = v > highest ? v : highest;
    }
    highest = highest == -INFINITY ? Floats{} : highest;
    Floats sum = {};
    for (int64_t j = 0; j < keys; ++j) {
      const Floats v = exponential<V>(V::at(own + j * kWide), highest);
      V::store(own + j * kWide, v);
      sum += v;
    }
    V::store(inverse + at, sum == 0.0f ? Floats{} : 1.0f / sum);
  }
}

// Whether all queries see the same keys.
inline bool alike(const uint8_t* seen, int64_t stride, int64_t queries, int64_t keys) {
  for (int64_t t = 1; stride != 0 && t < queries; ++t) {
    if (memcmp(seen, seen + t * stride, size_t(keys)) != 0) return false;
  }
  return true;
}

template <class V>
LAYERWISE_STEP void one_head(const Attention& a, int64_t sequence, int64_t head, const Room& room) {
  const float* q = a.q + sequence * a.q_stride[0] + head * a.q_stride[1];
  const float* k = a.k + sequence * a.k_stride[0] + head * a.k_stride[1];
  const float* v = a.v + sequence * a.v_stride[0] + head * a.v_stride[1];
  const uint8_t* seen = a.mask == nullptr ? nullptr : a.mask + sequence * a.mask_stride[0];
  const bool same = seen != nullptr && alike(seen, a.mask_stride[1], a.queries, a.keys);
  int64_t keys = a.keys;
  while (same && keys > 0 && !seen[keys - 1]) --keys;  // padding behind a text
  for (int64_t first = 0; first < a.queries; first += kWide) {
    const int64_t own = a.queries - first < kWide ? a.queries - first : kWide;
    float* out = a.out + ((sequence * a.queries + first) * a.heads + head) * a.dim;
    if (keys == 0) {
      for (int64_t t = 0; t < own; ++t) memset(out + t * a.heads * a.dim, 0, size_t(a.dim) * sizeof(float));
      continue;
    }
    if (own < kWide) memset(room.queries, 0, size_t(a.dim) * kWide * sizeof(float));
    for (int64_t t = 0; t < own; ++t) {
      const float* from = q + (first + t) * a.q_stride[2];
      for (int64_t d = 0; d < a.dim; ++d) room.queries[d * kWide + t] = from[d] * a.scale;
    }
    product<V>(k, a.k_stride[2], 1, room.queries, kWide, a.dim, nullptr, room.scores, kWide, keys);
    for (int64_t j = 0; seen != nullptr && j < keys; ++j) {
      float* scores = room.scores + j * kWide;
      if (same && seen[j]) continue;
      const uint8_t* column = seen + first * a.mask_stride[1] + j;
      for (int64_t t = 0; t < own; ++t) {
        if (!column[t * a.mask_stride[1]]) scores[t] = -INFINITY;
      }
    }
    weigh<V>(room.scores, keys, room.weights);
    for (int64_t d = 0; d < a.dim; d += kWide) {
      product<V>(room.scores, 1, kWide, v + d, a.v_stride[2], keys, room.weights, out + d, a.heads * a.dim, own);
    }
  }
}

template <class V>
LAYERWISE_STEP void heads_of(const Attention& a, int64_t first, int64_t last, const Room& room) {
  for (int64_t i = first; i < last; ++i) one_head<V>(a, i / a.heads, i % a.heads, room);
}

void heads_portable(const Attention& a, int64_t first, int64_t last, const Room& room) {
  heads_of<Vector<16>>(a, first, last, room);
}

#if defined(LAYERWISE_X86)
__attribute__((target("avx2"))) void heads_avx2(const Attention& a, int64_t first, int64_t last, const Room& room) {
  heads_of<Vector<32>>(a, first, last, room);
}

__attribute__((target("avx512f,avx512bw,avx512vl"))) void heads_avx512(const Attention& a, int64_t first, int64_t last,
                                                                       const Room& room) {
  heads_of<Vector<64>>(a, first, last, room);
}
#endif

void attend_part(void* data, int part, int parts) {
  auto& a = *static_cast<Attention*>(data);
  const int64_t all = a.sequences * a.heads, first = all * part / parts, last = all * (part + 1) / parts;
  if (first == last) return;
  const size_t floats = size_t(a.dim + a.keys + 1) * kWide;
  auto* memory = static_cast<float*>(aligned_memory(floats * sizeof(float)));
  if (memory == nullptr) {
    __atomic_store_n(&a.failed, 1, __ATOMIC_RELAXED);
    return;
  }
  const Room room = {memory, memory + a.dim * kWide, memory + (a.dim + a.keys) * kWide};
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
