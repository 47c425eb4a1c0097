#include "core/bind.h"
#include "grad_stats/grad_stats.h"

#include <optional>

namespace gg {
namespace {

// Everything the kernel relies on for memory safety; the front door has already said it more kindly.
struct Call {
  static constexpr const char *op = "grad_stats";
  static constexpr size_t arrays = 6;
  using Options = std::tuple<bool>;
  static constexpr bool only_half_types = true;
  static bool per_sample(size_t argument, int) { return argument < 2 || argument > 3; }

  View a, b;
  std::optional<View> D, weight_grad, norms2, dots;
  GradStats args{};

  const View &place() const { return a; }

  Call(Given a_, Given b_, Given D_, Given weight_grad_, Given norms2_, Given dots_, bool accumulate)
      : a("a", a_), b("b", b_) {
    expect(a.ndim == 3 && a.unit_inner_stride(), "a", "(B, T, d) with inner stride 1", a);
    expect(b.ndim == 3 && b.unit_inner_stride(), "b", "(B, T, p) with inner stride 1", b);
    expect(b.shape[0] == a.shape[0] && b.shape[1] == a.shape[1], "b", "the samples and tokens of a", b);
    expect(a.dtype < DType::i32, "a", "a floating dtype", a);
    expect(b.dtype == a.dtype, "b", "the dtype of a", b);
    const DType sums = a.dtype == DType::f64 ? DType::f64 : DType::f32;
    args.dtype = a.dtype;
    args.samples = a.shape[0], args.tokens = a.shape[1], args.d = a.shape[2], args.p = b.shape[2];
    args.a = a.data, args.a_sample = a.stride[0], args.a_token = a.stride[1];
    args.b = b.data, args.b_sample = b.stride[0], args.b_token = b.stride[1];
    args.accumulate = accumulate;
    if (!D_.is_none()) {
      D.emplace("D", D_);
      expect(D->ndim == 3 && D->shape[1] == args.p && D->shape[2] == args.d, "D", "(K, p, d)", *D);
      expect(D->unit_inner_stride(), "D", "inner stride 1", *D);
      expect(D->dtype == sums || D->dtype == a.dtype, "D", "the dtype of a, or of its sums", *D);
      args.direction_dtype = D->dtype;
      args.directions = D->shape[0];
      args.D = D->data, args.D_direction = D->stride[0], args.D_row = D->stride[1];
    }
    if (!weight_grad_.is_none()) {
      weight_grad.emplace("weight_grad", weight_grad_);
      expect_output("weight_grad", *weight_grad, sums, {args.p, args.d});
      args.weight_grad = weight_grad->data, args.weight_grad_row = weight_grad->stride[0];
    }
    if (!norms2_.is_none()) {
      norms2.emplace("norms2", norms2_);
      expect_output("norms2", *norms2, sums, {args.samples});
      args.norms2 = norms2->data;
    }
    if (args.directions) {
      dots.emplace("dots", dots_);
      expect_dots("dots", *dots, sums, args.samples, args.directions);
      args.dots = dots->data;
    }
    expect_one_device("grad_stats", a,
                      {&b, D ? &*D : nullptr, weight_grad ? &*weight_grad : nullptr, norms2 ? &*norms2 : nullptr,
                       dots ? &*dots : nullptr});
  }
};

} // namespace

void bind_grad_stats(py::module_ &cpu, [[maybe_unused]] py::module_ &cuda) {
  Room<Call>::bind_cpu<grad_stats_cpu>(cpu);
#if defined(GG_CUDA_grad_stats)
  Room<Call>::bind_cuda<grad_stats_cuda, grad_stats_cuda_workspace>(cuda);
#endif
}

} // namespace gg
