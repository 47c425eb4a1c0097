#include "core/isa.h"
#include "core/view.h"
#include "gumbel_topk/gumbel_topk.h"

#include <optional>

GG_PER_ISA(gumbel_topk, GumbelTopK)

namespace gg {
namespace {

bool contiguous(const View &v, DType dtype) { return v.ndim == 1 && v.dtype == dtype && v.unit_inner_stride(); }

// Everything the kernel relies on for memory safety; the front door has already said it more kindly.
struct Call {
  View scores, keys, picks, held, threshold;
  std::optional<View> ids;
  GumbelTopK args{};
  GumbelTopKFault fault;

  Call(py::handle scores_, py::handle ids_, py::handle keys_, py::handle picks_, py::handle held_,
       py::handle threshold_)
      : scores("scores", scores_), keys("keys", keys_), picks("picks", picks_), held("held", held_),
        threshold("threshold", threshold_) {
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
    args.keys = static_cast<double *>(keys.data), args.picks = static_cast<int64_t *>(picks.data);
    args.held = static_cast<int64_t *>(held.data), args.threshold = static_cast<double *>(threshold.data);
    for (const View *v : {&scores, ids ? &*ids : nullptr, &keys, &picks, &held, &threshold})
      if (v)
        expect(v->device.type == dlpack::cpu, "gumbel_topk", "CPU memory", *v);
    args.fault = &fault;
  }

  void check_room() const {
    if (args.k < 0)
      throw py::value_error("k: expected at least 0, got " + std::to_string(args.k));
    const bool all_fit = args.count <= args.capacity - *args.held;
    if (*args.held < 0 || *args.held > args.capacity || (!all_fit && args.k > args.capacity - GumbelTopK::least_spare))
      throw py::value_error("keys: expected room for all documents or for k + " +
                            std::to_string(GumbelTopK::least_spare) + ", got " + std::to_string(args.capacity) +
                            " of which " + std::to_string(*args.held) + " are held");
    if (args.by_position && *args.held)
      throw py::value_error("held: expected 0 where documents are picked by position, got " +
                            std::to_string(*args.held));
    if (!(args.temperature == 0 || (args.temperature >= 1e-300 && args.temperature <= 1e300)))
      throw py::value_error("temperature: expected 0, or from 1e-300 to 1e300, got " +
                            std::to_string(args.temperature));
  }

  void check_fault() const {
    if (fault.nan_at >= 0)
      throw py::value_error("scores: expected numbers, got NaN at index " + std::to_string(fault.nan_at));
    if (!fault.two_scores)
      return;
    const auto id = static_cast<int64_t>(fault.two_scores_id);
    throw py::value_error("ids: expected one score for each id, got two for id " + std::to_string(id) +
                          (id < 0 ? " (" + std::to_string(fault.two_scores_id) + " as uint64)" : ""));
  }
};

} // namespace

void bind_gumbel_topk(py::module_ &cpu, py::module_ &) {
  cpu.def("gumbel_topk",
          [](py::handle scores, py::handle ids, py::handle keys, py::handle picks, py::handle held,
             py::handle threshold, int64_t k, int64_t seed, double temperature, bool by_position, bool finish) {
            Call call(scores, ids, keys, picks, held, threshold);
            call.args.k = k, call.args.seed = static_cast<uint64_t>(seed), call.args.temperature = temperature;
            call.args.by_position = by_position, call.args.finish = finish;
            call.check_room();
            {
              py::gil_scoped_release free;
              gumbel_topk_cpu(call.args);
            }
            call.check_fault();
          });
}

} // namespace gg
