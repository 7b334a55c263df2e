// The layer with one output: the kernels of logit_cuda.py, references in logit.py.
//
// Shapes: B rows, I inputs. Macros: NUMBER: element type of activations and weights; EACH: numbers that a thread moves at
// a time, 16 bytes or one number; RELU: 1 if the gradient of x is to be that of the input of the ReLU that made x.
#include "dlrm/kernels.cuh"

#define LANES 32
#define THREADS 256
// Rows that a thread asks for together.
#define AHEAD 4

struct Piece { float v[EACH]; };

DEVICE void unpack_piece(Piece& piece, uint4 bits, float) {
  const float4 v = floats(bits);
  piece.v[0] = v.x, piece.v[1 % EACH] = v.y, piece.v[2 % EACH] = v.z, piece.v[3 % EACH] = v.w;
}
template <typename T>
DEVICE void unpack_piece(Piece& piece, uint4 bits, T) {
  const float2 a = unpack(T(), bits.x), b = unpack(T(), bits.y), c = unpack(T(), bits.z), d = unpack(T(), bits.w);
  piece.v[0] = a.x, piece.v[1 % EACH] = a.y, piece.v[2 % EACH] = b.x, piece.v[3 % EACH] = b.y;
  piece.v[4 % EACH] = c.x, piece.v[5 % EACH] = c.y, piece.v[6 % EACH] = d.x, piece.v[7 % EACH] = d.y;
}

DEVICE Piece read_piece(const NUMBER* source) {
  Piece piece;
  if (EACH == 1) piece.v[0] = to_float(*source);
  else unpack_piece(piece, read_16(source), NUMBER());
  return piece;
}

DEVICE void write_piece(NUMBER* target, const Piece& piece) {
  if (EACH == 1) {
    store(target, piece.v[0]);
  } else {
    write_4(target, make_float4(piece.v[0], piece.v[1 % EACH], piece.v[2 % EACH], piece.v[3 % EACH]));
    if (EACH == 8) write_4(target + 4, make_float4(piece.v[4 % EACH], piece.v[5 % EACH], piece.v[6 % EACH], piece.v[7 % EACH]));
  }
}

// out[b] = x[b] . weight + bias; one warp a row.
KERNEL void __launch_bounds__(THREADS) logit_forward(
    const NUMBER* __restrict__ x, const NUMBER* __restrict__ weight, const NUMBER* __restrict__ bias, int64 ld,
    int64 num_rows, int inputs, float* __restrict__ out) {
  const int64 b = (int64(blockIdx.x) * THREADS + threadIdx.x) / LANES;
  const int lane = threadIdx.x % LANES;
  if (b >= num_rows) return;
  float sum = 0;
  for (int i = lane * EACH; i < inputs; i += LANES * EACH) {
    const Piece own = read_piece(x + b * ld + i), factor = read_piece(weight + i);
#pragma unroll
    for (int e = 0; e < EACH; ++e) sum += own.v[e] * factor.v[e];
  }
  sum = warp_sum(sum);
  if (lane == 0) out[b] = sum + to_float(bias[0]);
}

// grad_x = grad weight, and partials[block] = [sum of grad x over the block's rows, sum of grad]. Threads keep to a piece
// of the columns; groups of them take the block's rows in turn, and are added up in order.
KERNEL void __launch_bounds__(THREADS) logit_backward(
    const NUMBER* __restrict__ grad, const NUMBER* __restrict__ x, const NUMBER* __restrict__ weight, int64 ld,
    int64 grad_ld, int64 num_rows, int inputs, NUMBER* __restrict__ grad_x, float* __restrict__ partials) {
  SHARED float sums[THREADS * (EACH + 1)];
  const int pieces = inputs / EACH;
  const int width = pieces < THREADS ? pieces : THREADS;
  const int groups = THREADS / width;
  const int group = threadIdx.x / width;
  const int64 first = num_rows * blockIdx.x / gridDim.x + group;
  const int64 last = num_rows * (int64(blockIdx.x) + 1) / gridDim.x;
  float* own_partials = partials + int64(blockIdx.x) * (inputs + 1);
  for (int begin = 0; begin < pieces; begin += width) {
    const int column = (begin + int(threadIdx.x) % width) * EACH;
    Piece sum;
#pragma unroll
    for (int e = 0; e < EACH; ++e) sum.v[e] = 0;
    float total = 0;
    if (group < groups && column < inputs) {
      const Piece factor = read_piece(weight + column);
      for (int64 row = first; row < last; row += AHEAD * groups) {
        Piece own[AHEAD];
        float g[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
          const int64 b = row + i * groups;
          g[i] = b < last ? to_float(grad[b]) : 0.0f;
          if (b < last) own[i] = read_piece(x + b * ld + column);
        }
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
          const int64 b = row + i * groups;
          if (b >= last) break;
          Piece result;
#pragma unroll
          for (int e = 0; e < EACH; ++e) {
            // A NaN of x lets its gradient through.
            result.v[e] = RELU && own[i].v[e] <= 0 ? 0.0f : g[i] * factor.v[e];
            sum.v[e] += g[i] * own[i].v[e];
          }
          total += g[i];
          write_piece(grad_x + b * grad_ld + column, result);
        }
      }
    }
#pragma unroll
    for (int e = 0; e < EACH; ++e) sums[e * THREADS + threadIdx.x] = sum.v[e];
    sums[EACH * THREADS + threadIdx.x] = total;
    __syncthreads();
    if (group == 0 && column < inputs) {
      for (int e = 0; e <= EACH; ++e) {
        float all = 0;
        for (int g = 0; g < groups; ++g) all += sums[e * THREADS + g * width + threadIdx.x];
        if (e < EACH) own_partials[column + e] = all;
        else if (column == 0) own_partials[inputs] = all;
      }
    }
    __syncthreads();
  }
}

// grad_weight, and grad_bias behind it, = the sums of the blocks; 8 threads a column, in a fixed order.
KERNEL void __launch_bounds__(THREADS) logit_sum(
    const float* __restrict__ partials, int blocks, int inputs, float* __restrict__ grad_weight,
    float* __restrict__ grad_bias) {
  SHARED double sums[THREADS];
  const int column = blockIdx.x * LANES + threadIdx.x % LANES;
  double sum = 0;
  if (column <= inputs) {
#pragma unroll 8
    for (int block = threadIdx.x / LANES; block < blocks; block += THREADS / LANES) {
      sum += double(partials[int64(block) * (inputs + 1) + column]);
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x < LANES && column <= inputs) {
    for (int part = 1; part < THREADS / LANES; ++part) sum += sums[part * LANES + threadIdx.x];
    *(column < inputs ? grad_weight + column : grad_bias) = float(sum);
  }
}
