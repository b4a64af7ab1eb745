// Which kernel a call of the policy loss runs on a CUDA device, and its launch.
#include "policy_loss_cuda.h"

#include <limits>
#include <map>
#include <mutex>
#include <tuple>

#include "block_kernel.cuh"
#include "cluster_kernel.cuh"

namespace mrpo {
namespace {

struct Device {
  bool has_clusters;
  int shared_bytes;  // a block can have
};

cudaError_t device_of(int index, Device& device) {
  static std::map<int, Device> known;
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  if (const auto found = known.find(index); found != known.end()) {
    device = found->second;
    return cudaSuccess;
  }
  int major = 0, shared_bytes = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  if (!error) error = cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (!error) known[index] = device = {major >= 9, shared_bytes};
  return error;
}

// How many clusters of this shape a device runs at once.
template <typename Logit, bool kEntropy>
cudaError_t resident_clusters(int device, const ClusterShape& shape, const cudaLaunchConfig_t& config, int& clusters) {
  const auto kernel = cluster_kernel<Logit, kEntropy>;  // its type is another kernel's, too, and tells them not apart
  static std::map<std::tuple<int, int, int, int>, int> known;
  static std::map<int, int> limits;  // by device: shared memory that the kernel may have
  static std::mutex mutex;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(device, shape.blocks, shape.warps, shape.slots);
  if (const auto found = known.find(key); found != known.end()) {
    clusters = found->second;
    return cudaSuccess;
  }
  const auto bytes = int(config.dynamicSmemBytes);
  cudaError_t error = cudaSuccess;
  if (int& limit = limits[device]; bytes > limit) {  // a smaller shape must not lower it for the larger ones
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (!error) limit = bytes;
  }
  if (!error) error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (!error && clusters == 0) error = cudaErrorInvalidConfiguration;
  if (!error) known[key] = clusters;
  return error;
}

template <typename Logit, bool kEntropy>
cudaError_t launch_clusters(const PolicyLossArgs<Logit>& args, const ClusterShape& shape, int device,
                            cudaStream_t stream) {
  const auto kernel = cluster_kernel<Logit, kEntropy>;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = shape.blocks;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(shape.blocks);
  config.blockDim = dim3(shape.threads());
  config.dynamicSmemBytes = SharedLayout(shape.blocks, shape.warps, shape.slots).bytes;
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  int clusters = 0;
  if (const cudaError_t error = resident_clusters<Logit, kEntropy>(device, shape, config, clusters)) return error;
  config.gridDim = dim3(int(args.rows < clusters ? args.rows : clusters) * shape.blocks);
  return cudaLaunchKernelEx(&config, kernel, args, shape.slots);
}

template <typename Logit, bool kEntropy>
cudaError_t launch_blocks(const PolicyLossArgs<Logit>& args, cudaStream_t stream) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(args.rows));
  config.blockDim = dim3(kBlockThreads);
  config.dynamicSmemBytes = kBlockThreads / kLanes * sizeof(RunningSum);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, block_kernel<Logit, kEntropy>, args);
}

template <typename Logit, bool kEntropy>
cudaError_t launch(const PolicyLossArgs<Logit>& args, const ClusterShape* wanted, int index, cudaStream_t stream) {
  Device device{};
  if (const cudaError_t error = device_of(index, device)) return error;
  const int64_t row_bytes = args.vocab * int64_t(sizeof(Logit));
  const ClusterShape shape = wanted ? *wanted : cluster_shape(row_bytes, device.shared_bytes);
  if (device.has_clusters && shape.blocks > 0 && is_aligned_alike(args)) {
    if (shape.slots < needed_slots(row_bytes, shape.blocks, shape.warps)) return cudaErrorInvalidConfiguration;
    return launch_clusters<Logit, kEntropy>(args, shape, index, stream);
  }
  return launch_blocks<Logit, kEntropy>(args, stream);
}

template <typename Logit>
cudaError_t launch_typed(const PolicyLossArgs<void>& untyped, const ClusterShape* shape, int index,
                         cudaStream_t stream) {
  const PolicyLossArgs<Logit> args{untyped, static_cast<const Logit*>(untyped.logits),
                                   static_cast<Logit*>(untyped.dlogits)};
  if (args.entropy) return launch<Logit, true>(args, shape, index, stream);
  return launch<Logit, false>(args, shape, index, stream);
}

}  // namespace

std::string policy_loss_cuda(const PolicyLossArgs<void>& args, const std::string& dtype, int device, void* stream,
                             const std::array<int, 3>* cluster) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  if (args.rows == 0) return "";
  if (args.rows > kMost || args.vocab > kMost) return "more than 2^31 - 1 rows or columns";
  ClusterShape shape;
  if (cluster) {
    shape.blocks = (*cluster)[0];
    shape.warps = (*cluster)[1];
    shape.slots = (*cluster)[2];
  }
  const ClusterShape* wanted = cluster ? &shape : nullptr;
  const auto on = static_cast<cudaStream_t>(stream);
  cudaError_t error = cudaSetDevice(device);
  if (error) return cudaGetErrorString(error);
  if (dtype == "float32") {
    error = launch_typed<float>(args, wanted, device, on);
  } else if (dtype == "bfloat16") {
    error = launch_typed<bfloat16>(args, wanted, device, on);
  } else if (dtype == "float16") {
    error = launch_typed<float16>(args, wanted, device, on);
  } else {
    return "no kernel for logits of dtype " + dtype;
  }
  return error ? cudaGetErrorString(error) : "";
}

}  // namespace mrpo
