// An own pool of threads: no OpenMP, so that it can be checked by ThreadSanitizer and a wheel brings no second runtime.
//
// Tasks are claimed in any order by any thread; kernels make tasks from shapes alone and let each write its own
// partial sums, so results do not depend on the number of threads. Workers spin for some microseconds after their last
// task, then sleep: beside torch's own threads they cost nothing. A call from inside a task, or while another thread
// holds the pool, runs serially on the caller. What a task throws comes to the caller once no other task runs; those
// not yet begun are dropped. After fork() the child starts with fresh workers.
#pragma once
#include "core/array.h"

namespace gg {

// Runs tasks on the threads of an OpenMP runtime that is already in the process (torch brings one), if there is one.
// After each parallel region its threads spin for milliseconds: workers beside them would get half a core, but as part
// of its team they are awake already. Says whether a runtime was found.
GG_LENT bool borrow_openmp();

// What set_num_threads or GHOSTGRAM_NUM_THREADS said; else what the borrowed runtime would use, or the usable cores.
GG_LENT int num_threads();
GG_LENT void set_num_threads(int n); // counts the calling thread

GG_LENT void parallel_run(int64_t tasks, void (*body)(void *context, int64_t task), void *context);

// While one lives, whatever its thread asks to be run in parallel runs on that thread alone.
class GG_LENT Alone {
public:
  Alone();
  ~Alone();
  Alone(const Alone &) = delete;
  Alone &operator=(const Alone &) = delete;

private:
  bool outer_;
};

// To wake the threads of a pool takes from 1 us, when they were busy a moment ago, to 100 us, when another program has
// their cores; to release the GIL and take it again, 0.1 us. Less work than this is done before that: by the calling
// thread alone, with the GIL held. docs/overhead.md has the numbers.
#if defined(GG_SHARE_ALL_WORK) // by tests, whose small cases shall show what several threads do to each other
constexpr double least_shared_work = 0;
#else
constexpr double least_shared_work = 1 << 17;
#endif

template <class Body> inline void parallel_for(int64_t tasks, Body &&body) {
  parallel_run(tasks, [](void *context, int64_t task) { (*static_cast<Body *>(context))(task); }, &body);
}

} // namespace gg
