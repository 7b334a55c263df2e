// Dot interaction on the tensor cores: the kernels of interaction_cuda.py, references in interaction.py.
//
// Shapes: B rows of the batch, F vectors a row, D columns, P = F (F - 1) / 2 pairs (i, j), j < i.
// Macros: DIM = D, a multiple of 8; VECTORS = F, at most 64; FIRST: 1 if place 0 is the bottom output; NUMBER: half_t
// or bfloat_t; ALIGNED: 1 if the pairs' rows begin at multiples of 16 bytes and have room for a whole number of them;
// RELU: 1 if place 0 came out of a ReLU whose derivative a backward pass is to apply; fused: WEIGHT, KEY: element types;
// BLOCKS: of a multiprocessor, backward; BATCHED: strips whose vectors a warp asks for together; LISTED: rows lie in
// the tables or among those that have come from other GPUs, as a list says; SENT: 1 if gradients of such rows go where
// the others are sent from.
//
// A warp has one row of the batch. Lane l reads 16 bytes of vector l / 4 (+ 8, 16, ...): eight numbers at column
// 8 (l % 4) (+ 32, 64, ...). A product of vectors does not mind the order of the columns, so that these registers are
// fragments of m16n8k16 as they are: of the left factor, and of the right one, which is the same matrix. The backward
// pass sums over the vectors instead, which needs them transposed: in registers, 8 x 8 at a time.
#include "dlrm/kernels.cuh"

#define LANES 32

constexpr int TILES = (VECTORS + 15) / 16;  // of 16 vectors
constexpr int BANDS = 2 * TILES;            // of 8 vectors
constexpr int STRIPS = (DIM + 31) / 32;     // of 32 columns
constexpr int PAIRS = VECTORS * (VECTORS - 1) / 2;
constexpr int BASE = FIRST * DIM;           // where the pairs begin
constexpr int WIDTH = BASE + PAIRS;
constexpr int PADDED = (WIDTH + 7) / 8 * 8;
// Strips whose vectors a warp asks for together: 64 registers' worth, or 128 bytes of every table row.
constexpr int ASKED = STRIPS < 16 / BANDS ? STRIPS : (16 / BANDS > 1 ? 16 / BANDS : 1);

DEVICE int pair_index(int high, int low) { return BASE + high * (high - 1) / 2 + low; }

// The accumulators of a warp: tile m times band n, where some j < i can lie in it.
struct Products {
  float c[TILES][BANDS][4];

  DEVICE void clear() {
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * m + 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c[m][n][e] = 0;
      }
    }
  }

  DEVICE void add_strip(const uint4 (&x)[BANDS]) {
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * m + 2; ++n) {
        const uint4 &up = x[2 * m], &down = x[2 * m + 1], &right = x[n];
        multiply_16x8x16<NUMBER>(c[m][n], up.x, down.x, up.y, down.y, right.x, right.y);
        multiply_16x8x16<NUMBER>(c[m][n], up.z, down.z, up.w, down.w, right.z, right.w);
      }
    }
  }

  DEVICE void write_pairs(NUMBER* row, int lane) const {
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
      for (int n = 0; n < 2 * m + 2; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const int i = 16 * m + lane / 4 + e / 2 * 8;
          const int j = 8 * n + lane % 4 * 2 + e % 2;
          if (j < i && i < VECTORS) store(row + pair_index(i, j), c[m][n][e]);
        }
      }
    }
  }
};

// Copy a finished row from shared memory to `out`, or a row of `out` into shared memory.
DEVICE void copy_row(NUMBER* target, const NUMBER* source, int lane) {
  if (ALIGNED) {
#pragma unroll
    for (int item = lane; item < PADDED / 8; item += LANES) {
      reinterpret_cast<uint4*>(target)[item] = reinterpret_cast<const uint4*>(source)[item];
    }
  } else {
    for (int item = lane; item < WIDTH; item += LANES) target[item] = source[item];
  }
}

DEVICE void write_bottom(NUMBER* row, uint4 x, int strip, int lane) {
  const int column = 32 * strip + lane % 4 * 8;
  if (FIRST && lane < 4 && column < DIM) *reinterpret_cast<uint4*>(row + column) = x;
}

DEVICE void clear_padding(NUMBER* row, int lane) {
  if (WIDTH + lane < PADDED) store(row + WIDTH + lane, 0.0f);
}

// x[strip][band] of one row of the batch; vectors and columns that are not there are zero.
template <int COUNT>
DEVICE void read_vectors(const NUMBER* vectors, int first_strip, int lane, uint4 (&x)[COUNT][BANDS]) {
#pragma unroll
  for (int s = 0; s < COUNT; ++s) {
    const int column = 32 * (first_strip + s) + lane % 4 * 8;
#pragma unroll
    for (int band = 0; band < BANDS; ++band) {
      const int vector = 8 * band + lane / 4;
      x[s][band] = make_uint4(0, 0, 0, 0);
      if (vector < VECTORS && column < DIM) x[s][band] = read_16(vectors + vector * DIM + column);
    }
  }
}

// The pairs' gradients as a symmetric matrix with a zero diagonal, entry (i, k) and (i, k + 1).
DEVICE uint32 gradient_pair(const NUMBER* row, int i, int k) {
  uint32 pair = 0;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int high = i > k + e ? i : k + e;
    const int low = i > k + e ? k + e : i;
    if (high < VECTORS && high != low) pair |= uint32(row[pair_index(high, low)].bits) << (16 * e);
  }
  return pair;
}

// Clear the halves of `gradient` where those of `output` are not above zero; a NaN lets its gradient through.
DEVICE uint32 relu_gradient(uint32 gradient, uint32 output) {
  const float2 v = unpack(NUMBER(), output);
  return gradient & ((v.x <= 0 ? 0u : 0xffffu) | (v.y <= 0 ? 0u : 0xffff0000u));
}

// The gradients of one row of the batch: fragments of the symmetric matrix, and the products with the vectors.
struct Gradients {
  uint32 g[TILES][TILES][4];

  DEVICE void read(const NUMBER* row, int lane) {
#pragma unroll
    for (int m = 0; m < TILES; ++m) {
#pragma unroll
      for (int k = 0; k < TILES; ++k) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          g[m][k][e] = gradient_pair(row, 16 * m + lane / 4 + e % 2 * 8, 16 * k + lane % 4 * 2 + e / 2 * 8);
        }
      }
    }
  }

  DEVICE void write_strip(const uint4 (&x)[BANDS], const NUMBER* row, int strip, int lane, NUMBER* grad_vectors) const {
    write_strip_to(x, row, strip, lane, [=](int, int vector) { return grad_vectors + vector * DIM; });
  }

  // Columns 32 strip ... of all gradients of vectors, from the same columns of the vectors; `target` says where they go.
  template <typename Target>
  DEVICE void write_strip_to(const uint4 (&x)[BANDS], const NUMBER* row, int strip, int lane, Target target) const {
    const int column = 32 * strip + lane % 4 * 8;
    float c[TILES][4][4];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
#pragma unroll
      for (int m = 0; m < TILES; ++m) {
#pragma unroll
        for (int e = 0; e < 4; ++e) c[m][q][e] = 0;
      }
      if (FIRST && lane < 4 && column < DIM) {
        c[0][q][0] = to_float(row[column + 2 * q]);
        c[0][q][1] = to_float(row[column + 2 * q + 1]);
      }
#pragma unroll
      for (int k = 0; k < TILES; ++k) {
        const uint4 &up = x[2 * k], &down = x[2 * k + 1];
        const uint32 b0 = transpose_8x8(q == 0 ? up.x : q == 1 ? up.y : q == 2 ? up.z : up.w);
        const uint32 b1 = transpose_8x8(q == 0 ? down.x : q == 1 ? down.y : q == 2 ? down.z : down.w);
#pragma unroll
        for (int m = 0; m < TILES; ++m) {
          multiply_16x8x16<NUMBER>(c[m][q], g[m][k][0], g[m][k][1], g[m][k][2], g[m][k][3], b0, b1);
        }
      }
    }
#pragma unroll
    for (int band = 0; band < BANDS; ++band) {
      const int vector = 8 * band + lane / 4;
      const int m = band / 2, e = band % 2 * 2;
      uint4 result = make_uint4(pack(NUMBER(), c[m][0][e], c[m][0][e + 1]), pack(NUMBER(), c[m][1][e], c[m][1][e + 1]),
                                pack(NUMBER(), c[m][2][e], c[m][2][e + 1]), pack(NUMBER(), c[m][3][e], c[m][3][e + 1]));
      if (RELU && FIRST && vector == 0) {
        const uint4& y = x[0];
        result = make_uint4(relu_gradient(result.x, y.x), relu_gradient(result.y, y.y),
                            relu_gradient(result.z, y.z), relu_gradient(result.w, y.w));
      }
      if (vector < VECTORS && column < DIM) *reinterpret_cast<uint4*>(target(band, vector) + column) = result;
    }
  }
};

#ifndef WEIGHT

// out = [vectors[:, 0] if FIRST] + [dots], and zeros up to a multiple of 8 columns where ALIGNED.
KERNEL void __launch_bounds__(128) interaction_forward(
    const NUMBER* __restrict__ vectors, int64 num_rows, int64 out_stride, NUMBER* __restrict__ out) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % LANES;
  NUMBER* row = reinterpret_cast<NUMBER*>(shared) + threadIdx.x / LANES * PADDED;
  const int64 b = int64(blockIdx.x) * (blockDim.x / LANES) + threadIdx.x / LANES;
  if (b >= num_rows) return;
  vectors += b * VECTORS * DIM;
  Products products;
  products.clear();
  clear_padding(row, lane);
#pragma unroll
  for (int strip = 0; strip < STRIPS; strip += ASKED) {
    uint4 x[ASKED][BANDS];
    read_vectors(vectors, strip, lane, x);
#pragma unroll
    for (int s = 0; s < ASKED; ++s) {
      write_bottom(row, x[s][0], strip + s, lane);
      products.add_strip(x[s]);
    }
  }
  products.write_pairs(row, lane);
  __syncwarp();
  copy_row(out + b * out_stride, row, lane);
}

// grad_vectors[i] = sum over j of grad_ij vectors[j], and on place 0 grad_out's first D columns too.
KERNEL void __launch_bounds__(128) interaction_backward(
    const NUMBER* __restrict__ vectors, const NUMBER* __restrict__ grad_out, int64 num_rows, int64 grad_stride,
    NUMBER* __restrict__ grad_vectors) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % LANES;
  NUMBER* row = reinterpret_cast<NUMBER*>(shared) + threadIdx.x / LANES * PADDED;
  const int64 b = int64(blockIdx.x) * (blockDim.x / LANES) + threadIdx.x / LANES;
  if (b >= num_rows) return;
  vectors += b * VECTORS * DIM;
  grad_vectors += b * VECTORS * DIM;
  copy_row(row, grad_out + b * grad_stride, lane);
  __syncwarp();
  Gradients gradients;
  gradients.read(row, lane);
#pragma unroll
  for (int first_strip = 0; first_strip < STRIPS; first_strip += ASKED) {
    uint4 x[ASKED][BANDS];
    read_vectors(vectors, first_strip, lane, x);
#pragma unroll
    for (int s = 0; s < ASKED; ++s) gradients.write_strip(x[s], row, first_strip + s, lane, grad_vectors);
  }
}

#else  // WEIGHT: straight from the tables

constexpr int COUNT = ASKED < BATCHED ? ASKED : BATCHED;

DEVICE uint4 packed(float4 a, float4 b) {
  return make_uint4(pack(NUMBER(), a.x, a.y), pack(NUMBER(), a.z, a.w), pack(NUMBER(), b.x, b.y), pack(NUMBER(), b.z, b.w));
}

#ifndef LISTED

// Eight numbers of a table row, in the type that the tensor cores multiply.
DEVICE uint4 fragment(const NUMBER* source) { return read_16(source); }
template <typename S>
DEVICE uint4 fragment(const S* source) {
  return packed(read_4(source), read_4(source + 4));
}

// The rows of the batch that a warp takes in turn. Lane l knows the keys of the bands' vectors l / 4, and asks for the
// next row's keys while it works on this one.
struct Rows {
  const int64* row_start;
  const KEY* keys;
  int64 num_rows;
  int64 start[BANDS];
  KEY key[BANDS];

  static DEVICE int table_of(int band, int lane) { return 8 * band + lane / 4 - FIRST; }
  static DEVICE bool is_table(int table) { return table >= 0 && table < VECTORS - FIRST; }

  DEVICE Rows(const int64* row_start, const KEY* keys, int64 num_rows, int64 b, int lane)
      : row_start(row_start), keys(keys), num_rows(num_rows) {
#pragma unroll
    for (int band = 0; band < BANDS; ++band) {
      const int table = table_of(band, lane);
      start[band] = is_table(table) ? row_start[table] : 0;
      key[band] = is_table(table) ? keys[table * num_rows + b] : KEY(0);
    }
  }

  // Where the row's vectors lie in `weight`; then the keys are those of row `next`.
  DEVICE void take(const WEIGHT* weight, int64 next, int lane, const WEIGHT* (&rows)[BANDS]) {
#pragma unroll
    for (int band = 0; band < BANDS; ++band) {
      rows[band] = weight + (start[band] + key[band]) * DIM;
      const int table = table_of(band, lane);
      if (is_table(table) && next < num_rows) key[band] = keys[table * num_rows + next];
    }
  }
};

// As read_vectors, place 0 from `bottom`, the others from the tables' rows.
DEVICE void read_rows(const NUMBER* bottom, const WEIGHT* const (&rows)[BANDS], int first_strip, int lane, uint4 (&x)[COUNT][BANDS]) {
#pragma unroll
  for (int s = 0; s < COUNT; ++s) {
    const int column = 32 * (first_strip + s) + lane % 4 * 8;
#pragma unroll
    for (int band = 0; band < BANDS; ++band) {
      const int vector = 8 * band + lane / 4;
      x[s][band] = make_uint4(0, 0, 0, 0);
      if (FIRST && vector == 0) {
        if (column < DIM) x[s][band] = read_16(bottom + column);
      } else if (vector < VECTORS && column < DIM) {
        x[s][band] = fragment(rows[band] + column);
      }
    }
  }
}

// interaction_forward of vectors that are never written: place 0 from `bottom`, table t's from its row
// weight[row_start[t] + keys[t, b]]. Every warp has many rows of the batch.
KERNEL void __launch_bounds__(128) gather_interaction(
    const NUMBER* __restrict__ bottom, int64 bottom_stride, const WEIGHT* __restrict__ weight,
    const int64* __restrict__ row_start, const KEY* __restrict__ keys, int64 num_rows, int64 out_stride,
    NUMBER* __restrict__ out) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % LANES;
  NUMBER* row = reinterpret_cast<NUMBER*>(shared) + threadIdx.x / LANES * PADDED;
  const int warps = blockDim.x / LANES;
  const int64 step = int64(gridDim.x) * warps;
  int64 b = int64(blockIdx.x) * warps + threadIdx.x / LANES;
  if (b >= num_rows) return;
  Rows own(row_start, keys, num_rows, b, lane);
  clear_padding(row, lane);
  for (; b < num_rows; b += step) {
    const WEIGHT* rows[BANDS];
    own.take(weight, b + step, lane, rows);
    Products products;
    products.clear();
#pragma unroll
    for (int first_strip = 0; first_strip < STRIPS; first_strip += COUNT) {
      uint4 x[COUNT][BANDS];
      read_rows(bottom + b * bottom_stride, rows, first_strip, lane, x);
#pragma unroll
      for (int s = 0; s < COUNT; ++s) {
        write_bottom(row, x[s][0], first_strip + s, lane);
        products.add_strip(x[s]);
      }
    }
    products.write_pairs(row, lane);
    __syncwarp();
    copy_row(out + b * out_stride, row, lane);
    __syncwarp();
  }
}

// interaction_backward of the same vectors, which are read from the tables once more.
KERNEL void __launch_bounds__(128, BLOCKS) gather_interaction_backward(
    const NUMBER* __restrict__ bottom, int64 bottom_stride, const WEIGHT* __restrict__ weight,
    const int64* __restrict__ row_start, const KEY* __restrict__ keys, const NUMBER* __restrict__ grad_out,
    int64 num_rows, int64 grad_stride, NUMBER* __restrict__ grad_vectors) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % LANES;
  NUMBER* row = reinterpret_cast<NUMBER*>(shared) + threadIdx.x / LANES * PADDED;
  const int warps = blockDim.x / LANES;
  const int64 step = int64(gridDim.x) * warps;
  int64 b = int64(blockIdx.x) * warps + threadIdx.x / LANES;
  if (b >= num_rows) return;
  Rows own(row_start, keys, num_rows, b, lane);
  for (; b < num_rows; b += step) {
    const WEIGHT* rows[BANDS];
    own.take(weight, b + step, lane, rows);
    // The first vectors are on their way while the gradients of the pairs come.
    uint4 x[COUNT][BANDS];
    read_rows(bottom + b * bottom_stride, rows, 0, lane, x);
    copy_row(row, grad_out + b * grad_stride, lane);
    __syncwarp();
    Gradients gradients;
    gradients.read(row, lane);
#pragma unroll
    for (int first_strip = 0; first_strip < STRIPS; first_strip += COUNT) {
      if (first_strip) read_rows(bottom + b * bottom_stride, rows, first_strip, lane, x);
#pragma unroll
      for (int s = 0; s < COUNT; ++s) {
        gradients.write_strip(x[s], row, first_strip + s, lane, grad_vectors + b * VECTORS * DIM);
      }
    }
    __syncwarp();
  }
}

#else  // LISTED

// Where a row of the batch has its vectors. Lane l knows the vectors l / 4 of the bands, and asks for the next row's
// list while it works on this one.
struct Listed {
  const int* list;  // [T, B]
  int64 num_rows;
  int item[BANDS];

  static DEVICE int table_of(int band, int lane) { return 8 * band + lane / 4 - FIRST; }
  static DEVICE bool is_table(int table) { return table >= 0 && table < VECTORS - FIRST; }

  DEVICE Listed(const int* list, int64 num_rows, int64 b, int lane) : list(list), num_rows(num_rows) { ask(b, lane); }

  DEVICE void ask(int64 b, int lane) {
#pragma unroll
    for (int band = 0; band < BANDS; ++band) {
      const int table = table_of(band, lane);
      if (is_table(table) && b < num_rows) item[band] = list[table * num_rows + b];
    }
  }
};

// Bytes of the tables' rows, and of those that are in the type that is multiplied: place 0 and what has come.
struct Sources {
  const unsigned char* rows[BANDS];
  uint32 narrow;  // bit n: that of band n is one of these

  DEVICE void take(const Listed& list, const WEIGHT* weight, const NUMBER* come, const NUMBER* bottom, int lane) {
    narrow = 0;
#pragma unroll
    for (int band = 0; band < BANDS; ++band) {
      const int item = Listed::is_table(Listed::table_of(band, lane)) ? list.item[band] : 0;
      rows[band] = item >= 0 ? reinterpret_cast<const unsigned char*>(weight + int64(item) * DIM)
                             : reinterpret_cast<const unsigned char*>(come + int64(~item) * DIM);
      if (item < 0) narrow |= 1u << band;
      if (FIRST && band == 0 && lane < 4) {
        rows[band] = reinterpret_cast<const unsigned char*>(bottom);
        narrow |= 1;
      }
    }
  }
};

DEVICE uint4 narrowed(const float*, uint4 low, uint4 high) { return packed(floats(low), floats(high)); }
DEVICE uint4 narrowed(const NUMBER*, uint4 low, uint4) { return low; }
template <typename S>
DEVICE uint4 narrowed(const S*, uint4 low, uint4) {
  return packed(floats<S>(make_uint2(low.x, low.y)), floats<S>(make_uint2(low.z, low.w)));
}

// As read_rows; all lanes read alike, whatever their row is, so that nothing waits for another lane's row.
DEVICE void read_sources(const Sources& own, int first_strip, int lane, uint4 (&x)[COUNT][BANDS]) {
  constexpr bool WIDE = sizeof(WEIGHT) == 4;
  uint4 low[COUNT][BANDS], high[COUNT][BANDS];
#pragma unroll
  for (int s = 0; s < COUNT; ++s) {
    const int column = 32 * (first_strip + s) + lane % 4 * 8;
#pragma unroll
    for (int band = 0; band < BANDS; ++band) {
      const bool narrow = own.narrow >> band & 1;
      low[s][band] = high[s][band] = make_uint4(0, 0, 0, 0);
      if (8 * band + lane / 4 < VECTORS && column < DIM) {
        const unsigned char* source = own.rows[band] + column * (narrow ? 2 : int(sizeof(WEIGHT)));
        low[s][band] = read_16(source);
        if (WIDE && !narrow) high[s][band] = read_16(source + 16);
      }
    }
  }
#pragma unroll
  for (int s = 0; s < COUNT; ++s) {
#pragma unroll
    for (int band = 0; band < BANDS; ++band) {
      x[s][band] = own.narrow >> band & 1 ? low[s][band]
                                          : narrowed(static_cast<const WEIGHT*>(nullptr), low[s][band], high[s][band]);
    }
  }
}

// gather_interaction of the rows weight[sources[t, b]], or come[~sources[t, b]] where that is negative.
KERNEL void __launch_bounds__(128) listed_interaction(
    const NUMBER* __restrict__ bottom, int64 bottom_stride, const WEIGHT* __restrict__ weight,
    const NUMBER* __restrict__ come, const int* __restrict__ sources, int64 num_rows, int64 out_stride,
    NUMBER* __restrict__ out) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % LANES;
  NUMBER* row = reinterpret_cast<NUMBER*>(shared) + threadIdx.x / LANES * PADDED;
  const int warps = blockDim.x / LANES;
  const int64 step = int64(gridDim.x) * warps;
  int64 b = int64(blockIdx.x) * warps + threadIdx.x / LANES;
  if (b >= num_rows) return;
  Listed list(sources, num_rows, b, lane);
  clear_padding(row, lane);
  for (; b < num_rows; b += step) {
    Sources own;
    own.take(list, weight, come, bottom + b * bottom_stride, lane);
    list.ask(b + step, lane);
    Products products;
    products.clear();
#pragma unroll
    for (int first_strip = 0; first_strip < STRIPS; first_strip += COUNT) {
      uint4 x[COUNT][BANDS];
      read_sources(own, first_strip, lane, x);
#pragma unroll
      for (int s = 0; s < COUNT; ++s) {
        write_bottom(row, x[s][0], first_strip + s, lane);
        products.add_strip(x[s]);
      }
    }
    products.write_pairs(row, lane);
    __syncwarp();
    copy_row(out + b * out_stride, row, lane);
    __syncwarp();
  }
}

// gather_interaction_backward of the same rows. Where SENT, the gradient of the row slots[t, b] of those that were asked
// for takes the place of that row in `come`, or from `num_come` on goes to `own`; the others go to grad_vectors. A
// thread has read a number of `come` before it writes there, and nobody else reads it.
KERNEL void __launch_bounds__(128, BLOCKS) listed_interaction_backward(
    const NUMBER* __restrict__ bottom, int64 bottom_stride, const WEIGHT* __restrict__ weight, NUMBER* come,
    const int* __restrict__ sources, const NUMBER* __restrict__ grad_out, int64 num_rows, int64 grad_stride,
    NUMBER* grad_vectors, const int* __restrict__ slots, int num_come, NUMBER* own) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % LANES;
  NUMBER* row = reinterpret_cast<NUMBER*>(shared) + threadIdx.x / LANES * PADDED;
  const int warps = blockDim.x / LANES;
  const int64 step = int64(gridDim.x) * warps;
  int64 b = int64(blockIdx.x) * warps + threadIdx.x / LANES;
  if (b >= num_rows) return;
  Listed list(sources, num_rows, b, lane);
  Listed places(SENT ? slots : sources, num_rows, b, lane);
  for (; b < num_rows; b += step) {
    Sources rows;
    rows.take(list, weight, come, bottom + b * bottom_stride, lane);
    list.ask(b + step, lane);
    NUMBER* targets[BANDS];
#pragma unroll
    for (int band = 0; band < BANDS; ++band) {
      const int slot = SENT && Listed::is_table(Listed::table_of(band, lane)) ? places.item[band] : -1;
      targets[band] = slot < 0         ? grad_vectors + (b * VECTORS + 8 * band + lane / 4) * DIM
                      : slot < num_come ? come + int64(slot) * DIM
                                        : own + int64(slot - num_come) * DIM;
    }
    if (SENT) places.ask(b + step, lane);
    // The first vectors are on their way while the gradients of the pairs come.
    uint4 x[COUNT][BANDS];
    read_sources(rows, 0, lane, x);
    copy_row(row, grad_out + b * grad_stride, lane);
    __syncwarp();
    Gradients gradients;
    gradients.read(row, lane);
#pragma unroll
    for (int first_strip = 0; first_strip < STRIPS; first_strip += COUNT) {
      if (first_strip) read_sources(rows, first_strip, lane, x);
#pragma unroll
      for (int s = 0; s < COUNT; ++s) {
        gradients.write_strip_to(x[s], row, first_strip + s, lane, [&](int band, int) { return targets[band]; });
      }
    }
    __syncwarp();
  }
}

#endif  // LISTED

#endif  // WEIGHT
