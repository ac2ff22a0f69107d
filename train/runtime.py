"""The process around a run: compiled programs kept on disk, other processes joined, signals."""

import ctypes
import glob
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import jax

from bestiary.train.corpus import cache_folder

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _ARENA_MAX = -3, -1, -8  # names of glibc's <malloc.h>


def start() -> None:
    """Prepares JAX for a run; to be called before any device is asked for.

    Compiled programs are kept in `JAX_COMPILATION_CACHE_DIR`, or in the user's cache. Processes
    join where the environment says so: `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`; a Cloud TPU, Slurm or Open MPI, which JAX itself understands.

    Raises ValueError for a coordinator without the numbers of processes.
    """
    keep_freed_memory()
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder().parent / "programs"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        names = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
        try:
            count, index = (int(os.environ[name]) for name in names)
        except (KeyError, ValueError):
            values = [os.environ.get(name) for name in names]
            raise ValueError(f"{' and '.join(names)}: {values}; need two whole numbers") from None
        jax.distributed.initialize(num_processes=count, process_id=index)
    elif any(int(os.environ.get(n, 1)) > 1 for n in ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE")):
        jax.distributed.initialize()
    elif os.environ.get("JAX_PLATFORMS", "tpu") == "tpu" and glob.glob("/dev/accel*"):
        jax.distributed.initialize()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds `folder` until this process ends in any way. Raises ValueError when another does."""
    import fcntl  # not on Windows

    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(
                f"run_dir: {str(folder)!r} is in use by another process; need another, or its end"
            ) from None
        yield


def keep_freed_memory() -> None:
    """Makes glibc keep the large blocks that a step frees: it would hand them back to the kernel,
    and the next step on a CPU would fault every page in anew. To be called before any work: threads
    other than the first take blocks above 64 MB from the kernel unless all share one arena."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        mallopt(_MMAP_THRESHOLD, 1 << 30)
        mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_ARENA_MAX, 1)


class Signals:
    """Inside this context SIGINT and SIGTERM are noted, once; the second one has its usual effect.

    Attributes:
      number: the signal that came, 0 for none.
    """

    number = 0

    def __enter__(self) -> "Signals":
        self._before: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.number = number
        for known in self._before:
            signal.signal(known, signal.SIG_DFL)
        print("stopping after this step; once more stops at once", file=sys.stderr, flush=True)
