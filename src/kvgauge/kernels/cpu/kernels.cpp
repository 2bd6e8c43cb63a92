// What the library exports. All of it is bound by memory: a decode step multiplies a handful of rows with its cache and with
// its weights, which should be read once; BLAS multiplies few rows at a fraction of that speed.
//
// Compiled by library.py with the options of this machine; called through ctypes, so nothing here knows of torch.

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "counting_softmax.h"
#include "decode_attention.h"
#include "narrow_product.h"
#include "segment_mix.h"

extern "C" {

// Softmax attention of one query per head; see Attention for the shapes. `sizes`: sequences, heads, group, query_dim,
// output_dim, rank_k, rank_v, tokens, block; `strides`: of keys, of values (sequences, heads, dimensions), of the mask's
// and of the counts' sequences; `half`: keys, values and both matrices are bfloat16. 1: a group of this size is not
// compiled.
int kvgauge_attend(const float* query, const void* keys, const void* values, const void* asking, const void* expansion,
                   const uint8_t* mask, const int32_t* counts, float* output, float* lse, float* received,
                   const int64_t* sizes, const int64_t* strides, float scaling, float softcap, const float* sinks,
                   int threads, int half) {
  Attention a;
  a.query = query, a.keys = keys, a.values = values, a.asking = asking, a.expansion = expansion, a.mask = mask;
  a.counts = counts, a.output = output, a.lse = lse, a.received = received;
  a.sequences = sizes[0], a.heads = sizes[1], a.query_dim = sizes[3], a.output_dim = sizes[4];
  a.rank_k = sizes[5], a.rank_v = sizes[6], a.tokens = sizes[7], a.block = sizes[8];
  std::copy(strides, strides + 3, a.key_strides);
  std::copy(strides + 3, strides + 6, a.value_strides);
  a.mask_stride = strides[6], a.counts_stride = strides[7], a.scaling = scaling, a.threads = threads;
  a.softcap = softcap, a.sinks = sinks;
  const int group = static_cast<int>(sizes[2]);
  return half ? attend_group<uint16_t>(a, group) : attend_group<float>(a, group);
}

// out (pairs, count, outs) = rows (pairs, count, in) · matrices (heads, in, outs), pair by pair; `half`: the matrices are
// bfloat16.
void kvgauge_project(const float* rows, const void* matrices, float* out, int64_t pairs, int64_t heads, int64_t count,
                     int64_t in, int64_t outs, int half) {
  const auto run = [&](const auto* all) {
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const auto* matrix = all + pair % heads * in * outs;
      for (int64_t row = pair * count; row < (pair + 1) * count; ++row)
        project<1>(rows + row * in, matrix, out + row * outs, in, outs, 1.f);
    }
  };
  if (half) run(static_cast<const uint16_t*>(matrices));
  else run(static_cast<const float*>(matrices));
}

// out (count, outs) = rows (count, in) · weightᵀ (outs, in), all contiguous; `half`: the weights are bfloat16.
void kvgauge_narrow_product(const float* rows, const void* weight, float* out, int64_t count, int64_t in, int64_t outs,
                            int threads, int half) {
  if (half) narrow_product(rows, static_cast<const uint16_t*>(weight), out, count, in, outs, threads);
  else narrow_product(rows, static_cast<const float*>(weight), out, count, in, outs, threads);
}

// Softmax of (sequences · heads, group · queries, seen) scores in place, and its column sums; see Counting for the shapes.
// `sizes`: sequences, heads, group, queries, seen, and the strides of the bias, the counts and the sums; `half`: scores are
// bfloat16.
void kvgauge_counting_softmax(void* scores, const float* bias, const float* counts, float* sums, const int64_t* sizes,
                              int threads, int half) {
  const auto run = [&](auto* own) {
    counting_softmax<std::remove_pointer_t<decltype(own)>>(
        {own, bias, counts, sums, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7],
         threads});
  };
  if (half) run(static_cast<uint16_t*>(scores));
  else run(static_cast<float*>(scores));
}

// Weighted sums over runs of rows; see Mix for the shapes. `sizes`: sequences, heads, entries, dim, count, and the strides of
// the rows' sequences, heads and entries; `half`: rows and sums are bfloat16.
void kvgauge_segment_mix(const void* rows, const float* weights, const int64_t* segments, const float* cosines,
                         const float* sines, void* out, const int64_t* sizes, int threads, int half) {
  const auto run = [&](auto* own) {
    using T = std::remove_pointer_t<decltype(own)>;
    segment_mix<T>({static_cast<const T*>(rows), weights, segments, cosines, sines, own, sizes[0], sizes[1], sizes[2],
                    sizes[3], sizes[4], {sizes[5], sizes[6], sizes[7]}, threads});
  };
  if (half) run(static_cast<uint16_t*>(out));
  else run(static_cast<float*>(out));
}

}  // extern "C"
