// From a room's Call to what Python and XLA call. A room binds its CPU kernel by one line and its CUDA kernel by
// another. Its Call has
//
//   Call(arrays..., options...)   checks everything that the kernel relies on, and fills `args`, whose work() counts
//                                 what there is to compute
//   op                            its name
//   arrays                        how many of the first kind there are, each a `Given`
//   Options                       the types of the others
//   place()                       the array that says where all of them lie
//
// and, where there is something to say,
//
//   check_values()                throws for what only memory knows; called before the CPU kernel
//   check_results()               throws for what a kernel has found wrong and noted; called after a CPU kernel that
//                                 XLA has asked for. Everywhere else the front door looks, and knows better words
//   only_half_types               the CUDA kernel knows no float64
//   per_sample(i, n)              whether axis 0 of argument i, one of n axes, counts samples, all treated alike
#pragma once
#include "core/cuda_workspace.h"
#include "core/parallel.h"
#include "core/xla_call.h"
#include <tuple>
#include <utility>

namespace gg {

template <size_t> using Handle = py::handle;

template <class Call, class Arrays = std::make_index_sequence<Call::arrays>, class Options = typename Call::Options>
struct Room;

template <class Call, size_t... array, class... Option>
struct Room<Call, std::index_sequence<array...>, std::tuple<Option...>> {
  template <auto kernel> static void bind_cpu(py::module_ &cpu) {
    cpu.def(Call::op, [](Handle<array>... arrays, Option... options) {
      Call call(arrays..., options...);
      run_cpu<kernel, py::gil_scoped_release>(call);
    });
    handler(cpu, [](xla::CallFrame *frame) {
      return handled(*frame, [&] {
        XlaCall batch(*frame, {dlpack::cpu, 0});
        each(batch, [](Call &call) {
          struct NoGil {};
          run_cpu<kernel, NoGil>(call);
          if constexpr (requires { call.check_results(); })
            call.check_results();
        });
      });
    });
  }

  template <auto kernel, auto workspace_bytes> static void bind_cuda(py::module_ &cuda) {
    cuda.def(Call::op, [](Handle<array>... arrays, Option... options, py::handle workspace) {
      Call call(arrays..., options...);
      check_cuda(call);
      run_on_device(Call::op, call.place().object(), call.place(), workspace, workspace_bytes(call.args),
                    [&](void *scratch, void *stream) { return kernel(call.args, scratch, stream); });
    });
    cuda.def((std::string(Call::op) + "_workspace").c_str(), [](Handle<array>... arrays, Option... options) {
      Call call(arrays..., options...);
      check_cuda(call);
      return workspace_bytes(call.args);
    });
    handler(cuda, [](xla::CallFrame *frame) {
      return handled(*frame, [&] {
        XlaCall batch(*frame, {dlpack::cuda, 0}); // XLA has made its device current, and has a number of its own for it
        void *stream = stream_of(*frame);
        for (const XlaCall::Block &block : batch.fresh())
          fill_with_ones(block.data, block.bytes, stream);
        each(batch, [&](Call &call) {
          check_cuda(call);
          const XlaScratch scratch(*frame, workspace_bytes(call.args));
          run_on_stream(Call::op, [&] { return kernel(call.args, scratch.data(), stream); });
        });
      });
    });
  }

private:
  // Calls run(call) with every Call of XLA's batch.
  template <class Run> static void each(XlaCall &batch, Run run) {
    if constexpr (requires { &Call::per_sample; })
      batch.merge_samples(&Call::per_sample);
    for (int64_t i = 0; i < batch.calls(); ++i) {
      batch.select(i);
      [&]<size_t... option>(std::index_sequence<option...>) {
        Call call(batch[array]..., batch.template option<Option>(option)...);
        run(call);
      }(std::index_sequence_for<Option...>{});
    }
  }

  template <auto kernel, class WithoutGil> static void run_cpu(const Call &call) {
    expect(call.place().device.type == dlpack::cpu, call.place().name(), "CPU memory", call.place());
    if constexpr (requires { call.check_values(); })
      call.check_values();
    if (call.args.work() < least_shared_work) {
      const Alone alone;
      return kernel(call.args);
    }
    [[maybe_unused]] WithoutGil free;
    kernel(call.args);
  }

  static void check_cuda(const Call &call) {
    if constexpr (requires { Call::only_half_types; })
      refuse_float64(call.args.dtype);
  }

  // Hands a handler out as the capsule that jax.ffi.register_ffi_target wants.
  static void handler(py::module_ &module, xla::Handler *handler) {
    module.attr((std::string(Call::op) + "_xla").c_str()) = py::capsule(reinterpret_cast<void *>(handler));
  }
};

} // namespace gg
