// Drives the thread pool as kernels do, and worse: many small jobs, changing thread counts, nesting, several callers at
// once, tasks that throw. Exits with 1 if any task was lost, repeated or misplaced, or an exception; built with
// -fsanitize=thread it also finds races.
#include "core/parallel.h"
#include <cstdio>
#include <thread>
#include <vector>

namespace {

long mistakes(int jobs) {
  long wrong = 0;
  for (int job = 0; job < jobs; ++job) {
    std::vector<long> out(1 + job % 37, 0);
    gg::parallel_for(int64_t(out.size()), [&](int64_t i) {
      long part[3] = {};
      gg::parallel_for(3, [&](int64_t j) { part[j] += j; });
      out[i] += i * i + part[0] + part[1] + part[2];
    });
    for (size_t i = 0; i < out.size(); ++i)
      wrong += out[i] != long(i * i + 3);
    if (job % 97 == 0)
      gg::set_num_threads(1 + job % 5);
    if (job % 13 == 0) // two tasks throw, and one of the two comes to the caller
      try {
        gg::parallel_for(int64_t(out.size()), [&](int64_t i) {
          if (i == job % 37 || i == job % 7)
            throw job;
        });
        ++wrong;
      } catch (int thrown) {
        wrong += thrown != job;
      }
  }
  return wrong;
}

} // namespace

int main() {
  gg::set_num_threads(4);
  long wrong = mistakes(5000), wrong_beside[2] = {};
  std::thread first([&] { wrong_beside[0] = mistakes(1000); });
  std::thread second([&] { wrong_beside[1] = mistakes(1000); });
  first.join();
  second.join();
  wrong += wrong_beside[0] + wrong_beside[1];
  std::printf("%ld mistakes\n", wrong);
  return wrong != 0;
}
