// Small passes around the matrix products of gemm_cuda.py. NUMBER: element type of activations. Sums over rows are in
// double from chunk to chunk, in an order that depends on the shape alone.
#include "dlrm/kernels.cuh"

#ifndef NUMBER
#define NUMBER half_t
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
