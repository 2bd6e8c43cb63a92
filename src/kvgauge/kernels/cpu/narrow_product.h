// Linear layers of a few rows.

#pragma once

#include <algorithm>

#include "vectors.h"

namespace {

constexpr int64_t AHEAD_BYTES = 4096;  // the processor's own prefetching falls behind where several rows share a load

// out[r · outs + u] = rows[r] · weight[u] for R rows and U outputs: every number of the weights is loaded once.
template <int R, int U, typename T>
inline void multiply_tile(const float* rows, const T* weight, float* out, int64_t in, int64_t outs) {
  Vector sums[R][U];
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < U; ++u) sums[r][u] = Vector{};
  int64_t i = 0;
  for (; i + LANES <= in; i += LANES) {
    Vector weights[U];
    for (int u = 0; u < U; ++u) {
      weights[u] = numbers(weight + u * in + i);
      __builtin_prefetch(reinterpret_cast<const char*>(weight + u * in + i) + AHEAD_BYTES);
    }
    for (int r = 0; r < R; ++r) {
      const Vector row = numbers(rows + r * in + i);
      for (int u = 0; u < U; ++u) sums[r][u] += row * weights[u];
    }
  }
  for (int r = 0; r < R; ++r)
    for (int u = 0; u < U; ++u) {
      float sum = sum_of(sums[r][u]);
      for (int64_t rest = i; rest < in; ++rest) sum += rows[r * in + rest] * number(weight[u * in + rest]);
      out[r * outs + u] = sum;
    }
}

template <int R, typename T>
void multiply_rows(const float* rows, const T* weight, float* out, int64_t in, int64_t own, int64_t outs) {
  constexpr int U = R >= SUMS ? 1 : SUMS / R < 4 ? SUMS / R : 4;
  int64_t o = 0;
  for (; o + U <= own; o += U) multiply_tile<R, U>(rows, weight + o * in, out + o, in, outs);
  for (; o < own; ++o) multiply_tile<R, 1>(rows, weight + o * in, out + o, in, outs);
}

template <typename T>
void multiply(const float* rows, const T* weight, float* out, int64_t count, int64_t in, int64_t own, int64_t outs) {
  for (; count >= 8; count -= 8, rows += 8 * in, out += 8 * outs) multiply_rows<8>(rows, weight, out, in, own, outs);
  switch (count) {
    case 7: return multiply_rows<7>(rows, weight, out, in, own, outs);
    case 6: return multiply_rows<6>(rows, weight, out, in, own, outs);
    case 5: return multiply_rows<5>(rows, weight, out, in, own, outs);
    case 4: return multiply_rows<4>(rows, weight, out, in, own, outs);
    case 3: return multiply_rows<3>(rows, weight, out, in, own, outs);
    case 2: return multiply_rows<2>(rows, weight, out, in, own, outs);
    case 1: return multiply_rows<1>(rows, weight, out, in, own, outs);
    default: return;
  }
}

template <typename T>
void narrow_product(const float* rows, const T* weight, float* out, int64_t count, int64_t in, int64_t outs, int threads) {
  constexpr int64_t PIECE = 24;  // outputs of a task: their weights stay in a core's caches for all rows
  const int64_t pieces = (outs + PIECE - 1) / PIECE;
#pragma omp parallel for num_threads(threads) schedule(static) if (in * outs * int64_t(sizeof(T)) > ALONE_BYTES)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int64_t o = piece * PIECE;
    multiply(rows, weight + o * in, out + o, count, in, std::min(PIECE, outs - o), outs);
  }
}

}  // namespace
