// trajectory_match on the CPU: the list of tensors is cut into chunks, each read once. A loss alone takes one sweep. A
// gradient needs 1 / D, so D comes first, from start and target, and a second sweep over student and target gives the
// rest: 5 passes of memory, where a gradient written unscaled and scaled afterwards takes 6. What bounds it: those
// bytes. See docs/ops/trajectory_match.md.
#include "core/parallel.h"
#include "core/simd.h"
#include "core/workspace.h"
#include "trajectory_match/trajectory_match.h"
#include <cmath>
#include <type_traits>

namespace gg::GG_ISA {
namespace {

constexpr int64_t scalars_per_task = 1 << 15;

// In the numbering that tasks cut, tensors begin at multiples of this: a task then starts at a whole cache line of a
// tensor, however odd the sizes of those before it.
constexpr int64_t grid = 64;

// A gradient larger than this is written past the caches.
constexpr int64_t cached_bytes = 8 << 20;

// What a sweep does.
enum Sweep { start_sums = 1, student_sums = 2, gradients = 4 };
enum class Mask { none, boolean, real };

template <class In, class Acc> class Kernel {
  // What a sweep writes: gradients that come with the loss are for computing with, those alone are autograd's.
  template <int what> using Out = std::conditional_t<(what & student_sums) != 0, Acc, In>;
  using Tensor = TrajectoryMatch::Tensor;
  using Totals = TrajectoryMatch::Totals;
  static constexpr int parts = lanes<Acc> / lanes<double>; // vectors of doubles for one of Acc

  struct Place {
    int64_t begin;   // in the numbering that tasks cut
    int64_t dropped; // so many leading scalars are not looked at
  };

public:
  explicit Kernel(const TrajectoryMatch &args) : s(args) {}

  void run() {
    static thread_local Workspace place_space, partial_space;
    places = place_space.get<Place>(s.count + 1);
    int64_t end = 0, scalars = 0;
    for (int64_t t = 0; t < s.count; ++t) {
      const int64_t size = s.tensors[t].size;
      places[t] = {end, s.tensors[t].weight == 0 ? size : most(0, least(s.first - scalars, size))};
      end += ceil_div(size, grid) * grid, scalars += size;
    }
    past_caches = scalars * int64_t(s.measure ? sizeof(Acc) : sizeof(In)) > cached_bytes;
    tasks = ceil_div(end, scalars_per_task);
    partials = partial_space.get<Totals>(tasks + 1);

    if (s.measure)
      *s.totals = s.gradient ? sweep<start_sums>() : sweep<start_sums | student_sums>();
    if (s.gradient && s.totals->usable()) {
      choose_scales();
      if (s.measure)
        s.totals->num = sweep<student_sums | gradients>().num;
      else
        sweep<gradients>();
    }
    if (s.measure)
      *static_cast<Acc *>(s.loss) = static_cast<Acc>(s.totals->num / s.totals->D);
  }

private:
  // 2 g / D as a power of two near its square root, and the rest: a difference is about sqrt(D), so neither product
  // leaves the range of Acc where the gradient does not.
  void choose_scales() {
    const double g = s.loss_gradient ? double(*static_cast<const Acc *>(s.loss_gradient)) : 1;
    const double scale = 2 * g / s.totals->D;
    int exponent = 0;
    if (std::isfinite(scale))
      std::frexp(scale, &exponent);
    power = static_cast<Acc>(std::ldexp(1.0, exponent / 2));
    rest = std::ldexp(scale, -(exponent / 2));
  }

  // Backwards where gradients are written: what the sweep before has read last is still in cache.
  template <int what> Totals sweep() {
    parallel_for(tasks, [this](int64_t task) {
      task = what & gradients ? tasks - 1 - task : task;
      partials[task] = chunk<what>(task * scalars_per_task, (task + 1) * scalars_per_task);
    });
    Totals totals{};
    for (int64_t task = 0; task < tasks; ++task)
      add(totals, partials[task], 1);
    return totals;
  }

  static void add(Totals &to, const Totals &x, double weight) {
    to.num += weight * x.num, to.D += weight * x.D, to.S += weight * x.S, to.wrong += x.wrong;
  }

  // What lies between two numbers, of every tensor.
  template <int what> Totals chunk(int64_t begin, int64_t end) const {
    int64_t t = 0;
    for (int64_t beyond = s.count; beyond - t > 1;) { // the last tensor that begins at or before `begin`
      const int64_t middle = (t + beyond) / 2;
      (places[middle].begin <= begin ? t : beyond) = middle;
    }
    Totals totals{};
    for (; t < s.count && places[t].begin < end; ++t) {
      const Tensor &x = s.tensors[t];
      const int64_t from = most(0, begin - places[t].begin), to = least(x.size, end - places[t].begin);
      const int64_t kept = least(most(from, places[t].dropped), to);
      if ((what & gradients) && kept > from)
        std::memset(static_cast<Out<what> *>(x.gradient) + from, 0,
                    static_cast<size_t>(kept - from) * sizeof(Out<what>));
      if (kept < to)
        add(totals,
            !x.mask       ? piece<what, Mask::none>(x, kept, to)
            : s.bool_mask ? piece<what, Mask::boolean>(x, kept, to)
                          : piece<what, Mask::real>(x, kept, to),
            x.weight);
    }
    if ((what & gradients) && past_caches)
      finish_streams();
    return totals;
  }

  template <Mask mask> using Weight = std::conditional_t<mask == Mask::boolean, uint8_t, Acc>;

  // Where lanes<Acc> neighbours of one tensor lie.
  template <int what, Mask mask> struct At {
    const In *student, *start, *target;
    const Weight<mask> *weights;
    Out<what> *gradient;

    At(const Tensor &x, int64_t i)
        : student(moved<const In>(x.student, i)), start(moved<const In>(x.start, i)),
          target(moved<const In>(x.target, i)), weights(moved<const Weight<mask>>(x.mask, i)),
          gradient(moved<Out<what>>(x.gradient, i)) {}
    template <class T, class P> static T *moved(P *from, int64_t i) {
      return from ? static_cast<T *>(from) + i : nullptr;
    }
  };

  struct Sums {
    vec<double> num[parts], D[parts], S[parts];
    vec<Acc> wrong;
  };

  // Scalars [from, to) of one tensor. Sums are without its weight.
  template <int what, Mask mask> Totals piece(const Tensor &x, int64_t from, int64_t to) const {
    const Acc scale = static_cast<Acc>(rest * x.weight);
    const bool past = past_caches && reinterpret_cast<uintptr_t>(At<what, mask>(x, from).gradient) % 16 == 0;
    Sums sums{};
    int64_t i = from;
    for (; i + lanes<Acc> <= to; i += lanes<Acc>)
      step<what, mask>(At<what, mask>(x, i), scale, past, sums);
    if (i < to) { // the same with zeros behind the end
      In padded[3][lanes<Acc>] = {};
      Out<what> out[lanes<Acc>];
      Weight<mask> weights[lanes<Acc>] = {};
      At<what, mask> at(x, i);
      const auto pad = [n = static_cast<size_t>(to - i)](auto *&from, auto *space) {
        if (from)
          std::memcpy(space, from, n * sizeof *space), from = space;
      };
      Out<what> *const gradient = at.gradient;
      pad(at.student, padded[0]), pad(at.start, padded[1]), pad(at.target, padded[2]), pad(at.weights, weights);
      at.gradient = out;
      step<what, mask>(at, scale, false, sums);
      if (what & gradients)
        std::memcpy(gradient, out, static_cast<size_t>(to - i) * sizeof *out);
    }
    Totals totals{0, 0, 0, double(sum_lanes<Acc>(sums.wrong))};
    for (int part = 0; part < parts; ++part)
      totals.num += sum_lanes<double>(sums.num[part]), totals.D += sum_lanes<double>(sums.D[part]),
          totals.S += sum_lanes<double>(sums.S[part]);
    return totals;
  }

  template <int what, Mask mask> inline void step(const At<what, mask> &at, Acc scale, bool past, Sums &sums) const {
    const vec<Acc> zero{}, target = what != gradients || at.target ? load_wide(at.target) : zero;
    vec<Acc> m = zero;
    decltype(m != m) kept{};
    if constexpr (mask == Mask::boolean) {
      typedef uint8_t bytes __attribute__((vector_size(lanes<Acc>)));
      bytes b;
      std::memcpy(&b, at.weights, sizeof b);
      kept = __builtin_convertvector(b, decltype(kept)) != 0;
    } else if constexpr (mask == Mask::real) {
      m = load(at.weights);
      kept = m != 0;
    }
    const auto keep = [&](vec<Acc> v) { return mask == Mask::none ? v : kept ? v : zero; };
    const auto add_squares = [&](vec<Acc> v, vec<double> *sum) {
      add_part<0, mask>(v, m, sum);
      if constexpr (parts == 2)
        add_part<1, mask>(v, m, sum);
    };
    if constexpr (what & start_sums) {
      const vec<Acc> start = load_wide(at.start);
      add_squares(keep(start - target), sums.D);
      add_squares(keep(start), sums.S);
      if constexpr (mask == Mask::real)
        sums.wrong += m >= 0 ? zero : splat<Acc>(1);
    }
    if constexpr (what & (student_sums | gradients)) {
      const vec<Acc> away = keep(load_wide(at.student) - target);
      if constexpr (what & student_sums)
        add_squares(away, sums.num);
      if constexpr (what & gradients) {
        const vec<Acc> g = away * power * scale;
        const auto out = narrow(Out<what>{}, mask == Mask::real ? g * m : g);
        if (past)
          stream(at.gradient, out);
        else
          std::memcpy(at.gradient, &out, sizeof out);
      }
    }
  }

  template <int part, Mask mask> static inline void add_part(vec<Acc> v, vec<Acc> m, vec<double> *sum) {
    const vec<double> x = as_doubles<part>(v);
    sum[part] += mask == Mask::real ? as_doubles<part>(m) * (x * x) : x * x;
  }

  const TrajectoryMatch &s;
  int64_t tasks = 0;
  bool past_caches = false;
  Acc power = 1;
  double rest = 1;
  Place *places = nullptr;
  Totals *partials = nullptr;
};

} // namespace

void trajectory_match(const TrajectoryMatch &args) { run_kernel<Kernel>(args); }

} // namespace gg::GG_ISA
