#include "affine_stats/affine_stats.h"
#include "core/bind.h"

#include <optional>

namespace gg {
namespace {

// Everything the kernel relies on for memory safety; the front door has already said it more kindly.
struct Call {
  static constexpr const char *op = "affine_stats";
  static constexpr size_t arrays = 12;
  using Options = std::tuple<bool>;

  View b;
  std::optional<View> x, mean, rstd, D_weight, D_bias, weight_grad, bias_grad, weight_norms2, bias_norms2, weight_dots,
      bias_dots;
  AffineStats args{};

  const View &place() const { return b; }

  Call(Given b_, Given x_, Given mean_, Given rstd_, Given D_weight_, Given D_bias_, Given weight_grad_,
       Given bias_grad_, Given weight_norms2_, Given bias_norms2_, Given weight_dots_, Given bias_dots_,
       bool channels_first)
      : b("b", b_) {
    expect(b.ndim == 3 && b.unit_inner_stride() && b.dtype < DType::i32, "b",
           "a floating (B, T, F), or (B, F, T) with channels first, with inner stride 1", b);
    args.dtype = b.dtype, sums = b.dtype == DType::f64 ? DType::f64 : DType::f32;
    args.channels_first = channels_first, args.samples = b.shape[0];
    args.tokens = b.shape[channels_first ? 2 : 1], args.features = b.shape[channels_first ? 1 : 2];
    args.b = b.data, args.b_sample = b.stride[0], args.b_row = b.stride[1];
    if (!x_.is_none()) {
      x.emplace("x", x_);
      expect(x->ndim == 3 && x->shape[0] == b.shape[0] && x->shape[1] == b.shape[1] && x->shape[2] == b.shape[2] &&
                 x->unit_inner_stride() && x->dtype == b.dtype,
             "x", "the shape and dtype of b, with inner stride 1", *x);
      args.x = x->data, args.x_sample = x->stride[0], args.x_row = x->stride[1];
    }
    args.features_per_group = most(1, args.features);
    statistic("mean", mean_, mean, args.mean, args.mean_sample, args.mean_step);
    statistic("rstd", rstd_, rstd, args.rstd, args.rstd_sample, args.rstd_step);
    if (mean && rstd)
      expect(rstd->shape[1] == mean->shape[1], "rstd", "the shape of mean", *rstd);
    if (x) // not args.x: an empty x has no memory, and its sums are zeros
      part({"D_weight", "weight_grad", "weight_norms2", "weight_dots"}, D_weight_, D_weight, weight_grad_, weight_grad,
           weight_norms2_, weight_norms2, weight_dots_, weight_dots, args.weight);
    part({"D_bias", "bias_grad", "bias_norms2", "bias_dots"}, D_bias_, D_bias, bias_grad_, bias_grad, bias_norms2_,
         bias_norms2, bias_dots_, bias_dots, args.bias);
    for (const auto *v : {&x, &mean, &rstd, &D_weight, &D_bias, &weight_grad, &bias_grad, &weight_norms2, &bias_norms2,
                          &weight_dots, &bias_dots})
      if (*v)
        expect_one_device("affine_stats", b, {&**v});
  }

private:
  DType sums;

  void statistic(const char *name, Given object, std::optional<View> &view, const void *&data, int64_t &sample,
                 int64_t &step) {
    if (object.is_none())
      return;
    view.emplace(name, object);
    const bool matrix = view->ndim == 2 && view->shape[0] == args.samples && view->dtype == sums;
    const int64_t columns = matrix ? view->shape[1] : 0;
    if (args.channels_first) {
      expect(columns && args.features % columns == 0, name, "(B, G) in the dtype of the sums, G dividing F", *view);
      args.features_per_group = most(1, args.features / columns);
    } else {
      expect(matrix && columns == args.tokens, name, "(B, T) in the dtype of the sums", *view);
    }
    data = view->data, sample = view->stride[0], step = view->stride[1];
  }

  struct Names {
    const char *D, *grad, *norms2, *dots;
  };

  void part(Names names, Given D_, std::optional<View> &D, Given grad_, std::optional<View> &grad, Given norms2_,
            std::optional<View> &norms2, Given dots_, std::optional<View> &dots, AffineStats::Part &out) {
    if (!grad_.is_none()) {
      grad.emplace(names.grad, grad_);
      expect_output(names.grad, *grad, sums, {args.features});
      out.grad = grad->data;
    }
    if (!norms2_.is_none()) {
      norms2.emplace(names.norms2, norms2_);
      expect_output(names.norms2, *norms2, sums, {args.samples});
      out.norms2 = norms2->data;
    }
    if (D_.is_none())
      return;
    D.emplace(names.D, D_);
    expect(D->ndim == 2 && D->shape[1] == args.features && D->unit_inner_stride() && D->dtype == sums, names.D,
           "(K, F) in the dtype of the sums, with inner stride 1", *D);
    out.D = D->data, out.directions = D->shape[0], out.D_direction = D->stride[0];
    dots.emplace(names.dots, dots_);
    expect_dots(names.dots, *dots, sums, args.samples, out.directions);
    out.dots = dots->data;
  }
};

} // namespace

void bind_affine_stats(py::module_ &cpu, [[maybe_unused]] py::module_ &cuda) {
  Room<Call>::bind_cpu<affine_stats_cpu>(cpu);
#if defined(GG_CUDA_affine_stats)
  Room<Call>::bind_cuda<affine_stats_cuda, affine_stats_cuda_workspace>(cuda);
#endif
}

} // namespace gg
