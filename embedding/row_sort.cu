// Sort the rows that a batch names, each with where it was named: the kernels of row_sort_cuda.py, reference in
// row_sort.py.
//
// Shapes: T tables, B bags a table, K keys. Macros: KEY: type of the keys; WEIGHTED: 1 if keys have weights; BITS: of a
// digit, at most 9.
//
// A stable radix sort, lowest digit first, in three launches a digit: count the digits of every tile, add the counts up
// over the tiles, move. Nothing waits for another block, and how many keys there are is read on the device.
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

// rows[k] = row_start[t] + keys[k], named[k] = k, for one key a bag.
KERNEL void __launch_bounds__(THREADS) name_rows(
    const int64* __restrict__ row_start, const KEY* __restrict__ keys, uint32 num_keys, uint32 num_rows,
    uint32* __restrict__ rows, uint32* __restrict__ named, uint32* __restrict__ info) {
  const uint32 k = blockIdx.x * THREADS + threadIdx.x;
  if (k == 0) begin_sort(info, num_keys);
  if (k < num_keys) {
    rows[k] = uint32(row_start[k / num_rows] + keys[k]);
    named[k] = k;
  }
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

// The same for bags: named[k] is the bag, or with weights the key itself, whose bag is bags[k].
KERNEL void __launch_bounds__(THREADS) name_bags(
    const int64* __restrict__ row_start, const KEY* __restrict__ keys, const int64* __restrict__ offsets,
    uint32 num_rows, uint32 num_bags, uint32* __restrict__ rows, uint32* __restrict__ named,
    uint32* __restrict__ bags, uint32* __restrict__ info) {
  SHARED uint32 range[2];
  const int64 count = offsets[num_bags];
  const int64 begin = int64(blockIdx.x) * TILE;
  if (blockIdx.x == 0 && threadIdx.x == 0) begin_sort(info, uint32(count));
  if (begin >= count) return;
  const int64 end = begin + TILE < count ? begin + TILE : count;
  const int warp = threadIdx.x / LANES;
  if (warp < 2) {
    const uint32 found = first_beyond(offsets, num_bags + 1, warp == 0 ? begin : end - 1) - 1;
    if (threadIdx.x % LANES == 0) range[warp] = found;
  }
  __syncthreads();
  for (int64 k = begin + threadIdx.x; k < end; k += THREADS) {
    uint32 low = range[0], high = range[1];  // the bag is the last one that begins at k or before
    while (low < high) {
      const uint32 middle = low + (high - low + 1) / 2;
      if (offsets[middle] <= k) low = middle;
      else high = middle - 1;
    }
    rows[k] = uint32(row_start[low / num_rows] + keys[k]);
    named[k] = WEIGHTED ? uint32(k) : low;
    if (WEIGHTED) bags[k] = low;
  }
}

#ifdef BAGS

// touched[row] = 1 for every row that a key names; one below 0 names none.
KERNEL void __launch_bounds__(THREADS) mark_touched(
    const int64* __restrict__ row_start, const KEY* __restrict__ keys, const int64* __restrict__ offsets,
    uint32 num_keys, uint32 num_rows, int num_tables, unsigned char* __restrict__ touched) {
  const uint32 k = blockIdx.x * THREADS + threadIdx.x;
  if (k >= num_keys) return;
  int table = int(k / num_rows);
  if (BAGS) {
    if (k >= offsets[int64(num_tables) * num_rows]) return;
    int low = 0, high = num_tables - 1;  // the table is the last one that begins at k or before
    while (low < high) {
      const int middle = (low + high + 1) / 2;
      if (offsets[int64(middle) * num_rows] <= k) low = middle;
      else high = middle - 1;
    }
    table = low;
  }
  if (keys[k] >= 0) touched[row_start[table] + keys[k]] = 1;
}

#endif  // BAGS

// counts[digit, tile] = how many keys of the tile have the digit.
KERNEL void __launch_bounds__(THREADS) count_digits(
    const uint32* __restrict__ rows, int shift, uint32 tiles, uint32* __restrict__ counts,
    const uint32* __restrict__ info) {
  SHARED uint32 own[BINS];
  for (int digit = threadIdx.x; digit < BINS; digit += THREADS) own[digit] = 0;
  __syncthreads();
  const uint32 begin = blockIdx.x * TILE, count = info[COUNT];
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const uint32 k = begin + round * THREADS + threadIdx.x;
    if (k < count) atomicAdd(&own[rows[k] >> shift & (BINS - 1)], 1u);
  }
  __syncthreads();
  for (int digit = threadIdx.x; digit < BINS; digit += THREADS) counts[digit * tiles + blockIdx.x] = own[digit];
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
  uint32* own = counts + blockIdx.x * tiles;
  uint32 carried = 0;
  for (uint32 begin = 0; begin < tiles; begin += THREADS) {
    const uint32 tile = begin + threadIdx.x;
    uint32 total;
    const uint32 before = sum_before(tile < tiles ? own[tile] : 0, total);
    if (tile < tiles) own[tile] = carried + before;
    carried += total;
  }
  if (threadIdx.x == 0) totals[blockIdx.x] = carried;
}

// Move the keys of every tile to their places in the order of the digit.
KERNEL void __launch_bounds__(THREADS) move_rows(
    const uint32* __restrict__ rows, const uint32* __restrict__ named, int shift, uint32 tiles,
    const uint32* __restrict__ counts, const uint32* __restrict__ totals, uint32* __restrict__ rows_out,
    uint32* __restrict__ named_out, const uint32* __restrict__ info) {
  constexpr int PER = BINS > THREADS ? BINS / THREADS : 1;  // digits that a thread looks after
  SHARED uint32 before[WARPS][BINS];  // keys of the digit that a warp has, then those of the warps before it
  SHARED uint32 local[BINS];          // where the digit begins in the tile
  SHARED uint32 distance[BINS];       // from there to where it begins in the output
  SHARED uint32 staged[TILE];
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  const uint32 begin = blockIdx.x * TILE, count = info[COUNT];
  if (begin >= count) return;
  const uint32 here = count - begin < TILE ? count - begin : TILE;

  for (int item = threadIdx.x; item < WARPS * BINS; item += THREADS) before[item / BINS][item % BINS] = 0;
  __syncthreads();
  uint32 row[ROUNDS], rank[ROUNDS];
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const uint32 k = warp * LANES * ROUNDS + round * LANES + lane;
    // Behind the last key: the highest digit, so that it stays behind all others.
    row[round] = k < here ? rows[begin + k] : 0xffffffffu;
  }
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const uint32 digit = row[round] >> shift & (BINS - 1);
    const uint32 alike = lanes_alike(digit, BITS);
    const uint32 lower = alike & ((1u << lane) - 1);
    const uint32 known = before[warp][digit];
    rank[round] = known + __popc(lower);
    __syncwarp();
    if (lower == 0) before[warp][digit] = known + __popc(alike);
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
        before[w][digit] = of_warps;
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
  for (int round = 0; round < ROUNDS; ++round) {
    const uint32 k = warp * LANES * ROUNDS + round * LANES + lane;
    staged[rank[round]] = k < here ? named[begin + k] : 0;
  }
  __syncthreads();
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const uint32 at = round * THREADS + threadIdx.x;
    if (at < here) named_out[target[round]] = staged[at];
  }
}
