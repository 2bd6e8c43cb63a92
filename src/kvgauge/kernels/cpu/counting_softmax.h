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

// Rows whose column sums are added up at once, before they meet the sums of earlier ones.
constexpr int ROWS_AT_ONCE = 4;

// The exponentials of one row's scores, to the end of their last vector. Returns the reciprocal of their sum.
template <typename T>
inline float row_exponentials(const T* row, const float* bias, int64_t visible, float* weights) {
  Vector top = Vector{} + LOWEST;
  int64_t t = 0;
  for (; t + LANES <= visible; t += LANES) {
    const Vector score = bias ? numbers(row + t) + numbers(bias + t) : numbers(row + t);
    store(weights + t, score);
    top = score > top ? score : top;
  }
  float largest = largest_of(top);
  for (; t < visible; ++t) {
    weights[t] = number(row[t]) + (bias ? bias[t] : 0.f);
    largest = std::max(largest, weights[t]);
  }
  hide_rest(weights, visible);
  return 1.f / exponentials(weights, visible, largest);
}

// A few rows of one head: the softmax of each over the entries up to its own, and their column sums into the sums.
template <typename T>
inline void softmax_rows(const Counting<T>& c, int64_t pair, int64_t first, int64_t last, float* weights,
                         float* __restrict sums) {
  const int64_t sequence = pair / c.heads, rows = last - first, width = whole_vectors(c.seen);
  T* scores = c.scores + (pair * c.group * c.queries + first) * c.seen;
  float factors[ROWS_AT_ONCE] = {}, counts[ROWS_AT_ONCE] = {};
  int64_t visible[ROWS_AT_ONCE], most = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t query = (first + r) % c.queries;
    visible[r] = c.seen - c.queries + query + 1;
    most = std::max(most, visible[r]);
    factors[r] = row_exponentials(scores + r * c.seen, c.bias ? c.bias + sequence * c.bias_stride : nullptr, visible[r],
                                  weights + r * width);
    counts[r] = c.counts ? c.counts[sequence * c.counts_stride + query] : 1.f;
  }
  for (int64_t r = 0; r < ROWS_AT_ONCE; ++r) {
    const int64_t from = r < rows ? whole_vectors(visible[r]) : 0;
    std::fill(weights + r * width + from, weights + r * width + std::max(from, whole_vectors(most)), 0.f);
  }
  int64_t t = 0;
  for (; t < most && t + LANES <= c.seen; t += LANES) {
    Vector sum = numbers(sums + t);
    for (int64_t r = 0; r < ROWS_AT_ONCE; ++r) {
      const Vector weight = numbers(weights + r * width + t) * factors[r];
      if (r < rows) store(scores + r * c.seen + t, weight);
      sum += weight * counts[r];
    }
    store(sums + t, sum);
  }
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t rest = t; rest < most; ++rest) {
      const float weight = weights[r * width + rest] * factors[r];
      store_one(scores + r * c.seen + rest, weight);
      sums[rest] += weight * counts[r];
    }
    std::fill(scores + r * c.seen + std::max(t, most), scores + (r + 1) * c.seen, T(0));
  }
}

template <typename T>
void counting_softmax(const Counting<T>& c) {
  const int64_t pairs = c.sequences * c.heads, rows = c.group * c.queries, width = whole_vectors(c.seen);
  const int64_t pieces = (rows + ROWS_OF_A_TASK - 1) / ROWS_OF_A_TASK;
  std::vector<float> parts(pairs * pieces * width);
#pragma omp parallel num_threads(c.threads) if (pairs * rows * c.seen * int64_t(sizeof(T)) > ALONE_BYTES)
  {
    std::vector<float> weights(ROWS_AT_ONCE * width);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < pairs * pieces; ++task) {
      const int64_t start = task % pieces * ROWS_OF_A_TASK, end = std::min(rows, start + ROWS_OF_A_TASK);
      for (int64_t first = start; first < end; first += ROWS_AT_ONCE)
        softmax_rows(c, task / pieces, first, std::min<int64_t>(end, first + ROWS_AT_ONCE), weights.data(),
                     parts.data() + task * width);
    }
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < pairs; ++pair)
      for (int64_t piece = 0; piece < pieces; ++piece)
        for (int64_t t = 0; t < c.seen; ++t)
          c.sums[pair * c.sums_stride + t] += parts[(pair * pieces + piece) * width + t];
  }
}

}  // namespace
