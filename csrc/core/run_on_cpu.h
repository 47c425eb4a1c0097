// The border of CPU kernels: who runs them, and whether others may run Python meanwhile.
#pragma once
#include "core/parallel.h"
#include "core/view.h"

namespace gg {

// To wake the threads of a pool takes from 1 us, when they were busy a moment ago, to 100 us, when another program has
// their cores; to release the GIL and take it again, 0.1 us. Less work than this, in multiply-adds or what takes as
// long as one, is done before that: by the calling thread alone, with the GIL held. docs/overhead.md has the numbers.
#if defined(GG_SHARE_ALL_WORK) // by tests, whose small cases shall show what several threads do to each other
constexpr double least_shared_work = 0;
#else
constexpr double least_shared_work = 1 << 17;
#endif

template <class Kernel> void run_on_cpu(double work, const Kernel &kernel) {
  if (work < least_shared_work) {
    const Alone alone;
    return kernel();
  }
  py::gil_scoped_release free;
  kernel();
}

} // namespace gg
