#include "core/bind.h"
#include "trajectory_match/trajectory_match.h"

#include <deque>
#include <pybind11/stl.h>
#include <vector>

namespace gg {
namespace {

using Tensor = TrajectoryMatch::Tensor;

// Everything the kernel relies on for memory safety; the front door has already said it more kindly.
struct Call {
  static constexpr const char *op = "trajectory_match";
  static constexpr size_t arrays = 8;
  using Options = std::tuple<std::optional<std::vector<double>>, int64_t>;

  View totals;
  TrajectoryMatch args{};

  const View &place() const { return totals; }

  Call(Given student, Given start, Given target, Given mask, Given loss_gradient, Given loss, Given totals_,
       Given gradient, const std::optional<std::vector<double>> &weights, int64_t first)
      : totals("totals", totals_) {
    tensors.resize(student.size());
    args.tensors = tensors.data(), args.count = static_cast<int64_t>(tensors.size());
    args.first = first;
    for (size_t at = 0; at < tensors.size(); ++at) {
      const View &view = views.emplace_back("student", student[at]);
      if (at == 0)
        args.dtype = view.dtype;
      tensors[at] = {view.size(), 1, view.data, nullptr, nullptr, nullptr, nullptr};
      expect(view.dtype < DType::i32 && view.dtype == args.dtype && view.contiguous(), "student",
             "contiguous tensors of one floating dtype", view);
    }
    const DType results = args.dtype == DType::f64 ? DType::f64 : DType::f32;
    args.measure = each("start", start, args.dtype, &Tensor::start);
    if (!each("target", target, args.dtype, &Tensor::target) && args.measure)
      throw py::value_error("target: expected arrays where a loss is wanted, got None");
    args.bool_mask = !mask.is_none() && !tensors.empty() && View("mask", mask[0]).dtype == DType::boolean;
    each("mask", mask, args.bool_mask ? DType::boolean : results, &Tensor::mask);
    args.gradient = each("gradient", gradient, args.measure ? results : args.dtype, &Tensor::gradient);
    if (weights && weights->size() != tensors.size())
      throw py::value_error("weights: expected one for every tensor");
    for (size_t at = 0; weights && at < tensors.size(); ++at)
      tensors[at].weight = (*weights)[at];

    if (args.measure)
      expect_output("totals", totals, DType::f64, {4});
    else
      expect(totals.ndim == 1 && totals.shape[0] == 4 && totals.dtype == DType::f64 && totals.contiguous(), "totals",
             "a contiguous float64 (4,)", totals);
    args.totals = static_cast<TrajectoryMatch::Totals *>(totals.data);
    if (args.measure) {
      const View &out = views.emplace_back("loss", loss);
      expect_output("loss", out, results, {});
      args.loss = out.data;
    }
    if (!loss_gradient.is_none()) {
      const View &g = views.emplace_back("loss_gradient", loss_gradient);
      expect(g.ndim == 0 && g.dtype == results, "loss_gradient", "a scalar of the dtype of the loss", g);
      args.loss_gradient = g.data;
    }
    for (const View &view : views)
      expect_one_device("trajectory_match", totals, {&view});
  }

  void check_results() const {
    const TrajectoryMatch::Totals &found = *args.totals;
    if (!args.measure || found.usable())
      return;
    if (found.wrong)
      throw py::value_error("mask: expected weights >= 0, got " + std::to_string(int64_t(found.wrong)) +
                            " that are not");
    throw py::value_error("start: expected to differ from target by more than rounding where mask is not 0, got D = " +
                          std::to_string(found.D) + " beside sum_j m_j start_j^2 = " + std::to_string(found.S));
  }

private:
  // Borrows one array for every tensor, if there are any, and says whether there were.
  template <class Pointer> bool each(const char *name, Given list, DType dtype, Pointer Tensor::*field) {
    if (list.is_none())
      return false;
    if (list.size() != tensors.size())
      throw py::value_error(std::string(name) + ": expected one array for every tensor of student");
    for (size_t at = 0; at < tensors.size(); ++at) {
      const View &view = views.emplace_back(name, list[at]);
      expect(view.dtype == dtype && view.contiguous() && view.size() == tensors[at].size, name,
             (std::string(name_of(dtype)) + " of the size of student, contiguous").c_str(), view);
      if (!std::is_const_v<std::remove_pointer_t<Pointer>> && view.read_only)
        throw py::value_error(std::string(name) + ": expected a writable array, got a read-only one");
      tensors[at].*field = view.data;
    }
    return true;
  }

  std::vector<Tensor> tensors;
  std::deque<View> views; // held while the kernel runs
};

} // namespace

void bind_trajectory_match(py::module_ &cpu, [[maybe_unused]] py::module_ &cuda) {
  Room<Call>::bind_cpu<trajectory_match_cpu>(cpu);
#if defined(GG_CUDA_trajectory_match)
  Room<Call>::bind_cuda<trajectory_match_cuda, trajectory_match_cuda_workspace>(cuda);
#endif
}

} // namespace gg
