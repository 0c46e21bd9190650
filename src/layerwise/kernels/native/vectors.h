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

constexpr int kSumLanes = 16;  // partial sums of a row, in vectors one after the other

// Of lanes 0 .. 15.
template <class V>
LAYERWISE_STEP float sum_of(const typename V::Floats* parts) {
  float lanes[kSumLanes];
  memcpy(lanes, parts, sizeof(lanes));
  for (int step = kSumLanes / 2; step > 0; step /= 2) {
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  }
  return lanes[0];
}

// e^(x - highest) of what is no higher, to about a 10 millionth of it; nothing below e^-87. NaN stays NaN.
template <class V>
LAYERWISE_STEP typename V::Floats exponential(typename V::Floats x, typename V::Floats highest) {
  using Floats = typename V::Floats;
  const Floats least = V::same(-87.0f);
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
  typename V::Ints bits;
  memcpy(&bits, &shifted, sizeof(bits));
  bits = (bits - 0x4b400000 + 127) << 23;
  Floats power;
  memcpy(&power, &bits, sizeof(power));
  return small ? Floats{} : p * power;
}

}  // namespace
