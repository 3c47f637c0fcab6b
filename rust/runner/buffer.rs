//! Large output buffers on huge pages: page faults otherwise cost more than encoding.

/// Below this a buffer is not worth a system call.
#[cfg(target_os = "linux")]
const LARGE: usize = 4 << 20;

/// `len` zero bytes; large ones are advised onto huge pages, where the system has them.
pub fn zeroed(len: usize) -> Vec<u8> {
    let buffer = vec![0u8; len];
    #[cfg(target_os = "linux")]
    if len >= LARGE {
        let page = 4096;
        let start = (buffer.as_ptr() as usize).next_multiple_of(page);
        let end = (buffer.as_ptr() as usize + len) / page * page;
        // SAFETY: the range lies inside the buffer, and the advice changes no contents. Failure is harmless.
        unsafe { libc::madvise(start as *mut libc::c_void, end - start, libc::MADV_HUGEPAGE) };
    }
    buffer
}
