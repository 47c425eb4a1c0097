// gumbel_topk on the CPU: noise for vectors of documents, a bound of every key that needs no logarithm, exact keys of
// the few that pass it, and a reservoir that is thinned to the best k when it is full. Large calls guess the threshold
// from a sample; a wrong guess costs a second scan, no document. What bounds it: the integer
// multiplications of Philox. See docs/ops/gumbel_topk.md.
#include "core/gumbel.h"
#include "core/parallel.h"
#include "core/workspace.h"
#include "gumbel_topk/gumbel_topk.h"

#include <algorithm>
#include <atomic>
#include <cmath>

namespace gg::GG_ISA {
namespace {

constexpr int64_t block = GumbelTopK::least_spare; // scanned at once: scores, ids and noise are 12 KiB, a third of L1
constexpr int64_t blocks_per_claim = 16;
constexpr int width = lanes<double>;
constexpr double infinity = __builtin_inf();

// Lane l is bit l: whether x[l] is not below y, as NaN never is.
static inline uint32_t not_below(vec<double> x, double y) {
#if defined(__AVX512F__)
  return _mm512_cmp_pd_mask((__m512d)x, _mm512_set1_pd(y), _CMP_NLT_UQ);
#elif defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)x, _mm256_set1_pd(y), _CMP_NLT_UQ)));
#elif defined(__x86_64__)
  return static_cast<uint32_t>(_mm_movemask_pd(_mm_cmpnlt_pd((__m128d)x, _mm_set1_pd(y))));
#else
  uint32_t bits = 0;
  for (int l = 0; l < width; ++l)
    bits |= uint32_t{!(x[l] < y)} << l;
  return bits;
#endif
}

struct Entry {
  double key;
  int64_t pick;
};

// The bins that keys are dealt into, higher keys to higher bins: the bits of their distance to the lowest one, so that
// a bin is as wide as a fixed share of that distance, as suits exponential tails and outliers alike.
struct Bins {
  double low = infinity, high = -infinity; // of finite keys
  int bits = 0, shift = 0;
  static constexpr double grain = 0x1p-10; // below it, bins are equally wide

  static int64_t as_int(double x) {
    int64_t i;
    std::memcpy(&i, &x, sizeof i);
    return i;
  }
  void cover(double key) {
    if (key - key == 0) {
      low = key < low ? key : low;
      high = key > high ? key : high;
    }
  }
  void finish(int bits_) {
    bits = bits_;
    if (low > high)
      low = high = 0;
    const int64_t span = as_int(high - low + grain) - as_int(grain);
    while (span >> shift >> bits)
      ++shift;
  }
  int64_t of(double key) const {
    const int64_t bin = (as_int(key - low + grain) - as_int(grain)) >> shift;
    return most(0, least(bin, (int64_t{1} << bits) - 1));
  }
};

class Reservoir {
public:
  explicit Reservoir(const GumbelTopK &args) : s(args), held(*args.held) {}

  // Whether there was room. Any thread may call it.
  bool append(const double *keys, const int64_t *picks, int64_t n) {
    std::atomic_ref<int64_t> end(held);
    int64_t at = end.load(std::memory_order_relaxed);
    do {
      if (at + n > s.capacity)
        return false;
    } while (!end.compare_exchange_weak(at, at + n, std::memory_order_relaxed));
    std::copy(keys, keys + n, s.keys + at);
    std::copy(picks, picks + n, s.picks + at);
    return true;
  }

  // Keeps the best k distinct entries, best first.
  void thin() {
    const Bins bins = bins_of_keys();
    const auto before = [this](const Entry &x, const Entry &y) {
      if (x.key != y.key)
        return x.key > y.key;
      return id(x.pick) != id(y.pick) ? id(x.pick) < id(y.pick) : x.pick < y.pick;
    };
    const auto same = [this](const Entry &x, const Entry &y) { return x.key == y.key && id(x.pick) == id(y.pick); };
    int64_t distinct = 0;
    for (int64_t goal = s.k;; goal = held) { // once more only where documents repeat
      std::atomic<bool> repeats = false;
      const int64_t dealt = deal(
          bins.bits, goal, [&](int64_t i) { return bins.of(s.keys[i]); },
          [&](Entry *first, Entry *last) {
            std::sort(first, last, before);
            if (std::adjacent_find(first, last, same) != last)
              repeats.store(true, std::memory_order_relaxed);
          });
      distinct = repeats ? std::unique(entries, entries + dealt, same) - entries : dealt;
      if (distinct >= s.k || dealt == held)
        break;
    }
    held = least(s.k, distinct);
    parallel_for(ceil_div(held, piece), [&](int64_t p) {
      for (int64_t i = p * piece; i < least(held, (p + 1) * piece); ++i)
        s.keys[i] = entries[i].key, s.picks[i] = entries[i].pick;
    });
    if (held == s.k && s.k > 0)
      *s.threshold = s.keys[s.k - 1];
  }

  // Entries with one id have different keys here, equal ones being gone.
  void report_two_scores() {
    const int bits = most(1, bits_for(held));
    const auto smaller = [this](const Entry &x, const Entry &y) { return id(x.pick) < id(y.pick); };
    const auto same = [this](const Entry &x, const Entry &y) { return id(x.pick) == id(y.pick); };
    const auto hash = [&](int64_t i) {
      return static_cast<int64_t>(id(s.picks[i]) * 0x9E3779B97F4A7C15u >> (64 - bits));
    };
    deal(bits, held, hash, [&](Entry *first, Entry *last) {
      std::sort(first, last, smaller);
      const Entry *pair = std::adjacent_find(first, last, same);
      if (pair == last)
        return;
      std::atomic_ref<uint64_t> least_id(s.fault->two_scores_id);
      uint64_t known = least_id.load();
      while (id(pair->pick) < known && !least_id.compare_exchange_weak(known, id(pair->pick)))
        ;
      std::atomic_ref<int64_t>(s.fault->two_scores).store(1);
    });
  }

private:
  static constexpr int64_t piece = 1 << 14;

  uint64_t id(int64_t pick) const { return s.by_position && s.ids ? s.ids[pick] : static_cast<uint64_t>(pick); }

  // About 16 entries to a bin, but no more bins than have their counts in L2.
  static int bits_for(int64_t n) {
    int bits = 0;
    while (bits < 16 && n >> bits > 16)
      ++bits;
    return bits;
  }

  Bins bins_of_keys() {
    const int64_t pieces = ceil_div(held, piece);
    Bins *parts = count_space.get<Bins>(pieces), bins;
    parallel_for(pieces, [&](int64_t p) {
      Bins part;
      for (int64_t i = p * piece; i < least(held, (p + 1) * piece); ++i)
        part.cover(s.keys[i]);
      parts[p] = part;
    });
    for (int64_t p = 0; p < pieces; ++p)
      bins.cover(parts[p].low), bins.cover(parts[p].high);
    bins.finish(bits_for(held));
    return bins;
  }

  // Copies into `entries` the highest bins, the highest first, until they hold at least `goal`; calls finish(first,
  // last) on the entries of every bin. How many were copied.
  template <class BinOf, class Finish> int64_t deal(int bits, int64_t goal, BinOf bin_of, Finish finish) {
    const int64_t bins = int64_t{1} << bits;
    const int64_t parts = most(1, least(num_threads(), held / piece)), per_part = ceil_div(held, parts);
    int64_t *counts = count_space.get<int64_t>(parts * bins);
    parallel_for(parts, [&](int64_t p) {
      int64_t *count = counts + p * bins;
      std::fill(count, count + bins, 0);
      for (int64_t i = p * per_part; i < least(held, (p + 1) * per_part); ++i)
        ++count[bin_of(i)];
    });

    int64_t dealt = 0, lowest = bins;
    while (lowest > 0 && dealt < goal) {
      --lowest;
      for (int64_t p = 0; p < parts; ++p) { // from counts to where the part's entries of the bin begin
        int64_t &count = counts[p * bins + lowest];
        dealt += count;
        count = dealt - count;
      }
    }

    entries = entry_space.get<Entry>(dealt);
    parallel_for(parts, [&](int64_t p) {
      int64_t *begin = counts + p * bins;
      for (int64_t i = p * per_part; i < least(held, (p + 1) * per_part); ++i)
        if (const int64_t bin = bin_of(i); bin >= lowest)
          entries[begin[bin]++] = {s.keys[i], s.picks[i]};
    });

    const int64_t *end = counts + (parts - 1) * bins; // the last part's beginnings have moved to the ends
    constexpr int64_t bins_per_task = 256;
    parallel_for(ceil_div(bins - lowest, bins_per_task), [&](int64_t task) {
      const int64_t first = lowest + task * bins_per_task;
      for (int64_t bin = first; bin < least(bins, first + bins_per_task); ++bin)
        finish(entries + (bin + 1 < bins ? end[bin + 1] : 0), entries + end[bin]);
    });
    return dealt;
  }

  const GumbelTopK &s;
  int64_t &held;
  Entry *entries = nullptr;
  Workspace entry_space, count_space; // given back after the call: they are as large as k
};

template <class In, class> class Kernel {
public:
  explicit Kernel(const GumbelTopK &args) : s(args), reservoir(args), noisy(s.temperature > 0) {}

  void run() {
    *s.fault = {};
    if (s.k == 0)
      *s.threshold = infinity;
    guess = guessed_threshold();
    scan_all();
    const bool guessed = guess > *s.threshold;
    if (guessed || s.finish)
      reservoir.thin();
    if (guessed && !(*s.held == s.k && *s.threshold >= guess)) { // too high: the rest, and again what is there already
      guess = -infinity;
      scan_all();
      reservoir.thin();
    }
    if (s.finish && (s.ids || !s.by_position))
      reservoir.report_two_scores();
  }

private:
  struct Span { // of documents that a worker has claimed and not yet scanned
    int64_t first, end;
  };
  struct Candidates {
    double keys[block];
    int64_t picks[block];
    int64_t count;
  };

  // A key that some more than k documents of this call reach, going by every so many-th block; -infinity where
  // documents are too few for that, or the threshold is higher already.
  double guessed_threshold() {
    constexpr int64_t sampled = 256, sample = sampled * block;
    const int64_t stride = s.count / block / sampled;
    if (stride < 8)
      return -infinity;
    const double expected = double(sample) * double(s.k) / double(s.count);
    const auto rank =
        static_cast<int64_t>(expected + 5 * std::sqrt(expected) + 16); // too high once in millions of calls
    if (rank > sample / 2)
      return -infinity;
    Workspace key_space;
    double *keys = key_space.get<double>(sample);
    parallel_for(sampled, [&](int64_t i) {
      Candidates found;
      scan(i * stride * block, block, found);
      std::fill(std::copy(found.keys, found.keys + found.count, keys + i * block), keys + (i + 1) * block, -infinity);
    });
    std::nth_element(keys, keys + rank, keys + sample, [](double x, double y) { return x > y; });
    return keys[rank];
  }

  void scan_all() {
    const int64_t workers = most(1, least(num_threads(), ceil_div(s.count, block * blocks_per_claim)));
    Workspace span_space;
    Span *spans = span_space.get<Span>(workers);
    std::fill(spans, spans + workers, Span{0, 0});
    next = 0;
    for (;;) {
      full = false;
      parallel_for(workers, [&](int64_t w) { work(spans[w]); });
      if (!full)
        return;
      reservoir.thin();
    }
  }

  // Scans until no document or no room is left. A block whose candidates found no room is scanned again afterwards.
  void work(Span &span) {
    Candidates found;
    while (!full.load(std::memory_order_relaxed)) {
      if (span.first >= span.end) {
        span.first = next.fetch_add(block * blocks_per_claim, std::memory_order_relaxed);
        span.end = least(s.count, span.first + block * blocks_per_claim);
        if (span.first >= span.end)
          return;
      }
      const int64_t n = least(block, span.end - span.first);
      scan(span.first, n, found);
      if (reservoir.append(found.keys, found.picks, found.count))
        span.first += n;
      else
        full = true;
    }
  }

  void scan(int64_t first, int64_t n, Candidates &found) {
    alignas(vector_bytes) double x[block];
    alignas(vector_bytes) uint64_t id[block], h[block];
    uint16_t passed[block];
    const In *scores = static_cast<const In *>(s.scores) + first;
    for (int64_t j = 0; j < n; ++j)
      x[j] = widen(scores[j]);
    for (int64_t j = 0; j < n; ++j)
      id[j] = s.ids ? s.ids[first + j] : static_cast<uint64_t>(first + j);
    for (int64_t j = n; j % width; ++j)
      x[j] = 0, id[j] = 0;

    const uint64_t seed = s.seed; // not reloaded after every store: its round keys stay in registers
    const double threshold = guess > *s.threshold ? guess : *s.threshold;
    const double inverse_temperature = noisy ? 1 / s.temperature : 1;
    const double limit = noisy ? limit_of_bound(threshold) : threshold;
    int64_t candidates = 0;
    for (int64_t j = 0; j < n; j += width) {
      vec<double> bound = load(x + j) * inverse_temperature;
      if (noisy) {
        const vec<uint64_t> bits = noise_bits(load(id + j), seed);
        store(h + j, bits);
        bound = bound_of_key(bound, bits);
      }
      uint32_t pass = not_below(bound, limit);
      if (n - j < width)
        pass &= (1u << (n - j)) - 1;
      for (; pass; pass &= pass - 1)
        passed[candidates++] = static_cast<uint16_t>(j + __builtin_ctz(pass));
    }

    found.count = 0;
    for (int64_t c = 0; c < candidates; c += width) {
      const int64_t some = least(width, candidates - c);
      double score[width] = {};
      uint64_t bits[width] = {};
      for (int64_t l = 0; l < some; ++l)
        score[l] = x[passed[c + l]], bits[l] = noisy ? h[passed[c + l]] : 0;
      vec<double> key = load(score);
      if (noisy)
        key = key / s.temperature + gumbel(load(bits));
      key += 0.0; // -0 becomes 0
      for (int64_t l = 0; l < some; ++l) {
        const int64_t at = first + passed[c + l];
        if (key[l] != key[l])
          report_nan(at);
        else if (key[l] >= threshold) {
          found.keys[found.count] = key[l];
          found.picks[found.count++] = s.by_position ? at : static_cast<int64_t>(id[passed[c + l]]);
        }
      }
    }
  }

  void report_nan(int64_t at) {
    std::atomic_ref<int64_t> first(s.fault->nan_at);
    int64_t known = first.load();
    while ((known < 0 || at < known) && !first.compare_exchange_weak(known, at))
      ;
  }

  const GumbelTopK &s;
  Reservoir reservoir;
  const bool noisy;
  double guess = -infinity; // of the threshold, for this call
  std::atomic<bool> full = false;
  std::atomic<int64_t> next = 0;
};

} // namespace

void gumbel_topk(const GumbelTopK &args) { run_kernel<Kernel>(args); }

} // namespace gg::GG_ISA
