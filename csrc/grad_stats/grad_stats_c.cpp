#include "core/c_border.h"
#include "core/isa.h"
#include "grad_stats/grad_stats.h"

GG_PER_ISA(grad_stats, GradStats)

namespace gg {
namespace {

struct Call {
  GradStats args{};

  explicit Call(const ghostgram_grad_stats_args &x) {
    const DType dtype = floating("dtype", x.dtype), sums = sums_of(dtype);
    args.dtype = dtype;
    expect_flag("accumulate", x.accumulate);
    expect_zero("reserved", x.reserved);
    expect_sizes({{"samples", x.samples}, {"tokens", x.tokens}, {"d", x.d}, {"p", x.p}, {"directions", x.directions}});
    expect_array("a", x.a, dtype, {x.samples, x.tokens, x.d});
    expect_array("b", x.b, dtype, {x.samples, x.tokens, x.p});
    if (x.directions) {
      args.direction_dtype = either("direction_dtype", x.direction_dtype, dtype, sums);
      expect_array("D", x.D, args.direction_dtype, {x.directions, x.p, x.d});
    }
    expect_array("weight_grad", x.weight_grad, sums, {x.p, x.d}, false);
    if (x.weight_grad)
      expect_rows("weight_grad_row", x.weight_grad_row, x.p, x.d);
    expect_array("norms2", x.norms2, sums, {x.samples}, false);
    expect_array("dots", x.dots, sums, {x.samples, x.directions});

    args.samples = x.samples, args.tokens = x.tokens, args.d = x.d, args.p = x.p, args.directions = x.directions;
    args.a = x.a, args.a_sample = x.a_sample, args.a_token = x.a_token;
    args.b = x.b, args.b_sample = x.b_sample, args.b_token = x.b_token;
    args.D = x.D, args.D_direction = x.D_direction, args.D_row = x.D_row;
    args.weight_grad = x.weight_grad, args.weight_grad_row = x.weight_grad_row, args.accumulate = x.accumulate;
    args.norms2 = x.norms2, args.dots = x.dots;
  }

  void check_on_cpu() const {}
  void check_on_cuda() const { expect_float32(args.dtype); }
};

} // namespace
} // namespace gg

GG_C_DOORS(grad_stats)
#if defined(GG_CUDA_grad_stats)
GG_CUDA_DOORS(grad_stats)
#else
GG_NO_CUDA_DOORS(grad_stats)
#endif
