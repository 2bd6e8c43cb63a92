// Numbers in float32 and bfloat16, as wide as this processor's registers.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr float LOWEST = -std::numeric_limits<float>::max();

inline float number(float x) { return x; }

inline float number(uint16_t bits) {  // bfloat16: the upper half of a float
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, SUMS = 16;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32, SUMS = 8;
#else
constexpr int VECTOR_BYTES = 16, SUMS = 8;
#endif
constexpr int LANES = VECTOR_BYTES / 4;
typedef float Vector __attribute__((vector_size(VECTOR_BYTES), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2), aligned(2), may_alias));

inline Vector numbers(const float* x) { return *reinterpret_cast<const Vector*>(x); }

inline Vector numbers(const uint16_t* bits) {
  // One instruction each; what compilers make of the general conversion takes four.
#if defined(__AVX512F__)
  Words wide = (Words)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bits)));
#elif defined(__AVX2__)
  Words wide = (Words)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bits)));
#else
  Words wide = __builtin_convertvector(*reinterpret_cast<const Halves*>(bits), Words);
#endif
  wide <<= 16;
  Vector x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

inline void store(float* x, Vector numbers) { *reinterpret_cast<Vector*>(x) = numbers; }

inline void store(uint16_t* bits, Vector numbers) {  // to the nearest bfloat16, halves to the even one
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh(numbers);
  std::memcpy(bits, &rounded, sizeof rounded);
#else
  Words wide;
  std::memcpy(&wide, &numbers, sizeof wide);
  wide += 0x7fff + (wide >> 16 & 1);
  *reinterpret_cast<Halves*>(bits) = __builtin_convertvector(wide >> 16, Halves);
#endif
}

inline void store_one(float* x, float number) { *x = number; }

inline void store_one(uint16_t* bits, float number) {
  uint16_t all[LANES];
  store(all, Vector{} + number);
  *bits = all[0];
}

// e^x of x ≤ 0 to two units in the last place, 0 below e^-87.6. The C library's function has more cases to tell apart.
inline Vector exponential(Vector x) {
  typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES)));
  constexpr float LEAST = -88.02969f;  // -127 ln 2
  const Vector least = Vector{} + LEAST;
  x = x > least ? x : least;
  // x = n ln 2 + rest, |rest| ≤ ln 2 / 2: conversion cuts towards zero.
  const Integers n = __builtin_convertvector(x * 1.44269504f - 0.5f, Integers);
  const Vector rest = x - __builtin_convertvector(n, Vector) * 0.69314718f;
  // The polynomial of degree 6 through the Chebyshev points of that interval: relative error 3e-9.
  Vector sum = rest * 1.3943221e-3f + 8.3768182e-3f;
  sum = sum * rest + 4.1666325e-2f;
  sum = sum * rest + 0.16666394f;
  sum = sum * rest + 0.5f;
  sum = sum * rest + 1.f;
  sum = sum * rest + 1.f;
  const Words exponent = __builtin_convertvector(n + 127, Words) << 23;
  Vector power;
  std::memcpy(&power, &exponent, sizeof power);
  return sum * power;
}

// scores become cap · tanh(scores / cap), up to the end of the last vector: tanh x = ±(1 - e) / (1 + e), e = e^(-2|x|).
inline void cap(float* scores, int64_t count, float cap) {
  for (int64_t t = 0; t < count; t += LANES) {
    const Vector x = numbers(scores + t) / cap;
    const Vector negative = x < 0.f ? x : -x;
    const Vector e = exponential(negative * 2.f);
    const Vector size = (1.f - e) / (1.f + e) * cap;
    store(scores + t, x < 0.f ? -size : size);
  }
}

inline float largest_of(Vector x) {
  float largest = x[0];
  for (int lane = 1; lane < LANES; ++lane) largest = x[lane] > largest ? x[lane] : largest;
  return largest;
}

inline float sum_of(Vector x) {
  float sum = 0.f;
  for (int lane = 0; lane < LANES; ++lane) sum += x[lane];
  return sum;
}

// As many numbers as whole vectors need to hold `count`.
inline int64_t whole_vectors(int64_t count) { return (count + LANES - 1) / LANES * LANES; }

inline float largest_of(const float* scores, int64_t count) {  // up to the end of the last vector
  Vector top = numbers(scores);
  for (int64_t t = LANES; t < count; t += LANES) {
    const Vector x = numbers(scores + t);
    top = x > top ? x : top;
  }
  return largest_of(top);
}

// scores[t] becomes e^(scores[t] - largest), up to the end of the last vector. Returns the sum.
inline float exponentials(float* scores, int64_t count, float largest) {
  Vector sum = Vector{};
  for (int64_t t = 0; t < count; t += LANES) {
    const Vector weight = exponential(numbers(scores + t) - largest);
    store(scores + t, weight);
    sum += weight;
  }
  return sum_of(sum);
}

// What is behind `count` in the last vector counts for nothing in a softmax.
inline void hide_rest(float* scores, int64_t count) { std::fill(scores + count, scores + whole_vectors(count), LOWEST); }

// Waking the other threads costs about as long as one core takes to read this much.
constexpr int64_t ALONE_BYTES = 1 << 20;

}  // namespace
