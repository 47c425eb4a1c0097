#include "core/c_border.h"
#include "core/isa.h"
#include "grad_project/grad_project.h"

GG_PER_ISA(grad_project, GradProject)

namespace gg {
namespace {

static_assert(static_cast<int>(GradProject::Kind::sparse) == GHOSTGRAM_SPARSE - GHOSTGRAM_RADEMACHER);

struct Call {
  GradProject args{};

  explicit Call(const ghostgram_grad_project_args &x) {
    const DType dtype = floating("dtype", x.dtype), sums = sums_of(dtype);
    expect(x.kind >= GHOSTGRAM_RADEMACHER && x.kind <= GHOSTGRAM_SPARSE, "kind", "RADEMACHER, GAUSSIAN or SPARSE",
           int64_t{x.kind});
    expect_zero("reserved", x.reserved);
    args.dtype = dtype, args.kind = static_cast<GradProject::Kind>(x.kind - GHOSTGRAM_RADEMACHER);
    expect_sizes({{"samples", x.samples}, {"tokens", x.tokens}, {"d", x.d}, {"p", x.p}});
    expect_array("a", x.a, dtype, {x.samples, x.tokens, x.d});
    expect_array("b", x.b, dtype, {x.samples, x.tokens, x.p});
    if (args.kind == GradProject::Kind::sparse) {
      expect(x.buckets >= 1 && x.buckets <= INT32_MAX, "buckets", "from 1 to 2^31 - 1", x.buckets);
      expect(x.nonzeros >= 1 && x.nonzeros <= x.buckets, "nonzeros", "from 1 to buckets", x.nonzeros);
      expect_array("out", x.out, sums, {x.samples, x.buckets});
      args.buckets = x.buckets, args.nonzeros = x.nonzeros;
    } else {
      expect_sizes({{"k_out", x.k_out}, {"k_in", x.k_in}});
      args.P_out = matrix("P_out", "P_out_dtype", x.P_out, x.P_out_dtype, x.P_out_row, dtype, x.k_out, x.p);
      args.P_in = matrix("P_in", "P_in_dtype", x.P_in, x.P_in_dtype, x.P_in_row, dtype, x.k_in, x.d);
      expect_array("out", x.out, sums, {x.samples, x.k_out, x.k_in});
      args.k_out = x.k_out, args.k_in = x.k_in;
    }

    args.samples = x.samples, args.tokens = x.tokens, args.d = x.d, args.p = x.p;
    args.a = x.a, args.a_sample = x.a_sample, args.a_token = x.a_token;
    args.b = x.b, args.b_sample = x.b_sample, args.b_token = x.b_token;
    args.seed = x.seed, args.layer = x.layer, args.out = x.out;
  }

  void check_on_cpu() const {}
  void check_on_cuda() const { expect_float32(args.dtype); }

private:
  static GradProject::Matrix matrix(const char *name, const char *dtype_name, const void *data, ghostgram_dtype dtype,
                                    int64_t row, DType inputs, int64_t k, int64_t features) {
    if (!data)
      return {nullptr, inputs, 0};
    const DType known = either(dtype_name, dtype, inputs, sums_of(inputs));
    expect_array(name, data, known, {k, features});
    return {data, known, row};
  }
};

} // namespace
} // namespace gg

GG_C_DOORS(grad_project)
#if defined(GG_CUDA_grad_project)
GG_CUDA_DOORS(grad_project)
#else
GG_NO_CUDA_DOORS(grad_project)
#endif
