// Small passes around the matrix products of gemm_cuda.py. NUMBER: element type of activations. Sums over rows are in
// double from chunk to chunk, in an order that depends on the shape alone.
#include "dlrm/kernels.cuh"

#ifndef NUMBER
#define NUMBER half_t
#endif
#ifndef GRADIENT
#define GRADIENT float
#endif
#ifndef MASKED
#define MASKED 1
#endif

DEVICE bool off(NUMBER value) { return to_float(value) <= 0.0f; }

// wide[:, :columns] = max(wide[:, :columns] + bias, 0); a NaN stays.
KERNEL void bias_relu(NUMBER* wide, int64 ld, const NUMBER* bias, int64 rows, int columns) {
  const int64 at = int64(blockIdx.x) * blockDim.x + threadIdx.x;
  if (at >= rows * columns) return;
  const int64 row = at / columns;
  const int column = int(at - row * columns);
  NUMBER* target = wide + row * ld + column;
  const float sum = to_float(*target) + to_float(bias[column]);
  store(target, sum <= 0.0f ? 0.0f : sum);
}

// grad[:, :columns][activation <= 0] = 0. Whole 16-byte pieces where the layout allows it.
KERNEL void relu_mask(NUMBER* grad, int64 grad_ld, const NUMBER* activation, int64 ld, int64 rows, int columns) {
  const int each = 16 / int(sizeof(NUMBER));
  const int64 step = int64(gridDim.x) * blockDim.x, begin = int64(blockIdx.x) * blockDim.x + threadIdx.x;
  const bool whole = columns % each == 0 && grad_ld % each == 0 && ld % each == 0 &&
                     ((reinterpret_cast<uint64>(grad) | reinterpret_cast<uint64>(activation)) & 15) == 0;
  if (whole) {
    const int pieces = columns / each;
    for (int64 at = begin; at < rows * pieces; at += step) {
      const int64 row = at / pieces;
      const int column = int(at - row * pieces) * each;
      uint4* place = reinterpret_cast<uint4*>(grad + row * grad_ld + column);
      uint4 mine = *place;
      const uint4 theirs = read_16(activation + row * ld + column);
      NUMBER* values = reinterpret_cast<NUMBER*>(&mine);
      const NUMBER* outputs = reinterpret_cast<const NUMBER*>(&theirs);
#pragma unroll
      for (int i = 0; i < 16 / int(sizeof(NUMBER)); ++i) {
        if (off(outputs[i])) store(values + i, 0.0f);
      }
      *place = mine;
    }
    return;
  }
  for (int64 at = begin; at < rows * columns; at += step) {
    const int64 row = at / columns;
    const int column = int(at - row * columns);
    if (off(activation[row * ld + column])) store(grad + row * grad_ld + column, 0.0f);
  }
}

// One block sums 64 rows: partials[block, column]; with MASKED it applies relu_mask on the way.
KERNEL void sum_chunks(NUMBER* grad, int64 grad_ld, const NUMBER* activation, int64 ld, int64 rows, int columns, float* partials) {
  const int64 first = int64(blockIdx.x) * 64;
  const int64 last = first + 64 < rows ? first + 64 : rows;
  for (int column = threadIdx.x; column < columns; column += blockDim.x) {
    float sum = 0.0f;
    for (int64 row = first; row < last; ++row) {
      NUMBER* place = grad + row * grad_ld + column;
      float value = to_float(*place);
      if (MASKED && off(activation[row * ld + column])) {
        value = 0.0f;
        store(place, 0.0f);
      }
      sum += value;
    }
    partials[int64(blockIdx.x) * columns + column] = sum;
  }
}

// grad_bias[column] = sum of the chunks; 8 threads a column, in a fixed order.
KERNEL void sum_partials(const float* partials, int chunks, int columns, float* grad_bias) {
  SHARED double sums[8][32];
  const int lane = threadIdx.x % 32, part = threadIdx.x / 32;
  const int column = blockIdx.x * 32 + lane;
  double sum = 0.0;
  if (column < columns) {
    for (int chunk = part; chunk < chunks; chunk += 8) sum += double(partials[int64(chunk) * columns + column]);
  }
  sums[part][lane] = sum;
  __syncthreads();
  if (part == 0 && column < columns) {
    double total = 0.0;
    for (int i = 0; i < 8; ++i) total += sums[i][lane];
    grad_bias[column] = float(total);
  }
}

// out[row] = x[row] . weight + bias; one warp a row.
KERNEL void logit_forward(const NUMBER* x, int64 ld, const NUMBER* weight, const NUMBER* bias, int64 rows, int inputs, float* out) {
  const int64 row = (int64(blockIdx.x) * blockDim.x + threadIdx.x) / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;
  float sum = 0.0f;
  for (int i = lane; i < inputs; i += 32) sum += to_float(x[row * ld + i]) * to_float(weight[i]);
  for (int offset = 16; offset; offset /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, offset);
  if (lane == 0) store(out + row, sum + to_float(bias[0]));
}

// out[i, j] = a[i] b[j].
KERNEL void outer(const NUMBER* a, const NUMBER* b, int64 rows, int inputs, NUMBER* out, int64 ld) {
  const int64 step = int64(gridDim.x) * blockDim.x, begin = int64(blockIdx.x) * blockDim.x + threadIdx.x;
  if (inputs % 4 == 0 && ld % 4 == 0 && (reinterpret_cast<uint64>(b) & 15) == 0) {
    const int pieces = inputs / 4;
    for (int64 at = begin; at < rows * pieces; at += step) {
      const int64 row = at / pieces;
      const int column = int(at - row * pieces) * 4;
      write_4(out + row * ld + column, scaled(to_float(a[row]), read_4(b + column)));
    }
    return;
  }
  for (int64 at = begin; at < rows * inputs; at += step) {
    const int64 row = at / inputs;
    const int column = int(at - row * inputs);
    store(out + row * ld + column, to_float(a[row]) * to_float(b[column]));
  }
}

// partials[block, :inputs] = sum over the block's rows of grad x, partials[block, inputs] = sum of grad.
KERNEL void logit_weight_chunks(const NUMBER* grad, const NUMBER* x, int64 ld, int64 rows, int inputs, double* partials) {
  const int64 first = rows * blockIdx.x / gridDim.x, last = rows * (int64(blockIdx.x) + 1) / gridDim.x;
  double* mine = partials + int64(blockIdx.x) * (inputs + 1);
  for (int column = threadIdx.x; column <= inputs; column += blockDim.x) {
    double total = 0.0;
    for (int64 begin = first; begin < last; begin += 32) {
      const int64 end = begin + 32 < last ? begin + 32 : last;
      float sum = 0.0f;
      for (int64 row = begin; row < end; ++row) {
        const float factor = column < inputs ? to_float(x[row * ld + column]) : 1.0f;
        sum += to_float(grad[row]) * factor;
      }
      total += double(sum);
    }
    mine[column] = total;
  }
}

KERNEL void logit_weight_sum(const double* partials, int chunks, int inputs, GRADIENT* grad_weight, GRADIENT* grad_bias) {
  const int column = blockIdx.x * blockDim.x + threadIdx.x;
  if (column > inputs) return;
  double sum = 0.0;
  for (int chunk = 0; chunk < chunks; ++chunk) sum += partials[int64(chunk) * (inputs + 1) + column];
  if (column < inputs) {
    grad_weight[column] = GRADIENT(sum);
  } else {
    grad_bias[0] = GRADIENT(sum);
  }
}
