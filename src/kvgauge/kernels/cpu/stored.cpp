// What the library exports of rows in the forms in which they are stored; see kernels.cpp.
//
// A file of its own: the same loops are compiled for every number of bits and of queries, with fewer of the compiler's
// passes, which find nothing more in them.

#include <cstdint>

#include "gather_rows.h"
#include "stored_attention.h"

extern "C" {

// Softmax attention of one query per head; see StoredAttention and Run for the shapes. `sizes`: sequences, heads,
// group, query_dim, output_dim, runs, and the stride of the sequences of the mask or the counts; `words`: the runs.
void kvgauge_attend_stored(const float* query, const uint8_t* mask, const int32_t* counts, float* output, float* lse,
                           const int64_t* sizes, const int64_t* words, float scaling, float softcap, int threads) {
  const StoredAttention a = {query,    output,   lse,      mask,     counts,  sizes[0], sizes[1],
                             sizes[2], sizes[3], sizes[4], sizes[6], scaling, softcap,  threads};
  std::vector<Run> runs = runs_of(words, sizes[5]);
  attend_stored(a, runs);
}

// Chosen rows, turned on their side; see Gather for the shapes. `words`: the rows.
void kvgauge_gather(const int64_t* words, const int64_t* starts, float* out, int64_t sequences, int64_t heads,
                    int64_t chunks, int64_t chunk, int threads) {
  gather({reinterpret_cast<const Stored*>(words), starts, out, sequences, heads, chunks, chunk, threads});
}

}  // extern "C"
