// Chosen rows out of stored ones, turned on their side: what is rebuilt of them is a product of matrices.

#pragma once

#include <algorithm>

#include "stored_rows.h"

namespace {

struct Gather {
  const Stored* rows;      // codes of tokens, or plain
  const int64_t* starts;   // (sequences, heads, chunks), the first row of each chunk; rows below 0 are taken as row 0
  float* out;              // (sequences, heads, dim, chunks · chunk)
  int64_t sequences, heads, chunks, chunk;
  int threads;
};

// Lanes from `first` on, `count` of them, to `to`, which stands for lane 0.
inline void store_lanes(float* to, Vector all, int first, int count) {
#if defined(__AVX512F__)
  _mm512_mask_storeu_ps(to, static_cast<__mmask16>(((1u << count) - 1) << first), (__m512)all);
#else
  for (int lane = first; lane < first + count; ++lane) to[lane] = all[lane];
#endif
}

// The rows from `from` to `to` of codes of tokens; out[c · stride] is where the first of them goes.
template <int BITS>
void gather_codes(const Located& rows, int64_t from, int64_t to, float* out, int64_t stride) {
  using P = Packing<BITS>;
  const Stored& s = rows.of;
  const int64_t groups = s.group, dim = s.dim;
  for (int64_t tile = (s.lead + from) / TILE; tile * TILE < s.lead + to; ++tile) {
    const uint8_t* codes = rows.codes(tile);
    for (int piece = 0; piece < PIECES; ++piece) {
      const int64_t slot = tile * TILE + piece * LANES;  // of the first lane
      const int64_t low = std::max(s.lead + from, slot), high = std::min(s.lead + to, slot + LANES);
      if (low >= high) continue;
      int64_t k = -1, end = 0;
      Vector scale{}, minimum{};
      for (int64_t run = 0; run * P::CHANNELS < dim; ++run) {
        const Words words = word<BITS>(codes + run * P::BYTES * TILE + piece * LANES, TILE);
        for (int i = 0; i < P::CHANNELS && run * P::CHANNELS + i < dim; ++i) {
          const int64_t c = run * P::CHANNELS + i;
          while (c >= end) {
            ++k, end = dim * (k + 1) / groups;
            const Half* parameters = rows.parameters + (tile * rows.parameter_rows() + k) * TILE + piece * LANES;
            scale = numbers(parameters);
            minimum = s.minima ? numbers(parameters + groups * TILE) : Vector{};
          }
          Vector read = level<BITS>(words, i, rows.table) * scale + minimum;
          if (rows.balance) read *= number(rows.balance[c]);
          store_lanes(out + c * stride + slot - s.lead - from, read, static_cast<int>(low - slot),
                      static_cast<int>(high - low));
        }
      }
    }
  }
}

template <typename T>
void gather_plain(const T* rows, int64_t row_stride, int64_t dim, int64_t count, float* out, int64_t stride) {
  for (int64_t t = 0; t < count; ++t)
    for (int64_t c = 0; c < dim; ++c) out[c * stride + t] = number(rows[t * row_stride + c]);
}

inline void gather(const Gather& g) {
  const int64_t pairs = g.sequences * g.heads, width = g.chunks * g.chunk, dim = g.rows->dim;
#pragma omp parallel num_threads(g.threads) if (pairs * width * dim > ALONE_BYTES)
  {
    Scratch scratch;
#pragma omp for schedule(static)
    for (int64_t task = 0; task < pairs * g.chunks; ++task) {
      const int64_t pair = task / g.chunks, start = g.starts[task], skipped = std::min(g.chunk, std::max<int64_t>(0, -start));
      const Located rows(*g.rows, pair / g.heads, pair % g.heads);
      float* out = g.out + pair * dim * width + task % g.chunks * g.chunk;
      const auto take = [&](int64_t from, int64_t to, float* at) {
        by_kind(
            rows,
            [&](const auto* plain) {
              gather_plain(plain + from * g.rows->row_stride, g.rows->row_stride, dim, to - from, at, width);
            },
            [&](auto bits) {
              over_tiles(rows, rows.first + from, rows.first + to, scratch,
                         [&](const Located& tiles, int64_t first, int64_t last, int64_t before) {
                           gather_codes<decltype(bits)::value>(tiles, first, last, at + before, width);
                         });
            });
      };
      for (int64_t i = 0; i < skipped; ++i) take(0, 1, out + i);
      if (skipped < g.chunk) take(start + skipped, start + g.chunk, out + skipped);
    }
  }
}

}  // namespace
