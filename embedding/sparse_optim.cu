// Sparse SGD with atomic additions: the kernels of sparse_optim_cuda.py, references in sparse_optim.py.
//
// Shapes: T tables in one weight array of R rows, B rows of the batch, D columns, F places of the gradient.
// Macros: DIM = D, a multiple of 4; KEY, GRAD: element types; HOT: rows of a table that are summed on the chip; and for
// bags WEIGHTED: 1 if keys have weights.
//
// Additions to one address queue up in the second level, and a table's first rows are its most frequent ones (or its
// only ones). Every group of lanes therefore keeps sums of its own for the first HOT rows of its table in shared
// memory, where nothing queues; a block adds its groups' sums up and sends each row off once. Workers keep to one
// table, as in lookup.cu.
#include "dlrm/kernels.cuh"

#define LANES 32
// Keys that a warp takes at a time.
#define KEYS 16

constexpr int GROUP = DIM % 128 == 0 ? 32 : DIM % 64 == 0 ? 16 : DIM % 32 == 0 ? 8 : DIM % 16 == 0 ? 4 : DIM % 8 == 0 ? 2 : 1;  // lanes that share a row
constexpr int PARTS = DIM / (4 * GROUP);     // vectors of four columns that each of them has
constexpr int GROUPS = LANES / GROUP;
constexpr int OWN_KEYS = (KEYS + GROUPS - 1) / GROUPS;
constexpr int AHEAD = PARTS >= 8 ? 1 : (8 / PARTS < OWN_KEYS ? 8 / PARTS : OWN_KEYS);

// weight[row_start[t] + keys[t, b]] -= lr / loss_scale * gradients[b, place[t]]; a key below 0 names no row.
KERNEL void __launch_bounds__(512) sgd_one_hot(
    float* __restrict__ weight, const int64* __restrict__ row_start, const KEY* __restrict__ keys,
    const int64* __restrict__ place, int64 num_rows, int num_tables, int num_places, int workers,
    const GRAD* __restrict__ gradients, const float* __restrict__ scalars, const float* __restrict__ guard) {
  DYNAMIC_SHARED(shared);
  if (blocked(guard)) return;
  const float rate = -scalars[SPARSE] * guard[UNSCALE];
  const int lane = threadIdx.x % LANES;
  const int warps = blockDim.x / LANES;
  const int groups = warps * GROUPS;
  const int group = threadIdx.x / GROUP;
  float4* sums = reinterpret_cast<float4*>(shared);  // [HOT, PARTS * GROUP] of each group of the block
  uint32* touched = reinterpret_cast<uint32*>(sums + groups * HOT * PARTS * GROUP);  // [groups], bit h: row h is there
  float4* own = sums + group * HOT * PARTS * GROUP + lane % GROUP;
  const int64 chunks = (num_rows + KEYS - 1) / KEYS;

  for (int worker = blockIdx.x; worker < workers; worker += gridDim.x) {
    const int table = worker % num_tables;
    float* rows = weight + row_start[table] * DIM + lane % GROUP * 4;
    const KEY* own_keys = keys + table * num_rows;
    const GRAD* own_gradients = gradients + place[table] * DIM + lane % GROUP * 4;
    const int64 step = int64(workers / num_tables) * warps;
    int64 chunk = int64(worker / num_tables) * warps + threadIdx.x / LANES;
    uint32 here = 0;
    int64 b = chunk * KEYS + lane % KEYS;
    KEY key = b < num_rows ? own_keys[b] : KEY(0);
    for (; chunk < chunks; chunk += step) {
      const int64 first = chunk * KEYS;
      const int count = num_rows - first < KEYS ? int(num_rows - first) : KEYS;
      const GRAD* chunk_gradients = own_gradients + first * num_places * DIM;
      b = first + step * KEYS + lane % KEYS;
      const KEY next = b < num_rows ? own_keys[b] : KEY(0);
#pragma unroll 1
      for (int turn = 0; turn < OWN_KEYS; turn += AHEAD) {
        float4 v[AHEAD][PARTS];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
          const int k = (turn + i) * GROUPS + lane / GROUP;
          const bool named = __shfl_sync(ALL_LANES, key, k % LANES) >= 0;
#pragma unroll
          for (int p = 0; p < PARTS; ++p) {
            if (k < count && named) v[i][p] = stream_4(chunk_gradients + k * num_places * DIM + p * GROUP * 4);
          }
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
          const int k = (turn + i) * GROUPS + lane / GROUP;
          const int64 row = __shfl_sync(ALL_LANES, key, k % LANES);
          if (k >= count || row < 0) continue;
          if (row < HOT) {
            const bool known = here >> row & 1;
            float4* target = own + row * PARTS * GROUP;
#pragma unroll
            for (int p = 0; p < PARTS; ++p) {
              target[p * GROUP] = known ? add(target[p * GROUP], v[i][p]) : v[i][p];
            }
            here |= 1u << row;
          } else {
#pragma unroll
            for (int p = 0; p < PARTS; ++p) reduce_add_4(rows + row * DIM + p * GROUP * 4, scaled(rate, v[i][p]));
          }
        }
      }
      key = next;
    }
    if (lane % GROUP == 0) touched[group] = here;
    __syncthreads();
    for (int item = threadIdx.x; item < HOT * PARTS * GROUP; item += blockDim.x) {
      const int row = item / (PARTS * GROUP);
      float4 sum = make_float4(0, 0, 0, 0);
      bool any = false;
      for (int g = 0; g < groups; ++g) {
        if (touched[g] >> row & 1) {
          sum = add(sum, sums[g * HOT * PARTS * GROUP + item]);
          any = true;
        }
      }
      if (any) {
        reduce_add_4(weight + (row_start[table] + row) * DIM + item % (PARTS * GROUP) * 4, scaled(rate, sum));
      }
    }
    __syncthreads();
  }
}

#ifdef WEIGHTED

// The same for bags: a row gets its bag's gradient for every key, times the key's weight, divided by the bag's length
// where pooling is mean. The groups of lanes take turns at the bags: a table's long bags meet all of them.
KERNEL void __launch_bounds__(512) sgd_bags(
    float* __restrict__ weight, const int64* __restrict__ row_start, const KEY* __restrict__ keys,
    const int64* __restrict__ offsets, const float* __restrict__ key_weights, const unsigned char* __restrict__ mean,
    const int64* __restrict__ place, uint32 num_rows, uint32 num_bags, int num_places,
    const GRAD* __restrict__ gradients, const float* __restrict__ scalars, const float* __restrict__ guard) {
  if (blocked(guard)) return;
  const float rate = -scalars[SPARSE] * guard[UNSCALE];
  const int lane = threadIdx.x % GROUP;
  const int group = threadIdx.x % LANES / GROUP;
  const uint32 members = GROUP == LANES ? ALL_LANES : ((1u << (GROUP % LANES)) - 1) << (group * GROUP);
  const uint32 groups = gridDim.x * blockDim.x / GROUP;
  for (uint64 bag = (uint64(blockIdx.x) * blockDim.x + threadIdx.x) / GROUP; bag < num_bags; bag += groups) {
    const int64 begin = offsets[bag], end = offsets[bag + 1];
    if (begin == end) continue;
    const uint32 table = uint32(bag) / num_rows;
    const int64 source = (int64(uint32(bag) - table * num_rows) * num_places + place[table]) * DIM + lane * 4;
    const float of_bag = mean[table] ? rate / float(end - begin) : rate;
    float4 v[PARTS];
#pragma unroll
    for (int p = 0; p < PARTS; ++p) v[p] = scaled(of_bag, stream_4(gradients + source + p * GROUP * 4));
    float* rows = weight + row_start[table] * DIM + lane * 4;
    for (int64 tile = begin; tile < end; tile += GROUP) {
      const bool mine = tile + lane < end;
      const KEY key = mine ? keys[tile + lane] : KEY(0);
      const float factor = WEIGHTED && mine ? key_weights[tile + lane] : 1.0f;
      for (int j = 0; j < GROUP && tile + j < end; ++j) {
        const int64 row = __shfl_sync(members, key, j, GROUP);
        const float by = WEIGHTED ? __shfl_sync(members, factor, j, GROUP) : 1.0f;
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
          reduce_add_4(rows + row * DIM + p * GROUP * 4, WEIGHTED ? scaled(by, v[p]) : v[p]);
        }
      }
    }
  }
}

#endif  // WEIGHTED
