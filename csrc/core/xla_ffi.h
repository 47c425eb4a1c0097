// The binary interface of XLA's foreign functions (openxla/xla, xla/ffi/api/c_api.h), written down as far as a handler
// of ours reads it. Field order and widths are XLA's; names are ours. These parts are the same from version 0.1 of the
// interface (jaxlib 0.5.0) to 0.3 (jaxlib 0.10.2); tests/core/test_xla_ffi.py compares them with the jaxlib at hand.
#pragma once
#include <cstddef>
#include <cstdint>

namespace gg::xla {

enum DType : int32_t { pred = 1, s32 = 4, s64 = 5, f16 = 10, f32 = 11, f64 = 12, bf16 = 16 };

struct Extension {
  size_t size;
  int32_t type; // 1: Metadata
  Extension *next;
};

struct Version {
  size_t size;
  Extension *extensions;
  int32_t major, minor;
};

constexpr int32_t newest_minor = 3; // of the versions 0.x that we know

struct Buffer {
  size_t size;
  Extension *extensions;
  int32_t dtype;
  void *data; // C-contiguous
  int64_t ndim;
  int64_t *shape;
};

struct Buffers {
  size_t size;
  Extension *extensions;
  int64_t count;
  int32_t *types; // 1: Buffer, the only one there is
  Buffer **buffers;
};

struct Text {
  const char *data;
  size_t size;
};

struct Scalar {
  int32_t dtype;
  void *value;
};

struct Array {
  int32_t dtype;
  size_t count;
  void *data;
};

enum AttributeType : int32_t { array = 1, scalar = 3, text = 4 };

struct Attributes {
  size_t size;
  Extension *extensions;
  int64_t count;
  int32_t *types;
  Text **names;
  void **values;
};

struct Api;
struct Context;
struct Error;

struct CallFrame {
  size_t size;
  Extension *extensions;
  const Api *api;
  Context *context;
  int32_t stage;
  Buffers inputs, results;
  Attributes attributes;
  void *future;
};

using Handler = Error *(CallFrame *);

struct Metadata { // newer versions have more fields behind these
  size_t size;
  Version version;
  uint32_t traits;
};

struct MetadataExtension { // a handler that is called with it fills in the metadata and does nothing else
  Extension base;
  Metadata *metadata;
};

// Arguments of functions of the Api. XLA wants their size to end with the last field, without the padding behind it.
struct ErrorCreate {
  size_t size;
  Extension *extensions;
  const char *message;
  int32_t code; // 3: invalid argument
};

struct StreamGet {
  size_t size;
  Extension *extensions;
  Context *context;
  void *stream; // out
};

struct Allocate {
  size_t size;
  Extension *extensions;
  Context *context;
  size_t bytes, alignment;
  void *data; // out
};

struct Free {
  size_t size;
  Extension *extensions;
  Context *context;
  size_t bytes;
  void *data;
};

struct Api {
  size_t size;
  Extension *extensions;
  Version version;
  const void *internal;
  Error *(*error_create)(ErrorCreate *);
  const void *error_get_message, *error_destroy, *handler_register;
  Error *(*stream_get)(StreamGet *);
  const void *type_register, *context_get, *state_set, *state_get;
  Error *(*allocate)(Allocate *);
  Error *(*free)(Free *);
};

} // namespace gg::xla
