// A call of XLA (core/xla_ffi.h) as arguments of a room. Needs no GIL, and calls nothing of Python.
//
// XLA hands over buffers and attributes; ghostgram/_xla.py, which makes the call, says what they are for. `layout` has
// the arguments in order, with commas between them, and for each one letter per array: i for an input, o for an output,
// a for an output with a value (an input whose buffer is the next output's); no letter is None. `rank` is the number of
// axes of the first input, and o0, o1, ... are the options. Buffers with more axes are a batch of calls, as jax.vmap
// makes them with vmap_method="expand_dims": as many more axes in front of all, of size 1 where one is not batched.
#pragma once
#include "core/view.h"
#include "core/xla_ffi.h"
#include <optional>
#include <vector>

namespace gg {

class XlaCall {
public:
  XlaCall(const xla::CallFrame &frame, dlpack::Device device);

  int64_t calls() const { return calls_; } // how many the batch has
  void select(int64_t call);               // makes the arguments those of one of them
  Given operator[](size_t argument) const;
  template <class T> T option(size_t i) const; // an integer, a bool, a double, a string, or perhaps a list of doubles

  // Makes the batch one call with as many samples more, if it can be: where axis 0 of every batched argument counts
  // samples, and samples know nothing of each other. Says per_sample(argument, axes) of which arguments that is true.
  void merge_samples(bool (*per_sample)(size_t argument, int axes));

  struct Block {
    void *data;
    int64_t bytes;
  };
  std::vector<Block> fresh() const; // the memory of outputs without a value

private:
  struct Operand {
    const xla::Buffer *buffer;
    bool result, fresh;
  };

  const void *attribute(const std::string &name, int32_t type) const; // null where there is none
  void add(const xla::Buffer &buffer, bool result, bool fresh, dlpack::Device device);
  int64_t calls_of(const Operand &operand) const; // how many of the batch's calls it has something of its own for

  const xla::CallFrame &frame_;
  std::vector<Operand> operands_;
  std::vector<Memory> memory_; // of the operands, in the call that is selected
  std::vector<size_t> ends_;   // argument -> the operand behind its last one
  std::vector<int64_t> batch_; // sizes of the axes in front
  int64_t calls_ = 1;
};

// Answers XLA's question about a handler, if that is what the call is. Says whether it was.
bool answered(const xla::CallFrame &frame);

xla::Error *error_of(const xla::CallFrame &frame, const char *message);

struct XlaError { // what XLA says when it refuses a request: thrown, and handed back to it
  xla::Error *error;
};

// What a handler does: answers a question, or calls a body, whose exceptions become XLA's errors.
template <class Body> xla::Error *handled(const xla::CallFrame &frame, Body body) {
  try {
    if (!answered(frame))
      body();
    return nullptr;
  } catch (const XlaError &refused) {
    return refused.error;
  } catch (const std::exception &error) {
    return error_of(frame, error.what());
  }
}

void *stream_of(const xla::CallFrame &frame);

// Memory of the card. XLA hands it out again in the order of the stream.
class XlaScratch {
public:
  XlaScratch(const xla::CallFrame &frame, int64_t bytes);
  ~XlaScratch();
  XlaScratch(const XlaScratch &) = delete;
  XlaScratch &operator=(const XlaScratch &) = delete;

  void *data() const { return data_; }

private:
  const xla::CallFrame &frame_;
  size_t bytes_;
  void *data_ = nullptr;
};

} // namespace gg
