// Sort the rows that a batch names, each with where it was named: the kernels of row_sort_cuda.py, reference in
// row_sort.py.
//
// Shapes: T tables, B bags a table, K keys. Macros: KEY: type of the keys; BAGS: 1 if there are offsets; WEIGHTED: 1 if
// keys have weights; BITS: of a digit, at most 9.
//
// A stable radix sort, lowest digit first, in three launches a digit: count the digits of every tile, add the counts up
// over the tiles, move. For the first digit the rows are made of the keys as these are read, so that the batch is never
// written in its own order. Nothing waits for another block, and how many keys there are is read on the device.
#include "dlrm/kernels.cuh"

#define THREADS 256
#define LANES 32
#define WARPS (THREADS / LANES)
#define ROUNDS 16
#define TILE (THREADS * ROUNDS)
#define BINS (1 << BITS)

// Places in `info`: keys of this batch, and how many runs are still open (sorted_update.cu).
enum Info { COUNT = 0, SHORT_RUNS = 1, LONG_RUNS = 2 };

DEVICE void begin_sort(uint32* info, uint32 count) {
  info[COUNT] = count;
  info[SHORT_RUNS] = 0;
  info[LONG_RUNS] = 0;
}

// The last table whose keys begin at k or before.
DEVICE int table_at(const int64* offsets, uint32 num_rows, int num_tables, int64 k) {
  int low = 0, high = num_tables - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (offsets[int64(middle) * num_rows] <= k) low = middle;
    else high = middle - 1;
  }
  return low;
}

DEVICE uint32 keys_of_batch(const int64* offsets, uint32 num_keys, uint32 num_rows, int num_tables) {
  return BAGS ? uint32(offsets[int64(num_tables) * num_rows]) : num_keys;
}

// touched[row] = 1 for every row that a key names; one below 0 names none.
KERNEL void __launch_bounds__(THREADS) mark_touched(
    const int64* __restrict__ row_start, const KEY* __restrict__ keys, const int64* __restrict__ offsets,
    uint32 num_keys, uint32 num_rows, int num_tables, unsigned char* __restrict__ touched) {
  const uint32 k = blockIdx.x * THREADS + threadIdx.x;
  if (k >= num_keys || k >= keys_of_batch(offsets, num_keys, num_rows, num_tables)) return;
  const int table = BAGS ? table_at(offsets, num_rows, num_tables, k) : int(k / num_rows);
  if (keys[k] >= 0) touched[row_start[table] + keys[k]] = 1;
}

// Count the digits of a tile: counts[digit, tile].
template <typename RowOf>
DEVICE void count_tile(const RowOf& row_of, int shift, uint32 count, uint32 tiles, uint32* counts) {
  SHARED uint32 own[BINS];
  for (int digit = threadIdx.x; digit < BINS; digit += THREADS) own[digit] = 0;
  __syncthreads();
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const uint32 k = blockIdx.x * TILE + round * THREADS + threadIdx.x;
    if (k < count) atomicAdd(&own[row_of(k) >> shift & (BINS - 1)], 1u);
  }
  __syncthreads();
  for (int digit = threadIdx.x; digit < BINS; digit += THREADS) counts[digit * tiles + blockIdx.x] = own[digit];
}

// The first digit, of rows that are still keys; begins the sort.
KERNEL void __launch_bounds__(THREADS) count_first(
    const int64* __restrict__ row_start, const KEY* __restrict__ keys, const int64* __restrict__ offsets,
    uint32 num_keys, uint32 num_rows, int num_tables, uint32 tiles, uint32* __restrict__ counts,
    uint32* __restrict__ info) {
  const uint32 count = keys_of_batch(offsets, num_keys, num_rows, num_tables), begin = blockIdx.x * TILE;
  if (blockIdx.x == 0 && threadIdx.x == 0) begin_sort(info, count);
  const uint32 last = count - begin < TILE ? count - 1 : begin + TILE - 1;
  const int low = BAGS && begin < count ? table_at(offsets, num_rows, num_tables, begin) : 0;
  const int high = BAGS && begin < count ? table_at(offsets, num_rows, num_tables, last) : 0;
  const int64 start = row_start[low];
  const auto row_of = [&](uint32 k) {
    if (!BAGS) return uint32(row_start[k / num_rows] + keys[k]);
    if (low == high) return uint32(start + keys[k]);  // most tiles lie in one table
    return uint32(row_start[table_at(offsets, num_rows, num_tables, k)] + keys[k]);
  };
  count_tile(row_of, 0, count, tiles, counts);
}

// Any other digit.
KERNEL void __launch_bounds__(THREADS) count_digits(
    const uint32* __restrict__ rows, int shift, uint32 tiles, uint32* __restrict__ counts,
    const uint32* __restrict__ info) {
  count_tile([&](uint32 k) { return rows[k]; }, shift, info[COUNT], tiles, counts);
}

// Sums of what threads before this one have; `total`: of all. Every thread of the block calls it.
DEVICE uint32 sum_before(uint32 value, uint32& total) {
  SHARED uint32 warp_sums[WARPS];
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  uint32 sum = value;
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) {
    const uint32 left = __shfl_up_sync(ALL_LANES, sum, distance);
    if (lane >= distance) sum += left;
  }
  __syncthreads();
  if (lane == LANES - 1) warp_sums[warp] = sum;
  __syncthreads();
  uint32 before = sum - value;
  total = 0;
#pragma unroll
  for (int w = 0; w < WARPS; ++w) {
    if (w < warp) before += warp_sums[w];
    total += warp_sums[w];
  }
  return before;
}

// counts[digit, tile] becomes the sum over the tiles before it, totals[digit] that over all; a block a digit.
KERNEL void __launch_bounds__(THREADS) add_counts(
    uint32* __restrict__ counts, uint32 tiles, uint32* __restrict__ totals) {
  constexpr int PER = 4;  // tiles of a thread
  uint32* own = counts + blockIdx.x * tiles;
  uint32 carried = 0;
  for (uint32 begin = 0; begin < tiles; begin += THREADS * PER) {
    const uint32 first = begin + threadIdx.x * PER;
    uint32 value[PER], sum = 0, total;
#pragma unroll
    for (int i = 0; i < PER; ++i) value[i] = first + i < tiles ? own[first + i] : 0;
#pragma unroll
    for (int i = 0; i < PER; ++i) sum += value[i];
    uint32 before = carried + sum_before(sum, total);
#pragma unroll
    for (int i = 0; i < PER; ++i) {
      if (first + i < tiles) own[first + i] = before;
      before += value[i];
    }
    carried += total;
  }
  if (threadIdx.x == 0) totals[blockIdx.x] = carried;
}

// Where a thread's key of a round lies in its tile.
DEVICE uint32 place_in_tile(int round) {
  return threadIdx.x / LANES * LANES * ROUNDS + round * LANES + threadIdx.x % LANES;
}

// Move the keys of a tile to their places in the order of the digit. `row` is a thread's, 0xffffffff behind the last
// key, so that it stays behind all others; named_of(round) is what named it.
template <typename NamedOf>
DEVICE void move_tile(
    const uint32 (&row)[ROUNDS], const NamedOf& named_of, int shift, uint32 here, uint32 tiles, const uint32* counts,
    const uint32* totals, uint32* rows_out, uint32* named_out) {
  constexpr int PER = BINS > THREADS ? BINS / THREADS : 1;  // digits that a thread looks after
  SHARED uint16 before[WARPS][BINS];  // keys of the digit that a warp has, then those of the warps before it
  SHARED uint32 local[BINS];          // where the digit begins in the tile
  SHARED uint32 distance[BINS];       // from there to where it begins in the output
  SHARED uint32 staged[TILE];
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  for (int item = threadIdx.x; item < WARPS * BINS; item += THREADS) before[item / BINS][item % BINS] = 0;
  __syncthreads();
  uint32 rank[ROUNDS];
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const uint32 digit = row[round] >> shift & (BINS - 1);
    const uint32 alike = lanes_alike(digit, BITS);
    const uint32 lower = alike & ((1u << lane) - 1);
    const uint32 known = before[warp][digit];
    rank[round] = known + __popc(lower);
    __syncwarp();
    if (lower == 0) before[warp][digit] = uint16(known + __popc(alike));
    __syncwarp();
  }
  __syncthreads();

  uint32 sums[PER], everywhere[PER], sum = 0, all = 0, total;
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int digit = threadIdx.x * PER + i;
    sums[i] = sum;
    everywhere[i] = all;
    if (digit < BINS) {
      uint32 of_warps = 0;
      for (int w = 0; w < WARPS; ++w) {
        const uint32 own = before[w][digit];
        before[w][digit] = uint16(of_warps);
        of_warps += own;
      }
      sum += of_warps;
      all += totals[digit];
    }
  }
  const uint32 tile_before = sum_before(sum, total), output_before = sum_before(all, total);
#pragma unroll
  for (int i = 0; i < PER; ++i) {
    const int digit = threadIdx.x * PER + i;
    if (digit < BINS) {
      local[digit] = tile_before + sums[i];
      distance[digit] = output_before + everywhere[i] + counts[digit * tiles + blockIdx.x] - local[digit];
    }
  }
  __syncthreads();

  // Through shared memory in the order of the output, so that what neighbours is written together.
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const uint32 digit = row[round] >> shift & (BINS - 1);
    rank[round] += local[digit] + before[warp][digit];
    staged[rank[round]] = row[round];
  }
  __syncthreads();
  uint32 target[ROUNDS];
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const uint32 at = round * THREADS + threadIdx.x;
    const uint32 value = staged[at];
    target[round] = at + distance[value >> shift & (BINS - 1)];
    if (at < here) rows_out[target[round]] = value;
  }
  __syncthreads();
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) staged[rank[round]] = place_in_tile(round) < here ? named_of(round) : 0;
  __syncthreads();
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const uint32 at = round * THREADS + threadIdx.x;
    if (at < here) named_out[target[round]] = staged[at];
  }
}

KERNEL void __launch_bounds__(THREADS) move_rows(
    const uint32* __restrict__ rows, const uint32* __restrict__ named, int shift, uint32 tiles,
    const uint32* __restrict__ counts, const uint32* __restrict__ totals, uint32* __restrict__ rows_out,
    uint32* __restrict__ named_out, const uint32* __restrict__ info) {
  const uint32 begin = blockIdx.x * TILE, count = info[COUNT];
  if (begin >= count) return;
  const uint32 here = count - begin < TILE ? count - begin : TILE;
  uint32 row[ROUNDS];
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const uint32 k = place_in_tile(round);
    row[round] = k < here ? rows[begin + k] : 0xffffffffu;
  }
  const auto named_of = [&](int round) { return named[begin + place_in_tile(round)]; };
  move_tile(row, named_of, shift, here, tiles, counts, totals, rows_out, named_out);
}

// The first place in offsets[0 .. count) with more than k, or count; the whole warp searches.
DEVICE uint32 first_beyond(const int64* offsets, uint32 count, int64 k) {
  const uint32 lane = threadIdx.x % LANES;
  uint32 low = 0, high = count;
  while (low < high) {
    const uint32 step = (high - low + LANES - 1) / LANES;
    const uint32 probe = low + lane * step;
    const uint32 before = __popc(__ballot_sync(ALL_LANES, probe < high && offsets[probe] <= k));
    const uint32 end = low + before * step;
    if (before > 0) low += (before - 1) * step + 1;
    high = end < high ? end : high;
  }
  return low;
}

// bag_of[k] = the bag of the tile's key k: every bag leaves its number where it begins, and the keys behind take it over.
DEVICE void find_bags(const int64* offsets, uint32 num_bags, uint32 begin, uint32 here, uint32 (&bag_of)[TILE]) {
  SHARED uint32 range[2], of_warp[WARPS];
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  for (int k = threadIdx.x; k < TILE; k += THREADS) bag_of[k] = 0;
  if (warp < 2) {
    const uint32 found = first_beyond(offsets, num_bags + 1, int64(begin) + (warp == 0 ? 0 : here - 1)) - 1;
    if (lane == 0) range[warp] = found;
  }
  __syncthreads();
  for (uint32 bag = range[0] + threadIdx.x; bag <= range[1]; bag += THREADS) {
    const int64 first = offsets[bag];
    if (first > begin && offsets[bag + 1] > first) bag_of[first - begin] = bag;
  }
  __syncthreads();
  uint32 latest = range[0];
#pragma unroll 1
  for (int round = 0; round < ROUNDS; ++round) {
    const uint32 k = place_in_tile(round);
    uint32 bag = bag_of[k];
#pragma unroll
    for (int distance = 1; distance < LANES; distance *= 2) {
      const uint32 left = __shfl_up_sync(ALL_LANES, bag, distance);
      if (lane >= distance && left > bag) bag = left;
    }
    if (bag < latest) bag = latest;
    bag_of[k] = bag;
    latest = __shfl_sync(ALL_LANES, bag, LANES - 1);
  }
  if (lane == 0) of_warp[warp] = latest;
  __syncthreads();
  latest = range[0];
  for (int w = 0; w < warp; ++w) latest = of_warp[w] > latest ? of_warp[w] : latest;
#pragma unroll 1
  for (int round = 0; round < ROUNDS; ++round) {
    const uint32 k = place_in_tile(round);
    if (bag_of[k] < latest) bag_of[k] = latest;
  }
}

// The first digit: rows are made of keys, and what named them is the bag, or with weights the key itself, whose bag is
// bags[k]; without bags it is the key too.
KERNEL void __launch_bounds__(THREADS) move_first(
    const int64* __restrict__ row_start, const KEY* __restrict__ keys, const int64* __restrict__ offsets,
    uint32 num_rows, uint32 num_bags, uint32 tiles, const uint32* __restrict__ counts,
    const uint32* __restrict__ totals, uint32* __restrict__ rows_out, uint32* __restrict__ named_out,
    uint32* __restrict__ bags, const uint32* __restrict__ info) {
  SHARED uint32 bag_of[BAGS ? TILE : 1];
  const uint32 begin = blockIdx.x * TILE, count = info[COUNT];
  if (begin >= count) return;
  const uint32 here = count - begin < TILE ? count - begin : TILE;
#if BAGS
  find_bags(offsets, num_bags, begin, here, bag_of);
#endif
  uint32 row[ROUNDS];
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const uint32 k = place_in_tile(round);
    row[round] = 0xffffffffu;
    if (k < here) {
      const uint32 bag = BAGS ? bag_of[k] : begin + k;
      row[round] = uint32(row_start[bag / num_rows] + keys[begin + k]);
      if (WEIGHTED) bags[begin + k] = bag;
    }
  }
  const auto named_of = [&](int round) {
    const uint32 k = place_in_tile(round);
    return BAGS && !WEIGHTED ? bag_of[k] : begin + k;
  };
  move_tile(row, named_of, 0, here, tiles, counts, totals, rows_out, named_out);
}
