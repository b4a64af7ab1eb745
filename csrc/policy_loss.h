// The clipped policy loss of one token, written once for host and device, and the arguments of its row kernels.
//
// loss = -c * min(ratio * A, clip(ratio, 1 - epsilon_low, 1 + epsilon_high) * A) + beta * (exp(d) - d - 1)
// with ratio = exp(logprob - old_logprob), d = ref_logprob - logprob (PPO's clip, Schulman's k3 estimate of the KL) and
// the constant c = min(exp(old_logprob - sampler_logprob), importance_cap), 1 without a sampler's log-probability.
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
  float importance_cap;
};

// One advantage per row, or one per segment of the flat list of tokens: segment s covers [ends[s-1], ends[s]).
struct Advantages {
  const float* values;    // [rows], or [num_segments]
  const int64_t* ends;    // [num_segments], ascending; null: one value per row
  const int64_t* tokens;  // [rows], the token of each row; null: row n is token n
  int64_t num_segments;

  MRPO_HOST_DEVICE float operator[](int64_t row) const {
    if (!ends) return values[row];
    const int64_t token = tokens ? tokens[row] : row;
    int64_t low = 0, high = num_segments - 1;  // the first end above `token`, or the last segment
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (ends[middle] <= token) {
        low = middle + 1;
      } else {
        high = middle;
      }
    }
    return values[low];
  }
};

struct TokenLoss {
  float loss;
  float dlogprob;  // d loss / d logprob
  float kl;
  bool clipped;
};

// A null pointer stands for "not given".
MRPO_HOST_DEVICE TokenLoss token_loss(float logprob, float old_logprob, const float* ref_logprob,
                                      const float* sampler_logprob, float advantage, const PolicyLossConfig& config) {
  TokenLoss out{0.f, 0.f, 0.f, false};
  if (advantage != 0.f) {  // a ratio that overflows must not meet a zero
    const float ratio = std::exp(logprob - old_logprob);
    const float lower = 1.f - config.epsilon_low, upper = 1.f + config.epsilon_high;
    out.clipped = advantage > 0.f ? ratio > upper : ratio < lower;
    const float importance = sampler_logprob ? std::exp(old_logprob - *sampler_logprob) : 1.f;
    const float scaled = advantage * (importance > config.importance_cap ? config.importance_cap : importance);
    out.loss = -scaled * (out.clipped ? (advantage > 0.f ? upper : lower) : ratio);
    out.dlogprob = out.clipped ? 0.f : -scaled * ratio;
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

// Raw pointers: N = rows, V = vocab. Nullable: the three log-probabilities of others, entropy, dlogits.
struct PolicyLossArgs {
  const float* logits;  // [N, V], rows `logits_stride` elements apart
  int64_t rows, vocab, logits_stride, dlogits_stride;
  const int64_t* targets;         // [N], in [0, V) wherever weights != 0
  Advantages advantages;
  const float* weights;           // [N]; a row of weight 0 is skipped and gives 0 everywhere
  const float* old_logprobs;      // [N]; null: the current ones, ratio 1
  const float* ref_logprobs;      // [N]
  const float* sampler_logprobs;  // [N]
  float* losses;                  // [N], weighted
  float* logprobs;                // [N]
  float* kl;                      // [N]
  bool* clipped;                  // [N]
  float* entropy;                 // [N], nats
  float* dlogits;                 // [N, V]: d sum(losses) / d logits; may be `logits`
  PolicyLossConfig config;
};

void policy_loss_cpu(const PolicyLossArgs& args, int num_threads);

}  // namespace mrpo
