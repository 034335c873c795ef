"""One function over many tasks, in several processes, in order and in bounded memory.

The processes are started anew and speak over their pipes. They do not import the caller's main module, as `multiprocessing` would: a script
that calls `train` outside of `if __name__ == "__main__"` must not start itself again. Ctrl-C and errors end them at once.
"""

import os
import pickle
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Any, TypeVar

from lorakit.core.errors import DataError, LorakitError

Task = TypeVar("Task")
Result = TypeVar("Result")

AHEAD = 2
"""Tasks for each process that are under way or done and not yet taken."""


def cores() -> int:
    """How many of the machine's cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(work: Callable[[Task], Result], tasks: Iterable[Task], count: int, *, required: bool = True) -> Iterator[Result]:
    """`map(work, tasks)`, computed by at most `count` processes: no more than there are tasks, or cores to run them.

    What `work` raises is raised here, as a DataError where it is an error of ours.
    `work` and the tasks are sent by pickle. Where `work` cannot be sent (it is made of classes of the main script) and processes are not
    `required`, all is done in this one.
    """
    drawn = iter(tasks)
    first = list(islice(drawn, min(count, cores())))
    count, tasks = len(first), chain(first, drawn)
    if count < 2:  # a process takes seconds to start, and configurations ask for sixteen whatever there is to do
        yield from map(work, tasks)
        return
    try:
        sent = pickle.dumps(work)
    except Exception as error:
        if required:
            raise DataError(f"this tokenizer cannot be sent to other processes ({error}); use preprocessing_num_workers=1") from None
        yield from map(work, tasks)
        return
    processes: list[_Process] = []
    try:
        processes += (_Process() for _ in range(count))
        for process in processes:  # which all start at the same time
            process.say(sent)
        refused = [why for why in [process.answer() for process in processes] if why is not None]
        if refused and required:
            raise DataError(f"this tokenizer cannot be loaded in other processes ({refused[0]}); use preprocessing_num_workers=1")
        yield from map(work, tasks) if refused else _ordered(processes, tasks)
    finally:
        for process in processes:
            process.end()


def _ordered(processes: list["_Process"], tasks: Iterable[Task]) -> Iterator[Any]:
    """A thread a process, which waits for it. Nothing here but C's own queues: an interruption while a lock of Python's is taken (a
    Future's, a pool's) would leave it locked, and whoever waits for it would wait for ever."""
    todo: queue.SimpleQueue[tuple[int, Task] | None] = queue.SimpleQueue()
    ready: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()
    found: dict[int, tuple[Any, BaseException | None]] = {}

    def work(process: _Process) -> None:
        while (given := todo.get()) is not None:
            i, task = given
            try:
                ready.put((i, process.ask(task), None))
            except BaseException as error:
                ready.put((i, None, error))

    def result(i: int) -> Any:
        while i not in found:
            done, *answer = ready.get()
            found[done] = (answer[0], answer[1])
        value, error = found.pop(i)
        if error is not None:
            raise error
        return value

    for process in processes:
        threading.Thread(target=work, args=(process,), name="lorakit-rows", daemon=True).start()
    try:
        sent = taken = 0
        for task in tasks:
            todo.put((sent, task))
            sent += 1
            if sent - taken >= AHEAD * len(processes):
                yield result(taken)
                taken += 1
        for i in range(taken, sent):
            yield result(i)
    finally:
        for _ in processes:
            todo.put(None)


class _Process:
    """A process that computes `work(task)` for one task after the other."""

    def __init__(self) -> None:
        threads = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        path = os.pathsep.join(filter(None, sys.path))
        self.process = subprocess.Popen(
            [sys.executable, "-c", "from lorakit.data.parallel import serve; serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ, **threads, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the process that started it, which ends it
        )  # fmt: skip

    def ask(self, task: Any) -> Any:
        """The result. Raises what `work` raised."""
        self.say(pickle.dumps(task))
        kind, value = self.answer()
        if kind == "done":
            return value
        raise DataError(value) if kind == "refused" else RuntimeError(f"a tokenizing process failed:\n{value}")

    def answer(self) -> Any:
        """The next thing that it says."""
        assert self.process.stdout is not None
        try:
            return pickle.load(self.process.stdout)
        except (EOFError, pickle.UnpicklingError, ValueError):
            raise self._gone() from None

    def end(self) -> None:
        """Stop it, whatever it is doing."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            try:
                if pipe is not None:
                    pipe.close()
            except OSError:  # what was not sent yet
                pass

    def say(self, sent: bytes) -> None:
        """Send a pickle."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(sent)
            self.process.stdin.flush()
        except (OSError, ValueError):
            raise self._gone() from None

    def _gone(self) -> DataError:
        return DataError(
            f"a tokenizing process ended by itself (status {self.process.poll()}), perhaps for lack of memory; "
            "use fewer preprocessing_num_workers"
        )


def serve() -> None:
    """What such a process does. Whatever libraries print goes to standard error."""
    with os.fdopen(os.dup(1), "wb") as out:
        os.dup2(2, 1)

        def say(answer: Any) -> None:
            pickle.dump(answer, out, protocol=pickle.HIGHEST_PROTOCOL)
            out.flush()

        tasks = sys.stdin.buffer
        try:
            work = pickle.load(tasks)
        except Exception as error:
            return say(f"{type(error).__name__}: {error}")
        say(None)
        while True:
            try:
                say(_answer(work, pickle.load(tasks)))
            except (EOFError, BrokenPipeError):  # nobody asks any more
                return


def _answer(work: Callable[[Any], Any], task: Any) -> tuple[str, Any]:
    try:
        return "done", work(task)
    except LorakitError as error:
        return "refused", str(error)
    except Exception:
        return "failed", traceback.format_exc()
