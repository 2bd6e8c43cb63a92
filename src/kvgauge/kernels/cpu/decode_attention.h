// Softmax attention of one query per head: one pass over the cache, and the softmax between its two products.

#pragma once

#include <algorithm>
#include <vector>

#include "vectors.h"

namespace {

// Rows of the large operand that are read at once: one load of a small operand's number serves them all, and the sums
// still fit in the vector registers.
constexpr int rows_at_once(int group) { return group <= 3 ? 4 : group <= 6 ? 2 : 1; }

// Rows of the large operand: row u begins at first + u · stride.
template <typename T>
struct Rows {
  const T* first;
  int64_t stride;
  Rows from(int64_t row) const { return {first + row * stride, stride}; }
};

// One vector of each of U rows. The rows that come next are fetched while these are read: each lies on pages of its own,
// where the processor's prefetching starts anew.
template <int U, typename T>
inline void read_rows(Rows<T> rows, Rows<T> next, int64_t t, Vector* read) {
  for (int u = 0; u < U; ++u) {
    read[u] = numbers(rows.first + u * rows.stride + t);
    __builtin_prefetch(next.first + u * next.stride + t, 0, 2);
  }
}

// scores[g][t] += Σ_u query[g][u] · rows[u][t]
template <int G, int U, typename T>
inline void add_scores(const float* query, int64_t query_stride, Rows<T> rows, Rows<T> next, int64_t count,
                       float* __restrict scores, int64_t score_stride) {
  float asked[G][U];
  for (int g = 0; g < G; ++g)
    for (int u = 0; u < U; ++u) asked[g][u] = query[g * query_stride + u];
  int64_t t = 0;
  for (; t + LANES <= count; t += LANES) {
    Vector read[U];
    read_rows<U>(rows, next, t, read);
    for (int g = 0; g < G; ++g) {
      Vector* score = reinterpret_cast<Vector*>(scores + g * score_stride + t);
      Vector sum = *score;
      for (int u = 0; u < U; ++u) sum += asked[g][u] * read[u];
      *score = sum;
    }
  }
  for (; t < count; ++t)
    for (int g = 0; g < G; ++g)
      for (int u = 0; u < U; ++u) scores[g * score_stride + t] += asked[g][u] * number(rows.first[u * rows.stride + t]);
}

// out[g][u] += Σ_t weights[g][t] · rows[u][t]
template <int G, int U, typename T>
inline void add_products(const float* weights, int64_t weight_stride, Rows<T> rows, Rows<T> next, int64_t count, float* out,
                         int64_t out_stride) {
  Vector sums[G][U];
  for (int g = 0; g < G; ++g)
    for (int u = 0; u < U; ++u) sums[g][u] = Vector{};
  int64_t t = 0;
  for (; t + LANES <= count; t += LANES) {
    Vector read[U];
    read_rows<U>(rows, next, t, read);
    for (int g = 0; g < G; ++g) {
      const Vector weight = numbers(weights + g * weight_stride + t);
      for (int u = 0; u < U; ++u) sums[g][u] += weight * read[u];
    }
  }
  for (int g = 0; g < G; ++g)
    for (int u = 0; u < U; ++u) {
      float sum = sum_of(sums[g][u]);
      for (int64_t rest = t; rest < count; ++rest)
        sum += weights[g * weight_stride + rest] * number(rows.first[u * rows.stride + rest]);
      out[g * out_stride + u] += sum;
    }
}

struct Attention {
  const float* query;                // (sequences · heads, G, query_dim)
  const void *keys, *values;         // (sequences, heads, rank, tokens), tokens of a dimension side by side
  const void *asking, *expansion;    // (heads, query_dim, rank_k) and (heads, output_dim, rank_v); null: the identity
  const uint8_t* mask;               // (sequences, tokens), 0 hides a token; null: none is hidden
  const int32_t* counts;             // (sequences, tokens), how often an entry counts, 0 hides it; null: all count once
  float *output, *lse;               // (sequences · heads, G, output_dim) and (sequences · heads, G)
  float* received;                   // (sequences · heads, tokens), the attention that each got from its group; or null
  int64_t sequences, heads, query_dim, output_dim, rank_k, rank_v, tokens, block;
  int64_t key_strides[3], value_strides[3];  // of sequences, heads and dimensions, in numbers
  int64_t mask_stride, counts_stride;
  float scaling, softcap;            // scores become softcap · tanh(scores / softcap); 0: they stay
  const float* sinks;                // (heads, G), logits in the normalisers that stand for no token; or null
  int threads;
};

// out (R, outs) = factor · rows (R, in) · matrix (in, outs)
template <int R, typename T>
void project(const float* rows, const T* matrix, float* out, int64_t in, int64_t outs, float factor) {
  int64_t i = 0;
  for (; i + LANES <= outs; i += LANES) {
    Vector sums[R];
    for (int r = 0; r < R; ++r) sums[r] = Vector{};
    for (int64_t j = 0; j < in; ++j) {
      const Vector column = numbers(matrix + j * outs + i);
      for (int r = 0; r < R; ++r) sums[r] += rows[r * in + j] * column;
    }
    for (int r = 0; r < R; ++r) store(out + r * outs + i, sums[r] * factor);
  }
  for (; i < outs; ++i)
    for (int r = 0; r < R; ++r) {
      float sum = 0.f;
      for (int64_t j = 0; j < in; ++j) sum += rows[r * in + j] * number(matrix[j * outs + i]);
      out[r * outs + i] = sum * factor;
    }
}

// The queries of one head as its keys are asked, scaled.
template <int G, typename T>
void ask(const Attention& a, int64_t pair, float* asked) {
  const float* query = a.query + pair * G * a.query_dim;
  const T* asking = static_cast<const T*>(a.asking);
  if (asking)
    project<G>(query, asking + pair % a.heads * a.query_dim * a.rank_k, asked, a.query_dim, a.rank_k, a.scaling);
  else
    for (int64_t i = 0; i < G * a.rank_k; ++i) asked[i] = query[i] * a.scaling;
}

// The keys or the values of one head, from one token on.
template <typename T>
Rows<T> rows_of(const Attention& a, const void* stored, const int64_t* strides, int64_t pair, int64_t start) {
  return {static_cast<const T*>(stored) + pair / a.heads * strides[0] + pair % a.heads * strides[1] + start, strides[2]};
}

// What stands for nothing gets no weight.
template <typename T>
inline void hide(float* scores, const T* seen, int64_t count) {
  for (int64_t t = 0; t < count; ++t) scores[t] = seen[t] ? scores[t] : LOWEST;
}

// Weights times counts in place. Returns their sum.
inline float multiply(float* weights, const int32_t* counts, int64_t count) {
  float sum = 0.f;
  for (int64_t t = 0; t < count; ++t) sum += weights[t] *= static_cast<float>(counts[t]);
  return sum;
}

// One block of tokens for one head: unnormalised sums, their largest score and the sum of their weights.
template <int G, typename T>
void attend_block(const Attention& a, int64_t pair, int64_t start, int64_t count, Rows<T> next_keys, float* scores,
                  const float* query, float* mixed, float* largest, float* total) {
  constexpr int U = rows_at_once(G);
  const int64_t sequence = pair / a.heads;
  const Rows<T> keys = rows_of<T>(a, a.keys, a.key_strides, pair, start);
  const Rows<T> values = rows_of<T>(a, a.values, a.value_strides, pair, start);
  std::fill(scores, scores + G * a.block, 0.f);
  int64_t row = 0;
  for (; row + U <= a.rank_k; row += U)
    add_scores<G, U>(query + row, a.rank_k, keys.from(row), row + U < a.rank_k ? keys.from(row + U) : values, count, scores,
                     a.block);
  for (; row < a.rank_k; ++row)
    add_scores<G, 1>(query + row, a.rank_k, keys.from(row), values, count, scores, a.block);
  const uint8_t* seen = a.mask ? a.mask + sequence * a.mask_stride + start : nullptr;
  const int32_t* counts = a.counts ? a.counts + sequence * a.counts_stride + start : nullptr;
  for (int g = 0; g < G; ++g) {
    float* own = scores + g * a.block;
    if (a.softcap > 0.f) cap(own, count, a.softcap);
    if (seen) hide(own, seen, count);
    if (counts) hide(own, counts, count);
    hide_rest(own, count);
    largest[g] = largest_of(own, count);
    total[g] = exponentials(own, count, largest[g]);
    if (counts) total[g] = multiply(own, counts, count);
  }
  std::fill(mixed, mixed + G * a.rank_v, 0.f);
  for (row = 0; row + U <= a.rank_v; row += U)
    add_products<G, U>(scores, a.block, values.from(row), row + U < a.rank_v ? values.from(row + U) : next_keys, count,
                       mixed + row, a.rank_v);
  for (; row < a.rank_v; ++row)
    add_products<G, 1>(scores, a.block, values.from(row), next_keys, count, mixed + row, a.rank_v);
}

// The blocks of one head joined by their largest scores, normalised and expanded.
template <int G, typename T>
void join(const Attention& a, int64_t pair, const float* parts, int64_t part, int64_t blocks) {
  const T* expansion = static_cast<const T*>(a.expansion);
  if (expansion) expansion += pair % a.heads * a.output_dim * a.rank_v;
  std::vector<float> mixed(a.rank_v);
  for (int g = 0; g < G; ++g) {
    float top = LOWEST, sum = 0.f;
    for (int64_t b = 0; b < blocks; ++b) top = std::max(top, parts[b * part + G * a.rank_v + g]);
    const float sink = a.sinks ? a.sinks[pair % a.heads * G + g] : LOWEST;
    top = std::max(top, sink);
    if (a.sinks) sum = expf(sink - top);
    std::fill(mixed.begin(), mixed.end(), 0.f);
    for (int64_t b = 0; b < blocks; ++b) {
      const float* own = parts + b * part;
      const float share = expf(own[G * a.rank_v + g] - top);
      sum += share * own[G * a.rank_v + G + g];
      for (int64_t i = 0; i < a.rank_v; ++i) mixed[i] += share * own[g * a.rank_v + i];
    }
    for (float& x : mixed) x /= sum;
    a.lse[pair * G + g] = top + logf(sum);
    float* output = a.output + (pair * G + g) * a.output_dim;
    if (!expansion) std::copy(mixed.begin(), mixed.end(), output);
    else
      for (int64_t j = 0; j < a.output_dim; ++j) {
        float x = 0.f;
        for (int64_t i = 0; i < a.rank_v; ++i) x += mixed[i] * number(expansion[j * a.rank_v + i]);
        output[j] = x;
      }
  }
}

// The normalised weights of one block of tokens, summed over the queries of a group.
template <int G>
void receive(const Attention& a, int64_t pair, int64_t start, int64_t count, const float* weights, const float* largest) {
  float* received = a.received + pair * a.tokens + start;
  float share[G];
  for (int g = 0; g < G; ++g) share[g] = expf(largest[g] - a.lse[pair * G + g]);
  for (int64_t t = 0; t < count; ++t) {
    float sum = 0.f;
    for (int g = 0; g < G; ++g) sum += share[g] * weights[g * a.block + t];
    received[t] = sum;
  }
}

// Heads are asked, blocks of tokens attended to, heads joined and blocks told what they received: each a step of
// independent tasks.
template <int G, typename T>
void attend(const Attention& a) {
  const int64_t pairs = a.sequences * a.heads, blocks = (a.tokens + a.block - 1) / a.block, tasks = pairs * blocks;
  const int64_t part = G * (a.rank_v + 2);  // sums, largest scores, totals
  std::vector<float> query(pairs * G * a.rank_k), parts(tasks * part), weights(a.received ? tasks * G * a.block : 0);
  const int64_t bytes = pairs * a.tokens * (a.rank_k + a.rank_v) * static_cast<int64_t>(sizeof(T));
#pragma omp parallel num_threads(a.threads) if (bytes > ALONE_BYTES)
  {
    std::vector<float> scores(a.received ? 0 : G * a.block);
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < pairs; ++pair) ask<G, T>(a, pair, query.data() + pair * G * a.rank_k);
#pragma omp for schedule(static)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t pair = task / blocks, start = task % blocks * a.block, next = std::min(task + 1, tasks - 1);
      float* mixed = parts.data() + task * part;
      attend_block<G, T>(a, pair, start, std::min(a.block, a.tokens - start),
                         rows_of<T>(a, a.keys, a.key_strides, next / blocks, next % blocks * a.block),
                         a.received ? weights.data() + task * G * a.block : scores.data(),
                         query.data() + pair * G * a.rank_k, mixed, mixed + G * a.rank_v, mixed + G * a.rank_v + G);
    }
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < pairs; ++pair) join<G, T>(a, pair, parts.data() + pair * blocks * part, part, blocks);
    if (a.received) {
#pragma omp for schedule(static)
      for (int64_t task = 0; task < tasks; ++task) {
        const int64_t start = task % blocks * a.block;
        receive<G>(a, task / blocks, start, std::min(a.block, a.tokens - start), weights.data() + task * G * a.block,
                   parts.data() + task * part + G * a.rank_v);
      }
    }
  }
}

template <typename T>
int attend_group(const Attention& a, int group) {
  switch (group) {
    case 1: attend<1, T>(a); return 0;
    case 2: attend<2, T>(a); return 0;
    case 3: attend<3, T>(a); return 0;
    case 4: attend<4, T>(a); return 0;
    case 5: attend<5, T>(a); return 0;
    case 6: attend<6, T>(a); return 0;
    case 7: attend<7, T>(a); return 0;
    case 8: attend<8, T>(a); return 0;
    default: return 1;
  }
}

}  // namespace
