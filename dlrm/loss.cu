// Binary cross-entropy on logits with its gradient: the kernels of loss_cuda.py, reference in loss.py.
//
// Shapes: B rows of this rank. Macros: LABEL, GRAD: element types.
//
// Float64 throughout, like the reference: sigmoid(x) - y cancels, and a batch has few rows. The sums are taken in an
// order that depends on B alone.
#include "dlrm/kernels.cuh"

#define THREADS 256

// The sum over the block, in the same order every time; every thread of the block calls it, thread 0 gets it.
DEVICE double block_sum(double value) {
  SHARED double sums[THREADS];
  sums[threadIdx.x] = value;
  __syncthreads();
  for (int half = THREADS / 2; half > 0; half /= 2) {
    if (int(threadIdx.x) < half) sums[threadIdx.x] += sums[threadIdx.x + half];
    __syncthreads();
  }
  return sums[0];
}

// partials[block] = sum of the block's losses; grad_out = (sigmoid(x) - y) / G * loss scale, 0 behind the valid rows.
KERNEL void __launch_bounds__(THREADS) loss_rows(
    const float* __restrict__ logits, const LABEL* __restrict__ labels, GRAD* __restrict__ grad_out, int64 num_rows,
    const float* __restrict__ scalars, const float* __restrict__ guard, double* __restrict__ partials) {
  const int64 b = int64(blockIdx.x) * THREADS + threadIdx.x;
  double loss = 0;
  if (b < num_rows) {
    double gradient = 0;
    if (b < int64(word(scalars, VALID_ROWS))) {
      const double x = logits[b], y = to_float(labels[b]);
      // exp of what is never positive: no overflow on either side.
      const double decay = exp(x < 0 ? x : -x);
      // x > 0 is false for NaN, which the logarithm keeps.
      loss = (x > 0 ? x : 0.0) - x * y + log1p(decay);
      gradient = ((x < 0 ? decay : 1.0) / (1.0 + decay) - y) * double(scalars[INVERSE_ROWS]) * double(guard[LOSS_SCALE]);
    }
    store(grad_out + b, float(gradient));
  }
  const double sum = block_sum(loss);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// loss = sum of the partials / G; one block.
KERNEL void __launch_bounds__(THREADS) sum_losses(
    const double* __restrict__ partials, int count, const float* __restrict__ scalars, double* __restrict__ loss) {
  double own = 0;
  for (int i = threadIdx.x; i < count; i += THREADS) own += partials[i];
  const double sum = block_sum(own);
  if (threadIdx.x == 0) *loss = sum * double(scalars[INVERSE_ROWS]);
}
