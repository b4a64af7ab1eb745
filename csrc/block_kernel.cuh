// The policy loss on any GPU: one block a row, which it reads twice; the second time, last columns first, much of it
// comes from the L2 cache. It also serves rows that no cluster can hold, and gradients whose rows begin at other
// distances from a multiple of 16 bytes than those of the logits.
#pragma once

#include "row_arithmetic.cuh"

namespace mrpo {

constexpr int kBlockThreads = 512;

template <typename Logit>
__device__ __forceinline__ uint4 with_element(uint4 vector, int index, float value) {
  float x[kPerVector<Logit>];
  unpack<Logit>(vector, x);
#pragma unroll
  for (int i = 0; i < kPerVector<Logit>; ++i) x[i] = i == index ? value : x[i];
  return pack<Logit>(x);
}

// Writes elements of `row` from `column` on, in one piece where the address allows.
template <typename Logit>
__device__ __forceinline__ void store_vector(Logit* row, int column, uint4 vector) {
  Logit* out = row + column;
  if (reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    store_streaming(reinterpret_cast<uint4*>(out), vector);
    return;
  }
  float x[kPerVector<Logit>];
  unpack<Logit>(vector, x);
#pragma unroll
  for (int i = 0; i < kPerVector<Logit>; ++i) from_float(x[i], out[i]);
}

// The sum over a block, the same bits in every thread. `partial` holds one element a warp.
__device__ __forceinline__ void join_block(RunningSum& sum, RunningSum* partial) {
  const int lane = thread_index() % kLanes, warp = thread_index() / kLanes, warps = block_size() / kLanes;
  sum.join_lanes();
  if (lane == 0) partial[warp] = sum;
  sync_block();
  sum = lane < warps ? partial[lane] : RunningSum();
  sum.join_lanes();
}

template <typename Logit, bool kEntropy>
__global__ void __launch_bounds__(kBlockThreads) block_kernel(const __grid_constant__ PolicyLossArgs<Logit> args) {
  constexpr int kVectors = 4;  // in flight a thread
  constexpr int kElements = kPerVector<Logit>;
  const int64_t row = block_index();
  const Logit* x = args.logits + row * args.logits_stride;
  Logit* dx = args.dlogits ? args.dlogits + row * args.dlogits_stride : nullptr;
  const int thread = thread_index(), threads = block_size(), vocab = int(args.vocab);
  const Span<Logit> span(x, vocab);
  const uint4* vectors = reinterpret_cast<const uint4*>(x + span.head);
  const int edge = thread < kLanes ? span.edge_column(thread) : -1;

  if (args.weights[row] == 0.f) {
    if (thread == 0) write_skipped(args, row);
    if (!dx) return;
    for (int v = thread; v < span.vectors; v += threads) store_vector(dx, span.head + v * kElements, {});
    if (edge >= 0) from_float(0.f, dx[edge]);
    return;
  }

  const float scale = kLog2E / args.config.temperature;
  const int target = int(args.targets[row]);
  const float target_logit = to_float(x[target]);
  RunningSum sum;
  for (int first = thread; first < span.vectors; first += kVectors * threads) {
    uint4 batch[kVectors];
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int v = first + k * threads;
      batch[k] = v < span.vectors ? vectors[v] : minus_infinities<Logit>();
    }
#pragma unroll
    for (int k = 0; k < kVectors; ++k) {
      const int inside = target - span.head - (first + k * threads) * kElements;
      if (inside >= 0 && inside < kElements) batch[k] = with_element<Logit>(batch[k], inside, kMinusInfinity);
      float values[kElements];
      unpack<Logit>(batch[k], values);
      sum.add<kEntropy>(values, scale);
    }
  }
  const float alone = edge >= 0 ? to_float(x[edge]) : kMinusInfinity;
  const float others[1] = {edge == target ? kMinusInfinity : alone};
  sum.add<kEntropy>(others, scale);
  join_block(sum, reinterpret_cast<RunningSum*>(shared_memory()));

  const RowGradient gradient = finish_row(args, row, read_token(args, row), sum, target_logit, scale, thread == 0);
  if (!dx) return;
  if (edge >= 0) from_float(gradient.at(alone, edge == target, scale), dx[edge]);
  const int last = (span.vectors - 1 - thread) / threads * threads + thread;  // of this thread; none if below `thread`
  for (int v = span.vectors > thread ? last : -1; v >= 0; v -= threads) {
    float values[kElements], out[kElements] = {};
    if (!gradient.is_zero()) {
      unpack<Logit>(load_streaming(vectors + v), values);
      gradient.of(values, scale, out);
    }
    uint4 packed = pack<Logit>(out);
    const int inside = target - span.head - v * kElements;
    if (inside >= 0 && inside < kElements) packed = with_element<Logit>(packed, inside, gradient.at_target);
    store_vector(dx, span.head + v * kElements, packed);
  }
}

}  // namespace mrpo
