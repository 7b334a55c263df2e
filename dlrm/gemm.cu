// Bias and ReLU where a matrix product of gemm_cuda.py leaves them out. NUMBER: element type of activations.
#include "dlrm/kernels.cuh"

#ifndef NUMBER
#define NUMBER half_t
#endif

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
