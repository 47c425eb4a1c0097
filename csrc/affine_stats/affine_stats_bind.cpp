#include "affine_stats/affine_stats.h"
#include "core/isa.h"
#include "core/run_on_cpu.h"

#include <optional>
#if defined(GG_CUDA_affine_stats)
#include "core/cuda_workspace.h"
#endif

GG_PER_ISA(affine_stats, AffineStats)

namespace gg {
namespace {

// Everything the kernel relies on for memory safety; the front door has already said it more kindly.
struct Call {
  View b;
  std::optional<View> x, mean, rstd, D_weight, D_bias, weight_grad, bias_grad, weight_norms2, bias_norms2, weight_dots,
      bias_dots;
  AffineStats args{};

  Call(py::handle b_, py::handle x_, py::handle mean_, py::handle rstd_, py::handle D_weight_, py::handle D_bias_,
       py::handle weight_grad_, py::handle bias_grad_, py::handle weight_norms2_, py::handle bias_norms2_,
       py::handle weight_dots_, py::handle bias_dots_, bool channels_first)
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

  // In multiply-adds, for run_on_cpu.
  double work() const {
    return (2.0 * args.tokens + args.weight.directions + args.bias.directions + 2) * args.samples * args.features;
  }

private:
  DType sums;

  void statistic(const char *name, py::handle object, std::optional<View> &view, const void *&data, int64_t &sample,
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

  void part(Names names, py::handle D_, std::optional<View> &D, py::handle grad_, std::optional<View> &grad,
            py::handle norms2_, std::optional<View> &norms2, py::handle dots_, std::optional<View> &dots,
            AffineStats::Part &out) {
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
  cpu.def("affine_stats",
          [](py::handle b, py::handle x, py::handle mean, py::handle rstd, py::handle D_weight, py::handle D_bias,
             py::handle weight_grad, py::handle bias_grad, py::handle weight_norms2, py::handle bias_norms2,
             py::handle weight_dots, py::handle bias_dots, bool channels_first) {
            Call call(b, x, mean, rstd, D_weight, D_bias, weight_grad, bias_grad, weight_norms2, bias_norms2,
                      weight_dots, bias_dots, channels_first);
            expect(call.b.device.type == dlpack::cpu, "b", "CPU memory", call.b);
            run_on_cpu(call.work(), [&] { affine_stats_cpu(call.args); });
          });
#if defined(GG_CUDA_affine_stats)
  cuda.def("affine_stats",
           [](py::handle b, py::handle x, py::handle mean, py::handle rstd, py::handle D_weight, py::handle D_bias,
              py::handle weight_grad, py::handle bias_grad, py::handle weight_norms2, py::handle bias_norms2,
              py::handle weight_dots, py::handle bias_dots, bool channels_first, py::handle workspace) {
             Call call(b, x, mean, rstd, D_weight, D_bias, weight_grad, bias_grad, weight_norms2, bias_norms2,
                       weight_dots, bias_dots, channels_first);
             run_on_device("affine_stats", b, call.b, workspace, affine_stats_cuda_workspace(call.args),
                           [&](void *scratch, void *stream) { return affine_stats_cuda(call.args, scratch, stream); });
           });
  cuda.def("affine_stats_workspace",
           [](py::handle b, py::handle x, py::handle mean, py::handle rstd, py::handle D_weight, py::handle D_bias,
              py::handle weight_grad, py::handle bias_grad, py::handle weight_norms2, py::handle bias_norms2,
              py::handle weight_dots, py::handle bias_dots, bool channels_first) {
             return affine_stats_cuda_workspace(Call(b, x, mean, rstd, D_weight, D_bias, weight_grad, bias_grad,
                                                     weight_norms2, bias_norms2, weight_dots, bias_dots, channels_first)
                                                    .args);
           });
#endif
}

} // namespace gg
