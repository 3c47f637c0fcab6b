// Blocks of a thread block cluster, which reach each other's shared memory (compute capability 9.0 and newer). -DCLUSTER: how
// many blocks a cluster has; with 1, what is not said, everything here is a block's own, on any GPU.
//
// What a block writes into another's memory is there after cluster_sync(); no block may reach into another before the first
// one, for that one may not have begun, nor after the last one, for it may have ended.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;

#ifndef CLUSTER
#define CLUSTER 1
#endif
#if CLUSTER > 1
#define IN_CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#else
#define IN_CLUSTERS
#endif

namespace tenpak {

#if CLUSTER == 1
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ void cluster_sync() { __syncthreads(); }
__device__ __forceinline__ void cluster_meet() { __syncthreads(); }
template <class T>
__device__ __forceinline__ T* in_block(T* shared, int) {
    return shared;
}
__device__ __forceinline__ u32 in_block(u32 address, int) { return address; }
#else
__device__ __forceinline__ int cluster_rank() {
    u32 rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return (int)rank;
}
// Among all threads of the cluster that have not ended.
__device__ __forceinline__ void cluster_sync() {
    asm volatile("barrier.cluster.arrive;\nbarrier.cluster.wait;" ::: "memory");
}
// The same, but what was written before it need not be there after it: for blocks that have begun, or shall not end.
__device__ __forceinline__ void cluster_meet() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
// Where another block of the cluster has what is at `shared` in this one.
template <class T>
__device__ __forceinline__ T* in_block(T* shared, int rank) {
    u64 there;
    asm("mapa.u64 %0, %1, %2;" : "=l"(there) : "l"(shared), "r"(rank));
    return (T*)there;
}
// The same as an address in the cluster's shared memory.
__device__ __forceinline__ u32 in_block(u32 address, int rank) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}
#endif

}  // namespace tenpak
