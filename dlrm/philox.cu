// Random initial values, the CPU's bit for bit: the kernels of philox_cuda.py, references in philox.py.
//
// Shapes: R rows, C columns of the output, whose rows lie `stride` apart. Macros: OUT: its element type; LOG_SERIES,
// SIN_SERIES, COS_SERIES, LOG_2, SQRT_HALF, TWO_PI: the constants of philox.py.
//
// Arithmetic is in double, products and sums rounded each by itself. A thread has four columns of a row: one counter.
#include "dlrm/kernels.cuh"

// Round to float so that a second rounding to fewer bits gives what one would: to odd where it is not exact.
DEVICE float to_odd(double value) {
  const float near = float(value);
  if (double(near) == value || value != value) return near;
  uint32 bits = float_to_bits(near);
  if ((near < 0 ? -double(near) : double(near)) > (value < 0 ? -value : value)) --bits;
  return bits_to_float(bits | 1);
}

DEVICE void put(float* target, double value) { *target = float(value); }
template <typename T>
DEVICE void put(T* target, double value) { store(target, to_odd(value)); }

template <int N>
DEVICE double horner(const double (&series)[N], double x) {
  double total = series[0];
#pragma unroll
  for (int k = 1; k < N; ++k) total = plus(times(total, x), series[k]);
  return total;
}

DEVICE double logarithm(double x) {
  const double series[] = {LOG_SERIES};
  int exponent;
  double mantissa = frexp(x, &exponent);
  if (mantissa < SQRT_HALF) {
    mantissa *= 2.0;
    --exponent;
  }
  const double f = mantissa - 1.0;
  const double s = f / (2.0 + f);
  return plus(times(double(exponent), LOG_2), times(s, horner(series, times(s, s))));
}

// Cosine and sine of 2 pi t, 0 <= t < 1; the quarter turns are taken off before pi comes in.
DEVICE void cos_sin_turns(double turns, double& cosine, double& sine) {
  const double sines[] = {SIN_SERIES}, cosines[] = {COS_SERIES};
  const double quarter = floor(4.0 * turns + 0.5);
  const double x = times(TWO_PI, turns - 0.25 * quarter);
  const double square = times(x, x);
  const double s = times(horner(sines, square), x), c = horner(cosines, square);
  const int turn = int(quarter) % 4;
  cosine = turn == 0 ? c : turn == 1 ? -s : turn == 2 ? -c : s;
  sine = turn == 0 ? s : turn == 1 ? c : turn == 2 ? -s : -c;
}

DEVICE void normal_pair(uint32 word0, uint32 word1, double scale, double& first, double& second) {
  const double radius = sqrt(-2.0 * logarithm((double(word0) + 0.5) / 4294967296.0));
  double cosine, sine;
  cos_sin_turns((double(word1) + 0.5) / 4294967296.0, cosine, sine);
  first = times(times(radius, cosine), scale);
  second = times(times(radius, sine), scale);
}

DEVICE double uniform(uint32 word, double scale) {
  return times((double(word) + 0.5) / 2147483648.0 - 1.0, scale);
}

// `values` of a counter into columns column .. column + 3, those that are there.
DEVICE void put_4(OUT* row, int64 column, int64 columns, const double (&values)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (column + i >= 0 && column + i < columns) put(row + column + i, values[i]);
  }
}

// out[r, c] = uniform of row start + r * step, column first_column + c.
KERNEL void __launch_bounds__(256) uniform_rows(
    uint64 seed, uint64 tensor, uint64 start, uint64 step, int64 first_column, double scale, int64 rows, int64 columns,
    int64 stride, OUT* __restrict__ out) {
  const int64 first = first_column / 4, counters = (first_column + columns + 3) / 4 - first;
  const int64 threads = int64(gridDim.x) * blockDim.x;
  for (int64 item = int64(blockIdx.x) * blockDim.x + threadIdx.x; item < rows * counters; item += threads) {
    const int64 r = item / counters, counter = first + item % counters;
    const uint64 row = start + uint64(r) * step;
    const uint4 words = philox(uint32(counter), uint32(row), uint32(row >> 32), uint32(tensor), seed);
    const double values[] = {uniform(words.x, scale), uniform(words.y, scale), uniform(words.z, scale),
                             uniform(words.w, scale)};
    put_4(out + r * stride, 4 * counter - first_column, columns, values);
  }
}

// out[r, c] = normal of row start + r, column c.
KERNEL void __launch_bounds__(256) normal_rows(
    uint64 seed, uint64 tensor, uint64 start, double scale, int64 rows, int64 columns, int64 stride,
    OUT* __restrict__ out) {
  const int64 counters = (columns + 3) / 4;
  const int64 threads = int64(gridDim.x) * blockDim.x;
  for (int64 item = int64(blockIdx.x) * blockDim.x + threadIdx.x; item < rows * counters; item += threads) {
    const int64 r = item / counters, counter = item % counters;
    const uint64 row = start + uint64(r);
    const uint4 words = philox(uint32(counter), uint32(row), uint32(row >> 32), uint32(tensor), seed);
    double values[4];
    normal_pair(words.x, words.y, scale, values[0], values[1]);
    normal_pair(words.z, words.w, scale, values[2], values[3]);
    put_4(out + r * stride, 4 * counter, columns, values);
  }
}
