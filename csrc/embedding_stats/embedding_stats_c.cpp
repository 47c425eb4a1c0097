#include "core/c_border.h"
#include "core/isa.h"
#include "embedding_stats/embedding_stats.h"

GG_PER_ISA(embedding_stats, EmbeddingStats)

namespace gg {

int64_t embedding_stats_bad_id(const EmbeddingStats &s) {
  const int64_t distinct = s.id_sample == 0 && s.samples ? 1 : s.samples;
  for (int64_t i = 0; i < distinct; ++i)
    for (int64_t t = 0; t < s.tokens; ++t) {
      const int64_t id = s.id(i, t);
      if ((id < 0 || id >= s.rows) && (id != s.padding_idx || id < 0))
        return i * s.tokens + t;
    }
  return -1;
}

namespace {

struct Call {
  EmbeddingStats args{};

  explicit Call(const ghostgram_embedding_stats_args &x) {
    const DType dtype = floating("dtype", x.dtype), sums = sums_of(dtype);
    args.dtype = dtype, args.id_dtype = integer("id_dtype", x.id_dtype);
    expect_flag("has_padding_idx", x.has_padding_idx);
    if (x.has_padding_idx)
      expect(x.padding_idx >= 0, "padding_idx", "at least 0", x.padding_idx);
    expect_sizes(
        {{"samples", x.samples}, {"tokens", x.tokens}, {"features", x.features}, {"directions", x.directions}});
    expect(x.tokens <= INT32_MAX, "tokens", "fewer than 2^31", x.tokens);
    expect_array("ids", x.ids, args.id_dtype, {x.samples, x.tokens});
    expect_array("b", x.b, dtype, {x.samples, x.tokens, x.features});
    if (x.directions) {
      args.direction_dtype = either("direction_dtype", x.direction_dtype, dtype, sums);
      expect_sizes({{"rows", x.rows}});
      expect_array("D", x.D, args.direction_dtype, {x.directions, x.rows, x.features});
    }
    expect_array("norms2", x.norms2, sums, {x.samples}, false);
    expect_array("dots", x.dots, sums, {x.samples, x.directions});

    args.samples = x.samples, args.tokens = x.tokens, args.features = x.features, args.directions = x.directions;
    args.rows = x.directions ? x.rows : INT64_MAX, args.padding_idx = x.has_padding_idx ? x.padding_idx : -1;
    args.ids = x.ids, args.id_sample = x.id_sample, args.id_token = x.id_token;
    args.b = x.b, args.b_sample = x.b_sample, args.b_token = x.b_token;
    args.D = x.D, args.D_direction = x.D_direction, args.D_row = x.D_row;
    args.norms2 = x.norms2, args.dots = x.dots;
  }

  void check_on_cpu() const {
    const int64_t at = embedding_stats_bad_id(args);
    if (at < 0)
      return;
    const int64_t i = at / args.tokens, t = at % args.tokens;
    refuse("ids", args.directions ? "0 <= id < " + std::to_string(args.rows) : "0 <= id",
           std::to_string(args.id(i, t)) + " at sample " + std::to_string(i) + ", token " + std::to_string(t));
  }
  void check_on_cuda() const {}
};

} // namespace
} // namespace gg

GG_C_DOORS(embedding_stats)
#if defined(GG_CUDA_embedding_stats)
GG_CUDA_DOORS(embedding_stats)
#else
GG_NO_CUDA_DOORS(embedding_stats)
#endif
