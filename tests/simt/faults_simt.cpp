// Kernels that a card would hang on, reject or leave undefined: each must come out as a failed launch. Kernel 0 is
// right, and so are those from 100 on, each of which shows one primitive of core/device.cuh on the numbers 0 to 63.
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
  case 7: data[thread] = load_vector(data + 2).at[0]; break;
  case 8: data[thread] = broadcast(data[thread], lane + 1); break;
  case 9: data[thread] = load_vector_once(shared).at[0]; break;
  case 12: data[thread] = lane < 16 ? sum_over_warp(1.0f) : sum_over_warp(2.0f); break;
  }
}

__global__ void primitive(int which, float *data) {
  uint32_t *word = reinterpret_cast<uint32_t *>(dynamic_shared());
  uint64_t *wide = reinterpret_cast<uint64_t *>(word + 2);
  const int thread = int(threadIdx.x), lane = thread % 32;
  const float x = data[thread];
  if (thread == 0)
    word[0] = which == 8 ? 1000 : 0, wide[0] = uint64_t(word[0]) << 33;
  __syncthreads();
  struct Three {
    float x;
    double y;
    int32_t z;
  };
  switch (which) {
  case 0: {
    const Three three = shuffle_down(Three{x, x, thread}, 5);
    data[thread] = three.x == three.y && three.z == int(three.x) ? three.x : -1;
    break;
  }
  case 1: data[thread] = float(shuffle_xor(double(x), 9)); break;
  case 2: data[thread] = float(broadcast(uint64_t(x) << 40, lane * 7 % 32) >> 40); break;
  case 3: data[thread] = float(vote(thread % 3 == 0 && lane < 20)); break;
  case 4: // a NaN in the place of the largest
    data[thread] = max_over_warp(lane == 31 ? NAN : x);
    break;
  case 5: // neither commutative nor associative
    data[thread] = merge_over_warp(x, [](float y, float z) { return y + 2 * z; });
    break;
  case 6:
    atomic_add(word, uint32_t(x));
    atomic_add(wide, uint64_t(x) << 33);
    break;
  case 7:
    atomic_max(word, uint32_t(x));
    atomic_max(wide, uint64_t(x) << 33);
    break;
  case 8:
    atomic_min(word, uint32_t(x));
    atomic_min(wide, uint64_t(x) << 33);
    break;
  case 9: { // one of all wins
    const bool won = atomic_swap_if(word, 0u, uint32_t(thread) + 5) == 0;
    atomic_add(wide, uint64_t(won) << 33);
    __syncthreads();
    if (thread == 0)
      word[0] = uint32_t(wide[0] >> 33);
    break;
  }
  case 10: {
    Vector<float> v = load_vector_once(data + thread / 4 * 4), turned;
    for (int i = 0; i < v.size; ++i)
      turned.at[i] = v.at[v.size - 1 - i];
    __syncthreads();
    if (thread % 4 == 0)
      store_vector(data + thread, turned);
    break;
  }
  case 11: // to even: 1 + 2^-8 and 1 + 3 2^-8 for bfloat16 in the first warp, 2^-11 for float16 in the second
    data[thread] = thread < 32 ? widen(narrow<bf16>(1 + x / 256)) : widen(narrow<f16>(1 + x / 2048));
    break;
  case 12: data[thread] = float(blockDim.x * 1000 + gridDim.x); break;
  }
  if (which >= 6 && which <= 9) {
    __syncthreads();
    data[thread] = wide[0] >> 33 == word[0] ? float(word[0]) : -1;
  }
}

} // namespace
} // namespace gg

extern "C" int simt_fault(int which, float *data) {
  char stream = 0;
  simt::settings.stream = &stream;
  if (which >= 100)
    return gg::launch(gg::primitive, 1, 64, 256, &stream, which - 100, data);
  return gg::launch(gg::fault, 1, 64, which == 11 ? 100 << 10 : 256, which == 10 ? nullptr : &stream, which, data);
}
