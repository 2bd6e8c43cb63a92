// Weighted sums over runs of adjacent rows, turned by rotary angles on the way: what merging makes of keys and values.

#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

template <typename T>
struct Mix {
  const T* rows;                  // (sequences, heads, entries, dim), the numbers of a row side by side
  const float* weights;           // (sequences · heads, entries)
  const int64_t* segments;        // (sequences, entries), never falling, below count
  const float *cosines, *sines;   // (sequences, entries, dim), by which rows are turned; null: they are not
  T* out;                         // (sequences · heads, count, dim); segments without a row stay as they are
  int64_t sequences, heads, entries, dim, count;
  int64_t strides[3];             // of the rows' sequences, heads and entries, in numbers
  int threads;
};

// sum += weight · row
template <typename T>
inline void add_row(const T* row, float weight, int64_t dim, float* __restrict sum) {
  for (int64_t i = 0; i < dim; ++i) sum[i] += weight * number(row[i]);
}

// sum += weight · (row · cosines + rotate_half(row) · sines)
template <typename T>
inline void add_turned_row(const T* row, float weight, const float* cosines, const float* sines, int64_t dim,
                           float* __restrict sum) {
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; ++i) {
    const float first = weight * number(row[i]), second = weight * number(row[half + i]);
    sum[i] += first * cosines[i] - second * sines[i];
    sum[half + i] += second * cosines[half + i] + first * sines[half + i];
  }
}

template <typename T>
inline void store_row(const float* sum, int64_t dim, T* out) {
  int64_t i = 0;
  for (; i + LANES <= dim; i += LANES) store(out + i, numbers(sum + i));
  for (; i < dim; ++i) store_one(out + i, sum[i]);
}

template <typename T>
void segment_mix(const Mix<T>& m) {
  const int64_t pairs = m.sequences * m.heads;
#pragma omp parallel num_threads(m.threads) if (pairs * m.entries * m.dim * int64_t(sizeof(T)) > ALONE_BYTES)
  {
    std::vector<float> sum(m.dim);
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const int64_t sequence = pair / m.heads;
      const T* rows = m.rows + sequence * m.strides[0] + pair % m.heads * m.strides[1];
      const int64_t* segments = m.segments + sequence * m.entries;
      for (int64_t entry = 0; entry < m.entries;) {
        const int64_t segment = segments[entry];
        std::fill(sum.begin(), sum.end(), 0.f);
        for (; entry < m.entries && segments[entry] == segment; ++entry) {
          const float weight = m.weights[pair * m.entries + entry];
          const T* row = rows + entry * m.strides[2];
          const int64_t angles = (sequence * m.entries + entry) * m.dim;
          if (weight == 0.f) continue;
          if (m.cosines) add_turned_row(row, weight, m.cosines + angles, m.sines + angles, m.dim, sum.data());
          else add_row(row, weight, m.dim, sum.data());
        }
        store_row(sum.data(), m.dim, m.out + (pair * m.count + segment) * m.dim);
      }
    }
  }
}

}  // namespace
