// What csrc/policy_loss_cuda.cu asks of the CUDA runtime, over the emulation: device 0 is of Hopper's kind, device 1 of
// Ampere's, and a launch runs at once. CUDA's rules of what may be launched hold: a kernel has as much shared memory as
// was last asked for it, and clusters have a largest size.
#pragma once

#include <cstddef>
#include <map>

#include "cuda_primitives.cuh"

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr { cudaDevAttrComputeCapabilityMajor, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension };
using cudaStream_t = void*;

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace mrpo::emulation {

constexpr int kDefaultShared = 48 << 10;  // bytes that a kernel may have without asking for more
constexpr int kMostShared[] = {232448, 166912};
constexpr int kCapability[] = {9, 8};
constexpr unsigned kPortableCluster = 8;

inline int current_device = 0;
inline int resident_clusters = 1;  // that a device holds at once, whatever their shape
inline int launched = -1;          // blocks of a cluster in the last launch, 0 without clusters

inline std::map<const void*, int>& shared_limits() {
  static std::map<const void*, int> limits;
  return limits;
}

template <typename... Parameters>
int shared_limit(void (*kernel)(Parameters...)) {
  const auto found = shared_limits().find(reinterpret_cast<const void*>(kernel));
  return found == shared_limits().end() ? kDefaultShared : found->second;
}

inline unsigned cluster_of(const cudaLaunchConfig_t& config) {
  return config.numAttrs ? config.attrs->val.clusterDim.x : 1;
}

}  // namespace mrpo::emulation

inline cudaError_t cudaSetDevice(int index) {
  mrpo::emulation::current_device = index;
  return cudaSuccess;
}

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : "invalid configuration argument";
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int index) {
  using namespace mrpo::emulation;
  *value = (attribute == cudaDevAttrComputeCapabilityMajor ? kCapability : kMostShared)[index];
  return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  using namespace mrpo::emulation;
  if (bytes < 0 || bytes > kMostShared[current_device]) return cudaErrorInvalidValue;
  shared_limits()[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

template <typename... Parameters>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, void (*kernel)(Parameters...),
                                           const cudaLaunchConfig_t* config) {
  using namespace mrpo::emulation;
  const bool fits = int(config->dynamicSmemBytes) <= shared_limit(kernel) && cluster_of(*config) <= kPortableCluster;
  *clusters = fits ? resident_clusters : 0;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               const Arguments&... arguments) {
  using namespace mrpo::emulation;
  const unsigned cluster = cluster_of(*config);
  if (int(config->dynamicSmemBytes) > shared_limit(kernel)) return cudaErrorInvalidValue;
  if (config->blockDim.x > 1024) return cudaErrorInvalidConfiguration;
  if (cluster > kPortableCluster || config->gridDim.x % cluster) return cudaErrorInvalidConfiguration;
  if (config->numAttrs && kCapability[current_device] < 9) return cudaErrorInvalidConfiguration;
  launched = config->numAttrs ? int(cluster) : 0;
  launch([&] { kernel(arguments...); }, config->gridDim.x, int(cluster), int(config->blockDim.x),
         int(config->dynamicSmemBytes), 0, 0.1);
  return cudaSuccess;
}
