#include "core/bind.h"
#include "grad_gram/grad_gram.h"

#include <optional>

namespace gg {
namespace {

GradGram::Side side_of(const View &a, const View &b) {
  return {a.shape[0], a.shape[1], a.data, a.stride[0], a.stride[1], b.data, b.stride[0], b.stride[1]};
}

// Everything the kernel relies on for memory safety; the front door has already said it more kindly.
struct Call {
  static constexpr const char *op = "grad_gram";
  static constexpr size_t arrays = 5;
  using Options = std::tuple<>;
  static constexpr bool only_half_types = true;
  static bool per_sample(size_t argument, int axes) { return argument < 2 || (argument == 4 && axes == 1); }

  View a, b;
  std::optional<View> a2, b2;
  View out;
  GradGram args{};

  const View &place() const { return a; }

  Call(Given a_, Given b_, Given a2_, Given b2_, Given out_) : a("a", a_), b("b", b_), out("out", out_) {
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
};

} // namespace

void bind_grad_gram(py::module_ &cpu, [[maybe_unused]] py::module_ &cuda) {
  Room<Call>::bind_cpu<grad_gram_cpu>(cpu);
#if defined(GG_CUDA_grad_gram)
  Room<Call>::bind_cuda<grad_gram_cuda, grad_gram_cuda_workspace>(cuda);
#endif
}

} // namespace gg
