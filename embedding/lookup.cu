// Gather the rows of bags of keys and pool them: the kernels of lookup_cuda.py, references in lookup.py.
//
// Shapes: T tables in one weight array of R rows, B bags a table, D columns, F places of the output.
// Macros: DIM = D, a multiple of 4 (of 8 where WEIGHT has 16 bits); WEIGHT, OUT, KEY: element types; and for bags
// WEIGHTED: 1 if keys have weights; AHEAD: rows that a group of lanes has under way; TASK: keys that it takes at a time,
// about; PREFETCH: 1 if a lane asks for its key's row before the group reads it; POOL_THREADS, POOL_BLOCKS: of a block, and
// blocks of a multiprocessor.
//
// A table's frequent rows are asked for again and again, and the multiprocessor's first-level cache serves them: what is
// left is what the second level and memory have to deliver. Where keys are copied, workers (blocks) therefore keep to one
// table; workers of all tables walk the batch side by side, so that rows of the output fill up while they are in the
// second level. Where bags are pooled, which reads much more than it writes, all groups of lanes work on one table at
// a time, so that the second level is that table's too; they take turns at tasks of about as many keys each, and
// neighbouring tasks lie on different multiprocessors, so that each has its share of every table.
#include "dlrm/kernels.cuh"

#define LANES 32

// Keys that a warp takes at a time.
#define KEYS 16
// Numbers that a lane moves at a time: 16 bytes of weights.
constexpr int NUMBERS = sizeof(WEIGHT) == 4 ? 4 : 8;
// Accesses that a lane has under way.
#define UNROLL 8

// NUMBERS weights as they come from memory, and as numbers.
struct Piece { float4 part[NUMBERS / 4]; };

DEVICE void unpack_piece(Piece& piece, uint4 bits, float) { piece.part[0] = floats(bits); }
template <typename T>
DEVICE void unpack_piece(Piece& piece, uint4 bits, T) {
  piece.part[0] = floats<T>(make_uint2(bits.x, bits.y));
  piece.part[NUMBERS / 4 - 1] = floats<T>(make_uint2(bits.z, bits.w));
}

template <typename T>
DEVICE void write_piece(T* target, const Piece& piece) {
  if (NUMBERS == 4) write_4(target, piece.part[0]);
  else write_8_numbers(target, piece.part[0], piece.part[NUMBERS / 4 - 1]);
}

// Copy NUMBERS weights, as 16 bytes of WEIGHT in `bits`; what has the same type stays as it is.
template <typename T>
DEVICE void put(T* target, uint4 bits, T) { write_16(target, bits); }
template <typename T, typename S>
DEVICE void put(T* target, uint4 bits, S) {
  Piece piece;
  unpack_piece(piece, bits, S());
  write_piece(target, piece);
}

// out[b, place[t]] = weight[row_start[t] + keys[t, b]]. Worker w of `workers`, a multiple of T, has table w % T.
KERNEL void __launch_bounds__(1024) copy_rows(
    const WEIGHT* __restrict__ weight, const int64* __restrict__ row_start, const KEY* __restrict__ keys,
    const int64* __restrict__ place, int64 num_rows, int num_tables, int num_places, int workers,
    OUT* __restrict__ out) {
  constexpr int ITEMS = DIM / NUMBERS;                    // of a row
  constexpr int TURNS = (KEYS * ITEMS + LANES - 1) / LANES;  // that a lane needs for the keys of its warp
  constexpr int WIDTH = TURNS < UNROLL ? TURNS : UNROLL;
  const int lane = threadIdx.x % LANES;
  const int warps = blockDim.x / LANES;
  const int64 chunks = (num_rows + KEYS - 1) / KEYS;
  for (int worker = blockIdx.x; worker < workers; worker += gridDim.x) {
    const int table = worker % num_tables;
    const WEIGHT* rows = weight + row_start[table] * DIM;
    const KEY* own_keys = keys + table * num_rows;
    OUT* own_out = out + place[table] * DIM;
    const int64 step = int64(workers / num_tables) * warps;
    int64 chunk = int64(worker / num_tables) * warps + threadIdx.x / LANES;
    // The next chunk's keys are on their way while this one's rows are copied.
    int64 b = chunk * KEYS + lane % KEYS;
    KEY key = b < num_rows ? own_keys[b] : KEY(0);
    for (; chunk < chunks; chunk += step) {
      const int64 first = chunk * KEYS;
      const int count = num_rows - first < KEYS ? int(num_rows - first) : KEYS;
      OUT* chunk_out = own_out + first * num_places * DIM;
      b = first + step * KEYS + lane % KEYS;
      const KEY next = b < num_rows ? own_keys[b] : KEY(0);
#pragma unroll 1
      for (int turn = 0; turn < TURNS; turn += WIDTH) {
        uint4 bits[WIDTH];
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          const int item = (turn + i) * LANES + lane;
          // Past the batch's end the key is 0: a row that is there, read in vain.
          const int64 row = __shfl_sync(ALL_LANES, key, item / ITEMS % KEYS);
          bits[i] = read_16(rows + row * DIM + item % ITEMS * NUMBERS);
        }
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          const int item = (turn + i) * LANES + lane;
          const int of_key = item / ITEMS;
          if (of_key < count) put(chunk_out + of_key * num_places * DIM + item % ITEMS * NUMBERS, bits[i], WEIGHT());
        }
      }
      key = next;
    }
  }
}

#ifdef WEIGHTED

// Lanes that share a bag, each with PARTS pieces of a row.
constexpr int PIECES = DIM / NUMBERS;
constexpr int GROUP = PIECES % 32 == 0 ? 32 : PIECES % 16 == 0 ? 16 : PIECES % 8 == 0 ? 8 : PIECES % 4 == 0 ? 4 : PIECES % 2 == 0 ? 2 : 1;
constexpr int PARTS = PIECES / GROUP;
constexpr int WIDTH = PARTS >= AHEAD ? 1 : (AHEAD / PARTS < GROUP ? AHEAD / PARTS : GROUP);
// Accumulators and rows under way.
struct Sum { Piece part[PARTS]; };

// Lanes of the warp that share this lane's bag.
struct Group {
  int lane, shift;
  uint32 members;

  DEVICE Group() {
    lane = threadIdx.x % GROUP;
    shift = GROUP == LANES ? 0 : threadIdx.x % LANES / GROUP * GROUP;
    members = GROUP == LANES ? ALL_LANES : ((1u << (GROUP % LANES)) - 1) << shift;
  }
  template <typename T>
  DEVICE T from(T value, int source) const { return __shfl_sync(GROUP == LANES ? ALL_LANES : members, value, source, GROUP); }
  DEVICE uint32 votes(bool vote) const {
    return GROUP == LANES ? __ballot_sync(ALL_LANES, vote) : __ballot_sync(members, vote) >> shift & ((1u << (GROUP % LANES)) - 1);
  }
  DEVICE uint32 any(uint32 bits) const {
    if (GROUP == LANES) return any_bits(bits);
#pragma unroll
    for (int distance = GROUP / 2; distance > 0; distance /= 2) bits |= __shfl_xor_sync(members, bits, distance, GROUP);
    return bits;
  }
};

DEVICE void clear(Sum& sum) {
#pragma unroll
  for (int p = 0; p < PARTS; ++p) {
#pragma unroll
    for (int i = 0; i < NUMBERS / 4; ++i) sum.part[p].part[i] = make_float4(0, 0, 0, 0);
  }
}

DEVICE void add_row(Sum& sum, float factor, const uint4 (&bits)[PARTS]) {
#pragma unroll
  for (int p = 0; p < PARTS; ++p) {
    Piece v;
    unpack_piece(v, bits[p], WEIGHT());
#pragma unroll
    for (int i = 0; i < NUMBERS / 4; ++i) {
      float4& own = sum.part[p].part[i];
      own = WEIGHTED ? add_scaled(own, factor, v.part[i]) : add(own, v.part[i]);
    }
  }
}

// Keys are not negative: what has 32 bits is multiplied and added to 64 in one instruction.
DEVICE const WEIGHT* row_of(const WEIGHT* rows, int key) { return rows + uint64(uint32(key)) * DIM; }
DEVICE const WEIGHT* row_of(const WEIGHT* rows, int64 key) { return rows + key * DIM; }

// Pool `count` bags, at most GROUP, whose ends `offsets` has: rows of one table, from this lane's first column on.
DEVICE void pool_task(
    const Group& group, const WEIGHT* rows, const KEY* keys, const float* key_weights, const int64* offsets, int count,
    bool divide, uint32 stride, OUT* out) {
  const int lane = group.lane;
  // Lane l knows where bag l lies, from the task's first key on.
  const int64 begin = offsets[lane < count ? lane : count], end = offsets[lane < count ? lane + 1 : count];
  const int64 first = group.from(begin, 0);
  const uint32 own_end = uint32(end - first), length = uint32(end - begin);
  const float share = divide && length > 1 ? 1.0f / float(length) : 1.0f;
  const uint32 total = group.from(own_end, GROUP - 1);
  keys = settled(keys + first);
  if (WEIGHTED) key_weights += first;
  out = settled(out);
  uint32 filled = group.votes(length > 0);
  Sum sum;
  clear(sum);
  for (uint32 empty = group.votes(lane < count && length == 0); empty != 0; empty &= empty - 1) {
#pragma unroll
    for (int p = 0; p < PARTS; ++p) write_piece(out + uint64(uint32(__ffs(empty) - 1)) * stride + p * GROUP * NUMBERS, sum.part[p]);
  }
  if (total == 0) return;

  auto finish_bag = [&]() {
    const uint32 bag = __ffs(filled) - 1;
    filled &= filled - 1;
    OUT* target = out + uint64(bag) * stride;
    const float by = group.from(share, bag);
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
#pragma unroll
      for (int i = 0; i < NUMBERS / 4; ++i) sum.part[p].part[i] = scaled(by, sum.part[p].part[i]);
      write_piece(target + p * GROUP * NUMBERS, sum.part[p]);
    }
    clear(sum);
  };

  // Lanes behind the last key repeat it: rows that are read in vain, and added to nothing that is kept.
  uint32 at = uint32(lane) < total ? lane : total - 1;
  KEY next = stream(keys + at);
  float next_factor = WEIGHTED ? key_weights[at] : 1.0f;
#pragma unroll 1
  for (uint32 tile = 0; tile < total; tile += GROUP) {
    const KEY key = next;
    const float factor = next_factor;
    at = tile + GROUP + lane < total ? tile + GROUP + lane : total - 1;
    next = stream(keys + at);
    if (WEIGHTED) next_factor = key_weights[at];
    if (PREFETCH) {
#pragma unroll
      for (int column = 0; column < DIM; column += 128 / int(sizeof(WEIGHT))) {
        prefetch(row_of(rows, key) - lane * NUMBERS + column);
      }
    }
    // Bit k: key tile + k is the last one of its bag.
    const uint32 last = own_end - 1 - tile;
    const uint32 ends = group.any(length > 0 && last < GROUP ? 1u << last : 0u);
#pragma unroll 1
    for (int j = 0; j < GROUP && tile + j < total; j += WIDTH) {
      uint4 bits[WIDTH][PARTS];
      float by[WIDTH];
#pragma unroll
      for (int i = 0; i < WIDTH; ++i) {
        const WEIGHT* row = row_of(rows, group.from(key, j + i));
        by[i] = WEIGHTED ? group.from(factor, j + i) : 1.0f;
#pragma unroll
        for (int p = 0; p < PARTS; ++p) bits[i][p] = read_16(row + p * GROUP * NUMBERS);
      }
      const uint32 here = ends >> j & ((2u << (WIDTH - 1)) - 1);
      if (here == 0) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) add_row(sum, by[i], bits[i]);
      } else {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
          add_row(sum, by[i], bits[i]);
          if (here >> i & 1) finish_bag();
        }
      }
    }
  }
}

// out[b, place[t]] = sum over the bag, divided by its length where pooling is mean.
KERNEL void __launch_bounds__(POOL_THREADS, POOL_BLOCKS) pool_bags(
    const WEIGHT* __restrict__ weight, const int64* __restrict__ row_start, const KEY* __restrict__ keys,
    const int64* __restrict__ offsets, const float* __restrict__ key_weights, const unsigned char* __restrict__ mean,
    const int64* __restrict__ place, int num_rows, int num_tables, int num_places, OUT* __restrict__ out) {
  const Group group;
  const uint32 groups = gridDim.x * (blockDim.x / GROUP);
  // Groups of one warp are neighbours, the warps of a block are far from each other.
  uint32 turn = (threadIdx.x / LANES * gridDim.x + blockIdx.x) * (LANES / GROUP) + threadIdx.x % LANES / GROUP;
  int64 table_begin = 0, table_ends = 0;
#pragma unroll 1
  for (int table = 0; table < num_tables; ++table) {
    if (table % GROUP == 0) {  // lane l knows where table + l ends
      const int known = table + group.lane + 1 < num_tables ? table + group.lane + 1 : num_tables;
      table_ends = offsets[int64(known) * num_rows];
    }
    const int64 table_end = group.from(table_ends, table % GROUP);
    int bits = 0;  // a task has 2^bits bags
    while (2 << bits <= GROUP && (table_end - table_begin) << (bits + 1) <= int64(num_rows) * TASK) ++bits;
    table_begin = table_end;
    const int bags = 1 << bits;
    const uint32 tasks = (num_rows + bags - 1) >> bits;
    if (turn < tasks) {
      const int64* own_offsets = offsets + int64(table) * num_rows;
      const WEIGHT* rows = settled(weight + row_start[table] * DIM + group.lane * NUMBERS);
      OUT* own_out = settled(out + place[table] * DIM + group.lane * NUMBERS);
      const bool divide = mean[table] != 0;
      const uint32 stride = num_places * DIM;
#pragma unroll 1
      for (; turn < tasks; turn += groups) {
        const int first = int(turn) * bags;
        pool_task(group, rows, keys, key_weights, own_offsets + first, num_rows - first < bags ? num_rows - first : bags,
                  divide, stride, own_out + int64(first) * stride);
      }
    }
    turn -= tasks;
  }
}

#endif  // WEIGHTED
