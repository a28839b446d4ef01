"""The command line, and a Python, that start at once: each call is a fork of a process that has imported all of it.

Importing torch and transformers takes seconds of every command; a page of the docs has twenty of them.
"""

import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

_IMPORTED = ("cli", "demo", "evaluate.perplexity", "evaluate.tasks", "mix.explain", "runs.compare", "train.run")
_CLIENT = """#!{python} -IS
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    socket.send_fds(server, [json.dumps([sys.argv, os.getcwd(), dict(os.environ)]).encode() + b"\\n"], [0, 1, 2])
    sys.exit(int(server.recv(16) or b"70"))
"""


@contextlib.contextmanager
def preloaded_program(folder: Path) -> Iterator[None]:
    """Puts programs into `folder`, which work for as long as the `with` block lasts: `memlm`, and `python`, which knows
    the forms `-c CODE`, `-m MODULE` and `FILE`."""
    address = str(folder / "socket")
    for name in ("memlm", "python"):
        program = folder / name
        program.write_text(_CLIENT.format(python=sys.executable, address=address))
        program.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, address])
    try:
        while not Path(address).exists():
            assert server.poll() is None, "the process that is forked ended"
            time.sleep(0.05)
        yield
    finally:
        server.terminate()
        server.wait()


def _serve(address: str) -> None:
    for module in _IMPORTED:
        importlib.import_module(f"memlm.{module}")
    gc.freeze()  # what was imported is no garbage; no child looks at it, and so copies it
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        while True:
            client, _ = listener.accept()
            if os.fork() == 0:  # one child a call, which runs it in a child of its own and tells how that ended
                with client:
                    request, streams, *_ = socket.recv_fds(client, 1 << 20, 3)
                    worker = os.fork()
                    if worker == 0:
                        _run(json.loads(request), streams)
                    while (ended := os.waitpid(worker, os.WNOHANG))[0] == 0:
                        if select.select([client], [], [], 0.02)[0]:  # who called is gone
                            os.kill(worker, signal.SIGKILL)
                            ended = os.waitpid(worker, 0)
                            break
                    with contextlib.suppress(OSError):
                        client.sendall(str(os.waitstatus_to_exitcode(ended[1])).encode())
                os._exit(0)
            client.close()
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, os.WNOHANG)


def _run(request: list, streams: list[int]) -> None:
    (program, *arguments), folder, environment = request
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    form, *others = ["-m", "memlm", *arguments] if Path(program).name == "memlm" else arguments
    sys.executable = str(Path(program).with_name("python"))
    sys.path[0] = folder  # in place of this file's
    sys.path += [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path not in sys.path]
    sys.argv = [form, *others] if form not in ("-c", "-m") else [others[0] if form == "-m" else "-c", *others[1:]]
    status = 1
    try:
        if form == "-c":
            exec(compile(others[0], "<string>", "exec"), {"__name__": "__main__"})
        elif form == "-m":
            runpy.run_module(others[0], run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(form).parent)
            runpy.run_path(form, run_name="__main__")
        status = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    _serve(sys.argv[1])
