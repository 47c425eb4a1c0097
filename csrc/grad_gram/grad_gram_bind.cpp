#include "core/isa.h"
#include "core/run_on_cpu.h"
#include "grad_gram/grad_gram.h"

#include <optional>
#if defined(GG_CUDA_grad_gram)
#include "core/cuda_workspace.h"
#endif

GG_PER_ISA(grad_gram, GradGram)

namespace gg {
namespace {

GradGram::Side side_of(const View &a, const View &b) {
  return {a.shape[0], a.shape[1], a.data, a.stride[0], a.stride[1], b.data, b.stride[0], b.stride[1]};
}

// Everything the kernel relies on for memory safety; the front door has already said it more kindly.
struct Call {
  View a, b;
  std::optional<View> a2, b2;
  View out;
  GradGram args{};

  Call(py::handle a_, py::handle b_, py::handle a2_, py::handle b2_, py::handle out_)
      : a("a", a_), b("b", b_), out("out", out_) {
    expect(a.ndim == 3 && a.unit_inner_stride(), "a", "(B, T, d) with inner stride 1", a);
    expect(b.ndim == 3 && b.unit_inner_stride(), "b", "(B, T, p) with inner stride 1", b);
    expect(b.shape[0] == a.shape[0] && b.shape[1] == a.shape[1], "b", "the samples and tokens of a", b);
    expect(a.dtype < DType::i32, "a", "a floating dtype", a);
    args.dtype = a.dtype, args.d = a.shape[2], args.p = b.shape[2];
    args.left = args.right = side_of(a, b);
    args.symmetric = a2_.is_none();
    if (!args.symmetric) {
      a2.emplace("a2", a2_);
      b2.emplace("b2", b2_);
      expect(a2->ndim == 3 && a2->unit_inner_stride() && a2->shape[2] == args.d, "a2",
             "(B2, T2, d) with inner stride 1", *a2);
      expect(b2->ndim == 3 && b2->unit_inner_stride() && b2->shape[2] == args.p, "b2",
             "(B2, T2, p) with inner stride 1", *b2);
      expect(b2->shape[0] == a2->shape[0] && b2->shape[1] == a2->shape[1], "b2", "the samples and tokens of a2", *b2);
      args.right = side_of(*a2, *b2);
    }
    args.diagonal = args.symmetric && out.ndim == 1;
    const DType sums = a.dtype == DType::f64 ? DType::f64 : DType::f32;
    if (args.diagonal)
      expect_output("out", out, sums, {args.left.samples});
    else
      expect_output("out", out, sums, {args.left.samples, args.right.samples});
    args.out = out.data, args.out_row = out.stride[0];
    for (const View *v : {&a, &b, a2 ? &*a2 : nullptr, b2 ? &*b2 : nullptr})
      if (v)
        expect(v->dtype == a.dtype && v->device.type == out.device.type && v->device.index == out.device.index,
               "grad_gram", "inputs of one dtype, and all arrays on one device", *v);
  }

  // In multiply-adds, for run_on_cpu.
  double work() const {
    const double pairs = double(args.left.samples) * (args.diagonal ? 1 : args.right.samples);
    return pairs * args.left.tokens * args.right.tokens * (args.d + args.p);
  }
};

} // namespace

void bind_grad_gram(py::module_ &cpu, [[maybe_unused]] py::module_ &cuda) {
  cpu.def("grad_gram", [](py::handle a, py::handle b, py::handle a2, py::handle b2, py::handle out) {
    Call call(a, b, a2, b2, out);
    expect(call.a.device.type == dlpack::cpu, "a", "CPU memory", call.a);
    run_on_cpu(call.work(), [&] { grad_gram_cpu(call.args); });
  });
#if defined(GG_CUDA_grad_gram)
  cuda.def("grad_gram",
           [](py::handle a, py::handle b, py::handle a2, py::handle b2, py::handle out, py::handle workspace) {
             Call call(a, b, a2, b2, out);
             refuse_float64(call.args.dtype);
             run_on_device("grad_gram", a, call.a, workspace, grad_gram_cuda_workspace(call.args),
                           [&](void *scratch, void *stream) { return grad_gram_cuda(call.args, scratch, stream); });
           });
  cuda.def("grad_gram_workspace", [](py::handle a, py::handle b, py::handle a2, py::handle b2, py::handle out) {
    Call call(a, b, a2, b2, out);
    refuse_float64(call.args.dtype);
    return grad_gram_cuda_workspace(call.args);
  });
#endif
}

} // namespace gg
