#include "adam_dots/adam_dots.h"
#include "core/c_border.h"
#include "core/isa.h"

#include <cmath>

GG_PER_ISA(adam_dots, AdamDots)

namespace gg {
namespace {

struct Call {
  AdamDots args{};

  explicit Call(const ghostgram_adam_dots_args &x) {
    const DType dtype = floating("dtype", x.dtype), sums = sums_of(dtype);
    args.dtype = dtype;
    args.moment_dtype = either("moment_dtype", x.moment_dtype, dtype, sums);
    args.direction_dtype = either("direction_dtype", x.direction_dtype, dtype, sums);
    expect_zero("reserved", x.reserved);
    expect_sizes({{"samples", x.samples}, {"tokens", x.tokens}, {"d", x.d}, {"p", x.p}, {"directions", x.directions}});
    expect_array("a", x.a, dtype, {x.samples, x.tokens, x.d});
    expect_array("b", x.b, dtype, {x.samples, x.tokens, x.p});
    expect_array("clip", x.clip, sums, {x.samples});
    expect_array("m", x.m, args.moment_dtype, {x.p, x.d});
    expect_array("v", x.v, args.moment_dtype, {x.p, x.d});
    expect_array("D", x.D, args.direction_dtype, {x.directions, x.p, x.d});
    expect_array("out", x.out, sums, {x.samples, x.directions});
    expect(std::isfinite(x.eta), "eta", "a finite number", x.eta);
    expect(x.beta1 >= 0 && x.beta1 < 1, "beta1", "0 <= beta1 < 1", x.beta1);
    expect(x.beta2 >= 0 && x.beta2 < 1, "beta2", "0 <= beta2 < 1", x.beta2);
    expect(x.eps > 0 && x.eps <= 1, "eps", "0 < eps <= 1", x.eps);
    expect(x.bc1 > 0 && x.bc1 <= 1, "bc1", "0 < bc1 <= 1", x.bc1);
    expect(x.bc2 > 0 && x.bc2 <= 1, "bc2", "0 < bc2 <= 1", x.bc2);

    args.samples = x.samples, args.tokens = x.tokens, args.d = x.d, args.p = x.p, args.directions = x.directions;
    args.a = x.a, args.a_sample = x.a_sample, args.a_token = x.a_token;
    args.b = x.b, args.b_sample = x.b_sample, args.b_token = x.b_token;
    args.clip = x.clip, args.m = x.m, args.m_row = x.m_row, args.v = x.v, args.v_row = x.v_row;
    args.D = x.D, args.D_direction = x.D_direction, args.D_row = x.D_row;
    args.eta = x.eta, args.beta1 = x.beta1, args.beta2 = x.beta2, args.eps = x.eps, args.bc1 = x.bc1, args.bc2 = x.bc2;
    args.out = x.out;
  }

  void check_on_cpu() const {}
  void check_on_cuda() const { expect_float32(args.dtype); }
};

} // namespace
} // namespace gg

GG_C_DOORS(adam_dots)
#if defined(GG_CUDA_adam_dots)
GG_CUDA_DOORS(adam_dots)
#else
GG_NO_CUDA_DOORS(adam_dots)
#endif
