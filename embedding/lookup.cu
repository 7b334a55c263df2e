// Gather the rows of bags of keys and pool them: the kernels of lookup_cuda.py, references in lookup.py.
//
// Shapes: T tables in one weight array of R rows, B bags a table, D columns, F places of the output.
// Macros: DIM = D, a multiple of 4 (of 8 where WEIGHT has 16 bits); WEIGHT, OUT, KEY: element types; and for bags
// WEIGHTED: 1 if keys have weights.
//
// A table's frequent rows are asked for again and again. Workers (blocks) therefore keep to one table, and the
// multiprocessor's first-level cache serves the rows that come often: what is left is what the second level and
// memory have to deliver. Workers of all tables walk the batch side by side, so that rows of the output fill up
// while they are in the second level.
#include "dlrm/kernels.cuh"

#define LANES 32

// Keys that a warp takes at a time.
#define KEYS 16
// Numbers that a lane moves at a time: 16 bytes of weights.
#define NUMBERS (sizeof(WEIGHT) == 4 ? 4 : 8)
// Accesses that a lane has under way.
#define UNROLL 8

// Copy one item of NUMBERS weights, as 16 bytes of WEIGHT in `bits`.
DEVICE void put(float* target, uint4 bits, float) { *reinterpret_cast<uint4*>(target) = bits; }
template <typename T>
DEVICE void put(T* target, uint4 bits, float) { write_4(target, floats(bits)); }
template <typename T>
DEVICE void put(T* target, uint4 bits, T) { *reinterpret_cast<uint4*>(target) = bits; }
template <typename S>
DEVICE void put(float* target, uint4 bits, S) {
  write_4(target, floats<S>(make_uint2(bits.x, bits.y)));
  write_4(target + 4, floats<S>(make_uint2(bits.z, bits.w)));
}
DEVICE void put(half_t* target, uint4 bits, bfloat_t) {
  write_4(target, floats<bfloat_t>(make_uint2(bits.x, bits.y)));
  write_4(target + 4, floats<bfloat_t>(make_uint2(bits.z, bits.w)));
}
DEVICE void put(bfloat_t* target, uint4 bits, half_t) {
  write_4(target, floats<half_t>(make_uint2(bits.x, bits.y)));
  write_4(target + 4, floats<half_t>(make_uint2(bits.z, bits.w)));
}

// out[b, place[t]] = weight[row_start[t] + keys[t, b]]. Worker w of `workers`, a multiple of T, has table w % T.
KERNEL void __launch_bounds__(1024) copy_rows(
    const WEIGHT* __restrict__ weight, const int64* __restrict__ row_start, const KEY* __restrict__ keys,
    const int64* __restrict__ place, int64 num_rows, int num_tables, int num_places, int workers,
    OUT* __restrict__ out) {
  constexpr int ITEMS = DIM / NUMBERS;                    // of a row
  constexpr int TURNS = (KEYS * ITEMS + LANES - 1) / LANES;  // that a lane needs for the keys of its warp
  constexpr int WIDTH = TURNS < UNROLL ? TURNS : UNROLL;
  const int lane = threadIdx.x % LANES;
  const int warps = blockDim.x / LANES;
  const int64 chunks = (num_rows + KEYS - 1) / KEYS;
  for (int worker = blockIdx.x; worker < workers; worker += gridDim.x) {
    const int table = worker % num_tables;
    const WEIGHT* rows = weight + row_start[table] * DIM;
    const KEY* own_keys = keys + table * num_rows;
    OUT* own_out = out + place[table] * DIM;
    const int64 step = int64(workers / num_tables) * warps;
    int64 chunk = int64(worker / num_tables) * warps + threadIdx.x / LANES;
    // The next chunk's keys are on their way while this one's rows are copied.
    int64 b = chunk * KEYS + lane % KEYS;
    KEY key = b < num_rows ? own_keys[b] : KEY(0);
    for (; chunk < chunks; chunk += step) {
      const int64 first = chunk * KEYS;
      const int count = num_rows - first < KEYS ? int(num_rows - first) : KEYS;
      OUT* chunk_out = own_out + first * num_places * DIM;
      b = first + step * KEYS + lane % KEYS;
      const KEY next = b < num_rows ? own_keys[b] : KEY(0);
#pragma unroll 1
      for (int turn = 0; turn < TURNS; turn += WIDTH) {
        uint4 bits[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          const int item = (turn + i) * LANES + lane;
          // Past the batch's end the key is 0: a row that is there, read in vain.
          const int64 row = __shfl_sync(ALL_LANES, key, item / ITEMS % KEYS);
          bits[i] = read_16(rows + row * DIM + item % ITEMS * NUMBERS);
        }
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          const int item = (turn + i) * LANES + lane;
          const int of_key = item / ITEMS;
          if (of_key < count) put(chunk_out + of_key * num_places * DIM + item % ITEMS * NUMBERS, bits[i], WEIGHT());
        }
      }
      key = next;
    }
  }
}

#ifdef WEIGHTED

// Lanes that share a bag, each with PARTS vectors of four columns.
constexpr int GROUP = DIM % 128 == 0 ? 32 : DIM % 64 == 0 ? 16 : DIM % 32 == 0 ? 8 : DIM % 16 == 0 ? 4 : DIM % 8 == 0 ? 2 : 1;
constexpr int PARTS = DIM / (4 * GROUP);
constexpr int AHEAD = PARTS >= UNROLL ? 1 : (UNROLL / PARTS < GROUP ? UNROLL / PARTS : GROUP);

// The first bag whose keys and bags before it add up to `target` or more; the whole warp searches.
DEVICE int64 find_bag(const int64* offsets, int64 num_bags, int64 target) {
  const int lane = threadIdx.x % LANES;
  int64 low = 0, high = num_bags;  // the answer lies in [low, high]
  while (low < high) {
    const int64 step = (high - low + LANES - 1) / LANES;
    const int64 probe = low + lane * step;
    const bool before = probe < high && offsets[probe] + probe < target;
    const int count = __popc(__ballot_sync(ALL_LANES, before));
    // Probes 0 .. count - 1 lie before the answer.
    const int64 end = low + count * step;
    if (count > 0) low += (count - 1) * step + 1;
    high = end < high ? end : high;
  }
  return low;
}

// out[b, place[t]] = sum over the bag, divided by its length where pooling is mean. Every warp gets bags that
// neighbour each other, with as many keys and bags together as any other.
KERNEL void __launch_bounds__(512) pool_bags(
    const WEIGHT* __restrict__ weight, const int64* __restrict__ row_start, const KEY* __restrict__ keys,
    const int64* __restrict__ offsets, const float* __restrict__ key_weights, const unsigned char* __restrict__ mean,
    const int64* __restrict__ place, int64 num_rows, int num_tables, int num_places, OUT* __restrict__ out) {
  const int warps = blockDim.x / LANES;
  const int64 num_bags = num_rows * num_tables;
  const int64 work = offsets[num_bags] + num_bags;
  const int64 all_warps = int64(gridDim.x) * warps;
  const int64 warp = int64(blockIdx.x) * warps + threadIdx.x / LANES;
  const int64 warp_begin = find_bag(offsets, num_bags, work * warp / all_warps);
  const int64 warp_end = warp + 1 == all_warps ? num_bags : find_bag(offsets, num_bags, work * (warp + 1) / all_warps);

  const int lane = threadIdx.x % GROUP;
  const int group = threadIdx.x % LANES / GROUP;
  const uint32 members = GROUP == LANES ? ALL_LANES : ((1u << (GROUP % LANES)) - 1) << (group * GROUP);
  const int64 share = (warp_end - warp_begin + LANES / GROUP - 1) / (LANES / GROUP);
  int64 bag = warp_begin + group * share;
  const int64 last = bag + share < warp_end ? bag + share : warp_end;

  while (bag < last) {
    const int table = int(bag / num_rows);
    const int64 table_end = (table + 1) * num_rows;
    const int64 end = table_end < last ? table_end : last;
    const WEIGHT* rows = weight + row_start[table] * DIM;
    OUT* own_out = out + place[table] * DIM - table * num_rows * num_places * DIM;
    const bool divide = mean[table] != 0;
    const int64 stop = offsets[end];
    // Lane l knows where bag `known + l` ends.
    int64 known = bag;
    int64 ends = offsets[known + lane + 1 < end ? known + lane + 1 : end];
    int64 begin = offsets[bag];
    int64 bag_end = __shfl_sync(members, ends, 0, GROUP);
    float4 sum[PARTS];
#pragma unroll
    for (int p = 0; p < PARTS; ++p) sum[p] = make_float4(0, 0, 0, 0);

    auto finish_bag = [&]() {
      const float divisor = divide && bag_end - begin > 1 ? float(bag_end - begin) : 1.0f;
#pragma unroll
      for (int p = 0; p < PARTS; ++p) {
        const float4 v = sum[p];
        write_4(own_out + bag * num_places * DIM + (p * GROUP + lane) * 4,
                make_float4(v.x / divisor, v.y / divisor, v.z / divisor, v.w / divisor));
        sum[p] = make_float4(0, 0, 0, 0);
      }
      ++bag;
      begin = bag_end;
      if (bag == known + GROUP) {
        known = bag;
        ends = offsets[known + lane + 1 < end ? known + lane + 1 : end];
      }
      bag_end = __shfl_sync(members, ends, int(bag - known), GROUP);
    };

    for (int64 tile = begin; tile < stop; tile += GROUP) {
      const bool mine = tile + lane < stop;
      const KEY key = mine ? keys[tile + lane] : KEY(0);
      const float factor = WEIGHTED && mine ? key_weights[tile + lane] : 1.0f;
#pragma unroll 1
      for (int j = 0; j < GROUP && tile + j < stop; j += AHEAD) {
        float4 v[AHEAD][PARTS];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
          const int64 row = __shfl_sync(members, key, j + i, GROUP);
          if (tile + j + i < stop) {
#pragma unroll
            for (int p = 0; p < PARTS; ++p) v[i][p] = read_4(rows + row * DIM + (p * GROUP + lane) * 4);
          }
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
          const float by = __shfl_sync(members, factor, j + i, GROUP);
          if (tile + j + i < stop) {
            while (tile + j + i >= bag_end) finish_bag();
#pragma unroll
            for (int p = 0; p < PARTS; ++p) {
              sum[p] = WEIGHTED ? add_scaled(sum[p], by, v[i][p]) : add(sum[p], v[i][p]);
            }
          }
        }
      }
    }
    while (bag < end) finish_bag();
  }
}

#endif  // WEIGHTED
