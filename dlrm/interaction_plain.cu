// Dot interaction without tensor cores, in float: float32 vectors, and shapes that interaction.cu does not take.
//
// Shapes: B rows of the batch, F vectors a row, D columns, P = F (F - 1) / 2 pairs (i, j), j < i.
// Macros: DIM = D, a multiple of 4; VECTORS = F; FIRST: 1 if place 0 is the bottom output; NUMBER: element type;
// backward: RELU: 1 if place 0 came out of a ReLU whose derivative is to be applied.
//
// A warp has one row of the batch in shared memory, [F rounded up to 4, D + 4]: the four extra columns keep neighbouring
// vectors in different banks.
#include "dlrm/kernels.cuh"

#define LANES 32

constexpr int BLOCKS = (VECTORS + 3) / 4;  // of four vectors
constexpr int STRIDE = DIM + 4;
constexpr int VECTOR_FLOATS = 4 * BLOCKS * STRIDE;
constexpr int BASE = FIRST * DIM;

DEVICE int pair_index(int high, int low) { return BASE + high * (high - 1) / 2 + low; }

DEVICE void stage_vectors(float* x, const NUMBER* vectors, int lane) {
  for (int item = lane; item < BLOCKS * DIM; item += LANES) {
    const int vector = item / (DIM / 4), column = item % (DIM / 4) * 4;
    const float4 v = vector < VECTORS ? read_4(vectors + vector * DIM + column) : make_float4(0, 0, 0, 0);
    *reinterpret_cast<float4*>(x + vector * STRIDE + column) = v;
  }
}

DEVICE float4 shared_4(const float* source) { return *reinterpret_cast<const float4*>(source); }

// out = [vectors[:, 0] if FIRST] + [dots]. A lane has 4 x 4 pairs at a time.
KERNEL void interaction_forward(
    const NUMBER* __restrict__ vectors, int64 num_rows, int64 out_stride, NUMBER* __restrict__ out) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % LANES;
  float* x = reinterpret_cast<float*>(shared) + threadIdx.x / LANES * VECTOR_FLOATS;
  const int64 b = int64(blockIdx.x) * (blockDim.x / LANES) + threadIdx.x / LANES;
  if (b >= num_rows) return;
  vectors += b * VECTORS * DIM;
  out += b * out_stride;
  stage_vectors(x, vectors, lane);
  for (int d = lane; d < BASE; d += LANES) out[d] = vectors[d];
  __syncwarp();
  for (int block = lane; block < BLOCKS * (BLOCKS + 1) / 2; block += LANES) {
    int high = 0;
    while ((high + 1) * (high + 2) / 2 <= block) ++high;
    const int low = block - high * (high + 1) / 2;
    float sum[4][4];
    for (int i = 0; i < 4; ++i) {
      for (int j = 0; j < 4; ++j) sum[i][j] = 0;
    }
    for (int d = 0; d < DIM; d += 4) {
      float4 u[4], v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        u[i] = shared_4(x + (4 * high + i) * STRIDE + d);
        v[i] = shared_4(x + (4 * low + i) * STRIDE + d);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sum[i][j] += u[i].x * v[j].x + u[i].y * v[j].y + u[i].z * v[j].z + u[i].w * v[j].w;
        }
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = 4 * high + i, column = 4 * low + j;
        if (column < row && row < VECTORS) store(out + pair_index(row, column), sum[i][j]);
      }
    }
  }
}

// grad_vectors[i] = sum over j of grad_ij vectors[j], and on place 0 grad_out's first D columns too. A lane has four
// columns of four vectors at a time.
KERNEL void interaction_backward(
    const NUMBER* __restrict__ vectors, const NUMBER* __restrict__ grad_out, int64 num_rows, int64 grad_stride,
    NUMBER* __restrict__ grad_vectors) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % LANES;
  float* x = reinterpret_cast<float*>(shared) + threadIdx.x / LANES * (VECTOR_FLOATS + VECTORS * 4 * BLOCKS);
  float* g = x + VECTOR_FLOATS;  // [F, F rounded up to 4], symmetric
  const int64 b = int64(blockIdx.x) * (blockDim.x / LANES) + threadIdx.x / LANES;
  if (b >= num_rows) return;
  vectors += b * VECTORS * DIM;
  grad_vectors += b * VECTORS * DIM;
  grad_out += b * grad_stride;
  stage_vectors(x, vectors, lane);
  for (int item = lane; item < VECTORS * 4 * BLOCKS; item += LANES) {
    const int i = item / (4 * BLOCKS), j = item % (4 * BLOCKS);
    g[item] = j < VECTORS && i != j ? to_float(grad_out[i > j ? pair_index(i, j) : pair_index(j, i)]) : 0.0f;
  }
  __syncwarp();
  for (int item = lane; item < BLOCKS * (DIM / 4); item += LANES) {
    const int first = item / (DIM / 4) * 4, d = item % (DIM / 4) * 4;
    float4 sum[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] = make_float4(0, 0, 0, 0);
    for (int j = 0; j < VECTORS; ++j) {
      const float4 v = shared_4(x + j * STRIDE + d), by = shared_4(g + j * 4 * BLOCKS + first);
      sum[0] = add_scaled(sum[0], by.x, v);
      sum[1] = add_scaled(sum[1], by.y, v);
      sum[2] = add_scaled(sum[2], by.z, v);
      sum[3] = add_scaled(sum[3], by.w, v);
    }
    if (FIRST && first == 0) {
      sum[0] = add(sum[0], make_float4(to_float(grad_out[d]), to_float(grad_out[d + 1]), to_float(grad_out[d + 2]),
                                       to_float(grad_out[d + 3])));
      if (RELU) {
        const float4 y = shared_4(x + d);
        sum[0] = make_float4(y.x <= 0 ? 0 : sum[0].x, y.y <= 0 ? 0 : sum[0].y, y.z <= 0 ? 0 : sum[0].z,
                             y.w <= 0 ? 0 : sum[0].w);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (first + i < VECTORS) write_4(grad_vectors + (first + i) * DIM + d, sum[i]);
    }
  }
}
