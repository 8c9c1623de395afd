// Conversions between storage types and arithmetic, one tile at a time, and stores past the caches. Part of cpu_rows.cpp: the
// instruction set is the one that file is compiled for.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "loss_math.h"

namespace vadiff {

VADIFF_FN uint32_t bits_of(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return bits;
}

VADIFF_FN float float_of(uint32_t bits) {
  float x;
  memcpy(&x, &bits, 4);
  return x;
}

VADIFF_FN float bfloat16_to_float(uint16_t x) { return float_of(uint32_t(x) << 16); }

VADIFF_FN uint16_t float_to_bfloat16(float x) {  // to nearest, ties to even
  uint32_t bits = bits_of(x);
  uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  return uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

VADIFF_FN float float16_to_float(uint16_t x) {
#if defined(__F16C__)
  return _cvtsh_ss(x);
#else
  uint32_t sign = uint32_t(x & 0x8000) << 16, rest = uint32_t(x & 0x7fff) << 13;
  if ((x & 0x7c00) == 0x7c00) return float_of(sign | 0x7f800000 | rest);      // infinity, NaN
  return float_of(sign | bits_of(float_of(rest) * float_of(0x77800000)));  // * 2**112: subnormals come out right
#endif
}

VADIFF_FN uint16_t float_to_float16(float x) {  // to nearest, ties to even
#if defined(__F16C__)
  return uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (size >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (size < 0x38800000)  // subnormal: let an addition round at the right bit
    return uint16_t(sign | (bits_of(float_of(size) + 0.5f) - 0x3f000000));
  return uint16_t(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13));
#endif
}

// n elements of `data` from `first` as C: the tensor itself where it is of that type, else converted into `buffer`.
template <class C>
VADIFF_FN const C* fetch(const void* data, int dtype, int64_t first, int n, C* __restrict buffer) {
  constexpr bool kDouble = sizeof(C) == 8;
  if (dtype == (kDouble ? kFloat64 : kFloat32)) return static_cast<const C*>(data) + first;
  if (dtype == (kDouble ? kFloat32 : kFloat64)) {
    const auto* from = static_cast<const std::conditional_t<kDouble, float, double>*>(data) + first;
    for (int i = 0; i < n; ++i) buffer[i] = C(from[i]);
    return buffer;
  }
  const uint16_t* from = static_cast<const uint16_t*>(data) + first;
  int i = 0;
  if (dtype == kBfloat16) {
    for (; i < n; ++i) buffer[i] = bfloat16_to_float(from[i]);
    return buffer;
  }
#if defined(__F16C__)
  if constexpr (!kDouble)
    for (; i + 8 <= n; i += 8)
      _mm256_storeu_ps(buffer + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
#endif
  for (; i < n; ++i) buffer[i] = float16_to_float(from[i]);
  return buffer;
}

// n values into 16-bit `to`.
VADIFF_FN void narrow(const float* __restrict from, int dtype, int n, uint16_t* __restrict to) {
  int i = 0;
  if (dtype == kBfloat16) {
    for (; i < n; ++i) to[i] = float_to_bfloat16(from[i]);
    return;
  }
#if defined(__F16C__)
  for (; i + 8 <= n; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
  for (; i < n; ++i) to[i] = float_to_float16(from[i]);
}

// memcpy past the caches: what is written does not evict other data, and its lines are not fetched before.
VADIFF_FN void stream_copy(void* to, const void* from, int64_t bytes) {
  char* t = static_cast<char*>(to);
  const char* f = static_cast<const char*>(from);
#if defined(__SSE2__)
  int64_t head = -reinterpret_cast<intptr_t>(t) & 63;
  if (head > bytes) head = bytes;
  memcpy(t, f, head);
  int64_t i = head;
  for (; i + 64 <= bytes; i += 64) {
    for (int j = 0; j < 64; j += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(t + i + j), _mm_loadu_si128(reinterpret_cast<const __m128i*>(f + i + j)));
  }
  memcpy(t + i, f + i, bytes - i);
#else
  memcpy(t, f, bytes);
#endif
}

VADIFF_FN void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();  // streamed stores are not ordered with others: the thread that reads next must see them
#endif
}

}  // namespace vadiff
