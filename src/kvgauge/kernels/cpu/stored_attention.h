// Softmax attention of one query per head to runs of tokens in the forms in which they are stored: one pass over them.

#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "decode_attention.h"
#include "stored_rows.h"

namespace {

// One run of tokens. Its keys may stand in several pieces, one after another or beside one another, and so may its values.
// Codes come first; slots behind their last token hold nothing, or zeros.
struct Run {
  bool shared;              // all heads of the model ask the same rows
  int64_t key_pieces, value_pieces;
  const Stored *keys, *values;
  const Stored *asking;     // (heads, query_dim) rows of rank_k numbers: keys are asked with query · rows; null: as they are
  const Stored *expansion;  // (heads, output_dim) rows of rank_v numbers: sums become sum · rowsᵀ; null: they stay
  int64_t tokens, first;    // of the run, and in front of it
  int64_t rank_k, rank_v;   // channels of all pieces that stand beside one another
  int64_t block, blocks, pairs, queries;  // tokens of a block; blocks of a pair; pairs with rows; their queries
  int64_t asked, parts, part;  // where its asked queries and its blocks' results begin, numbers of a result
};

struct StoredAttention {
  const float* query;      // (sequences · heads, group, query_dim)
  float *output, *lse;     // (sequences · heads, group, output_dim) and (sequences · heads, group)
  const uint8_t* mask;     // (sequences, tokens) as in Attention
  const int32_t* counts;   // as in Attention
  int64_t sequences, heads, group, query_dim, output_dim, mask_stride;
  float scaling, softcap;
  int threads;
};

// Tokens of a task: as many as leave the weights of its queries in a core's first cache, fewer where tasks are few.
constexpr int64_t LONG_BLOCK = 1024, MIDDLE_BLOCK = 512, BRIEF_BLOCK = 256;
constexpr int64_t TASKS_ENOUGH = 16;

inline int64_t block_of(int64_t queries) { return queries <= 4 ? LONG_BLOCK : MIDDLE_BLOCK; }

inline int64_t padded_row(int64_t count) { return (count + TILE - 1) / TILE * TILE + 2 * TILE; }

// Room for rows of so many numbers each, with a tile of slack on both sides.
struct Slack {
  Scratch numbers;
  int64_t stride = 0;
  float* rows(int64_t count, int64_t width) {
    stride = padded_row(width);
    float* all = numbers.of(count * stride);
    std::fill(all, all + count * stride, 0.f);
    return all + TILE;
  }
};

// A rotation as rows of its channels, one for every number that it turns.
inline Stored rows_of_rotation(const Stored& rows, int64_t channels) {
  Stored turning{};
  turning.kind = FLOAT, turning.numbers = rows.rotation, turning.tokens = rows.rotated, turning.dim = channels;
  turning.row_stride = channels;
  return turning;
}

// The queries of one head of the model, scaled, as the rows of a run are asked.
inline void ask(const StoredAttention& a, const Run& run, int64_t pair, float* asked, Scratch& scratch, Slack& slack,
                std::vector<float>& between) {
  const float* query = a.query + pair * a.group * a.query_dim;
  const int64_t turned = run.keys->rotation ? run.keys->rotated : run.rank_k;
  Ahead ahead;
  between.assign(a.group * turned, 0.f);
  if (!run.asking) {
    for (int64_t i = 0; i < a.group * a.query_dim; ++i) between[i] = query[i] * a.scaling;
  } else {
    float* weights = slack.rows(a.group, a.query_dim);
    for (int64_t g = 0; g < a.group; ++g)
      for (int64_t i = 0; i < a.query_dim; ++i) weights[g * slack.stride + i] = query[g * a.query_dim + i] * a.scaling;
    mix(Located(*run.asking, pair / a.heads, pair % a.heads), 0, a.query_dim, a.group, weights, slack.stride,
        between.data(), turned, scratch, ahead);
  }
  if (!run.keys->rotation) {
    std::copy(between.begin(), between.end(), asked);
    return;
  }
  std::fill(asked, asked + a.group * run.rank_k, 0.f);
  const Stored turning = rows_of_rotation(*run.keys, run.rank_k);
  mix(Located(turning, 0, 0), 0, turned, a.group, between.data(), turned, asked, run.rank_k, scratch, ahead);
}

// Over the pieces that hold rows from `start` to `stop`: use(piece, from, to, where they begin among the rows).
template <typename Use>
inline void over_pieces(const Stored* pieces, int64_t count, int64_t start, int64_t stop, Use&& use) {
  for (int64_t i = 0, before = 0; i < count; ++i) {
    const int64_t from = std::max(start, before), to = std::min(stop, before + pieces[i].tokens);
    if (from < to) use(pieces[i], from - before, to - before, from - start);
    if (i + 1 < count && !pieces[i + 1].beside) before += pieces[i].tokens;
  }
}

// One block of tokens of one pair: unnormalised sums, their largest scores and the sums of their weights.
inline void attend_rows(const StoredAttention& a, const Run& run, int64_t pair, int64_t start, int64_t stop,
                        Ahead next_keys, const float* asked, float* scores, int64_t stride, float* part, Scratch& scratch) {
  const int64_t sequence = run.shared ? pair : pair / a.heads, head = run.shared ? 0 : pair % a.heads;
  const int64_t count = stop - start, queries = run.queries;
  float *largest = part + queries * run.rank_v, *total = largest + queries;
  Ahead values = ahead_of(run.values[0], sequence, head, start, std::min(stop, run.values[0].tokens));
  over_pieces(run.keys, run.key_pieces, start, stop, [&](const Stored& rows, int64_t from, int64_t to, int64_t at) {
    dot(Located(rows, sequence, head), from, to, queries, asked + rows.beside, run.rank_k, scores + at, stride, scratch,
        values);
  });
  while (values.at < values.end) values.step();
  const int64_t place = run.first + start;
  const uint8_t* seen = a.mask ? a.mask + sequence * a.mask_stride + place : nullptr;
  const int32_t* counts = a.counts ? a.counts + sequence * a.mask_stride + place : nullptr;
  for (int64_t q = 0; q < queries; ++q) {
    float* own = scores + q * stride;
    if (a.softcap > 0.f) cap(own, count, a.softcap);
    if (seen) hide(own, seen, count);
    if (counts) hide(own, counts, count);
    hide_rest(own, count);
    largest[q] = largest_of(own, count);
    total[q] = exponentials(own, count, largest[q]);
    if (counts) total[q] = multiply(own, counts, count);
    std::fill(own - TILE, own, 0.f);
    std::fill(own + count, own + padded_row(count) - TILE, 0.f);
  }
  std::fill(part, part + queries * run.rank_v, 0.f);
  over_pieces(run.values, run.value_pieces, start, stop, [&](const Stored& rows, int64_t from, int64_t to, int64_t at) {
    mix(Located(rows, sequence, head), from, to, queries, scores + at, stride, part + rows.beside, run.rank_v, scratch,
        next_keys);
  });
}

// The blocks of all runs for one head of the model: joined by their largest scores, expanded and normalised.
inline void join_runs(const StoredAttention& a, const std::vector<Run>& runs, int64_t pair, const float* parts,
                      Scratch& scratch, Slack& slack, std::vector<float>& mixed, std::vector<float>& turned) {
  float *output = a.output + pair * a.group * a.output_dim, *lse = a.lse + pair * a.group;
  std::fill(lse, lse + a.group, LOWEST);
  std::fill(output, output + a.group * a.output_dim, 0.f);
  for (const Run& run : runs) {
    const int64_t own_pair = run.shared ? pair / a.heads : pair, offset = run.shared ? pair % a.heads * a.group : 0;
    const float* first = parts + run.parts + own_pair * run.blocks * run.part;
    mixed.assign(a.group * run.rank_v, 0.f);
    std::vector<float> normaliser(a.group);
    for (int64_t g = 0; g < a.group; ++g) {
      const int64_t q = offset + g, tops = run.queries * run.rank_v + q;
      float top = LOWEST, sum = 0.f;
      for (int64_t b = 0; b < run.blocks; ++b) top = std::max(top, first[b * run.part + tops]);
      for (int64_t b = 0; b < run.blocks; ++b) {
        const float* own = first + b * run.part;
        const float share = expf(own[tops] - top);
        sum += share * own[tops + run.queries];
        for (int64_t i = 0; i < run.rank_v; ++i) mixed[g * run.rank_v + i] += share * own[q * run.rank_v + i];
      }
      for (int64_t i = 0; i < run.rank_v; ++i) mixed[g * run.rank_v + i] /= sum;
      normaliser[g] = top + logf(sum);
    }
    const float* values = mixed.data();
    int64_t stride = run.rank_v;
    Ahead ahead;
    if (run.values->rotation) {
      const Stored turning = rows_of_rotation(*run.values, run.rank_v);
      turned.resize(a.group * turning.tokens);
      dot(Located(turning, 0, 0), 0, turning.tokens, a.group, values, stride, turned.data(), turning.tokens, scratch, ahead);
      values = turned.data(), stride = turning.tokens;
    }
    if (run.expansion) {
      float* expanded = slack.rows(a.group, a.output_dim);
      dot(Located(*run.expansion, pair / a.heads, pair % a.heads), 0, a.output_dim, a.group, values, stride, expanded,
          slack.stride, scratch, ahead);
      values = expanded, stride = slack.stride;
    }
    for (int64_t g = 0; g < a.group; ++g) {
      const float top = std::max(lse[g], normaliser[g]);
      const float before = expf(lse[g] - top), now = expf(normaliser[g] - top), sum = before + now;
      for (int64_t i = 0; i < a.output_dim; ++i) {
        float& x = output[g * a.output_dim + i];
        x = (x * before + values[g * stride + i] * now) / sum;
      }
      lse[g] = top + logf(sum);
    }
  }
}

struct Task {
  int64_t run, pair, block;
};

inline void attend_stored(const StoredAttention& a, std::vector<Run>& runs) {
  const int64_t pairs = a.sequences * a.heads;
  int64_t most_tasks = 0, asked = 0, parts = 0, bytes = 0, room = 0;
  for (Run& run : runs) {
    run.pairs = run.shared ? a.sequences : pairs, run.queries = run.shared ? a.heads * a.group : a.group;
    run.block = block_of(run.queries);
    most_tasks += run.pairs * ((run.tokens + run.block - 1) / run.block);
  }
  std::vector<Task> tasks;
  for (size_t i = 0; i < runs.size(); ++i) {
    Run& run = runs[i];
    if (most_tasks < TASKS_ENOUGH) run.block = BRIEF_BLOCK;
    run.blocks = (run.tokens + run.block - 1) / run.block, run.part = run.queries * (run.rank_v + 2);
    run.asked = asked, run.parts = parts;
    asked += pairs * a.group * run.rank_k, parts += run.pairs * run.blocks * run.part;
    bytes += run.pairs * run.tokens * (run.rank_k + run.rank_v);
    room = std::max(room, run.queries * padded_row(run.block));
    for (int64_t pair = 0; pair < run.pairs; ++pair)
      for (int64_t b = 0; b < run.blocks; ++b) tasks.push_back({int64_t(i), pair, b});
  }
  std::vector<float> queries(asked), results(parts);
  const auto next_keys = [&](const Task& task) {
    const Run& run = runs[task.run];
    const int64_t sequence = run.shared ? task.pair : task.pair / a.heads, head = run.shared ? 0 : task.pair % a.heads;
    return ahead_of(run.keys[0], sequence, head, task.block * run.block,
                    std::min((task.block + 1) * run.block, run.keys[0].tokens));
  };
#pragma omp parallel num_threads(a.threads) if (bytes > ALONE_BYTES)
  {
    Scratch scratch, score_room;
    Slack slack;
    std::vector<float> mixed, turned;
    float* scores = score_room.of(room);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < int64_t(runs.size()) * pairs; ++i) {
      const Run& run = runs[i / pairs];
      ask(a, run, i % pairs, queries.data() + run.asked + i % pairs * a.group * run.rank_k, scratch, slack, turned);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < int64_t(tasks.size()); ++i) {
      const Task& task = tasks[i];
      const Run& run = runs[task.run];
      const int64_t start = task.block * run.block, stop = std::min(start + run.block, run.tokens);
      attend_rows(a, run, task.pair, start, stop, i + 1 < int64_t(tasks.size()) ? next_keys(tasks[i + 1]) : Ahead{},
                  queries.data() + run.asked + task.pair * run.queries * run.rank_k, scores + TILE,
                  padded_row(run.block), results.data() + run.parts + (task.pair * run.blocks + task.block) * run.part, scratch);
    }
#pragma omp for schedule(static)
    for (int64_t pair = 0; pair < pairs; ++pair)
      join_runs(a, runs, pair, results.data(), scratch, slack, mixed, turned);
  }
}

// The runs that Python hands over: shared, pieces of the keys, of the values, asking and expansion or not, then all pieces.
inline std::vector<Run> runs_of(const int64_t* words, int64_t count) {
  std::vector<Run> runs(count);
  int64_t first = 0;
  for (Run& run : runs) {
    const auto pieces = [&](int64_t number) {
      const Stored* found = reinterpret_cast<const Stored*>(words);
      words += number * int64_t(sizeof(Stored) / sizeof(int64_t));
      return number ? found : nullptr;
    };
    run.shared = words[0], run.key_pieces = words[1], run.value_pieces = words[2];
    const int64_t asks = words[3], expands = words[4];
    words += 5;
    run.keys = pieces(run.key_pieces), run.values = pieces(run.value_pieces);
    run.asking = pieces(asks), run.expansion = pieces(expands);
    run.tokens = 0, run.first = first;
    for (int64_t i = 0; i < run.key_pieces; ++i)
      if (!run.keys[i].beside) run.tokens += run.keys[i].tokens;
    const auto channels = [](const Stored* rows, int64_t number) {
      int64_t all = 0;
      for (int64_t i = 0; i < number; ++i) all = std::max(all, rows[i].beside + rows[i].dim);
      return all;
    };
    run.rank_k = channels(run.keys, run.key_pieces), run.rank_v = channels(run.values, run.value_pieces);
    first += run.tokens;
  }
  return runs;
}

}  // namespace
