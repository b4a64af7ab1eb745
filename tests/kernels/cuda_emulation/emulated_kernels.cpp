// The CUDA kernels' own source, run on the CPU: in any shape, and launched as by mrpo._C.policy_loss_cuda.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>

#include "cuda_runtime.h"
// After what stands for the CUDA runtime.
#include "policy_loss_cuda.cu"
#include "python_arguments.h"

namespace py = pybind11;

namespace {

using namespace mrpo;

// One kernel in the shape that the caller chooses; blocks 0: the plain one.
template <typename Logit, bool kEntropy>
void run_shape(const PolicyLossArgs<Logit>& args, const ClusterShape& shape, int clusters, uint32_t seed, double haste) {
  if (shape.blocks == 0) {
    const int shared = shape.warps * int(sizeof(RunningSum));
    emulation::launch([&] { block_kernel<Logit, kEntropy>(args); }, args.rows, 1, shape.warps * kLanes, shared, seed,
                      haste);
    return;
  }
  const int64_t row_bytes = args.vocab * int64_t(sizeof(Logit));
  emulation::require(is_aligned_alike(args), "logits and gradient are not aligned alike");
  emulation::require(shape.slots >= needed_slots(row_bytes, shape.blocks, shape.warps), "too few slots");
  const int shared = SharedLayout(shape.blocks, shape.warps, shape.slots).bytes;
  emulation::launch([&] { cluster_kernel<Logit, kEntropy>(args, shape.slots); }, clusters * shape.blocks, shape.blocks,
                    shape.threads(), shared, seed, haste);
}

template <typename Logit>
void run(const py::kwargs& arguments, const ClusterShape& shape, int clusters, uint32_t seed, double haste) {
  const auto args = policy_loss_args<Logit>(arguments);
  if (args.entropy) {
    run_shape<Logit, true>(args, shape, clusters, seed, haste);
  } else {
    run_shape<Logit, false>(args, shape, clusters, seed, haste);
  }
}

void run_kernel(const std::string& dtype, int blocks, int warps, int slots, int clusters, uint32_t seed, double haste,
                const py::kwargs& arguments) {
  ClusterShape shape;
  shape.blocks = blocks;
  shape.warps = warps;
  shape.slots = slots;
  if (dtype == "float32") run<float>(arguments, shape, clusters, seed, haste);
  if (dtype == "bfloat16") run<bfloat16>(arguments, shape, clusters, seed, haste);
  if (dtype == "float16") run<float16>(arguments, shape, clusters, seed, haste);
}

// As mrpo._C does. Returns the blocks of a cluster, 0 for the plain kernel, -1 where nothing was launched.
int launch_kernel(const std::string& dtype, int device, const std::optional<std::array<int, 3>>& cluster, int clusters,
                  const py::kwargs& arguments) {
  emulation::resident_clusters = clusters;
  emulation::launched = -1;
  const std::string error =
      policy_loss_cuda(policy_loss_args<void>(arguments), dtype, device, nullptr, cluster ? &*cluster : nullptr);
  if (!error.empty()) throw std::runtime_error(error);
  return emulation::launched;
}

}  // namespace

PYBIND11_MODULE(emulated_kernels, module) {
  using namespace pybind11::literals;
  module.attr("chunk_bytes") = kChunkBytes;
  module.def("run_kernel", &run_kernel, py::kw_only(), "dtype"_a, "blocks"_a, "warps"_a, "slots"_a, "clusters"_a,
             "seed"_a, "haste"_a);
  module.def("launch_kernel", &launch_kernel, py::kw_only(), "dtype"_a, "device"_a = 0,
             "cluster"_a = py::none(), "clusters"_a = 1);
  module.def("needed_slots", &needed_slots, "row_bytes"_a, "blocks"_a, "warps"_a);
  module.def("shared_bytes", [](int blocks, int warps, int slots) { return SharedLayout(blocks, warps, slots).bytes; });
  module.def("cluster_shape", [](int64_t row_bytes, int shared_bytes) {
    const ClusterShape shape = cluster_shape(row_bytes, shared_bytes);
    return py::make_tuple(shape.blocks, shape.warps, shape.slots);
  });
  module.def("is_aligned_alike",
             [](const py::kwargs& arguments) { return is_aligned_alike(policy_loss_args<bfloat16>(arguments)); });
}
