"""Starts one SGLang server as a tree of processes, with its flags, environment and log, and ends it.

The root of the tree is a supervisor (`launcher.py`), which holds the server's port. It ends the tree when its pipe to
this process closes, so no server outlives the trainer, however the trainer ends.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import socket
import stat
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Literal
from urllib.parse import urlsplit

from megatron_oreal.config import SglangConfig
from megatron_oreal.engines.sglang.endpoints import Endpoint
from megatron_oreal.engines.sglang.servers.encryption import Certificate, is_loopback, make_certificate, uses_tls
from megatron_oreal.engines.sglang.servers.listening import tree_listens
from megatron_oreal.engines.sglang.servers.node import held_port
from megatron_oreal.parallel.rendezvous import LOOPBACK_INTERFACE

LAUNCHER = Path(__file__).with_name("launcher.py")
GRACE_SECONDS = {"cuda": 15.0, "cpu": 0.0}  # for a server to release the device's memory itself
END_SECONDS = 20.0  # for the kernel to end a process tree
CONTEXT_MARGIN = 8  # tokens; SGLang ends a response two tokens before its context length
CAUSE = re.compile(r"^(?:\[[^\]]*\] )?((?:\w+\.)*\w*(?:Error|Exception|Interrupt)\b.*)")
# With torchrun's variables, the server's own torch.distributed would try to join the trainer's group.
TRAINER_VARIABLES = re.compile(
    r"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|PYTHON(PATH|HOME)|VIRTUAL_ENV"
    r"|MEGATRON_OREAL_STORE|TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
)
OWN_FLAGS = {
    "rollout.sglang.tensor": ("tp-size", "tp", "tensor-parallel-size"),
    "rollout.sglang.num_servers": ("dp-size", "dp", "data-parallel-size", "nnodes", "node-rank", "dist-init-addr"),
    "rollout.sglang.gpus": ("base-gpu-id", "gpu-id-step", "device"),
    "rollout.sglang.host": ("host",),
    "rollout.sglang.ports": ("port",),
    "rollout.sglang.tls": ("ssl-certfile", "ssl-keyfile", "ssl-ca-certs", "ssl-keyfile-password", "enable-ssl-refresh"),
    "rollout.sglang.placement": ("enable-memory-saver",),
    "model.path": ("model-path", "model"),
    "model.dtype": ("dtype",),
    "data.max_prompt_tokens and rollout.max_new_tokens": ("context-length",),
    "the run": ("api-key", "admin-api-key", "skip-server-warmup"),
}
# These flags bypass the keys, or hide other flags.
REFUSED_FLAGS = re.compile(
    "config|tokenizer-worker-num|encoder-only|use-ray|(smg-)?grpc-.*|disaggregation-.*|kv-events-config|load-publish-.*"
)
# Variables that look like the user's secrets, which no server needs.
SECRET_VARIABLES = re.compile(r".*(KEY|SECRET|PASSW|CREDENTIAL|AUTH).*|(?!TOKENIZERS_|SGLANG_).*TOKEN.*", re.IGNORECASE)
DeviceType = Literal["cpu", "cuda"]


@dataclass(slots=True, frozen=True)
class ServerSettings:
    """The settings that all servers of a fleet share."""

    config: SglangConfig
    model_path: Path
    dtype: str
    run_dir: Path
    device_type: DeviceType
    context_length: int  # the longest total of a prompt and its response, in tokens

    def command(self, port: int) -> list[str]:
        """Returns the flags of a server that listens on this port."""
        flags: dict[str, bool | int | float | str] = {
            "model-path": str(self.model_path.resolve()),
            "dtype": self.dtype,
            "host": self.config.host,
            "port": port,
            "tp-size": self.config.tensor,
            "context-length": self.context_length + CONTEXT_MARGIN,
            # The warm-up's request is too long for a small model, and would make the server exit.
            "skip-server-warmup": True,
            "device": self.device_type,
        }
        if self.device_type == "cpu":
            flags |= {
                "attention-backend": "torch_native",
                "sampling-backend": "pytorch",
                "mem-fraction-static": 0.3,
                "max-total-tokens": max(20_000, 32 * self.context_length),
                "disable-overlap-schedule": True,
                "sleep-on-idle": True,  # a waiting scheduler would use a core fully
            }
        elif self.config.placement == "colocated":
            flags["enable-memory-saver"] = True
        return as_arguments(flags | self.config.flags)

    def router_command(self, port: int) -> list[str]:
        """Returns the router's flags. The router repeats no request, because the engine does so and counts failures."""
        flags: dict[str, bool | int | float | str] = {
            "host": self.config.host,
            "port": port,
            "policy": "cache_aware",  # the samples of a group share the cache of their prompt
            "request-timeout-secs": math.ceil(self.config.request_timeout_seconds),
            "health-check-interval-secs": 5,
            "disable-retries": True,
            "log-level": "warn",
        }
        return ["--router", *as_arguments(flags)]

    def environment(self, gpus: Sequence[str]) -> dict[str, str]:
        """Returns the environment variables of a server on these GPUs."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not TRAINER_VARIABLES.fullmatch(name)
            and (name in self.config.secrets or not SECRET_VARIABLES.fullmatch(name))
        }
        if is_loopback(self.config.host):  # then its clients and its own ranks are also on this node
            for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
                kept.setdefault(name, LOOPBACK_INTERFACE)
        kept |= {
            "CUDA_VISIBLE_DEVICES": ",".join(gpus),
            "NO_PROXY": "*",  # the server only connects to itself
            "no_proxy": "*",
            "PYTHONUNBUFFERED": "1",
            "SGLANG_RETURN_ORIGINAL_LOGPROB": "1",  # log-probs of the untempered, untruncated model
            "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # the margin exceeds the model's positions
        }
        if self.device_type == "cpu":
            # The server keeps the memory of a bucket of weights, because allocating it takes longer than receiving the
            # bytes.
            malloc = {"MALLOC_MMAP_THRESHOLD_": "4294967296", "MALLOC_TRIM_THRESHOLD_": "4294967296"}
            kept |= {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": "1"} | malloc
        return kept


@dataclass(slots=True, frozen=True)
class ServerProcess:
    """A server, or the router, that this process has started."""

    index: int  # of the server in its fleet; 0 for the router
    endpoint: Endpoint
    supervisor: subprocess.Popen[bytes]
    pid: int  # of the server itself
    log: Path
    log_start: int  # earlier bytes of the log, which the previous server wrote

    @property
    def is_running(self) -> bool:
        return self.supervisor.poll() is None

    def listens(self) -> bool:
        """Says whether a process of this tree, and nobody else, listens at the endpoint's address.

        Until then any user of the machine may listen there, and would receive the keys. Only Linux reports this;
        elsewhere the function returns True.
        """
        url = urlsplit(self.endpoint.url)
        assert url.hostname is not None and url.port is not None
        return tree_listens(self.supervisor.pid, url.hostname, url.port) is not False

    def tail(self, num_lines: int) -> list[str]:
        """Returns the last lines that this process has written."""
        with self.log.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            start = self.log_start if self.log_start <= size else 0  # the supervisor has moved a full log
            file.seek(max(start, size - 512 * num_lines - 65536))
            return file.read().decode(errors="replace").splitlines()[-num_lines:]

    def cause(self) -> str:
        """Returns the last line of the log that names an error, or else its last line."""
        lines = [line.strip() for line in self.tail(200) if line.strip()]
        errors = [match[1] for match in map(CAUSE.match, lines) if match]
        return (errors or lines or ["it wrote nothing"])[-1][:500]

    def ask_to_end(self) -> None:
        """Asks the server to end; it does so soon."""
        assert self.supervisor.stdin is not None
        self.supervisor.stdin.close()

    def end_now(self) -> None:
        self.supervisor.terminate()
        self.end(END_SECONDS)

    def end(self, timeout_seconds: float) -> None:
        """Ends the server, by force after the timeout, and returns when all of its processes have ended."""
        self.ask_to_end()
        try:
            self.supervisor.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            self.supervisor.terminate()
            try:
                self.supervisor.wait(END_SECONDS)
            except subprocess.TimeoutExpired:  # the supervisor hangs; the server ends with it
                self.supervisor.kill()
                self.supervisor.wait()


def launch_server(
    settings: ServerSettings, index: int, gpus: Sequence[str], before: Endpoint | None = None
) -> ServerProcess:
    """Starts server `index` on a free port, with its own keys, and returns before it can answer.

    before: the server that the new one replaces, and whose keys it takes.
    """
    certificate = make_certificate() if uses_tls(settings.config) else None
    environment = settings.environment(gpus)
    return launch(settings, index, f"server_{index}", settings.command, environment, certificate, before)


def launch_router(settings: ServerSettings) -> ServerProcess:
    return launch(settings, 0, "router", settings.router_command, settings.environment([]))


def launch(
    settings: ServerSettings,
    index: int,
    name: str,
    command: Callable[[int], list[str]],  # makes the flags for a port
    environment: dict[str, str],
    certificate: Certificate | None = None,
    before: Endpoint | None = None,
) -> ServerProcess:
    config = settings.config
    log = settings.run_dir / "servers" / f"{name}.log"
    with held_port(config.host, config.ports) as (port, held), open_log(log) as file:
        log_start = file.tell()
        supervisor = subprocess.Popen(
            [str(config.python), str(LAUNCHER), *command(port)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            env=environment,
            start_new_session=True,  # the trainer handles Ctrl-C
            pass_fds=(held,),  # reserves the port as long as the supervisor lives
        )
    keys = {"api_key": secrets.token_urlsafe(32), "admin_key": secrets.token_urlsafe(32)}
    if before is not None:
        keys = {"api_key": before.api_key, "admin_key": before.admin_key}
    scheme, fingerprint = ("http", "") if certificate is None else ("https", certificate.fingerprint)
    endpoint = Endpoint(url(scheme, config.host, port), keys["api_key"], keys["admin_key"], config.tensor, fingerprint)
    assert supervisor.stdin is not None and supervisor.stdout is not None
    given = keys | {"grace_seconds": GRACE_SECONDS[settings.device_type], "log": str(log.resolve())}
    if certificate is not None:
        given |= asdict(certificate)
    try:
        supervisor.stdin.write(json.dumps(given).encode() + b"\n")
        supervisor.stdin.flush()
    except BrokenPipeError:
        pass  # the supervisor has ended; its log shows the reason
    with supervisor.stdout:
        answer = supervisor.stdout.readline()
    pid = json.loads(answer)["pid"] if answer else supervisor.pid
    return ServerProcess(index, endpoint, supervisor, pid, log, log_start)


def as_arguments(flags: Mapping[str, bool | int | float | str]) -> list[str]:
    """Converts flags to arguments: True gives the flag alone, False gives nothing."""
    given = {name: value for name, value in flags.items() if value is not False}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in given.items()]


def open_log(log: Path) -> IO[bytes]:
    """Opens a log for appending, with access for this user only.

    If other users can write to the run directory, they may have put a link there, so links are not followed. Raises
    ValueError for a link, and for anything that is not a file.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    try:
        folder = os.open(log.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(log.name, flags, 0o600, dir_fd=folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise ValueError(f"run_dir: {log} cannot be written ({error.strerror}); remove it if it is a link") from None
    file = os.fdopen(descriptor, "ab")
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        file.close()
        raise ValueError(f"run_dir: {log} is not a file; remove it")
    os.fchmod(descriptor, 0o600)
    return file


def url(scheme: str, host: str, port: int) -> str:
    """Returns the URL of a server; if it listens on all interfaces, the URL has the node's name."""
    if host in ("0.0.0.0", "::"):
        host = socket.getfqdn()
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def check_flags(flags: Iterable[str]) -> None:
    """Raises ValueError for a flag that this package sets itself. SGLang checks the others at its start."""
    for flag in flags:
        for setting, names in OWN_FLAGS.items():
            if flag in names:
                raise ValueError(f"rollout.sglang.flags: {flag} is set by {setting}: drop it")
        plain = flag.lstrip("-").replace("_", "-")
        if REFUSED_FLAGS.fullmatch(plain):
            raise ValueError(f"rollout.sglang.flags: {flag} would go around the servers' keys: drop it")
        if not re.fullmatch(r"[A-Za-z0-9-]+", plain):
            raise ValueError(f"rollout.sglang.flags: {flag!r} is no flag")
        if flag != plain:
            raise ValueError(f"rollout.sglang.flags: write {plain} instead of {flag}")


def check_python(python: Path) -> None:
    """Raises ValueError if this interpreter has no SGLang. Looks for it without an import, which takes seconds."""
    code = "import importlib.metadata; print(importlib.metadata.version('sglang'))"
    fix = "make it with tools/setup_sglang.sh, or name the interpreter of an environment that has SGLang"
    try:
        done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=120, check=False)
    except OSError as error:
        raise ValueError(f"rollout.sglang.python: {python} cannot be run ({error.strerror}); {fix}") from None
    except subprocess.TimeoutExpired:
        raise ValueError(f"rollout.sglang.python: {python} does not answer; {fix}") from None
    if done.returncode != 0:
        raise ValueError(f"rollout.sglang.python: {python} has no sglang; {fix}")
