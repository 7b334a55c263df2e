// Stands in front of a CUDA source that a C++ compiler takes: the threads of a block as coroutines, so that barriers,
// warp-wide exchanges and shared memory work; the blocks one after the other. Between two barriers the threads take
// turns in an order that changes every time: a barrier that is missing shows.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "emulation.h"

#undef __launch_bounds__
#define __launch_bounds__(...)
#define SHARED static
#define DYNAMIC_SHARED(name) unsigned char* name = emulated::shared.data()

namespace emulated {

constexpr unsigned WARP = 32;
constexpr size_t STACK_BYTES = 128 * 1024;

struct Barrier { unsigned waiting = 0, generation = 0; };

struct Warp {
  unsigned long long given[WARP];
  unsigned fragments[WARP][6];
  std::map<unsigned, Barrier> barriers;  // by mask
};

static std::vector<unsigned char> shared;
static std::vector<Warp> warps;
static Barrier block_barrier;
// A thread begins with its context; from then on jumps go between the stacks, which spare the system's calls.
struct Jump { jmp_buf place; };
static std::vector<ucontext_t> threads;
static std::vector<Jump> jumps;
static std::vector<char> begun, ended;
static jmp_buf scheduler;
static unsigned current, living;
static unsigned long long turns = 88172645463325252ull;
static bool moved;

__attribute__((noinline)) inline void pause() {
  if (!_setjmp(jumps[current].place)) _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume() {
  if (_setjmp(scheduler)) return;
  if (begun[current]) _longjmp(jumps[current].place, 1);
  begun[current] = 1;
  setcontext(&threads[current]);
}

inline void arrive(Barrier& barrier, unsigned expected) {
  const unsigned generation = barrier.generation;
  moved = true;
  if (++barrier.waiting == expected) {
    barrier.waiting = 0;
    ++barrier.generation;
    return;
  }
  while (barrier.generation == generation) pause();
  moved = true;
}

inline void arrive_warp(unsigned mask) {
  arrive(warps[current / WARP].barriers[mask], unsigned(__builtin_popcount(mask)));
}

template <typename T>
T exchange(unsigned mask, T value, unsigned source) {
  Warp& warp = warps[current / WARP];
  unsigned long long bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  warp.given[current % WARP] = bits;
  arrive_warp(mask);
  bits = warp.given[source % WARP];
  arrive_warp(mask);
  T result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

template <typename... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<std::remove_reference_t<A>*>(arguments[I])...);
}

template <typename... A>
struct Body {
  static void (*kernel)(A...);
  static void** arguments;
  static void run() {
    call(kernel, arguments, std::index_sequence_for<A...>());
    ended[current] = 1;
    --living;
    moved = true;
    _longjmp(scheduler, 1);
  }
};
template <typename... A> void (*Body<A...>::kernel)(A...);
template <typename... A> void** Body<A...>::arguments;

// 0, or 1 when threads wait for ever.
template <typename... A>
int launch_blocks(unsigned blocks, unsigned count, size_t shared_bytes, void (*kernel)(A...), void** arguments) {
  Body<A...>::kernel = kernel;
  Body<A...>::arguments = arguments;
  // Given back after every launch: a hundred libraries keep none, and what no thread touches takes no memory.
  const std::unique_ptr<char[]> stacks(new char[count * STACK_BYTES]);
  gridDim.x = blocks, blockDim.x = count;
  for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
    shared.assign(shared_bytes + 16, 0xFF);  // not a number
    warps.assign((count + WARP - 1) / WARP, Warp());
    threads.assign(count, ucontext_t());
    jumps.resize(count);
    begun.assign(count, 0);
    ended.assign(count, 0);
    block_barrier = Barrier();
    living = count;
    for (unsigned t = 0; t < count; ++t) {
      getcontext(&threads[t]);
      threads[t].uc_stack.ss_sp = stacks.get() + t * STACK_BYTES;
      threads[t].uc_stack.ss_size = STACK_BYTES;
      makecontext(&threads[t], Body<A...>::run, 0);
    }
    while (living) {
      turns ^= turns << 13, turns ^= turns >> 7, turns ^= turns << 17;
      const unsigned start = unsigned(turns % count);
      const bool backwards = turns >> 40 & 1;
      moved = false;
      for (unsigned i = 0; i < count; ++i) {
        current = (start + (backwards ? count - i : i)) % count;
        if (ended[current]) continue;
        threadIdx.x = current;
        resume();
      }
      if (!moved) return 1;
    }
  }
  return 0;
}

}  // namespace emulated

inline void __syncthreads() { emulated::arrive(emulated::block_barrier, blockDim.x); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { emulated::arrive_warp(mask); }

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned lane = emulated::current % 32;
  return emulated::exchange(mask, value, lane / width * width + unsigned(source) % width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const unsigned lane = emulated::current % 32;
  (void)width;
  return emulated::exchange(mask, value, lane ^ unsigned(bits));
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32) {
  const unsigned lane = emulated::current % 32;
  return emulated::exchange(mask, value, lane % width >= distance ? lane - distance : lane);
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  emulated::Warp& warp = emulated::warps[emulated::current / 32];
  warp.given[emulated::current % 32] = vote;
  emulated::arrive_warp(mask);
  unsigned votes = 0;
  for (unsigned lane = 0; lane < 32; ++lane) {
    if (mask >> lane & 1) votes |= unsigned(warp.given[lane] != 0) << lane;
  }
  emulated::arrive_warp(mask);
  return votes;
}
inline unsigned any_bits(unsigned value) {
  emulated::Warp& warp = emulated::warps[emulated::current / 32];
  warp.given[emulated::current % 32] = value;
  emulated::arrive_warp(0xffffffffu);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= unsigned(warp.given[lane]);
  emulated::arrive_warp(0xffffffffu);
  return bits;
}
inline unsigned lanes_alike(unsigned value, int bits) {
  emulated::Warp& warp = emulated::warps[emulated::current / 32];
  value &= (1u << bits) - 1;
  warp.given[emulated::current % 32] = value;
  emulated::arrive_warp(0xffffffffu);
  unsigned alike = 0;
  for (unsigned lane = 0; lane < 32; ++lane) alike |= unsigned(warp.given[lane] == value) << lane;
  emulated::arrive_warp(0xffffffffu);
  return alike;
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(int(bits)); }
inline int __clz(unsigned bits) { return bits ? __builtin_clz(bits) : 32; }

template <typename T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}
inline void reduce_add_4(float* target, float4 v) {
  target[0] += v.x, target[1] += v.y, target[2] += v.z, target[3] += v.w;
}

inline float half_to_float(unsigned short bits) {
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return float(value);
}
inline unsigned half_bits(float value) {
  const _Float16 rounded = _Float16(value);
  unsigned short bits;
  std::memcpy(&bits, &rounded, 2);
  return bits;
}
inline unsigned pack_half(float low, float high) { return half_bits(low) | half_bits(high) << 16; }
inline unsigned bfloat_bits(float value) {
  const unsigned bits = float_to_bits(value);
  return value != value ? 0x7FFF : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
}
inline unsigned pack_bfloat(float low, float high) { return bfloat_bits(low) | bfloat_bits(high) << 16; }

// The matrix instruction: where a lane's numbers lie in the matrices is PTX's layout for mma.m16n8k16.
template <typename T>
void multiply_16x8x16(float (&c)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1) {
  emulated::Warp& warp = emulated::warps[emulated::current / 32];
  const unsigned lane = emulated::current % 32, own[6] = {a0, a1, a2, a3, b0, b1};
  // kernels.cuh, which comes behind this, has to_float for its two types.
  const auto number = [](unsigned bits) { return to_float(T{(unsigned short)bits}); };
  std::memcpy(warp.fragments[lane], own, sizeof own);
  emulated::arrive_warp(0xffffffffu);
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + (i / 2) * 8, column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned a = warp.fragments[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2];
      const unsigned b = warp.fragments[column * 4 + k % 8 / 2][4 + k / 8];
      c[i] += number(a >> k % 2 * 16) * number(b >> k % 2 * 16);
    }
  }
  emulated::arrive_warp(0xffffffffu);
}
inline unsigned transpose_8x8(unsigned pair) {
  emulated::Warp& warp = emulated::warps[emulated::current / 32];
  const unsigned lane = emulated::current % 32;
  warp.given[lane] = pair;
  emulated::arrive_warp(0xffffffffu);
  unsigned turned = 0;
  for (unsigned i = 0; i < 2; ++i) {
    const unsigned row = lane % 4 * 2 + i, column = lane / 4;
    turned |= (unsigned(warp.given[row * 4 + column / 2]) >> column % 2 * 16 & 0xffffu) << i * 16;
  }
  emulated::arrive_warp(0xffffffffu);
  return turned;
}
