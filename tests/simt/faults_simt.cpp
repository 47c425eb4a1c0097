// Kernels that a card would hang on, reject or leave undefined: each must come out as a failed launch. Kernel 0 is
// right.
#include "core/device.cuh"

namespace gg {
namespace {

__global__ void fault(int which, float *data) {
  float *shared = reinterpret_cast<float *>(dynamic_shared());
  const int thread = int(threadIdx.x), lane = thread % 32;
  switch (which) {
  case 0: // each thread reads what its neighbour copied
    copy_async_4(shared + thread, data + thread, 4);
    copy_async_commit();
    copy_async_wait<0>();
    __syncthreads();
    data[thread] = sum_over_warp(shared[(thread + 1) % 64]);
    break;
  case 1: // a barrier that one warp does not come to, while it waits elsewhere
    if (thread < 32)
      __syncthreads();
    else if (lane > 0)
      __syncwarp();
    __syncthreads();
    break;
  case 2: // lanes at different instructions
    if (lane == 7)
      __syncwarp();
    else
      data[thread] = sum_over_warp(1.0f);
    break;
  case 3: // 16 bytes from an address that is a multiple of 4
    copy_async_16(shared, data + 1, 16);
    break;
  case 4: // past the end of shared memory
    copy_async_16(shared + 64, data, 16);
    break;
  case 5: // past the end of a buffer
    data[64 + thread] = 1;
    break;
  case 6: // plain writes past the end of shared memory
    shared[64 + thread] = 1;
    break;
  }
}

} // namespace
} // namespace gg

extern "C" int simt_fault(int which, float *data) { return gg::launch(gg::fault, 1, 64, 256, nullptr, which, data); }
