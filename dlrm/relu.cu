// Gradients at a ReLU, cleared and summed over the rows: the kernels of relu_cuda.py, reference in relu.py.
//
// Macros: NUMBER: element type; EACH: numbers that a thread moves at a time, 16 bytes or one number; MASK: what says where
// the ReLU was on: 0: nothing, 1: its output, 2: bits; SUMMED: 1 if the sums are wanted.
#include "dlrm/kernels.cuh"

#define LANES 32
#define THREADS 256
// Rows that a thread asks for together.
#define AHEAD 4

// EACH numbers as they come from memory.
template <int BYTES>
struct Bits { uint4 v; };
template <>
struct Bits<1> { NUMBER v; };
typedef Bits<EACH == 1 ? 1 : 16> Raw;

DEVICE void fetch_piece(Bits<16>& raw, const NUMBER* source) { fetch(raw.v, source); }
DEVICE void fetch_piece(Bits<1>& raw, const NUMBER* source) { raw.v = *source; }
DEVICE void write_piece(NUMBER* target, const Bits<16>& raw) { write_16(target, raw.v); }
DEVICE void write_piece(NUMBER* target, const Bits<1>& raw) { *target = raw.v; }

DEVICE void numbers(float (&v)[EACH], const Bits<1>& raw) { v[0] = to_float(raw.v); }
DEVICE void numbers_of(float (&v)[EACH], uint4 bits, float) {
  v[0] = bits_to_float(bits.x), v[1 % EACH] = bits_to_float(bits.y);
  v[2 % EACH] = bits_to_float(bits.z), v[3 % EACH] = bits_to_float(bits.w);
}
template <typename T>
DEVICE void numbers_of(float (&v)[EACH], uint4 bits, T) {
  const float2 a = unpack(T(), bits.x), b = unpack(T(), bits.y), c = unpack(T(), bits.z), d = unpack(T(), bits.w);
  v[0] = a.x, v[1 % EACH] = a.y, v[2 % EACH] = b.x, v[3 % EACH] = b.y;
  v[4 % EACH] = c.x, v[5 % EACH] = c.y, v[6 % EACH] = d.x, v[7 % EACH] = d.y;
}
DEVICE void numbers(float (&v)[EACH], const Bits<16>& raw) { numbers_of(v, raw.v, NUMBER()); }

// Clear those numbers of a piece whose bit is not set.
DEVICE void keep(Bits<1>& raw, uint32 on) {
  if (!(on & 1)) store(&raw.v, 0.0f);
}
DEVICE uint32 kept(uint32 word, uint32 on, float) { return on & 1 ? word : 0; }
template <typename T>
DEVICE uint32 kept(uint32 word, uint32 on, T) {
  return word & ((on & 1 ? 0xffffu : 0u) | (on & 2 ? 0xffff0000u : 0u));
}
DEVICE void keep(Bits<16>& raw, uint32 on) {
  constexpr int IN_WORD = sizeof(NUMBER) == 4 ? 1 : 2;
  raw.v = make_uint4(kept(raw.v.x, on, NUMBER()), kept(raw.v.y, on >> IN_WORD, NUMBER()),
                     kept(raw.v.z, on >> 2 * IN_WORD, NUMBER()), kept(raw.v.w, on >> 3 * IN_WORD, NUMBER()));
}

// grad cleared, and partials[block, :columns] = the sums over the block's rows. Threads keep to a piece of the columns;
// groups of them take the block's rows in turn, and are added up in order.
KERNEL void __launch_bounds__(THREADS) relu_and_sum(
    NUMBER* __restrict__ grad, int64 grad_ld, const NUMBER* __restrict__ activation, int64 ld,
    const unsigned char* __restrict__ bits, int64 bits_ld, int64 num_rows, int columns, float* __restrict__ partials) {
  SHARED float sums[SUMMED ? THREADS * EACH : 1];
  const int pieces = columns / EACH;
  const int width = pieces < THREADS ? pieces : THREADS;
  const int groups = THREADS / width;
  const int group = threadIdx.x / width;
  const int64 first = num_rows * blockIdx.x / gridDim.x + group;
  const int64 last = num_rows * (int64(blockIdx.x) + 1) / gridDim.x;
  for (int begin = 0; begin < pieces; begin += width) {
    const int column = (begin + int(threadIdx.x) % width) * EACH;
    float sum[EACH];
#pragma unroll
    for (int e = 0; e < EACH; ++e) sum[e] = 0;
    if (group < groups && column < columns) {
      for (int64 row = first; row < last; row += AHEAD * groups) {
        Raw own[AHEAD], output[AHEAD];
        uint32 on[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
          const int64 b = row + i * groups;
          if (b >= last) continue;
          fetch_piece(own[i], grad + b * grad_ld + column);
          if (MASK == 1) fetch_piece(output[i], activation + b * ld + column);
          if (MASK == 2) on[i] = uint32(bits[b * bits_ld + column / 8]) >> column % 8;
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
          const int64 b = row + i * groups;
          if (b >= last) continue;
          if (MASK == 1) {
            float v[EACH];
            numbers(v, output[i]);
            on[i] = 0;
#pragma unroll
            for (int e = 0; e < EACH; ++e) on[i] |= uint32(!(v[e] <= 0)) << e;
          }
          if (MASK) {
            keep(own[i], on[i]);
            write_piece(grad + b * grad_ld + column, own[i]);
          }
          if (SUMMED) {
            float v[EACH];
            numbers(v, own[i]);
#pragma unroll
            for (int e = 0; e < EACH; ++e) sum[e] += v[e];
          }
        }
      }
    }
    if (SUMMED) {
#pragma unroll
      for (int e = 0; e < EACH; ++e) sums[e * THREADS + threadIdx.x] = sum[e];
      __syncthreads();
      if (group == 0 && column < columns) {
        for (int e = 0; e < EACH; ++e) {
          float all = 0;
          for (int g = 0; g < groups; ++g) all += sums[e * THREADS + g * width + threadIdx.x];
          partials[int64(blockIdx.x) * columns + column + e] = all;
        }
      }
      __syncthreads();
    }
  }
}

// sums[column] = sum of the blocks' partials; 8 threads a column, in a fixed order.
KERNEL void __launch_bounds__(THREADS) add_partials(
    const float* __restrict__ partials, int blocks, int columns, float* __restrict__ target) {
  SHARED double sums[THREADS];
  const int column = blockIdx.x * LANES + threadIdx.x % LANES;
  double sum = 0;
  if (column < columns) {
#pragma unroll 8
    for (int block = threadIdx.x / LANES; block < blocks; block += THREADS / LANES) {
      sum += double(partials[int64(block) * columns + column]);
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x < LANES && column < columns) {
    for (int part = 1; part < THREADS / LANES; ++part) sum += sums[part * LANES + threadIdx.x];
    target[column] = float(sum);
  }
}
