#include "core/bind.h"
#include "softmax_stats/softmax_stats.h"

namespace gg {
namespace {

// Everything the kernel relies on for memory safety; the front door has already said it more kindly.
struct Call {
  static constexpr const char *op = "softmax_stats";
  static constexpr size_t arrays = 7;
  using Options = std::tuple<int64_t>;
  static bool per_sample(size_t argument, int) { return argument < 6; }

  View logits, labels, loss, el2n, entropy, max_probability, bad_row;
  SoftmaxStats args{};

  const View &place() const { return logits; }

  Call(Given logits_, Given labels_, Given loss_, Given el2n_, Given entropy_, Given max_probability_, Given bad_row_,
       int64_t ignore_index)
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

  void check_results() const {
    if (*args.bad_row < 0 || args.label_dtype < DType::i32)
      return;
    const int64_t at = *args.bad_row / args.tokens * args.label_sample + *args.bad_row % args.tokens * args.label_token;
    const int64_t got = args.label_dtype == DType::i32 ? static_cast<const int32_t *>(args.labels)[at]
                                                       : static_cast<const int64_t *>(args.labels)[at];
    throw py::index_error("labels: expected 0 <= label < " + std::to_string(args.classes) + " or ignore_index " +
                          std::to_string(args.ignore_index) + ", got " + std::to_string(got) + " at row " +
                          std::to_string(*args.bad_row));
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
  Room<Call>::bind_cpu<softmax_stats_cpu>(cpu);
#if defined(GG_CUDA_softmax_stats)
  Room<Call>::bind_cuda<softmax_stats_cuda, softmax_stats_cuda_workspace>(cuda);
#endif
}

} // namespace gg
