// k draws without replacement from the softmax of a million scores that come in shards and never lie in memory at once.
//
// The reservoir has room for k and a few thousand more. What is drawn depends on seed, ids and scores alone: two
// streams that share the shards in any way, and are merged, give the same bits. Scores are per document, as a model of
// influence or quality would give them; here they are made up.
#include <ghostgram/ghostgram.h>

#include <algorithm>
#include <cstdio>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

class Draws {
public:
  Draws(int64_t k, uint64_t seed, double temperature)
      : k_(k), seed_(seed), temperature_(temperature), keys_(k + spare), picks_(k + spare) {}

  // Lets documents in. Throws where an argument or a score is wrong.
  void update(const std::vector<float> &scores, const std::vector<uint64_t> &ids) {
    take(GHOSTGRAM_FLOAT32, scores.data(), ids.data(), static_cast<int64_t>(ids.size()), temperature_, false);
  }

  // Lets in what another stream of the same k, seed and temperature holds. Its keys have their noise already: a score
  // at temperature 0 is its own key.
  void merge(const Draws &other) {
    const auto *ids = reinterpret_cast<const uint64_t *>(other.picks_.data());
    take(GHOSTGRAM_FLOAT64, other.keys_.data(), ids, other.held_, 0, false);
  }

  // The ids of the best k, best first.
  std::vector<uint64_t> best() {
    take(GHOSTGRAM_FLOAT32, nullptr, nullptr, 0, temperature_, true);
    return {picks_.begin(), picks_.begin() + held_};
  }

private:
  void take(ghostgram_dtype dtype, const void *scores, const uint64_t *ids, int64_t count, double temperature,
            bool finish) {
    ghostgram_gumbel_topk_args args{};
    args.struct_size = sizeof args;
    args.dtype = dtype;
    args.finish = finish;
    args.count = count, args.scores = scores, args.ids = ids;
    args.k = k_, args.seed = seed_, args.temperature = temperature;
    args.capacity = static_cast<int64_t>(keys_.size());
    args.keys = keys_.data(), args.picks = picks_.data();
    args.held = &held_, args.threshold = &threshold_, args.fault = &fault_;
    if (ghostgram_gumbel_topk(&args) != GHOSTGRAM_OK)
      throw std::invalid_argument(ghostgram_last_error());
    if (fault_.nan_at >= 0)
      throw std::domain_error("the score of document " + std::to_string(ids[fault_.nan_at]) + " is NaN");
    if (fault_.two_scores)
      throw std::domain_error("document " + std::to_string(fault_.two_scores_id) + " came with two scores");
  }

  static constexpr int64_t spare = 4096; // at least GHOSTGRAM_GUMBEL_SPARE; more room, fewer rounds of thinning
  int64_t k_;
  uint64_t seed_;
  double temperature_;
  std::vector<double> keys_;
  std::vector<int64_t> picks_;
  int64_t held_ = 0;
  double threshold_ = -std::numeric_limits<double>::infinity();
  ghostgram_gumbel_fault fault_{};
};

int main() {
  constexpr int shards = 20, documents = 50000, k = 5;
  Draws one(k, 2024, 0.5), other(k, 2024, 0.5);
  std::vector<float> scores(documents);
  std::vector<uint64_t> ids(documents);
  for (int shard = 0; shard < shards; ++shard) {
    std::iota(ids.begin(), ids.end(), uint64_t(shard) * documents);
    std::transform(ids.begin(), ids.end(), scores.begin(), [](uint64_t id) { return float(id % 1000) / 250.0f; });
    (shard % 3 ? one : other).update(scores, ids);
  }
  one.merge(other);
  std::printf("%d documents, %d drawn, best first:", shards * documents, k);
  for (uint64_t id : one.best())
    std::printf(" %llu", static_cast<unsigned long long>(id));
  std::printf("\nghostgram %s, %s, CUDA %s\n", ghostgram_version(), ghostgram_isa(), ghostgram_cuda_state());
}
