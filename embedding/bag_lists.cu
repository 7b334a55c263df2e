// Keys of bags at their places among features of one key a row: the kernels of bag_lists_cuda.py, references in
// bag_lists.py.
//
// Shapes: T tables, W ranks, G rows of the global batch, B of this rank, L vectors, F places of a row, U features, S places of
// each feature of a rank. Macros: KEY: type of the keys.
#include "dlrm/kernels.cuh"

#define THREADS 256

// spread[u, r, s] = the key of rank r that lies at place s of feature u, or -1.
KERNEL void __launch_bounds__(THREADS) spread_keys(
    const KEY* __restrict__ keys, const int64* __restrict__ offsets, uint32 global_rows,
    const int* __restrict__ first_feature, const int* __restrict__ table, uint32 ranks, uint32 places,
    KEY* __restrict__ spread, int* __restrict__ over) {
  const uint32 chunks = (places + THREADS - 1) / THREADS, part = blockIdx.x / chunks;
  const uint32 s = blockIdx.x % chunks * THREADS + threadIdx.x, u = part / ranks, r = part % ranks;
  if (s >= places) return;
  const int t = table[u];
  const int64* own = offsets + int64(t) * global_rows;
  const int64 at = own[start_of(global_rows, ranks, r)] + int64(u - first_feature[t]) * places + s;
  const int64 end = own[start_of(global_rows, ranks, r + 1)];
  spread[int64(part) * places + s] = at < end ? keys[at] : KEY(-1);
  // The last place has a key behind it; whoever writes writes the same.
  if (s == places - 1 && u + 1 == uint32(first_feature[t + 1]) && at + 1 < end) *over = 1;
}

// begins[t] = this rank's keys of the tables before t; every thread of the block calls it.
DEVICE const int64* begin_tables(unsigned char* memory, const int64* own, uint32 global_rows, uint32 rows, int tables) {
  int64* begins = reinterpret_cast<int64*>(memory);
  for (int t = threadIdx.x; t < tables; t += THREADS) {
    begins[t] = own[int64(t) * global_rows + rows] - own[int64(t) * global_rows];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int64 sum = 0;
    for (int t = 0; t < tables; ++t) {
      const int64 count = begins[t];
      begins[t] = sum;
      sum += count;
    }
  }
  __syncthreads();
  return begins;
}

// The last of n ascending numbers that is not above x; the first one is not.
DEVICE uint32 last_up_to(const int64* numbers, uint32 n, int64 x) {
  uint32 low = 0, high = n - 1;
  while (low < high) {
    const uint32 middle = (low + high + 1) / 2;
    if (numbers[middle] <= x) low = middle;
    else high = middle - 1;
  }
  return low;
}

DEVICE int table_of(const int* vector, int tables, uint32 v) {
  int low = 0, high = tables - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (uint32(vector[middle]) <= v) low = middle;
    else high = middle - 1;
  }
  return low;
}

// ends[v * B + b] = where the keys of row b's vector v begin among this rank's, of which `room` are kept.
KERNEL void __launch_bounds__(THREADS) end_bags(
    const int64* __restrict__ offsets, uint32 global_rows, uint32 start, uint32 rows, int tables,
    const int* __restrict__ vector, int64 room, int64* __restrict__ ends) {
  DYNAMIC_SHARED(memory);
  const int64* own = offsets + start;
  const int64* begins = begin_tables(memory, own, global_rows, rows, tables);
  const uint32 i = blockIdx.x * THREADS + threadIdx.x, bags = vector[tables] * rows;
  if (i > bags) return;
  const uint32 v = i < bags ? i / rows : 0, b = i < bags ? i % rows : 0;
  const int t = i < bags ? table_of(vector, tables, v) : tables - 1;
  const int64* of_table = own + int64(t) * global_rows;
  int64 end = begins[t] + of_table[i < bags ? b : rows] - of_table[0];
  if (i < bags && vector[t + 1] - vector[t] > 1) end = begins[t] + int64(v - vector[t]) * rows + b;
  ends[i] = end < room ? end : room;
}

// For the key at place s of feature u, if there is one: the row that the exchange brings it to among the rows of this
// rank's bags, and for that row the vector that its gradient comes from, and what part of it.
KERNEL void __launch_bounds__(THREADS) list_bags(
    const int64* __restrict__ offsets, uint32 global_rows, uint32 start, uint32 rows, int tables,
    const int* __restrict__ vector, const int* __restrict__ first_feature, const int* __restrict__ table,
    const int* __restrict__ mean, uint32 features, uint32 places, uint32 first, uint32 num_places,
    const float* __restrict__ weights, int weighted, int* __restrict__ keys, float* __restrict__ key_weights,
    int* __restrict__ sources, float* __restrict__ factors, int trains) {
  DYNAMIC_SHARED(memory);
  const int64* own = offsets + start;
  const int64* begins = begin_tables(memory, own, global_rows, rows, tables);
  const uint32 chunks = (places + THREADS - 1) / THREADS, u = blockIdx.x / chunks;
  const uint32 s = blockIdx.x % chunks * THREADS + threadIdx.x;
  if (s >= places) return;
  const int t = table[u];
  const int64* of_table = own + int64(t) * global_rows;
  const int64 n = int64(u - first_feature[t]) * places + s, begin = of_table[0], count = of_table[rows] - begin;
  const uint32 row = s * features + u;
  if (n >= count) {
    if (trains) {
      sources[row] = 0;
      factors[row] = 0.0f;
    }
    return;
  }
  const uint32 each = vector[t + 1] - vector[t];
  const int64 at = begins[t] + (each > 1 ? n % each * rows + n / each : n);
  const float weight = weighted ? weights[begin + n] : 1.0f;
  if (at < int64(features) * places) {
    keys[at] = int(row);
    if (weighted) key_weights[at] = weight;
  }
  if (!trains) return;
  // Where bags hold as many keys each, the guess holds.
  uint32 b = uint32(n * rows / count);
  if (of_table[b] - begin > n || of_table[b + 1] - begin <= n) b = last_up_to(of_table, rows, begin + n);
  const int64 length = of_table[b + 1] - of_table[b];
  sources[row] = int(b * num_places + first + vector[t] + (each > 1 ? uint32(n % each) : 0));
  factors[row] = mean[t] ? weight / float(length) : weight;
}
