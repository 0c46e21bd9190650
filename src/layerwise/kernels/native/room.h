// Memory for the activations of products. Included by files that are compiled for every processor only.
#pragma once

#include <stdlib.h>

#include "parts.h"

namespace {

using namespace layerwise;

// Memory that a thread keeps for its next product: fresh pages would cost more than their contents.
struct Scratch {
  void* memory = nullptr;
  size_t bytes = 0;
  ~Scratch() { free(memory); }

  uint8_t* at_least(size_t wanted) {
    if (wanted > bytes) {
      free(memory);
      bytes = wanted + wanted / 2;
      memory = aligned_memory(bytes);
      if (memory == nullptr) bytes = 0;
    }
    return static_cast<uint8_t*>(memory);
  }
};

inline size_t whole_lines(size_t bytes) { return (bytes + kLine - 1) / kLine * kLine; }

// An odd number of lines, so that the same column of several tokens does not fall on the same place of a cache.
inline int64_t token_stride(int64_t bytes) { return int64_t((whole_lines(size_t(bytes)) / kLine | 1) * kLine); }

constexpr int64_t kFew = 8;  // up to so many tokens, each of them decodes the codes for itself
// Those of a trellis take too long for that: as many as one decoding serves.
inline int64_t few_of_trellis(int64_t side_by_side) { return side_by_side < 2 ? 1 : 2; }

// Where the activations of `tokens` for a product by `path` lie, `digits` of each (0: as floats).
struct ActivationRoom {
  int64_t together, sets, stride;
  size_t values, sums, bytes;  // `bytes` in all

  ActivationRoom(const Path& path, const Matrix& m, int64_t tokens, int32_t digits) {
    const int64_t beside = digits == 0 ? 0 : path.side_by_side(int(digits));
    together = tokens <= (m.trellis ? few_of_trellis(beside) : kFew) ? 0 : beside;
    const int64_t set = together > 0 ? together : 1, wide = m.width * (digits == 0 ? 4 : digits);
    sets = (tokens + set - 1) / set, stride = token_stride(wide);
    values = together > 0 ? whole_lines(size_t(wide * set * sets)) : size_t(tokens) * size_t(stride);
    sums = size_t(sets * set) * size_t(m.blocks);
    bytes = values + sums * size_t(8 + 4 * digits);
  }

  Activations at(uint8_t* memory, const Matrix& m, int64_t tokens, int32_t digits) const {
    // With few sets the sums of the codes are not worth it, nor where the zeros need multiplications all the same.
    const int32_t shifted = together > 0 && sets > 3 && m.narrow;
    Activations a = {tokens, m.blocks, stride, sets, digits, int32_t(together), shifted, nullptr, nullptr, nullptr, nullptr, nullptr,
                     nullptr};
    if (digits == 0) {
      a.values = reinterpret_cast<float*>(memory), a.stride = stride / 4;
    } else {
      a.codes = reinterpret_cast<int8_t*>(memory);
      a.steps = reinterpret_cast<float*>(memory + values);
      a.sums = a.steps + sums;
      a.counts = a.sums + sums;
      a.whole = reinterpret_cast<int32_t*>(a.counts);
    }
    return a;
  }
};

}  // namespace
