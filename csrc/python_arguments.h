// The arguments of a row kernel as they come from Python: addresses of tensors, 0 for none, and numbers.
#pragma once

#include <pybind11/pybind11.h>

#include "policy_loss.h"

namespace mrpo {

template <typename T>
T* pointer(const pybind11::kwargs& arguments, const char* name) {
  return reinterpret_cast<T*>(arguments[name].cast<uintptr_t>());
}

// Raises KeyError for one that is missing.
template <typename Logit>
PolicyLossArgs<Logit> policy_loss_args(const pybind11::kwargs& arguments) {
  const auto integer = [&](const char* name) { return arguments[name].cast<int64_t>(); };
  const auto number = [&](const char* name) { return arguments[name].cast<float>(); };
  PolicyLossArgs<Logit> args{};
  args.logits = pointer<const Logit>(arguments, "logits");
  args.rows = integer("rows");
  args.vocab = integer("vocab");
  args.logits_stride = integer("logits_stride");
  args.dlogits_stride = integer("dlogits_stride");
  args.targets = pointer<const int64_t>(arguments, "targets");
  args.advantages = {pointer<const float>(arguments, "advantages"), pointer<const int64_t>(arguments, "segment_ends"),
                     pointer<const int64_t>(arguments, "tokens"), integer("num_segments")};
  args.weights = pointer<const float>(arguments, "weights");
  args.old_logprobs = pointer<const float>(arguments, "old_logprobs");
  args.ref_logprobs = pointer<const float>(arguments, "ref_logprobs");
  args.sampler_logprobs = pointer<const float>(arguments, "sampler_logprobs");
  args.losses = pointer<float>(arguments, "losses");
  args.logprobs = pointer<float>(arguments, "logprobs");
  args.kl = pointer<float>(arguments, "kl");
  args.clipped = pointer<bool>(arguments, "clipped");
  args.entropy = pointer<float>(arguments, "entropy");
  args.dlogits = pointer<Logit>(arguments, "dlogits");
  args.config = {number("epsilon_low"), number("epsilon_high"), number("beta"), number("temperature"),
                 number("importance_cap")};
  return args;
}

}  // namespace mrpo
