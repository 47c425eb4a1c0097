#include "core/isa.h"
#include "core/run_on_cpu.h"
#include "trajectory_match/trajectory_match.h"

#include <deque>
#include <vector>
#if defined(GG_CUDA_trajectory_match)
#include "core/cuda_workspace.h"
#endif

GG_PER_ISA(trajectory_match, TrajectoryMatch)

namespace gg {
namespace {

using Tensor = TrajectoryMatch::Tensor;

// Everything the kernel relies on for memory safety; the front door has already said it more kindly.
struct Call {
  View totals;
  TrajectoryMatch args{};

  Call(py::handle student, py::handle start, py::handle target, py::handle mask, py::handle loss_gradient,
       py::handle loss, py::handle totals_, py::handle gradient, py::handle weights, int64_t first)
      : totals("totals", totals_) {
    tensors.resize(py::len(student));
    args.tensors = tensors.data(), args.count = static_cast<int64_t>(tensors.size());
    args.first = first;
    size_t at = 0;
    for (py::handle x : student) {
      const View &view = views.emplace_back("student", x);
      if (at == 0)
        args.dtype = view.dtype;
      tensors[at++] = {view.size(), 1, view.data, nullptr, nullptr, nullptr, nullptr};
      expect(view.dtype < DType::i32 && view.dtype == args.dtype && view.contiguous(), "student",
             "contiguous tensors of one floating dtype", view);
    }
    const DType results = args.dtype == DType::f64 ? DType::f64 : DType::f32;
    args.measure = each("start", start, args.dtype, &Tensor::start);
    each("target", target, args.dtype, &Tensor::target);
    args.bool_mask = !mask.is_none() && !tensors.empty() && View("mask", mask[py::int_(0)]).dtype == DType::boolean;
    each("mask", mask, args.bool_mask ? DType::boolean : results, &Tensor::mask);
    args.gradient = each("gradient", gradient, args.measure ? results : args.dtype, &Tensor::gradient);
    if (!weights.is_none()) {
      if (py::len(weights) != tensors.size())
        throw py::value_error("weights: expected one for every tensor");
      at = 0;
      for (py::handle weight : weights)
        tensors[at++].weight = weight.cast<double>();
    }

    expect_output("totals", totals, DType::f64, {4});
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

  // In multiply-adds, for run_on_cpu.
  double work() const {
    double scalars = 0;
    for (const Tensor &tensor : tensors)
      scalars += static_cast<double>(tensor.size);
    return 6 * scalars;
  }

private:
  // Borrows one array for every tensor, if there are any, and says whether there were.
  template <class Pointer> bool each(const char *name, py::handle list, DType dtype, Pointer Tensor::*field) {
    if (list.is_none())
      return false;
    if (py::len(list) != tensors.size())
      throw py::value_error(std::string(name) + ": expected one array for every tensor of student");
    size_t at = 0;
    for (py::handle x : list) {
      const View &view = views.emplace_back(name, x);
      expect(view.dtype == dtype && view.contiguous() && view.size() == tensors[at].size, name,
             (std::string(name_of(dtype)) + " of the size of student, contiguous").c_str(), view);
      if (!std::is_const_v<std::remove_pointer_t<Pointer>> && view.read_only)
        throw py::value_error(std::string(name) + ": expected a writable array, got a read-only one");
      tensors[at++].*field = view.data;
    }
    return true;
  }

  std::vector<Tensor> tensors;
  std::deque<View> views; // held while the kernel runs
};

} // namespace

void bind_trajectory_match(py::module_ &cpu, [[maybe_unused]] py::module_ &cuda) {
  cpu.def("trajectory_match",
          [](py::handle student, py::handle start, py::handle target, py::handle mask, py::handle loss_gradient,
             py::handle loss, py::handle totals, py::handle gradient, py::handle weights, int64_t first) {
            Call call(student, start, target, mask, loss_gradient, loss, totals, gradient, weights, first);
            expect(call.totals.device.type == dlpack::cpu, "trajectory_match", "CPU memory in all arrays", call.totals);
            run_on_cpu(call.work(), [&] { trajectory_match_cpu(call.args); });
          });
#if defined(GG_CUDA_trajectory_match)
  cuda.def("trajectory_match", [](py::handle student, py::handle start, py::handle target, py::handle mask,
                                  py::handle loss_gradient, py::handle loss, py::handle totals, py::handle gradient,
                                  py::handle weights, int64_t first, py::handle workspace) {
    Call call(student, start, target, mask, loss_gradient, loss, totals, gradient, weights, first);
    run_on_device("trajectory_match", totals, call.totals, workspace, trajectory_match_cuda_workspace(call.args),
                  [&](void *scratch, void *stream) { return trajectory_match_cuda(call.args, scratch, stream); });
  });
  cuda.def("trajectory_match_workspace",
           [](py::handle student, py::handle start, py::handle target, py::handle mask, py::handle loss_gradient,
              py::handle loss, py::handle totals, py::handle gradient, py::handle weights, int64_t first) {
             return trajectory_match_cuda_workspace(
                 Call(student, start, target, mask, loss_gradient, loss, totals, gradient, weights, first).args);
           });
#endif
}

} // namespace gg
