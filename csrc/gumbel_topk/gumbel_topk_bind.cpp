#include "core/isa.h"
#include "core/run_on_cpu.h"
#include "gumbel_topk/gumbel_topk.h"

#include <optional>
#if defined(GG_CUDA_gumbel_topk)
#include "core/cuda_workspace.h"
#endif

GG_PER_ISA(gumbel_topk, GumbelTopK)

namespace gg {
namespace {

bool contiguous(const View &v, DType dtype) { return v.ndim == 1 && v.dtype == dtype && v.unit_inner_stride(); }

// Everything the kernel relies on for memory safety; the front door has already said it more kindly.
struct Call {
  View scores, keys, picks, held, threshold, fault;
  std::optional<View> ids;
  GumbelTopK args{};

  Call(py::handle scores_, py::handle ids_, py::handle keys_, py::handle picks_, py::handle held_,
       py::handle threshold_, py::handle fault_, int64_t k, int64_t seed, double temperature, bool by_position,
       bool finish)
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

  void check_room() const {
    const bool all_fit = args.count <= args.capacity - *args.held;
    if (*args.held < 0 || *args.held > args.capacity || (!all_fit && args.k > args.capacity - GumbelTopK::least_spare))
      throw py::value_error("keys: expected room for all documents or for k + " +
                            std::to_string(GumbelTopK::least_spare) + ", got " + std::to_string(args.capacity) +
                            " of which " + std::to_string(*args.held) + " are held");
    if (args.by_position && *args.held)
      throw py::value_error("held: expected 0 where documents are picked by position, got " +
                            std::to_string(*args.held));
  }

  // In multiply-adds, for run_on_cpu.
  double work() const {
    return 20.0 * (args.count + *args.held); // of noise, or to sort what is held
  }
};

} // namespace

void bind_gumbel_topk(py::module_ &cpu, [[maybe_unused]] py::module_ &cuda) {
  cpu.def("gumbel_topk", [](py::handle scores, py::handle ids, py::handle keys, py::handle picks, py::handle held,
                            py::handle threshold, py::handle fault, int64_t k, int64_t seed, double temperature,
                            bool by_position, bool finish) {
    const Call call(scores, ids, keys, picks, held, threshold, fault, k, seed, temperature, by_position, finish);
    expect(call.scores.device.type == dlpack::cpu, "scores", "CPU memory", call.scores);
    call.check_room();
    run_on_cpu(call.work(), [&] { gumbel_topk_cpu(call.args); });
  });
#if defined(GG_CUDA_gumbel_topk)
  cuda.def("gumbel_topk", [](py::handle scores, py::handle ids, py::handle keys, py::handle picks, py::handle held,
                             py::handle threshold, py::handle fault, int64_t k, int64_t seed, double temperature,
                             bool by_position, bool finish, py::handle workspace) {
    const Call call(scores, ids, keys, picks, held, threshold, fault, k, seed, temperature, by_position, finish);
    run_on_device("gumbel_topk", scores, call.scores, workspace, gumbel_topk_cuda_workspace(call.args),
                  [&](void *scratch, void *stream) { return gumbel_topk_cuda(call.args, scratch, stream); });
  });
  cuda.def("gumbel_topk_workspace", [](py::handle scores, py::handle ids, py::handle keys, py::handle picks,
                                       py::handle held, py::handle threshold, py::handle fault, int64_t k, int64_t seed,
                                       double temperature, bool by_position, bool finish) {
    const Call call(scores, ids, keys, picks, held, threshold, fault, k, seed, temperature, by_position, finish);
    return gumbel_topk_cuda_workspace(call.args);
  });
#endif
}

} // namespace gg
