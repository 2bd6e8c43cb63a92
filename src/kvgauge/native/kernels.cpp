// Products of a handful of rows with many: what a decode step does with its cache and with its weights.
//
// Both are bound by reading the large operand once. BLAS multiplies few rows at a fraction of that speed, and the softmax
// between the two products of attention would be another pass.
//
// Compiled by library.py with the options of this machine; called through ctypes, so nothing here knows of torch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

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
  const Words wide = __builtin_convertvector(*reinterpret_cast<const Halves*>(bits), Words) << 16;
  Vector x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}

// Rows of the large operand that are read at once: one load of a small operand's number serves them all, and the sums
// still fit in the vector registers.
constexpr int rows_at_once(int group) { return group <= 3 ? 4 : group <= 6 ? 2 : 1; }

// The next rows are fetched while these are read: each lies on pages of its own, where the processor's prefetching starts
// anew.
template <typename T>
inline void fetch(const T* number) { __builtin_prefetch(number, 0, 2); }

// scores[g][t] += Σ_u query[g][u] · rows[u][t]
template <int G, int U, typename T>
inline void add_scores(const float* query, int64_t query_stride, const T* rows, int64_t row_stride, int64_t count,
                       float* __restrict scores, int64_t score_stride) {
  float asked[G][U];
  for (int g = 0; g < G; ++g)
    for (int u = 0; u < U; ++u) asked[g][u] = query[g * query_stride + u];
  int64_t t = 0;
  for (; t + LANES <= count; t += LANES) {
    Vector read[U];
    for (int u = 0; u < U; ++u) {
      read[u] = numbers(rows + u * row_stride + t);
      fetch(rows + (U + u) * row_stride + t);
    }
    for (int g = 0; g < G; ++g) {
      Vector* score = reinterpret_cast<Vector*>(scores + g * score_stride + t);
      Vector sum = *score;
      for (int u = 0; u < U; ++u) sum += asked[g][u] * read[u];
      *score = sum;
    }
  }
  for (; t < count; ++t)
    for (int g = 0; g < G; ++g)
      for (int u = 0; u < U; ++u) scores[g * score_stride + t] += asked[g][u] * number(rows[u * row_stride + t]);
}

// out[g][u] += Σ_t weights[g][t] · rows[u][t]
template <int G, int U, typename T>
inline void add_products(const float* weights, int64_t weight_stride, const T* rows, int64_t row_stride, int64_t count,
                         float* out, int64_t out_stride) {
  Vector sums[G][U];
  for (int g = 0; g < G; ++g)
    for (int u = 0; u < U; ++u) sums[g][u] = Vector{};
  int64_t t = 0;
  for (; t + LANES <= count; t += LANES) {
    Vector read[U];
    for (int u = 0; u < U; ++u) {
      read[u] = numbers(rows + u * row_stride + t);
      fetch(rows + (U + u) * row_stride + t);
    }
    for (int g = 0; g < G; ++g) {
      const Vector weight = numbers(weights + g * weight_stride + t);
      for (int u = 0; u < U; ++u) sums[g][u] += weight * read[u];
    }
  }
  for (int g = 0; g < G; ++g)
    for (int u = 0; u < U; ++u) {
      float sum = 0.f;
      for (int lane = 0; lane < LANES; ++lane) sum += sums[g][u][lane];
      for (int64_t rest = t; rest < count; ++rest)
        sum += weights[g * weight_stride + rest] * number(rows[u * row_stride + rest]);
      out[g * out_stride + u] += sum;
    }
}

struct Attention {
  const float* query;                // (sequences · heads, G, query_dim)
  const void *keys, *values;         // (sequences, heads, rank, tokens), tokens of a dimension side by side
  const void *asking, *expansion;    // (heads, query_dim, rank_k) and (heads, output_dim, rank_v); null: the identity
  const uint8_t* mask;               // (sequences, tokens), 0 hides a token; null: none is hidden
  float *output, *lse;               // (sequences · heads, G, output_dim) and (sequences · heads, G)
  int64_t sequences, heads, query_dim, output_dim, rank_k, rank_v, tokens, block;
  int64_t key_strides[3], value_strides[3];  // of sequences, heads and dimensions, in numbers
  int64_t mask_stride;
  float scaling;
  int threads;
};

// out (count, outs) = factor · rows (count, in) · matrix (in, outs)
template <typename T>
void project(const float* rows, const T* matrix, float* out, int64_t count, int64_t in, int64_t outs, float factor) {
  std::fill(out, out + count * outs, 0.f);
  for (int64_t r = 0; r < count; ++r)
    for (int64_t j = 0; j < in; ++j) {
      const float x = rows[r * in + j] * factor;
      for (int64_t i = 0; i < outs; ++i) out[r * outs + i] += x * number(matrix[j * outs + i]);
    }
}

// The queries of one head as its keys are asked, scaled.
template <int G, typename T>
void ask(const Attention& a, int64_t pair, float* asked) {
  const float* query = a.query + pair * G * a.query_dim;
  const T* asking = static_cast<const T*>(a.asking);
  if (asking)
    project(query, asking + pair % a.heads * a.query_dim * a.rank_k, asked, G, a.query_dim, a.rank_k, a.scaling);
  else
    for (int64_t i = 0; i < G * a.rank_k; ++i) asked[i] = query[i] * a.scaling;
}

// One block of tokens for one head: unnormalised sums, their largest score and the sum of their weights.
template <int G, typename T>
void attend_block(const Attention& a, int64_t pair, int64_t start, int64_t count, float* scores, const float* query,
                  float* mixed, float* largest, float* total) {
  constexpr int U = rows_at_once(G);
  const int64_t sequence = pair / a.heads, head = pair % a.heads;
  const T* keys = static_cast<const T*>(a.keys) + sequence * a.key_strides[0] + head * a.key_strides[1] + start;
  const T* values = static_cast<const T*>(a.values) + sequence * a.value_strides[0] + head * a.value_strides[1] + start;
  std::fill(scores, scores + G * a.block, 0.f);
  int64_t row = 0;
  for (; row + U <= a.rank_k; row += U)
    add_scores<G, U>(query + row, a.rank_k, keys + row * a.key_strides[2], a.key_strides[2], count, scores, a.block);
  for (; row < a.rank_k; ++row)
    add_scores<G, 1>(query + row, a.rank_k, keys + row * a.key_strides[2], a.key_strides[2], count, scores, a.block);
  for (int g = 0; g < G; ++g) {
    float* own = scores + g * a.block;
    if (a.mask) {
      const uint8_t* seen = a.mask + sequence * a.mask_stride + start;
      for (int64_t t = 0; t < count; ++t) own[t] = seen[t] ? own[t] : LOWEST;
    }
    float top = LOWEST, sum = 0.f;
#pragma omp simd reduction(max : top)
    for (int64_t t = 0; t < count; ++t) top = own[t] > top ? own[t] : top;
#pragma omp simd reduction(+ : sum)
    for (int64_t t = 0; t < count; ++t) {
      const float weight = expf(own[t] - top);
      own[t] = weight;
      sum += weight;
    }
    largest[g] = top;
    total[g] = sum;
  }
  std::fill(mixed, mixed + G * a.rank_v, 0.f);
  for (row = 0; row + U <= a.rank_v; row += U)
    add_products<G, U>(scores, a.block, values + row * a.value_strides[2], a.value_strides[2], count, mixed + row, a.rank_v);
  for (; row < a.rank_v; ++row)
    add_products<G, 1>(scores, a.block, values + row * a.value_strides[2], a.value_strides[2], count, mixed + row, a.rank_v);
}

// Waking the other threads costs about as long as one core takes to read this much.
constexpr int64_t ALONE_BYTES = 1 << 20;

// The blocks of one head joined by their largest scores, normalised and expanded.
template <int G, typename T>
void join(const Attention& a, int64_t pair, const float* parts, int64_t part, int64_t blocks) {
  const T* expansion = static_cast<const T*>(a.expansion);
  if (expansion) expansion += pair % a.heads * a.output_dim * a.rank_v;
  std::vector<float> mixed(a.rank_v);
  for (int g = 0; g < G; ++g) {
    float top = LOWEST, sum = 0.f;
    for (int64_t b = 0; b < blocks; ++b) top = std::max(top, parts[b * part + G * a.rank_v + g]);
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

// Blocks of tokens are independent tasks; one thread joins them.
template <int G, typename T>
void attend(const Attention& a) {
  const int64_t pairs = a.sequences * a.heads, blocks = (a.tokens + a.block - 1) / a.block;
  const int64_t part = G * (a.rank_v + 2);  // sums, largest scores, totals
  std::vector<float> parts(pairs * blocks * part);
  const int64_t bytes = pairs * a.tokens * (a.rank_k + a.rank_v) * static_cast<int64_t>(sizeof(T));
#pragma omp parallel num_threads(a.threads) if (bytes > ALONE_BYTES)
  {
    std::vector<float> scores(G * a.block), query(G * a.rank_k);
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < pairs * blocks; ++task) {
      const int64_t pair = task / blocks, start = task % blocks * a.block;
      ask<G, T>(a, pair, query.data());
      float* mixed = parts.data() + task * part;
      attend_block<G, T>(a, pair, start, std::min(a.block, a.tokens - start), scores.data(), query.data(), mixed,
                         mixed + G * a.rank_v, mixed + G * a.rank_v + G);
    }
  }
  for (int64_t pair = 0; pair < pairs; ++pair) join<G, T>(a, pair, parts.data() + pair * blocks * part, part, blocks);
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

// -- linear layers of a few rows -------------------------------------------------------------------------------------

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
      float sum = 0.f;
      for (int lane = 0; lane < LANES; ++lane) sum += sums[r][u][lane];
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

extern "C" {

// Softmax attention of one query per head; see Attention for the shapes. `sizes`: sequences, heads, group, query_dim,
// output_dim, rank_k, rank_v, tokens, block; `strides`: of keys, of values (sequences, heads, dimensions) and of the mask's
// sequences; `half`: keys, values and both matrices are bfloat16. 1: a group of this size is not compiled.
int kvgauge_attend(const float* query, const void* keys, const void* values, const void* asking, const void* expansion,
                   const uint8_t* mask, float* output, float* lse, const int64_t* sizes, const int64_t* strides,
                   float scaling, int threads, int half) {
  Attention a;
  a.query = query, a.keys = keys, a.values = values, a.asking = asking, a.expansion = expansion, a.mask = mask;
  a.output = output, a.lse = lse;
  a.sequences = sizes[0], a.heads = sizes[1], a.query_dim = sizes[3], a.output_dim = sizes[4];
  a.rank_k = sizes[5], a.rank_v = sizes[6], a.tokens = sizes[7], a.block = sizes[8];
  std::copy(strides, strides + 3, a.key_strides);
  std::copy(strides + 3, strides + 6, a.value_strides);
  a.mask_stride = strides[6], a.scaling = scaling, a.threads = threads;
  const int group = static_cast<int>(sizes[2]);
  return half ? attend_group<uint16_t>(a, group) : attend_group<float>(a, group);
}

// out (pairs, count, outs) = rows (pairs, count, in) · matrices (heads, in, outs), pair by pair; `half`: the matrices are
// bfloat16.
void kvgauge_project(const float* rows, const void* matrices, float* out, int64_t pairs, int64_t heads, int64_t count,
                     int64_t in, int64_t outs, int half) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const float* own = rows + pair * count * in;
    float* result = out + pair * count * outs;
    const int64_t matrix = pair % heads * in * outs;
    if (half) project(own, static_cast<const uint16_t*>(matrices) + matrix, result, count, in, outs, 1.f);
    else project(own, static_cast<const float*>(matrices) + matrix, result, count, in, outs, 1.f);
  }
}

// out (count, outs) = rows (count, in) · weightᵀ (outs, in), all contiguous; `half`: the weights are bfloat16.
void kvgauge_narrow_product(const float* rows, const void* weight, float* out, int64_t count, int64_t in, int64_t outs,
                            int threads, int half) {
  if (half) narrow_product(rows, static_cast<const uint16_t*>(weight), out, count, in, outs, threads);
  else narrow_product(rows, static_cast<const float*>(weight), out, count, in, outs, threads);
}

}  // extern "C"
