// The binary interface of DLPack 1.x (dmlc/dlpack), written down as far as a consumer needs it.
// Field order and widths are the standard's; names are ours.
#pragma once
#include <cstdint>

namespace gg::dlpack {

struct Version {
  uint32_t major, minor;
};

enum DeviceType : int32_t { cpu = 1, cuda = 2, cuda_host = 3, rocm = 10, rocm_host = 11, cuda_managed = 13 };

struct Device {
  int32_t type;
  int32_t index;
};

enum TypeCode : uint8_t {
  signed_int = 0,
  unsigned_int = 1,
  ieee_float = 2,
  bfloat = 4,
  complex_float = 5,
  boolean = 6
};

struct Type {
  uint8_t code, bits;
  uint16_t lanes;
};

struct Tensor {
  void *data;
  Device device;
  int32_t ndim;
  Type dtype;
  int64_t *shape;
  int64_t *strides; // in elements; null means C-contiguous
  uint64_t byte_offset;
};

struct Managed { // capsule "dltensor"
  Tensor tensor;
  void *context;
  void (*deleter)(Managed *);
};

constexpr uint64_t read_only_flag = 1;

struct ManagedVersioned { // capsule "dltensor_versioned"
  Version version;
  void *context;
  void (*deleter)(ManagedVersioned *);
  uint64_t flags;
  Tensor tensor;
};

// The C exchange API, published as the capsule `__dlpack_c_exchange_api__` on a tensor type.
struct ExchangeHeader {
  Version version;
  ExchangeHeader *previous;
};

struct Exchange {
  ExchangeHeader header;
  void *allocate;
  void *managed_from_object;
  void *object_from_managed;
  int (*tensor_from_object)(void *object, Tensor *out); // borrows: valid while the object lives, nothing to free
  int (*current_stream)(int32_t device_type, int32_t device_index, void **stream);
};

} // namespace gg::dlpack
