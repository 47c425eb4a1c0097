// embedding_stats on the CPU: equal ids of a sample are chained by a hash table; then each chain's rows are summed in
// L1 and used at once. What bounds it: reading b, and the rows of D, once. See docs/ops/embedding_stats.md.
#include "core/parallel.h"
#include "core/simd.h"
#include "core/workspace.h"
#include "embedding_stats/embedding_stats.h"

namespace gg::GG_ISA {
namespace {

// Few samples are cut into columns to feed a pool, but into no narrower ones than this: a cut walks the chains again.
constexpr int64_t wanted_tasks = 64;
constexpr int64_t least_cols = 256;

// A token's place in the chain of its id: the next token with that id, and whether it is the first.
struct Link {
  int32_t next;
  bool first;
};

template <class In, class Acc> inline void add_row(const In *from, int64_t n, Acc *to) {
  int64_t c = 0;
  for (; c + lanes<Acc> <= n; c += lanes<Acc>)
    store(to + c, load(to + c) + load_wide(from + c));
  for (; c < n; ++c)
    to[c] += widen(from[c]);
}

template <class Dir, class Acc> inline double dot_rows(const Acc *x, const Dir *y, int64_t n) {
  vec<Acc> sum[4] = {};
  int64_t c = 0;
  for (; c + 4 * lanes<Acc> <= n; c += 4 * lanes<Acc>)
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v)
      sum[v] += load(x + c + v * lanes<Acc>) * load_wide(y + c + v * lanes<Acc>);
  for (; c + lanes<Acc> <= n; c += lanes<Acc>)
    sum[0] += load(x + c) * load_wide(y + c);
  Acc rest = 0;
  for (; c < n; ++c)
    rest += x[c] * widen(y[c]);
  return double(sum_lanes<Acc>((sum[0] + sum[1]) + (sum[2] + sum[3]))) + double(rest);
}

template <class In, class Acc> class Kernel {
public:
  explicit Kernel(const EmbeddingStats &args) : s(args) {
    cuts = most(1, least(ceil_div(wanted_tasks, most(1, s.samples)), s.features / least_cols));
    cols_per_cut = ceil_div(ceil_div(s.features, cuts), lanes<Acc>) * lanes<Acc>;
    chained = s.id_sample == 0 ? least(1, s.samples) : s.samples; // samples that share their ids share their chains
  }

  void run() {
    static thread_local Workspace link_space, partial_space;
    links = link_space.get<Link>(chained * s.tokens);
    partials = partial_space.get<double>(s.samples * cuts * (1 + s.directions));
    parallel_for(chained, [this](int64_t i) { chain(i); });
    parallel_for(s.samples * cuts, [this](int64_t task) { sample_cut(task / cuts, task % cuts); });
    for (int64_t i = 0; i < s.samples; ++i)
      for (int64_t q = 0; q <= s.directions; ++q) {
        double sum = 0;
        for (int64_t cut = 0; cut < cuts; ++cut)
          sum += partial(i, cut)[q];
        if (q > 0)
          static_cast<Acc *>(s.dots)[i * s.directions + q - 1] = static_cast<Acc>(sum);
        else if (s.norms2)
          static_cast<Acc *>(s.norms2)[i] = static_cast<Acc>(sum);
      }
  }

private:
  double *partial(int64_t i, int64_t cut) const { return partials + (i * cuts + cut) * (1 + s.directions); }
  Link *links_of(int64_t i) const { return links + (chained == s.samples ? i : 0) * s.tokens; }

  // Open addressing at half load. A slot holds the first token of its id's chain; going from the last token to the
  // first, every new one goes in front, so chains run in the order of tokens.
  void chain(int64_t i) const {
    static thread_local Workspace slot_space;
    int bits = 1;
    while ((int64_t{1} << bits) < 2 * s.tokens)
      ++bits;
    const int64_t mask = (int64_t{1} << bits) - 1;
    int32_t *slots = slot_space.get<int32_t>(mask + 1);
    std::memset(slots, -1, sizeof(int32_t) * (mask + 1));
    Link *link = links_of(i);
    for (int64_t t = s.tokens - 1; t >= 0; --t) {
      const int64_t id = s.id(i, t);
      link[t] = {-1, id != s.padding_idx || s.padding_idx < 0};
      if (!link[t].first)
        continue;
      int64_t slot = static_cast<int64_t>(static_cast<uint64_t>(id) * 0x9E3779B97F4A7C15u >> (64 - bits));
      while (slots[slot] >= 0 && s.id(i, slots[slot]) != id)
        slot = (slot + 1) & mask;
      if (slots[slot] >= 0) {
        link[t].next = slots[slot];
        link[slots[slot]].first = false;
      }
      slots[slot] = static_cast<int32_t>(t);
    }
  }

  void sample_cut(int64_t i, int64_t cut) const {
    static thread_local Workspace row_space;
    const int64_t first = cut * cols_per_cut, cols = most(0, least(s.features, first + cols_per_cut) - first);
    Acc *row = row_space.get<Acc>(cols_per_cut);
    double *sums = partial(i, cut);
    for (int64_t q = 0; q <= s.directions; ++q)
      sums[q] = 0;
    const Link *link = links_of(i);
    const In *b = static_cast<const In *>(s.b) + i * s.b_sample + first;
    for (int64_t t = 0; t < s.tokens; ++t) {
      if (!link[t].first)
        continue;
      copy_padded(b + t * s.b_token, row, cols, cols);
      for (int32_t u = link[t].next; u >= 0; u = link[u].next)
        add_row(b + u * s.b_token, cols, row);
      sums[0] += dot_rows(row, row, cols);
      for (int64_t k = 0; k < s.directions; ++k) {
        const int64_t at = k * s.D_direction + s.id(i, t) * s.D_row + first;
        sums[1 + k] += s.direction_dtype == s.dtype ? dot_rows(row, static_cast<const In *>(s.D) + at, cols)
                                                    : dot_rows(row, static_cast<const Acc *>(s.D) + at, cols);
      }
    }
  }

  const EmbeddingStats &s;
  int64_t cuts, cols_per_cut, chained;
  Link *links = nullptr;
  double *partials = nullptr;
};

} // namespace

void embedding_stats(const EmbeddingStats &args) { run_kernel<Kernel>(args); }

} // namespace gg::GG_ISA
