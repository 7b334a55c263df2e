// Rows sorted by score and joined into groups of equal scores: the kernels of score_groups_cuda.py, reference in
// score_groups.py. The sort between them is embedding/row_sort.cu's.
//
// Shapes: n rows (or groups of several ranks), tiles of 4096. Macros: SCORE, LABEL: element types; MERGED: 1 where the
// sorted pairs name groups, 0 where they name labels.
#include "dlrm/kernels.cuh"

#define THREADS 256
#define LANES 32
#define WARPS (THREADS / LANES)
#define ROUNDS 16
#define TILE (THREADS * ROUNDS)

// What is counted of every tile.
enum Count { HEADS = 0, ROWS = 1, POSITIVES = 2, COUNTS = 3 };

// found[0] += scores that are not finite, found[1] += labels that are neither 0 nor 1.
KERNEL void __launch_bounds__(THREADS) check_rows(
    const SCORE* __restrict__ scores, const LABEL* __restrict__ labels, int64 n, uint64* __restrict__ found) {
  uint64 not_finite = 0, bad_labels = 0;
  for (int64 i = int64(blockIdx.x) * THREADS + threadIdx.x; i < n; i += int64(gridDim.x) * THREADS) {
    const SCORE score = scores[i];
    const LABEL label = labels[i];
    not_finite += !(score - score == 0);
    bad_labels += !(label == 0 || label == 1);
  }
  not_finite = warp_sum(not_finite);
  bad_labels = warp_sum(bad_labels);
  if (threadIdx.x % LANES == 0) {
    if (not_finite) atomicAdd(found, not_finite);
    if (bad_labels) atomicAdd(found + 1, bad_labels);
  }
}

// Integers of the same order as the scores; -0 and 0 are one.
DEVICE uint32 key_of(float score) {
  uint32 bits = float_to_bits(score);
  if (bits == 0x80000000u) bits = 0;
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

DEVICE float score_of(uint32 key) { return bits_to_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)); }

// Pairs of key and label; info[0] = n.
KERNEL void __launch_bounds__(THREADS) key_rows(
    const float* __restrict__ scores, const LABEL* __restrict__ labels, uint32 n, uint32* __restrict__ keys,
    uint32* __restrict__ named, uint32* __restrict__ info) {
  const uint32 i = blockIdx.x * THREADS + threadIdx.x;
  if (i == 0) info[0] = n;
  if (i < n) {
    keys[i] = key_of(scores[i]);
    named[i] = labels[i] != 0;
  }
}

// Pairs of key and number of the group; info[0] = n.
KERNEL void __launch_bounds__(THREADS) key_groups(
    const float* __restrict__ scores, uint32 n, uint32* __restrict__ keys, uint32* __restrict__ named,
    uint32* __restrict__ info) {
  const uint32 i = blockIdx.x * THREADS + threadIdx.x;
  if (i == 0) info[0] = n;
  if (i < n) {
    keys[i] = key_of(scores[i]);
    named[i] = i;
  }
}

// What a thread reads of its tile: pair `round` is number first_of_warp + round * LANES + lane.
struct Pairs {
  uint32 key[ROUNDS], rows[ROUNDS], positives[ROUNDS], heads;  // heads: bits of the pairs that begin a group
};

DEVICE uint32 first_of_warp() { return blockIdx.x * TILE + threadIdx.x / LANES * (LANES * ROUNDS); }

// `of_warp`: sums over the warp.
DEVICE Pairs read_pairs(
    const uint32* __restrict__ keys, const uint32* __restrict__ named, const int* __restrict__ rows,
    const int* __restrict__ positives, uint32 n, uint32 (&of_warp)[COUNTS]) {
  Pairs pairs;
  pairs.heads = 0;
  of_warp[HEADS] = of_warp[ROWS] = of_warp[POSITIVES] = 0;
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const uint32 i = first_of_warp() + round * LANES + threadIdx.x % LANES;
    pairs.key[round] = pairs.rows[round] = pairs.positives[round] = 0;
    if (i < n) {
      const uint32 name = named[i];
      pairs.key[round] = keys[i];
      pairs.rows[round] = MERGED ? uint32(rows[name]) : 1;
      pairs.positives[round] = MERGED ? uint32(positives[name]) : name;
      if (i == 0 || keys[i - 1] != pairs.key[round]) {
        pairs.heads |= 1u << round;
        ++of_warp[HEADS];
      }
    }
    of_warp[ROWS] += pairs.rows[round];
    of_warp[POSITIVES] += pairs.positives[round];
  }
#pragma unroll
  for (int what = 0; what < COUNTS; ++what) of_warp[what] = warp_sum(of_warp[what]);
  return pairs;
}

// counts[what, tile] = groups that begin in the tile, its rows, its positives.
KERNEL void __launch_bounds__(THREADS) count_groups(
    const uint32* __restrict__ keys, const uint32* __restrict__ named, const int* __restrict__ rows,
    const int* __restrict__ positives, uint32 n, uint32 tiles, uint32* __restrict__ counts) {
  SHARED uint32 sums[WARPS][COUNTS];
  uint32 of_warp[COUNTS];
  read_pairs(keys, named, rows, positives, n, of_warp);
  if (threadIdx.x % LANES == 0) {
    for (int what = 0; what < COUNTS; ++what) sums[threadIdx.x / LANES][what] = of_warp[what];
  }
  __syncthreads();
  if (threadIdx.x < COUNTS) {
    uint32 sum = 0;
    for (int warp = 0; warp < WARPS; ++warp) sum += sums[warp][threadIdx.x];
    counts[threadIdx.x * tiles + blockIdx.x] = sum;
  }
}

// The sum over the lanes before this one; `total` grows by that over all.
DEVICE uint32 sum_before(uint32 value, uint32& total) {
  const int lane = threadIdx.x % LANES;
  uint32 sum = value;
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) {
    const uint32 left = __shfl_up_sync(ALL_LANES, sum, distance);
    if (lane >= distance) sum += left;
  }
  const uint32 before = total + sum - value;
  total += __shfl_sync(ALL_LANES, sum, LANES - 1);
  return before;
}

// The groups, each at its place; `counts` holds the sums over the tiles before, `totals` those over all tiles.
KERNEL void __launch_bounds__(THREADS) write_groups(
    const uint32* __restrict__ keys, const uint32* __restrict__ named, const int* __restrict__ rows,
    const int* __restrict__ positives, uint32 n, uint32 tiles, const uint32* __restrict__ counts,
    const uint32* __restrict__ totals, float* __restrict__ scores, int* __restrict__ rows_below,
    int* __restrict__ positives_below, int64* __restrict__ count) {
  SHARED uint32 sums[WARPS][COUNTS];
  const int lane = threadIdx.x % LANES, own = threadIdx.x / LANES;
  uint32 of_warp[COUNTS], before[COUNTS];
  const Pairs pairs = read_pairs(keys, named, rows, positives, n, of_warp);
  if (lane == 0) {
    for (int what = 0; what < COUNTS; ++what) sums[own][what] = of_warp[what];
  }
  __syncthreads();
  for (int what = 0; what < COUNTS; ++what) {
    before[what] = counts[what * tiles + blockIdx.x];
    for (int warp = 0; warp < own; ++warp) before[what] += sums[warp][what];
  }
#pragma unroll
  for (int round = 0; round < ROUNDS; ++round) {
    const bool head = pairs.heads >> round & 1;
    const uint32 group = sum_before(head, before[HEADS]);
    const uint32 rows_before = sum_before(pairs.rows[round], before[ROWS]);
    const uint32 positives_before = sum_before(pairs.positives[round], before[POSITIVES]);
    if (head) {
      scores[group] = score_of(pairs.key[round]);
      rows_below[group] = int(rows_before);
      positives_below[group] = int(positives_before);
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *count = totals[HEADS];
    rows_below[totals[HEADS]] = int(totals[ROWS]);
    positives_below[totals[HEADS]] = int(totals[POSITIVES]);
  }
}
