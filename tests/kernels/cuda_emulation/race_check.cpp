// Both kernels over the emulation, for ThreadSanitizer, which ends the process with an error if it sees a race.
#include <cstdio>

#include "block_kernel.cuh"
#include "cluster_kernel.cuh"

namespace {

using namespace mrpo;

// Rows of `vocab` bf16 logits that begin `offset` elements behind a multiple of 16 bytes.
struct Case {
  static constexpr int kRows = 9;
  std::vector<bfloat16> memory;
  std::vector<int64_t> targets = std::vector<int64_t>(kRows);
  std::vector<float> values = std::vector<float>(kRows, 1.f), weights = values, losses = values, logprobs = values,
                     kl = values, entropy = values;
  bool clipped[kRows];
  PolicyLossArgs<bfloat16> args{};

  Case(int vocab, int offset, bool gradient) : memory(size_t(kRows * vocab + 16)) {
    for (size_t i = 0; i < memory.size(); ++i) from_float(float(i % 97) / 16.f, memory[i]);
    for (int n = 0; n < kRows; ++n) targets[size_t(n)] = (n * 1237) % vocab;
    weights[3] = 0.f;
    const auto begin = reinterpret_cast<uintptr_t>(memory.data());
    bfloat16* logits = reinterpret_cast<bfloat16*>((begin + 15) / 16 * 16) + offset;
    args.rows = kRows;
    args.vocab = args.logits_stride = args.dlogits_stride = vocab;
    args.targets = targets.data();
    args.advantages = {values.data(), nullptr, nullptr, 0};
    args.weights = weights.data();
    args.losses = losses.data();
    args.logprobs = logprobs.data();
    args.kl = kl.data();
    args.clipped = clipped;
    args.entropy = entropy.data();
    args.config = {0.2f, 0.2f, 0.f, 1.f, 2.f};
    args.logits = logits;
    args.dlogits = gradient ? logits : nullptr;
  }
};

void check_clusters(int vocab, int offset, bool gradient, int blocks, int warps, uint32_t seed) {
  Case c(vocab, offset, gradient);
  const int slots = needed_slots(2 * vocab, blocks, warps) + int(seed % 2);
  const auto kernel = [&] { cluster_kernel<bfloat16, true>(c.args, slots); };
  const int shared = SharedLayout(blocks, warps, slots).bytes;
  emulation::launch(kernel, blocks, blocks, (warps + 1) * kLanes, shared, seed, 0.05);
}

void check_blocks(int vocab, int offset, uint32_t seed) {
  Case c(vocab, offset, true);
  const auto kernel = [&] { block_kernel<bfloat16, true>(c.args); };
  emulation::launch(kernel, Case::kRows, 1, 2 * kLanes, 2 * int(sizeof(RunningSum)), seed, 0.05);
}

}  // namespace

int main() {
  for (uint32_t seed = 0; seed < 2; ++seed) {
    check_clusters(5003, 3, true, 2, 1, seed);
    check_clusters(5003, 3, false, 2, 1, seed);
    check_clusters(4096, 0, true, 1, 2, seed);
    check_clusters(1100, 5, true, 2, 2, seed);  // more warps than chunks
    check_blocks(1203, 3, seed);
  }
  std::puts("no race");
}
