// Which device a launch runs on, and what CUDA says of it. Includes no CUDA header. The runtime's state, such as its
// last error, belongs to the copy of it that is linked in here: whatever calls CUDA does so through these.
#pragma once
#include "core/array.h"
#include <functional>

namespace gg {

// How many CUDA devices there are; 0 without a driver. Never throws.
GG_LENT int cuda_device_count();

// Calls launch() with a device current, and makes the one before it so again; -1 is the one that is current. Null where
// that went well, else what CUDA says of the cudaError_t that it returned, which no later call reports again.
GG_LENT const char *cuda_failure(int device, const std::function<int()> &launch);

// cudaMemsetAsync, of which no bytes are nothing to do; returns a cudaError_t.
GG_LENT int cuda_fill(void *data, int value, int64_t bytes, void *stream);

} // namespace gg
