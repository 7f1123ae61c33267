"""Start commands without importing torch for each: a server process has imported it and forks one child a command.

A child is a process of its own: streams, environment, signals, memory and exit status are its own. Importing is all that it
is spared, so some tests start a new interpreter instead (conftest.command with fresh=True). Needs Linux.
"""

import contextlib
import gc
import importlib
import json
import os
import re
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
OWN = (ROOT, ROOT / "plumbing", ROOT / "tools", ROOT / "tests")
LONGEST = 1 << 17  # bytes of a request: arguments and environment
loaded = set()  # names of modules, in the server


class Process:
    """A command, as subprocess.Popen would start it: pid, poll, wait, send_signal, kill, returncode; and cpu_seconds."""

    def __init__(self, pid, ended):
        self.pid, self._ended = pid, ended  # ended: a file object from which the end is read
        self.returncode, self.cpu_seconds = None, None

    def poll(self):
        """Exit status, or None while it runs."""
        return self._read_end(0)

    def wait(self, timeout=None):
        """Exit status. Raises subprocess.TimeoutExpired after `timeout` seconds."""
        if self._read_end(timeout) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return self.returncode

    def send_signal(self, number):
        """Signal it, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _read_end(self, timeout):
        if self.returncode is None and select.select([self._ended], [], [], timeout)[0]:
            status, self.cpu_seconds = json.loads(self._ended.readline())
            self.returncode = os.waitstatus_to_exitcode(status)
            self._ended.close()
        return self.returncode


class ForkServer:
    """The server process, started at once; `modules` are imported in it before the first command."""

    def __init__(self, modules, environment):
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._server = subprocess.Popen([sys.executable, __file__, str(theirs.fileno()), *modules], cwd=ROOT,
                                        pass_fds=[theirs.fileno()], env=environment)
        theirs.close()

    def start(self, arguments, environment, stdout, stderr, modules=(), signalled=None, largest_file=None):
        """A Process: the Python script arguments[0] with the other arguments, in the project's folder.

        stdout, stderr: file descriptors. modules: to be imported in the server first. signalled: see `signal_when`.
        largest_file: bytes of the largest file that it can write.
        """
        ours, theirs = os.pipe()
        request = {"arguments": [str(argument) for argument in arguments], "environment": dict(environment),
                   "modules": list(modules), "signalled": signalled, "largest_file": largest_file}
        socket.send_fds(self._socket, [json.dumps(request).encode()], [stdout, stderr, theirs])
        os.close(theirs)
        ended = os.fdopen(ours)
        if not (pid := ended.readline()):
            raise RuntimeError("the fork server has ended")
        return Process(int(pid), ended)

    def close(self):
        """End the server; its children go on."""
        self._socket.close()
        self._server.wait()


def serve(requests):
    """Answer requests from a socket until it closes. In a child this returns the request that the child is to do."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for watchers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the tests
    while True:
        message, descriptors, _, _ = socket.recv_fds(requests, LONGEST, 3)
        if not message:
            os._exit(0)
        request = json.loads(message)
        load(request["modules"])
        if os.fork() == 0:
            requests.close()
            stdout, stderr, ended = descriptors
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            if pid := os.fork():
                watch(pid, ended)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            os.closerange(3, max(descriptors) + 1)
            return request
        for descriptor in descriptors:
            os.close(descriptor)


def load(modules):
    """Import what has not been imported before, and forget the project's own modules: each child imports them for itself."""
    if not loaded.issuperset(modules):
        loaded.update(modules)
        for name in modules:
            with contextlib.suppress(Exception):  # the command will say what is wrong with it
                importlib.import_module(name)
        for name, module in list(sys.modules.items()):
            if name != "__main__" and Path(getattr(module, "__file__", None) or "/").parent in OWN:
                del sys.modules[name]
        gc.collect()
        gc.freeze()  # children need not look at it when they collect garbage


def watch(pid, ended):
    """Tell the command's process id, wait for its end, tell status and CPU seconds; never returns."""
    for stream in (0, 1, 2):
        os.close(stream)
    os.write(ended, f"{pid}\n".encode())
    _, status, usage = os.wait4(pid, 0)
    os.write(ended, json.dumps([status, usage.ru_utime + usage.ru_stime]).encode() + b"\n")
    os._exit(0)


def signal_when(number, pattern, pid=None):
    """From now on, send signal `number` to process `pid` (None: this one), once, as soon as an event matches `pattern`.

    Events are what this process writes to stderr, and audit events of files: "open PATH ...", "os.rename PATH PATH ...",
    "os.mkdir PATH ...". It is sent before the event happens, so where it falls does not depend on how fast the machine is.
    """
    waiting = [re.compile(pattern)]

    def happen(text):
        if waiting and waiting[0].search(text):
            waiting.clear()
            os.kill(pid or os.getpid(), number)

    class Stream:
        """sys.stderr, watched."""

        def __init__(self, stream):
            self._stream = stream

        def __getattr__(self, name):
            return getattr(self._stream, name)

        def write(self, text):
            happen(text)
            return self._stream.write(text)

    sys.stderr = Stream(sys.stderr)
    sys.addaudithook(lambda event, arguments: event in ("open", "os.rename", "os.mkdir") and happen(
        " ".join(map(str, (event, *arguments)))))


if __name__ == "__main__":
    sys.path.insert(1, str(ROOT))  # stays, for scripts in other folders
    load(sys.argv[2:])
    tqdm.set_lock(threading.RLock())  # its own is shared by all processes, and stays locked where a kill falls into a write
    REQUEST = serve(socket.socket(fileno=int(sys.argv[1])))
    os.environ.clear()
    os.environ.update(REQUEST["environment"])
    sys.argv = REQUEST["arguments"]
    sys.path[0] = str((ROOT / sys.argv[0]).parent)
    sys.path[2:2] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if size := REQUEST["largest_file"]:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    if REQUEST["signalled"]:
        signal_when(*REQUEST["signalled"])
    runpy.run_path(sys.argv[0], run_name="__main__")
