// Exact sums over groups of equal scores: the kernels of score_sums_cuda.py, reference in score_sums.py.
//
// Shapes: G groups in ascending order; rows_below and positives_below [G + 1]. A block goes through a stretch of
// neighbouring groups. Integers are added atomically, in any order; products and sums of doubles that a fused
// instruction would round otherwise are spelled out, so that every decision is the CPU's.
#include "dlrm/kernels.cuh"

#define THREADS 256
#define LANES 32
#define LIMB 1073741824.0  // score_sums.py has the same

#define RANGE                                                                                    \
  const int64 stretch = (num_groups + gridDim.x - 1) / gridDim.x, first = blockIdx.x * stretch;  \
  const int64 end = first + stretch < num_groups ? first + stretch : num_groups;
#define FOR_GROUPS for (int64 g = first + threadIdx.x; g < end; g += THREADS)

DEVICE void add_to(int64* target, int64 value) {
  if (value) atomicAdd(reinterpret_cast<uint64*>(target), uint64(value));
}

// target += the sum over the warp, all of whose lanes call it.
DEVICE void add_of_warp(int64* target, int64 value) {
  value = warp_sum(value);
  if (threadIdx.x % LANES == 0) add_to(target, value);
}

// A term below 1 as two limbs, times a count.
DEVICE void add_term(double term, int64 count, int64& high, int64& low) {
  const double scaled = term * LIMB, whole = floor(scaled);  // products with powers of 2 are exact
  high += count * int64(whole);
  low += count * int64(floor((scaled - whole) * LIMB));
}

KERNEL void __launch_bounds__(THREADS) add_rank_statistic(
    const int* __restrict__ rows_below, const int* __restrict__ positives_below, int64 num_groups,
    int64* __restrict__ doubled) {
  int64 sum = 0;
  RANGE
  FOR_GROUPS {
    const int64 below = positives_below[g], positives = positives_below[g + 1] - below;
    // Twice the negatives below and those of the group once: those below it and those below the next one.
    sum += positives * (rows_below[g] - below + rows_below[g + 1] - below - positives);
  }
  add_of_warp(doubled, sum);
}

// The first place in 0 .. count at which more than `limit` rows of a class lie below, or count + 1; they ascend.
DEVICE int64 first_beyond(const int* rows_below, const int* positives_below, bool negatives, int64 count, int limit) {
  int64 low = 0, high = count + 1;
  while (low < high) {
    const int64 middle = low + (high - low) / 2;
    const int below = negatives ? rows_below[middle] - positives_below[middle] : positives_below[middle];
    if (below <= limit) low = middle + 1;
    else high = middle;
  }
  return low;
}

// found[0]: the first group with a positive, found[1]: the last with a negative; -1 where there is none. One block.
KERNEL void __launch_bounds__(LANES) find_class_ends(
    const int* __restrict__ rows_below, const int* __restrict__ positives_below, int64 num_groups,
    int64* __restrict__ found) {
  if (threadIdx.x == 0) {
    const int64 beyond = first_beyond(rows_below, positives_below, false, num_groups, 0);
    found[0] = beyond > num_groups ? -1 : beyond - 1;
  } else if (threadIdx.x == 1) {
    const int negatives = rows_below[num_groups] - positives_below[num_groups];
    // Behind the last group that has negatives all of them lie below.
    found[1] = first_beyond(rows_below, positives_below, true, num_groups, negatives - 1) - 1;
  }
}

KERNEL void __launch_bounds__(THREADS) add_losses(
    const float* __restrict__ scores, const int* __restrict__ rows_below, const int* __restrict__ positives_below,
    double shrink, int64 num_groups, int64* __restrict__ sums) {
  int64 high = 0, low = 0, correct = 0;
  RANGE
  FOR_GROUPS {
    const double z = scores[g], distance = z < 0 ? -z : z;
    const int64 positives = positives_below[g + 1] - positives_below[g];
    const int64 negatives = rows_below[g + 1] - rows_below[g] - positives;
    const double tail = log1p(exp(-distance));
    if (positives) add_term(times(plus(z < 0 ? -z : 0.0, tail), shrink), positives, high, low);
    if (negatives) add_term(times(plus(z < 0 ? 0.0 : z, tail), shrink), negatives, high, low);
    correct += z > 0 ? positives : negatives;
  }
  add_of_warp(sums, high);
  add_of_warp(sums + 1, low);
  add_of_warp(sums + 2, correct);
}

// Sums of the bin that a thread is in: bins ascend with the groups, so that it is left a few times at most.
template <int N>
struct Bin {
  int place = -1;
  int64 sums[N] = {};
};

// bins[place * along + i * across] += sums[i], by this thread alone.
template <int N>
DEVICE void leave(Bin<N>& bin, int64* bins, int along, int across) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (bin.place >= 0) add_to(bins + bin.place * along + i * across, bin.sums[i]);
    bin.sums[i] = 0;
  }
}

// The same for the whole warp: together where its lanes are in one bin, which most warps are.
template <int N>
DEVICE void leave_together(Bin<N>& bin, int64* bins, int along, int across) {
  int last = bin.place;
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) {
    const int other = __shfl_xor_sync(ALL_LANES, last, distance);
    last = other > last ? other : last;
  }
  const bool alone = bin.place >= 0 && bin.place != last;
  if (last < 0) return;
  if (__ballot_sync(ALL_LANES, alone) != 0) return leave(bin, bins, along, across);
#pragma unroll
  for (int i = 0; i < N; ++i) add_of_warp(bins + last * along + i * across, bin.sums[i]);
}

KERNEL void __launch_bounds__(THREADS) add_bins(
    const float* __restrict__ scores, const int* __restrict__ rows_below, const int* __restrict__ positives_below,
    int64 rows_before, int64 num_rows, int num_bins, int64 num_groups, int64* __restrict__ bins) {
  Bin<4> bin;
  RANGE
  FOR_GROUPS {
    const double z = scores[g];
    const int64 rows = rows_below[g + 1] - rows_below[g];
    const double middle = plus(double(rows_below[g] + rows_before), times(0.5, double(rows)));
    int place = int(times(double(num_bins), middle / double(num_rows)));
    place = place < num_bins - 1 ? place : num_bins - 1;
    if (place != bin.place) leave(bin, bins, 4, 1);
    bin.place = place;
    const double small = exp(z < 0 ? z : -z);
    bin.sums[0] += rows;
    bin.sums[1] += positives_below[g + 1] - positives_below[g];
    add_term((z >= 0 ? 1.0 : small) / plus(1.0, small), rows, bin.sums[2], bin.sums[3]);
  }
  leave_together(bin, bins, 4, 1);
}

KERNEL void __launch_bounds__(THREADS) add_histogram(
    const float* __restrict__ scores, const int* __restrict__ rows_below, const int* __restrict__ positives_below,
    double low, double high, int num_bins, int64 num_groups, int64* __restrict__ bins) {
  Bin<2> bin;
  RANGE
  FOR_GROUPS {
    double share = plus(double(scores[g]), -low) / plus(high, -low);
    share = share < 0 ? 0.0 : share > 1 ? 1.0 : share;
    int place = int(times(share, double(num_bins)));
    place = place < num_bins - 1 ? place : num_bins - 1;
    if (place != bin.place) leave(bin, bins, 1, num_bins);
    bin.place = place;
    const int64 positives = positives_below[g + 1] - positives_below[g];
    bin.sums[0] += positives;
    bin.sums[1] += rows_below[g + 1] - rows_below[g] - positives;
  }
  leave_together(bin, bins, 1, num_bins);
}

KERNEL void __launch_bounds__(THREADS) add_precision(
    const int* __restrict__ rows_below, const int* __restrict__ positives_below, int64 positives_above,
    int64 negatives_above, int64 num_groups, int64* __restrict__ limbs) {
  const int64 all_positives = positives_below[num_groups] + positives_above;
  const int64 all_rows = rows_below[num_groups] + positives_above + negatives_above;
  int64 high = 0, low = 0;
  RANGE
  FOR_GROUPS {
    const int64 here = positives_below[g + 1] - positives_below[g];
    if (here) add_term(double(all_positives - positives_below[g]) / double(all_rows - rows_below[g]), here, high, low);
  }
  add_of_warp(limbs, high);
  add_of_warp(limbs + 1, low);
}

struct Curve {
  int64 all_positives, all_rows, num_positives, num_negatives, positive_steps, negative_steps;
};

// Steps gone at the score of group g: all above and the group itself.
DEVICE int64 steps_gone(const Curve& curve, int64 rows_below, int64 positives_below) {
  const int64 positives = curve.all_positives - positives_below;
  const int64 negatives = curve.all_rows - rows_below - positives;
  return int64(floor(plus(
      times(double(curve.positive_steps), double(positives) / double(curve.num_positives)),
      times(double(curve.negative_steps), double(negatives) / double(curve.num_negatives)))));
}

// points[i] = (group, true positives, false positives) of those at which another step is gone.
KERNEL void __launch_bounds__(THREADS) pick_points(
    const int* __restrict__ rows_below, const int* __restrict__ positives_below, int64 positives_above,
    int64 negatives_above, int64 num_positives, int64 num_negatives, int64 positive_steps, int64 negative_steps,
    int64 num_groups, int64* __restrict__ points, uint64* __restrict__ count) {
  const Curve curve = {positives_below[num_groups] + positives_above,
                       rows_below[num_groups] + positives_above + negatives_above,
                       num_positives, num_negatives, positive_steps, negative_steps};
  RANGE
  FOR_GROUPS {
    if (steps_gone(curve, rows_below[g], positives_below[g]) >
        steps_gone(curve, rows_below[g + 1], positives_below[g + 1])) {
      const uint64 place = atomicAdd(count, uint64(1));
      points[place * 3] = g;
      points[place * 3 + 1] = curve.all_positives - positives_below[g];
      points[place * 3 + 2] = curve.all_rows - rows_below[g] - points[place * 3 + 1];
    }
  }
}
