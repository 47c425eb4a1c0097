#include "affine_stats/affine_stats.h"
#include "core/c_border.h"
#include "core/isa.h"

GG_PER_ISA(affine_stats, AffineStats)

namespace gg {
namespace {

struct Call {
  AffineStats args{};

  explicit Call(const ghostgram_affine_stats_args &x) {
    const DType dtype = floating("dtype", x.dtype), sums = sums_of(dtype);
    args.dtype = dtype;
    expect_flag("channels_first", x.channels_first);
    expect_sizes({{"samples", x.samples}, {"tokens", x.tokens}, {"features", x.features}});
    expect_array("b", x.b, dtype, {x.samples, x.tokens, x.features});
    const bool scaled = x.weight.grad || x.weight.norms2 || x.weight.directions;
    expect_array("x", x.x, dtype, {x.samples, x.tokens, x.features}, scaled);
    const bool grouped = x.channels_first && (x.mean || x.rstd);
    if (grouped)
      expect(x.groups > 0 && x.features % x.groups == 0, "groups", "a divisor of features", x.groups);
    args.features_per_group = most(1, grouped ? x.features / x.groups : x.features);
    const int64_t steps = x.channels_first ? x.groups : x.tokens;
    expect_array("mean", x.mean, sums, {x.samples, steps}, false);
    expect_array("rstd", x.rstd, sums, {x.samples, steps}, false);
    args.weight =
        part(x, x.weight, sums, {"weight.directions", "weight.D", "weight.grad", "weight.norms2", "weight.dots"});
    args.bias = part(x, x.bias, sums, {"bias.directions", "bias.D", "bias.grad", "bias.norms2", "bias.dots"});

    args.channels_first = x.channels_first;
    args.samples = x.samples, args.tokens = x.tokens, args.features = x.features;
    args.b = x.b, args.b_sample = x.b_sample, args.b_row = x.b_row;
    args.x = x.x, args.x_sample = x.x_sample, args.x_row = x.x_row;
    args.mean = x.mean, args.mean_sample = x.mean_sample, args.mean_step = x.mean_step;
    args.rstd = x.rstd, args.rstd_sample = x.rstd_sample, args.rstd_step = x.rstd_step;
  }

  void check_on_cpu() const {}
  void check_on_cuda() const {}

private:
  static AffineStats::Part part(const ghostgram_affine_stats_args &x, const ghostgram_affine_part &given, DType sums,
                                const char *const (&names)[5]) {
    expect_sizes({{names[0], given.directions}});
    expect_array(names[1], given.D, sums, {given.directions, x.features});
    expect_array(names[2], given.grad, sums, {x.features}, false);
    expect_array(names[3], given.norms2, sums, {x.samples}, false);
    expect_array(names[4], given.dots, sums, {x.samples, given.directions});
    return {given.D, given.directions, given.D_direction, given.grad, given.norms2, given.dots};
  }
};

} // namespace
} // namespace gg

GG_C_DOORS(affine_stats)
#if defined(GG_CUDA_affine_stats)
GG_CUDA_DOORS(affine_stats)
#else
GG_NO_CUDA_DOORS(affine_stats)
#endif
