"""Environment of a process whose glibc keeps the memory that a step frees: it would hand it back to
the kernel. For programs that measure peers which cannot call `keep_freed_memory`."""

KEEP = {
    "MALLOC_MMAP_THRESHOLD_": "2000000000",
    "MALLOC_TRIM_THRESHOLD_": "4000000000",
    "MALLOC_TOP_PAD_": "400000000",
}
