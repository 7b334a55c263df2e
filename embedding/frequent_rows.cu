// Places of keys where frequent rows are listed: the kernel of frequent_rows_cuda.py, reference in frequent_rows.py.
//
// Shapes: T tables, B rows. Macros: KEY: type of the keys; PLACE: of the places.
#include "dlrm/kernels.cuh"

#define THREADS 256

// One block for each table and THREADS of its keys.
KERNEL void __launch_bounds__(THREADS) place_features(
    const KEY* __restrict__ keys, uint32 rows, uint32 chunks, const int64* __restrict__ word_start,
    const uint64* __restrict__ words, const int64* __restrict__ before, const int64* __restrict__ threshold,
    PLACE* __restrict__ places) {
  const uint32 table = blockIdx.x / chunks, row = blockIdx.x % chunks * THREADS + threadIdx.x;
  if (row >= rows) return;
  const int64 item = int64(table) * rows + row, key = int64(keys[item]), start = word_start[table];
  int64 place = key;
  if (start >= 0 && key >= 0) {
    const uint64 word = words[start + key / 64], lower = word & ((uint64(1) << key % 64) - 1);
    const bool frequent = word >> key % 64 & 1;
    place = frequent ? before[start + key / 64] + __popc(uint32(lower)) + __popc(uint32(lower >> 32))
                     : key + threshold[table];
  }
  places[item] = PLACE(place);
}
