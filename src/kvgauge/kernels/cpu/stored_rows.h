// Rows of a cache in the form in which they are stored, and the two products that attention makes of them.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "codes.h"

namespace {

constexpr int TILE = 16;                // tokens of a tile: those of one column stand side by side
constexpr int PIECES = TILE / LANES;    // vectors of a tile's column
constexpr bool WIDE = LANES == 16;      // and twice as many registers

// Loops of a few turns, known when this is compiled: their sums stay in registers only where all turns are written out.
#define UNROLLED _Pragma("GCC unroll 32")

enum Kind : int64_t { FLOAT, BFLOAT16, FLOAT16, TOKEN_CODES, CHANNEL_CODES };

// Rows of all sequences and heads. Plain ones stand (sequences, heads, tokens, dim); codes (sequences, heads, tiles,
// packed dim, TILE), with float16 scales and minima of groups of channels of every token (…, tiles, 2 · groups, TILE), or of
// every channel in a group of tokens (…, groups, 2 · dim). The last tile may have fewer slots than TILE, the codes and the
// parameters of tokens alike. The words that Python hands over, in its order.
struct Stored {
  int64_t kind;
  int64_t numbers, parameters;    // addresses
  int64_t balance;                // address of float16 factors (sequences, heads, dim), of channels; 0: there are none
  int64_t table;                  // address of LEVELS floats, what codes of 1 to 4 bits stand for; unused with 8
  int64_t tokens, dim, bits;
  int64_t lead;                   // slots of the first tile without a token
  int64_t group;                  // CHANNEL_CODES: tokens of a group, whole tiles. TOKEN_CODES: groups of a token
  int64_t minima;                 // TOKEN_CODES: 1: groups have them; 0: they have scales alone
  int64_t missing;                // CHANNEL_CODES: tokens that the first group is short of; the lead is what tiles leave of it
  int64_t slots;                  // of all tiles; groups of tokens end with whole ones
  int64_t row_stride;             // of plain rows, in numbers
  int64_t number_strides[2], parameter_strides[2], balance_strides[2];  // of sequences and heads, in numbers
  int64_t beside;                 // 0, or the first channel of rows that hold more channels of the tokens before
  int64_t rotation;               // address of floats (rotated, channels): queries are asked as query · rotation; 0: as they are
  int64_t rotated;                // numbers of a row before that
  int64_t head_rows;              // rows of one head where all heads share these: then head h has those from h · head_rows on
};

// Those of one sequence and head.
struct Located {
  const Stored& of;
  const void* numbers;
  const Half *parameters, *balance;
  const float* table;
  int64_t first;  // row

  Located(const Stored& s, int64_t sequence, int64_t head)
      : of(s), table(reinterpret_cast<const float*>(s.table)), first(head * s.head_rows) {
    const int64_t size = s.kind == FLOAT ? 4 : s.kind >= TOKEN_CODES ? 1 : 2;
    numbers = reinterpret_cast<const char*>(s.numbers) +
              (sequence * s.number_strides[0] + head * s.number_strides[1]) * size;
    parameters = reinterpret_cast<const Half*>(s.parameters) + sequence * s.parameter_strides[0] +
                 head * s.parameter_strides[1];
    balance = s.balance ? reinterpret_cast<const Half*>(s.balance) + sequence * s.balance_strides[0] +
                              head * s.balance_strides[1]
                        : nullptr;
  }

  // One tile, unfolded to all its slots.
  Located(const Stored& s, const Located& from, const uint8_t* codes, const Half* of_tokens)
      : of(s), numbers(codes), parameters(of_tokens), balance(from.balance), table(from.table), first(0) {}

  int64_t row_bytes() const { return of.bits == 3 ? (of.dim + 7) / 8 * 3 : (of.dim * of.bits + 7) / 8; }
  int64_t tile_bytes() const { return row_bytes() * TILE; }
  int64_t parameter_rows() const { return of.group * (1 + of.minima); }
  const uint8_t* codes(int64_t tile) const { return static_cast<const uint8_t*>(numbers) + tile * tile_bytes(); }
};

// Memory that is read next, fetched line by line on the way.
struct Ahead {
  const char *at = nullptr, *end = nullptr;
  void step() {
    if (at < end) {
      __builtin_prefetch(at, 0, 2);
      at += 64;
    }
  }
};

inline Ahead ahead_of(const Stored& s, int64_t sequence, int64_t head, int64_t from, int64_t to) {
  if (s.kind < TOKEN_CODES || from >= to) return {};
  const Located rows(s, sequence, head);
  return {reinterpret_cast<const char*>(rows.codes((s.lead + from) / TILE)),
          reinterpret_cast<const char*>(rows.codes((s.lead + std::min(to, s.tokens) + TILE - 1) / TILE))};
}

// Queries of a handful at a time, as many as registers hold the sums of: run(how many, from which one on).
template <int MOST, typename Run>
inline void in_turns(int64_t count, Run&& run) {
  int64_t q = 0;
  const auto turn = [&](auto several) {
    run(several, q);
    q += several;
  };
  while (q < count) {
    const int64_t left = count - q;
    if constexpr (MOST >= 9) {
      if (left % 9 == 0) {
        turn(std::integral_constant<int, 9>{});
        continue;
      }
    }
    if constexpr (MOST >= 4) {
      if (left >= 4) {
        turn(std::integral_constant<int, 4>{});
        continue;
      }
    }
    if constexpr (MOST >= 3) {
      if (left >= 3) {
        turn(std::integral_constant<int, 3>{});
        continue;
      }
    }
    if constexpr (MOST >= 2) {
      if (left >= 2) {
        turn(std::integral_constant<int, 2>{});
        continue;
      }
    }
    turn(std::integral_constant<int, 1>{});
  }
}

// -- plain rows ----------------------------------------------------------------------------------------------------------

// scores[q][t] = asked[q] · row[t]
template <int Q, typename T>
void dot_plain(const T* rows, int64_t row_stride, int64_t count, int64_t dim, const float* asked, int64_t stride,
               float* scores, int64_t score_stride) {
  constexpr int U = !WIDE ? 1 : Q <= 4 ? 4 : 2;
  const auto run = [&](auto several, int64_t t) {
    constexpr int S = decltype(several)::value;
    Vector sums[S][Q] = {};
    int64_t c = 0;
    for (; c + LANES <= dim; c += LANES) {
      Vector read[S];
      UNROLLED for (int u = 0; u < S; ++u) read[u] = numbers(rows + (t + u) * row_stride + c);
      UNROLLED for (int q = 0; q < Q; ++q) {
        const Vector own = numbers(asked + q * stride + c);
        UNROLLED for (int u = 0; u < S; ++u) sums[u][q] += own * read[u];
      }
    }
    UNROLLED for (int u = 0; u < S; ++u)
      UNROLLED for (int q = 0; q < Q; ++q) {
        float sum = folded(sums[u][q]);
        for (int64_t rest = c; rest < dim; ++rest)
          sum += asked[q * stride + rest] * number(rows[(t + u) * row_stride + rest]);
        scores[q * score_stride + t + u] = sum;
      }
  };
  int64_t t = 0;
  for (; t + U <= count; t += U) run(std::integral_constant<int, U>{}, t);
  for (; t < count; ++t) run(std::integral_constant<int, 1>{}, t);
}

// out[q] += Σ_t weights[q][t] · row[t]
template <int Q, typename T>
void mix_plain(const T* rows, int64_t row_stride, int64_t count, int64_t dim, const float* weights, int64_t weight_stride,
               float* out, int64_t out_stride) {
  constexpr int V = !WIDE ? 2 : Q <= 3 ? 8 : Q <= 4 ? 6 : 3;
  int64_t c = 0;
  const auto run = [&](auto several) {
    constexpr int S = decltype(several)::value;
    Vector sums[S][Q] = {};
    for (int64_t t = 0; t < count; ++t) {
      Vector read[S];
      UNROLLED for (int v = 0; v < S; ++v) read[v] = numbers(rows + t * row_stride + c + v * LANES);
      UNROLLED for (int q = 0; q < Q; ++q) {
        const float weight = weights[q * weight_stride + t];
        UNROLLED for (int v = 0; v < S; ++v) sums[v][q] += weight * read[v];
      }
    }
    UNROLLED for (int v = 0; v < S; ++v)
      UNROLLED for (int q = 0; q < Q; ++q) {
        float* own = out + q * out_stride + c + v * LANES;
        store(own, numbers(own) + sums[v][q]);
      }
    c += S * LANES;
  };
  while (c + V * LANES <= dim) run(std::integral_constant<int, V>{});
  while (c + LANES <= dim) run(std::integral_constant<int, 1>{});
  for (; c < dim; ++c)
    UNROLLED for (int q = 0; q < Q; ++q) {
      float sum = 0.f;
      for (int64_t t = 0; t < count; ++t) sum += weights[q * weight_stride + t] * number(rows[t * row_stride + c]);
      out[q * out_stride + c] += sum;
    }
}

// -- codes ---------------------------------------------------------------------------------------------------------------

// sums[v][q] = Σ_c asked[q][c] · (level · scale[c] + minimum[c]) over the channels of some runs; SCALED: with scale and
// minimum, else without. Vector v is a piece of the tile v / PIECES.
template <int Q, int BITS, int V, bool SCALED>
inline void dot_tiles(const uint8_t* codes, int64_t tile_bytes, int64_t runs, const float* asked, int64_t stride,
                      const float* scale, const float* minimum, const float* table, Ahead& ahead, Vector (&sums)[V][Q]) {
  using P = Packing<BITS>;
  UNROLLED for (int v = 0; v < V; ++v)
    UNROLLED for (int q = 0; q < Q; ++q) sums[v][q] = Vector{};
  for (int64_t run = 0; run < runs; ++run) {
    Words words[V];
    UNROLLED for (int v = 0; v < V; ++v)
      words[v] = word<BITS>(codes + v / PIECES * tile_bytes + run * P::BYTES * TILE + v % PIECES * LANES, TILE);
    ahead.step();
    UNROLLED for (int i = 0; i < P::CHANNELS; ++i) {
      const int64_t c = run * P::CHANNELS + i;
      Vector read[V];
      UNROLLED for (int v = 0; v < V; ++v) {
        read[v] = level<BITS>(words[v], i, table);
        if (SCALED) read[v] = read[v] * scale[c] + minimum[c];
      }
      UNROLLED for (int q = 0; q < Q; ++q) {
        const float own = asked[q * stride + c];
        UNROLLED for (int v = 0; v < V; ++v) sums[v][q] += own * read[v];
      }
    }
  }
}

// The same for tiles one after another; put(tile, piece, q, sum) takes every vector of sums.
template <int Q, int BITS, bool SCALED, typename Put>
inline void dot_run(const Located& rows, int64_t tile, int64_t end, int64_t first_run, int64_t runs, const float* asked,
                    int64_t stride, const float* scale, const float* minimum, Ahead& ahead, Put&& put) {
  constexpr int MANY = !WIDE ? 1 : Q <= 4 ? 4 : 2;
  const int64_t tile_bytes = rows.tile_bytes();
  const auto some = [&](auto several) {
    constexpr int S = decltype(several)::value;
    Vector sums[S * PIECES][Q];
    dot_tiles<Q, BITS, S * PIECES, SCALED>(rows.codes(tile) + first_run * Packing<BITS>::BYTES * TILE, tile_bytes, runs,
                                           asked, stride, scale, minimum, rows.table, ahead, sums);
    float kept[S * PIECES][Q][LANES];  // registers cannot be counted through
    UNROLLED for (int v = 0; v < S * PIECES; ++v)
      UNROLLED for (int q = 0; q < Q; ++q) store(kept[v][q], sums[v][q]);
    for (int v = 0; v < S * PIECES; ++v)
      for (int q = 0; q < Q; ++q) put(tile + v / PIECES, v % PIECES, q, numbers(kept[v][q]));
    tile += S;
  };
  while (tile + MANY <= end) some(std::integral_constant<int, MANY>{});
  while (tile < end) some(std::integral_constant<int, 1>{});
}

// sums[u · CHANNELS + i][q] += Σ_t weights[q][t] · level of U runs of channels over some tiles; SCALED as above.
template <int Q, int BITS, int U, bool SCALED>
inline void mix_tiles(const uint8_t* codes, int64_t tile_bytes, int64_t tiles, const float* weights, int64_t weight_stride,
                      const float* scale, const float* minimum, const float* table, Ahead& ahead,
                      Vector (&sums)[U * Packing<BITS>::CHANNELS][Q]) {
  using P = Packing<BITS>;
  for (int64_t tile = 0; tile < tiles; ++tile, codes += tile_bytes, weights += TILE) {
    ahead.step();
    UNROLLED for (int piece = 0; piece < PIECES; ++piece) {
      Vector weight[Q];
      UNROLLED for (int q = 0; q < Q; ++q) weight[q] = numbers(weights + q * weight_stride + piece * LANES);
      UNROLLED for (int u = 0; u < U; ++u) {
        const Words words = word<BITS>(codes + u * P::BYTES * TILE + piece * LANES, TILE);
        UNROLLED for (int i = 0; i < P::CHANNELS; ++i) {
          const int c = u * P::CHANNELS + i;
          Vector read = level<BITS>(words, i, table);
          if (SCALED) read = read * scale[c] + minimum[c];
          UNROLLED for (int q = 0; q < Q; ++q) sums[c][q] += weight[q] * read;
        }
      }
    }
  }
}

constexpr int runs_at_once(int queries, int channels) {
  const int room = (WIDE ? 24 : 10) / (queries * channels);
  return room >= 8 ? 8 : room >= 4 ? 4 : room >= 2 ? 2 : 1;
}

// As many queries as the sums of the channels of a run leave registers for.
constexpr int most_mixed(int bits) { return bits >= 4 ? (WIDE ? 9 : 4) : bits == 2 ? (WIDE ? 4 : 2) : (WIDE ? 3 : 1); }

// Rows of `width` numbers as rows of TILE.
template <typename T>
inline void unfold(const T* from, int64_t rows, int64_t width, T* to) {
  for (int64_t r = 0; r < rows; ++r, from += width, to += TILE) {
    std::copy(from, from + width, to);
    std::fill(to + width, to + TILE, T{});
  }
}

// Numbers for a while, from the start of a cache line on: a vector that lies in two takes two reads.
struct Scratch {
  static constexpr size_t LINE = 64;
  std::vector<float> numbers;
  std::vector<uint8_t> last_codes;      // of a last tile that has fewer slots
  std::vector<Half> last_parameters;
  float* of(size_t count) {
    if (numbers.size() < count + LINE / sizeof(float)) numbers.resize(count + LINE / sizeof(float));
    const size_t past = reinterpret_cast<uintptr_t>(numbers.data()) % LINE;
    return numbers.data() + (past ? (LINE - past) / sizeof(float) : 0);
  }
};

inline void convert(const Half* from, int64_t count, int64_t padded, float* to) {
  int64_t c = 0;
  for (; c + LANES <= count; c += LANES) store(to + c, numbers(from + c));
  for (; c < count; ++c) to[c] = number(from[c]);
  for (; c < padded; ++c) to[c] = 0.f;
}

inline int64_t group_of_tile(const Stored& s, int64_t tile) { return (tile * TILE - s.lead + s.missing) / s.group; }
inline int64_t end_of_group(const Stored& s, int64_t group) { return ((group + 1) * s.group - s.missing + s.lead) / TILE; }

// scores[q][t] = asked[q] · row[from + t]. What stands in whole tiles around the rows is written too.
template <int Q, int BITS>
void dot_codes(const Located& rows, int64_t from, int64_t to, const float* asked, int64_t stride, float* scores,
               int64_t score_stride, Scratch& scratch, Ahead& ahead) {
  using P = Packing<BITS>;
  const Stored& s = rows.of;
  const int64_t first = s.lead + from, tile = first / TILE, end = (s.lead + to + TILE - 1) / TILE, dim = s.dim;
  const int64_t padded = (dim + P::CHANNELS - 1) / P::CHANNELS * P::CHANNELS;
  const auto place = [&](int64_t own, int piece, int q) {
    return scores + q * score_stride + own * TILE - first + piece * LANES;
  };
  float* own = scratch.of((Q + 2) * (padded + LANES));
  if (s.kind == CHANNEL_CODES) {
    float *scale = own + Q * padded, *minimum = scale + padded;
    UNROLLED for (int q = 0; q < Q; ++q) {
      std::copy(asked + q * stride, asked + q * stride + dim, own + q * padded);
      std::fill(own + q * padded + dim, own + (q + 1) * padded, 0.f);
    }
    for (int64_t t = tile; t < end;) {
      const int64_t group = group_of_tile(s, t), stop = std::min(end, end_of_group(s, group));
      convert(rows.parameters + group * 2 * dim, dim, padded, scale);
      convert(rows.parameters + (group * 2 + 1) * dim, dim, padded, minimum);
      dot_run<Q, BITS, true>(rows, t, stop, 0, padded / P::CHANNELS, own, padded, scale, minimum, ahead,
                             [&](int64_t at, int piece, int q, Vector sum) { store(place(at, piece, q), sum); });
      t = stop;
    }
    return;
  }
  const int64_t groups = s.group;
  for (int64_t k = 0; k < groups; ++k) {
    const int64_t low = dim * k / groups, high = dim * (k + 1) / groups;
    const int64_t run = low / P::CHANNELS, runs = (high + P::CHANNELS - 1) / P::CHANNELS - run, base = run * P::CHANNELS;
    const int64_t width = runs * P::CHANNELS;
    float total[Q];
    UNROLLED for (int q = 0; q < Q; ++q) {
      total[q] = 0.f;
      for (int64_t c = 0; c < width; ++c) {
        const int64_t channel = base + c;
        const bool inside = channel >= low && channel < high;
        float x = inside ? asked[q * stride + channel] : 0.f;
        if (inside && rows.balance) x *= number(rows.balance[channel]);
        own[q * width + c] = x;
        total[q] += x;
      }
    }
    dot_run<Q, BITS, false>(
        rows, tile, end, run, runs, own, width, nullptr, nullptr, ahead, [&](int64_t at, int piece, int q, Vector sum) {
          const Half* parameters = rows.parameters + (at * rows.parameter_rows() + k) * TILE + piece * LANES;
          float* score = place(at, piece, q);
          Vector all = sum * numbers(parameters);
          if (s.minima) all += numbers(parameters + groups * TILE) * total[q];
          if (k || s.beside) all += numbers(score);
          store(score, all);
        });
  }
}

// out[q] += Σ_t weights[q][t] · row[from + t]. Weights are 0 in the whole tiles around the rows.
template <int Q, int BITS>
void mix_codes(const Located& rows, int64_t from, int64_t to, const float* weights, int64_t weight_stride, float* out,
               int64_t out_stride, Scratch& scratch, Ahead& ahead) {
  using P = Packing<BITS>;
  const Stored& s = rows.of;
  const int64_t first = s.lead + from, tile = first / TILE, end = (s.lead + to + TILE - 1) / TILE, dim = s.dim;
  const int64_t tile_bytes = rows.tile_bytes(), padded = (dim + P::CHANNELS - 1) / P::CHANNELS * P::CHANNELS;
  weights += tile * TILE - first;
  if (s.kind == CHANNEL_CODES) {
    const int64_t group = group_of_tile(s, tile), last = group_of_tile(s, end - 1);
    float* scales = scratch.of(2 * (last - group + 1) * (padded + LANES));
    for (int64_t g = group; g <= last; ++g) {
      convert(rows.parameters + g * 2 * dim, dim, padded, scales + (g - group) * 2 * padded);
      convert(rows.parameters + (g * 2 + 1) * dim, dim, padded, scales + ((g - group) * 2 + 1) * padded);
    }
    int64_t run = 0;
    const auto some = [&](auto several) {
      constexpr int U = decltype(several)::value;
      Vector sums[U * P::CHANNELS][Q] = {};
      const int64_t base = run * P::CHANNELS;
      for (int64_t t = tile, g = group; t < end; ++g) {
        const int64_t stop = std::min(end, end_of_group(s, g));
        const float* scale = scales + (g - group) * 2 * padded + base;
        mix_tiles<Q, BITS, U, true>(rows.codes(t) + run * P::BYTES * TILE, tile_bytes, stop - t,
                                    weights + (t - tile) * TILE, weight_stride, scale, scale + padded, rows.table, ahead,
                                    sums);
        t = stop;
      }
      float kept[U * P::CHANNELS][Q][LANES];
      UNROLLED for (int c = 0; c < U * P::CHANNELS; ++c)
        UNROLLED for (int q = 0; q < Q; ++q) store(kept[c][q], sums[c][q]);
      for (int64_t c = 0; c < U * P::CHANNELS && base + c < dim; ++c)
        for (int q = 0; q < Q; ++q) out[q * out_stride + base + c] += folded(numbers(kept[c][q]));
      run += U;
    };
    constexpr int MANY = runs_at_once(Q, P::CHANNELS);
    const int64_t runs = padded / P::CHANNELS;
    while (run + MANY <= runs) some(std::integral_constant<int, MANY>{});
    while (run < runs) some(std::integral_constant<int, 1>{});
    return;
  }
  const int64_t groups = s.group, width = (end - tile) * TILE;
  float* own = scratch.of(Q * width);
  for (int64_t k = 0; k < groups; ++k) {
    const int64_t low = dim * k / groups, high = dim * (k + 1) / groups;
    Vector minima[Q] = {};
    for (int64_t t = tile; t < end; ++t)
      UNROLLED for (int piece = 0; piece < PIECES; ++piece) {
        const Half* parameters = rows.parameters + (t * rows.parameter_rows() + k) * TILE + piece * LANES;
        const Vector scale = numbers(parameters), minimum = s.minima ? numbers(parameters + groups * TILE) : Vector{};
        const int64_t at = (t - tile) * TILE + piece * LANES;
        UNROLLED for (int q = 0; q < Q; ++q) {
          const Vector weight = numbers(weights + q * weight_stride + at);
          store(own + q * width + at, weight * scale);
          minima[q] += weight * minimum;
        }
      }
    float total[Q];
    UNROLLED for (int q = 0; q < Q; ++q) total[q] = folded(minima[q]);
    int64_t run = low / P::CHANNELS;
    const auto some = [&](auto several) {
      constexpr int U = decltype(several)::value;
      Vector sums[U * P::CHANNELS][Q] = {};
      const int64_t base = run * P::CHANNELS;
      mix_tiles<Q, BITS, U, false>(rows.codes(tile) + run * P::BYTES * TILE, tile_bytes, end - tile, own, width, nullptr,
                                   nullptr, rows.table, ahead, sums);
      float kept[U * P::CHANNELS][Q][LANES];
      UNROLLED for (int c = 0; c < U * P::CHANNELS; ++c)
        UNROLLED for (int q = 0; q < Q; ++q) store(kept[c][q], sums[c][q]);
      for (int64_t channel = std::max(low, base); channel < std::min<int64_t>(high, base + U * P::CHANNELS); ++channel) {
        const float factor = rows.balance ? number(rows.balance[channel]) : 1.f;
        for (int q = 0; q < Q; ++q)
          out[q * out_stride + channel] += factor * (folded(numbers(kept[channel - base][q])) + total[q]);
      }
      run += U;
    };
    constexpr int MANY = runs_at_once(Q, P::CHANNELS);
    const int64_t runs = (high + P::CHANNELS - 1) / P::CHANNELS;
    while (run + MANY <= runs) some(std::integral_constant<int, MANY>{});
    while (run < runs) some(std::integral_constant<int, 1>{});
  }
}

// -- any rows ------------------------------------------------------------------------------------------------------------

template <typename Plain, typename Codes>
inline void by_kind(const Located& rows, Plain&& plain, Codes&& codes) {
  const auto first = [&](const auto* all) { return all + rows.first * rows.of.row_stride; };
  switch (rows.of.kind) {
    case FLOAT: return plain(first(static_cast<const float*>(rows.numbers)));
    case BFLOAT16: return plain(first(static_cast<const uint16_t*>(rows.numbers)));
    case FLOAT16: return plain(first(static_cast<const Half*>(rows.numbers)));
    default: break;
  }
  switch (rows.of.bits) {
    case 1: return codes(std::integral_constant<int, 1>{});
    case 2: return codes(std::integral_constant<int, 2>{});
    case 3: return codes(std::integral_constant<int, 3>{});
    case 4: return codes(std::integral_constant<int, 4>{});
    default: return codes(std::integral_constant<int, 8>{});
  }
}

// Over the whole tiles among the rows of a token from `from` to `to`, and the last one: use(rows, from, to, how many before).
template <typename Use>
inline void over_tiles(const Located& rows, int64_t from, int64_t to, Scratch& scratch, Use&& use) {
  const Stored& s = rows.of;
  const int64_t whole = s.slots / TILE * TILE, end = std::min(to, whole - s.lead);
  if (from < end) use(rows, from, end, 0);
  if (to <= end) return;
  const int64_t start = std::max(from, end), bytes = rows.row_bytes(), width = s.slots - whole;
  scratch.last_codes.resize(bytes * TILE);
  scratch.last_parameters.resize(rows.parameter_rows() * TILE);
  unfold(rows.codes(whole / TILE), bytes, width, scratch.last_codes.data());
  unfold(rows.parameters + rows.parameter_rows() * whole, rows.parameter_rows(), width, scratch.last_parameters.data());
  Stored last = s;
  last.lead = 0;
  use(Located(last, rows, scratch.last_codes.data(), scratch.last_parameters.data()), start - end, to - end, start - from);
}

// scores (queries, to − from) = asked (queries, dim) · rowsᵀ. Up to TILE numbers before and behind the scores are touched.
inline void dot(const Located& rows, int64_t from, int64_t to, int64_t queries, const float* asked, int64_t stride,
                float* scores, int64_t score_stride, Scratch& scratch, Ahead& ahead) {
  const Stored& s = rows.of;
  by_kind(
      rows,
      [&](const auto* plain) {
        in_turns<WIDE ? 9 : 4>(queries, [&](auto several, int64_t q) {
          dot_plain<decltype(several)::value>(plain + from * s.row_stride, s.row_stride, to - from, s.dim, asked + q * stride, stride,
                             scores + q * score_stride, score_stride);
        });
      },
      [&](auto bits) {
        over_tiles(rows, rows.first + from, rows.first + to, scratch,
                   [&](const Located& tiles, int64_t start, int64_t stop, int64_t before) {
                     in_turns<WIDE ? 9 : 4>(queries, [&](auto several, int64_t q) {
                       dot_codes<decltype(several)::value, decltype(bits)::value>(
                           tiles, start, stop, asked + q * stride, stride, scores + q * score_stride + before,
                           score_stride, scratch, ahead);
                     });
                   });
      });
}

// out (queries, dim) += weights (queries, to − from) · rows. Weights are 0 up to TILE numbers before and behind.
inline void mix(const Located& rows, int64_t from, int64_t to, int64_t queries, const float* weights, int64_t weight_stride,
                float* out, int64_t out_stride, Scratch& scratch, Ahead& ahead) {
  const Stored& s = rows.of;
  by_kind(
      rows,
      [&](const auto* plain) {
        in_turns<WIDE ? 9 : 4>(queries, [&](auto several, int64_t q) {
          mix_plain<decltype(several)::value>(plain + from * s.row_stride, s.row_stride, to - from, s.dim, weights + q * weight_stride,
                             weight_stride, out + q * out_stride, out_stride);
        });
      },
      [&](auto bits) {
        over_tiles(rows, rows.first + from, rows.first + to, scratch,
                   [&](const Located& tiles, int64_t start, int64_t stop, int64_t before) {
                     in_turns<most_mixed(decltype(bits)::value)>(queries, [&](auto several, int64_t q) {
                       mix_codes<decltype(several)::value, decltype(bits)::value>(
                           tiles, start, stop, weights + q * weight_stride + before, weight_stride, out + q * out_stride,
                           out_stride, scratch, ahead);
                     });
                   });
      });
}

}  // namespace
