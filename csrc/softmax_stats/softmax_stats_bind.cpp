#include "core/isa.h"
#include "core/run_on_cpu.h"
#include "softmax_stats/softmax_stats.h"

#if defined(GG_CUDA_softmax_stats)
#include "core/cuda_workspace.h"
#endif

GG_PER_ISA(softmax_stats, SoftmaxStats)

namespace gg {
namespace {

// Everything the kernel relies on for memory safety; the front door has already said it more kindly.
struct Call {
  View logits, labels, loss, el2n, entropy, max_probability, bad_row;
  SoftmaxStats args{};

  Call(py::handle logits_, py::handle labels_, py::handle loss_, py::handle el2n_, py::handle entropy_,
       py::handle max_probability_, py::handle bad_row_, int64_t ignore_index)
      : logits("logits", logits_), labels("labels", labels_), loss("loss", loss_), el2n("el2n", el2n_),
        entropy("entropy", entropy_), max_probability("max_probability", max_probability_),
        bad_row("bad_row", bad_row_) {
    expect(logits.ndim == 3 && logits.unit_inner_stride() && logits.dtype < DType::i32, "logits",
           "a floating (B, T, C) with inner stride 1", logits);
    const DType outputs = logits.dtype == DType::f64 ? DType::f64 : DType::f32;
    const bool distributions = labels.dtype < DType::i32;
    expect(labels.dtype != DType::boolean && labels.ndim == (distributions ? 3 : 2) &&
               labels.shape[0] == logits.shape[0] && labels.shape[1] == logits.shape[1] &&
               (!distributions || labels.shape[2] == logits.shape[2]),
           "labels", "int32 or int64 (B, T), or a floating (B, T, C), like logits", labels);
    expect(!distributions || (labels.unit_inner_stride() && (labels.dtype == logits.dtype || labels.dtype == outputs)),
           "labels", "inner stride 1, and the dtype of logits or of the outputs", labels);
    args.dtype = logits.dtype, args.label_dtype = labels.dtype;
    args.samples = logits.shape[0], args.tokens = logits.shape[1], args.classes = logits.shape[2];
    args.ignore_index = ignore_index;
    args.logits = logits.data, args.logit_sample = logits.stride[0], args.logit_token = logits.stride[1];
    args.labels = labels.data, args.label_sample = labels.stride[0], args.label_token = labels.stride[1];
    output("loss", loss, outputs, args.loss);
    output("el2n", el2n, outputs, args.el2n);
    output("entropy", entropy, outputs, args.entropy);
    output("max_probability", max_probability, outputs, args.max_probability);
    expect_output("bad_row", bad_row, DType::i64, {});
    args.bad_row = static_cast<int64_t *>(bad_row.data);
    expect_one_device("softmax_stats", logits, {&labels, &loss, &el2n, &entropy, &max_probability, &bad_row});
  }

  // In multiply-adds, for run_on_cpu.
  double work() const {
    return 12.0 * args.samples * args.tokens * args.classes; // most of them for the exponential
  }

private:
  void output(const char *name, const View &view, DType dtype, void *&data) const {
    expect_output(name, view, dtype, {args.samples, args.tokens});
    expect(view.stride[0] == args.tokens || args.samples <= 1 || args.tokens == 0, name, "C-contiguous", view);
    data = view.data;
  }
};

} // namespace

void bind_softmax_stats(py::module_ &cpu, [[maybe_unused]] py::module_ &cuda) {
  cpu.def("softmax_stats",
          [](py::handle logits, py::handle labels, py::handle loss, py::handle el2n, py::handle entropy,
             py::handle max_probability, py::handle bad_row, int64_t ignore_index) {
            Call call(logits, labels, loss, el2n, entropy, max_probability, bad_row, ignore_index);
            expect(call.logits.device.type == dlpack::cpu, "logits", "CPU memory", call.logits);
            run_on_cpu(call.work(), [&] { softmax_stats_cpu(call.args); });
          });
#if defined(GG_CUDA_softmax_stats)
  cuda.def("softmax_stats",
           [](py::handle logits, py::handle labels, py::handle loss, py::handle el2n, py::handle entropy,
              py::handle max_probability, py::handle bad_row, int64_t ignore_index, py::handle workspace) {
             Call call(logits, labels, loss, el2n, entropy, max_probability, bad_row, ignore_index);
             run_on_device("softmax_stats", logits, call.logits, workspace, softmax_stats_cuda_workspace(call.args),
                           [&](void *scratch, void *stream) { return softmax_stats_cuda(call.args, scratch, stream); });
           });
  cuda.def("softmax_stats_workspace",
           [](py::handle logits, py::handle labels, py::handle loss, py::handle el2n, py::handle entropy,
              py::handle max_probability, py::handle bad_row, int64_t ignore_index) {
             return softmax_stats_cuda_workspace(
                 Call(logits, labels, loss, el2n, entropy, max_probability, bad_row, ignore_index).args);
           });
#endif
}

} // namespace gg
