// The module mrpo._C. Tensors come as raw addresses, so that one build serves every version of PyTorch; shapes, dtypes
// and devices are checked in kernels/, which alone calls this.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "policy_loss_cuda.h"
#include "python_arguments.h"

namespace py = pybind11;

namespace {

void policy_loss_cpu(int num_threads, const py::kwargs& arguments) {
  const auto args = mrpo::policy_loss_args<float>(arguments);
  py::gil_scoped_release release;
  mrpo::policy_loss_cpu(args, num_threads);
}

#ifdef MRPO_CUDA
void policy_loss_cuda(const std::string& dtype, int device, uintptr_t stream,
                      const std::optional<std::array<int, 3>>& cluster, const py::kwargs& arguments) {
  const auto args = mrpo::policy_loss_args<void>(arguments);
  py::gil_scoped_release release;
  const std::string error = mrpo::policy_loss_cuda(args, dtype, device, reinterpret_cast<void*>(stream),
                                                   cluster ? &*cluster : nullptr);
  if (!error.empty()) throw std::runtime_error("policy_loss (CUDA): " + error);
}
#endif

py::tuple cuda_architectures() {
  std::istringstream names(MRPO_CUDA_ARCHITECTURES);  // "" without a CUDA part
  py::list found;
  for (std::string name; names >> name;) found.append(name);
  return found;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  using namespace pybind11::literals;
  module.doc() =
      "Compiled kernels of mrpo.kernels. Arguments are addresses of tensors; 0 stands for none. cuda_architectures: "
      "what the CUDA part was compiled for, such as (\"sm_80\", \"sm_90a\"); empty where there is none.";
  module.attr("cuda_architectures") = cuda_architectures();
  module.def("policy_loss_cpu", &policy_loss_cpu, py::kw_only(), "num_threads"_a);
#ifdef MRPO_CUDA
  module.def("policy_loss_cuda", &policy_loss_cuda, py::kw_only(), "dtype"_a, "device"_a, "stream"_a,
             "cluster"_a = py::none());
#endif
}
