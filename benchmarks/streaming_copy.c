/* A copy with non-temporal stores, for x86-64: the destination is not read into the cache before it is overwritten.
 * `to` is aligned to 16 bytes, `bytes` a multiple of 64. */
#include <emmintrin.h>
#include <stddef.h>

void streaming_copy(char *to, const char *from, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64)
        for (size_t j = i; j < i + 64; j += 16)
            _mm_stream_si128((__m128i *)(to + j), _mm_loadu_si128((const __m128i *)(from + j)));
    _mm_sfence();
}
