// Dense optimisers over one flat array of parameters: the kernels of optim_cuda.py, references in optim.py.
//
// Macros: GRAD, COPY: element types of the gradient and of the weights that the products read; KIND: the optimiser;
// WITH_COPY: 1 if there are such weights.
#include "dlrm/kernels.cuh"

#define SGD 0
#define MOMENTUM 1
#define ADAGRAD 2
#define ADAM 3
#define FTRL 4

// The constants at scalars[DENSE], by kind (dlrm/optim.py: constants).
struct Constants {
  float lr, a, b, c, d, e, f, g;
  DEVICE Constants(const float* scalars)
      : lr(scalars[LR]), a(scalars[DENSE]), b(scalars[DENSE + 1]), c(scalars[DENSE + 2]), d(scalars[DENSE + 3]),
        e(scalars[DENSE + 4]), f(scalars[DENSE + 5]), g(scalars[DENSE + 6]) {}
};

// One parameter with its gradient, without the loss scale, and its state.
DEVICE void step(float& w, float g, float& first, float& second, const Constants& k) {
  if (KIND == SGD) {
    w -= k.lr * g;
  } else if (KIND == MOMENTUM) {
    first = k.a * first + g;
    w -= k.lr * first;
  } else if (KIND == ADAGRAD) {
    first += g * g;
    w -= k.lr * g / (sqrtf(first) + k.a);
  } else if (KIND == ADAM) {
    first = k.a * first + k.b * g;
    second = k.c * second + k.d * (g * g);
    w -= k.lr * (first / k.f) / (sqrtf(second / k.g) + k.e);
  } else {
    const float total = first + g * g;
    const float root = sqrtf(total);
    second += g - (root - sqrtf(first)) / k.lr * w;
    first = total;
    // Written so that a dual which is no number stays visible.
    w = fabsf(second) <= k.b ? 0.0f : -(second - copysignf(k.b, second)) / ((k.a + root) / k.lr + 2 * k.c);
  }
}

// Every thread has four parameters that neighbour each other; the last ones, fewer than four, go one by one.
KERNEL void __launch_bounds__(256) dense_step(
    float* __restrict__ parameters, const GRAD* __restrict__ gradients, float* __restrict__ firsts,
    float* __restrict__ seconds, COPY* __restrict__ weights, int64 count, const float* __restrict__ scalars,
    const float* __restrict__ guard) {
  if (blocked(guard)) return;
  const Constants k(scalars);
  if (KIND == FTRL && !(k.lr > 0)) return;  // the formula divides by the rate
  const float unscale = guard[UNSCALE];
  const int64 at = 4 * (int64(blockIdx.x) * blockDim.x + threadIdx.x);
  if (at + 4 <= count) {
    float4 w = *reinterpret_cast<const float4*>(parameters + at);
    const float4 g = scaled(unscale, stream_4(gradients + at));
    float4 first = make_float4(0, 0, 0, 0), second = first;
    if (KIND != SGD) first = *reinterpret_cast<const float4*>(firsts + at);
    if (KIND == ADAM || KIND == FTRL) second = *reinterpret_cast<const float4*>(seconds + at);
    step(w.x, g.x, first.x, second.x, k);
    step(w.y, g.y, first.y, second.y, k);
    step(w.z, g.z, first.z, second.z, k);
    step(w.w, g.w, first.w, second.w, k);
    write_4(parameters + at, w);
    if (KIND != SGD) write_4(firsts + at, first);
    if (KIND == ADAM || KIND == FTRL) write_4(seconds + at, second);
    if (WITH_COPY) write_4(weights + at, w);
    return;
  }
  for (int64 i = at; i < count; ++i) {
    float w = parameters[i], first = KIND != SGD ? firsts[i] : 0, second = KIND == ADAM || KIND == FTRL ? seconds[i] : 0;
    step(w, unscale * to_float(gradients[i]), first, second, k);
    parameters[i] = w;
    if (KIND != SGD) firsts[i] = first;
    if (KIND == ADAM || KIND == FTRL) seconds[i] = second;
    if (WITH_COPY) store(weights + i, w);
  }
}

DEVICE bool is_finite(float value) { return (float_to_bits(value) & 0x7f800000u) != 0x7f800000u; }

// Note in the guard whether a gradient is infinite or no number. All who write, write the same.
KERNEL void __launch_bounds__(256) check_finite(const GRAD* __restrict__ gradients, int64 count, float* guard) {
  bool fine = true;
  const int64 threads = int64(gridDim.x) * blockDim.x, own = int64(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64 at = 4 * own; at + 4 <= count; at += 4 * threads) {
    const float4 v = stream_4(gradients + at);
    fine &= is_finite(v.x) && is_finite(v.y) && is_finite(v.z) && is_finite(v.w);
  }
  if (own < count % 4) fine &= is_finite(to_float(gradients[count - 1 - own]));
  if (!fine) reinterpret_cast<uint32*>(guard)[NOT_FINITE] = 1;
}

KERNEL void begin_step(float* guard) { reinterpret_cast<uint32*>(guard)[NOT_FINITE] = 0; }

KERNEL void end_step(float* guard, int growth_interval, int dynamic, float smallest, float largest) {
  int* counts = reinterpret_cast<int*>(guard);
  if (counts[OVERFLOW]) return;
  float factor = 1;
  if (counts[NOT_FINITE]) {
    ++counts[SKIPPED_STEPS];
    counts[GOOD_STEPS] = 0;
    factor = 0.5f;
  } else if (++counts[GOOD_STEPS] >= growth_interval) {
    counts[GOOD_STEPS] = 0;
    factor = 2;
  }
  const float scale = guard[LOSS_SCALE] * factor;
  if (dynamic && scale >= smallest && scale <= largest) {
    guard[LOSS_SCALE] = scale;
    guard[UNSCALE] = 1 / scale;
  }
}
