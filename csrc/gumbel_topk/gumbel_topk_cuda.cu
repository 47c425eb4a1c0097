// gumbel_topk on a card: no decision is the host's. Documents pass in pieces. Of a piece, tiles gather what reaches the
// threshold, a radix select finds where the best k end, and these are sorted and stripped of repeats. That attempt
// fails where repeats took the places of others, or where a threshold guessed from a sample was too high; then
// everything that reached the threshold is sorted instead, by kernels that otherwise return at once. Nothing depends on
// who comes first: only integers are added atomically. See docs/gpu/gumbel_topk.md.
#include "core/gumbel.h"
#include "core/sort.cuh"
#include "gumbel_topk/gumbel_topk.h"
#include <cmath>
#include <type_traits>

namespace gg {
namespace {

constexpr int threads = 256, per_thread = 8, tile = threads * per_thread, warps = threads / 32;
constexpr int digit_bits = 11, bins = 1 << digit_bits, passes_of_a_word = (64 + digit_bits - 1) / digit_bits;
constexpr int sample_blocks = 64, sample_of_a_block = 256, sample_margin = 5,
              sample = sample_blocks * sample_of_a_block;

// What is selected and sorted: a key as an integer, better keys first, and what it belongs to.
struct alignas(16) Entry {
  uint64_t order;
  int64_t pick;
};
constexpr uint64_t last_order = ~uint64_t{0}; // that of no number

// Its own inverse. Infinity comes first and -infinity last.
__device__ __forceinline__ uint64_t flipped(uint64_t bits) { return bits >> 63 ? bits : bits ^ ~uint64_t{0} >> 1; }
__device__ __forceinline__ uint64_t order_of(double key) { return flipped(bits_of_double(key)); }
__device__ __forceinline__ double key_of(uint64_t order) { return double_of_bits(flipped(order)); }

enum class Route : int32_t {
  attempt, // at work
  append,  // there is room: what passed goes to the reservoir as it is
  failed,  // the first attempt did not find k documents that are surely the best
  keep,    // what is sorted has the best k
  refused  // the arguments make no sense
};

// What one kernel leaves to the next.
struct State {
  Route route;
  bool exact;                 // the second attempt has begun
  bool settled;               // the cut below is final
  uint32_t arrived;           // blocks that have counted
  int64_t entries;            // how many there are to select from, or to sort
  int64_t passed;             // how many reached the threshold
  int64_t goal;               // of the entries that the digits known so far leave open, how many are wanted
  uint64_t order_cut, id_cut; // the last (order, id) that is wanted
  uint64_t guess;             // orders behind it wait for the second attempt
};

// Where a launch finds things. Tiles of the reservoir come before those of documents.
struct Work {
  State *state;
  uint32_t *histogram; // bins; zero between launches
  int64_t *begins;     // by tile: how many entries it has, and then where they begin
  Entry *slots;        // by tile
  Entry *entries;      // one after the other
  int64_t first, documents, reservoir_tiles;
  int blocks;
  bool exact;   // the second attempt
  bool guessed; // the first attempt has a guess
  double inverse_temperature;
};

__device__ __forceinline__ bool runs(const Work &w, Route route) {
  return w.state->route == route && w.state->exact == w.exact;
}

// ---- Documents and their keys ----

template <class In> struct Documents {
  const GumbelTopK &s;
  const double inverse_temperature;

  __device__ __forceinline__ double score(int64_t at) const {
    return double(widen(static_cast<const In *>(s.scores)[at]));
  }
  __device__ __forceinline__ uint64_t id(int64_t at) const { return s.ids ? s.ids[at] : uint64_t(at); }
  __device__ __forceinline__ bool noisy() const { return s.temperature > 0; }

  // Not below the document's key, but for what limit() takes into account; NaN for NaN.
  __device__ __forceinline__ double bound(int64_t at) const {
    return noisy() ? bound_of_key(score(at) * inverse_temperature, noise_bits(id(at), s.seed)) : score(at);
  }
  __device__ __forceinline__ double limit(double least_key) const {
    return noisy() ? limit_of_bound(least_key) : least_key;
  }
  __device__ __forceinline__ double key(int64_t at) const {
    const double x = score(at);
    return (noisy() ? x / s.temperature + gumbel(noise_bits(id(at), s.seed)) : x) + 0.0; // -0 becomes 0
  }
};

// Smaller ones first, as the contract has it.
struct Before {
  const uint64_t *ids; // of picks, or null where a pick is an id
  __device__ explicit Before(const GumbelTopK &s) : ids(s.by_position ? s.ids : nullptr) {}
  __device__ __forceinline__ uint64_t id(int64_t pick) const { return ids ? ids[pick] : uint64_t(pick); }
  __device__ __forceinline__ bool operator()(const Entry &x, const Entry &y) const {
    if (x.order != y.order || x.pick == y.pick)
      return x.order < y.order;
    const uint64_t x_id = id(x.pick), y_id = id(y.pick);
    return x_id != y_id ? x_id < y_id : x.pick < y.pick;
  }
  __device__ __forceinline__ bool same(const Entry &x, const Entry &y) const {
    return x.order == y.order && id(x.pick) == id(y.pick);
  }
};

__global__ void gumbel_topk_begin(GumbelTopK s, Work w, bool first) {
  if (threadIdx.x)
    return;
  State &state = *w.state;
  if (first) {
    *s.fault = GumbelTopKFault{};
    const int64_t held = *s.held;
    const bool all_fit = s.count <= s.capacity - held, fit = all_fit || s.k <= s.capacity - GumbelTopK::least_spare;
    const bool sound = held >= 0 && held <= s.capacity && fit && !(s.by_position && held);
    state.route = sound ? Route::attempt : Route::refused;
    if (!sound)
      s.fault->no_room = 1;
    else if (s.k == 0)
      *s.threshold = __builtin_inf();
  }
  if (state.route != Route::refused)
    state.route = Route::attempt;
  state.exact = state.settled = false;
  state.arrived = 0;
  state.order_cut = 0;
}

// Keys of blocks of documents, spread evenly; `rank` of them are wanted.
template <class In>
__global__ void __launch_bounds__(threads) gumbel_topk_sample(GumbelTopK s, Work w, int64_t stride, int64_t rank) {
  const Documents<In> documents{s, w.inverse_temperature};
  for (int i = int(threadIdx.x); i < sample_of_a_block; i += threads) {
    const double key = documents.key(w.first + blockIdx.x * stride + i);
    w.entries[int64_t(blockIdx.x) * sample_of_a_block + i] = {key == key ? order_of(key) : last_order, 0};
  }
  if (blockIdx.x == 0 && threadIdx.x == 0)
    w.state->entries = sample, w.state->goal = rank;
}

// Of every tile, what reaches the threshold and the guess. All documents are bounded; those whose bound passes get
// keys, side by side.
template <class In> __global__ void __launch_bounds__(threads) gumbel_topk_pass(GumbelTopK s, Work w) {
  const State &state = *w.state;
  if (w.exact ? state.route != Route::failed : state.route != Route::attempt)
    return;
  int *sums = reinterpret_cast<int *>(dynamic_shared());
  uint16_t *bounded = reinterpret_cast<uint16_t *>(sums + warps);
  const Documents<In> documents{s, w.inverse_temperature};
  const uint64_t threshold = order_of(*s.threshold), guess = w.guessed && !w.exact ? state.order_cut : last_order;
  const uint64_t last = threshold < guess ? threshold : guess;
  const double limit = documents.limit(key_of(last));
  const int64_t held = *s.held, tiles = w.reservoir_tiles + ceil_div(w.documents, tile);
  const int thread = int(threadIdx.x);

  for (int64_t t = blockIdx.x; t < tiles; t += w.blocks) {
    Entry *slots = w.slots + t * tile;
    if (t < w.reservoir_tiles) {
      const int n = int(most(0, least(tile, held - t * tile)));
      for (int i = thread; i < n; i += threads)
        slots[i] = {order_of(s.keys[t * tile + i]), s.picks[t * tile + i]};
      if (thread == 0)
        w.begins[t] = n;
      continue;
    }
    const int64_t offset = (t - w.reservoir_tiles) * tile, first = w.first + offset;
    const int n = int(least(tile, w.documents - offset));
    uint32_t passes = 0;
#pragma unroll
    for (int j = 0; j < per_thread; ++j) {
      const int i = j * threads + thread;
      if (i < n && !(documents.bound(first + i) < limit))
        passes |= 1u << j;
    }
    int candidates, found = 0;
    int at = sum_below<threads>(__popc(passes), sums, candidates);
#pragma unroll
    for (int j = 0; j < per_thread; ++j)
      if (passes >> j & 1)
        bounded[at++] = uint16_t(j * threads + thread);
    __syncthreads(); // the list is complete

    for (int c = 0; c < candidates; c += threads) {
      Entry entry{last_order, 0};
      if (c + thread < candidates) {
        const int64_t position = first + bounded[c + thread];
        const double key = documents.key(position);
        if (key == key)
          entry = {order_of(key), s.by_position ? position : int64_t(documents.id(position))};
        else
          atomic_min(reinterpret_cast<uint64_t *>(&s.fault->nan_at), uint64_t(position)); // -1 is the largest of all
      }
      const bool keep = entry.order <= last && entry.order != last_order;
      int kept;
      const int to = sum_below<threads>(keep, sums, kept);
      if (keep)
        slots[found + to] = entry;
      found += kept;
    }
    if (thread == 0)
      w.begins[t] = found;
  }
}

// ---- From tiles to arrays ----

// The three that leave entries in tiles; for the last two, which entries stay.
enum class Stage { passed, selected, distinct };

template <Stage stage> __device__ __forceinline__ int64_t tiles_of(const Work &w) {
  return stage == Stage::passed ? w.reservoir_tiles + ceil_div(w.documents, tile) : ceil_div(w.state->entries, tile);
}

// Where sorting has left the entries, and the other array.
__device__ __forceinline__ Entry *sorted(const Work &w, bool other) {
  bool moved = other;
  for (int64_t width = tile; width < w.state->entries; width *= 2)
    moved = !moved;
  return moved ? w.slots : w.entries;
}

template <Stage stage> __global__ void __launch_bounds__(threads) gumbel_topk_filter(GumbelTopK s, Work w) {
  if (!runs(w, Route::attempt))
    return;
  int *sums = reinterpret_cast<int *>(dynamic_shared());
  const State &state = *w.state;
  const Before before(s);
  const Entry *from = stage == Stage::selected ? w.entries : sorted(w, false);
  Entry *to = stage == Stage::selected ? w.slots : sorted(w, true);
  const uint64_t guess = w.exact ? last_order : state.guess;
  const auto stays = [&](int64_t i, const Entry &entry) {
    if (stage == Stage::selected)
      return entry.order < state.order_cut || (entry.order == state.order_cut &&
                                               (state.id_cut == ~uint64_t{0} || before.id(entry.pick) <= state.id_cut));
    return entry.order <= guess && (i == 0 || !before.same(from[i - 1], entry));
  };
  for (int64_t t = blockIdx.x; t < tiles_of<stage>(w); t += w.blocks) {
    const int64_t first = t * tile + threadIdx.x * per_thread;
    uint32_t stay = 0;
#pragma unroll
    for (int j = 0; j < per_thread; ++j)
      if (first + j < state.entries && stays(first + j, from[first + j]))
        stay |= 1u << j;
    int count;
    Entry *slot = to + t * tile + sum_below<threads>(__popc(stay), sums, count);
#pragma unroll
    for (int j = 0; j < per_thread; ++j)
      if (stay >> j & 1)
        *slot++ = from[first + j];
    if (threadIdx.x == 0)
      w.begins[t] = count;
  }
}

// What the numbers of a stage mean for the next kernels.
template <Stage stage> __device__ __forceinline__ void decide(const GumbelTopK &s, const Work &w, int64_t total) {
  State &state = *w.state;
  if (stage == Stage::passed) {
    const bool append = !s.finish && !w.guessed && total <= s.capacity;
    state.route = append ? Route::append : Route::attempt;
    state.exact = w.exact;
    if (append)
      *s.held = total;
    state.guess = w.guessed ? state.order_cut : last_order;
    state.entries = state.passed = total;
    state.goal = s.k;
    state.settled = total <= s.k || s.k == 0;
    state.order_cut = state.id_cut = total <= s.k ? ~uint64_t{0} : 0;
  } else if (stage == Stage::selected) {
    state.entries = total;
    if (total > s.k) // repeats of the last one
      state.route = Route::failed;
  } else {
    const bool everything = w.exact || (state.entries == state.passed && state.guess == last_order);
    state.route = everything || total >= s.k ? Route::keep : Route::failed;
    if (state.route == Route::keep)
      *s.held = least(s.k, total);
  }
}

constexpr int number_threads = 1024;

// One block: from how many entries each tile has to where they begin, and how many there are.
template <Stage stage> __global__ void __launch_bounds__(number_threads) gumbel_topk_number(GumbelTopK s, Work w) {
  const Route route = stage == Stage::passed && w.exact ? Route::failed : Route::attempt;
  if (w.state->route != route || (stage != Stage::passed && w.state->exact != w.exact))
    return;
  int *sums = reinterpret_cast<int *>(dynamic_shared());
  const int64_t tiles = tiles_of<stage>(w);
  int64_t total = 0;
  for (int64_t first = 0; first < tiles; first += number_threads) {
    const int64_t t = first + threadIdx.x;
    int sum;
    const int below = sum_below<number_threads>(t < tiles ? int(w.begins[t]) : 0, sums, sum);
    if (t < tiles)
      w.begins[t] = total + below;
    total += sum;
  }
  __syncthreads(); // everyone has read the state
  if (threadIdx.x == 0) {
    w.begins[tiles] = total;
    decide<stage>(s, w, total);
  }
}

// What tiles hold, to where it belongs: among the entries, or into the reservoir.
template <Stage stage> __global__ void __launch_bounds__(threads) gumbel_topk_place(GumbelTopK s, Work w) {
  const bool append = stage == Stage::passed && runs(w, Route::append);
  if (!append && !runs(w, stage == Stage::distinct ? Route::keep : Route::attempt))
    return;
  const Entry *from = stage == Stage::distinct ? sorted(w, true) : w.slots;
  // The entries that were numbered: of `selected` fewer are left than its tiles covered.
  const int64_t tiles = stage == Stage::selected ? ceil_div(w.state->passed, tile) : tiles_of<stage>(w);
  for (int64_t t = append ? w.reservoir_tiles + blockIdx.x : blockIdx.x; t < tiles; t += w.blocks) {
    const int64_t begin = w.begins[t];
    const int count = int(w.begins[t + 1] - begin);
    for (int i = int(threadIdx.x); i < count; i += threads) {
      const Entry entry = from[t * tile + i];
      if (stage != Stage::distinct && !append) {
        w.entries[begin + i] = entry;
      } else if (append || begin + i < s.k) {
        s.keys[begin + i] = key_of(entry.order);
        s.picks[begin + i] = entry.pick;
        if (!append && begin + i == s.k - 1)
          *s.threshold = key_of(entry.order);
      }
    }
  }
}

// ---- Select ----

// One digit of the order, or (from passes_of_a_word on) of the id, of the last entry that is wanted. Blocks count, and
// the last one to have counted chooses.
__global__ void __launch_bounds__(threads) gumbel_topk_select(GumbelTopK s, Work w, int pass) {
  State &state = *w.state;
  if (!runs(w, Route::attempt) || state.settled)
    return;
  int *sums = reinterpret_cast<int *>(dynamic_shared());
  uint32_t *counts = reinterpret_cast<uint32_t *>(sums + warps);
  uint32_t *last = counts + bins;
  for (int i = int(threadIdx.x); i < bins; i += threads)
    counts[i] = 0;
  __syncthreads(); // before anyone counts

  const Before before(s);
  const bool by_id = pass >= passes_of_a_word;
  const int above = 64 - digit_bits * (by_id ? pass - passes_of_a_word : pass); // bits of this digit and all below
  const int below = int(most(0, above - digit_bits));
  const uint64_t known = by_id ? state.id_cut : state.order_cut, order = state.order_cut;
  const int64_t entries = state.entries;
  for (int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x; i < entries; i += int64_t(w.blocks) * threads) {
    const Entry entry = w.entries[i];
    if (by_id && entry.order != order)
      continue;
    const uint64_t word = by_id ? before.id(entry.pick) : entry.order;
    if (above == 64 || (word ^ known) >> (above & 63) == 0)
      atomic_add(counts + (word >> below & (above - below == digit_bits ? bins - 1 : (1 << (above - below)) - 1)), 1u);
  }
  __syncthreads(); // everyone has counted
  for (int i = int(threadIdx.x); i < bins; i += threads)
    if (counts[i])
      atomic_add(w.histogram + i, counts[i]);
  __threadfence();
  __syncthreads(); // all of the block's counts are on their way before it arrives
  if (threadIdx.x == 0)
    *last = atomic_add(&state.arrived, 1u) == uint32_t(w.blocks) - 1;
  __syncthreads();
  if (!*last)
    return;

  constexpr int own = bins / threads;
  uint32_t count[own];
  int sum = 0, total;
#pragma unroll
  for (int j = 0; j < own; ++j) {
    uint32_t *bin = w.histogram + threadIdx.x * own + j;
    count[j] = atomic_add(bin, 0u); // where the other blocks' counts are, past this one's caches
    *bin = 0;
    sum += int(count[j]);
  }
  const int64_t goal = state.goal, under = sum_below<threads>(sum, sums, total);
  if (threadIdx.x == 0)
    state.arrived = 0;
  if (!(under < goal && goal <= under + sum))
    return;
  int64_t left = goal - under;
  bool found = false;
#pragma unroll
  for (int j = 0; j < own; ++j) {
    if (!found && left <= int64_t(count[j])) {
      found = true;
      const uint64_t digit = threadIdx.x * own + j, cut = known | digit << below;
      const bool settled = left == int64_t(count[j]);
      // All of the bin is wanted: what is below this digit may be anything.
      (by_id ? state.id_cut : state.order_cut) = settled ? cut | ((uint64_t{1} << below) - 1) : cut;
      if (settled && !by_id)
        state.id_cut = ~uint64_t{0};
      state.settled = settled;
      state.goal = left;
    } else if (!found) {
      left -= count[j];
    }
  }
}

// ---- Sort ----

__global__ void __launch_bounds__(threads, 4) gumbel_topk_sort(GumbelTopK s, Work w) {
  if (!runs(w, Route::attempt))
    return;
  Entry *shared = reinterpret_cast<Entry *>(dynamic_shared());
  for (int64_t first = int64_t(blockIdx.x) * tile; first < w.state->entries; first += int64_t(w.blocks) * tile) {
    const int n = int(least(tile, w.state->entries - first));
    for (int i = int(threadIdx.x); i < tile; i += threads)
      shared[i] = i < n ? w.entries[first + i] : Entry{last_order, 0};
    sort_tile<tile, threads>(shared, Before(s));
    for (int i = int(threadIdx.x); i < n; i += threads)
      w.entries[first + i] = shared[i];
    __syncthreads(); // before the next one is written
  }
}

// From sorted runs of `width` entries to runs of twice that; a tile of the result at a time.
__global__ void __launch_bounds__(threads) gumbel_topk_merge(GumbelTopK s, Work w, int64_t width, bool back) {
  const int64_t entries = w.state->entries;
  if (!runs(w, Route::attempt) || width >= entries)
    return;
  const Entry *from = back ? w.slots : w.entries;
  Entry *to = back ? w.entries : w.slots;
  for (int64_t first = int64_t(blockIdx.x) * tile; first < entries; first += int64_t(w.blocks) * tile)
    merge_tile<tile, threads>(from, to, entries, width, first, dynamic_shared(), Before(s));
}

// ---- One id, two scores ----

// Entries with one id have different keys here, equal ones being gone. A table of ids, open to collisions, of as many
// places as `mask` has values; a place holds 1 + an index into the reservoir.
__global__ void __launch_bounds__(threads)
    gumbel_topk_two_scores(GumbelTopK s, Work w, uint32_t *table, uint32_t mask) {
  if (w.state->route == Route::refused)
    return;
  const Before before(s);
  const int64_t held = *s.held;
  for (int64_t i = int64_t(blockIdx.x) * threads + threadIdx.x; i < held; i += int64_t(w.blocks) * threads) {
    const uint64_t id = before.id(s.picks[i]);
    for (uint32_t at = uint32_t(id * 0x9E3779B97F4A7C15u >> 32);; ++at) {
      const uint32_t there = atomic_swap_if(table + (at & mask), 0u, uint32_t(i + 1));
      if (!there)
        break;
      if (before.id(s.picks[there - 1]) == id) {
        atomic_min(&s.fault->two_scores_id, id);
        s.fault->two_scores = 1;
        break;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------------------------------

// Blocks of a launch at most: some eight for each multiprocessor of a large card. More would only have to return.
constexpr int64_t most_blocks = 1024, most_documents_of_a_piece = int64_t{1} << 24;

// How the work is cut and where it lies; a function of the shapes alone.
struct Plan {
  int64_t pieces, piece; // and documents of one
  int64_t reservoir;     // entries that it may hold when a piece begins
  int64_t most_entries, tiles;
  int64_t sample_stride, rank; // rank 0: no guess
  int64_t table;               // places, a power of 2

  explicit Plan(const GumbelTopK &s) {
    piece = least(s.count, most_documents_of_a_piece);
    pieces = piece ? ceil_div(s.count, piece) : 1;
    reservoir = s.by_position && pieces == 1 ? 0 : s.capacity;
    most_entries = reservoir + piece;
    tiles = ceil_div(reservoir, tile) + ceil_div(piece, tile);
    table = 1;
    while (table < 2 * least(s.k, most_entries))
      table *= 2;

    // A key that some more than k of the first piece reach, going by a sample: by 5 standard deviations.
    sample_stride = piece / sample_blocks / sample_of_a_block * sample_of_a_block;
    const double expected = double(sample) * double(s.k) / double(most(1, piece));
    rank = expected < sample ? int64_t(expected + sample_margin * (std::sqrt(expected) + 3)) + 1 : sample;
    if (sample_stride < 8 * sample_of_a_block || rank > sample / 2)
      rank = 0;
  }
};

// Parts of the workspace, one after the other.
struct Workspace {
  State *state;
  uint32_t *histogram;
  int64_t *begins;
  Entry *slots, *entries;
  int64_t bytes = 0;

  Workspace(const Plan &plan, void *memory) {
    const auto take = [&](auto *&part, int64_t count) {
      part = reinterpret_cast<std::remove_reference_t<decltype(part)>>(static_cast<char *>(memory) + bytes);
      bytes += ceil_div(count * int64_t(sizeof *part), 256) * 256;
    };
    take(state, 1), take(histogram, bins), take(begins, plan.tiles + 1);
    take(slots, plan.tiles * tile), take(entries, plan.tiles * tile);
  }
};

class Launcher {
public:
  Launcher(const GumbelTopK &args, const Plan &plan, const Workspace &space, void *stream)
      : s(args), plan(plan), stream(stream) {
    w.state = space.state, w.histogram = space.histogram, w.begins = space.begins;
    w.slots = space.slots, w.entries = space.entries;
    w.blocks = int(most(1, least(plan.tiles, most_blocks)));
    w.inverse_temperature = s.temperature > 0 ? 1 / s.temperature : 1;
  }

  template <class In> cudaError_t run() {
    zero(w.histogram, bins * int64_t(sizeof(uint32_t)));
    const bool finish = s.finish, may_repeat = s.ids || !s.by_position;
    for (int64_t p = 0; p < plan.pieces; ++p) {
      w.first = p * plan.piece;
      w.documents = least(plan.piece, s.count - w.first);
      w.reservoir_tiles = ceil_div(p || !s.by_position ? plan.reservoir : 0, tile);
      w.exact = false, w.guessed = plan.rank && p == 0;
      s.finish = finish && p + 1 == plan.pieces;
      start(gumbel_topk_begin, 1, 32, 0, p == 0);
      if (w.guessed) {
        start(gumbel_topk_sample<In>, sample_blocks, threads, 0, plan.sample_stride, plan.rank);
        select(passes_of_a_word);
      }
      attempt<In>(least(plan.most_entries, s.k));
      w.exact = true;
      if (w.guessed || may_repeat)
        attempt<In>(plan.most_entries);
    }
    if (s.finish && may_repeat && plan.tiles) {
      uint32_t *table = reinterpret_cast<uint32_t *>(w.slots);
      zero(table, plan.table * int64_t(sizeof *table));
      start(gumbel_topk_two_scores, w.blocks, threads, 0, table, uint32_t(plan.table - 1));
    }
    return error;
  }

private:
  static constexpr int64_t sums_bytes = warps * int64_t(sizeof(int));

  template <class Kernel, class... Args>
  void start(Kernel kernel, int64_t blocks, int block_threads, int64_t shared, const Args &...args) {
    if (error == cudaSuccess)
      error = launch(kernel, blocks, block_threads, shared, stream, s, w, args...);
  }
  void zero(void *at, int64_t bytes) {
    if (error == cudaSuccess)
      error = cudaMemsetAsync(at, 0, size_t(bytes), static_cast<cudaStream_t>(stream));
  }

  void select(int passes) {
    for (int pass = 0; pass < passes; ++pass)
      start(gumbel_topk_select, w.blocks, threads, sums_bytes + (bins + 1) * int64_t(sizeof(uint32_t)), pass);
  }

  template <Stage stage> void number_and_place() {
    start(gumbel_topk_number<stage>, 1, number_threads, number_threads / 32 * int64_t(sizeof(int)));
    start(gumbel_topk_place<stage>, w.blocks, threads, 0);
  }

  // Of the exact one, the first two kernels return at once unless the first attempt has failed, and so do all others.
  template <class In> void attempt(int64_t most_sorted) {
    start(gumbel_topk_pass<In>, w.blocks, threads, sums_bytes + tile * int64_t(sizeof(uint16_t)));
    number_and_place<Stage::passed>();
    if (!w.exact) {
      select(2 * passes_of_a_word);
      start(gumbel_topk_filter<Stage::selected>, w.blocks, threads, sums_bytes);
      number_and_place<Stage::selected>();
    }
    constexpr int64_t tile_bytes = tile * int64_t(sizeof(Entry));
    start(gumbel_topk_sort, w.blocks, threads, tile_bytes);
    bool back = false;
    for (int64_t width = tile; width < most_sorted; width *= 2, back = !back)
      start(gumbel_topk_merge, w.blocks, threads, merge_bytes<tile, Entry>, width, back);
    start(gumbel_topk_filter<Stage::distinct>, w.blocks, threads, sums_bytes);
    number_and_place<Stage::distinct>();
  }

  GumbelTopK s;
  const Plan plan;
  void *stream;
  Work w{};
  cudaError_t error = cudaSuccess;
};

} // namespace

int64_t gumbel_topk_cuda_workspace(const GumbelTopK &s) { return Workspace(Plan(s), nullptr).bytes; }

int gumbel_topk_cuda(const GumbelTopK &s, void *workspace, void *stream) {
  const Plan plan(s);
  if (plan.most_entries > INT32_MAX)
    return cudaErrorInvalidConfiguration;
  Launcher launcher(s, plan, Workspace(plan, workspace), stream);
  switch (s.dtype) {
  case DType::f32: return launcher.run<float>();
  case DType::f64: return launcher.run<double>();
  case DType::bf16: return launcher.run<bf16>();
  default: return launcher.run<f16>();
  }
}

} // namespace gg
