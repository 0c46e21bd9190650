// Vectors of floats as the compiler has them for each target, for steps whose products and sums are rounded one by one.
// A function template over `Vector` is inlined into a function of each target; lanes never meet but where a sum of 16
// lanes is written out, so that all targets give the same bits.
#pragma once

#include <stdint.h>
#include <string.h>

// Vectors are passed between inlined functions only, whatever their registers are.
#pragma GCC diagnostic ignored "-Wpsabi"
#define LAYERWISE_STEP inline __attribute__((always_inline))

namespace {

template <int kBytes>
struct Vector;

#define LAYERWISE_VECTOR(bytes)                                                    \
  template <>                                                                      \
  struct Vector<bytes> {                                                           \
    typedef float Floats __attribute__((vector_size(bytes), aligned(4), may_alias)); \
    typedef int32_t Ints __attribute__((vector_size(bytes), aligned(4), may_alias)); \
    static constexpr int kLanes = bytes / 4;                                       \
    static LAYERWISE_STEP Floats at(const float* from) {                           \
      Floats v;                                                                    \
      memcpy(&v, from, sizeof(v));                                                 \
      return v;                                                                    \
    }                                                                              \
    static LAYERWISE_STEP void store(float* to, const Floats& v) { memcpy(to, &v, sizeof(v)); } \
    static LAYERWISE_STEP Floats same(float value) { return Floats{} + value; }    \
    static LAYERWISE_STEP Floats size(const Floats& v) { /* without its sign */    \
      Ints bits;                                                                   \
      memcpy(&bits, &v, sizeof(bits));                                             \
      bits &= 0x7fffffff;                                                          \
      Floats own;                                                                  \
      memcpy(&own, &bits, sizeof(own));                                            \
      return own;                                                                  \
    }                                                                              \
  }

LAYERWISE_VECTOR(64);
LAYERWISE_VECTOR(32);
LAYERWISE_VECTOR(16);

}  // namespace
