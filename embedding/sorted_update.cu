// Sum every row's gradient in the order of a row sort and update the row once: the kernels of sorted_update_cuda.py,
// reference in sorted_update.py.
//
// Shapes: T tables in one weight array of R rows, B bags a table, D columns, F places of the gradient, K keys in
// ascending order of their rows. Macros: DIM = D, a multiple of 4; WEIGHT, GRAD: element types; KIND: number of the
// optimiser in sparse_optim.KINDS; BAGS: 1 if there are offsets; WEIGHTED: 1 if keys have weights.
//
// A group of lanes takes a chunk of 64 keys. Runs of one row that lie in a chunk are summed and used at once; a run
// that crosses the chunk's ends leaves its partial sums behind, and finish_runs adds them up in their order. What is
// added to what depends on the batch alone, so that the result is the same every time.
#include "dlrm/kernels.cuh"

#define LANES 32
#define THREADS 256
#define CHUNK 64
// Chunks of a run that one warp adds up; longer runs are a block's, with the sums of whole stretches of chunks.
#define STRETCH 32

#define SGD 0
#define MOMENTUM 1
#define ADAGRAD 2
#define ROWWISE_ADAGRAD 3
#define ADAM 4
#define FTRL 5

enum Info { COUNT = 0, SHORT_RUNS = 1, LONG_RUNS = 2 };

constexpr int GROUP = DIM % 128 == 0 ? 32 : DIM % 64 == 0 ? 16 : DIM % 32 == 0 ? 8 : DIM % 16 == 0 ? 4 : DIM % 8 == 0 ? 2 : 1;
constexpr int PARTS = DIM / (4 * GROUP);
constexpr bool ROUNDED = sizeof(WEIGHT) == 2;
// SGD needs nothing of the old row: an addition that happens once a row is as good as reading, and nobody waits for it
// (the instruction takes subnormal numbers for 0).
constexpr bool ADDED = KIND == SGD && !ROUNDED && CROSSLANE_ARCH >= 90;
constexpr bool HAS_FIRST = KIND == MOMENTUM || KIND == ADAGRAD || KIND == ADAM || KIND == FTRL;
constexpr bool HAS_SECOND = KIND == ADAM || KIND == FTRL;
constexpr int MOST_AHEAD = ADDED ? 8 : HAS_SECOND ? 2 : 4;
constexpr int AHEAD = PARTS >= MOST_AHEAD ? 1 : (MOST_AHEAD / PARTS < GROUP ? MOST_AHEAD / PARTS : GROUP);

DEVICE float4 load_4(const float* source) { return *reinterpret_cast<const float4*>(source); }
template <typename T>
DEVICE float4 load_4(const T* source) { return floats<T>(*reinterpret_cast<const uint2*>(source)); }

// What an update reads and writes.
struct Tables {
  WEIGHT* weight;
  float* first;
  float* second;
  const float* scalars;
  float unscale;
  uint64 seed;
};

// Where a table's rows come from, so that the rounding of a row is the same wherever it lies.
struct Origin { uint32 tensor, row, column_block; };

DEVICE Origin origin_of(const int64* origins, const int64* row_start, uint32 table, uint32 row) {
  const int64* own = origins + 4 * table;
  return {uint32(own[0]), uint32(own[1] + (int64(row) - row_start[table]) * own[2]), uint32(own[3] / 4)};
}

// Round a number to one of its two neighbours, in expectation to itself.
DEVICE uint16 rounded(bfloat_t, float value, uint32 random) {
  const uint32 bits = float_to_bits(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return uint16(pack_bfloat(value, 0.0f));
  return uint16((bits + (random & 0xffffu)) >> 16);
}
DEVICE uint16 rounded(half_t, float value, uint32 random) {
  const uint32 bits = float_to_bits(value), magnitude = bits & 0x7fffffffu, sign = bits & 0x80000000u;
  const uint32 exponent = magnitude >> 23;
  if (exponent >= 113) {  // normal in half precision; infinite and no numbers stay what they are
    const uint32 up = exponent == 255 ? magnitude : (magnitude + (random & 0x1fffu)) & ~0x1fffu;
    return uint16(pack_half(bits_to_float(sign | up), 0.0f));
  }
  // Multiples of 2^-24: the mantissa loses the more bits the smaller the number is.
  const uint32 mantissa = exponent == 0 ? magnitude : (magnitude & 0x7fffffu) | 0x800000u;
  const uint32 lost = 126 - (exponent == 0 ? 1 : exponent);
  const uint32 kept = lost <= 31 ? (mantissa + (random & (0xffffffffu >> (32 - lost)))) >> lost
                                 : ((lost - 31 > 31 ? 0 : mantissa >> (lost - 31)) + (random >> 1)) >> 31;
  return uint16((sign >> 16) | kept);
}

DEVICE void put(float* target, float4 v, uint4) { write_4(target, v); }
template <typename T>
DEVICE void put(T* target, float4 v, uint4 random) {
  const uint32 low = rounded(T(), v.x, random.x) | uint32(rounded(T(), v.y, random.y)) << 16;
  const uint32 high = rounded(T(), v.z, random.z) | uint32(rounded(T(), v.w, random.w)) << 16;
  write_8(target, make_uint2(low, high));
}

// The formula of one column; `root` is a row-wise denominator.
DEVICE void step(const float* k, float& w, float g, float& first, float& second, float root) {
  const float lr = k[SPARSE];
  if (KIND == SGD) {
    w -= lr * g;
  } else if (KIND == MOMENTUM) {
    first = k[SPARSE + 1] * first + g;
    w -= lr * first;
  } else if (KIND == ADAGRAD) {
    first += g * g;
    w -= lr * g / (sqrtf(first) + k[SPARSE + 1]);
  } else if (KIND == ROWWISE_ADAGRAD) {
    w -= lr * g / root;
  } else if (KIND == ADAM) {
    first = k[SPARSE + 2] * first + k[SPARSE + 5] * g;
    second = k[SPARSE + 3] * second + k[SPARSE + 6] * g * g;
    w -= lr * first / (sqrtf(second) * k[SPARSE + 4] + k[SPARSE + 1]);
  } else {
    const float before = sqrtf(first);
    first += g * g;
    const float after = sqrtf(first);
    second += g - (after - before) / lr * w;
    const float l1 = k[SPARSE + 2];
    // Written so that a dual which is no number stays visible.
    w = fabsf(second) <= l1 ? 0.0f
                            : -(second - copysignf(l1, second)) / ((k[SPARSE + 1] + after) / lr + 2 * k[SPARSE + 3]);
  }
}

// A row across `WIDTH` lanes, each with N vectors of four columns; lane l has vectors l, l + WIDTH, ...
template <int WIDTH, int N>
struct Row {
  float4 w[N], first[N], second[N];
  float total;

  static DEVICE bool has(int part, int lane) { return (part * WIDTH + lane) * 4 < DIM; }

  DEVICE void load(const Tables& t, uint32 row, int lane) {
    if (ADDED) return;
#pragma unroll
    for (int p = 0; p < N; ++p) {
      if (!has(p, lane)) continue;
      const int64 at = int64(row) * DIM + (p * WIDTH + lane) * 4;
      w[p] = load_4(t.weight + at);
      if (HAS_FIRST) first[p] = load_4(t.first + at);
      if (HAS_SECOND) second[p] = load_4(t.second + at);
    }
    if (KIND == ROWWISE_ADAGRAD) total = t.first[row];
  }

  // One step with the row's summed gradient; the lanes of `members` come together.
  DEVICE void update(const Tables& t, uint32 row, int lane, uint32 members, const float4 (&sum)[N], Origin origin) {
    float root = 0;
    if (KIND == ROWWISE_ADAGRAD) {
      float square = 0;
#pragma unroll
      for (int p = 0; p < N; ++p) {
        if (!has(p, lane)) continue;
        const float4 g = scaled(t.unscale, sum[p]);
        square += g.x * g.x + g.y * g.y + g.z * g.z + g.w * g.w;
      }
#pragma unroll
      for (int bits = WIDTH / 2; bits > 0; bits /= 2) square += __shfl_xor_sync(members, square, bits, WIDTH);
      total += square / DIM;
      root = sqrtf(total) + t.scalars[SPARSE + 1];
      if (lane == 0) t.first[row] = total;
    }
#pragma unroll
    for (int p = 0; p < N; ++p) {
      if (!has(p, lane)) continue;
      const int column = (p * WIDTH + lane) * 4;
      const int64 at = int64(row) * DIM + column;
      const float4 g = scaled(t.unscale, sum[p]);
      if (ADDED) {
        reduce_add_4(reinterpret_cast<float*>(t.weight) + at, scaled(-t.scalars[SPARSE], g));
        continue;
      }
      if (!HAS_FIRST) first[p] = g;
      if (!HAS_SECOND) second[p] = g;
      step(t.scalars, w[p].x, g.x, first[p].x, second[p].x, root);
      step(t.scalars, w[p].y, g.y, first[p].y, second[p].y, root);
      step(t.scalars, w[p].z, g.z, first[p].z, second[p].z, root);
      step(t.scalars, w[p].w, g.w, first[p].w, second[p].w, root);
      uint4 random = make_uint4(0, 0, 0, 0);
      if (ROUNDED) {
        random = philox(origin.column_block + column / 4, origin.row, word(t.scalars, STEP_LOW), origin.tensor, t.seed);
      }
      put(t.weight + at, w[p], random);
      if (HAS_FIRST) write_4(t.first + at, first[p]);
      if (HAS_SECOND) write_4(t.second + at, second[p]);
    }
  }
};

DEVICE bool stays_out(const float* scalars, const float* guard) {
  // FTRL's formula divides by the rate.
  return blocked(guard) || (KIND == FTRL && scalars[SPARSE] == 0);
}

DEVICE Tables tables_of(WEIGHT* weight, float* first, float* second, const float* scalars, const float* guard) {
  return {weight, first, second, scalars, guard[UNSCALE],
          uint64(word(scalars, SEED_LOW)) | uint64(word(scalars, SEED_HIGH)) << 32};
}

// The bag that named a row.
DEVICE uint32 bag_of(const uint32* named, const uint32* bags, uint32 at) {
  return WEIGHTED ? bags[named[at]] : named[at];
}

// Sum the gradients of every chunk's runs: those that end in it are used; partials[0, c] is the sum of what a run that
// began before has in chunk c, partials[1, c] that of a run that begins in c and goes on.
KERNEL void __launch_bounds__(THREADS, ADDED ? 4 : 3) sum_chunks(
    const uint32* __restrict__ rows, const uint32* __restrict__ named, const uint32* __restrict__ bags, uint32* info,
    uint32 chunks, float* __restrict__ partials, uint32* __restrict__ open_runs, const int64* __restrict__ row_start,
    const int64* __restrict__ offsets, const float* __restrict__ key_weights, const unsigned char* __restrict__ mean,
    const int64* __restrict__ place, const int64* __restrict__ origins, uint32 num_rows, uint32 num_places,
    const GRAD* __restrict__ gradients, WEIGHT* weight, float* firsts, float* seconds,
    const float* __restrict__ scalars, const float* __restrict__ guard) {
  if (stays_out(scalars, guard)) return;
  const Tables tables = tables_of(weight, firsts, seconds, scalars, guard);
  const uint32 count = info[COUNT];
  const int lane = threadIdx.x % GROUP, group = threadIdx.x % LANES / GROUP;
  const uint32 members = GROUP == LANES ? ALL_LANES : ((1u << (GROUP % LANES)) - 1) << (group * GROUP);
  const uint32 chunk = blockIdx.x * (THREADS / GROUP) + threadIdx.x / GROUP;
  if (chunk >= chunks || chunk * CHUNK >= count) return;
  const uint32 begin = chunk * CHUNK, end = count - begin < CHUNK ? count : begin + CHUNK;

  bool open = begin > 0 && rows[begin - 1] == rows[begin];  // the run began before
  float4 sum[PARTS];
#pragma unroll
  for (int p = 0; p < PARTS; ++p) sum[p] = make_float4(0, 0, 0, 0);
  auto leave = [&](float* target) {
#pragma unroll
    for (int p = 0; p < PARTS; ++p) write_4(target + int64(chunk) * DIM + (p * GROUP + lane) * 4, sum[p]);
  };

#pragma unroll 1
  for (uint32 tile = begin; tile < end; tile += GROUP) {
    // Every lane looks one key up.
    const uint32 at = tile + lane;
    uint32 row = 0, table = 0, source = 0;
    float factor = 1;
    bool last = false;
    if (at < end) {
      row = rows[at];
      last = at + 1 == count || rows[at + 1] != row;
      const uint32 bag = bag_of(named, bags, at);
      table = bag / num_rows;
      source = (bag - table * num_rows) * num_places + uint32(place[table]);
      if (WEIGHTED) factor = key_weights[named[at]];
      if (BAGS && mean[table]) factor /= float(offsets[bag + 1] - offsets[bag]);
    }
    const uint32 ends = __ballot_sync(members, last) >> (group * GROUP);
#pragma unroll 1
    for (int j = 0; j < GROUP && tile + j < end; j += AHEAD) {
      float4 v[AHEAD][PARTS];
      Row<GROUP, PARTS> old[AHEAD];
      bool running = open;
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const uint32 from = __shfl_sync(members, source, j + i, GROUP);
        const uint32 of = __shfl_sync(members, row, j + i, GROUP);
        if (tile + j + i < end) {
#pragma unroll
          for (int p = 0; p < PARTS; ++p) v[i][p] = stream_4(gradients + int64(from) * DIM + (p * GROUP + lane) * 4);
          if (ends >> (j + i) & 1) {
            if (!running) old[i].load(tables, of, lane);
            running = false;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < AHEAD; ++i) {
        const uint32 of = __shfl_sync(members, row, j + i, GROUP);
        const uint32 in = ROUNDED ? __shfl_sync(members, table, j + i, GROUP) : 0;
        const float by = BAGS ? __shfl_sync(members, factor, j + i, GROUP) : 1.0f;
        if (tile + j + i < end) {
#pragma unroll
          for (int p = 0; p < PARTS; ++p) sum[p] = BAGS ? add_scaled(sum[p], by, v[i][p]) : add(sum[p], v[i][p]);
          if (ends >> (j + i) & 1) {
            if (open) {
              leave(partials);
            } else {
              old[i].update(tables, of, lane, members, sum,
                            ROUNDED ? origin_of(origins, row_start, in, of) : Origin{0, 0, 0});
            }
            open = false;
#pragma unroll
            for (int p = 0; p < PARTS; ++p) sum[p] = make_float4(0, 0, 0, 0);
          }
        }
      }
    }
  }
  if (end == count || rows[end] != rows[end - 1]) return;
  if (open) {
    leave(partials);
    return;
  }
  leave(partials + int64(chunks) * DIM);
  if (lane == 0) {
    const uint64 far = uint64(begin) + CHUNK * STRETCH;
    const bool is_long = far < count && rows[far] == rows[end];
    if (is_long) open_runs[chunks - 1 - atomicAdd(&info[LONG_RUNS], 1u)] = chunk;
    else open_runs[atomicAdd(&info[SHORT_RUNS], 1u)] = chunk;
  }
}

constexpr int OWN = (DIM / 4 + LANES - 1) / LANES;  // vectors that a lane of a whole warp has
typedef Row<LANES, OWN> WarpRow;

DEVICE void add_vectors(float4 (&sum)[OWN], const float* source, int lane) {
#pragma unroll
  for (int p = 0; p < OWN; ++p) {
    if (WarpRow::has(p, lane)) sum[p] = add(sum[p], load_4(source + (p * LANES + lane) * 4));
  }
}

// stretches[s] = sum of the partials of chunks 32 s .. 32 s + 31, where one run that began before fills them all.
KERNEL void __launch_bounds__(THREADS) sum_stretches(
    const uint32* __restrict__ rows, const uint32* __restrict__ info, uint32 chunks, float* __restrict__ partials,
    const float* __restrict__ scalars, const float* __restrict__ guard) {
  if (stays_out(scalars, guard)) return;
  const int lane = threadIdx.x % LANES;
  const uint32 stretch = blockIdx.x * (THREADS / LANES) + threadIdx.x / LANES;
  const uint64 begin = uint64(stretch) * STRETCH * CHUNK, end = begin + STRETCH * CHUNK;
  if (stretch == 0 || end > info[COUNT] || rows[begin - 1] != rows[end - 1]) return;
  float4 sum[OWN];
#pragma unroll
  for (int p = 0; p < OWN; ++p) sum[p] = make_float4(0, 0, 0, 0);
#pragma unroll 8
  for (int chunk = 0; chunk < STRETCH; ++chunk) {
    add_vectors(sum, partials + (int64(stretch) * STRETCH + chunk) * DIM, lane);
  }
  float* target = partials + (2 * int64(chunks) + stretch) * DIM;
#pragma unroll
  for (int p = 0; p < OWN; ++p) {
    if (WarpRow::has(p, lane)) write_4(target + (p * LANES + lane) * 4, sum[p]);
  }
}

// How many chunks from `first` on begin with `row`; the whole warp searches.
DEVICE uint32 chunks_of_row(const uint32* rows, uint32 count, uint32 first, uint32 chunks, uint32 row) {
  const uint32 lane = threadIdx.x % LANES;
  uint32 low = first, high = chunks;
  while (low < high) {
    const uint32 step = (high - low + LANES - 1) / LANES;
    const uint64 probe = uint64(low) + lane * step;
    const bool same = probe < high && probe * CHUNK < count && rows[probe * CHUNK] == row;
    const uint32 before = __popc(__ballot_sync(ALL_LANES, same));
    const uint32 end = low + before * step;
    if (before > 0) low += (before - 1) * step + 1;
    high = end < high ? end : high;
  }
  return low - first;
}

// Add up the partial sums of the runs that cross chunks, and update their rows: long runs by blocks, short by warps.
KERNEL void __launch_bounds__(THREADS) finish_runs(
    const uint32* __restrict__ rows, const uint32* __restrict__ named, const uint32* __restrict__ bags,
    const uint32* __restrict__ info, uint32 chunks, const float* __restrict__ partials,
    const uint32* __restrict__ open_runs, const int64* __restrict__ row_start, const int64* __restrict__ origins,
    uint32 num_rows, WEIGHT* weight, float* firsts, float* seconds, const float* __restrict__ scalars,
    const float* __restrict__ guard) {
  SHARED float4 shares[THREADS / LANES][OWN * LANES];
  if (stays_out(scalars, guard)) return;
  const Tables tables = tables_of(weight, firsts, seconds, scalars, guard);
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, warps = THREADS / LANES;
  const uint32 count = info[COUNT];
  const float* begins = partials + int64(chunks) * DIM;
  const float* stretches = begins + int64(chunks) * DIM;

  auto update = [&](uint32 chunk, uint32 row, const float4 (&sum)[OWN]) {
    Origin origin = {0, 0, 0};
    if (ROUNDED) origin = origin_of(origins, row_start, bag_of(named, bags, chunk * CHUNK + CHUNK - 1) / num_rows, row);
    WarpRow old;
    old.load(tables, row, lane);
    old.update(tables, row, lane, ALL_LANES, sum, origin);
  };

  for (uint32 item = blockIdx.x; item < info[LONG_RUNS]; item += gridDim.x) {
    const uint32 chunk = open_runs[chunks - 1 - item], first = chunk + 1, row = rows[chunk * CHUNK + CHUNK - 1];
    const uint32 last = first + chunks_of_row(rows, count, first, chunks, row);  // behind the run's last chunk
    // Chunks to the next whole stretch, the stretches that the run fills, and the chunks behind them.
    const uint32 whole = (first + STRETCH - 1) / STRETCH;
    // The run's last chunk may hold other rows too: only the chunks before it are surely full.
    const uint32 whole_end = (last - 1) / STRETCH > whole ? (last - 1) / STRETCH : whole;
    const uint32 head = whole * STRETCH - first, middle = whole_end - whole;
    const uint32 pieces = whole_end == whole ? last - first : head + middle + (last - whole_end * STRETCH);
    float4 sum[OWN];
#pragma unroll
    for (int p = 0; p < OWN; ++p) sum[p] = make_float4(0, 0, 0, 0);
    const uint32 piece_end = uint32(uint64(pieces) * (warp + 1) / warps);
#pragma unroll 4
    for (uint32 piece = uint32(uint64(pieces) * warp / warps); piece < piece_end; ++piece) {
      const float* source = piece < head || middle == 0 ? partials + int64(first + piece) * DIM
                            : piece < head + middle     ? stretches + int64(whole + piece - head) * DIM
                                                        : partials + int64(whole_end * STRETCH + piece - head - middle) * DIM;
      add_vectors(sum, source, lane);
    }
#pragma unroll
    for (int p = 0; p < OWN; ++p) shares[warp][p * LANES + lane] = sum[p];
    __syncthreads();
    if (warp == 0) {
#pragma unroll
      for (int p = 0; p < OWN; ++p) sum[p] = make_float4(0, 0, 0, 0);
      add_vectors(sum, begins + int64(chunk) * DIM, lane);
      for (int w = 0; w < warps; ++w) {
#pragma unroll
        for (int p = 0; p < OWN; ++p) sum[p] = add(sum[p], shares[w][p * LANES + lane]);
      }
      update(chunk, row, sum);
    }
    __syncthreads();
  }

  for (uint32 item = blockIdx.x * warps + warp; item < info[SHORT_RUNS]; item += gridDim.x * warps) {
    const uint32 chunk = open_runs[item], row = rows[chunk * CHUNK + CHUNK - 1];
    const uint64 probe = (uint64(chunk) + 1 + lane) * CHUNK;
    const uint32 more = __popc(__ballot_sync(ALL_LANES, probe < count && rows[probe] == row));
    float4 sum[OWN];
#pragma unroll
    for (int p = 0; p < OWN; ++p) sum[p] = make_float4(0, 0, 0, 0);
    add_vectors(sum, begins + int64(chunk) * DIM, lane);
#pragma unroll 4
    for (uint32 i = 0; i < more; ++i) add_vectors(sum, partials + (int64(chunk) + 1 + i) * DIM, lane);
    update(chunk, row, sum);
  }
}
