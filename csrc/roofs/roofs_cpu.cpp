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

// The compiler must not know it: a chain that it sees to stand still, such as 1 * 0.999 + 0.001, is not computed.
volatile float factor = 0.5f;

// The fastest multiply-add that this build uses for products of T.
template <class T> struct Chain {
  static constexpr double flops = 2 * lanes<T>;
  vec<T> by = splat(T(factor));
  void step(vec<T> &x) const { x = x * by + by; }
};
template <> struct Chain<f16> : Chain<float> {};
#if defined(__AVX512BF16__)
template <> struct Chain<bf16> {
  static constexpr double flops = 4 * lanes<float>;
  vec<float> by = splat(float(factor)); // the upper half of each lane is a bfloat16, the lower one 0
  void step(vec<float> &x) const { x = (vec<float>)_mm512_dpbf16_ps((__m512)x, (__m512bh)by, (__m512bh)by); }
};
#else
template <> struct Chain<bf16> : Chain<float> {};
#endif

template <class T> [[gnu::noinline]] float multiply_add_chains() {
  const Chain<T> chain;
  vec<typename accumulator<T>::type> x[chains]; // all different, or they would be computed once
#pragma GCC unroll 16
  for (int i = 0; i < chains; ++i)
    x[i] = splat(typename accumulator<T>::type(i));
  for (int64_t round = 0; round < fma_rounds; ++round)
#pragma GCC unroll 16
    for (int i = 0; i < chains; ++i)
      chain.step(x[i]);
#pragma GCC unroll 16
  for (int i = 1; i < chains; ++i)
    x[0] += x[i];
  return float(x[0][0]);
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
  *r.flops = median_rate(r.seconds, double(threads) * double(fma_rounds) * chains * Chain<T>::flops,
                         [&] { parallel_for(threads, [](int64_t) { sink = multiply_add_chains<T>(); }); });

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

void roofs(const Roofs &args) {
  switch (args.dtype) {
  case DType::f64: return measure<double>(args);
  case DType::bf16: return measure<bf16>(args);
  case DType::f16: return measure<f16>(args);
  default: return measure<float>(args);
  }
}

} // namespace gg::GG_ISA
