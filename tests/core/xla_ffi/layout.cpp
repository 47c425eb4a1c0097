// csrc/core/xla_ffi.h beside the header of the jaxlib at hand: compiles if they agree.
#include "core/xla_ffi.h"
#include "xla/ffi/api/c_api.h"

using namespace gg;

#define SAME(ours, our_field, theirs, their_field)                                                                     \
  static_assert(offsetof(xla::ours, our_field) == offsetof(theirs, their_field) &&                                     \
                sizeof(xla::ours::our_field) == sizeof(theirs::their_field))
#define SIZE(ours, theirs) static_assert(sizeof(xla::ours) == sizeof(theirs))

SIZE(Extension, XLA_FFI_Extension_Base);
SAME(Extension, type, XLA_FFI_Extension_Base, type);
SAME(Extension, next, XLA_FFI_Extension_Base, next);
SIZE(Version, XLA_FFI_Api_Version);
SAME(Version, major, XLA_FFI_Api_Version, major_version);
SAME(Version, minor, XLA_FFI_Api_Version, minor_version);
SIZE(Buffer, XLA_FFI_Buffer);
SAME(Buffer, dtype, XLA_FFI_Buffer, dtype);
SAME(Buffer, data, XLA_FFI_Buffer, data);
SAME(Buffer, ndim, XLA_FFI_Buffer, rank);
SAME(Buffer, shape, XLA_FFI_Buffer, dims);
SIZE(Buffers, XLA_FFI_Args);
SAME(Buffers, count, XLA_FFI_Args, size);
SAME(Buffers, buffers, XLA_FFI_Args, args);
SIZE(Buffers, XLA_FFI_Rets);
SAME(Buffers, count, XLA_FFI_Rets, size);
SAME(Buffers, buffers, XLA_FFI_Rets, rets);
SIZE(Text, XLA_FFI_ByteSpan);
SAME(Text, data, XLA_FFI_ByteSpan, ptr);
SAME(Text, size, XLA_FFI_ByteSpan, len);
SIZE(Scalar, XLA_FFI_Scalar);
SAME(Scalar, value, XLA_FFI_Scalar, value);
SIZE(Array, XLA_FFI_Array);
SAME(Array, count, XLA_FFI_Array, size);
SAME(Array, data, XLA_FFI_Array, data);
SIZE(Attributes, XLA_FFI_Attrs);
SAME(Attributes, count, XLA_FFI_Attrs, size);
SAME(Attributes, types, XLA_FFI_Attrs, types);
SAME(Attributes, names, XLA_FFI_Attrs, names);
SAME(Attributes, values, XLA_FFI_Attrs, attrs);
SIZE(CallFrame, XLA_FFI_CallFrame);
SAME(CallFrame, extensions, XLA_FFI_CallFrame, extension_start);
SAME(CallFrame, api, XLA_FFI_CallFrame, api);
SAME(CallFrame, context, XLA_FFI_CallFrame, ctx);
SAME(CallFrame, stage, XLA_FFI_CallFrame, stage);
SAME(CallFrame, inputs, XLA_FFI_CallFrame, args);
SAME(CallFrame, results, XLA_FFI_CallFrame, rets);
SAME(CallFrame, attributes, XLA_FFI_CallFrame, attrs);
static_assert(sizeof(xla::Metadata) <= sizeof(XLA_FFI_Metadata)); // newer ones have more fields at the end
SAME(Metadata, version, XLA_FFI_Metadata, api_version);
SAME(Metadata, traits, XLA_FFI_Metadata, traits);
SAME(MetadataExtension, metadata, XLA_FFI_Metadata_Extension, metadata);
SIZE(ErrorCreate, XLA_FFI_Error_Create_Args);
SAME(ErrorCreate, message, XLA_FFI_Error_Create_Args, message);
SAME(ErrorCreate, code, XLA_FFI_Error_Create_Args, errc);
static_assert(offsetof(xla::ErrorCreate, code) + sizeof(int32_t) == XLA_FFI_Error_Create_Args_STRUCT_SIZE);
SIZE(StreamGet, XLA_FFI_Stream_Get_Args);
SAME(StreamGet, stream, XLA_FFI_Stream_Get_Args, stream);
SIZE(Allocate, XLA_FFI_DeviceMemory_Allocate_Args);
SAME(Allocate, bytes, XLA_FFI_DeviceMemory_Allocate_Args, size);
SAME(Allocate, alignment, XLA_FFI_DeviceMemory_Allocate_Args, alignment);
SAME(Allocate, data, XLA_FFI_DeviceMemory_Allocate_Args, data);
SIZE(Free, XLA_FFI_DeviceMemory_Free_Args);
SAME(Free, bytes, XLA_FFI_DeviceMemory_Free_Args, size);
SAME(Free, data, XLA_FFI_DeviceMemory_Free_Args, data);
SAME(Api, version, XLA_FFI_Api, api_version);
SAME(Api, error_create, XLA_FFI_Api, XLA_FFI_Error_Create);
SAME(Api, stream_get, XLA_FFI_Api, XLA_FFI_Stream_Get);
SAME(Api, allocate, XLA_FFI_Api, XLA_FFI_DeviceMemory_Allocate);
SAME(Api, free, XLA_FFI_Api, XLA_FFI_DeviceMemory_Free);

static_assert(xla::pred == int(XLA_FFI_DataType_PRED) && xla::s32 == int(XLA_FFI_DataType_S32) &&
              xla::s64 == int(XLA_FFI_DataType_S64) && xla::f16 == int(XLA_FFI_DataType_F16) &&
              xla::f32 == int(XLA_FFI_DataType_F32) && xla::f64 == int(XLA_FFI_DataType_F64) &&
              xla::bf16 == int(XLA_FFI_DataType_BF16));
static_assert(xla::array == int(XLA_FFI_AttrType_ARRAY) && xla::scalar == int(XLA_FFI_AttrType_SCALAR) &&
              xla::text == int(XLA_FFI_AttrType_STRING));
static_assert(XLA_FFI_Extension_Metadata == 1 && XLA_FFI_Error_Code_INVALID_ARGUMENT == 3);
static_assert(XLA_FFI_API_MAJOR == 0);
