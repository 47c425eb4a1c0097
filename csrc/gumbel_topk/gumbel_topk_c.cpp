#include "core/c_border.h"
#include "core/isa.h"
#include "gumbel_topk/gumbel_topk.h"

GG_PER_ISA(gumbel_topk, GumbelTopK)

namespace gg {
namespace {

static_assert(sizeof(ghostgram_gumbel_fault) == sizeof(GumbelTopKFault));
static_assert(GHOSTGRAM_GUMBEL_SPARE == GumbelTopK::least_spare);

struct Call {
  GumbelTopK args{};

  explicit Call(const ghostgram_gumbel_topk_args &x) {
    args.dtype = floating("dtype", x.dtype);
    expect_flag("by_position", x.by_position);
    expect_flag("finish", x.finish);
    expect_zero("reserved", x.reserved);
    expect_sizes({{"count", x.count}, {"k", x.k}, {"capacity", x.capacity}});
    expect(x.temperature == 0 || (x.temperature >= 1e-300 && x.temperature <= 1e300), "temperature",
           "0, or from 1e-300 to 1e300", x.temperature);
    expect_array("scores", x.scores, args.dtype, {x.count});
    expect_array("ids", x.ids, DType::i64, {x.count}, false);
    expect_array("keys", x.keys, DType::f64, {x.capacity});
    expect_array("picks", x.picks, DType::i64, {x.capacity});
    expect_array("held", x.held, DType::i64, {1});
    expect_array("threshold", x.threshold, DType::f64, {1});
    expect_array("fault", x.fault, DType::i64, {GumbelTopK::fault_words});

    args.count = x.count, args.k = x.k, args.seed = x.seed, args.temperature = x.temperature;
    args.by_position = x.by_position, args.finish = x.finish;
    args.scores = x.scores, args.ids = x.ids;
    args.capacity = x.capacity, args.keys = x.keys, args.picks = x.picks, args.held = x.held;
    args.threshold = x.threshold, args.fault = reinterpret_cast<GumbelTopKFault *>(x.fault);
  }

  void check_on_cpu() const {
    const int64_t held = *args.held;
    expect(held >= 0 && held <= args.capacity, "held", "from 0 to capacity", held);
    expect(held == 0 || !args.by_position, "held", "0 where picks are positions", held);
    const bool all_fit = args.count <= args.capacity - held;
    expect(all_fit || args.k <= args.capacity - GumbelTopK::least_spare, "capacity",
           "room for all documents or for k + GHOSTGRAM_GUMBEL_SPARE", args.capacity);
  }
  void check_on_cuda() const {}
};

} // namespace
} // namespace gg

GG_C_DOORS(gumbel_topk)
#if defined(GG_CUDA_gumbel_topk)
GG_CUDA_DOORS(gumbel_topk)
#else
GG_NO_CUDA_DOORS(gumbel_topk)
#endif
