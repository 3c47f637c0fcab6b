// Launches that overlap: a kernel may begin while the one before it on its stream still runs (programmatic dependent
// launch, compute capability 9.0), and waits where it first needs what that one writes.
//
// Both calls do nothing in a kernel that was launched the ordinary way. A kernel that is launched to overlap must wait
// in every block that reads or writes what others write: then all that was launched before it has ended there, too.
#pragma once

namespace tenpak {

// The next kernel's blocks may begin where this one leaves room.
__device__ __forceinline__ void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;");
#endif
}
// Until everything that was launched before has ended.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace tenpak
