#include "core/bind.h"
#include "grad_project/grad_project.h"

#include <optional>

namespace gg {
namespace {

GradProject::Kind kind_from(const std::string &name) {
  if (name == "rademacher")
    return GradProject::Kind::rademacher;
  if (name == "gaussian")
    return GradProject::Kind::gaussian;
  if (name == "sparse")
    return GradProject::Kind::sparse;
  throw py::value_error("kind: expected rademacher, gaussian or sparse, got " + name);
}

bool contiguous(const View &view) {
  int64_t count = 1;
  bool whole = true;
  for (int i = view.ndim - 1; i >= 0; count *= view.shape[i--])
    whole = whole && (view.stride[i] == count || view.shape[i] <= 1);
  return whole || count == 0;
}

// Everything the kernel relies on for memory safety; the front door has already said it more kindly.
struct Call {
  static constexpr const char *op = "grad_project";
  static constexpr size_t arrays = 5;
  using Options = std::tuple<std::string, int64_t, uint64_t, uint32_t>;
  static constexpr bool only_half_types = true;
  static bool per_sample(size_t argument, int) { return argument < 2 || argument == 4; }

  View a, b;
  std::optional<View> P_out, P_in;
  View out;
  GradProject args{};

  const View &place() const { return a; }

  Call(Given a_, Given b_, Given P_out_, Given P_in_, Given out_, const std::string &kind, int64_t nonzeros,
       uint64_t seed, uint32_t layer)
      : a("a", a_), b("b", b_), out("out", out_) {
    expect(a.ndim == 3 && a.unit_inner_stride(), "a", "(B, T, d) with inner stride 1", a);
    expect(b.ndim == 3 && b.unit_inner_stride(), "b", "(B, T, p) with inner stride 1", b);
    expect(b.shape[0] == a.shape[0] && b.shape[1] == a.shape[1], "b", "the samples and tokens of a", b);
    expect(a.dtype < DType::i32, "a", "a floating dtype", a);
    expect(b.dtype == a.dtype, "b", "the dtype of a", b);
    args.dtype = a.dtype, args.kind = kind_from(kind), args.seed = seed, args.layer = layer;
    args.samples = a.shape[0], args.tokens = a.shape[1], args.d = a.shape[2], args.p = b.shape[2];
    args.a = a.data, args.a_sample = a.stride[0], args.a_token = a.stride[1];
    args.b = b.data, args.b_sample = b.stride[0], args.b_token = b.stride[1];
    args.out = out.data;
    const DType sums = a.dtype == DType::f64 ? DType::f64 : DType::f32;
    const bool sparse = args.kind == GradProject::Kind::sparse;
    expect(out.ndim == (sparse ? 2 : 3), "out", sparse ? "(B, k)" : "(B, k_out, k_in)", out);
    if (sparse) {
      args.buckets = out.shape[1], args.nonzeros = nonzeros;
      expect(1 <= nonzeros && nonzeros <= args.buckets && args.buckets <= INT32_MAX, "out",
             "nonzeros from 1 to the number of buckets, and fewer than 2^31 of these", out);
      expect_output("out", out, sums, {args.samples, args.buckets});
    } else {
      args.k_out = out.shape[1], args.k_in = out.shape[2];
      expect_output("out", out, sums, {args.samples, args.k_out, args.k_in});
      take(P_out, "P_out", P_out_, args.k_out, args.p, args.P_out);
      take(P_in, "P_in", P_in_, args.k_in, args.d, args.P_in);
    }
    expect(contiguous(out), "out", "C-contiguous", out);
    expect_one_device("grad_project", a, {&b, P_out ? &*P_out : nullptr, P_in ? &*P_in : nullptr, &out});
  }

  void take(std::optional<View> &view, const char *name, Given object, int64_t k, int64_t n,
            GradProject::Matrix &matrix) {
    if (object.is_none())
      return;
    view.emplace(name, object);
    expect(view->ndim == 2 && view->shape[0] == k && view->shape[1] == n && view->unit_inner_stride(), name,
           "(k, features) like out and its side of the layer, with inner stride 1", *view);
    expect(view->dtype == args.dtype || view->dtype == (args.dtype == DType::f64 ? DType::f64 : DType::f32), name,
           "the dtype of a, or of its sums", *view);
    matrix = {view->data, view->dtype, view->stride[0]};
  }
};

} // namespace

void bind_grad_project(py::module_ &cpu, [[maybe_unused]] py::module_ &cuda) {
  Room<Call>::bind_cpu<grad_project_cpu>(cpu);
#if defined(GG_CUDA_grad_project)
  Room<Call>::bind_cuda<grad_project_cuda, grad_project_cuda_workspace>(cuda);
#endif
}

} // namespace gg
