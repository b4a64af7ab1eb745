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

// What the loss of N rows of V logits depends on beside the logits, and where it goes. Raw pointers; nullable: `ends`
// and `tokens` of the advantages, the three log-probabilities of others, entropy.
struct PolicyLossRows {
  int64_t rows, vocab, logits_stride, dlogits_stride;  // elements from one row to the next
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
  PolicyLossConfig config;
};

template <typename Logit>
struct PolicyLossArgs : PolicyLossRows {
  const Logit* logits;  // [N, V]
  Logit* dlogits;       // [N, V]: d sum(losses) / d logits; may be `logits`, or null
};

// One row's part of it; 0 for a log-probability that is not given.
struct Token {
  float weight, advantage, old_logprob, ref_logprob, sampler_logprob;
};

MRPO_HOST_DEVICE Token read_token(const PolicyLossRows& a, int64_t n) {
  return {a.weights[n], a.advantages[n], a.old_logprobs ? a.old_logprobs[n] : 0.f,
          a.ref_logprobs ? a.ref_logprobs[n] : 0.f, a.sampler_logprobs ? a.sampler_logprobs[n] : 0.f};
}

struct TokenLoss {
  float loss;
  float dlogprob;  // d loss / d logprob
  float kl;
  bool clipped;
};

MRPO_HOST_DEVICE TokenLoss token_loss(const PolicyLossRows& a, const Token& token, float logprob) {
  const PolicyLossConfig& config = a.config;
  TokenLoss out{0.f, 0.f, 0.f, false};
  if (token.advantage != 0.f) {  // a ratio that overflows must not meet a zero
    const bool wanted = token.advantage > 0.f;
    const float old_logprob = a.old_logprobs ? token.old_logprob : logprob;
    const float ratio = std::exp(logprob - old_logprob);
    const float lower = 1.f - config.epsilon_low, upper = 1.f + config.epsilon_high;
    out.clipped = wanted ? ratio > upper : ratio < lower;
    const float importance = a.sampler_logprobs ? std::exp(old_logprob - token.sampler_logprob) : 1.f;
    const float scaled = token.advantage * (importance > config.importance_cap ? config.importance_cap : importance);
    out.loss = -scaled * (out.clipped ? (wanted ? upper : lower) : ratio);
    out.dlogprob = out.clipped ? 0.f : -scaled * ratio;
  }
  if (a.ref_logprobs) {
    const float d = token.ref_logprob - logprob;
    out.kl = std::expm1(d) - d;
    if (config.beta != 0.f) {
      out.loss += config.beta * out.kl;
      out.dlogprob -= config.beta * std::expm1(d);
    }
  }
  return out;
}

// The outputs of a row, all but its gradient and its entropy.
MRPO_HOST_DEVICE void write_token(const PolicyLossRows& a, int64_t n, float weight, float logprob,
                                  const TokenLoss& token) {
  a.losses[n] = weight * token.loss;
  a.logprobs[n] = logprob;
  a.kl[n] = token.kl;
  a.clipped[n] = token.clipped;
}

// The same of a row of weight 0, its entropy too.
MRPO_HOST_DEVICE void write_skipped(const PolicyLossRows& a, int64_t n) {
  write_token(a, n, 0.f, 0.f, {});
  if (a.entropy) a.entropy[n] = 0.f;
}

void policy_loss_cpu(const PolicyLossArgs<float>& args, int num_threads);

}  // namespace mrpo
