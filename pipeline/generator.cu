// Criteo-shaped rows out of a counter: the kernel of generator_cuda.py, reference in generator.py.
//
// Shapes: B rows, V 32-bit words of a Raw row, N dense columns, T tables, S segments of all tables' laws.
// Macros: LATENT = E, latent dimensions; STREAM, BYTES_MEAN, BYTES_SCALE, LOG2_E, UNIT, EXP2_0 .. EXP2_6: the
// constants of generator.py.
//
// A thread makes a row from its first word to its last, so that no order of sums depends on the launch. Float32 sums and
// products are each rounded by themselves (no fused multiply-add): the rows are the CPU's, bit for bit.
#include "dlrm/kernels.cuh"

// Each rounded by itself, whatever the compiler would like to fuse.
DEVICE float plus(float a, float b) { return __fadd_rn(a, b); }
DEVICE float times(float a, float b) { return __fmul_rn(a, b); }

DEVICE uint32 product_high(uint32 a, uint32 b) { return uint32((uint64(a) * b) >> 32); }

// Philox4x32-10, word after word: counter (row low, row high, block, STREAM).
struct Words {
  uint64 row, seed;
  uint32 block;
  int left;
  uint32 c[4];

  DEVICE Words(uint64 row_, uint64 seed_) : row(row_), seed(seed_), block(0), left(0) {}

  DEVICE uint32 next() {
    if (left == 0) make();
    const int at = 4 - left--;
    return at == 0 ? c[0] : at == 1 ? c[1] : at == 2 ? c[2] : c[3];
  }

  DEVICE void make() {
    uint32 c0 = uint32(row), c1 = uint32(row >> 32), c2 = block++, c3 = STREAM;
    uint32 key0 = uint32(seed), key1 = uint32(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const uint32 high0 = product_high(c0, 0xD2511F53u), low0 = c0 * 0xD2511F53u;
      const uint32 high1 = product_high(c2, 0xCD9E8D57u), low1 = c2 * 0xCD9E8D57u;
      c0 = high1 ^ c1 ^ key0;
      c1 = low1;
      c2 = high0 ^ c3 ^ key1;
      c3 = low0;
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    c[0] = c0, c[1] = c1, c[2] = c2, c[3] = c3;
    left = 4;
  }
};

// Sum of the four bytes, brought to mean 0 and variance 1.
DEVICE float bell(uint32 word) {
  const int total = (word & 255u) + ((word >> 8) & 255u) + ((word >> 16) & 255u) + (word >> 24);
  return times(float(total - BYTES_MEAN), BYTES_SCALE);
}

DEVICE uint32 hash32(uint32 key, uint32 salt) {
  uint32 z = (key * 0x9E3779B1u) ^ salt;
  z = (z ^ (z >> 16)) * 0x7FEB352Du;
  z = (z ^ (z >> 15)) * 0x846CA68Bu;
  return z ^ (z >> 16);
}

// A key's effect or coordinate.
DEVICE float value_of(uint32 key, uint64 salt, float mean, float scale) {
  return times(plus(bell(hash32(key, uint32(salt))), -mean), scale);
}

DEVICE float power_of_2(float y) {
  y = y < -60.0f ? -60.0f : y > 60.0f ? 60.0f : y;
  int whole = int(y);  // toward zero
  if (float(whole) > y) --whole;
  const float f = plus(y, -float(whole));
  float series = plus(times(EXP2_6, f), EXP2_5);
  series = plus(times(series, f), EXP2_4);
  series = plus(times(series, f), EXP2_3);
  series = plus(times(series, f), EXP2_2);
  series = plus(times(series, f), EXP2_1);
  series = plus(times(series, f), EXP2_0);
  return times(series, bits_to_float(uint32(whole + 127) << 23));
}

KERNEL void __launch_bounds__(128) generate_records(
    const int64* __restrict__ numbers, uint64 seed, const int64* __restrict__ hotness,
    const int64* __restrict__ law_starts, const uint64* __restrict__ limits, const int64* __restrict__ aliases,
    const uint64* __restrict__ firsts, const uint64* __restrict__ sizes, const uint64* __restrict__ salts,
    const float* __restrict__ means, const float* __restrict__ scales, const float* __restrict__ linear, float bias,
    int64 num_rows, int num_dense, int num_tables, int row_words, uint32* __restrict__ records,
    float* __restrict__ logits) {
  const int64 b = int64(blockIdx.x) * blockDim.x + threadIdx.x;
  if (b >= num_rows) return;
  uint32* record = records + b * row_words;
  Words words(uint64(numbers[b]), seed);
  const uint32 draw = words.next();
  float logit = bias;
  for (int n = 0; n < num_dense; ++n) {
    const float x = bell(words.next());
    record[1 + n] = float_to_bits(x);
    logit = plus(logit, times(x, linear[n]));
  }
  float total[LATENT] = {}, squares[LATENT] = {};
  uint32* keys = record + 1 + num_dense;
  for (int t = 0; t < num_tables; ++t) {
    float vector[LATENT] = {};
    const int64 start = law_starts[t];
    const uint64 count = uint64(law_starts[t + 1] - start);
    const int64 own = int64(t) * (1 + LATENT);
    for (int64 h = 0; h < hotness[t]; ++h) {
      const uint64 place = words.next() * count;
      int64 segment = start + int64(place >> 32);
      if ((place & 0xFFFFFFFFull) >= limits[segment]) segment = aliases[segment];
      const uint32 key = uint32(firsts[segment] + ((words.next() * sizes[segment]) >> 32));
      *keys++ = key;
      logit = plus(logit, value_of(key, salts[own], means[own], scales[own]));
#pragma unroll
      for (int e = 0; e < LATENT; ++e) {
        const int64 at = own + 1 + e;
        vector[e] = plus(vector[e], value_of(key, salts[at], means[at], scales[at]));
      }
    }
#pragma unroll
    for (int e = 0; e < LATENT; ++e) {
      total[e] = plus(total[e], vector[e]);
      squares[e] = plus(squares[e], times(vector[e], vector[e]));
    }
  }
#pragma unroll
  for (int e = 0; e < LATENT; ++e) {
    const float pairs = plus(times(total[e], total[e]), -squares[e]);
    logit = plus(logit, e % 2 ? -pairs : pairs);
  }
  logits[b] = logit;
  const float odds = plus(1.0f, power_of_2(-times(logit, LOG2_E)));
  record[0] = times(times(float(draw >> 8), UNIT), odds) < 1.0f;
}
