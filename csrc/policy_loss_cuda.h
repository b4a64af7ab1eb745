// The policy loss on a CUDA device, for those who know nothing of CUDA.
#pragma once

#include <array>
#include <string>

#include "policy_loss.h"

namespace mrpo {

// Queues the kernel on a stream (a cudaStream_t) of the device. Logits and gradient have the dtype of that name in
// PyTorch; everything else is as in PolicyLossArgs. `cluster` overrides how a cluster is laid out: blocks of a cluster,
// warps of a block, slots of a warp; null: the kernel's own choice; blocks 0: no clusters. Returns what went wrong, or
// "".
std::string policy_loss_cuda(const PolicyLossArgs<void>& args, const std::string& dtype, int device, void* stream,
                             const std::array<int, 3>* cluster);

}  // namespace mrpo
