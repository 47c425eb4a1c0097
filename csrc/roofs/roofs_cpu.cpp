#include "core/parallel.h"
#include "core/simd.h"
#include "roofs/roofs.h"
#include <time.h>

namespace gg::GG_ISA {
namespace {

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return double(t.tv_sec) + 1e-9 * double(t.tv_nsec);
}

// Ten chains cover the latency of any current FMA pipe (4 cycles, 2 ports) and fit 16 registers.
constexpr int chains = 10;
constexpr int64_t fma_rounds = 1 << 22; // some 6 ms: shorter runs meet clock rates that do not last

template <class T> T fma_chains() {
  vec<T> x[chains];
#pragma GCC unroll 16
  for (int i = 0; i < chains; ++i)
    x[i] = splat(T(i));
  const vec<T> m = splat(T(0.999)), c = splat(T(1e-3));
  for (int64_t round = 0; round < fma_rounds; ++round) {
#pragma GCC unroll 16
    for (int i = 0; i < chains; ++i)
      x[i] = x[i] * m + c;
  }
  vec<T> sum = x[0];
#pragma GCC unroll 16
  for (int i = 1; i < chains; ++i)
    sum += x[i];
  return sum_lanes<T>(sum);
}

// Reads a stretch with four independent sums; returns something the compiler cannot know.
float read_stretch(const float *p, int64_t n) {
  vec<float> sum[4] = {};
  for (int64_t i = 0; i + 4 * lanes<float> <= n; i += 4 * lanes<float>)
    for (int k = 0; k < 4; ++k)
      sum[k] += load(p + i + k * lanes<float>);
  return sum_lanes<float>(sum[0] + sum[1] + sum[2] + sum[3]);
}

void add_stretch(const float *x, const float *y, float *to, int64_t n) {
  for (int64_t i = 0; i + lanes<float> <= n; i += lanes<float>)
    stream(to + i, load(x + i) + load(y + i));
  finish_streams();
}

volatile float sink;

// The median rate of `work` (which does `amount` per call) over at least `seconds`: the best would be a clock rate that
// does not last, or a hiccup of the clock.
template <class Work> double median_rate(double seconds, double amount, Work &&work) {
  work(); // wakes the workers and touches the memory
  constexpr int most_repeats = 999;
  double rates[most_repeats]; // kept sorted
  int repeats = 0;
  for (double start = now(), t = start; repeats < most_repeats && (t - start < seconds || repeats < 3);) {
    const double before = now();
    work();
    t = now();
    int at = repeats++;
    for (; at > 0 && rates[at - 1] > amount / (t - before); --at)
      rates[at] = rates[at - 1];
    rates[at] = amount / (t - before);
  }
  return rates[repeats / 2];
}

template <class T> void measure(const Roofs &r) {
  const int threads = num_threads();
  *r.flops = median_rate(r.seconds, double(threads) * double(fma_rounds) * chains * lanes<T> * 2,
                         [&] { parallel_for(threads, [](int64_t) { sink = float(fma_chains<T>()); }); });

  constexpr int64_t stretch = 1 << 16;
  const int64_t n = r.bytes / int64_t(sizeof(float)) / (2 * stretch) * 2;
  *r.read = median_rate(r.seconds, double(n * stretch) * sizeof(float), [&] {
    parallel_for(n, [&](int64_t i) { sink = read_stretch(r.memory + i * stretch, stretch); });
  });
  *r.copy = median_rate(r.seconds, double(n * stretch) * sizeof(float), [&] {
    parallel_for(n / 2, [&](int64_t i) {
      std::memcpy(r.memory + (n / 2 + i) * stretch, r.memory + i * stretch, stretch * sizeof(float));
    });
  });
  const int64_t third = n / 3;
  *r.triad = median_rate(r.seconds, double(3 * third * stretch) * sizeof(float), [&] {
    parallel_for(third, [&](int64_t i) {
      const float *x = r.memory + i * stretch;
      add_stretch(x, x + third * stretch, r.memory + (2 * third + i) * stretch, stretch);
    });
  });
}

} // namespace

void roofs(const Roofs &args) { args.dtype == DType::f64 ? measure<double>(args) : measure<float>(args); }

} // namespace gg::GG_ISA
