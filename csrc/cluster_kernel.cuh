// The policy loss on Hopper and newer: a row is read from device memory once and stays on chip, spread over the shared
// memory of a thread-block cluster, until its gradient is written, once.
//
// Clusters are persistent and walk over the rows. A row is cut into chunks that are dealt out to the warps of the
// cluster. Each warp moves its own chunks by bulk copies through a ring of slots in shared memory and waits for nobody
// but its own copies:
//
//     sum row i      chunk by chunk, as they arrive; then tell every block of the cluster the warp's partial sums
//     write row i-1  turn its chunks into gradients where they lie, send them out, refill their slots with rows to come
//
// One more warp in each block, the finisher, joins the partial sums of row i, computes its loss and hands the factors
// of the gradient to its block's warps, while these already sum row i+1. So loads, stores, arithmetic and the exchange
// within the cluster overlap, and no barrier stops a whole block. Every sum has a fixed order: two runs give the same
// bits.
//
// Bytes for N rows of V logits of s bytes: sNV read, and sNV written with a gradient; two exponentials an element.
#pragma once

#include "row_arithmetic.cuh"

namespace mrpo {

constexpr int kChunkVectors = 4;  // of a lane
constexpr int kChunkBytes = kChunkVectors * kLanes * 16;
constexpr int kMaxWarps = 12;  // with more, registers spill
constexpr int kMaxClusterThreads = (kMaxWarps + 1) * kLanes;
constexpr int kMaxClusterSize = 8;
constexpr int kStoresInFlight = 2;  // of a warp; their slots are not free yet
// Rows whose sums are kept apart. A warp tells its sums of row i after it has written row i-2, so after every warp of
// the cluster has told those of row i-2, so after each has written row i-4 and each finisher has read the sums of i-4.
constexpr int kRowsInFlight = 4;

// How a cluster is laid out: blocks of a cluster, warps of a block beside the finisher, slots of a warp's ring.
struct ClusterShape {
  int blocks = 0, warps = 0, slots = 0;

  int threads() const { return (warps + 1) * kLanes; }
};

MRPO_HOST_DEVICE int divided_up(int64_t count, int parts) { return int((count + parts - 1) / parts); }

// Where things lie in a block's shared memory.
struct SharedLayout {
  int sums, gradients, loaded, sums_told, gradient_told, bytes;

  MRPO_HOST_DEVICE SharedLayout(int blocks, int warps, int slots) {
    sums = warps * slots * kChunkBytes;  // behind the chunks
    gradients = sums + kRowsInFlight * blocks * warps * int(sizeof(float4));
    loaded = gradients + kRowsInFlight * int(sizeof(RowGradient));
    sums_told = loaded + warps * slots * int(sizeof(Barrier));
    gradient_told = sums_told + kRowsInFlight * int(sizeof(Barrier));
    bytes = gradient_told + kRowsInFlight * int(sizeof(Barrier));
  }
};

// The most chunks of a row that one warp has.
inline int chunks_of_warp(int64_t row_bytes, int blocks, int warps) {
  return divided_up(divided_up(row_bytes, kChunkBytes), blocks * warps);
}

// Two rows and the chunks that are being stored must fit a ring at once.
inline int needed_slots(int64_t row_bytes, int blocks, int warps) {
  return 2 * chunks_of_warp(row_bytes, blocks, warps) + kStoresInFlight;
}

inline int fitting_slots(int shared_bytes, int blocks, int warps) {
  const int fixed = SharedLayout(blocks, warps, 0).bytes;
  return (shared_bytes - fixed) / (warps * (kChunkBytes + int(sizeof(Barrier))));
}

// The fewest blocks that hold three rows, one of them on its way; else the fewest that hold two and one chunk a warp
// more; no blocks where no cluster can. Few large parts of a row cost less around each row and share out more evenly;
// two warps for each of a multiprocessor's four schedulers are the fewest that hide each other's waits. Not yet
// measured: these are the numbers to sweep.
inline ClusterShape cluster_shape(int64_t row_bytes, int shared_bytes) {
  const int chunks = divided_up(row_bytes, kChunkBytes), warps = chunks < 8 ? chunks : 8;
  for (const bool roomy : {true, false}) {
    for (int blocks = 1; blocks <= kMaxClusterSize; blocks *= 2) {
      const int needed = needed_slots(row_bytes, blocks, warps);
      const int wanted = needed + (roomy ? chunks_of_warp(row_bytes, blocks, warps) : 1);
      const int fitting = fitting_slots(shared_bytes, blocks, warps);
      if (fitting >= wanted) return {blocks, warps, blocks == 1 ? wanted : fitting};
    }
  }
  return {};
}

// Whether logits and gradient begin at the same distance from a multiple of 16 bytes in every row.
template <typename Logit>
bool is_aligned_alike(const PolicyLossArgs<Logit>& args) {
  const auto distance = reinterpret_cast<intptr_t>(args.dlogits) - reinterpret_cast<intptr_t>(args.logits);
  const int64_t growth = (args.dlogits_stride - args.logits_stride) * int64_t(sizeof(Logit));
  return !args.dlogits || (distance % 16 == 0 && (growth % 16 == 0 || args.rows == 1));
}

#ifdef MRPO_CLUSTERS

// The rows of weight 0, or all others, among those that a cluster handles: every `stride`-th, in order. A warp walks
// together and looks at 32 weights at a time.
class RowWalk {
 public:
  __device__ RowWalk(const PolicyLossRows& args, bool zeros = false)
      : weights_(args.weights), zeros_(zeros), rows_(args.rows), stride_(num_blocks() / cluster_size()),
        ahead_(block_index() / cluster_size()) {}

  // -1 when there are no more.
  __device__ __forceinline__ int64_t next() {
    while (!found_) {
      if (ahead_ >= rows_) return -1;
      const int64_t mine = ahead_ + thread_index() % kLanes * stride_;
      found_ = ballot(mine < rows_ && (weights_[mine] == 0.f) == zeros_);
      first_ = ahead_;
      ahead_ += kLanes * stride_;
    }
    const int64_t row = first_ + lowest_bit(found_) * stride_;
    found_ &= found_ - 1;
    return row;
  }

 private:
  const float* weights_;
  bool zeros_;
  int64_t rows_, stride_, ahead_, first_ = 0;  // `ahead_` has not been looked at
  uint32_t found_ = 0;                         // bit l: row first_ + l * stride
};

// A place in a ring, and the parity of its barrier there.
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ void advance(int slots) {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// What a block's shared memory holds.
struct ClusterMemory {
  unsigned char* chunks;   // [warps, slots, kChunkBytes]
  float4* sums;            // [kRowsInFlight, blocks * warps]: pivot, sum, moment, logit of the target where it is
  RowGradient* gradients;  // [kRowsInFlight]
  Barrier* loaded;         // [warps, slots]
  Barrier* sums_told;      // [kRowsInFlight]
  Barrier* gradient_told;  // [kRowsInFlight]

  __device__ ClusterMemory(unsigned char* memory, const SharedLayout& at)
      : chunks(memory),
        sums(reinterpret_cast<float4*>(memory + at.sums)),
        gradients(reinterpret_cast<RowGradient*>(memory + at.gradients)),
        loaded(reinterpret_cast<Barrier*>(memory + at.loaded)),
        sums_told(reinterpret_cast<Barrier*>(memory + at.sums_told)),
        gradient_told(reinterpret_cast<Barrier*>(memory + at.gradient_told)) {}
};

// A warp that moves chunks. Chunk c of a row belongs to warp c % team of the cluster's `team` warps.
template <typename Logit, bool kEntropy>
class ChunkWarp {
  static constexpr int kElements = kPerVector<Logit>;
  static constexpr int kChunkLength = kChunkVectors * kLanes;
  static constexpr int kChunkElements = kChunkLength * kElements;

 public:
  __device__ ChunkWarp(const PolicyLossArgs<Logit>& args, const ClusterMemory& memory, int warp, int slots)
      : args_(args), memory_(memory), lane_(thread_index() % kLanes), slots_(slots),
        team_(cluster_size() * (block_size() / kLanes - 1)), member_(warp * cluster_size() + cluster_rank()),
        vocab_(int(args.vocab)), scale_(kLog2E / args.config.temperature),
        ring_(memory.chunks + warp * slots * kChunkBytes), loaded_(memory.loaded + warp * slots),
        rows_to_load_(args) {}

  __device__ void run() {
    begin_loading_row();
    load();
    RowWalk rows(args_);
    Row row = row_at(rows.next()), previous;
    for (uint32_t order = 0; row.index >= 0 || previous.index >= 0; ++order) {
      Row next;
      if (row.index >= 0) {
        next = row_at(rows.next());  // its target is on its way while this row is summed
        sum(row, order);
      }
      if (previous.index >= 0) write(previous, order - 1);
      previous = row;
      row = next;
    }
    if (lane_ == 0) bulk_wait_all();
    skip_rows();
  }

 private:
  struct Row {
    int64_t index = -1;
    int target = 0;
    float edge = kMinusInfinity;  // this lane's element before or behind the vectors
  };

  __device__ Row row_at(int64_t index) const {
    Row row;
    row.index = index;
    if (index >= 0) row.target = int(args_.targets[index]);
    return row;
  }

  __device__ Logit* slot_at(const RingPlace& place) const {
    return reinterpret_cast<Logit*>(ring_ + place.slot * kChunkBytes);
  }
  __device__ bool takes_edges() const { return member_ == team_ - 1; }  // it has the fewest chunks
  __device__ const Logit* logits(int64_t row) const { return args_.logits + row * args_.logits_stride; }

  // Moves the place to load from to the next row of which this warp has chunks.
  __device__ __forceinline__ void begin_loading_row() {
    do {
      const int64_t row = rows_to_load_.next();
      source_ = row < 0 ? nullptr : logits(row);
      if (!source_) return;
      const Span<Logit> span(source_, vocab_);
      source_ += span.head + member_ * kChunkElements;
      vectors_to_load_ = span.vectors - member_ * kChunkLength;
    } while (vectors_to_load_ <= 0);
  }

  // Fills every free slot.
  __device__ __forceinline__ void load() {
    while (held_ < slots_ && source_) {
      if (lane_ == 0) {
        const uint32_t bytes = min(vectors_to_load_, kChunkLength) * 16;
        barrier_arrive_expecting(loaded_ + to_load_.slot, bytes);
        bulk_load(slot_at(to_load_), source_, bytes, loaded_ + to_load_.slot);
      }
      to_load_.advance(slots_);
      ++held_;
      source_ += team_ * kChunkElements;
      vectors_to_load_ -= team_ * kChunkLength;
      if (vectors_to_load_ <= 0) begin_loading_row();
    }
  }

  // This warp's part of a row's sums, told to every block of the cluster.
  __device__ __forceinline__ void sum(Row& row, uint32_t order) {
    const Logit* x = logits(row.index);
    const Span<Logit> span(x, vocab_);
    const int column = takes_edges() ? span.edge_column(lane_) : -1;
    if (column >= 0) row.edge = to_float(x[column]);
    RunningSum total;
    float target_logit = 0.f;
    int target = row.target - span.head - member_ * kChunkElements;  // counted from the chunk's first element
    for (int left = span.vectors - member_ * kChunkLength; left > 0; left -= team_ * kChunkLength) {
      barrier_wait(loaded_ + to_sum_.slot, to_sum_.parity);
      Logit* chunk = slot_at(to_sum_);
      if (target >= 0 && target < min(left, kChunkLength) * kElements) {
        target_logit = to_float(chunk[target]);
        sync_warp();
        if (lane_ == 0) from_float(kMinusInfinity, chunk[target]);
        sync_warp();
      }
      sum_chunk(total, reinterpret_cast<const uint4*>(chunk), left);
      to_sum_.advance(slots_);
      target -= team_ * kChunkElements;
      if (!args_.dlogits) {  // nobody needs it again
        fence_for_bulk();
        sync_warp();
        --held_;
        load();
      }
    }
    if (takes_edges()) {
      const float others[1] = {column == row.target ? kMinusInfinity : row.edge};
      total.add<kEntropy>(others, scale_);
      const int from_vectors = row.target - span.head;
      if (from_vectors < 0 || from_vectors >= span.vectors * kElements) target_logit = to_float(x[row.target]);
    }
    total.join_lanes();
    const int place = order % kRowsInFlight;
    if (lane_ < cluster_size()) {
      const float4 part{total.pivot, total.sum, total.moment, target_logit};
      tell(memory_.sums + place * team_ + member_, lane_, part, memory_.sums_told + place);
    }
  }

  __device__ __forceinline__ void sum_chunk(RunningSum& total, const uint4* chunk, int vectors) const {
    float x[kChunkVectors * kElements];
#pragma unroll
    for (int k = 0; k < kChunkVectors; ++k) {
      const int v = lane_ + k * kLanes;
      unpack<Logit>(v < vectors ? chunk[v] : minus_infinities<Logit>(), x + k * kElements);
    }
    total.add<kEntropy>(x, scale_);
  }

  // This warp's part of a row's gradient.
  __device__ __forceinline__ void write(const Row& row, uint32_t order) {
    const int place = order % kRowsInFlight;
    barrier_wait(memory_.gradient_told + place, order / kRowsInFlight % 2);
    if (!args_.dlogits) return;
    const RowGradient gradient = memory_.gradients[place];
    sync_warp();  // every lane has it, and has read what another may now overwrite
    Logit* dx = args_.dlogits + row.index * args_.dlogits_stride;
    const Span<Logit> span(dx, vocab_);
    Logit* destination = dx + span.head + member_ * kChunkElements;
    int target = row.target - span.head - member_ * kChunkElements;
    for (int left = span.vectors - member_ * kChunkLength; left > 0; left -= team_ * kChunkLength) {
      Logit* chunk = slot_at(to_write_);
      write_chunk(gradient, reinterpret_cast<uint4*>(chunk));
      fence_for_bulk();
      sync_warp();
      if (lane_ == 0) {
        const int vectors = min(left, kChunkLength);
        if (target >= 0 && target < vectors * kElements) {
          from_float(gradient.at_target, chunk[target]);
          fence_for_bulk();
        }
        bulk_store(destination, chunk, vectors * 16);
        bulk_commit();
        bulk_wait_read<kStoresInFlight>();
      }
      to_write_.advance(slots_);
      destination += team_ * kChunkElements;
      target -= team_ * kChunkElements;
      if (storing_ < kStoresInFlight) {
        ++storing_;
      } else {
        --held_;
      }
      load();
    }
    const int column = takes_edges() ? span.edge_column(lane_) : -1;
    if (column >= 0) from_float(gradient.at(row.edge, column == row.target, scale_), dx[column]);
  }

  // What lies behind the last vector of a row is turned too and stays here.
  __device__ __forceinline__ void write_chunk(const RowGradient& gradient, uint4* chunk) const {
    float x[kChunkVectors * kElements], out[kChunkVectors * kElements] = {};
    if (!gradient.is_zero()) {
#pragma unroll
      for (int k = 0; k < kChunkVectors; ++k) unpack<Logit>(chunk[lane_ + k * kLanes], x + k * kElements);
      gradient.of(x, scale_, out);
    }
#pragma unroll
    for (int k = 0; k < kChunkVectors; ++k) chunk[lane_ + k * kLanes] = pack<Logit>(out + k * kElements);
  }

  // Zeros in this warp's part of the cluster's rows of weight 0.
  __device__ void skip_rows() const {
    RowWalk rows(args_, true);
    for (int64_t row = rows.next(); row >= 0; row = rows.next()) {
      if (member_ == 0 && lane_ == 0) write_skipped(args_, row);
      if (!args_.dlogits) continue;
      Logit* dx = args_.dlogits + row * args_.dlogits_stride;
      const Span<Logit> span(dx, vocab_);
      uint4* vectors = reinterpret_cast<uint4*>(dx + span.head);
      for (int v = member_ * kLanes + lane_; v < span.vectors; v += team_ * kLanes) store_streaming(vectors + v, {});
      const int column = takes_edges() ? span.edge_column(lane_) : -1;
      if (column >= 0) from_float(0.f, dx[column]);
    }
  }

  const PolicyLossArgs<Logit>& args_;
  const ClusterMemory memory_;
  const int lane_, slots_, team_, member_, vocab_;
  const float scale_;
  unsigned char* const ring_;
  Barrier* const loaded_;
  RowWalk rows_to_load_;
  const Logit* source_ = nullptr;  // of the next chunk to load; null when there are no more
  int vectors_to_load_ = 0;        // from there to the end of the row
  int held_ = 0, storing_ = 0;  // slots that are not free; those of them whose stores may still be read
  RingPlace to_load_, to_sum_, to_write_;
};

// The finisher: from the partial sums of each row to its loss and its gradient's factors.
template <typename Logit>
__device__ void finish_rows(const PolicyLossArgs<Logit>& args, const ClusterMemory& memory) {
  const int lane = thread_index() % kLanes, team = cluster_size() * (block_size() / kLanes - 1);
  const float scale = kLog2E / args.config.temperature;
  RowWalk rows(args);
  int64_t row = rows.next();
  Token token{};
  if (row >= 0) token = read_token(args, row);
  for (uint32_t order = 0; row >= 0; ++order) {
    const int64_t next = rows.next();
    Token next_token{};
    if (next >= 0) next_token = read_token(args, next);  // the search for an advantage is a chain of reads: begin early
    const int place = order % kRowsInFlight;
    if (lane == 0) barrier_arrive_expecting(memory.sums_told + place, team * int(sizeof(float4)));
    barrier_wait_cluster(memory.sums_told + place, order / kRowsInFlight % 2);
    RunningSum total;
    float target_logit = 0.f;
    for (int member = lane; member < team; member += kLanes) {
      const float4 told = memory.sums[place * team + member];
      RunningSum part;
      part.pivot = told.x;
      part.sum = told.y;
      part.moment = told.z;
      total.join(part);
      target_logit += told.w;
    }
    total.join_lanes();
#pragma unroll
    for (int mask = kLanes / 2; mask > 0; mask /= 2) target_logit += shuffle_xor(target_logit, mask);
    const bool writes = cluster_rank() == 0 && lane == 0;
    const RowGradient gradient = finish_row(args, row, token, total, target_logit, scale, writes);
    sync_warp();  // every lane has read its part of the sums
    if (lane == 0) {
      memory.gradients[place] = gradient;
      barrier_arrive(memory.gradient_told + place);
    }
    row = next;
    token = next_token;
  }
}

#endif

template <typename Logit, bool kEntropy>
__global__ void __launch_bounds__(kMaxClusterThreads, 1)
    cluster_kernel(const __grid_constant__ PolicyLossArgs<Logit> args, const __grid_constant__ int slots) {
#ifdef MRPO_CLUSTERS
  const int warp = thread_index() / kLanes, warps = block_size() / kLanes - 1;
  const ClusterMemory memory(shared_memory(), SharedLayout(cluster_size(), warps, slots));
  if (thread_index() == 0) {
    for (int i = 0; i < warps * slots; ++i) barrier_init(memory.loaded + i, 1);
    for (int i = 0; i < kRowsInFlight; ++i) {
      barrier_init(memory.sums_told + i, 1);
      barrier_init(memory.gradient_told + i, 1);
    }
    barrier_init_fence();
  }
  sync_cluster();
  if (warp == warps) {
    finish_rows(args, memory);
  } else {
    ChunkWarp<Logit, kEntropy>(args, memory, warp, slots).run();
  }
#endif
}

}  // namespace mrpo
