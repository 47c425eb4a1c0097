#include "core/bind.h"
#include "gumbel_topk/gumbel_topk.h"

#include <optional>

namespace gg {
namespace {

bool contiguous(const View &v, DType dtype) { return v.ndim == 1 && v.dtype == dtype && v.unit_inner_stride(); }

// Everything the kernel relies on for memory safety; the front door has already said it more kindly.
struct Call {
  static constexpr const char *op = "gumbel_topk";
  static constexpr size_t arrays = 7;
  using Options = std::tuple<int64_t, int64_t, double, bool, bool>;

  View scores, keys, picks, held, threshold, fault;
  std::optional<View> ids;
  GumbelTopK args{};

  const View &place() const { return scores; }

  Call(Given scores_, Given ids_, Given keys_, Given picks_, Given held_, Given threshold_, Given fault_, int64_t k,
       int64_t seed, double temperature, bool by_position, bool finish)
      : scores("scores", scores_), keys("keys", keys_), picks("picks", picks_), held("held", held_),
        threshold("threshold", threshold_), fault("fault", fault_) {
    expect(scores.ndim == 1 && scores.dtype < DType::i32 && scores.unit_inner_stride(), "scores",
           "a contiguous floating (n,)", scores);
    args.dtype = scores.dtype, args.count = scores.shape[0], args.scores = scores.data;
    if (!ids_.is_none()) {
      ids.emplace("ids", ids_);
      expect(contiguous(*ids, DType::i64) && ids->shape[0] == args.count, "ids", "a contiguous int64 (n,)", *ids);
      args.ids = static_cast<const uint64_t *>(ids->data);
    }
    args.capacity = keys.ndim ? keys.shape[0] : 0;
    expect_output("keys", keys, DType::f64, {args.capacity});
    expect_output("picks", picks, DType::i64, {args.capacity});
    expect_output("held", held, DType::i64, {1});
    expect_output("threshold", threshold, DType::f64, {1});
    expect_output("fault", fault, DType::i64, {GumbelTopK::fault_words});
    args.keys = static_cast<double *>(keys.data), args.picks = static_cast<int64_t *>(picks.data);
    args.held = static_cast<int64_t *>(held.data), args.threshold = static_cast<double *>(threshold.data);
    args.fault = static_cast<GumbelTopKFault *>(fault.data);
    expect_one_device("gumbel_topk", scores, {ids ? &*ids : nullptr, &keys, &picks, &held, &threshold, &fault});

    args.k = k, args.seed = static_cast<uint64_t>(seed), args.temperature = temperature;
    args.by_position = by_position, args.finish = finish;
    if (k < 0)
      throw py::value_error("k: expected at least 0, got " + std::to_string(k));
    if (!(temperature == 0 || (temperature >= 1e-300 && temperature <= 1e300)))
      throw py::value_error("temperature: expected 0, or from 1e-300 to 1e300, got " + std::to_string(temperature));
  }

  void check_values() const {
    const bool all_fit = args.count <= args.capacity - *args.held;
    if (*args.held < 0 || *args.held > args.capacity || (!all_fit && args.k > args.capacity - GumbelTopK::least_spare))
      throw py::value_error("keys: expected room for all documents or for k + " +
                            std::to_string(GumbelTopK::least_spare) + ", got " + std::to_string(args.capacity) +
                            " of which " + std::to_string(*args.held) + " are held");
    if (args.by_position && *args.held)
      throw py::value_error("held: expected 0 where documents are picked by position, got " +
                            std::to_string(*args.held));
  }

  void check_results() const {
    const GumbelTopKFault &fault_ = *args.fault;
    if (fault_.nan_at >= 0)
      throw py::value_error("scores: expected numbers, got NaN at index " + std::to_string(fault_.nan_at));
    if (fault_.two_scores)
      throw py::value_error("ids: expected one score for each id, got two for id " +
                            std::to_string(static_cast<int64_t>(fault_.two_scores_id)));
    if (const int64_t wanted = least(args.k, args.count); args.finish && *args.held < wanted)
      throw py::value_error("ids: expected at least " + std::to_string(wanted) + " different ones, got " +
                            std::to_string(*args.held));
  }
};

} // namespace

void bind_gumbel_topk(py::module_ &cpu, [[maybe_unused]] py::module_ &cuda) {
  Room<Call>::bind_cpu<gumbel_topk_cpu>(cpu);
#if defined(GG_CUDA_gumbel_topk)
  Room<Call>::bind_cuda<gumbel_topk_cuda, gumbel_topk_cuda_workspace>(cuda);
#endif
}

} // namespace gg
