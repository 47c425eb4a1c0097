#include "core/c_border.h"
#include "core/isa.h"
#include "softmax_stats/softmax_stats.h"

GG_PER_ISA(softmax_stats, SoftmaxStats)

namespace gg {
namespace {

struct Call {
  SoftmaxStats args{};

  explicit Call(const ghostgram_softmax_stats_args &x) {
    const DType dtype = floating("dtype", x.dtype), sums = sums_of(dtype);
    const bool numbers = x.label_dtype == GHOSTGRAM_INT32 || x.label_dtype == GHOSTGRAM_INT64;
    args.dtype = dtype;
    args.label_dtype =
        numbers ? integer("label_dtype", x.label_dtype) : either("label_dtype", x.label_dtype, dtype, sums);
    expect_flag("has_ignore_index", x.has_ignore_index);
    expect_zero("reserved", x.reserved);
    expect_sizes({{"samples", x.samples}, {"tokens", x.tokens}, {"classes", x.classes}});
    expect_array("logits", x.logits, dtype, {x.samples, x.tokens, x.classes});
    expect_array("labels", x.labels, args.label_dtype, {x.samples, x.tokens, numbers ? 1 : x.classes});
    expect_array("loss", x.loss, sums, {x.samples, x.tokens}, false);
    expect_array("el2n", x.el2n, sums, {x.samples, x.tokens}, false);
    expect_array("entropy", x.entropy, sums, {x.samples, x.tokens}, false);
    expect_array("max_probability", x.max_probability, sums, {x.samples, x.tokens}, false);
    expect_array("bad_row", x.bad_row, DType::i64, {1});

    args.samples = x.samples, args.tokens = x.tokens, args.classes = x.classes;
    args.ignore_index = x.has_ignore_index ? x.ignore_index : INT64_MIN;
    args.logits = x.logits, args.logit_sample = x.logit_sample, args.logit_token = x.logit_token;
    args.labels = x.labels, args.label_sample = x.label_sample, args.label_token = x.label_token;
    args.loss = x.loss, args.el2n = x.el2n, args.entropy = x.entropy, args.max_probability = x.max_probability;
    args.bad_row = x.bad_row;
  }

  void check_on_cpu() const {}
  void check_on_cuda() const {}
};

} // namespace
} // namespace gg

GG_C_DOORS(softmax_stats)
#if defined(GG_CUDA_softmax_stats)
GG_CUDA_DOORS(softmax_stats)
#else
GG_NO_CUDA_DOORS(softmax_stats)
#endif
