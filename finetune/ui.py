"""Show sweeps in MLflow's UI on this machine: `python -m finetune.ui [SWEEP]`."""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
import webbrowser
from contextlib import suppress
from pathlib import Path
from typing import IO

from finetune import signals
from finetune.config.schema import Config
from finetune.config.store_address import is_server, reveal
from finetune.problems import Refused
from finetune.streams import keep_streams
from finetune.sweeps.tied_process import start_tied
from finetune.tracking.tracked_sweep import TrackedSweep, find_tracked

HOST, PORT = "127.0.0.1", 5000
PORTS = 20  # that are tried where none is given
START_SECONDS = 120.0  # to wait for the server
END_SECONDS = 5.0  # that it has to end


def main() -> None:
    """Serve the store of the last sweep, or of SWEEP, until Ctrl-C; exit code 2: refused."""
    keep_streams()
    args = build_parser().parse_args()
    try:
        shown = find_tracked(args.sweep, Path(Config.report_dir))
        if is_server(shown.uri):
            _announce(shown, shown.uri.rstrip("/"), is_opened=args.open)
            return
        port = find_port(args.port)
    except Refused as refused:
        print("\n".join(refused.problems), file=sys.stderr)
        sys.exit(2)
    sys.exit(serve(shown, port, is_opened=args.open))


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m finetune.ui", description=__doc__)
    parser.add_argument(
        "sweep", nargs="?", default="",
        help=f"name or folder of a sweep (default: the last one in {Config.report_dir})",
    )  # fmt: skip
    parser.add_argument(
        "--port", type=int, help=f"of {HOST} (default: the first that is free from {PORT} on)"
    )
    parser.add_argument("--open", action="store_true", help="open the page in a browser")
    return parser


def find_port(wanted: int | None) -> int:
    """Return a port that is free on this machine.

    Raises:
        Refused: the wanted one is not, or is no port.
    """
    if wanted is not None and not 0 < wanted < 2**16:
        raise Refused([f"--port={wanted} is no port; use 1 to 65535"])
    for port in range(PORT, PORT + PORTS) if wanted is None else [wanted]:
        if _is_free(port):
            return port
    given = f"--port={wanted}" if wanted is not None else f"ports {PORT} to {PORT + PORTS - 1}"
    raise Refused([f"{given}: in use, or not allowed; set --port to another one"])


def _is_free(port: int) -> bool:
    with socket.socket() as probe, suppress(OSError):
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((HOST, port))
        return True
    return False


def serve(shown: TrackedSweep, port: int, *, is_opened: bool) -> int:
    """Run MLflow's server until this process is stopped; return the exit code."""
    root = f"http://{HOST}:{port}"
    with tempfile.TemporaryFile() as output, signals.stops_raised(at_hangup=True):
        server = _start(shown.uri, port, output)
        try:
            if not _answers(server, root):
                print(f"MLflow did not start: {_last_line(output)}", file=sys.stderr)
                return 1
            _announce(shown, root, is_opened=is_opened)
            print("Ctrl-C ends it", flush=True)
            server.wait()
            print(f"MLflow has ended: {_last_line(output)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt as stop:
            return signals.exit_code(stop) if isinstance(stop, signals.Stopped) else 0
        finally:
            _end(server)


def _start(uri: str, port: int, output: IO[bytes]) -> subprocess.Popen[bytes]:
    """Start MLflow's server on loopback: it asks for no login."""
    environment = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # a third of the memory
        **os.environ,
        "MLFLOW_BACKEND_STORE_URI": reveal(uri),  # not on the command line, which all users see
    }
    command = [
        sys.executable, "-m", "mlflow", "server", "--host", HOST, "--port", str(port),
        "--workers", "1", "--uvicorn-opts", "--log-level warning",
    ]  # fmt: skip
    return start_tied(command, os.getcwd(), environment, output)


def _answers(server: subprocess.Popen[bytes], root: str) -> bool:
    """Wait for a server's first answer; False where it ends or takes too long."""
    until = time.monotonic() + START_SECONDS
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while server.poll() is None and time.monotonic() < until:
        with suppress(OSError), direct.open(f"{root}/health", timeout=2) as answer:
            return bool(answer.status == 200)
        time.sleep(0.2)
    return False


def _announce(shown: TrackedSweep, root: str, *, is_opened: bool) -> None:
    """Print where to look, and open it where a browser is asked for."""
    pages = {name: f"{root}/{page}" for name, page in shown.pages().items()}
    sweep = f", sweep {shown.mirror.name}" if shown.mirror is not None else ""
    print(f"MLflow: {shown.uri}{sweep}")
    for name, page in pages.items():
        print(f"{name}: {page}", flush=True)
    if is_opened and not webbrowser.open(next(iter(pages.values()))):
        print("no browser can be opened here; open the address yourself", file=sys.stderr)


def _last_line(output: IO[bytes]) -> str:
    output.seek(0)
    lines = output.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it gave no reason"


def _end(server: subprocess.Popen[bytes]) -> None:
    """End the server with its own processes."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(server.pid, number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(END_SECONDS)


if __name__ == "__main__":
    main()
