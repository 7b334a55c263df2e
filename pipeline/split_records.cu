// Records of Raw rows taken apart into labels, dense columns and keys: the kernels of split_records_cuda.py, reference in
// split_records.py.
//
// Shapes: G records that are read, of V 32-bit words; B of them are this rank's; N dense columns, C with the padding;
// T tables with H key columns, L vectors of a row. Macros: NUMBER: element type of dense; INDEXED: records are picked by
// number; WIDE: keys have two words; LOG: dense columns are int32, log(1 + x); LABEL_ONE: word of a label of 1; ROWS:
// records of a block; BAGS: 0: a table has one key, 1: as many as columns, 2: some of them may be missing; WEIGHTED: 1 if
// the weights of all key columns follow these.
#include "dlrm/kernels.cuh"

#define THREADS 256

// This block's records: ROWS or fewer, a pitch of words apart.
struct Tile {
  uint32* words;
  int pitch, rows;
  int64 begin;  // the first one's number

  DEVICE Tile(unsigned char* memory, int row_words, int64 num_rows) {
    words = reinterpret_cast<uint32*>(memory);
    pitch = row_words | 1;  // odd, so that the words of a column lie in different banks
    begin = int64(blockIdx.x) * ROWS;
    rows = num_rows - begin < ROWS ? int(num_rows - begin) : ROWS;
  }

  DEVICE void load(const uint32* records, const int64* index, int row_words) {
    for (int i = threadIdx.x; i < rows * row_words; i += THREADS) {
      const int row = i / row_words, column = i - row * row_words;
#if INDEXED
      const int64 source = index[begin + row];
#else
      const int64 source = begin + row;
#endif
      words[row * pitch + column] = records[source * row_words + column];
    }
    __syncthreads();
  }

  DEVICE const uint32* key(int row, int first_key, int column) const {
    return words + row * pitch + first_key + column * (WIDE ? 2 : 1);
  }
};

// Whether a key stands there; where bags have to be full, always.
DEVICE bool is_there(const uint32* stored, bool full) {
  return BAGS < 2 || full || stored[0] != 0xFFFFFFFFu || (WIDE && stored[WIDE] != 0xFFFFFFFFu);
}

// The number of a key; one outside its table is 0 and a fault. As an unsigned number a negative key is out of range too.
DEVICE int checked(const uint32* stored, int limit, int64 record, int* fault) {
  if ((WIDE && stored[WIDE] != 0) || stored[0] >= uint32(limit)) {
    *fault = int(record) + 1;
    return 0;
  }
  return int(stored[0]);
}

// lengths[t, row] = keys of the tile's bags, behind its records.
DEVICE int* count_tile(const Tile& tile, int first_key, int num_tables, const int* column, const int* full) {
  int* lengths = reinterpret_cast<int*>(tile.words + ROWS * tile.pitch);
  for (int i = threadIdx.x; i < tile.rows * num_tables; i += THREADS) {
    const int table = i / tile.rows, row = i - table * tile.rows;
    int length = 0;
    for (int c = column[table]; c < column[table + 1]; ++c) length += is_there(tile.key(row, first_key, c), full[table]);
    lengths[table * ROWS + row] = length;
  }
  __syncthreads();
  return lengths;
}

// counts[t, block] = keys of table t in the block's records.
KERNEL void __launch_bounds__(THREADS) count_keys(
    const uint32* __restrict__ records, const int64* __restrict__ index, int64 num_rows, int row_words, int first_key,
    int num_tables, const int* __restrict__ column, const int* __restrict__ full, uint32* __restrict__ counts) {
  DYNAMIC_SHARED(memory);
  Tile tile(memory, row_words, num_rows);
  tile.load(records, index, row_words);
  const int* lengths = count_tile(tile, first_key, num_tables, column, full);
  for (int table = threadIdx.x; table < num_tables; table += THREADS) {
    uint32 count = 0;
    for (int row = 0; row < tile.rows; ++row) count += lengths[table * ROWS + row];
    counts[int64(table) * gridDim.x + blockIdx.x] = count;
  }
}

// Where keys go, each with its weight.
struct Keys {
  int* keys;
  float* weights;
  const uint32* weight_words;  // of the tile's first record
  int* fault;

  DEVICE void put(const Tile& tile, int row, const uint32* stored, int column, int limit, int64 at) const {
    keys[at] = checked(stored, limit, tile.begin + row, fault);
    if (!WEIGHTED) return;
    const uint32 word = weight_words[row * tile.pitch + column];
    if ((word & 0x7F800000u) == 0x7F800000u) *fault = int(tile.begin + row) + 1;
    weights[at] = bits_to_float(word);
  }
};

KERNEL void __launch_bounds__(THREADS) split_records(
    const uint32* __restrict__ records, const int64* __restrict__ index, int64 num_rows, int row_words, int first_key,
    int num_tables, const int* __restrict__ column, const int* __restrict__ full, int64 first, int64 own, int num_dense,
    int dense_columns, const int* __restrict__ vector, const int* __restrict__ table_rows, const uint32* __restrict__ counts,
    const uint32* __restrict__ totals, float* __restrict__ labels, NUMBER* __restrict__ dense, int* __restrict__ keys,
    int64* __restrict__ offsets, int with_offsets, float* __restrict__ weights, int* __restrict__ fault) {
  DYNAMIC_SHARED(memory);
  Tile tile(memory, row_words, num_rows);
  tile.load(records, index, row_words);
  const int64 begin = tile.begin;
  const int rows = tile.rows;
  for (int row = threadIdx.x; row < rows; row += THREADS) {
    const int64 b = begin + row - first;
    const uint32 label = tile.words[row * tile.pitch];
    if (label != 0 && label != LABEL_ONE) *fault = int(begin + row) + 1;
    if (b >= 0 && b < own) labels[b] = label == LABEL_ONE ? 1.0f : 0.0f;
  }
  for (int i = threadIdx.x; i < rows * dense_columns; i += THREADS) {
    const int row = i / dense_columns, at = i - row * dense_columns;
    const int64 b = begin + row - first;
    if (b < 0 || b >= own) continue;
    float value = 0;
    if (at < num_dense) {
      const uint32 read = tile.words[row * tile.pitch + 1 + at];
#if LOG
      const int count = int(read);
      value = log1pf(count > 0 ? float(count) : 0.0f);
#else
      value = bits_to_float(read);
#endif
    }
    store(dense + b * dense_columns + at, value);
  }
#if BAGS == 0
  for (int i = threadIdx.x; i < ROWS * num_tables; i += THREADS) {
    const int table = i / ROWS, row = i - table * ROWS;
    if (row >= rows) continue;
    const int key = checked(tile.key(row, first_key, table), table_rows[table], begin + row, fault);
    keys[int64(table) * num_rows + begin + row] = key;
  }
#else
  const int key_columns = column[num_tables];
  const Keys out = {keys, weights, tile.words + first_key + key_columns * (WIDE ? 2 : 1), fault};
#if BAGS == 2
  int* lengths = count_tile(tile, first_key, num_tables, column, full);
  for (int table = threadIdx.x; table < num_tables; table += THREADS) {
    int sum = 0;  // lengths become where the bags begin
    for (int row = 0; row < rows; ++row) {
      const int length = lengths[table * ROWS + row];
      lengths[table * ROWS + row] = sum;
      sum += length;
    }
  }
  __syncthreads();
#endif
  int64 table_begin = 0;
#pragma unroll 1
  for (int table = 0; table < num_tables; ++table) {
    const int first_column = column[table], width = column[table + 1] - first_column, limit = table_rows[table];
    const bool turned = vector[table + 1] - vector[table] > 1;
    int64* own_offsets = offsets + int64(vector[table]) * num_rows;
#if BAGS == 2
    const int64 next = table_begin + totals[table];
    if (!turned) {
      const int64 block_begin = table_begin + counts[int64(table) * gridDim.x + blockIdx.x];
      for (int row = threadIdx.x; row < rows; row += THREADS) {
        int64 at = block_begin + lengths[table * ROWS + row];
        own_offsets[begin + row] = at;
        for (int c = first_column; c < first_column + width; ++c) {
          const uint32* stored = tile.key(row, first_key, c);
          if (is_there(stored, full[table])) out.put(tile, row, stored, c, limit, at++);
        }
      }
      table_begin = next;
      continue;
    }
#else
    const int64 next = table_begin + width * num_rows;
#endif
    for (int i = threadIdx.x; i < rows * width; i += THREADS) {
      const int row = turned ? i % rows : i / width, k = turned ? i / rows : i % width;
      const int64 at = table_begin + (turned ? k * num_rows + begin + row : (begin + row) * width + k);
      out.put(tile, row, tile.key(row, first_key, first_column + k), first_column + k, limit, at);
      if (with_offsets && (turned || k == 0)) own_offsets[turned * k * num_rows + begin + row] = at;
    }
    table_begin = next;
  }
  if (with_offsets && blockIdx.x == 0 && threadIdx.x == 0) offsets[vector[num_tables] * num_rows] = table_begin;
#endif
}
