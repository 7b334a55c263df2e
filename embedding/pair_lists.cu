// Lists of the rows that travel between each pair of ranks: the kernels of pair_lists_cuda.py, references in
// pair_lists.py; and those of runs.py.
//
// Shapes: W ranks, T tables, G rows of the global batch, B of a rank, F places, N tiles of one rank's keys.
// Macros: KEY: type of the keys.
//
// A warp takes a tile of keys of one table and one rank; how many rows of each owner lie in the tiles before it was
// counted first, so that lists come out in the order of the batch without any waiting.
#include "dlrm/kernels.cuh"

#define LANES 32
#define TILE 512
#define THREADS 256
#define WARPS (THREADS / LANES)

// A tile: keys of table `table`, rows begin .. begin + count of the global batch, which are rank `rank`'s rows from
// `row` on; tile number `number` of that rank.
struct Tile { int rank, table; uint32 number, begin, row; int count; };

DEVICE Tile tile_of(uint32 index, uint32 global_rows, int ranks, int num_tables, uint32 chunks) {
  const uint32 tiles = num_tables * chunks;
  Tile tile;
  tile.rank = int(index / tiles);
  tile.number = index % tiles;
  tile.table = int(tile.number / chunks);
  tile.row = tile.number % chunks * TILE;
  const uint32 first = start_of(global_rows, ranks, tile.rank);
  const uint32 size = start_of(global_rows, ranks, tile.rank + 1) - first;
  tile.begin = first + tile.row;
  tile.count = tile.row >= size ? 0 : size - tile.row < TILE ? int(size - tile.row) : TILE;
  return tile;
}

// The rank that has a key's row, or -1: all have it, or there is no key.
DEVICE int owner_of(int64 key, int64 threshold, int owner, int ranks) {
  if (key < threshold) return -1;
  if (owner >= 0) return owner;
  return int(uint64(key - threshold) % uint32(ranks));
}

// counts[o, r, n] = rows of owner o in rank r's tile n.
KERNEL void __launch_bounds__(THREADS) count_owners(
    const KEY* __restrict__ keys, const int* __restrict__ keys_of, const int64* __restrict__ threshold,
    const int* __restrict__ owner, int ranks, int bits, int num_tables, uint32 global_rows, uint32 chunks,
    uint32* __restrict__ counts, int* __restrict__ flag) {
  DYNAMIC_SHARED(shared);
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  if (blockIdx.x == 0 && threadIdx.x == 0) *flag = 0;
  const uint32 index = blockIdx.x * WARPS + warp, tiles = num_tables * chunks;
  if (index >= ranks * tiles) return;
  uint32* own = reinterpret_cast<uint32*>(shared) + warp * ranks;
  for (int o = lane; o < ranks; o += LANES) own[o] = 0;
  __syncwarp();
  const Tile tile = tile_of(index, global_rows, ranks, num_tables, chunks);
  const KEY* tile_keys = keys + int64(keys_of[tile.table]) * global_rows + tile.begin;
  const int64 limit = threshold[tile.table];
  const int table_owner = owner[tile.table];
  for (int round = 0; round < tile.count; round += LANES) {
    const int k = round + lane;
    const int o = k < tile.count ? owner_of(tile_keys[k], limit, table_owner, ranks) : -1;
    const uint32 alike = lanes_alike(uint32(o + 1), bits);
    if (o >= 0 && (alike & ((1u << lane) - 1)) == 0) own[o] += __popc(alike);
    __syncwarp();
  }
  for (int o = lane; o < ranks; o += LANES) counts[(int64(o) * ranks + tile.rank) * tiles + tile.number] = own[o];
}

// Sums of `value` over the threads before this one; `total`: over all.
DEVICE uint32 sum_before(uint32 value, uint32& total) {
  SHARED uint32 sums[WARPS];
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  uint32 sum = value;
#pragma unroll
  for (int distance = 1; distance < LANES; distance *= 2) {
    const uint32 other = __shfl_up_sync(ALL_LANES, sum, distance);
    if (lane >= distance) sum += other;
  }
  __syncthreads();
  if (lane == LANES - 1) sums[warp] = sum;
  __syncthreads();
  uint32 before = 0;
  total = 0;
  for (int w = 0; w < WARPS; ++w) {
    if (w < warp) before += sums[w];
    total += sums[w];
  }
  return before + sum - value;
}

// counts become sums over the tiles before; one block for each pair (owner, rank).
KERNEL void __launch_bounds__(THREADS) add_tiles(
    uint32* __restrict__ counts, uint32 tiles, int ranks, const int* __restrict__ capacity,
    uint32* __restrict__ totals, int* __restrict__ flag) {
  uint32* own = counts + int64(blockIdx.x) * tiles;
  uint32 carried = 0;
  for (uint32 begin = 0; begin < tiles; begin += THREADS) {
    const uint32 tile = begin + threadIdx.x;
    uint32 total;
    const uint32 before = sum_before(tile < tiles ? own[tile] : 0, total);
    if (tile < tiles) own[tile] = carried + before;
    carried += total;
  }
  if (threadIdx.x != 0) return;
  totals[blockIdx.x] = carried;
  if (carried > uint32(capacity[blockIdx.x / ranks])) *flag = 1;  // whoever writes writes the same
}

// Fill the lists up behind their last rows.
DEVICE void pad_lists(int ranks, int rank, const int* capacity, const int* asked_start, const int* chunk_of,
                      const uint32* totals, int own_pad, int* asked, int* given) {
  const uint32 thread = blockIdx.x * THREADS + threadIdx.x, threads = gridDim.x * THREADS;
  const uint32 own_capacity = uint32(capacity[rank]);
  for (int other = 0; other < ranks; ++other) {
    const uint32 size = uint32(capacity[other]);
    for (uint32 i = totals[other * ranks + rank] + thread; i < size; i += threads) asked[asked_start[other] + i] = -1;
    const uint32 chunk = chunk_of[other];
    for (uint32 i = totals[rank * ranks + other] + thread; i < own_capacity; i += threads) {
      given[chunk * own_capacity + i] = own_pad;
    }
  }
}

KERNEL void __launch_bounds__(THREADS) list_owners(
    const KEY* __restrict__ keys, const int* __restrict__ keys_of, const int64* __restrict__ threshold,
    const int* __restrict__ owner, const int64* __restrict__ frequent_start, const int64* __restrict__ own_start,
    const int64* __restrict__ place, const int* __restrict__ frequent_pad, int num_places, int ranks, int bits, int rank, int own_pad, int num_tables,
    uint32 global_rows, uint32 chunks, const int* __restrict__ capacity, const int* __restrict__ asked_start,
    const int* __restrict__ chunk_of, const uint32* __restrict__ counts, const uint32* __restrict__ totals, int* __restrict__ asked,
    int* __restrict__ given, int* __restrict__ local, int* __restrict__ sources, int* __restrict__ slots,
    int with_sources, int* __restrict__ frequent, uint32* __restrict__ replicated, int* __restrict__ own_rows,
    int with_own, unsigned char* __restrict__ touched, const int64* __restrict__ relay_row_start,
    const int* __restrict__ relay_start, int* __restrict__ relay, int with_relay) {
  DYNAMIC_SHARED(shared);
  pad_lists(ranks, rank, capacity, asked_start, chunk_of, totals, own_pad, asked, given);
  const int lane = threadIdx.x % LANES, warp = threadIdx.x / LANES;
  const uint32 index = blockIdx.x * WARPS + warp, tiles = num_tables * chunks;
  if (index >= ranks * tiles) return;
  const Tile tile = tile_of(index, global_rows, ranks, num_tables, chunks);
  const bool mine = tile.rank == rank;
  uint32* known = reinterpret_cast<uint32*>(shared) + warp * ranks;  // rows of each owner up to here
  for (int o = lane; o < ranks; o += LANES) known[o] = counts[(int64(o) * ranks + tile.rank) * tiles + tile.number];
  __syncwarp();
  const KEY* tile_keys = keys + int64(keys_of[tile.table]) * global_rows + tile.begin;
  const int64 limit = threshold[tile.table], first_frequent = frequent_start[tile.table];
  const int64 first_own = own_start[tile.table];
  const int table_owner = owner[tile.table], own_capacity = capacity[rank], own_place = int(place[tile.table]);
  const int chunk = chunk_of[tile.rank];
  const int64 own_rows_of_batch = start_of(global_rows, ranks, rank + 1) - start_of(global_rows, ranks, rank);
  if (index == 0 && lane == 0) {
    uint32 others = 0;
    for (int o = 0; o < ranks; ++o) others += totals[o * ranks + rank];
    *replicated = uint32(num_tables * own_rows_of_batch) - others;
  }
  for (int round = 0; round < tile.count; round += LANES) {
    const int k = round + lane;
    const bool inside = k < tile.count;
    const int64 key = inside ? int64(tile_keys[k]) : 0;
    const int o = inside ? owner_of(key, limit, table_owner, ranks) : -1;
    const uint32 alike = lanes_alike(uint32(o + 1), bits), lower = alike & ((1u << lane) - 1);
    uint32 at = 0;
    if (o >= 0) at = known[o] + __popc(lower);
    __syncwarp();
    if (o >= 0 && lower == 0) known[o] += __popc(alike);
    __syncwarp();
    if (!inside) continue;  // the last round: nobody waits behind it
    const int64 beyond = table_owner >= 0 ? key - limit : (key - limit) / ranks;
    const bool replicated_row = o < 0 && key >= 0;  // a negative key is none
    if (replicated_row) touched[first_frequent + key] = 1;
    if (o == rank && at < uint32(own_capacity)) given[int64(chunk) * own_capacity + at] = int(first_own + beyond);
    if (with_relay && o >= 0 && at < uint32(capacity[o])) {
      const int begin = relay_start[o * ranks + tile.rank];
      if (begin >= 0) relay[begin + at] = int(relay_row_start[tile.table] + beyond);
    }
    if (!mine) continue;
    const int64 row = tile.row + k, item = tile.table * own_rows_of_batch + row;
    const int64 at_place = row * num_places + own_place;
    const bool fits = o >= 0 && at < uint32(capacity[o]);
    const int slot = fits ? int(asked_start[o] + at) : -1;
    if (fits) asked[slot] = int(at_place);
    const int here = replicated_row ? int(first_frequent + key) : o == rank ? int(first_own + beyond) : -1;
    if (with_sources) {
      sources[item] = here >= 0 ? here : fits ? ~slot : 0;  // any row for what did not fit: the batch is run again
      slots[item] = o == rank && with_own ? -1 : slot;
    } else {
      local[at_place] = here;
    }
    frequent[item] = replicated_row ? int(key) : frequent_pad[tile.table];
    if (with_own) own_rows[item] = o == rank ? int(beyond) : -1;
  }
}

// Whether a row begins a run in its group; rows of padding begin none.
DEVICE bool begins_run(const uint32* rows, uint32 begin, uint32 at, uint32 pad) {
  return rows[at] != pad && (at == begin || rows[at] != rows[at - 1]);
}

// counts[g, n] = runs that begin in tile n of group g; groups are `size` sorted rows each.
KERNEL void __launch_bounds__(THREADS) count_runs(
    const uint32* __restrict__ rows, uint32 size, uint32 groups, uint32 chunks, const int64* __restrict__ row_start,
    uint32 pad, uint32* __restrict__ counts) {
  const int lane = threadIdx.x % LANES;
  const uint32 index = blockIdx.x * WARPS + threadIdx.x / LANES;
  if (index >= groups * chunks) return;
  const uint32 group = index / chunks, begin = group * size, own_pad = uint32(row_start[group]) + pad;
  uint32 count = 0;
  for (uint32 k = index % chunks * TILE; k < (index % chunks + 1) * TILE && k < size; k += LANES) {
    count += __popc(__ballot_sync(ALL_LANES, k + lane < size && begins_run(rows, begin, begin + k + lane, own_pad)));
  }
  if (lane == 0) counts[index] = count;
}

// slots[i] = the number of row i's run in its group, from slot_start[g] on; the row of padding, and what does not fit,
// gets the group's last slot. distinct[slot] = the row; padded.
KERNEL void __launch_bounds__(THREADS) number_runs(
    const uint32* __restrict__ rows, uint32 size, uint32 groups, uint32 chunks, const int64* __restrict__ row_start,
    uint32 pad, const int* __restrict__ slot_start, const uint32* __restrict__ counts,
    const uint32* __restrict__ totals, uint32* __restrict__ slots, int* __restrict__ distinct) {
  const int lane = threadIdx.x % LANES;
  const uint32 index = blockIdx.x * WARPS + threadIdx.x / LANES;
  for (uint32 g = 0; g < groups; ++g) {
    for (uint32 i = slot_start[g] + totals[g] + blockIdx.x * THREADS + threadIdx.x; i < uint32(slot_start[g + 1]);
         i += gridDim.x * THREADS) {
      distinct[i] = int(pad);
    }
  }
  if (index >= groups * chunks) return;
  const uint32 group = index / chunks, begin = group * size, first = uint32(row_start[group]), own_pad = first + pad;
  const uint32 slot = slot_start[group], room = slot_start[group + 1] - slot - 1;
  if (lane == 0 && index % chunks == 0) distinct[slot + room] = int(pad);
  uint32 known = counts[index];
  for (uint32 k = index % chunks * TILE; k < (index % chunks + 1) * TILE && k < size; k += LANES) {
    const bool inside = k + lane < size;
    const uint32 at = begin + k + lane, row = inside ? rows[at] : own_pad;
    const bool head = inside && begins_run(rows, begin, at, own_pad);
    const uint32 heads = __ballot_sync(ALL_LANES, head);
    const uint32 number = known + __popc(heads & ((2u << lane) - 1)) - 1;
    known += __popc(heads);
    if (inside) slots[at] = slot + (row == own_pad || number >= room ? room : number);
    if (head && number < room) distinct[slot + number] = int(row - first);
  }
}

// out[places[i]] = numbers[i].
KERNEL void __launch_bounds__(THREADS) put_numbers(
    const int* __restrict__ numbers, const uint32* __restrict__ places, int64 count, int* __restrict__ out) {
  const int64 i = int64(blockIdx.x) * THREADS + threadIdx.x;
  if (i < count) out[places[i]] = numbers[i];
}

// counts[n] = touched rows in tile n.
KERNEL void __launch_bounds__(THREADS) count_touched(
    const unsigned char* __restrict__ touched, uint32 size, uint32* __restrict__ counts) {
  const int lane = threadIdx.x % LANES;
  const uint32 index = blockIdx.x * WARPS + threadIdx.x / LANES;
  if (index * TILE >= size) return;
  uint32 count = 0;
  for (uint32 k = index * TILE; k < (index + 1) * TILE && k < size; k += LANES) {
    count += __popc(__ballot_sync(ALL_LANES, k + lane < size && touched[k + lane]));
  }
  if (lane == 0) counts[index] = count;
}

// rows = the touched rows in ascending order, as many as there is room for; -1 behind them.
KERNEL void __launch_bounds__(THREADS) list_touched(
    const unsigned char* __restrict__ touched, uint32 size, const uint32* __restrict__ counts,
    const uint32* __restrict__ total, uint32 room, int* __restrict__ rows) {
  for (uint32 i = *total + blockIdx.x * THREADS + threadIdx.x; i < room; i += gridDim.x * THREADS) rows[i] = -1;
  const int lane = threadIdx.x % LANES;
  const uint32 index = blockIdx.x * WARPS + threadIdx.x / LANES;
  if (index * TILE >= size) return;
  uint32 known = counts[index];
  for (uint32 k = index * TILE; k < (index + 1) * TILE && k < size; k += LANES) {
    const bool there = k + lane < size && touched[k + lane];
    const uint32 heads = __ballot_sync(ALL_LANES, there), at = known + __popc(heads & ((1u << lane) - 1));
    known += __popc(heads);
    if (there && at < room) rows[at] = int(k + lane);
  }
}
