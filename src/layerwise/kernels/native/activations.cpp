// Activations, brought into the order of the blocks: as they are, or as int8. One copy for every path, compiled without
// anything special, so that all paths multiply the same integers.
#include <float.h>
#include <math.h>
#include <string.h>

#include "parts.h"

namespace layerwise {

void spread(const Matrix& m, const float* x, int64_t tokens, int64_t stride, float* values, float* sums) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int b = 0; b < m.blocks; ++b) {
      const Block& block = m.block[b];
      float* to = values + t * m.width + block.place;
      memcpy(to, x + t * stride + block.column, size_t(block.length) * sizeof(float));
      for (int k = block.length; k < block.padded; ++k) to[k] = 0.0f;
      double sum[4] = {};  // four sums, so that an addition need not wait for the last one
      for (int k = 0; k < block.padded; k += 4) {
        for (int j = 0; j < 4; ++j) sum[j] += double(to[k + j]);
      }
      sums[t * m.blocks + b] = float((sum[0] + sum[1]) + (sum[2] + sum[3]));
    }
  }
}

namespace {

// A step of max|x| / 127; NaN, which reaches every output of the token, where a value is not finite.
float step_of(const float* x, int length) {
  float largest = 0.0f;
  int finite = 1;
  for (int k = 0; k < length; ++k) {
    const float size = fabsf(x[k]);
    largest = size > largest ? size : largest;
    finite &= size <= FLT_MAX;
  }
  if (!finite) return NAN;
  return largest < 1e-30f ? 0.0f : largest / 127.0f;  // below it 1 / step would overflow: such a block counts as zeros
}

}  // namespace

void quantize(const Matrix& m, const float* x, int64_t tokens, int64_t stride, int8_t* codes, float* steps,
              int32_t* counts) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number, ties to even
  for (int64_t t = 0; t < tokens; ++t) {
    for (int b = 0; b < m.blocks; ++b) {
      const Block& block = m.block[b];
      const float* from = x + t * stride + block.column;
      int8_t* to = codes + t * m.width + block.place;
      const float step = step_of(from, block.length);
      const float inverse = step > 0.0f ? 1.0f / step : 0.0f;  // 0 for NaN too: no conversion of what is no number
      int32_t count = 0;
      if (inverse > 0.0f) {
        for (int k = 0; k < block.length; ++k) {
          const int32_t code = int32_t((from[k] * inverse + magic) - magic);
          to[k] = int8_t(code > 127 ? 127 : code < -127 ? -127 : code);
          count += to[k];
        }
      } else {
        memset(to, 0, size_t(block.length));
      }
      memset(to + block.length, 0, size_t(block.padded - block.length));
      steps[t * m.blocks + b] = step;
      counts[t * m.blocks + b] = count;
    }
  }
}

}  // namespace layerwise
