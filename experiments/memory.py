"""How a program on a CPU keeps its memory between steps."""

import os
import sys

# Each step, XLA on a CPU asks for all its buffers and gives them back. Left to itself glibc returns
# them to the kernel, which clears every page anew: with the memory kept, in large pages, and in one
# arena, so that the threads that write checkpoints hoard none, the quickstart runs a third faster.
TUNABLES = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000"
TUNABLES += ":glibc.malloc.hugetlb=1:glibc.malloc.arena_max=1"


def keep_memory() -> None:
  """Starts the program anew, in place, with glibc told so; nothing where it is told something.

  To be called first of all: glibc reads its settings when a program starts.
  """
  if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
