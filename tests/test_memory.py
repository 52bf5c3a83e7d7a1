import subprocess
import sys

import pytest

from jaxgen import memory

BYTES, PAGE = 2**28, 2**12
# Fresh pages that a thread is given while it uses as much memory as another has just freed.
PROGRAM = f"""
import ctypes, resource, sys, threading
from jaxgen import memory

libc = ctypes.CDLL(None)
libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of one size
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]

def use():
    block = libc.malloc({BYTES})
    ctypes.memset(block, 1, {BYTES})
    libc.free(block)

if sys.argv[1] == "keep":
    assert memory.keep_freed()
faults = []
for _ in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(faults[-1])
"""

glibc = pytest.mark.skipif(memory.platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")


def faults(word):
    environment = {"PATH": "", "LD_LIBRARY_PATH": ""}  # none of glibc's own settings
    command = [sys.executable, "-c", PROGRAM, word]
    return int(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)


@glibc
def test_freed_memory_is_used_again_by_any_thread():
    assert faults("keep") < 100 < BYTES / PAGE / 2 < faults("leave")


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    assert memory.keep_freed() is False
