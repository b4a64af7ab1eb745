// The policy loss on the CPU: one OpenMP task a row, vectorised over the vocabulary.
//
// A row is read from memory once (running maximum and sum of exponentials, block by block) and once more from cache to
// write its gradient, in its place if so asked. The target's column is kept out of the sum: for a confident policy
// 1 - p(target) would otherwise be a difference of nearly equal numbers, and it is the whole gradient. Blocks are summed
// in fp32, their sums in fp64. The order of every sum depends on V and the instruction set alone, so any number of
// threads gives the same bits.
#include "policy_loss.h"

#include <algorithm>
#include <cstring>
#include <limits>

// One build runs anywhere and takes the widest vectors it finds there, where compiler and libc can dispatch.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#define MRPO_MULTIVERSION __attribute__((target_clones("avx512f", "arch=haswell", "default")))
#else
#define MRPO_MULTIVERSION
#endif
#define MRPO_INLINE inline __attribute__((always_inline))

namespace mrpo {
namespace {

constexpr int64_t kBlock = 1024;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// exp(x) for x <= 0 within 2 ulp, as arithmetic that a compiler can vectorise; 0 below the smallest normal, NaN stays.
// Cody-Waite reduction to |r| <= ln(2)/2 and the polynomial of Cephes' expf (Moshier).
MRPO_INLINE float exp_nonpositive(float x) {
  constexpr float kSmallest = -87.33654f, kRoundToInteger = 12582912.f;  // 1.5 * 2^23
  const float clamped = x < kSmallest ? kSmallest : x;
  const float shifted = clamped * 1.44269504f + kRoundToInteger;
  const float n = shifted - kRoundToInteger;
  const float r = (clamped - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  uint32_t exponent;
  std::memcpy(&exponent, &shifted, sizeof exponent);  // the integer sits in the low bits of `shifted`
  exponent = (exponent + 127u) << 23;
  float power;
  std::memcpy(&power, &exponent, sizeof power);
  return x < kSmallest ? 0.f : p * power;
}

struct RowSum {
  float max = -kInfinity;
  double others = 0.0;  // sum of exp((x - max) * scale) over every column but the target's
};

MRPO_INLINE RowSum sum_exp(const float* x, int64_t count, int64_t target, float scale) {
  RowSum row;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const float* block = x + begin;
    const int size = int(std::min(kBlock, count - begin));
    float block_max = row.max;
#pragma omp simd reduction(max : block_max)
    for (int i = 0; i < size; ++i) block_max = block[i] > block_max ? block[i] : block_max;
    if (block_max > row.max) {
      row.others *= std::exp((double(row.max) - block_max) * scale);
      row.max = block_max;
    }
    const float pivot = row.max == -kInfinity ? 0.f : row.max;  // -inf - -inf is NaN; a NaN logit must still show
    const int skipped = int(target - begin);  // may lie outside the block
    float block_sum = 0.f;
#pragma omp simd reduction(+ : block_sum)
    for (int i = 0; i < size; ++i) {
      const float e = exp_nonpositive((block[i] - pivot) * scale);
      block_sum += i == skipped ? 0.f : e;
    }
    row.others += block_sum;
  }
  return row;
}

// -sum(p log p) of a row, given its maximum and sum of exponentials.
MRPO_INLINE float row_entropy(const float* x, int64_t count, float max, double sum, float scale) {
  double total = 0.0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const float* block = x + begin;
    const int size = int(std::min(kBlock, count - begin));
    float block_total = 0.f;
#pragma omp simd reduction(+ : block_total)
    for (int i = 0; i < size; ++i) {
      const float d = (block[i] - max) * scale;
      block_total += exp_nonpositive(d) * (d < -100.f ? -100.f : d);  // 0 * -inf is NaN
    }
    total += block_total;
  }
  return float(std::log(sum) - total / sum);
}

MRPO_INLINE void scaled_softmax(const float* x, int64_t count, float max, float scale, float factor, float* out) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = exp_nonpositive((x[i] - max) * scale) * factor;
}

using Args = PolicyLossArgs<float>;

void skip_row(const Args& a, int64_t n) {
  write_skipped(a, n);
  if (a.dlogits) std::fill_n(a.dlogits + n * a.dlogits_stride, a.vocab, 0.f);
}

MRPO_MULTIVERSION void loss_row(const Args& a, int64_t n) {
  const float* x = a.logits + n * a.logits_stride;
  const int64_t target = a.targets[n];
  const float scale = 1.f / a.config.temperature;

  const RowSum row = sum_exp(x, a.vocab, target, scale);
  const double target_logit = (double(x[target]) - row.max) * scale;
  const double sum = row.others + std::exp(target_logit);
  const float logprob = float(target_logit - std::log(sum));

  const Token token = read_token(a, n);
  const TokenLoss loss = token_loss(a, token, logprob);
  write_token(a, n, token.weight, logprob, loss);
  if (a.entropy) a.entropy[n] = row_entropy(x, a.vocab, row.max, sum, scale);
  if (!a.dlogits) return;

  float* dx = a.dlogits + n * a.dlogits_stride;
  const float coefficient = token.weight * loss.dlogprob * scale;
  if (coefficient == 0.f) {  // clipped, or no advantage: nothing to learn, nothing to compute
    std::fill_n(dx, a.vocab, 0.f);
    return;
  }
  scaled_softmax(x, a.vocab, row.max, scale, float(-coefficient / sum), dx);
  dx[target] = float(coefficient * (row.others / sum));
}

}  // namespace

void policy_loss_cpu(const Args& args, int num_threads) {
#pragma omp parallel for schedule(static) num_threads(num_threads)
  for (int64_t n = 0; n < args.rows; ++n) {
    if (args.weights[n] == 0.f) {
      skip_row(args, n);
    } else {
      loss_row(args, n);
    }
  }
}

}  // namespace mrpo
