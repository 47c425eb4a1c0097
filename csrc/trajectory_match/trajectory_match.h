// trajectory_match: how far a student's parameters are from a target's, in units of where they started.
//
//   num = sum_j m_j (student_j - target_j)^2       D = sum_j m_j (start_j - target_j)^2       S = sum_j m_j start_j^2
//   loss = num / D                                 gradient_j = 2 g m_j (student_j - target_j) / D
//
// j runs over the scalars of a list of tensors, one after the other, each contiguous and anywhere in memory. All
// share one dtype: f32, bf16, f16 or f64. m_j is 0 for the first `first` scalars, else the product of its tensor's
// `weight` and its own mask, bool or the dtype of `loss`; without a mask that is 1. A scalar of weight 0 takes no part,
// even where it is infinite or NaN.
//
// Differences and gradients are computed in float32 (float64 for f64), sums in float64, in an order that depends on
// the sizes alone: the same bits for any number of threads. loss is float32 (float64 for f64), and so are gradients
// that come with it; gradients alone have the dtype of the tensors, as autograd wants them. For these `start` is null,
// D is read from totals, and neither loss nor totals are written; a `target` that is null is 0. Gradients are written
// only where totals are usable. Sizes of 0 are legal. Outputs must not overlap inputs. All but the table of tensors
// lies where the kernel runs: on a GPU, D and g never come to the host.
#pragma once
#include "core/array.h"

namespace gg {

struct TrajectoryMatch {
  struct Tensor {
    int64_t size;
    double weight;
    const void *student, *start, *target, *mask;
    void *gradient;
  };

  struct Totals {
    double num, D, S;
    double wrong; // how many masked weights are not >= 0

    // D is more than the rounding of parameters of this size. A NaN is let through, as any arithmetic would.
    constexpr bool usable() const { return wrong == 0 && !(D <= 1e-12 * S); }
  };

  DType dtype;
  bool measure;   // loss and totals are wanted
  bool gradient;  // gradients are wanted
  bool bool_mask; // of what kind masks are, where there are any
  int64_t first;
  const void *loss_gradient; // g, a scalar of the dtype of the loss; null where it is 1
  const Tensor *tensors;
  int64_t count;
  void *loss;
  Totals *totals;

  // What a call computes, in multiply-adds or what takes as long as one.
  double work() const {
    double scalars = 0;
    for (int64_t i = 0; i < count; ++i)
      scalars += static_cast<double>(tensors[i].size);
    return 6 * scalars;
  }
};

GG_LENT void trajectory_match_cpu(const TrajectoryMatch &);

// The CUDA launcher allocates nothing and does not synchronise: it runs on `stream`, on the current device, inside
// `workspace` bytes that trajectory_match_cuda_workspace asks for. The table of tensors is read before it returns.
// Returns a cudaError_t.
GG_LENT int64_t trajectory_match_cuda_workspace(const TrajectoryMatch &);
GG_LENT int trajectory_match_cuda(const TrajectoryMatch &, void *workspace, void *stream);

} // namespace gg
