// Codes of a few bits, and numbers in float16, as vectors of float32.

#pragma once

#include <cstdint>
#include <cstring>

#include "vectors.h"

namespace {

struct Half {  // float16
  uint16_t bits;
};

inline float number(Half x) {  // of finite numbers: the exponent is moved by a product, which denormal numbers survive
  const uint32_t wide = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  float size;
  std::memcpy(&size, &wide, sizeof size);
  size *= 0x1p112f;
  return x.bits & 0x8000 ? -size : size;
}

inline Vector numbers(const Half* x) {
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(x)));
#elif defined(__AVX__) && defined(__F16C__)
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
#else
  Vector all;
  for (int lane = 0; lane < LANES; ++lane) all[lane] = number(x[lane]);
  return all;
#endif
}

// The sum of a vector, folded in halves.
inline float folded(Vector x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sums[LANES];
  std::memcpy(sums, &x, sizeof sums);
  for (int half = LANES / 2; half; half /= 2)
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  return sums[0];
#endif
}

inline Words widened(const uint8_t* bytes) {
#if defined(__AVX512F__)
  return (Words)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
#elif defined(__AVX2__)
  return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)));
#else
  typedef uint8_t Bytes __attribute__((vector_size(LANES)));
  Bytes all;
  std::memcpy(&all, bytes, sizeof all);
  return __builtin_convertvector(all, Words);
#endif
}

inline Vector counted(Words words) {
  typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES)));
  return __builtin_convertvector((Integers)words, Vector);  // of signed integers: one instruction
}

constexpr int LEVELS = 16;  // of a table, which repeats itself where there are fewer: higher bits of an index are ignored

inline Vector looked_up(const float* table, Words index) {
#if defined(__AVX512F__)
  return (Vector)_mm512_permutexvar_ps((__m512i)index, (__m512)numbers(table));
#elif defined(__AVX2__)
  const __m256i at = (__m256i)index;
  const __m256 low = _mm256_permutevar8x32_ps((__m256)numbers(table), at);
  const __m256 high = _mm256_permutevar8x32_ps((__m256)numbers(table + 8), at);
  return (Vector)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(at, 28)));
#else
  Vector all;
  for (int lane = 0; lane < LANES; ++lane) all[lane] = table[index[lane] & (LEVELS - 1)];
  return all;
#endif
}

// How many channels share how many bytes.
template <int BITS>
struct Packing {
  static constexpr int CHANNELS = BITS == 3 ? 8 : 8 / BITS, BYTES = BITS == 3 ? 3 : 1;
};

// The codes of a run of channels, LANES tokens: `bytes` is what the first byte of the run has of them.
template <int BITS>
inline Words word(const uint8_t* bytes, int64_t tile) {
  Words all = widened(bytes);
  if (BITS == 3) all |= widened(bytes + tile) << 8 | widened(bytes + 2 * tile) << 16;
  return all;
}

// What the codes of one channel of a run stand for, without scale and minimum.
template <int BITS>
inline Vector level(Words words, int channel, const float* table) {
  return BITS == 8 ? counted(words) : looked_up(table, words >> channel * BITS);
}

}  // namespace
