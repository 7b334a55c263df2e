// Stands in front of a CUDA source that a C++ compiler takes: one thread after the other, no warp, no shared memory.
// For sources whose threads do not talk to each other.
#pragma once
#include <cstdint>
#include <cstring>

#define CROSSLANE_EMULATE
#define DEVICE inline
#define KERNEL extern "C"
#define __launch_bounds__(threads)
#define __restrict__ __restrict

struct float2 { float x, y; };
struct float4 { float x, y, z, w; };
struct uint2 { unsigned x, y; };
struct uint4 { unsigned x, y, z, w; };
struct dim3_t { unsigned x; };
static dim3_t blockIdx, blockDim, threadIdx, gridDim;

inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }

inline float bits_to_float(unsigned bits) { float v; std::memcpy(&v, &bits, 4); return v; }
inline unsigned float_to_bits(float v) { unsigned bits; std::memcpy(&bits, &v, 4); return bits; }
inline uint4 read_16(const void* address) { uint4 v; std::memcpy(&v, address, 16); return v; }
inline uint2 read_8(const void* address) { uint2 v; std::memcpy(&v, address, 8); return v; }
inline uint4 stream_16(const void* address) { return read_16(address); }
inline uint2 stream_8(const void* address) { return read_8(address); }

inline void prefetch(const void*) {}
template <typename T>
void fetch(T& v, const void* address) { std::memcpy(&v, address, sizeof v); }
inline void write_float(float* address, float v) { *address = v; }
inline int stream(const int* address) { return *address; }
inline long long stream(const long long* address) { return *address; }
inline void write_16(void* address, uint4 v) { std::memcpy(address, &v, 16); }
inline void write_8(void* address, uint2 v) { std::memcpy(address, &v, 8); }

template <typename T>
T* settled(T* pointer) { return pointer; }

// Numbers of 16 bits are for kernels that are not emulated.
float half_to_float(unsigned short);
unsigned pack_half(float, float);
unsigned pack_bfloat(float, float);

// The compiler is told not to fuse (-ffp-contract=off).
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double plus(double a, double b) { return a + b; }
inline double times(double a, double b) { return a * b; }

template <typename Kernel, typename... Arguments>
void launch(unsigned blocks, unsigned threads, Kernel kernel, Arguments... arguments) {
  gridDim.x = blocks, blockDim.x = threads;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(arguments...);
}
