// trajectory_match on a GPU: every tensor is cut into chunks of one length, a block sums a chunk or writes its
// gradient, one more block adds the sums. The table of tensors travels in the kernel's parameters, a batch of tensors
// per launch: nothing is copied to the card, so that calls can be captured in a graph. What bounds it: reading the
// tensors once. See docs/gpu/trajectory_match.md.
#include "core/launch.cuh"
#include "trajectory_match/trajectory_match.h"
#include <type_traits>

namespace gg {
namespace {

using Totals = TrajectoryMatch::Totals;

constexpr int threads = 256, warps = threads / 32;

// What a sweep does.
enum Sweep { start_sums = 1, student_sums = 2, gradients = 4 };

struct Part {
  const void *student, *start, *target, *mask;
  void *gradient;
  int64_t size, dropped; // so many leading scalars have weight 0
  double weight;
};

// What a launch is told: kernels take 4 KiB of parameters at most.
struct Batch {
  static constexpr int most = 58;
  Part tensor[most];
  int32_t first_block[most + 1];
  int32_t count;
  bool bool_mask;
  int64_t chunk;    // scalars per block, a multiple of what the block's threads read in one step
  Totals *partials; // of this launch's blocks
  const Totals *totals;
  const void *loss_gradient;

  // The tensor that a block works on: the last one that begins at or before it.
  __device__ int tensor_of(int block) const {
    int t = 0;
    for (int beyond = count; beyond - t > 1;) {
      const int middle = (t + beyond) / 2;
      if (first_block[middle] <= block)
        t = middle;
      else
        beyond = middle;
    }
    return t;
  }
};
static_assert(sizeof(Batch) <= 4096);

// The first `count` of n neighbours, the others 0. Whole groups that are `aligned` move 16 bytes at a time, or all of
// them where they are fewer; other ones one by one, with the same result.
template <int n, class T> __device__ __forceinline__ void load(T (&to)[n], const T *from, int count, bool aligned) {
  constexpr int bytes = n * int(sizeof(T)), part = bytes < 16 ? n : Vector<T>::size;
  using Word = std::conditional_t<bytes == 2, uint16_t, std::conditional_t<bytes == 4, uint32_t, uint64_t>>;
  if (!aligned || count < n) {
#pragma unroll
    for (int e = 0; e < n; ++e)
      to[e] = e < count ? from[e] : T{};
  } else if constexpr (bytes < 16) {
    const Word word = *reinterpret_cast<const Word *>(from);
    std::memcpy(to, &word, bytes);
  } else {
#pragma unroll
    for (int e = 0; e < n; e += part) {
      const Vector<T> v = load_vector(from + e);
      std::memcpy(to + e, &v, 16);
    }
  }
}

template <int n, class T> __device__ __forceinline__ void store(T *to, const T (&from)[n], int count, bool aligned) {
  if (!aligned || count < n) {
#pragma unroll
    for (int e = 0; e < n; ++e)
      if (e < count)
        to[e] = from[e];
  } else {
#pragma unroll
    for (int e = 0; e < n; e += Vector<T>::size) {
      Vector<T> v;
      std::memcpy(&v, from + e, 16);
      store_vector(to + e, v);
    }
  }
}

__device__ __forceinline__ void add(Totals &to, const Totals &x) {
  to.num += x.num, to.D += x.D, to.S += x.S, to.wrong += x.wrong;
}

// The block's sum, in thread 0: over lanes by halving, then over warps.
__device__ __forceinline__ Totals sum_over_block(Totals x) {
  Totals *of_warps = reinterpret_cast<Totals *>(dynamic_shared());
  x = {sum_over_warp(x.num), sum_over_warp(x.D), sum_over_warp(x.S), sum_over_warp(x.wrong)};
  if (threadIdx.x % 32 == 0)
    of_warps[threadIdx.x / 32] = x;
  __syncthreads();
  Totals sum{};
  for (int warp = 0; threadIdx.x == 0 && warp < warps; ++warp)
    add(sum, of_warps[warp]);
  return sum;
}

// 2 g / D in two factors: a power of two near its square root, and the rest. A difference is about sqrt(D), so neither
// product leaves the range of Acc where the gradient does not.
template <class Acc> struct Scale {
  Acc power;
  double rest;

  __device__ Scale(const Totals &totals, const void *loss_gradient) {
    const double g = loss_gradient ? double(*static_cast<const Acc *>(loss_gradient)) : 1, scale = 2 * g / totals.D;
    uint64_t bits;
    std::memcpy(&bits, &scale, 8);
    const int exponent = int(bits >> 52 & 0x7ff);
    const int half = exponent == 0 || exponent == 0x7ff ? 0 : (exponent - 1022) / 2;
    power = Acc(power_of_two(half));
    rest = scale * power_of_two(-half);
  }

private:
  static __device__ double power_of_two(int n) {
    const uint64_t bits = uint64_t(1023 + n) << 52;
    double x;
    std::memcpy(&x, &bits, 8);
    return x;
  }
};

// What one thread does with n neighbours of a tensor. Gradients that come with the loss are for computing with, those
// alone are autograd's. `weighted`: there is a mask of real numbers.
template <class In, int what, bool weighted> struct Step {
  using Acc = typename accumulator<In>::type;
  using Out = std::conditional_t<(what & student_sums) != 0, Acc, In>;
  static constexpr int n = Vector<In>::size;

  const Part &x;
  bool aligned, bool_mask;
  Acc power, scale;

  __device__ Step(const Part &x, bool bool_mask) : x(x), bool_mask(bool_mask), power(1), scale(1) {
    const uintptr_t places = place(x.student) | place(x.start) | place(x.target) | place(x.mask) | place(x.gradient);
    aligned = places % 16 == 0;
  }

  __device__ __forceinline__ void drop(int64_t i, int count) const {
    const Out zeros[n] = {};
    store(static_cast<Out *>(x.gradient) + i, zeros, count, aligned);
  }

  // Sums are without the tensor's weight.
  __device__ __forceinline__ void operator()(int64_t i, int count, Totals &sums) const {
    In student[n], start[n], target[n] = {};
    Acc m[n];
    uint8_t kept[n];
    if constexpr (what & (student_sums | gradients))
      load(student, static_cast<const In *>(x.student) + i, count, aligned);
    if constexpr (what & start_sums)
      load(start, static_cast<const In *>(x.start) + i, count, aligned);
    if (what != gradients || x.target)
      load(target, static_cast<const In *>(x.target) + i, count, aligned);
    if constexpr (weighted)
      load(m, static_cast<const Acc *>(x.mask) + i, count, aligned);
    else if (bool_mask)
      load(kept, static_cast<const uint8_t *>(x.mask) + i, count, aligned);

    const int64_t dropped = x.dropped - i;
    Out gradient[n];
#pragma unroll
    for (int e = 0; e < n; ++e) {
      bool keep = e >= dropped;
      if constexpr (weighted)
        keep = keep && m[e] != 0;
      else if (bool_mask)
        keep = keep && kept[e] != 0;
      const auto square = [&](Acc v) {
        return weighted ? double(m[e]) * (double(v) * double(v)) : double(v) * double(v);
      };
      const auto difference = [&](const In(&from)[n]) { return keep ? widen(from[e]) - widen(target[e]) : Acc(0); };
      if constexpr (what & start_sums) {
        sums.D += square(difference(start));
        sums.S += square(keep ? widen(start[e]) : Acc(0));
        if constexpr (weighted)
          sums.wrong += keep && e < count && !(m[e] >= 0) ? 1 : 0;
      }
      if constexpr (what & (student_sums | gradients)) {
        const Acc away = difference(student);
        if constexpr (what & student_sums)
          sums.num += square(away);
        if constexpr (what & gradients) {
          const Acc g = away * power * scale;
          gradient[e] = narrow<Out>(weighted ? g * m[e] : g);
        }
      }
    }
    if constexpr (what & gradients)
      store(static_cast<Out *>(x.gradient) + i, gradient, count, aligned);
  }

private:
  static __device__ uintptr_t place(const void *p) { return reinterpret_cast<uintptr_t>(p); }
};

// Three or four blocks share a multiprocessor and keep some 48 KiB of reads on their way.
template <class In, int what, bool weighted>
__global__ void __launch_bounds__(threads, weighted ? 3 : 4) trajectory_match_sweep(const __grid_constant__ Batch at) {
  using Step = Step<In, what, weighted>;
  if ((what & gradients) && !at.totals->usable())
    return;
  const int t = at.tensor_of(int(blockIdx.x));
  const Part &x = at.tensor[t];
  const int64_t begin = (int(blockIdx.x) - at.first_block[t]) * at.chunk, end = least(x.size, begin + at.chunk);
  const int64_t first =
      x.dropped < end ? most(begin, x.dropped / Step::n * Step::n) : end; // what lies before is dropped
  const int64_t own = Step::n * int64_t(threadIdx.x);
  constexpr int stride = Step::n * threads;

  Step step(x, at.bool_mask);
  if constexpr (what & gradients) {
    const Scale<typename Step::Acc> scale(*at.totals, at.loss_gradient);
    step.power = scale.power;
    step.scale = typename Step::Acc(scale.rest * x.weight);
    for (int64_t i = begin + own; i < first; i += stride)
      step.drop(i, int(least(Step::n, first - i)));
  }
  Totals sums{};
  for (int64_t i = first + own; i < end; i += stride)
    step(i, int(least(Step::n, end - i)), sums);
  if constexpr (what != gradients) {
    const Totals all = sum_over_block(sums);
    if (threadIdx.x == 0)
      at.partials[blockIdx.x] = {x.weight * all.num, x.weight * all.D, x.weight * all.S, all.wrong};
  }
}

// One block: adds the partial sums that a measuring sweep left.
template <class Acc>
__global__ void __launch_bounds__(threads)
    trajectory_match_finish(const Totals *partials, int64_t count, int what, Totals *totals, Acc *loss) {
  Totals sums{};
  if ((what & start_sums) || totals->usable()) // else the sweep has left nothing
    for (int64_t i = threadIdx.x; i < count; i += threads)
      add(sums, partials[i]);
  sums = sum_over_block(sums);
  if (threadIdx.x != 0)
    return;
  if (what & start_sums)
    *totals = sums;
  totals->num = sums.num;
  if (what & student_sums)
    *loss = Acc(totals->num / totals->D);
}

// ---------------------------------------------------------------------------------------------------------------------

// Chunks are as long as a grid of this many blocks makes them, 32 per multiprocessor of a nominal card; but each thread
// reads 16 bytes of two-byte scalars at least once.
constexpr int64_t most_blocks = 32 * 132, least_chunk = 8 * threads;
constexpr int64_t shared_bytes = warps * sizeof(Totals);

int64_t chunk_of(const TrajectoryMatch &s) {
  int64_t scalars = 0;
  for (int64_t t = 0; t < s.count; ++t)
    scalars += s.tensors[t].size;
  return least_chunk * most(1, ceil_div(scalars, least_chunk * most_blocks));
}

int64_t blocks_of(const TrajectoryMatch &s) {
  int64_t blocks = 0;
  for (int64_t t = 0, chunk = chunk_of(s); t < s.count; ++t)
    blocks += ceil_div(s.tensors[t].size, chunk);
  return blocks;
}

template <class In, int what> cudaError_t launch_batch(const Batch &at, bool weighted, void *stream) {
  const int64_t blocks = at.first_block[at.count];
  if (weighted)
    return launch(trajectory_match_sweep<In, what, true>, blocks, threads, shared_bytes, stream, at);
  return launch(trajectory_match_sweep<In, what, false>, blocks, threads, shared_bytes, stream, at);
}

template <class In, int what> cudaError_t sweep(const TrajectoryMatch &s, Totals *partials, void *stream) {
  Batch at{};
  at.bool_mask = s.bool_mask;
  at.chunk = chunk_of(s);
  at.partials = partials;
  at.totals = s.totals;
  at.loss_gradient = s.loss_gradient;
  bool weighted = false;
  int64_t scalars = 0;
  for (int64_t t = 0; t < s.count; ++t) {
    const TrajectoryMatch::Tensor &x = s.tensors[t];
    if (x.size) {
      const int64_t dropped = x.weight == 0 ? x.size : most(0, least(s.first - scalars, x.size));
      at.tensor[at.count] = {x.student, x.start, x.target, x.mask, x.gradient, x.size, dropped, x.weight};
      weighted = x.mask && !s.bool_mask;
      at.first_block[at.count + 1] = int32_t(at.first_block[at.count] + ceil_div(x.size, at.chunk));
      ++at.count, scalars += x.size;
    }
    if (at.count && (at.count == Batch::most || t + 1 == s.count)) {
      const cudaError_t error = launch_batch<In, what>(at, weighted, stream);
      if (error != cudaSuccess)
        return error;
      at.partials += at.first_block[at.count];
      at.count = 0;
    }
  }
  return cudaSuccess;
}

template <class In> cudaError_t run(const TrajectoryMatch &s, Totals *partials, void *stream) {
  using Acc = typename accumulator<In>::type;
  const int64_t blocks = blocks_of(s);
  const auto finish = [&](int what) {
    return launch(trajectory_match_finish<Acc>, 1, threads, shared_bytes, stream, partials, blocks, what, s.totals,
                  static_cast<Acc *>(s.loss));
  };
  if (!s.measure)
    return s.gradient ? sweep<In, gradients>(s, partials, stream) : cudaSuccess;
  cudaError_t error = s.gradient ? sweep<In, start_sums>(s, partials, stream)
                                 : sweep<In, start_sums | student_sums>(s, partials, stream);
  if (error == cudaSuccess)
    error = finish(s.gradient ? start_sums : start_sums | student_sums);
  if (error == cudaSuccess && s.gradient)
    error = sweep<In, student_sums | gradients>(s, partials, stream);
  if (error == cudaSuccess && s.gradient)
    error = finish(student_sums);
  return error;
}

} // namespace

int64_t trajectory_match_cuda_workspace(const TrajectoryMatch &s) {
  return s.measure ? blocks_of(s) * int64_t(sizeof(Totals)) : 0;
}

int trajectory_match_cuda(const TrajectoryMatch &s, void *workspace, void *stream) {
  if (blocks_of(s) > INT32_MAX)
    return cudaErrorInvalidConfiguration;
  Totals *partials = static_cast<Totals *>(workspace);
  return by_dtype(s.dtype, [&](auto element) { return run<decltype(element)>(s, partials, stream); });
}

} // namespace gg
