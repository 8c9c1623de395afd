// float16 for the emulation.
#pragma once

#include "cpu_convert.h"

struct __half {
  uint16_t bits;
};
inline float __half2float(__half x) { return vadiff::float16_to_float(x.bits); }
inline __half __float2half_rn(float x) { return {vadiff::float_to_float16(x)}; }
inline uint16_t __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(uint16_t x) { return {x}; }
