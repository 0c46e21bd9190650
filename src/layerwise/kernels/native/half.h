// fp16 in plain C++, for what is compiled for every processor.
#pragma once

#include <stdint.h>
#include <string.h>

namespace {

inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16;
  const uint32_t exponent = (half >> 10) & 31, mantissa = half & 1023;
  float value;
  if (exponent == 0) {  // zero and subnormals: a whole number of 2^-24
    value = float(mantissa) * 0x1p-24f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  memcpy(&value, &bits, 4);
  return value;
}

}  // namespace
