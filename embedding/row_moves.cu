// Copy rows from listed places to listed places: the kernel of row_moves_cuda.py, reference in row_moves.py.
//
// Shapes: n rows moved, D columns. Macros: DIM = D, a multiple of 4; IN, OUT: element types; FROM, TO: 1 where places
// are listed, 0 where they are 0, 1, 2, ...; SCALED: 1 if numbers are multiplied.
#include "dlrm/kernels.cuh"

#define LANES 32
#define THREADS 256

constexpr int GROUP = DIM % 128 == 0 ? 32 : DIM % 64 == 0 ? 16 : DIM % 32 == 0 ? 8 : DIM % 16 == 0 ? 4 : DIM % 8 == 0 ? 2 : 1;  // lanes that share a row
constexpr int PARTS = DIM / (4 * GROUP);  // vectors of four columns that each of them has
constexpr int GROUPS = LANES / GROUP;
constexpr int AHEAD = PARTS >= 8 ? 1 : (8 / PARTS < GROUP ? 8 / PARTS : GROUP);  // accesses that a lane has under way

// What is finite stays finite where the target's range is narrower.
DEVICE float limited(float v) {
  const bool finite = (float_to_bits(v) & 0x7f800000u) != 0x7f800000u;
  return finite && v > 65504.0f ? 65504.0f : finite && v < -65504.0f ? -65504.0f : v;
}
DEVICE float4 limited(half_t, float4 v) { return make_float4(limited(v.x), limited(v.y), limited(v.z), limited(v.w)); }
template <typename T>
DEVICE float4 limited(T, float4 v) { return v; }

KERNEL void __launch_bounds__(THREADS) move_listed(
    const IN* __restrict__ source, const int* __restrict__ source_rows, OUT* __restrict__ target,
    const int* __restrict__ target_rows, int64 count, float scale) {
  const int lane = threadIdx.x % LANES, warps = THREADS / LANES;
  const int column = lane % GROUP * 4;
  const int64 step = int64(gridDim.x) * warps * LANES;
  for (int64 first = (int64(blockIdx.x) * warps + threadIdx.x / LANES) * LANES; first < count; first += step) {
    // Every lane looks one pair of places up.
    const int64 item = first + lane;
    const bool inside = item < count;
    const int from = !inside ? -1 : FROM ? source_rows[item] : int(item);
    const int to = !inside ? -1 : TO ? target_rows[item] : int(item);
#pragma unroll 1
    for (int turn = 0; turn < GROUP; turn += AHEAD) {
      float4 v[AHEAD][PARTS];
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int which = (turn + i) * GROUPS + lane / GROUP;
        const int64 begin = __shfl_sync(ALL_LANES, from, which), end = __shfl_sync(ALL_LANES, to, which);
        if (begin < 0 || end < 0) continue;
#pragma unroll
        for (int p = 0; p < PARTS; ++p) v[i][p] = read_4(source + begin * DIM + p * GROUP * 4 + column);
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const int which = (turn + i) * GROUPS + lane / GROUP;
        const int64 begin = __shfl_sync(ALL_LANES, from, which), end = __shfl_sync(ALL_LANES, to, which);
        if (begin < 0 || end < 0) continue;
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
          const float4 own = SCALED ? scaled(scale, v[i][p]) : v[i][p];
          write_4(target + end * DIM + p * GROUP * 4 + column, limited(OUT(), own));
        }
      }
    }
  }
}
