// Records of Raw rows taken apart into labels, dense columns and keys: the kernel of split_records_cuda.py, reference in
// split_records.py.
//
// Shapes: G records that are read, of V 32-bit words; B of them are this rank's; N dense columns, C with the padding;
// T tables. Macros: NUMBER: element type of dense; INDEXED: records are picked by number; WIDE: keys have two words; LOG: dense
// columns are int32, log(1 + x); LABEL_ONE: word of a label of 1; ROWS: records of a block.
#include "dlrm/kernels.cuh"

#define THREADS 256

KERNEL void __launch_bounds__(THREADS) split_records(
    const uint32* __restrict__ records, const int64* __restrict__ index, int64 num_rows, int64 first, int64 own,
    int row_words, int num_dense, int dense_columns, int num_tables, const int* __restrict__ table_rows,
    float* __restrict__ labels, NUMBER* __restrict__ dense, int* __restrict__ keys, int* __restrict__ fault) {
  DYNAMIC_SHARED(memory);
  uint32* tile = reinterpret_cast<uint32*>(memory);
  const int pitch = row_words | 1;  // odd, so that the words of a column lie in different banks
  const int64 begin = int64(blockIdx.x) * ROWS;
  const int rows = num_rows - begin < ROWS ? int(num_rows - begin) : ROWS;
  for (int i = threadIdx.x; i < rows * row_words; i += THREADS) {
    const int row = i / row_words, column = i - row * row_words;
#if INDEXED
    const int64 source = index[begin + row];
#else
    const int64 source = begin + row;
#endif
    tile[row * pitch + column] = records[source * row_words + column];
  }
  __syncthreads();
  for (int row = threadIdx.x; row < rows; row += THREADS) {
    const int64 b = begin + row - first;
    const uint32 label = tile[row * pitch];
    if (label != 0 && label != LABEL_ONE) *fault = int(begin + row) + 1;
    if (b >= 0 && b < own) labels[b] = label == LABEL_ONE ? 1.0f : 0.0f;
  }
  for (int i = threadIdx.x; i < rows * dense_columns; i += THREADS) {
    const int row = i / dense_columns, column = i - row * dense_columns;
    const int64 b = begin + row - first;
    if (b < 0 || b >= own) continue;
    float value = 0;
    if (column < num_dense) {
      const uint32 read = tile[row * pitch + 1 + column];
#if LOG
      const int count = int(read);
      value = log1pf(count > 0 ? float(count) : 0.0f);
#else
      value = bits_to_float(read);
#endif
    }
    store(dense + b * dense_columns + column, value);
  }
  const int words = WIDE ? 2 : 1;
  for (int i = threadIdx.x; i < ROWS * num_tables; i += THREADS) {
    const int table = i / ROWS, row = i - table * ROWS;
    if (row >= rows) continue;
    const uint32* stored = tile + row * pitch + 1 + num_dense + table * words;
    uint32 key = stored[0];
    const bool high = WIDE && stored[words - 1] != 0;
    // As an unsigned number a negative key is out of range too.
    if (high || key >= uint32(table_rows[table])) {
      *fault = int(begin + row) + 1;
      key = 0;
    }
    keys[int64(table) * num_rows + begin + row] = int(key);
  }
}
