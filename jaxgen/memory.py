"""The host's memory, when it is the host that computes.

Every call of a compiled program allocates its temporary buffers anew. On Linux, glibc asks the operating system for a
large one and returns it as soon as it is free, so on a CPU each call is handed pages that must be cleared before their
first use: several hundred thousand of them for a training step of a 36 million parameter U-Net, a tenth of its time.
PyTorch's users know the remedy as another allocator; glibc's own keeps what was freed if it is asked to.
"""

import ctypes
import platform

# Parameters of mallopt, from glibc's malloc.h; documented at https://man7.org/linux/man-pages/man3/mallopt.3.html.
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = -1


def keep_freed() -> bool:
    """Has this process keep freed memory for its next allocation, for programs that compute on a CPU.

    Call it before JAX's first array: threads that exist have settled where they allocate from. From then on all share
    one place and its lock, which several virtual devices that run small programs can feel; and what the process has
    once used it keeps until it ends.

    Returns:
        Whether it does: False where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # An arena of one thread has a size limit, and more than that is mapped by itself, whatever is asked: so one arena.
    return all([mallopt(_ARENA_MAX, 1), mallopt(_MMAP_MAX, 0), mallopt(_TRIM_THRESHOLD, _NEVER)])
