// The clipped policy loss of one token, written once for host and device, and the arguments of its row kernels.
//
// loss = -min(ratio * A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) * A) + beta * (exp(d) - d - 1)
// with ratio = exp(logprob - old_logprob) and d = ref_logprob - logprob (PPO's clip, Schulman's k3 estimate of the KL).
#pragma once

#include <cmath>
#include <cstdint>

#ifdef __CUDACC__
#define MRPO_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define MRPO_HOST_DEVICE inline
#endif

namespace mrpo {

struct PolicyLossConfig {
  float epsilon_low;
  float epsilon_high;
  float beta;
  float temperature;
};

struct TokenLoss {
  float loss;
  float dlogprob;  // d loss / d logprob
  float kl;
  bool clipped;
};

MRPO_HOST_DEVICE TokenLoss token_loss(float logprob, float old_logprob, const float* ref_logprob, float advantage,
                                      const PolicyLossConfig& config) {
  TokenLoss out{0.f, 0.f, 0.f, false};
  if (advantage != 0.f) {  // a ratio that overflows must not meet a zero
    const float ratio = std::exp(logprob - old_logprob);
    const float lower = 1.f - config.epsilon_low, upper = 1.f + config.epsilon_high;
    out.clipped = advantage > 0.f ? ratio > upper : ratio < lower;
    out.loss = -advantage * (out.clipped ? (advantage > 0.f ? upper : lower) : ratio);
    out.dlogprob = out.clipped ? 0.f : -advantage * ratio;
  }
  if (ref_logprob) {
    const float d = *ref_logprob - logprob;
    out.kl = std::expm1(d) - d;
    if (config.beta != 0.f) {
      out.loss += config.beta * out.kl;
      out.dlogprob -= config.beta * std::expm1(d);
    }
  }
  return out;
}

// Raw pointers: N = rows, V = vocab. Nullable: old_logprobs, ref_logprobs, dlogits, entropy.
struct PolicyLossArgs {
  const float* logits;  // [N, V], rows `row_stride` elements apart
  int64_t rows, vocab, row_stride;
  const int64_t* targets;    // [N], in [0, V) wherever weights != 0
  const float* advantages;   // [N]
  const float* weights;      // [N]; a row of weight 0 is skipped and gives 0 everywhere
  const float* old_logprobs;  // [N]; null: the current ones, ratio 1
  const float* ref_logprobs;  // [N]
  float* losses;     // [N], weighted
  float* logprobs;   // [N]
  float* kl;         // [N]
  bool* clipped;     // [N]
  float* entropy;    // [N], nats
  float* dlogits;    // [N, V] contiguous: d sum(losses) / d logits
  PolicyLossConfig config;
};

void policy_loss_cpu(const PolicyLossArgs& args, int num_threads);

}  // namespace mrpo
