// Matrix products with a ReLU in the epilogue, for Hopper's tensor cores: the kernels of fused_products_cuda.py,
// reference in fused_products.py.
//
// out[rows, columns] = left[rows, depth] right[depth, columns], added up in float. Macros: NUMBER: half_t or bfloat_t;
// FORWARD 1: right is a weight [columns, depth] transposed; a bias is added and the ReLU applied, and with MASKED 1
// bits say where it was on. FORWARD 0: right is a weight [depth, columns]; what has no bit becomes 0, and with SUMMED 1 the
// columns are added up over the rows.
//
// One thread of a block has the copy engine fill a ring of pieces; two warpgroups of 128 threads multiply them, each 64
// rows of a tile, and store their rows while the other one still multiplies. A block keeps to its columns and goes
// through tiles of the rows.
#include "dlrm/kernels.cuh"

#define THREADS 384
#define TILE_ROWS 128
#define TILE_COLUMNS 256
#define DEPTH 64
// Pieces of the operands, each of DEPTH, that shared memory holds.
#define STAGES 4
// Steps of DEPTH by which one warpgroup is ahead of the other: one stores while the other multiplies.
#define AHEAD 1

struct __align__(64) TensorMap { uint64 words[16]; };

// What all threads know.
struct Work {
  int num_rows, columns, depth;
  unsigned char* bits;  // [rows, bits_ld] bytes
  int64 bits_ld;
  const NUMBER* bias;
  float* sums;          // of the columns
  float* partials;      // of blocks, [lanes, columns rounded up to a tile]
  uint32* tickets;      // of every tile of the columns: blocks that have written their partials; 0 before and after
  int lanes;            // blocks that share the rows of a tile of the columns
};

#if CROSSLANE_ARCH == 90 && defined(__CUDA_ARCH_FEAT_SM90_ALL)

#define LEFT_BYTES (TILE_ROWS * DEPTH * 2)
#define RIGHT_BYTES (TILE_COLUMNS * DEPTH * 2)
#define STAGE_BYTES (LEFT_BYTES + RIGHT_BYTES)
// A box of 64 columns is what the copy engine swizzles; of the rows that one warp has.
#define STORE_BYTES (16 * 64 * 2)
#define CONSUMER_WARPS 8

#define NAME_half_t "f16"
#define NAME_bfloat_t "bf16"
#define NAME_OF(type) NAME_##type
#define NAME(type) NAME_OF(type)

// Shared memory, by its addresses.
struct Rooms {
  uint32 ring, staging, numbers, full, empty;
};

DEVICE uint32 shared_address(const void* pointer) { return uint32(__cvta_generic_to_shared(pointer)); }

DEVICE void barrier_init(uint32 barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(barrier), "r"(arrivals) : "memory");
}

DEVICE void wait(uint32 barrier, uint32 phase) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "AGAIN:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\nbra AGAIN;\nDONE:\n}"
      :: "r"(barrier), "r"(phase) : "memory");
}

DEVICE void expect_bytes(uint32 barrier, uint32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(barrier), "r"(bytes) : "memory");
}

DEVICE void arrive(uint32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(barrier) : "memory");
}

// The box at column x and row y; `barrier` is told of its bytes.
DEVICE void load_box(uint32 target, const TensorMap* map, int x, int y, uint32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];"
      :: "r"(target), "l"(map), "r"(x), "r"(y), "r"(barrier) : "memory");
}

DEVICE void store_box(const TensorMap* map, int x, int y, uint32 source) {
  asm volatile(
      "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%1, %2}], [%3];\n"
      "cp.async.bulk.commit_group;" :: "l"(map), "r"(x), "r"(y), "r"(source) : "memory");
}

// Until at most LEFT of this thread's stores have still to read shared memory.
template <int LEFT>
DEVICE void wait_stores() { asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(LEFT) : "memory"); }

DEVICE void consumers_sync() { asm volatile("bar.sync 1, 256;" ::: "memory"); }

// sums += left right for 64 rows, 256 columns and a depth of 16; goes on while others are issued.
#define TEN(t) "%" #t "0, %" #t "1, %" #t "2, %" #t "3, %" #t "4, %" #t "5, %" #t "6, %" #t "7, %" #t "8, %" #t "9, "
#define SUM_4(i) "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3])
#define SUM_16(i) SUM_4(i), SUM_4(i + 4), SUM_4(i + 8), SUM_4(i + 12)
DEVICE void multiply(float (&sums)[128], uint64 left, uint64 right, int accumulate) {
  asm volatile(
      "{\n.reg .pred more;\nsetp.ne.b32 more, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32." NAME(NUMBER) "." NAME(NUMBER) " {" TEN() TEN(1) TEN(2) TEN(3) TEN(4)
      TEN(5) TEN(6) TEN(7) TEN(8) TEN(9) TEN(10) TEN(11) "%120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, more, 1, 1, 0, %131;\n}"
      : SUM_16(0), SUM_16(16), SUM_16(32), SUM_16(48), SUM_16(64), SUM_16(80), SUM_16(96), SUM_16(112)
      : "l"(left), "l"(right), "r"(accumulate), "n"(1 - FORWARD));
}

DEVICE void multiply_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
DEVICE void multiply_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(LEFT) : "memory"); }

// An operand in shared memory, swizzled over 128 bytes; groups of 8 lines of 128 bytes follow each other. `next`: bytes
// to the next 64 columns, for an operand whose lines are columns.
DEVICE uint64 operand(uint32 address, uint32 next) {
  return uint64(address >> 4 & 0x3fff) | uint64(next >> 4) << 16 | uint64(1024 >> 4) << 32 | uint64(1) << 62;
}

// A place in the ring, and how often the ring has gone round.
struct Place {
  uint32 slot = 0, phase = 0;
  DEVICE void next() {
    if (++slot == STAGES) slot = 0, phase ^= 1;
  }
};

// The tiles of the rows that a block has: first, first + step, ... below last.
struct Tiles {
  int first, step, last, column;
};

DEVICE Tiles tiles_of(const Work& work) {
  const int across = (work.columns + TILE_COLUMNS - 1) / TILE_COLUMNS;
  Tiles tiles;
  tiles.column = blockIdx.x % across * TILE_COLUMNS;
  tiles.first = blockIdx.x / across;
  tiles.step = work.lanes;
  tiles.last = (work.num_rows + TILE_ROWS - 1) / TILE_ROWS;
  return tiles;
}

DEVICE void produce(
    const TensorMap* left, const TensorMap* right, const Work& work, const Tiles& tiles, const Rooms& rooms) {
  constexpr int BOX_COLUMNS = FORWARD ? 128 : 64;
  Place place;
  for (int tile = tiles.first; tile < tiles.last; tile += tiles.step) {
    for (int at = 0; at < work.depth; at += DEPTH) {
      const uint32 full = rooms.full + 8 * place.slot, slot = rooms.ring + STAGE_BYTES * place.slot;
      wait(rooms.empty + 8 * place.slot, place.phase ^ 1);
      expect_bytes(full, STAGE_BYTES);
      load_box(slot, left, at, tile * TILE_ROWS, full);
#pragma unroll
      for (int i = 0; i < TILE_COLUMNS; i += BOX_COLUMNS) {
        const int column = tiles.column + i;
        load_box(slot + LEFT_BYTES + i * DEPTH * 2, right, FORWARD ? at : column, FORWARD ? column : at, full);
      }
      place.next();
    }
  }
}

// This warp needs a slot no longer.
DEVICE void release(uint32 barrier) {
  if (threadIdx.x % 32 == 0) arrive(barrier);
}

// The products of a tile, 64 rows for each warpgroup: sums[4 j + 2 h + e] of a thread are row lane / 4 + 8 h of its
// warp's 16, column 8 j + 2 (lane % 4) + e. `quarter`, below: lane % 4.
DEVICE void sum_products(float (&sums)[128], Place& place, int depth, int group, const Rooms& rooms) {
  // An operand whose lines are rows goes on within its lines; one whose lines are columns, with the next 16 lines.
  constexpr uint32 LEFT_STEP = 32 >> 4, RIGHT_STEP = (FORWARD ? 32 : 16 * 128) >> 4;
  uint32 last = 0;
  const bool waits = depth > (STAGES - AHEAD) * DEPTH;  // the ring lets nobody get here twice meanwhile
  if (waits && group == 1) asm volatile("bar.sync 2, 256;" ::: "memory");
  for (int at = 0; at < depth; at += DEPTH) {
    const uint32 slot = rooms.ring + STAGE_BYTES * place.slot;
    const uint64 left = operand(slot + group * (LEFT_BYTES / 2), 16);
    const uint64 right = operand(slot + LEFT_BYTES, FORWARD ? 16 : 64 * DEPTH * 2);
    wait(rooms.full + 8 * place.slot, place.phase);
    multiply_fence();
#pragma unroll
    for (int k = 0; k < DEPTH / 16; ++k) {
      multiply(sums, left + k * LEFT_STEP, right + k * RIGHT_STEP, FORWARD || at || k);
    }
    multiply_commit();
    if (waits && group == 0 && at == (AHEAD - 1) * DEPTH) asm volatile("bar.arrive 2, 256;" ::: "memory");
    if (at) {
      multiply_wait<1>();
      release(last);
    }
    last = rooms.empty + 8 * place.slot;
    place.next();
  }
  multiply_wait<0>();
  release(last);
}

// Words of bits that a thread holds of each of its two rows: all of the row, or a quarter of those of the tile.
#define HELD (FORWARD ? 8 : 2)

DEVICE void read_bits(uint32 (&bits)[2][HELD], const Work& work, int row, int column, int quarter) {
  const int64 begin = min(int64(column / 8 + 8 * quarter), work.bits_ld - 8);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int64 line = min(row + 8 * h, work.num_rows - 1);
    const uint2 words = read_8(work.bits + line * work.bits_ld + begin);
    bits[h][0] = words.x, bits[h][1] = words.y;
  }
}

DEVICE void write_bits(uint32 (&bits)[2][HELD], const Work& work, int row, int column, int quarter) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    // The four threads of a row have bits of all its words: each gathers two of them.
    uint32 half[4], own[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32 low = bits[h][i] << 2 * quarter, high = bits[h][4 + i] << 2 * quarter;
      half[i] = (quarter & 2 ? high : low) | __shfl_xor_sync(ALL_LANES, quarter & 2 ? low : high, 2);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      own[i] = (quarter & 1 ? half[2 + i] : half[i]) |
               __shfl_xor_sync(ALL_LANES, quarter & 1 ? half[i] : half[2 + i], 1);
    }
    const int64 line = row + 8 * h, begin = column / 8 + 8 * quarter;
    if (line < work.num_rows && begin < work.bits_ld) {
      write_8(work.bits + line * work.bits_ld + begin, make_uint2(own[0], own[1]));
    }
  }
}

// max(low, 0) and max(high, 0), rounded; a NaN stays one.
DEVICE uint32 pack_relu(float low, float high) {
  uint32 pair;
  asm("cvt.rn.relu." NAME(NUMBER) "x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// The highest bits of two bytes, each over half of the result: LOW and HIGH are 0 to 3 in `word`, 4 to 7 in `other`.
template <int LOW, int HIGH>
DEVICE uint32 spread(uint32 word, uint32 other) {
  uint32 filled;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(filled) : "r"(word), "r"(other), "n"((HIGH + 8) * 0x1100 + (LOW + 8) * 0x11));
  return filled;
}

// A byte's highest bit says whether a number stays: in `evens` the lower one, in `odds` the higher one.
template <int BYTE>
DEVICE uint32 cleared(float& low, float& high, uint32 evens, uint32 odds) {
  if (SUMMED) {
    if (!(evens >> (8 * BYTE + 7) & 1)) low = 0;
    if (!(odds >> (8 * BYTE + 7) & 1)) high = 0;
    return pack(NUMBER(), low, high);
  }
  return pack(NUMBER(), low, high) & spread<BYTE, 4 + BYTE>(evens, odds);
}

// Two neighbouring sums as they are stored. Their bits are in byte `byte` of `bits`, or go there in places 0 and 1.
DEVICE uint32 finished(float& low, float& high, uint32& bits, int byte, int quarter) {
  if (FORWARD) {
    if (MASKED) {
      if (!(low <= 0)) bits |= 1u << 8 * byte;
      if (!(high <= 0)) bits |= 2u << 8 * byte;
    }
    return pack_relu(low, high);
  }
  // The bits of an even column and of an odd one become their bytes' highest.
  const uint32 evens = bits << 7 - 2 * quarter, odds = bits << 6 - 2 * quarter;
  return byte == 0 ? cleared<0>(low, high, evens, odds) : byte == 1 ? cleared<1>(low, high, evens, odds)
       : byte == 2 ? cleared<2>(low, high, evens, odds) : cleared<3>(low, high, evens, odds);
}

// Sums to the output, 64 columns of the warp's 16 rows at a time.
DEVICE void store_tile(
    float (&sums)[128], uint32 (&bits)[2][HELD], float (&totals)[64], const TensorMap* out, int row, int column,
    const Work& work, uint32 staging) {
  const int lane = threadIdx.x % 32;
  // Lanes 0 to 7 give the lines of the first 8 x 8 numbers, the next ones those 8 rows down, then 8 columns on.
  const uint32 line = lane % 16, across = lane / 16;
#pragma unroll
  for (int piece = 0; piece < 4; ++piece) {
    const uint32 buffer = staging + piece % 2 * STORE_BYTES;
    if (lane == 0) wait_stores<1>();
    __syncwarp();
    uint32 words[2][2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      words[i / 2][i % 2] = FORWARD ? 0 : __shfl_sync(ALL_LANES, bits[i / 2][i % 2], piece, 4);
    }
#pragma unroll
    for (int j = 0; j < 8; j += 2) {
      uint32 pairs[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int chunk = 8 * piece + j + i / 2, h = i % 2;
        float low = sums[4 * chunk + 2 * h], high = sums[4 * chunk + 2 * h + 1];
        pairs[i] = finished(low, high, words[h][j / 4], chunk % 4, lane % 4);
        if (SUMMED) totals[2 * chunk] += low, totals[2 * chunk + 1] += high;
      }
      asm volatile("stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};"
                   :: "r"(buffer + line * 128 + ((j + across ^ line % 8) << 4)), "r"(pairs[0]), "r"(pairs[1]),
                   "r"(pairs[2]), "r"(pairs[3]) : "memory");
    }
    if (FORWARD) {
#pragma unroll
      for (int i = 0; i < 4; ++i) bits[i / 2][(2 * piece + i % 2) % HELD] = words[i / 2][i % 2];
    }
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
    if (lane == 0 && row < work.num_rows) store_box(out, column + 64 * piece, row, buffer);
  }
}

// The columns' sums over the rows of all blocks, in a fixed order: the last block that gets here adds them up.
DEVICE void finish_sums(float (&totals)[64], const Work& work, const Tiles& tiles, float* room) {
  constexpr int LINE = TILE_COLUMNS + 8;  // lines of threads that write together lie in banks of their own
  const int lane = threadIdx.x % 32, thread = threadIdx.x - 128;
  consumers_sync();  // the ring is free
#pragma unroll
  for (int j = 0; j < 32; ++j) {
    float* target = room + (thread / 4) * LINE + 8 * j + 2 * (lane % 4);
    target[0] = totals[2 * j], target[1] = totals[2 * j + 1];
  }
  consumers_sync();
  float sum = 0;
#pragma unroll 16
  for (int i = 0; i < 64; ++i) sum += room[i * LINE + thread];
  const int lanes = work.lanes, width = gridDim.x / lanes * TILE_COLUMNS;
  work.partials[int64(tiles.first) * width + tiles.column + thread] = sum;
  SHARED uint32 ticket;
  consumers_sync();
  if (thread == 0) {
    __threadfence();
    ticket = atomicInc(work.tickets + tiles.column / TILE_COLUMNS, lanes - 1);
    __threadfence();
  }
  consumers_sync();
  if (ticket != lanes - 1) return;
  float4 four = make_float4(0, 0, 0, 0);
  const float* source = work.partials + tiles.column + thread % 64 * 4;
#pragma unroll 8
  for (int i = thread / 64; i < lanes; i += 4) {
    four = add(four, __ldcg(reinterpret_cast<const float4*>(source + int64(i) * width)));
  }
  reinterpret_cast<float4*>(room)[thread] = four;
  consumers_sync();
  if (tiles.column + thread < work.columns) {
    work.sums[tiles.column + thread] = room[thread] + room[256 + thread] + (room[512 + thread] + room[768 + thread]);
  }
}

DEVICE void consume(
    const TensorMap* out, const Work& work, const Tiles& tiles, const Rooms& rooms, float* numbers, float* room) {
  const int thread = threadIdx.x - 128, group = thread / 128, warp = thread / 32, lane = threadIdx.x % 32;
  const int quarter = lane % 4;
  float totals[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) totals[i] = 0;
  if (FORWARD) {
    const int column = tiles.column + thread;
    numbers[thread] = column < work.columns ? to_float(work.bias[column]) : 0.0f;
    consumers_sync();
  }
  Place place;
  for (int tile = tiles.first; tile < tiles.last; tile += tiles.step) {
    const int row = tile * TILE_ROWS + warp * 16;
    float sums[128];
    uint32 bits[2][HELD] = {};
    if (FORWARD) {
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        const float2 bias = *reinterpret_cast<const float2*>(numbers + 8 * j + 2 * quarter);
        sums[4 * j] = sums[4 * j + 2] = bias.x;
        sums[4 * j + 1] = sums[4 * j + 3] = bias.y;
      }
    } else {
      read_bits(bits, work, row + lane / 4, tiles.column, quarter);
    }
    sum_products(sums, place, work.depth, group, rooms);
    if (!FORWARD) {
#pragma unroll
      for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(bits[i / 2][i % 2]));  // nobody waits for them earlier
    }
    store_tile(sums, bits, totals, out, row, tiles.column, work, rooms.staging + warp * 2 * STORE_BYTES);
    if (FORWARD && MASKED) write_bits(bits, work, row + lane / 4, tiles.column, quarter);
  }
  if (SUMMED) finish_sums(totals, work, tiles, room);
  if (lane == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

KERNEL void __launch_bounds__(THREADS, 1) fused_product(
    const __grid_constant__ TensorMap left, const __grid_constant__ TensorMap right,
    const __grid_constant__ TensorMap out, const Work work) {
  DYNAMIC_SHARED(dynamic);
  unsigned char* aligned = dynamic + (-shared_address(dynamic) & 1023);
  unsigned char* staging = aligned + STAGES * STAGE_BYTES;
  float* numbers = reinterpret_cast<float*>(staging + CONSUMER_WARPS * 2 * STORE_BYTES);
  Rooms rooms;
  rooms.ring = shared_address(aligned), rooms.staging = shared_address(staging);
  rooms.full = shared_address(numbers + TILE_COLUMNS), rooms.empty = rooms.full + 8 * STAGES;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < STAGES; ++slot) {
      barrier_init(rooms.full + 8 * slot, 1);
      barrier_init(rooms.empty + 8 * slot, CONSUMER_WARPS);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  const Tiles tiles = tiles_of(work);
  if (threadIdx.x < 128) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
    if (threadIdx.x == 0) produce(&left, &right, work, tiles, rooms);
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    consume(&out, work, tiles, rooms, numbers, reinterpret_cast<float*>(aligned));
  }
}

#endif
