#include "core/bind.h"
#include "embedding_stats/embedding_stats.h"

#include <optional>

namespace gg {
namespace {

// Everything the kernel relies on for memory safety; the front door has already said it more kindly.
struct Call {
  static constexpr const char *op = "embedding_stats";
  static constexpr size_t arrays = 5;
  using Options = std::tuple<int64_t>;
  static bool per_sample(size_t argument, int) { return argument != 2; }

  View ids, b;
  std::optional<View> D, norms2, dots;
  EmbeddingStats args{};

  const View &place() const { return ids; }

  Call(Given ids_, Given b_, Given D_, Given norms2_, Given dots_, int64_t padding_idx) : ids("ids", ids_), b("b", b_) {
    expect(ids.ndim == 2 && (ids.dtype == DType::i32 || ids.dtype == DType::i64), "ids", "int32 or int64 (B, T)", ids);
    expect(b.ndim == 3 && b.unit_inner_stride() && b.dtype < DType::i32, "b",
           "a floating (B, T, E) with inner stride 1", b);
    expect(b.shape[0] == ids.shape[0] && b.shape[1] == ids.shape[1], "b", "the samples and tokens of ids", b);
    expect(ids.shape[1] <= INT32_MAX, "ids", "fewer than 2^31 tokens", ids);
    const DType sums = b.dtype == DType::f64 ? DType::f64 : DType::f32;
    args.dtype = b.dtype, args.id_dtype = ids.dtype;
    args.samples = b.shape[0], args.tokens = b.shape[1], args.features = b.shape[2];
    args.rows = INT64_MAX, args.padding_idx = padding_idx;
    args.ids = ids.data, args.id_sample = ids.stride[0], args.id_token = ids.stride[1];
    args.b = b.data, args.b_sample = b.stride[0], args.b_token = b.stride[1];
    if (!D_.is_none()) {
      D.emplace("D", D_);
      expect(D->ndim == 3 && D->shape[2] == args.features && D->unit_inner_stride(), "D",
             "(K, V, E) with inner stride 1", *D);
      expect(D->dtype == sums || D->dtype == b.dtype, "D", "the dtype of b, or of its sums", *D);
      args.direction_dtype = D->dtype, args.directions = D->shape[0], args.rows = D->shape[1];
      args.D = D->data, args.D_direction = D->stride[0], args.D_row = D->stride[1];
    }
    if (!norms2_.is_none()) {
      norms2.emplace("norms2", norms2_);
      expect_output("norms2", *norms2, sums, {args.samples});
      args.norms2 = norms2->data;
    }
    if (args.directions) {
      dots.emplace("dots", dots_);
      expect_dots("dots", *dots, sums, args.samples, args.directions);
      args.dots = dots->data;
    }
    expect_one_device("embedding_stats", ids,
                      {&b, D ? &*D : nullptr, norms2 ? &*norms2 : nullptr, dots ? &*dots : nullptr});
  }

  void check_values() const {
    const int64_t at = embedding_stats_bad_id(args);
    if (at < 0)
      return;
    const int64_t i = at / args.tokens, t = at % args.tokens;
    throw py::index_error("ids: expected 0 <= id" + (D ? " < " + std::to_string(args.rows) : "") + ", got " +
                          std::to_string(args.id(i, t)) + " at sample " + std::to_string(i) + ", token " +
                          std::to_string(t));
  }
};

} // namespace

void bind_embedding_stats(py::module_ &cpu, [[maybe_unused]] py::module_ &cuda) {
  Room<Call>::bind_cpu<embedding_stats_cpu>(cpu);
#if defined(GG_CUDA_embedding_stats)
  Room<Call>::bind_cuda<embedding_stats_cuda, embedding_stats_cuda_workspace>(cuda);
#endif
}

} // namespace gg
