// What the threads of a block do together to order and to pack: sums of lower threads' counts, a sorted tile, merged
// runs. `before(x, y)` is a strict order of Entry, a struct of 16 bytes.
#pragma once
#include "core/device.cuh"

namespace gg {

// The sum over lower threads; all of the block come here, and all get the total. `warp_sums` is shared memory for one
// number of each warp.
template <int threads> __device__ __forceinline__ int sum_below(int own, int *warp_sums, int &total) {
  const int lane = int(threadIdx.x) % 32, warp = int(threadIdx.x) / 32;
  int inclusive = own;
#pragma unroll
  for (int by = 1; by < 32; by *= 2) {
    const int below = broadcast(inclusive, lane >= by ? lane - by : lane);
    inclusive += lane >= by ? below : 0;
  }
  if (lane == 31)
    warp_sums[warp] = inclusive;
  __syncthreads(); // everyone's sum is there
  int before = 0;
  total = 0;
  for (int i = 0; i < threads / 32; ++i) {
    before += i < warp ? warp_sums[i] : 0;
    total += warp_sums[i];
  }
  __syncthreads(); // nobody reads them any more
  return before + inclusive - own;
}

// Sorts what all threads have written to shared memory, by Batcher's bitonic network; then all may read it.
template <int tile, int threads, class Entry, class Before>
__device__ __forceinline__ void sort_tile(Entry *shared, const Before &before) {
#pragma unroll 1
  for (int size = 2; size <= tile; size *= 2)
#pragma unroll 1
    for (int by = size / 2; by > 0; by /= 2) {
      __syncthreads(); // the step before is done
      for (int p = int(threadIdx.x); p < tile / 2; p += threads) {
        const int i = 2 * p - (p & (by - 1)), j = i + by;
        const Entry x = shared[i], y = shared[j];
        if (before(y, x) == !(i & size))
          shared[i] = y, shared[j] = x;
      }
    }
  __syncthreads(); // before the tile is read
}

// How many of the first `count` of x and y, merged, are x's: where a diagonal crosses the path of the merge.
template <class Entry, class Before>
__device__ __forceinline__ int64_t split(const Before &before, const Entry *x, int64_t in_x, const Entry *y,
                                         int64_t in_y, int64_t count) {
  int64_t low = most(0, count - in_y), high = least(count, in_x);
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (before(y[count - 1 - middle], x[middle]))
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

template <int tile, class Entry> constexpr int64_t merge_bytes = tile * int64_t(sizeof(Entry)) + 2 * 8;

// The entries from `first`, a multiple of `tile`, of what merging pairs of runs of `width` entries gives.
template <int tile, int threads, class Entry, class Before>
__device__ __forceinline__ void merge_tile(const Entry *from, Entry *to, int64_t entries, int64_t width, int64_t first,
                                           char *memory, const Before &before) {
  Entry *shared = reinterpret_cast<Entry *>(memory);
  int64_t *ends = reinterpret_cast<int64_t *>(shared + tile);
  const int64_t begin = first / (2 * width) * (2 * width), offset = first - begin;
  const int64_t in_x = least(width, entries - begin), in_y = least(width, entries - begin - in_x);
  const int n = int(least(tile, in_x + in_y - offset));
  const Entry *x = from + begin, *y = x + in_x;
  if (threadIdx.x < 2)
    ends[threadIdx.x] = split(before, x, in_x, y, in_y, offset + threadIdx.x * n);
  __syncthreads(); // both ends are known
  const int64_t x_first = ends[0], y_first = offset - x_first;
  const int xs = int(ends[1] - x_first), ys = n - xs;
  for (int i = int(threadIdx.x); i < n; i += threads)
    shared[i] = i < xs ? x[x_first + i] : y[y_first + i - xs];
  __syncthreads(); // both parts are here
  constexpr int per_thread = tile / threads;
  const int own = int(least(n, threadIdx.x * per_thread));
  int i = int(split(before, shared, xs, shared + xs, ys, own)), j = own - i;
#pragma unroll
  for (int e = 0; e < per_thread; ++e) {
    if (own + e < n) {
      const bool take_x = j >= ys || (i < xs && !before(shared[xs + j], shared[i]));
      to[first + own + e] = shared[take_x ? i++ : xs + j++];
    }
  }
  __syncthreads(); // before the next tile is written
}

} // namespace gg
