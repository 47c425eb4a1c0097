// softmax_stats on a GPU: a few lanes, or a warp, sum a piece of a row against a reference that all of them share, the
// row's largest logit held out; another kernel puts the pieces of a row together. A tile of logits waits in registers
// until it is known whether it moves the reference, so that logits are read once. What bounds it: that read, or in half
// types on the fastest memory the instructions around e^x. See docs/gpu/softmax_stats.md.
#include "core/launch.cuh"
#include "softmax_stats/softmax_stats.h"
#include <limits>
#include <type_traits>

namespace gg {
namespace {

constexpr int threads = 128; // of a block, whose warps know nothing of each other
constexpr int vectors = 4;   // of 16 bytes, that a lane reads of a tile

// How far above the reference a logit may lie that its weight is relative to. A reference that moves, moves by more
// than this: however often it does, the factors' rounding errors stay below what the distance itself costs.
constexpr int slack = 4;

constexpr double infinity = std::numeric_limits<double>::infinity();

// How the work is cut; a function of the shapes alone, and so are the bits of the results.
struct Plan {
  int64_t rows, cuts;      // of the logits; pieces of a row
  int64_t classes_per_cut; // a multiple of a tile where there are several
  int lanes;               // that share a piece: a power of 2, fewer than 32 only where rows are not cut
};

// e^-y for y <= largest, which counts as nothing beside a 1; NaN for NaN.
__device__ __forceinline__ float exp_minus(float y) { return exp2_fast(y * -1.44269504f); }
__device__ __forceinline__ double exp_minus(double y) { return std::exp(-y); }
template <class Acc> constexpr Acc largest = std::is_same_v<Acc, float> ? 87 : 708;

// e^(x - y) for x <= y. The difference is taken exactly: its rounding error would come out |x - y| times as large.
__device__ double exp_difference(double x, double y) {
  const double d = x - y, back = d - x;
  const double error = (x - (d - back)) - (y + back);
  return std::exp(d) * (1 + (error == error ? error : 0));
}

// Over the lanes that share a piece, by halving; every one gets the result.
template <class T> __device__ __forceinline__ T sum_over_lanes(T x, int lanes) {
  for (int half = lanes / 2; half > 0; half /= 2)
    x += shuffle_xor(x, half);
  return x;
}

// The two largest of those seen; NaN is passed over.
template <class T> struct TopTwo {
  T first = T(-infinity), second = T(-infinity);

  __device__ __forceinline__ void take(T z) {
    second = std::fmax(second, std::fmin(first, z));
    first = std::fmax(first, z);
  }
  __device__ __forceinline__ void over_lanes(int lanes) {
    for (int half = lanes / 2; half > 0; half /= 2) {
      second = std::fmax(second, shuffle_xor(second, half));
      take(shuffle_xor(first, half));
    }
  }
};

// Sums over elements z of weights w = e^(reference - z).
struct Sums {
  double sum = 0;     // of w
  double squares = 0; // of w^2
  double spread = 0;  // of (reference - z) w; NaN where any z is

  __device__ __forceinline__ void add(const Sums &more) {
    sum += more.sum, squares += more.squares, spread += more.spread;
  }
  __device__ __forceinline__ void add_one(double below, double w, double sign = 1) {
    sum += sign * w, squares += sign * w * w, spread += sign * below * w;
  }
  // Relative to another reference, `below` higher: k = e^-below.
  __device__ __forceinline__ Sums scaled(double k, double below) const {
    return {k * sum, k * k * squares, k * (spread + below * sum)};
  }
  __device__ __forceinline__ Sums over_lanes(int lanes) const {
    return {sum_over_lanes(sum, lanes), sum_over_lanes(squares, lanes), sum_over_lanes(spread, lanes)};
  }
};

// What a piece of a row comes to: its largest logit, and sums over all the others relative to one of them, which is the
// second largest or at most `slack` less. So they contain a 1; or nothing, where reference is -inf.
struct Stretch {
  double first, reference;
  Sums rest;
};

// A row, or a piece of it, beside its distribution.
struct Residual {
  double loss = 0;    // sum of q (first - z)
  double mass = 0;    // sum of q
  double squares = 0; // sum of (p - q)^2
};

// Where a lane finds its elements of a tile: vectors of n neighbours, its own beside those of the other lanes.
template <class T, int n> struct Tile {
  T value[vectors][n];

  // Those at `end` and beyond become `fill`. Whole vectors are read by as wide loads as the address allows, with the
  // same result.
  __device__ __forceinline__ void load(const T *row, int64_t begin, int64_t end, int lane, int lanes, T fill) {
    const int misaligned = int(reinterpret_cast<uintptr_t>(row) % 16); // begin is a multiple of n
#pragma unroll
    for (int k = 0; k < vectors; ++k) {
      const int64_t at = begin + (int64_t(k) * lanes + lane) * n;
      if (misaligned == 0 && at + n <= end) {
#pragma unroll
        for (int e = 0; e < n; e += Vector<T>::size) {
          const Vector<T> v = load_vector(row + at + e);
          std::memcpy(&value[k][e], &v, least(16, n * sizeof(T)));
        }
      } else if (sizeof(T) == 2 && misaligned % 4 == 0 && at + n <= end) {
#pragma unroll
        for (int e = 0; e < n; e += 2) {
          const uint32_t pair = *reinterpret_cast<const uint32_t *>(row + at + e);
          std::memcpy(&value[k][e], &pair, 4);
        }
      } else {
#pragma unroll
        for (int e = 0; e < n; ++e)
          value[k][e] = at + e < end ? row[at + e] : fill;
      }
    }
  }
};

template <class T> __device__ T minus_infinity() { return T(-infinity); }
template <> __device__ bf16 minus_infinity<bf16>() { return {0xff80}; }
template <> __device__ f16 minus_infinity<f16>() { return {0xfc00}; }

// A piece while it is read: first and reference are the same for all its lanes, the sums are each lane's own.
template <class In> struct Running {
  using Acc = typename accumulator<In>::type;
  static constexpr int n = Vector<In>::size;

  Acc first = Acc(-infinity), reference = Acc(-infinity);
  Sums rest;
  int lane, lanes;

  __device__ Running(int lane, int lanes) : lane(lane), lanes(lanes) {}

  // Most tiles hold no new first, and nothing far above the reference: that shows before they are summed. Lanes of
  // other rows in the same warp may send these along the second way too, which gives them the same bits.
  __device__ __forceinline__ void add(const Tile<In, n> &z) {
    Acc top = Acc(-infinity);
    for_each(z, [&](Acc x) { top = std::fmax(top, x); });
    if (vote(top > std::fmin(first, reference + slack) || reference == Acc(-infinity)))
      move_and_sum(z);
    else
      sum<false>(z, Acc(0));
  }

  __device__ Stretch whole() const { return {first, reference, rest.over_lanes(lanes)}; }

private:
  template <class Use> static __device__ __forceinline__ void for_each(const Tile<In, n> &z, Use use) {
#pragma unroll
    for (int k = 0; k < vectors; ++k)
#pragma unroll
      for (int e = 0; e < n; ++e)
        use(widen(z.value[k][e]));
  }

  // `clamped` where an element may lie above the second, and counts as lying `low` below the reference like that one.
  template <bool clamped> __device__ __forceinline__ void sum(const Tile<In, n> &z, Acc low) {
    const Acc zero = reference > Acc(-infinity) ? reference : Acc(0);
    Acc weights = 0, squares = 0, spread = 0;
    for_each(z, [&](Acc x) {
      Acc y = zero - x;
      if constexpr (clamped)
        y = larger_or_nan(low, y);
      y = smaller_or_nan(largest<Acc>, y);
      const Acc w = exp_minus(y);
      weights += w;
      squares += w * w;
      spread += y * w;
    });
    rest.add({weights, squares, spread});
  }

  __device__ __forceinline__ void move_and_sum(const Tile<In, n> &z) {
    TopTwo<Acc> tile;
    for_each(z, [&](Acc x) { tile.take(x); });
    tile.over_lanes(lanes);
    const bool new_first = tile.first > first;
    const Acc before = first, second = std::fmax(std::fmax(tile.second, std::fmin(tile.first, first)), reference);
    first = std::fmax(first, tile.first);
    if (second > reference + slack) {
      const Acc below = second - reference;
      rest = reference > Acc(-infinity) ? rest.scaled(std::exp(-below), below) : rest;
      reference = second;
    }
    const bool any = reference > Acc(-infinity);
    const Acc low = any ? reference - second : Acc(0);
    sum<true>(z, low);
    if (!any) {
      const double nothing = rest.spread == rest.spread ? 0 : rest.spread; // a NaN remains
      rest = {nothing, nothing, nothing};
    } else if (new_first && lane == 0) { // it counted as a second, and the first before it joins the rest
      rest.add_one(low, exp_minus(low), -1);
      const Acc y = std::fmin(largest<Acc>, reference - before);
      if (before > Acc(-infinity))
        rest.add_one(y, exp_minus(y));
    }
  }
};

// What a finished row says of its probabilities.
struct Row {
  double first, reference;
  Sums rest;        // over all but the first
  double scale;     // e^(reference - first)
  double others;    // sum of e^(z - first) over all but the first
  double total;     // with the first: the largest probability is 1 / total
  double log_total; // logsumexp(z) - first

  // From the row's pieces, by the lanes that share the work.
  __device__ Row(const Stretch *pieces, int64_t cuts, int lane, int lanes) {
    TopTwo<double> top; // second: of firsts and references
    for (int64_t cut = lane; cut < cuts; cut += lanes) {
      top.take(pieces[cut].first);
      top.second = std::fmax(top.second, pieces[cut].reference);
    }
    top.over_lanes(lanes);
    first = top.first, reference = top.second;

    int64_t holder = cuts; // the piece whose first is the row's
    for (int64_t cut = lane; cut < cuts && holder == cuts; cut += lanes)
      if (pieces[cut].first == first)
        holder = cut;
    for (int half = lanes / 2; half > 0; half /= 2)
      holder = least(holder, shuffle_xor(holder, half));

    for (int64_t cut = lane; cut < cuts; cut += lanes) {
      const Stretch &piece = pieces[cut];
      const bool any = piece.reference > -infinity;
      rest.add(piece.rest.scaled(any ? exp_difference(piece.reference, reference) : 0,
                                 any ? reference - piece.reference : 0));
      if (cut != holder && piece.first > -infinity)
        rest.add_one(reference - piece.first, exp_difference(piece.first, reference));
    }
    rest = rest.over_lanes(lanes);
    scale = alone() ? 0 : exp_difference(reference, first);
    others = scale * rest.sum;
    total = 1 + others;
    log_total = std::log1p(others);
  }

  __device__ bool defined() const { return first > -infinity && first < infinity && rest.spread == rest.spread; }
  __device__ bool alone() const { return reference == -infinity; }
  __device__ double loss(double label) const { return (first - label) + log_total; }
  __device__ double entropy() const {
    return log_total + scale * (rest.spread + (alone() ? 0 : first - reference) * rest.sum) / total;
  }

  // ||p - onehot||: the label's own distance from 1 is the sum of the other probabilities. Where it is not the first,
  // the first is among those, and taking the label out of the sums costs a bit at most.
  __device__ double el2n(double label) const {
    if (label == first)
      return scale * std::sqrt(rest.squares + rest.sum * rest.sum) / total;
    const double w = exp_difference(label, first), except = 1 + (others - w);
    return std::sqrt(1 + (scale * scale * rest.squares - w * w) + except * except) / total;
  }
};

// What the lanes of one piece work on.
struct Piece {
  int64_t index, row, begin, end; // classes [begin, end) of the row
  int lane;
  bool exists;

  __device__ explicit Piece(const SoftmaxStats &s, const Plan &plan) {
    const int64_t thread = int64_t(blockIdx.x) * threads + threadIdx.x;
    index = thread / plan.lanes, lane = int(thread % plan.lanes);
    exists = index < plan.rows * plan.cuts;
    row = least(index / plan.cuts, plan.rows - 1);
    begin = least(s.classes, index % plan.cuts * plan.classes_per_cut);
    end = least(s.classes, begin + plan.classes_per_cut);
  }
};

template <class In> __device__ __forceinline__ const In *logits_of(const SoftmaxStats &s, int64_t row) {
  return static_cast<const In *>(s.logits) + row / s.tokens * s.logit_sample + row % s.tokens * s.logit_token;
}

// Whether a row is to be read: not where its class number is ignored, or is none.
__device__ __forceinline__ bool wants(const SoftmaxStats &s, int64_t row) {
  if (s.label_dtype < DType::i32)
    return true;
  const int64_t label = s.class_number(row / s.tokens, row % s.tokens);
  return label != s.ignore_index && label >= 0 && label < s.classes;
}

// Four blocks keep 32 KiB of reads on their way through a multiprocessor, and let a tile stay in registers.
template <class In>
__global__ void __launch_bounds__(threads, 4) softmax_stats_stretch(SoftmaxStats s, Plan plan, Stretch *stretches) {
  constexpr int n = Vector<In>::size;
  const Piece piece(s, plan);
  const bool wanted = piece.exists && wants(s, piece.row);
  if (!vote(wanted))
    return;
  const In *logits = logits_of<In>(s, piece.row);
  Running<In> running(piece.lane, plan.lanes);
  for (int64_t c = piece.begin; c < piece.end; c += int64_t(vectors) * n * plan.lanes) {
    Tile<In, n> z;
    z.load(logits, c, wanted ? piece.end : c, piece.lane, plan.lanes, minus_infinity<In>());
    running.add(z);
  }
  const Stretch whole = running.whole();
  if (wanted && piece.lane == 0)
    stretches[piece.index] = whole;
}

// p - q is formed class by class: from sums it would be the small difference of large ones. That needs the row's total,
// and so a second read. The first's p is 1 - others / total, and is subtracted as such; its weight may be too large,
// and is not used.
template <class In, class Label>
__global__ void __launch_bounds__(threads)
    softmax_stats_residual(SoftmaxStats s, Plan plan, const Stretch *stretches, Residual *residuals) {
  using Acc = typename accumulator<In>::type;
  constexpr int n = Vector<In>::size;
  const Piece piece(s, plan);
  const Row row(stretches + piece.row * plan.cuts, plan.cuts, plan.cuts > 1 ? piece.lane : 0,
                plan.cuts > 1 ? plan.lanes : 1);
  const In *logits = logits_of<In>(s, piece.row);
  const Label *labels = static_cast<const Label *>(s.labels) + piece.row / s.tokens * s.label_sample +
                        piece.row % s.tokens * s.label_token;
  const Acc first = Acc(row.first), reference = Acc(row.alone() ? row.first : row.reference);
  const Acc p_reference = Acc(row.scale / row.total), missing = Acc(row.others / row.total);
  Residual total;
  for (int64_t c = piece.begin; c < piece.end; c += int64_t(vectors) * n * plan.lanes) {
    Tile<In, n> z;
    Tile<Label, n> q;
    z.load(logits, c, piece.end, piece.lane, plan.lanes, minus_infinity<In>());
    q.load(labels, c, piece.end, piece.lane, plan.lanes, Label{});
    Acc loss = 0, mass = 0;
#pragma unroll
    for (int k = 0; k < vectors; ++k)
#pragma unroll
      for (int e = 0; e < n; ++e) {
        const Acc zc = widen(z.value[k][e]), qc = widen(q.value[k][e]);
        const Acc w = exp_minus(std::fmin(largest<Acc>, reference - zc));
        const double difference = zc == first ? (1 - qc) - missing : w * p_reference - qc;
        loss += qc != 0 ? qc * (first - zc) : Acc(0);
        mass += qc;
        total.squares += difference * difference;
      }
    total.loss += loss;
    total.mass += mass;
  }
  total = {sum_over_lanes(total.loss, plan.lanes), sum_over_lanes(total.mass, plan.lanes),
           sum_over_lanes(total.squares, plan.lanes)};
  if (piece.exists && piece.lane == 0)
    residuals[piece.index] = total;
}

// A warp for a row of several pieces, else a thread.
template <class In>
__global__ void __launch_bounds__(threads)
    softmax_stats_finish(SoftmaxStats s, Plan plan, const Stretch *stretches, const Residual *residuals) {
  using Acc = typename accumulator<In>::type;
  const int64_t thread = int64_t(blockIdx.x) * threads + threadIdx.x;
  const int lanes = plan.cuts > 1 ? 32 : 1, lane = int(thread % lanes);
  const int64_t row = thread / lanes;
  if (row >= plan.rows)
    return;
  const auto put = [&](void *to, double value) {
    if (to)
      static_cast<Acc *>(to)[row] = Acc(value);
  };
  const auto write = [&](double loss, double el2n, double entropy, double max_probability) {
    if (lane != 0)
      return;
    put(s.loss, loss), put(s.el2n, el2n), put(s.entropy, entropy), put(s.max_probability, max_probability);
  };
  if (!wants(s, row)) {
    if (s.class_number(row / s.tokens, row % s.tokens) == s.ignore_index)
      write(0, 0, 0, 0);
    else
      atomic_min(reinterpret_cast<uint64_t *>(s.bad_row), uint64_t(row)); // -1 is the largest of these
    return;
  }
  const Row found(stretches + row * plan.cuts, plan.cuts, lane, lanes);
  Residual total;
  if (residuals) {
    for (int64_t cut = lane; cut < plan.cuts; cut += lanes) {
      const Residual &piece = residuals[row * plan.cuts + cut];
      total.loss += piece.loss, total.mass += piece.mass, total.squares += piece.squares;
    }
    total = {sum_over_lanes(total.loss, lanes), sum_over_lanes(total.mass, lanes),
             sum_over_lanes(total.squares, lanes)};
  }
  if (!found.defined()) {
    const double nan = std::numeric_limits<double>::quiet_NaN();
    write(nan, nan, nan, nan);
  } else if (residuals) {
    write(total.loss + found.log_total * total.mass, std::sqrt(total.squares), found.entropy(), 1 / found.total);
  } else {
    const double label = widen(logits_of<In>(s, row)[s.class_number(row / s.tokens, row % s.tokens)]);
    write(found.loss(label), found.el2n(label), found.entropy(), 1 / found.total);
  }
}

// ---------------------------------------------------------------------------------------------------------------------

// Rows are cut until a nominal card has four waves of warps, 32 on each multiprocessor, or pieces are so short that
// finding their reference costs as much as their sums.
constexpr int64_t wanted_pieces = 4 * 32 * 132, least_classes = 4096;

Plan plan_of(const SoftmaxStats &s) {
  const int64_t lane_tile = vectors * 16 / size_of(s.dtype), tile = 32 * lane_tile;
  Plan plan{};
  plan.rows = s.samples * s.tokens;
  plan.cuts = most(1, least(ceil_div(wanted_pieces, most(1, plan.rows)), s.classes / least_classes));
  plan.classes_per_cut = plan.cuts > 1 ? ceil_div(ceil_div(s.classes, plan.cuts), tile) * tile : s.classes;
  for (plan.lanes = 1; plan.lanes < 32 && plan.lanes * lane_tile < s.classes;)
    plan.lanes *= 2;
  return plan;
}

int64_t pieces_of(const Plan &plan) { return plan.rows * plan.cuts; }

template <class In> cudaError_t run(const SoftmaxStats &s, void *workspace, void *stream) {
  using Acc = typename accumulator<In>::type;
  const Plan plan = plan_of(s);
  const int64_t blocks = ceil_div(pieces_of(plan) * plan.lanes, threads);
  if (most(blocks, plan.rows) > INT32_MAX)
    return cudaErrorInvalidConfiguration;
  Stretch *stretches = static_cast<Stretch *>(workspace);
  Residual *residuals = nullptr;
  cudaError_t error = launch(softmax_stats_stretch<In>, blocks, threads, 0, stream, s, plan, stretches);
  if (error == cudaSuccess && s.label_dtype < DType::i32) {
    residuals = reinterpret_cast<Residual *>(stretches + pieces_of(plan));
    error = s.label_dtype == s.dtype
                ? launch(softmax_stats_residual<In, In>, blocks, threads, 0, stream, s, plan, stretches, residuals)
                : launch(softmax_stats_residual<In, Acc>, blocks, threads, 0, stream, s, plan, stretches, residuals);
  }
  const int64_t finishing = plan.rows * (plan.cuts > 1 ? 32 : 1);
  if (error == cudaSuccess)
    error = launch(softmax_stats_finish<In>, ceil_div(finishing, threads), threads, 0, stream, s, plan, stretches,
                   residuals);
  return error;
}

} // namespace

int64_t softmax_stats_cuda_workspace(const SoftmaxStats &s) {
  const bool distributions = s.label_dtype < DType::i32;
  return pieces_of(plan_of(s)) * int64_t(sizeof(Stretch) + (distributions ? sizeof(Residual) : 0));
}

int softmax_stats_cuda(const SoftmaxStats &s, void *workspace, void *stream) {
  const cudaError_t error = cudaMemsetAsync(s.bad_row, 0xff, 8, static_cast<cudaStream_t>(stream)); // -1
  if (error != cudaSuccess || s.samples * s.tokens == 0)
    return error;
  return by_dtype(s.dtype, [&](auto element) { return run<decltype(element)>(s, workspace, stream); });
}

} // namespace gg
