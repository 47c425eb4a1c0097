#include "core/c_border.h"
#include "core/isa.h"
#include "grad_gram/grad_gram.h"

GG_PER_ISA(grad_gram, GradGram)

namespace gg {
namespace {

struct Call {
  GradGram args{};

  explicit Call(const ghostgram_grad_gram_args &x) {
    const DType dtype = floating("dtype", x.dtype), sums = sums_of(dtype);
    args.dtype = dtype;
    expect_flag("diagonal", x.diagonal);
    expect_sizes({{"d", x.d}, {"p", x.p}});
    if (x.diagonal && x.right)
      refuse("right", "NULL where diagonal", "an address");
    args.d = x.d, args.p = x.p, args.diagonal = x.diagonal, args.symmetric = !x.right;
    args.left = args.right = side(x, x.left, dtype, "left.a", "left.b");
    if (x.right)
      args.right = side(x, *x.right, dtype, "right.a", "right.b");
    if (x.diagonal) {
      expect_array("out", x.out, sums, {x.left.samples});
    } else {
      expect_array("out", x.out, sums, {args.left.samples, args.right.samples});
      expect_rows("out_row", x.out_row, args.left.samples, args.right.samples);
    }
    args.out = x.out, args.out_row = x.out_row;
  }

  void check_on_cpu() const {}
  void check_on_cuda() const { expect_float32(args.dtype); }

private:
  static GradGram::Side side(const ghostgram_grad_gram_args &x, const ghostgram_grad_gram_side &s, DType dtype,
                             const char *a, const char *b) {
    expect_sizes({{"samples", s.samples}, {"tokens", s.tokens}});
    expect_array(a, s.a, dtype, {s.samples, s.tokens, x.d});
    expect_array(b, s.b, dtype, {s.samples, s.tokens, x.p});
    return {s.samples, s.tokens, s.a, s.a_sample, s.a_token, s.b, s.b_sample, s.b_token};
  }
};

} // namespace
} // namespace gg

GG_C_DOORS(grad_gram)
#if defined(GG_CUDA_grad_gram)
GG_CUDA_DOORS(grad_gram)
#else
GG_NO_CUDA_DOORS(grad_gram)
#endif
