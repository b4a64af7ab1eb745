// The softmax of a row in pieces: what both CUDA kernels do with 16-byte vectors of logits, with partial sums, and with
// the sums of a whole row. All is fp32, in powers of 2: z = x * scale - pivot with scale = log2(e) / temperature.
//
// The target's column is kept out of the sums: for a confident policy 1 - p(target) would otherwise be a difference of
// nearly equal numbers, and it is the whole gradient. The sums' callers put -inf in its place, so that no column is
// compared with the target.
#pragma once

#include "cuda_primitives.cuh"
#include "policy_loss.h"

namespace mrpo {

constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kMinusInfinity = -INFINITY;
constexpr float kLowest = -1e30f;  // a pivot to start from: -inf - -inf would be NaN
constexpr float kFar = -200.f;     // 2^kFar is 0 in fp32, and times a number that is no infinity it stays 0

template <typename Logit>
constexpr int kPerVector = 16 / sizeof(Logit);

// Where the 16-byte vectors of a row begin and how many elements stand alone on its two sides.
template <typename Logit>
struct Span {
  int head, vectors, tail;

  __device__ Span(const Logit* row, int vocab) {
    const int beyond = int(reinterpret_cast<uintptr_t>(row) % 16);
    head = beyond == 0 ? 0 : int((16 - beyond) / sizeof(Logit));
    head = head < vocab ? head : vocab;
    vectors = (vocab - head) / kPerVector<Logit>;
    tail = vocab - head - vectors * kPerVector<Logit>;
  }

  // Lanes 0-15 take the elements before the vectors, lanes 16-31 those behind; -1: none.
  __device__ int edge_column(int lane) const {
    const bool behind = lane >= 16;
    const int i = behind ? lane - 16 : lane;
    if (i >= (behind ? tail : head)) return -1;
    return behind ? head + vectors * kPerVector<Logit> + i : i;
  }
};

template <typename Logit>
__device__ __forceinline__ void unpack(uint4 vector, float* out) {
  constexpr int kPerWord = 4 / sizeof(Logit);
  unpack(vector.x, out, Logit());
  unpack(vector.y, out + kPerWord, Logit());
  unpack(vector.z, out + 2 * kPerWord, Logit());
  unpack(vector.w, out + 3 * kPerWord, Logit());
}

template <typename Logit>
__device__ __forceinline__ uint4 pack(const float* x) {
  constexpr int kPerWord = 4 / sizeof(Logit);
  return {pack(x, Logit()), pack(x + kPerWord, Logit()), pack(x + 2 * kPerWord, Logit()),
          pack(x + 3 * kPerWord, Logit())};
}

template <typename Logit>
__device__ __forceinline__ uint4 minus_infinities() {
  float x[kPerVector<Logit>];
#pragma unroll
  for (int i = 0; i < kPerVector<Logit>; ++i) x[i] = kMinusInfinity;
  return pack<Logit>(x);
}

// Of some columns, the target's not among them: the largest x * scale, but at least kLowest; the sum of 2^z; and, for
// the entropy, the sum of z 2^z.
struct RunningSum {
  float pivot = kLowest, sum = 0.f, moment = 0.f;

  __device__ __forceinline__ void raise_pivot(float higher) {
    const float fall = pivot - higher, factor = exp2_approx(fall);
    moment = (moment + fall * sum) * factor;
    sum *= factor;
    pivot = higher;
  }

  template <bool kEntropy, int kCount>
  __device__ __forceinline__ void add(const float (&x)[kCount], float scale) {
    float largest = x[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) largest = fmaxf(largest, x[i]);
    largest = fmaxf(largest * scale, kLowest);
    if (largest > pivot) raise_pivot(largest);
    constexpr int kChains = kCount < 4 ? kCount : 4;  // independent additions follow each other without waiting
    float sums[kChains] = {}, moments[kChains] = {};
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float z = fmaf(x[i], scale, -pivot), power = exp2_approx(z);
      sums[i % kChains] += power;
      if (kEntropy) moments[i % kChains] += fmaxf(z, kFar) * power;
    }
#pragma unroll
    for (int i = 0; i < kChains; ++i) {
      sum += sums[i];
      if (kEntropy) moment += moments[i];
    }
  }

  __device__ __forceinline__ void join(RunningSum other) {
    const float higher = fmaxf(pivot, other.pivot);
    raise_pivot(higher);
    other.raise_pivot(higher);
    sum += other.sum;
    moment += other.moment;
  }

  // The sum over the lanes of a warp, the same bits in each.
  __device__ __forceinline__ void join_lanes() {
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) {
      RunningSum other;
      other.pivot = shuffle_xor(pivot, mask);
      other.sum = shuffle_xor(sum, mask);
      other.moment = shuffle_xor(moment, mask);
      join(other);
    }
  }
};

// d loss / d logit is factor * 2^(x * scale - pivot) in every column but the target's.
struct RowGradient {
  float pivot, factor, at_target, coefficient;

  // Clipped, or no advantage: exactly 0, and `of`, which would make NaN of a NaN logit, is not asked.
  __device__ __forceinline__ bool is_zero() const { return coefficient == 0.f; }

  template <int kCount>
  __device__ __forceinline__ void of(const float (&x)[kCount], float scale, float (&out)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) out[i] = exp2_approx(fmaf(x[i], scale, -pivot)) * factor;
  }

  // At one column.
  __device__ __forceinline__ float at(float x, bool is_target, float scale) const {
    if (is_zero() || is_target) return at_target;
    return exp2_approx(fmaf(x, scale, -pivot)) * factor;
  }
};

// log(2^target / (2^target + others)), and accurate where that is nearly 0; the largest logit is at 2^0.
__device__ __forceinline__ float log_probability(float target, float others) {
  const float nats = target * kLn2;
  if (nats < -60.f) return nats - logf(others);  // its own part of the sum is below the resolution
  return -log1pf(others * expf(-nats));
}

// From the sums over a whole row to its outputs, written by one thread, and to its gradient.
__device__ __forceinline__ RowGradient finish_row(const PolicyLossRows& args, int64_t row, const Token& token,
                                                  RunningSum others, float target_logit, float scale, bool writes) {
  others.raise_pivot(fmaxf(others.pivot, target_logit * scale));
  const float target_z = fmaf(target_logit, scale, -others.pivot), target_power = exp2_approx(target_z);
  const float total = others.sum + target_power;
  const float logprob = log_probability(target_z, others.sum);
  const TokenLoss loss = token_loss(args, token, logprob);
  if (writes) {
    write_token(args, row, token.weight, logprob, loss);
    if (args.entropy) {
      const float moment = others.moment + fmaxf(target_z, kFar) * target_power;
      args.entropy[row] = logf(total) - kLn2 * moment / total;
    }
  }
  const float coefficient = token.weight * loss.dlogprob / args.config.temperature;
  if (coefficient == 0.f) return {};  // nor does 0 times the NaN of a NaN logit reach the target's column
  return {others.pivot, -coefficient / total, coefficient * (others.sum / total), coefficient};
}

}  // namespace mrpo
