// Sum every row's gradient in the order of a row sort and update the row once: the kernels of sorted_update_cuda.py,
// reference in sorted_update.py.
//
// Shapes: T tables in one weight array of R rows, B bags a table, D columns, F places of the gradient, K keys in
// ascending order of their rows. Macros: DIM = D, a multiple of 4; WEIGHT, GRAD: element types; KIND: number of the
// optimiser in sparse_optim.KINDS; BAGS: 1 if there are offsets; WEIGHTED: 1 if keys have weights; MOST_AHEAD: keys whose
// gradients of 16 bits are under way, a power of two; SUM_BLOCKS: blocks of a multiprocessor that sum chunks; CACHED: 1 if
// gradients of bags go through the first-level cache.
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
// Keys whose gradients are under way, and rows that are read before they are updated.
constexpr int WIDTH = MOST_AHEAD * 2 / sizeof(GRAD);
constexpr int AHEAD = PARTS >= WIDTH ? 1 : (WIDTH / PARTS < GROUP ? WIDTH / PARTS : GROUP);
constexpr int MOST_OLD = ADDED ? AHEAD : (HAS_SECOND ? 2 : 4) / PARTS;
constexpr int OLD = MOST_OLD < 1 ? 1 : MOST_OLD < AHEAD ? MOST_OLD : AHEAD;

DEVICE float4 load_4(const float* source) { return *reinterpret_cast<const float4*>(source); }
template <typename T>
DEVICE float4 load_4(const T* source) { return floats<T>(*reinterpret_cast<const uint2*>(source)); }

// Four numbers as they come from memory.
template <int SIZE>
struct Raw { uint4 bits; };
template <>
struct Raw<2> { uint2 bits; };
DEVICE float4 numbers(Raw<4> raw, float) { return floats(raw.bits); }
template <typename T>
DEVICE float4 numbers(Raw<2> raw, T) { return floats<T>(raw.bits); }

// What an update reads and writes, from the lane's first column on; `totals` are row-wise.
struct Tables {
  WEIGHT* weight;
  float* first;
  float* second;
  float* totals;
  const float* scalars;
  float unscale, lr, eps;
  uint64 seed;
};

// Where a shard's rows come from, so that the rounding of a row is the same wherever it lies.
struct Origin { uint32 tensor, row, column_block; };

DEVICE Origin origin_of(const int64* origins, uint32 shard, uint32 row) {
  const int64* own = origins + 5 * shard;
  return {uint32(own[0]), uint32(own[1] + (int64(row) - own[4]) * own[2]), uint32(own[3] / 4)};
}

// The shard that a row of the store lies in: the last one that begins there or before.
DEVICE uint32 shard_of(const int64* origins, uint32 num_shards, uint32 row) {
  uint32 low = 0, high = num_shards - 1;
  while (low < high) {
    const uint32 middle = (low + high + 1) / 2;
    if (origins[5 * middle + 4] <= row) low = middle;
    else high = middle - 1;
  }
  return low;
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

// The formula of one column; `rate` is a row-wise one.
DEVICE void step(const Tables& t, float& w, float g, float& first, float& second, float rate) {
  const float* k = t.scalars;
  const float lr = t.lr, eps = t.eps;
  if (KIND == SGD) {
    w -= lr * g;
  } else if (KIND == MOMENTUM) {
    first = eps * first + g;
    w -= lr * first;
  } else if (KIND == ADAGRAD) {
    first += g * g;
    w -= lr * g / (sqrtf(first) + eps);
  } else if (KIND == ROWWISE_ADAGRAD) {
    w -= rate * g;
  } else if (KIND == ADAM) {
    first = k[SPARSE + 2] * first + k[SPARSE + 5] * g;
    second = k[SPARSE + 3] * second + k[SPARSE + 6] * g * g;
    w -= lr * first / (sqrtf(second) * k[SPARSE + 4] + eps);
  } else {
    const float before = sqrtf(first);
    first += g * g;
    const float after = sqrtf(first);
    second += g - (after - before) / lr * w;
    const float l1 = k[SPARSE + 2];
    // Written so that a dual which is no number stays visible.
    w = fabsf(second) <= l1 ? 0.0f
                            : -(second - copysignf(l1, second)) / ((eps + after) / lr + 2 * k[SPARSE + 3]);
  }
}

// A row across `SPAN` lanes, each with N vectors of four columns; lane l has vectors l, l + SPAN, ...
template <int SPAN, int N>
struct Row {
  Raw<sizeof(WEIGHT)> w[N];
  Raw<4> first[N], second[N];
  float total;

  static DEVICE bool has(int part, int lane) { return (part * SPAN + lane) * 4 < DIM; }
  // From a lane's first column on.
  static DEVICE uint64 place(uint32 row, int part) { return uint64(row) * DIM + part * SPAN * 4; }

  // Where it is not `wanted`, some row, in vain: a branch would wait for the loads before it.
  DEVICE void load(const Tables& t, uint32 row, int lane, bool wanted) {
    if (ADDED) return;
    if (!wanted) row = 0;
#pragma unroll
    for (int p = 0; p < N; ++p) {
      if (!has(p, lane)) continue;
      fetch(w[p].bits, t.weight + place(row, p));
      if (HAS_FIRST) fetch(first[p].bits, t.first + place(row, p));
      if (HAS_SECOND) fetch(second[p].bits, t.second + place(row, p));
    }
    if (KIND == ROWWISE_ADAGRAD) fetch(total, t.totals + row);
  }

  // One step with the row's summed gradient; the lanes of `members` come together.
  DEVICE void update(const Tables& t, uint32 row, int lane, uint32 members, const float4 (&sum)[N], Origin origin) {
    float rate = 0;
    if (KIND == ROWWISE_ADAGRAD) {
      float square = 0;
#pragma unroll
      for (int p = 0; p < N; ++p) {
        if (!has(p, lane)) continue;
        const float4 g = scaled(t.unscale, sum[p]);
        square += g.x * g.x + g.y * g.y + g.z * g.z + g.w * g.w;
      }
#pragma unroll
      for (int bits = SPAN / 2; bits > 0; bits /= 2) square += __shfl_xor_sync(members, square, bits, SPAN);
      total += square / DIM;
      rate = t.lr / (sqrtf(total) + t.eps);
      if (lane == 0) write_float(t.totals + row, total);
    }
#pragma unroll
    for (int p = 0; p < N; ++p) {
      if (!has(p, lane)) continue;
      const float4 g = scaled(t.unscale, sum[p]);
      if (ADDED) {
        reduce_add_4(reinterpret_cast<float*>(t.weight) + place(row, p), scaled(-t.lr, g));
        continue;
      }
      float4 v = numbers(w[p], WEIGHT());
      float4 one = HAS_FIRST ? numbers(first[p], 0.0f) : g, two = HAS_SECOND ? numbers(second[p], 0.0f) : g;
      step(t, v.x, g.x, one.x, two.x, rate);
      step(t, v.y, g.y, one.y, two.y, rate);
      step(t, v.z, g.z, one.z, two.z, rate);
      step(t, v.w, g.w, one.w, two.w, rate);
      uint4 random = make_uint4(0, 0, 0, 0);
      if (ROUNDED) {
        const uint32 block = origin.column_block + (p * SPAN + lane);
        random = philox(block, origin.row, word(t.scalars, STEP_LOW), origin.tensor, t.seed);
      }
      put(t.weight + place(row, p), v, random);
      if (HAS_FIRST) write_4(t.first + place(row, p), one);
      if (HAS_SECOND) write_4(t.second + place(row, p), two);
    }
  }
};

DEVICE bool stays_out(const float* scalars, const float* guard) {
  // FTRL's formula divides by the rate.
  return blocked(guard) || (KIND == FTRL && scalars[SPARSE] == 0);
}

DEVICE Tables tables_of(
    WEIGHT* weight, float* first, float* second, const float* scalars, const float* guard, int lane) {
  return {settled(weight + lane * 4), settled(first + lane * 4), settled(second + lane * 4), first, scalars, guard[UNSCALE], scalars[SPARSE], scalars[SPARSE + 1],
          uint64(word(scalars, SEED_LOW)) | uint64(word(scalars, SEED_HIGH)) << 32};
}

// The bag that named a row.
DEVICE uint32 bag_of(const uint32* named, const uint32* bags, uint32 at) {
  return WEIGHTED ? bags[named[at]] : named[at];
}

typedef Raw<sizeof(GRAD)> RawGrad;

// A bag that names a row several times is its run's neighbour: the first-level cache spares the second and further reads.
DEVICE Raw<4> read_raw(const float* source) { return {BAGS && CACHED ? read_16(source) : stream_16(source)}; }
template <typename T>
DEVICE Raw<2> read_raw(const T* source) { return {BAGS && CACHED ? read_8(source) : stream_8(source)}; }

// What a lane knows of its key: the row, what named it, and the rows beside it in the order.
struct Key {
  uint32 row, named, before, behind;

  DEVICE void load(const uint32* rows, const uint32* names, uint32 at, uint32 count) {
    if (at >= count) at = count - 1;  // read in vain
    row = rows[at];
    named = names[at];
    before = at > 0 ? rows[at - 1] : ~row;
    behind = at + 1 < count ? rows[at + 1] : ~row;
  }
};

// Have a row on its way; lanes ask for rows of their own.
DEVICE void prefetch_row(const Tables& t, uint32 row, int lane) {
  const int64 at = int64(row) * DIM - lane * 4;
#pragma unroll
  for (int column = 0; column < DIM; column += 128 / int(sizeof(WEIGHT))) prefetch(t.weight + at + column);
#pragma unroll
  for (int column = 0; column < DIM; column += 32) {
    if (HAS_FIRST) prefetch(t.first + at + column);
    if (HAS_SECOND) prefetch(t.second + at + column);
  }
  if (KIND == ROWWISE_ADAGRAD) prefetch(t.totals + row);
}

// Sum the gradients of every chunk's runs: those that end in it are used; partials[0, c] is the sum of what a run that
// began before has in chunk c, partials[1, c] that of a run that begins in c and goes on. Groups of lanes take turns at
// the chunks, each with its next keys on their way.
KERNEL void __launch_bounds__(THREADS, SUM_BLOCKS) sum_chunks(
    const uint32* __restrict__ rows, const uint32* __restrict__ named, const uint32* __restrict__ bags, uint32* info,
    uint32 chunks, float* __restrict__ partials, uint32* __restrict__ open_runs, const int64* __restrict__ offsets,
    const float* __restrict__ key_weights, const unsigned char* __restrict__ mean,
    const int64* __restrict__ place, const int64* __restrict__ origins, uint32 num_shards, uint32 num_rows,
    uint32 num_places, const GRAD* __restrict__ gradients, WEIGHT* weight, float* firsts, float* seconds,
    const float* __restrict__ scalars, const float* __restrict__ guard) {
  if (stays_out(scalars, guard)) return;
  const uint32 count = info[COUNT];
  const int lane = threadIdx.x % LANES % GROUP, group = threadIdx.x % LANES / GROUP;
  const uint32 members = GROUP == LANES ? ALL_LANES : ((1u << (GROUP % LANES)) - 1) << (group * GROUP);
  const uint32 groups = gridDim.x * (THREADS / GROUP);
  const Tables tables = tables_of(weight, firsts, seconds, scalars, guard, lane);
  const GRAD* own_gradients = settled(gradients + lane * 4);
  uint32 chunk = blockIdx.x * (THREADS / GROUP) + threadIdx.x / GROUP;
  if (uint64(chunk) * CHUNK >= count) return;
  Key next;
  next.load(rows, named, chunk * CHUNK + lane, count);

  float4 sum[PARTS];
  auto clear = [&]() {
#pragma unroll
    for (int p = 0; p < PARTS; ++p) sum[p] = make_float4(0, 0, 0, 0);
  };
  auto leave = [&](float* target) {
#pragma unroll
    for (int p = 0; p < PARTS; ++p) write_4(target + int64(chunk) * DIM + (p * GROUP + lane) * 4, sum[p]);
  };

#pragma unroll 1
  for (; uint64(chunk) * CHUNK < count; chunk += groups) {
    const uint32 begin = chunk * CHUNK;
    bool open = false;  // whether the run began before the chunk
    uint32 row = 0, ends = 0;
    clear();
#pragma unroll 1
    for (uint32 tile = begin; tile < begin + CHUNK && tile < count; tile += GROUP) {
      // Every lane looks one key up. Behind the last one that is repeated, and added to a sum that nobody uses.
      const uint32 at = tile + lane;
      row = next.row;
      const bool last = at < count && next.behind != row;
      if (tile == begin) open = __shfl_sync(members, next.before == row, 0, GROUP);
      if (last && !ADDED) prefetch_row(tables, row, lane);
      const uint32 bag = WEIGHTED ? bags[next.named] : next.named, table = bag / num_rows;
      const uint32 shard = ROUNDED ? shard_of(origins, num_shards, row) : 0;
      const uint32 source = (bag - table * num_rows) * num_places + uint32(place[table]);
      float factor = WEIGHTED ? key_weights[next.named] : 1.0f;
      if (BAGS && mean[table]) factor /= float(offsets[bag + 1] - offsets[bag]);
      ends = __ballot_sync(members, last) >> (group * GROUP);
      const bool in_chunk = tile + GROUP < begin + CHUNK;
      const uint64 following = in_chunk ? uint64(tile) + GROUP : uint64(chunk + uint64(groups)) * CHUNK;
      if (following < count) next.load(rows, named, uint32(following) + lane, count);

#pragma unroll 1
      for (int j = 0; j < GROUP && tile + j < count; j += AHEAD) {
        RawGrad raw[AHEAD][PARTS];
#pragma unroll
        for (int i = 0; i < AHEAD; ++i) {
          const uint32 from = __shfl_sync(members, source, j + i, GROUP);
#pragma unroll
          for (int p = 0; p < PARTS; ++p) raw[i][p] = read_raw(own_gradients + uint64(from) * DIM + p * GROUP * 4);
        }
        auto add_key = [&](int i) {
          const float by = BAGS ? __shfl_sync(members, factor, j + i, GROUP) : 1.0f;
#pragma unroll
          for (int p = 0; p < PARTS; ++p) {
            const float4 v = numbers(raw[i][p], GRAD());
            sum[p] = BAGS ? add_scaled(sum[p], by, v) : add(sum[p], v);
          }
        };
        const uint32 here = ends >> j & ((2u << (AHEAD - 1)) - 1);
        if (here == 0) {
#pragma unroll
          for (int i = 0; i < AHEAD; ++i) add_key(i);
          continue;
        }
#pragma unroll
        for (int h = 0; h < AHEAD; h += OLD) {
          Row<GROUP, PARTS> old[OLD];
          uint32 of[OLD];
#pragma unroll
          for (int i = 0; i < OLD; ++i) {
            of[i] = __shfl_sync(members, row, j + h + i, GROUP);
            old[i].load(tables, of[i], lane, here >> (h + i) & 1);
          }
#pragma unroll
          for (int i = 0; i < OLD; ++i) {
            add_key(h + i);
            const uint32 in = ROUNDED ? __shfl_sync(members, shard, j + h + i, GROUP) : 0;
            if (here >> (h + i) & 1) {
              if (open) {
                leave(partials);
              } else {
                old[i].update(tables, of[i], lane, members, sum,
                              ROUNDED ? origin_of(origins, in, of[i]) : Origin{0, 0, 0});
              }
              open = false;
              clear();
            }
          }
        }
      }
    }
    // The batch's last key ends a run: what goes on fills its chunk.
    if (count - begin <= CHUNK || ends >> (GROUP - 1) & 1) continue;
    if (open) {
      leave(partials);
      continue;
    }
    leave(partials + int64(chunks) * DIM);
    const uint32 running = __shfl_sync(members, row, GROUP - 1, GROUP);
    if (lane == 0) {
      const uint64 far = uint64(begin) + CHUNK * STRETCH;
      const bool is_long = far < count && rows[far] == running;
      if (is_long) open_runs[chunks - 1 - atomicAdd(&info[LONG_RUNS], 1u)] = chunk;
      else open_runs[atomicAdd(&info[SHORT_RUNS], 1u)] = chunk;
    }
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
    const uint32* __restrict__ rows, const uint32* __restrict__ info, uint32 chunks, const float* __restrict__ partials,
    const uint32* __restrict__ open_runs, const int64* __restrict__ origins, uint32 num_shards, WEIGHT* weight,
    float* firsts, float* seconds, const float* __restrict__ scalars, const float* __restrict__ guard) {
  SHARED float4 shares[THREADS / LANES][OWN * LANES];
  if (stays_out(scalars, guard)) return;
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES, warps = THREADS / LANES;
  const uint32 count = info[COUNT];
  const Tables tables = tables_of(weight, firsts, seconds, scalars, guard, lane);
  const float* begins = partials + int64(chunks) * DIM;
  const float* stretches = begins + int64(chunks) * DIM;

  auto update = [&](uint32 row, const float4 (&sum)[OWN]) {
    Origin origin = {0, 0, 0};
    if (ROUNDED) origin = origin_of(origins, shard_of(origins, num_shards, row), row);
    WarpRow old;
    old.load(tables, row, lane, true);
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
      update(row, sum);
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
    update(row, sum);
  }
}

// Update the rows that are touched; sums[row] is the gradient of each.
KERNEL void __launch_bounds__(THREADS) update_rows(
    const float* __restrict__ sums, const unsigned char* __restrict__ touched, uint32 count,
    const int64* __restrict__ origins, uint32 num_shards, WEIGHT* weight, float* firsts, float* seconds,
    const float* __restrict__ scalars, const float* __restrict__ guard) {
  if (stays_out(scalars, guard)) return;
  const int lane = threadIdx.x % LANES;
  const Tables tables = tables_of(weight, firsts, seconds, scalars, guard, lane);
  const uint32 step = gridDim.x * THREADS;
  for (uint32 first = blockIdx.x * THREADS + threadIdx.x / LANES * LANES; first < count; first += step) {
    uint32 left = __ballot_sync(ALL_LANES, first + lane < count && touched[first + lane] != 0);
    for (; left != 0; left &= left - 1) {
      const uint32 row = first + __ffs(left) - 1;
      float4 sum[OWN];
#pragma unroll
      for (int p = 0; p < OWN; ++p) sum[p] = make_float4(0, 0, 0, 0);
      add_vectors(sum, sums + int64(row) * DIM, lane);
      WarpRow old;
      old.load(tables, row, lane, true);
      old.update(tables, row, lane, ALL_LANES, sum,
                 ROUNDED ? origin_of(origins, shard_of(origins, num_shards, row), row) : Origin{0, 0, 0});
    }
  }
}
