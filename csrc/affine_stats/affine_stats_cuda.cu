// affine_stats: b and x stream past once, 16 bytes per thread and load, and both sums of a column (or of a channel)
// stay in registers. Long samples are first summed to a few rows by many blocks; a warp then adds up a sample's rows,
// uses the sums and forgets them. What bounds it: reading b and x. See docs/gpu/affine_stats.md.
#include "affine_stats/affine_stats.h"
#include "core/columns.cuh"
#include "core/launch.cuh"
#include <type_traits>

namespace gg {
namespace {

constexpr int warps = 8, threads = 32 * warps, resident = 2;
constexpr int together = 4; // rows, or pieces of a channel, whose loads are in flight at once

// How `lanes` of a warp share a row, and `slabs` warps its columns; the warp's other lanes take other rows.
struct Across {
  int lanes;
  int64_t slabs;
};

// How the work is cut; a function of the shapes alone, and so are the bits of the results.
struct Plan {
  Across tokens, rows;         // of b and x, and of rows that are sums already
  int channel_lanes;           // that share a channel
  bool wide_channels;          // whether a channel is a whole number of 16-byte loads
  int64_t channel_blocks;      // of a sample
  int64_t cuts;                // of each sample's tokens or space, each summed to a row; 0: no such rows
  int64_t slabs;               // of the rows, or tokens, that warps add up sample by sample
  int64_t samples_per_group;   // whose sums are added together
  int64_t groups, row_columns; // columns of a row, a whole number of loads
};

// Where a block finds things. Rows of sums are [part][sample][cut][column], the weight being part 0.
template <class Acc> struct Launch {
  Plan plan;
  bool aligned;                // b and x allow 16-byte loads
  bool weight_wide, bias_wide; // their directions do
  Acc *rows;
  Acc *totals;   // [part][group][column]
  Acc *partials; // [sample][number][slab]: of the weight norms2, then dots, then of the bias
};

// Both sums for the n columns of a thread.
template <class Acc, int n> struct Sums {
  Acc w[n] = {}, v[n] = {};
};

template <class Acc> __device__ __forceinline__ Acc statistic(const void *from, int64_t at, Acc otherwise) {
  return from ? static_cast<const Acc *>(from)[at] : otherwise;
}

// Tokens as rows of a sample, their contributions to the sums.
template <class In, bool with_x> struct Tokens {
  using Acc = sum_of<In>;
  static constexpr int columns = Vector<In>::size;
  const AffineStats &s;
  const Plan &plan;
  bool aligned;

  __device__ Tokens(const AffineStats &s, const Launch<Acc> &at) : s(s), plan(at.plan), aligned(at.aligned) {}
  __device__ const Across &across() const { return plan.tokens; }
  __device__ int count() const { return int(s.tokens); }
  __device__ int64_t features() const { return s.features; }

  template <bool whole>
  __device__ __forceinline__ void add(Sums<Acc, columns> &sums, int64_t i, int t, int64_t col, int left) const {
    Acc y[columns];
    load_columns<whole, true>(static_cast<const In *>(s.b) + i * s.b_sample + t * s.b_row + col, left, y);
    if constexpr (with_x) {
      Acc x[columns];
      load_columns<whole, true>(static_cast<const In *>(s.x) + i * s.x_sample + t * s.x_row + col, left, x);
      const Acc mean = statistic<Acc>(s.mean, i * s.mean_sample + t * s.mean_step, 0);
      const Acc rstd = statistic<Acc>(s.rstd, i * s.rstd_sample + t * s.rstd_step, 1);
#pragma unroll
      for (int j = 0; j < columns; ++j)
        sums.w[j] += y[j] * ((x[j] - mean) * rstd);
    }
#pragma unroll
    for (int j = 0; j < columns; ++j)
      sums.v[j] += y[j];
  }
};

// Rows that an earlier kernel has summed.
template <class Acc_, bool with_x> struct SummedRows {
  using Acc = Acc_;
  static constexpr int columns = Vector<Acc>::size;
  const AffineStats &s;
  const Launch<Acc> &at;
  static constexpr bool aligned = true;

  __device__ SummedRows(const AffineStats &s, const Launch<Acc> &at) : s(s), at(at) {}
  __device__ const Across &across() const { return at.plan.rows; }
  __device__ int count() const { return int(at.plan.cuts); }
  __device__ int64_t features() const { return at.plan.row_columns; }

  template <bool whole>
  __device__ __forceinline__ void add(Sums<Acc, columns> &sums, int64_t i, int cut, int64_t col, int left) const {
    const Acc *from = at.rows + (i * at.plan.cuts + cut) * at.plan.row_columns + col;
    Sums<Acc, columns> row;
    if constexpr (with_x)
      load_columns<whole>(from, left, row.w);
    load_columns<whole>(from + s.samples * at.plan.cuts * at.plan.row_columns, left, row.v);
#pragma unroll
    for (int j = 0; j < columns; ++j)
      sums.w[j] += row.w[j], sums.v[j] += row.v[j];
  }
};

// A thread's place: which columns it owns, and which rows of those that its warp takes at once.
struct Place {
  int warp, lane, row;
  int rows; // that a warp takes at once
  int64_t col;
  int left; // columns of the thread that exist

  __device__ Place(const Across &across, int64_t slab, int columns, int64_t features)
      : warp(int(threadIdx.x) / 32), lane(int(threadIdx.x) % 32), row(lane / across.lanes), rows(32 / across.lanes),
        col((slab * across.lanes + lane % across.lanes) * columns), left(int(most(0, least(columns, features - col)))) {
  }
};

template <bool whole, class Source, class Acc, int n>
__device__ __forceinline__ void add_rows(const Source &from, Sums<Acc, n> &sums, const Place &at, int64_t sample,
                                         int first, int last, int step) {
  int t = first;
  for (; t + (together - 1) * step < last; t += together * step)
#pragma unroll
    for (int k = 0; k < together; ++k)
      from.template add<whole>(sums, sample, t + k * step, at.col, at.left);
#pragma unroll 1
  for (; t < last; t += step)
    from.template add<whole>(sums, sample, t, at.col, at.left);
}

// The sample's rows first, first + step, ...: every lane gets the sums of its columns over all rows of the warp.
template <class Source, class Acc, int n>
__device__ __forceinline__ Sums<Acc, n> sum_rows(const Source &from, const Place &at, int64_t sample, int first,
                                                 int last, int step) {
  Sums<Acc, n> sums;
  if (from.aligned && at.left == n)
    add_rows<true>(from, sums, at, sample, first, last, step);
  else if (at.left > 0)
    add_rows<false>(from, sums, at, sample, first, last, step);
  for (int away = 16; away >= from.across().lanes; away /= 2)
#pragma unroll
    for (int j = 0; j < n; ++j) {
      sums.w[j] += shuffle_xor(sums.w[j], away);
      sums.v[j] += shuffle_xor(sums.v[j], away);
    }
  return sums;
}

// What each of a block's warps adds up for its columns, in shared memory: in registers it would spill.
template <class Acc, int n> struct BlockSums {
  const Place &at;
  const int columns; // of the slab
  Acc *const shared; // [warp][part][column]

  __device__ BlockSums(const Place &at, const Across &across)
      : at(at), columns(across.lanes * n), shared(reinterpret_cast<Acc *>(dynamic_shared())) {
    for (int i = at.lane; i < 2 * columns; i += 32)
      shared[2 * at.warp * columns + i] = 0;
    __syncwarp();
  }

  __device__ __forceinline__ void add(const Sums<Acc, n> &sums) const {
    Acc *own = shared + 2 * at.warp * columns + at.lane * n;
    if (at.row == 0)
#pragma unroll
      for (int j = 0; j < n; ++j)
        own[j] += sums.w[j], own[columns + j] += sums.v[j];
  }

  // Adds the warps in their order, into a row of the weight and one of the bias.
  __device__ __forceinline__ void write(int64_t slab, int64_t row_columns, Acc *weight, Acc *bias) const {
    __syncthreads();
    for (int i = int(threadIdx.x); i < 2 * columns; i += threads) {
      Acc sum = 0;
      for (int warp = 0; warp < warps; ++warp)
        sum += shared[2 * warp * columns + i];
      const int64_t col = slab * columns + i % columns;
      if (col < row_columns)
        (i < columns ? weight : bias)[col] = sum;
    }
  }
};

// A block sums a cut of a sample's tokens, for one slab of columns, to a row.
template <class In, bool with_x>
__global__ void __launch_bounds__(threads, resident) affine_stats_sum_tokens(AffineStats s, Launch<sum_of<In>> at) {
  using Source = Tokens<In, with_x>;
  const Plan &plan = at.plan;
  const int64_t slab = blockIdx.x % plan.tokens.slabs, row = blockIdx.x / plan.tokens.slabs;
  const int64_t sample = row / plan.cuts, cut = row % plan.cuts;
  const int first = int(s.tokens * cut / plan.cuts), last = int(s.tokens * (cut + 1) / plan.cuts);
  const Source from(s, at);
  const Place place(plan.tokens, slab, Source::columns, s.features);
  const BlockSums<sum_of<In>, Source::columns> total(place, plan.tokens);
  total.add(sum_rows<Source, sum_of<In>, Source::columns>(
      from, place, sample, first + place.warp * place.rows + place.row, last, warps * place.rows));
  sum_of<In> *to = at.rows + row * plan.row_columns;
  total.write(slab, plan.row_columns, to, to + s.samples * plan.cuts * plan.row_columns);
}

// Some lanes sum a cut of a channel's space to one number of a row. mean is subtracted first, for the digits; rstd, the
// same for the whole channel, multiplies its sum. `n` elements of space are a lane's at a time.
template <class In, int n, bool with_x>
__global__ void __launch_bounds__(threads, resident) affine_stats_sum_space(AffineStats s, Launch<sum_of<In>> at) {
  using Acc = sum_of<In>;
  const Plan &plan = at.plan;
  const int64_t row = blockIdx.x / plan.channel_blocks, sample = row / plan.cuts, cut = row % plan.cuts;
  const int lanes = plan.channel_lanes, lane = int(threadIdx.x) % lanes;
  const int64_t channel = blockIdx.x % plan.channel_blocks * (threads / lanes) + threadIdx.x / lanes;
  const bool exists = channel < s.features;
  const int64_t group = channel / s.features_per_group, pieces = s.tokens / n;
  const int first = int(pieces * cut / plan.cuts), last = exists ? int(pieces * (cut + 1) / plan.cuts) : 0;
  const Acc mean = with_x && exists ? statistic<Acc>(s.mean, sample * s.mean_sample + group * s.mean_step, 0) : 0;
  const In *b = static_cast<const In *>(s.b) + sample * s.b_sample + channel * s.b_row;
  const In *x = static_cast<const In *>(s.x) + sample * s.x_sample + channel * s.x_row;

  Sums<Acc, n> sums;
  const auto add = [&](auto whole, int piece) {
    Acc y[n];
    load_columns<whole.value, true>(b + int64_t(piece) * n, n, y);
    if constexpr (with_x) {
      Acc z[n];
      load_columns<whole.value, true>(x + int64_t(piece) * n, n, z);
#pragma unroll
      for (int j = 0; j < n; ++j)
        sums.w[j] += y[j] * (z[j] - mean);
    }
#pragma unroll
    for (int j = 0; j < n; ++j)
      sums.v[j] += y[j];
  };
  const auto add_all = [&](auto whole) {
    int piece = first + lane;
    for (; piece + (together - 1) * lanes < last; piece += together * lanes)
#pragma unroll
      for (int k = 0; k < together; ++k)
        add(whole, piece + k * lanes);
#pragma unroll 1
    for (; piece < last; piece += lanes)
      add(whole, piece);
  };
  if (n > 1 && at.aligned)
    add_all(std::bool_constant<(n > 1)>{});
  else
    add_all(std::false_type{});

  Acc w = 0, v = 0;
#pragma unroll
  for (int j = 0; j < n; ++j)
    w += sums.w[j], v += sums.v[j];
  for (int away = lanes / 2; away > 0; away /= 2)
    w += shuffle_xor(w, away), v += shuffle_xor(v, away);
  if (lane != 0 || channel >= plan.row_columns)
    return;
  Acc *to = at.rows + row * plan.row_columns + channel;
  if (with_x && exists)
    w *= statistic<Acc>(s.rstd, sample * s.rstd_sample + group * s.rstd_step, 1);
  to[0] = w;
  to[s.samples * plan.cuts * plan.row_columns] = v;
}

// Shares of one sample's norms2 and dots of a part, from the sums of this warp's slab.
template <class Acc, int n>
__device__ __forceinline__ void use_sums(const AffineStats::Part &part, bool wide, const Acc (&sums)[n],
                                         const Place &at, const Across &across, int64_t features, Acc *partials) {
  const auto put = [&](int64_t number, Acc sum) {
    for (int away = across.lanes / 2; away > 0; away /= 2)
      sum += shuffle_xor(sum, away);
    if (at.lane == 0)
      partials[number * across.slabs] = sum;
  };
  Acc squares = 0;
#pragma unroll
  for (int j = 0; j < n; ++j)
    squares += sums[j] * sums[j];
  put(0, squares);
  const int left = int(most(0, least(n, features - at.col))); // directions have no padding
#pragma unroll 1
  for (int64_t k = 0; k < part.directions; ++k) {
    const Acc *direction = static_cast<const Acc *>(part.D) + k * part.D_direction + at.col;
    Acc D[n], dot = 0;
    if (wide && left == n)
      load_columns<true>(direction, left, D);
    else
      load_columns<false>(direction, left, D);
#pragma unroll
    for (int j = 0; j < n; ++j)
      dot += sums[j] * D[j];
    put(1 + k, dot);
  }
}

// A block takes a slab of a group of samples, a warp one sample at a time: its sums are squared, multiplied with the
// directions and added to those of the group.
template <class Source, bool with_x>
__global__ void __launch_bounds__(threads, resident)
    affine_stats_use_samples(AffineStats s, Launch<typename Source::Acc> at) {
  using Acc = typename Source::Acc;
  constexpr int n = Source::columns;
  const Source from(s, at);
  const Across &across = from.across();
  const Plan &plan = at.plan;
  const int64_t slab = blockIdx.x % across.slabs, group = blockIdx.x / across.slabs;
  const int64_t first = group * plan.samples_per_group, last = least(s.samples, first + plan.samples_per_group);
  const int64_t weight_numbers = with_x ? 1 + s.weight.directions : 0, numbers = weight_numbers + 1 + s.bias.directions;
  const Place place(across, slab, n, from.features());
  const BlockSums<Acc, n> total(place, across);
#pragma unroll 1
  for (int64_t sample = first + place.warp; sample < last; sample += warps) {
    const Sums<Acc, n> sums = sum_rows<Source, Acc, n>(from, place, sample, place.row, from.count(), place.rows);
    Acc *partials = at.partials + sample * numbers * across.slabs + slab;
    if constexpr (with_x)
      use_sums(s.weight, at.weight_wide, sums.w, place, across, s.features, partials);
    use_sums(s.bias, at.bias_wide, sums.v, place, across, s.features, partials + weight_numbers * across.slabs);
    total.add(sums);
  }
  Acc *to = at.totals + group * plan.row_columns;
  total.write(slab, plan.row_columns, to, to + plan.groups * plan.row_columns);
}

// A warp per number: norms2 and dots from their shares of all slabs, in float64.
template <class Acc>
__global__ void __launch_bounds__(threads, resident) affine_stats_merge_slabs(AffineStats s, Launch<Acc> at) {
  const int64_t slabs = at.plan.slabs;
  const int lane = int(threadIdx.x) % 32;
  const int64_t weight_numbers = s.x ? 1 + s.weight.directions : 0, numbers = weight_numbers + 1 + s.bias.directions;
  const int64_t number = (int64_t(blockIdx.x) * threads + threadIdx.x) / 32, sample = number / numbers;
  if (sample >= s.samples)
    return;
  double sum = 0;
  for (int64_t slab = lane; slab < slabs; slab += 32)
    sum += at.partials[number * slabs + slab];
  sum = sum_over_warp(sum);
  if (lane != 0)
    return;
  const bool of_weight = number % numbers < weight_numbers;
  const AffineStats::Part &part = of_weight ? s.weight : s.bias;
  const int64_t which = number % numbers - (of_weight ? 0 : weight_numbers);
  if (which > 0)
    static_cast<Acc *>(part.dots)[sample * part.directions + which - 1] = Acc(sum);
  else if (part.norms2)
    static_cast<Acc *>(part.norms2)[sample] = Acc(sum);
}

// A block per 32 columns of a part: its gradient from the sums of all groups, in float64.
template <class Acc>
__global__ void __launch_bounds__(threads, resident) affine_stats_merge_groups(AffineStats s, Launch<Acc> at) {
  double *shared = reinterpret_cast<double *>(dynamic_shared()); // [warp][lane]
  const int warp = int(threadIdx.x) / 32, lane = int(threadIdx.x) % 32;
  const int64_t blocks = ceil_div(s.features, 32), part = blockIdx.x / blocks;
  const int64_t col = blockIdx.x % blocks * 32 + lane;
  const Acc *totals = at.totals + part * at.plan.groups * at.plan.row_columns + col;
  double sum = 0;
  if (col < s.features)
#pragma unroll 4
    for (int64_t group = warp; group < at.plan.groups; group += warps)
      sum += totals[group * at.plan.row_columns];
  shared[threadIdx.x] = sum;
  __syncthreads();
  Acc *grad = static_cast<Acc *>(part == 0 ? s.weight.grad : s.bias.grad);
  if (warp != 0 || col >= s.features || !grad)
    return;
  for (int other = 1; other < warps; ++other)
    sum += shared[other * 32 + lane];
  grad[col] = Acc(sum);
}

// ---------------------------------------------------------------------------------------------------------------------

// A card of 132 multiprocessors is busy with this many blocks; the last of them, when they are few, must not decide.
constexpr int64_t wanted_blocks = 132 * 8, wanted_groups = wanted_blocks / 2; // groups cost a row of totals each
// A row costs its writing and reading in float32: 1/16 of the bfloat16 b and x of so many tokens.
constexpr int64_t least_tokens_per_row = 64, least_space_per_cut = 4096;

int power_of_two_from(int64_t n) { // at most a warp
  int power = 1;
  while (power < n && power < 32)
    power *= 2;
  return power;
}

Across across(int64_t columns, int width) {
  const int lanes = power_of_two_from(ceil_div(columns, width));
  return {lanes, ceil_div(columns, lanes * width)};
}

Plan plan_of(const AffineStats &s) {
  const int sum_width = s.dtype == DType::f64 ? Vector<double>::size : Vector<float>::size,
            in_width = int(16 / size_of(s.dtype));
  Plan plan{};
  plan.row_columns = ceil_div(s.features, sum_width) * sum_width;
  plan.tokens = across(s.features, in_width), plan.rows = across(plan.row_columns, sum_width);
  if (s.channels_first) {
    plan.wide_channels = s.tokens % in_width == 0;
    plan.channel_lanes = power_of_two_from(ceil_div(s.tokens, together * (plan.wide_channels ? in_width : 1)));
    plan.channel_blocks = ceil_div(plan.row_columns, threads / plan.channel_lanes);
    plan.cuts =
        most(1, least(ceil_div(wanted_blocks, s.samples * plan.channel_blocks), s.tokens / least_space_per_cut));
  } else {
    const int64_t warps_of_samples = s.samples * plan.tokens.slabs, rows_at_once = 32 / plan.tokens.lanes;
    const bool by_warps = warps_of_samples >= wanted_blocks * warps / 2 || s.tokens < 2 * together * rows_at_once;
    const int64_t most_cuts = most(1, s.tokens / (least_tokens_per_row * rows_at_once));
    plan.cuts = by_warps ? 0 : least(ceil_div(wanted_blocks, warps_of_samples), most_cuts);
  }
  plan.slabs = plan.cuts ? plan.rows.slabs : plan.tokens.slabs;
  plan.samples_per_group = ceil_div(ceil_div(s.samples, ceil_div(wanted_groups, plan.slabs)), warps) * warps;
  plan.groups = ceil_div(s.samples, plan.samples_per_group);
  return plan;
}

bool is_empty(const AffineStats &s) { return !s.samples || !s.tokens || !s.features; }

int64_t numbers_of(const AffineStats &s) { return (s.x ? 1 + s.weight.directions : 0) + 1 + s.bias.directions; }

int64_t rows_of(const AffineStats &s, const Plan &plan) { return 2 * s.samples * plan.cuts * plan.row_columns; }

int64_t totals_of(const Plan &plan) { return 2 * plan.groups * plan.row_columns; }

cudaError_t zero_part(const AffineStats &s, const AffineStats::Part &part, void *stream) {
  const int64_t bytes = s.dtype == DType::f64 ? 8 : 4;
  cudaError_t error = zero(part.grad, s.features * bytes, stream);
  if (error == cudaSuccess)
    error = zero(part.norms2, s.samples * bytes, stream);
  return error == cudaSuccess ? zero(part.dots, s.samples * part.directions * bytes, stream) : error;
}

template <class In, bool with_x> cudaError_t run(const AffineStats &s, void *workspace, void *stream) {
  using Acc = sum_of<In>;
  Launch<Acc> at{};
  const Plan &plan = at.plan = plan_of(s);
  const int64_t numbers = numbers_of(s), element = int64_t(sizeof(In));
  at.aligned = allows_16(s.b, s.b_sample, s.b_row, element) && allows_16(s.x, s.x_sample, s.x_row, element);
  at.weight_wide = allows_16(s.weight.D, s.weight.D_direction, 0, sizeof(Acc));
  at.bias_wide = allows_16(s.bias.D, s.bias.D_direction, 0, sizeof(Acc));
  at.rows = static_cast<Acc *>(workspace);
  at.totals = at.rows + rows_of(s, plan);
  at.partials = at.totals + totals_of(plan);

  const auto shared = [](const Across &across, int columns) {
    return int64_t(sizeof(Acc)) * 2 * warps * across.lanes * columns;
  };
  const int64_t of_tokens = shared(plan.tokens, Vector<In>::size), of_rows = shared(plan.rows, Vector<Acc>::size);
  cudaError_t error = cudaSuccess;
  if (s.channels_first) {
    const auto kernel = plan.wide_channels ? affine_stats_sum_space<In, Vector<In>::size, with_x>
                                           : affine_stats_sum_space<In, 1, with_x>;
    error = launch(kernel, s.samples * plan.cuts * plan.channel_blocks, threads, 0, stream, s, at);
  } else if (plan.cuts) {
    error = launch(affine_stats_sum_tokens<In, with_x>, s.samples * plan.cuts * plan.tokens.slabs, threads, of_tokens,
                   stream, s, at);
  }
  if (error == cudaSuccess && plan.cuts)
    error = launch(affine_stats_use_samples<SummedRows<Acc, with_x>, with_x>, plan.groups * plan.slabs, threads,
                   of_rows, stream, s, at);
  else if (error == cudaSuccess)
    error = launch(affine_stats_use_samples<Tokens<In, with_x>, with_x>, plan.groups * plan.slabs, threads, of_tokens,
                   stream, s, at);
  if (error == cudaSuccess)
    error = launch(affine_stats_merge_slabs<Acc>, ceil_div(s.samples * numbers, warps), threads, 0, stream, s, at);
  if (error == cudaSuccess)
    error = launch(affine_stats_merge_groups<Acc>, 2 * ceil_div(s.features, 32), threads, threads * 8, stream, s, at);
  return error;
}

template <class In> cudaError_t run(const AffineStats &s, void *workspace, void *stream) {
  return s.x ? run<In, true>(s, workspace, stream) : run<In, false>(s, workspace, stream);
}

} // namespace

int64_t affine_stats_cuda_workspace(const AffineStats &s) {
  if (is_empty(s))
    return 0;
  const Plan plan = plan_of(s);
  const int64_t numbers = rows_of(s, plan) + totals_of(plan) + s.samples * numbers_of(s) * plan.slabs;
  return ceil_div(numbers * (s.dtype == DType::f64 ? 8 : 4), 16) * 16;
}

int affine_stats_cuda(const AffineStats &s, void *workspace, void *stream) {
  if (is_empty(s)) {
    const cudaError_t error = zero_part(s, s.weight, stream);
    return error == cudaSuccess ? zero_part(s, s.bias, stream) : error;
  }
  const Plan plan = plan_of(s);
  if (most(s.tokens, s.samples * most(plan.cuts, 1) * most(plan.tokens.slabs, plan.channel_blocks)) > INT32_MAX)
    return cudaErrorInvalidConfiguration;
  return by_dtype(s.dtype, [&](auto element) { return run<decltype(element)>(s, workspace, stream); });
}

} // namespace gg
