// The module mrpo._C. Tensors come as raw addresses, so that one build serves every version of PyTorch; shapes, dtypes
// and devices are checked in kernels/, which alone calls this.
#include <pybind11/pybind11.h>

#include "policy_loss.h"

namespace py = pybind11;

namespace {

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void policy_loss_cpu(uintptr_t logits, int64_t rows, int64_t vocab, int64_t logits_stride, int64_t dlogits_stride,
                     uintptr_t targets, uintptr_t advantages, uintptr_t segment_ends, uintptr_t tokens,
                     int64_t num_segments, uintptr_t weights, uintptr_t old_logprobs, uintptr_t ref_logprobs,
                     uintptr_t sampler_logprobs, uintptr_t losses, uintptr_t logprobs, uintptr_t kl, uintptr_t clipped,
                     uintptr_t entropy, uintptr_t dlogits, float epsilon_low, float epsilon_high, float beta,
                     float temperature, float importance_cap, int num_threads) {
  mrpo::PolicyLossArgs args{};
  args.logits = pointer<const float>(logits);
  args.rows = rows;
  args.vocab = vocab;
  args.logits_stride = logits_stride;
  args.dlogits_stride = dlogits_stride;
  args.targets = pointer<const int64_t>(targets);
  args.advantages = {pointer<const float>(advantages), pointer<const int64_t>(segment_ends),
                     pointer<const int64_t>(tokens), num_segments};
  args.weights = pointer<const float>(weights);
  args.old_logprobs = pointer<const float>(old_logprobs);
  args.ref_logprobs = pointer<const float>(ref_logprobs);
  args.sampler_logprobs = pointer<const float>(sampler_logprobs);
  args.losses = pointer<float>(losses);
  args.logprobs = pointer<float>(logprobs);
  args.kl = pointer<float>(kl);
  args.clipped = pointer<bool>(clipped);
  args.entropy = pointer<float>(entropy);
  args.dlogits = pointer<float>(dlogits);
  args.config = {epsilon_low, epsilon_high, beta, temperature, importance_cap};
  py::gil_scoped_release release;
  mrpo::policy_loss_cpu(args, num_threads);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  using namespace pybind11::literals;
  module.doc() = "Compiled kernels of mrpo.kernels. Arguments are addresses of tensors; 0 stands for none.";
  module.def("policy_loss_cpu", &policy_loss_cpu, py::kw_only(), "logits"_a, "rows"_a, "vocab"_a, "logits_stride"_a,
             "dlogits_stride"_a, "targets"_a, "advantages"_a, "segment_ends"_a, "tokens"_a, "num_segments"_a,
             "weights"_a, "old_logprobs"_a, "ref_logprobs"_a, "sampler_logprobs"_a, "losses"_a, "logprobs"_a, "kl"_a,
             "clipped"_a, "entropy"_a, "dlogits"_a, "epsilon_low"_a, "epsilon_high"_a, "beta"_a, "temperature"_a,
             "importance_cap"_a, "num_threads"_a);
}
