#include "adam_dots/adam_dots.h"
#include "core/bind.h"

namespace gg {
namespace {

// Everything the kernel relies on for memory safety; the front door has already said it more kindly.
struct Call {
  static constexpr const char *op = "adam_dots";
  static constexpr size_t arrays = 7;
  using Options = std::tuple<double, double, double, double, double, double>;
  static constexpr bool only_half_types = true;
  static bool per_sample(size_t argument, int) { return argument < 3 || argument == 6; }

  View a, b, clip, m, v, D, out;
  AdamDots args{};

  const View &place() const { return a; }

  Call(Given a_, Given b_, Given clip_, Given m_, Given v_, Given D_, Given out_, double eta, double beta1,
       double beta2, double eps, double bc1, double bc2)
      : a("a", a_), b("b", b_), clip("clip", clip_), m("m", m_), v("v", v_), D("directions", D_), out("out", out_) {
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

    expect(clip.ndim == 1 && clip.shape[0] == args.samples && clip.contiguous() && clip.dtype == sums, "clip",
           "contiguous (B,) in the dtype of the sums", clip);
    args.clip = clip.data;
    for (const auto &[name, moment] : {std::pair<const char *, const View &>{"m", m}, {"v", v}}) {
      expect(moment.ndim == 2 && moment.shape[0] == args.p && moment.shape[1] == args.d && moment.unit_inner_stride(),
             name, "(p, d) with inner stride 1", moment);
      expect(moment.dtype == m.dtype && (m.dtype == sums || m.dtype == a.dtype), name,
             "the dtype of a, or of the sums, the same for m and v", moment);
    }
    args.moment_dtype = m.dtype;
    args.m = m.data, args.m_row = m.stride[0], args.v = v.data, args.v_row = v.stride[0];
    expect(D.ndim == 3 && D.shape[1] == args.p && D.shape[2] == args.d && D.unit_inner_stride(), "directions",
           "(R, p, d) with inner stride 1", D);
    expect(D.dtype == sums || D.dtype == a.dtype, "directions", "the dtype of a, or of the sums", D);
    args.direction_dtype = D.dtype;
    args.directions = D.shape[0], args.D = D.data, args.D_direction = D.stride[0], args.D_row = D.stride[1];
    args.eta = eta, args.beta1 = beta1, args.beta2 = beta2, args.eps = eps, args.bc1 = bc1, args.bc2 = bc2;
    expect_dots("out", out, sums, args.samples, args.directions);
    args.out = out.data;
    expect_one_device("adam_dots", a, {&b, &clip, &m, &v, &D, &out});
  }
};

} // namespace

void bind_adam_dots(py::module_ &cpu, [[maybe_unused]] py::module_ &cuda) {
  Room<Call>::bind_cpu<adam_dots_cpu>(cpu);
#if defined(GG_CUDA_adam_dots)
  Room<Call>::bind_cuda<adam_dots_cuda, adam_dots_cuda_workspace>(cuda);
#endif
}

} // namespace gg
