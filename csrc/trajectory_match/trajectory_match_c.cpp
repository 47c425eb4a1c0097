#include "core/c_border.h"
#include "core/isa.h"
#include "trajectory_match/trajectory_match.h"

#include <algorithm>
#include <vector>

GG_PER_ISA(trajectory_match, TrajectoryMatch)

namespace gg {
namespace {

static_assert(sizeof(ghostgram_trajectory_totals) == sizeof(TrajectoryMatch::Totals));

struct Call {
  TrajectoryMatch args{};

  explicit Call(const ghostgram_trajectory_match_args &x) {
    const DType dtype = floating("dtype", x.dtype), sums = sums_of(dtype);
    args.dtype = dtype;
    expect_flag("measure", x.measure);
    expect_flag("gradient", x.gradient);
    expect_sizes({{"first", x.first}, {"count", x.count}});
    if (x.count)
      expect_not_null("tensors", x.tensors);
    const bool masked = std::any_of(x.tensors, x.tensors + x.count, [](const auto &t) { return t.mask; });
    const DType mask_dtype = masked ? either("mask_dtype", x.mask_dtype, DType::boolean, sums) : DType::boolean;
    args.bool_mask = masked && mask_dtype == DType::boolean;
    for (int64_t i = 0; i < x.count; ++i) {
      const ghostgram_trajectory_tensor &t = x.tensors[i];
      expect_sizes({{"tensors[].size", t.size}});
      expect_array("tensors[].student", t.student, dtype, {t.size});
      expect_array("tensors[].start", t.start, dtype, {t.size}, x.measure);
      expect_array("tensors[].target", t.target, dtype, {t.size}, x.measure);
      if (t.size && masked && !t.mask)
        refuse("tensors[].mask", "one for all tensors or for none", "NULL");
      expect_array("tensors[].mask", t.mask, mask_dtype, {t.size}, false);
      expect_array("tensors[].gradient", t.gradient, x.measure ? sums : dtype, {t.size}, x.gradient);
      tensors.push_back({t.size, t.weight, t.student, x.measure ? t.start : nullptr, t.target, t.mask, t.gradient});
    }
    expect_array("loss_gradient", x.loss_gradient, sums, {1}, false);
    expect_array("loss", x.loss, sums, {1}, x.measure);
    expect_array("totals", x.totals, DType::f64, {4});

    args.measure = x.measure, args.gradient = x.gradient, args.first = x.first;
    args.loss_gradient = x.loss_gradient, args.tensors = tensors.data(), args.count = x.count, args.loss = x.loss;
    args.totals = reinterpret_cast<TrajectoryMatch::Totals *>(x.totals);
  }

  void check_on_cpu() const {}
  void check_on_cuda() const {}

private:
  std::vector<TrajectoryMatch::Tensor> tensors;
};

} // namespace
} // namespace gg

GG_C_DOORS(trajectory_match)
#if defined(GG_CUDA_trajectory_match)
GG_CUDA_DOORS(trajectory_match)
#else
GG_NO_CUDA_DOORS(trajectory_match)
#endif
