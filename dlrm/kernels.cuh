// What the CUDA sources share: number types, 16-byte accesses, warp-wide matrix instructions, the blocks of scalars.
//
// No other header is included, so that NVRTC needs none. Instructions that have no CUDA spelling stand in the first
// part alone; the emulator of tests/kernels replaces that part and compiles the rest for the CPU.
#pragma once

#ifndef CROSSLANE_ARCH
#define CROSSLANE_ARCH (__CUDA_ARCH__ / 10)
#endif

typedef long long int64;
typedef unsigned long long uint64;
typedef unsigned int uint32;
typedef unsigned short uint16;

struct half_t { uint16 bits; };
struct bfloat_t { uint16 bits; };

#ifndef CROSSLANE_EMULATE

#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__
#define SHARED __shared__
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

DEVICE float half_to_float(uint16 bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

// Round to nearest even; `low` goes to the lower address.
DEVICE uint32 pack_half(float low, float high) {
  uint32 pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

DEVICE uint32 pack_bfloat(float low, float high) {
  uint32 pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

DEVICE float bits_to_float(uint32 bits) { return __uint_as_float(bits); }
DEVICE uint32 float_to_bits(float value) { return __float_as_uint(value); }

// Each rounded by itself, whatever the compiler would like to fuse.
DEVICE double plus(double a, double b) { return __dadd_rn(a, b); }
DEVICE double times(double a, double b) { return __dmul_rn(a, b); }

// Data that no kernel writes meanwhile: through the first-level cache, which then serves repeated rows.
DEVICE uint4 read_16(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
  return v;
}

DEVICE uint2 read_8(const void* address) {
  uint2 v;
  asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
  return v;
}

// Data that is read once: it leaves the first-level cache to others.
DEVICE uint4 stream_16(const void* address) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address));
  return v;
}

DEVICE uint2 stream_8(const void* address) {
  uint2 v;
  asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address));
  return v;
}

// Data that this kernel writes too.
DEVICE void fetch(uint4& v, const void* address) {
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(address) : "memory");
}
DEVICE void fetch(uint2& v, const void* address) {
  asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(address) : "memory");
}
DEVICE void fetch(float& v, const void* address) {
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(address) : "memory");
}

// Have the second level fetch the line, for whoever asks for it soon.
DEVICE void prefetch(const void* address) { asm volatile("prefetch.global.L2 [%0];" :: "l"(address)); }

DEVICE int stream(const int* address) {
  int v;
  asm volatile("ld.global.nc.L1::no_allocate.s32 %0, [%1];" : "=r"(v) : "l"(address));
  return v;
}

DEVICE int64 stream(const int64* address) {
  int64 v;
  asm volatile("ld.global.nc.L1::no_allocate.s64 %0, [%1];" : "=l"(v) : "l"(address));
  return v;
}

// Stores that stay whole: the compiler takes some of its own apart into numbers of 4 bytes, each with a transaction.
DEVICE void write_16(void* address, uint4 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};"
               :: "l"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

DEVICE void write_8(void* address, uint2 v) {
  asm volatile("st.global.v2.u32 [%0], {%1, %2};" :: "l"(address), "r"(v.x), "r"(v.y) : "memory");
}

DEVICE void write_float(float* address, float v) {
  asm volatile("st.global.f32 [%0], %1;" :: "l"(address), "f"(v) : "memory");
}

// The same pointer, of which the compiler forgets how it came about: it then stays in registers and is not put
// together again for every access.
template <typename T>
DEVICE T* settled(T* pointer) {
  asm("" : "+l"(pointer));
  return pointer;
}

// The values of all lanes of the warp, bit by bit.
DEVICE uint32 any_bits(uint32 value) { return __reduce_or_sync(0xffffffffu, value); }

// The lanes of the warp whose lowest `bits` bits of `value` are this lane's.
DEVICE uint32 lanes_alike(uint32 value, int bits) {
  uint32 alike = 0xffffffffu;
  for (int bit = 0; bit < bits; ++bit) {
    const bool set = value >> bit & 1;
    const uint32 votes = __ballot_sync(0xffffffffu, set);
    alike &= set ? votes : ~votes;
  }
  return alike;
}

// target += v, in an order that is not defined; one instruction from sm_90 on.
DEVICE void reduce_add_4(float* target, float4 v) {
#if CROSSLANE_ARCH >= 90
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
               :: "l"(target), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w) : "memory");
#else
  atomicAdd(target, v.x);
  atomicAdd(target + 1, v.y);
  atomicAdd(target + 2, v.z);
  atomicAdd(target + 3, v.w);
#endif
}

// c += a b for a 16 x 16 and b 16 x 8 of half_t or bfloat_t; the fragments' layout is PTX's for mma.m16n8k16.
template <typename T>
DEVICE void multiply_16x8x16(float (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1);

template <>
DEVICE void multiply_16x8x16<half_t>(float (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <>
DEVICE void multiply_16x8x16<bfloat_t>(float (&c)[4], uint32 a0, uint32 a1, uint32 a2, uint32 a3, uint32 b0, uint32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3]) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// Transpose an 8 x 8 matrix of 16-bit numbers that lies across the warp: lane l holds row l / 4, columns
// 2 (l % 4) and the next.
DEVICE uint32 transpose_8x8(uint32 pair) {
  uint32 turned;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(turned) : "r"(pair));
  return turned;
}

#endif  // CROSSLANE_EMULATE

#define ALL_LANES 0xffffffffu

// Vectors of numbers, read and written in one access, computed with in float.

DEVICE float to_float(float value) { return value; }
DEVICE float to_float(half_t value) { return half_to_float(value.bits); }
DEVICE float to_float(bfloat_t value) { return bits_to_float(uint32(value.bits) << 16); }
DEVICE float to_float(int value) { return float(value); }
DEVICE float to_float(int64 value) { return float(value); }
DEVICE float to_float(signed char value) { return float(value); }
DEVICE float to_float(unsigned char value) { return float(value); }

DEVICE void store(float* target, float value) { *target = value; }
DEVICE void store(half_t* target, float value) { target->bits = uint16(pack_half(value, 0.0f)); }
DEVICE void store(bfloat_t* target, float value) { target->bits = uint16(pack_bfloat(value, 0.0f)); }

DEVICE uint32 pack(half_t, float low, float high) { return pack_half(low, high); }
DEVICE uint32 pack(bfloat_t, float low, float high) { return pack_bfloat(low, high); }

DEVICE float2 unpack(half_t, uint32 pair) {
  return make_float2(half_to_float(uint16(pair)), half_to_float(uint16(pair >> 16)));
}
DEVICE float2 unpack(bfloat_t, uint32 pair) {
  return make_float2(bits_to_float(pair << 16), bits_to_float(pair & 0xffff0000u));
}

DEVICE float4 floats(uint4 v) {
  return make_float4(bits_to_float(v.x), bits_to_float(v.y), bits_to_float(v.z), bits_to_float(v.w));
}
template <typename T>
DEVICE float4 floats(uint2 v) {
  const float2 low = unpack(T(), v.x), high = unpack(T(), v.y);
  return make_float4(low.x, low.y, high.x, high.y);
}

// Four numbers: 16 bytes of float, 8 of the others.
DEVICE float4 read_4(const float* source) { return floats(read_16(source)); }
DEVICE float4 read_4(const half_t* source) { return floats<half_t>(read_8(source)); }
DEVICE float4 read_4(const bfloat_t* source) { return floats<bfloat_t>(read_8(source)); }

DEVICE float4 stream_4(const float* source) { return floats(stream_16(source)); }
DEVICE float4 stream_4(const half_t* source) { return floats<half_t>(stream_8(source)); }
DEVICE float4 stream_4(const bfloat_t* source) { return floats<bfloat_t>(stream_8(source)); }

// To global memory.
DEVICE void write_4(float* target, float4 v) {
  write_16(target, make_uint4(float_to_bits(v.x), float_to_bits(v.y), float_to_bits(v.z), float_to_bits(v.w)));
}
template <typename T>
DEVICE void write_4(T* target, float4 v) {
  write_8(target, make_uint2(pack(T(), v.x, v.y), pack(T(), v.z, v.w)));
}
DEVICE void write_8_numbers(float* target, float4 low, float4 high) {
  write_4(target, low);
  write_4(target + 4, high);
}
template <typename T>
DEVICE void write_8_numbers(T* target, float4 low, float4 high) {
  write_16(target, make_uint4(pack(T(), low.x, low.y), pack(T(), low.z, low.w), pack(T(), high.x, high.y),
                              pack(T(), high.z, high.w)));
}

DEVICE float4 add(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }
DEVICE float4 scaled(float factor, float4 v) {
  return make_float4(factor * v.x, factor * v.y, factor * v.z, factor * v.w);
}
DEVICE float4 add_scaled(float4 sum, float factor, float4 v) {
  return make_float4(sum.x + factor * v.x, sum.y + factor * v.y, sum.z + factor * v.z, sum.w + factor * v.w);
}

// The sum over the lanes of the warp, all of which call it.
template <typename T>
DEVICE T warp_sum(T value) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
  return value;
}

// Philox4x32-10: the four words of a counter (dlrm/philox.py).
DEVICE uint4 philox(uint32 c0, uint32 c1, uint32 c2, uint32 c3, uint64 seed) {
  uint32 key0 = uint32(seed), key1 = uint32(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64 product0 = uint64(c0) * 0xD2511F53u, product1 = uint64(c2) * 0xCD9E8D57u;
    c0 = uint32(product1 >> 32) ^ c1 ^ key0;
    c1 = uint32(product1);
    c2 = uint32(product0 >> 32) ^ c3 ^ key1;
    c3 = uint32(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return make_uint4(c0, c1, c2, c3);
}

// The first row of a rank's share of a batch (embedding/topology.py).
DEVICE uint32 start_of(uint32 global_rows, uint32 ranks, uint32 rank) {
  const uint32 rest = global_rows % ranks;
  return rank * (global_rows / ranks) + (rank < rest ? rank : rest);
}

// The two blocks of scalars (dlrm/scalars.py has the same places): what the host sends for every step ...
enum Scalar { LR = 0, INVERSE_ROWS = 1, VALID_ROWS = 2, STEP_LOW = 4, STEP_HIGH = 5, SEED_LOW = 6, SEED_HIGH = 7,
              SPARSE = 8, DENSE = 16 };
// ... and what lives on the device.
enum Guard { LOSS_SCALE = 0, UNSCALE = 1, NOT_FINITE = 2, OVERFLOW = 3, GOOD_STEPS = 4, SKIPPED_STEPS = 5 };

DEVICE uint32 word(const float* block, int place) { return reinterpret_cast<const uint32*>(block)[place]; }

// Whether weights and state have to stay as they are: a gradient is not finite, or an exchange ran over.
DEVICE bool blocked(const float* guard) { return (word(guard, NOT_FINITE) | word(guard, OVERFLOW)) != 0; }
