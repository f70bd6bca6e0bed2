"""What Numba's CUDA simulator lacks: warps, blocks that run at the same time, barriers that cost little.

Importing this module, with ``NUMBA_ENABLE_CUDASIM=1``, replaces parts of ``numba.cuda.simulator``. The threads of a
grid become coroutines (greenlets) of one thread: each runs until it comes to a barrier, a shuffle or ``nanosleep``,
then another one does, in an order that is drawn anew each time, from a fixed seed. So

- a barrier that is missing shows: some thread gets far ahead of the others before they have begun;
- a barrier that not all threads come to is an error, since nobody can go on; one that a thread skips by ending is not;
- shuffles are there, and one from a lane that does not exist is an error;
- the blocks of a grid, up to RESIDENT of them, run at the same time, from any order of starting and at speeds of their
  own, each with shared memory that begins as garbage;
- arithmetic does not warn, as a device's does not.

What it cannot show: the order of memory among blocks, which here is that of the program, and types. Those are for the
compiler's tests and for a device.
"""

import random
import sys
import threading

import numpy as np
from greenlet import getcurrent, greenlet
from numba.cuda import types
from numba.cuda.np import numpy_support
from numba.cuda.simulator import kernel, kernelapi
from numba.cuda.simulator.kernelapi import Dim3

_WARP = 32
#: Blocks that run at the same time; the next one starts when one of them has ended.
RESIDENT = 32
#: So often may threads sleep while no barrier opens, before it is called a deadlock.
_PATIENCE = 100_000


class _Barrier:
    """Opens when all of its threads are there; one that has ended is no longer waited for."""

    def __init__(self, grid, threads):
        self.grid, self.expected, self.waiting = grid, threads, []

    def wait(self):
        self.waiting.append(getcurrent())
        self._open_if_complete()
        self.grid.switch()

    def leave(self):
        self.expected -= 1
        self._open_if_complete()

    def _open_if_complete(self):
        if self.waiting and len(self.waiting) == self.expected:
            self.grid.ready += self.waiting
            self.grid.slept = 0
            self.waiting = []


class _Warp(_Barrier):
    """With two sets of values, in turn: who is about to write one has seen that all have read it."""

    def __init__(self, grid, threads, slow):
        super().__init__(grid, threads)
        #: How likely it is to do something in a turn: so neither blocks nor warps go in step.
        self.speed = grid.random.choice((0.1, 1.0)) * (0.3 if slow else 1.0)
        self.values, self.turn = ([None] * threads, [None] * threads), [0] * threads


class _Block:
    def __init__(self, grid, point, shape):
        threads = int(np.prod(shape))
        self.point, self.shape, self.shared = Dim3(*point), shape, {}
        self.barrier = _Barrier(grid, threads)
        #: Whether a thread has said so yet, by how often each has been asked.
        self.said: dict[int, bool] = {}
        slow = grid.random.random() < 0.5
        self.warps = [_Warp(grid, min(_WARP, threads - first), slow) for first in range(0, threads, _WARP)]


class _Thread(greenlet):
    def __init__(self, grid, block, number, place, function):
        super().__init__(self._run, grid)
        self.grid, self.block, self.place, self.function = grid, block, Dim3(*place), function
        self.warp, self.lane = block.warps[number // _WARP], number % _WARP
        self.asked = 0

    def _run(self):
        with np.errstate(all="ignore"):  # coroutines have contexts of their own
            self.function()
        self.block.barrier.leave()
        self.warp.leave()

    def said_by_any(self, value):
        self.asked += 1
        time = self.asked
        self.block.said[time] = self.block.said.get(time, False) or bool(value)
        self.block.barrier.wait()
        return self.block.said[time]

    def exchanged(self, value):
        """The values of all lanes."""
        turn = self.warp.turn[self.lane]
        self.warp.turn[self.lane] = 1 - turn
        values = self.warp.values[turn]
        values[self.lane] = value
        self.warp.wait()
        return values


class _Grid(greenlet):
    """Runs the threads of a grid, one at a time."""

    def __init__(self, function, shape, block_shape, points):
        super().__init__(self._run)
        self.function, self.shape, self.block_shape = function, shape, block_shape
        self.points, self.threads, self.ready, self.unfinished, self.slept = list(points), [], [], 0, 0
        self.random = random.Random(0)

    def _start_block(self):
        # A device promises no order in which it starts blocks.
        block = _Block(self, self.points.pop(self.random.randrange(len(self.points))), self.block_shape)
        places = [place[::-1] for place in np.ndindex(*self.block_shape[::-1])]  # x changes fastest
        threads = [_Thread(self, block, n, place, self.function) for n, place in enumerate(places)]
        self.threads += threads
        self.ready += threads
        self.unfinished += len(threads)

    def _run(self):
        try:
            self._run_all()
        except BaseException:
            for thread in self.threads:  # so that each leaves the context managers of the simulator that it is in
                if not thread.dead:
                    thread.throw()
            raise

    def _run_all(self):
        this = threading.current_thread()
        threads = int(np.prod(self.block_shape))
        while self.points or self.unfinished:
            while self.points and self.unfinished + threads <= RESIDENT * threads:
                self._start_block()
            if not self.ready:
                raise RuntimeError("a barrier that not all threads come to")
            warps = dict.fromkeys(thread.warp for thread in self.ready)  # in order, which that of a set is not
            awake = {warp for warp in warps if self.random.random() < warp.speed}
            turn = [thread for thread in self.ready if thread.warp in awake]
            self.ready = [thread for thread in self.ready if thread.warp not in awake]
            self.random.shuffle(turn)
            for thread in turn:
                # Where Numba's modules look for them.
                this.threadIdx, this.blockIdx = thread.place, thread.block.point
                thread.switch()
                self.unfinished -= thread.dead

    def sleep(self):
        self.slept += 1
        if self.slept > _PATIENCE:
            raise RuntimeError("threads that wait for what never comes")
        self.ready.append(getcurrent())
        self.switch()


class Module(kernelapi.FakeCUDAModule):
    """What kernels see as ``cuda``."""

    def syncthreads(self):
        getcurrent().block.barrier.wait()

    def syncthreads_or(self, predicate):
        return int(getcurrent().said_by_any(predicate))

    def syncwarp(self, mask=0xFFFFFFFF):
        getcurrent().warp.wait()

    def shfl_sync(self, mask, value, source):
        return getcurrent().exchanged(value)[source]

    def shfl_xor_sync(self, mask, value, offset):
        return getcurrent().exchanged(value)[getcurrent().lane ^ offset]

    def shfl_down_sync(self, mask, value, offset):
        values, lane = getcurrent().exchanged(value), getcurrent().lane
        return values[lane + offset] if lane + offset < _WARP else value

    def shfl_up_sync(self, mask, value, offset):
        values, lane = getcurrent().exchanged(value), getcurrent().lane
        return values[lane - offset] if lane >= offset else value

    def ballot_sync(self, mask, predicate):
        return sum(1 << lane for lane, value in enumerate(getcurrent().exchanged(bool(predicate))) if value)

    def nanosleep(self, ns):
        getcurrent().grid.sleep()


class Manager(kernel.BlockManager):
    """Collects the blocks of a grid, and runs them once the last is there."""

    points = ()

    def run(self, point, *arguments):
        Manager.points = (*Manager.points, point)
        if any(p != n - 1 for p, n in zip(point, self._grid_dim, strict=True)):
            return
        points, Manager.points = Manager.points, ()
        _Grid(lambda: self._f(*arguments), self._grid_dim, self._block_dim, points).switch()


def _shared_array(self, shape, dtype, alignment=None):
    """Shared memory of a block, by the line that asks for it, as the simulator has it for all blocks."""
    if isinstance(dtype, types.Type):
        dtype = numpy_support.as_dtype(dtype)
    shared = getcurrent().block.shared
    frame = sys._getframe(1)
    line = frame.f_code.co_filename, frame.f_lineno
    if line not in shared:
        shared[line] = np.empty(shape, dtype)
        shared[line].view(np.uint8)[...] = 0xA5
    return shared[line]


kernel.FakeCUDAModule = Module
kernel.BlockManager = Manager
kernelapi.FakeCUDAShared.array = _shared_array
