// The softmax of attention to entries that stand for several tokens, and the attention that every entry received.

#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

// Rows of one head that one task adds up: fixed, so that sums do not depend on the number of threads.
constexpr int64_t ROWS_OF_A_TASK = 64;

template <typename T>
struct Counting {
  T* scores;            // (sequences · heads, group · queries, seen), replaced by the softmax
  const float* bias;    // (sequences, seen), added to the scores; null: nothing
  const float* counts;  // (sequences, queries), how often a query counts; null: once
  float* sums;          // (sequences · heads, seen), to which the column sums are added
  int64_t sequences, heads, group, queries, seen;
  int64_t bias_stride, counts_stride, sums_stride;  // of sequences, of sequences, of heads
  int threads;
};

// One row: its softmax over the entries up to its own, and `count` times that into the sums.
template <typename T>
inline void softmax_row(T* row, const float* bias, int64_t visible, int64_t seen, float* weights, float count,
                        float* __restrict sums) {
  int64_t t = 0;
  for (; t + LANES <= visible; t += LANES)
    store(weights + t, bias ? numbers(row + t) + numbers(bias + t) : numbers(row + t));
  for (; t < visible; ++t) weights[t] = number(row[t]) + (bias ? bias[t] : 0.f);
  float largest;
  const float factor = 1.f / exponentials(weights, visible, &largest);
  for (t = 0; t + LANES <= visible; t += LANES) {
    const Vector weight = numbers(weights + t) * factor;
    store(row + t, weight);
    store(sums + t, numbers(sums + t) + weight * count);
  }
  if (t < visible) {
    T last[LANES];
    const Vector weight = numbers(weights + t) * factor;
    store(last, weight);
    store(sums + t, numbers(sums + t) + weight * count);
    std::copy(last, last + (visible - t), row + t);
  }
  std::fill(row + visible, row + seen, T(0));
}

template <typename T>
void counting_softmax(const Counting<T>& c) {
  const int64_t pairs = c.sequences * c.heads, rows = c.group * c.queries, width = whole_vectors(c.seen);
  const int64_t pieces = (rows + ROWS_OF_A_TASK - 1) / ROWS_OF_A_TASK;
  std::vector<float> parts(pairs * pieces * width);
#pragma omp parallel num_threads(c.threads) if (pairs * rows * c.seen * int64_t(sizeof(T)) > ALONE_BYTES)
  {
    std::vector<float> weights(width);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < pairs * pieces; ++task) {
      const int64_t pair = task / pieces, sequence = pair / c.heads, first = task % pieces * ROWS_OF_A_TASK;
      for (int64_t row = first; row < std::min(rows, first + ROWS_OF_A_TASK); ++row) {
        const int64_t query = row % c.queries;
        softmax_row(c.scores + (pair * rows + row) * c.seen, c.bias ? c.bias + sequence * c.bias_stride : nullptr,
                    c.seen - c.queries + query + 1, c.seen, weights.data(),
                    c.counts ? c.counts[sequence * c.counts_stride + query] : 1.f, parts.data() + task * width);
      }
    }
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < pairs; ++pair)
      for (int64_t piece = 0; piece < pieces; ++piece)
        for (int64_t t = 0; t < c.seen; ++t)
          c.sums[pair * c.sums_stride + t] += parts[(pair * pieces + piece) * width + t];
  }
}

}  // namespace
