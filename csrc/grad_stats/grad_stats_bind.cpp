#include "core/isa.h"
#include "core/run_on_cpu.h"
#include "grad_stats/grad_stats.h"

#include <optional>
#if defined(GG_CUDA_grad_stats)
#include "core/cuda_workspace.h"
#endif

GG_PER_ISA(grad_stats, GradStats)

namespace gg {
namespace {

// Everything the kernel relies on for memory safety; the front door has already said it more kindly.
struct Call {
  View a, b;
  std::optional<View> D, weight_grad, norms2, dots;
  GradStats args{};

  Call(py::handle a_, py::handle b_, py::handle D_, py::handle weight_grad_, py::handle norms2_, py::handle dots_,
       bool accumulate)
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

  // In multiply-adds, for run_on_cpu.
  double work() const { return (args.tokens + 1.0 + args.directions) * args.samples * args.d * args.p; }
};

} // namespace

void bind_grad_stats(py::module_ &cpu, [[maybe_unused]] py::module_ &cuda) {
  cpu.def("grad_stats", [](py::handle a, py::handle b, py::handle D, py::handle weight_grad, py::handle norms2,
                           py::handle dots, bool accumulate) {
    Call call(a, b, D, weight_grad, norms2, dots, accumulate);
    expect(call.a.device.type == dlpack::cpu, "a", "CPU memory", call.a);
    run_on_cpu(call.work(), [&] { grad_stats_cpu(call.args); });
  });
#if defined(GG_CUDA_grad_stats)
  cuda.def("grad_stats", [](py::handle a, py::handle b, py::handle D, py::handle weight_grad, py::handle norms2,
                            py::handle dots, bool accumulate, py::handle workspace) {
    Call call(a, b, D, weight_grad, norms2, dots, accumulate);
    refuse_float64(call.args.dtype);
    run_on_device("grad_stats", a, call.a, workspace, grad_stats_cuda_workspace(call.args),
                  [&](void *scratch, void *stream) { return grad_stats_cuda(call.args, scratch, stream); });
  });
  cuda.def("grad_stats_workspace", [](py::handle a, py::handle b, py::handle D, py::handle weight_grad,
                                      py::handle norms2, py::handle dots, bool accumulate) {
    Call call(a, b, D, weight_grad, norms2, dots, accumulate);
    refuse_float64(call.args.dtype);
    return grad_stats_cuda_workspace(call.args);
  });
#endif
}

} // namespace gg
