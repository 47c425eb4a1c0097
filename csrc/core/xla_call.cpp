#include "core/xla_call.h"

#include <cstring>

namespace gg {
namespace {

[[noreturn]] void refuse(const std::string &what) { throw std::runtime_error("ghostgram: " + what); }

DType dtype_from(int32_t dtype) {
  switch (dtype) {
  case xla::f32: return DType::f32;
  case xla::f64: return DType::f64;
  case xla::bf16: return DType::bf16;
  case xla::f16: return DType::f16;
  case xla::s32: return DType::i32;
  case xla::s64: return DType::i64;
  case xla::pred: return DType::boolean;
  }
  refuse("expected float32, float64, bfloat16, float16, int32, int64 or bool, got XLA's type " + std::to_string(dtype));
}

int64_t product(const int64_t *sizes, int64_t count) {
  int64_t n = 1;
  for (int64_t i = 0; i < count; ++i)
    n *= sizes[i];
  return n;
}

const xla::Buffer &next(const xla::Buffers &buffers, int64_t &at) {
  if (at == buffers.count)
    refuse("expected as many buffers as the layout names");
  return *buffers.buffers[at++];
}

} // namespace

XlaCall::XlaCall(const xla::CallFrame &frame, dlpack::Device device) : frame_(frame) {
  const auto *layout = static_cast<const xla::Text *>(attribute("layout", xla::text));
  const auto *rank = static_cast<const xla::Scalar *>(attribute("rank", xla::scalar));
  if (!layout || !rank || !frame.inputs.count || !frame.results.count)
    refuse("expected a layout, a rank, inputs and outputs");
  const int64_t axes = frame.inputs.buffers[0]->ndim - *static_cast<const int64_t *>(rank->value);
  const xla::Buffer &first = *frame.results.buffers[0];
  if (axes < 0 || first.ndim < axes)
    refuse("expected no fewer axes than the call was made with");
  batch_.assign(first.shape, first.shape + axes);
  calls_ = product(first.shape, axes);

  int64_t inputs = 0, results = 0;
  for (const char letter : std::string_view(layout->data, layout->size))
    if (letter == ',') {
      ends_.push_back(operands_.size());
    } else if (letter == 'i') {
      add(next(frame.inputs, inputs), false, false, device);
    } else {
      if (letter == 'a')
        next(frame.inputs, inputs);
      add(next(frame.results, results), true, letter == 'o', device);
    }
  ends_.push_back(operands_.size());
}

void XlaCall::add(const xla::Buffer &buffer, bool result, bool fresh, dlpack::Device device) {
  const int64_t axes = static_cast<int64_t>(batch_.size()), ndim = buffer.ndim - axes;
  if (ndim < 0 || ndim > 8)
    refuse("expected at most 8 axes behind those of the batch");
  for (int64_t i = 0; i < axes; ++i)
    if (buffer.shape[i] != batch_[i] && (result || buffer.shape[i] != 1))
      refuse("expected the axes of the batch in front of every buffer");
  Memory memory{buffer.data, dtype_from(buffer.dtype), static_cast<int>(ndim), {}, {}, device, !result};
  int64_t stride = 1;
  for (int64_t i = ndim - 1; i >= 0; stride *= memory.shape[i--])
    memory.shape[i] = buffer.shape[axes + i], memory.stride[i] = stride;
  operands_.push_back({&buffer, result, fresh});
  memory_.push_back(memory);
}

void XlaCall::select(int64_t call) {
  for (size_t k = 0; k < operands_.size(); ++k) {
    const xla::Buffer &buffer = *operands_[k].buffer;
    int64_t row = 0, rows = 1, rest = call;
    for (size_t i = batch_.size(); i-- > 0; rest /= batch_[i])
      if (buffer.shape[i] != 1)
        row += rest % batch_[i] * rows, rows *= batch_[i];
    Memory &memory = memory_[k];
    const int64_t bytes = product(memory.shape, memory.ndim) * size_of(memory.dtype);
    memory.data = static_cast<char *>(buffer.data) + row * bytes;
  }
}

Given XlaCall::operator[](size_t argument) const {
  if (argument >= ends_.size())
    refuse("expected more arguments than the layout names");
  const size_t first = argument ? ends_[argument - 1] : 0;
  return {memory_.data() + first, ends_[argument] - first};
}

int64_t XlaCall::calls_of(const Operand &operand) const {
  return product(operand.buffer->shape, static_cast<int64_t>(batch_.size()));
}

void XlaCall::merge_samples(bool (*per_sample)(size_t argument, int axes)) {
  size_t argument = 0;
  const auto at = [&](size_t k) {
    while (k >= ends_[argument])
      ++argument;
    return argument;
  };
  for (size_t k = 0; k < operands_.size(); ++k) {
    const Operand &x = operands_[k];
    const bool mergeable = per_sample(at(k), memory_[k].ndim)
                               ? calls_of(x) == calls_
                               : calls_of(x) == 1 || (x.result && memory_[k].ndim == 0); // one call's serves for all
    if (!mergeable)
      return;
  }
  argument = 0;
  for (size_t k = 0; k < operands_.size(); ++k)
    if (per_sample(at(k), memory_[k].ndim))
      memory_[k].shape[0] *= calls_;
  calls_ = 1;
}

std::vector<XlaCall::Block> XlaCall::fresh() const {
  std::vector<Block> found;
  for (size_t k = 0; k < operands_.size(); ++k)
    if (const xla::Buffer &buffer = *operands_[k].buffer; operands_[k].fresh)
      found.push_back({buffer.data, product(buffer.shape, buffer.ndim) * size_of(memory_[k].dtype)});
  return found;
}

const void *XlaCall::attribute(const std::string &name, int32_t type) const {
  const xla::Attributes &all = frame_.attributes;
  for (int64_t i = 0; i < all.count; ++i)
    if (std::string_view(all.names[i]->data, all.names[i]->size) == name) {
      if (all.types[i] != type)
        refuse("expected another kind of attribute for " + name);
      return all.values[i];
    }
  return nullptr;
}

template <class T> T XlaCall::option(size_t i) const {
  const std::string name = std::string("o").append(std::to_string(i));
  if constexpr (std::is_same_v<T, std::string>) {
    if (const auto *text = static_cast<const xla::Text *>(attribute(name, xla::text)))
      return {text->data, text->size};
  } else if constexpr (std::is_same_v<T, std::optional<std::vector<double>>>) {
    const auto *array = static_cast<const xla::Array *>(attribute(name, xla::array));
    if (!array)
      return std::nullopt;
    const auto *numbers = static_cast<const double *>(array->data);
    return std::vector<double>(numbers, numbers + array->count);
  } else if (const auto *scalar = static_cast<const xla::Scalar *>(attribute(name, xla::scalar))) {
    if (scalar->dtype == xla::f64 && std::is_same_v<T, double>)
      return static_cast<T>(*static_cast<const double *>(scalar->value));
    if (scalar->dtype == xla::s64 && std::is_integral_v<T>)
      return static_cast<T>(*static_cast<const int64_t *>(scalar->value));
  }
  refuse("expected option " + name);
}

template bool XlaCall::option(size_t) const;
template int64_t XlaCall::option(size_t) const;
template uint64_t XlaCall::option(size_t) const;
template uint32_t XlaCall::option(size_t) const;
template double XlaCall::option(size_t) const;
template std::string XlaCall::option(size_t) const;
template std::optional<std::vector<double>> XlaCall::option(size_t) const;

bool answered(const xla::CallFrame &frame) {
  if (!frame.extensions || frame.extensions->type != 1)
    return false;
  xla::Metadata &metadata = *reinterpret_cast<xla::MetadataExtension *>(frame.extensions)->metadata;
  // The newest version that both sides know. XLA before 0.2 does not say which one it has, and wants its own.
  metadata.version.major = 0;
  metadata.version.minor = frame.api ? std::min(frame.api->version.minor, xla::newest_minor) : 1;
  metadata.traits = 0;
  return true;
}

xla::Error *error_of(const xla::CallFrame &frame, const char *message) {
  xla::ErrorCreate request{offsetof(xla::ErrorCreate, code) + sizeof(int32_t), nullptr, message, 3};
  return frame.api->error_create(&request);
}

void *stream_of(const xla::CallFrame &frame) {
  xla::StreamGet request{sizeof request, nullptr, frame.context, nullptr};
  if (xla::Error *error = frame.api->stream_get(&request))
    throw XlaError{error};
  return request.stream;
}

XlaScratch::XlaScratch(const xla::CallFrame &frame, int64_t bytes) : frame_(frame), bytes_(bytes ? bytes : 1) {
  xla::Allocate request{sizeof request, nullptr, frame.context, bytes_, 16, nullptr};
  if (xla::Error *error = frame.api->allocate(&request))
    throw XlaError{error};
  data_ = request.data;
}

XlaScratch::~XlaScratch() {
  xla::Free request{sizeof request, nullptr, frame_.context, bytes_, data_};
  frame_.api->free(&request); // an error would be that of the launch before it, which XLA finds itself
}

} // namespace gg
