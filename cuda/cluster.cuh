// Blocks of a thread block cluster, which reach each other's shared memory (compute capability 9.0). -DCLUSTER: how many
// blocks a cluster has; with 1 everything here is a block's own, on any GPU.
//
// What a block writes into another's memory is there after cluster_sync(); no block may reach into another before the first
// one, for that one may not have begun, nor after the last one, for it may have ended.
#pragma once
#include "warp.cuh"

namespace tenpak {

#if CLUSTER == 1
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
template <class T>
__device__ __forceinline__ T* in_block(T* shared, int) {
    return shared;
}
#else
__device__ __forceinline__ int cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return (int)rank;
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}
// Where another block of the cluster has what is at `shared` in this one.
template <class T>
__device__ __forceinline__ T* in_block(T* shared, int rank) {
    u64 there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
    return (T*)there;
}
#endif

}  // namespace tenpak
