"""Real servers: how they start, whom they obey, and that nothing is left of them."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from megatron_oreal.config import SglangConfig
from megatron_oreal.engines.sglang.client import EventLoopThread, ServerError, ServerRefusal, SglangClient
from megatron_oreal.engines.sglang.endpoints import Endpoint, read_endpoints, write_endpoints
from megatron_oreal.engines.sglang.servers.answers import answer
from megatron_oreal.engines.sglang.servers.encryption import clear_traffic, make_certificate, uses_tls
from megatron_oreal.engines.sglang.servers.fleet import ServerFleet, open_servers
from megatron_oreal.engines.sglang.servers.launcher import write_certificate
from megatron_oreal.engines.sglang.servers.listening import open_addresses
from megatron_oreal.engines.sglang.servers.node import address_towards
from megatron_oreal.engines.sglang.servers.process import ServerSettings, check_flags, open_log
from megatron_oreal.engines.sglang.servers.router import Router
from tests.support.listening import listeners_of_tree

PYTHON = Path(".venv-sglang/bin/python").absolute()
CONFIG = SglangConfig(python=PYTHON, start_timeout_seconds=280)
ADMIN_PATHS = ("/update_weights_from_disk", "/begin_weight_update", "/pause_generation", "/flush_cache")


def opened(config: SglangConfig, model: Path, run_dir: Path, notify: Callable[[str], None] = print) -> Any:
    return open_servers(ServerSettings(config, model, "float32", run_dir, "cpu", context_length=512), notify)


def living(session: int) -> list[int]:
    """Processes of a session, those that have ended and wait for their parent left out."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if fields[0] != "Z" and int(fields[3]) == session:
            found.append(int(stat.parent.name))
    return found


def wait_for(condition: Callable[[], Any], timeout_seconds: float = 200) -> Any:
    deadline = time.monotonic() + timeout_seconds
    while not (result := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return result


@pytest.fixture(scope="module")
def loop() -> Iterator[EventLoopThread]:
    thread = EventLoopThread("test")
    yield thread
    thread.close()


def ask(loop: EventLoopThread, endpoint: Endpoint, request: str, body: dict[str, Any] | None = None) -> Any:
    """`request`: a method of the client's."""

    async def answer() -> Any:
        client = SglangClient(endpoint)
        try:
            if request.startswith("/"):
                return await client.control(request, body or {}, 60)
            return await (client.generate(body or {}, 60) if request == "generate" else client.get(body["path"], 60))  # type: ignore[index]
        finally:
            await client.close()

    return loop.run(answer())


def status(loop: EventLoopThread, endpoint: Endpoint, request: str, body: dict[str, Any] | None = None) -> int:
    try:
        ask(loop, endpoint, request, body)
    except ServerRefusal as refusal:
        return refusal.status
    return 200


GENERATE = {"input_ids": [3, 4, 5], "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}


@pytest.mark.sglang
def test_the_server_obeys_its_keys(sglang_fleet: ServerFleet, loop: EventLoopThread) -> None:
    [endpoint] = sglang_fleet.endpoints
    assert sglang_fleet.is_alive(endpoint)
    assert status(loop, endpoint, "generate", GENERATE) == 200
    without = Endpoint(endpoint.url, "", "")
    wrong = Endpoint(endpoint.url, endpoint.admin_key, endpoint.api_key)
    assert status(loop, without, "generate", GENERATE) == 401
    assert status(loop, without, "get", {"path": "/model_info"}) == 401
    for path in ADMIN_PATHS:
        assert (status(loop, without, path), status(loop, wrong, path)) == (401, 401), path
    assert status(loop, endpoint, "/flush_cache") == 200


@pytest.mark.sglang
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_server_listens_on_loopback_alone(sglang_fleet: ServerFleet) -> None:
    [process] = sglang_fleet.processes.values()
    assert process.listens() and open_addresses(process.supervisor.pid) == []
    found = listeners_of_tree(process.supervisor.pid)
    assert len(found) > 1, "besides its own port, the store and the sockets of its ranks"


@pytest.mark.sglang
@pytest.mark.slow
def test_a_server_of_another_node_speaks_https(sglang_model: Path, tmp_path: Path, loop: EventLoopThread) -> None:
    host = address_towards("192.0.2.1")
    if host.startswith("127."):
        pytest.skip("needs an address that other nodes reach")
    said: list[str] = []
    with opened(CONFIG.model_copy(update={"host": host}), sglang_model, tmp_path, said.append) as fleet:
        [endpoint] = fleet.endpoints
        assert endpoint.url.startswith(f"https://{host}:") and read_endpoints(tmp_path / "servers.json") == [endpoint]
        assert status(loop, endpoint, "generate", GENERATE) == 200
        with pytest.raises(ServerError):
            ask(loop, replace(endpoint, certificate="0" * 64), "generate", GENERATE)
        [process] = fleet.processes.values()
        assert {str(each.address) for each in listeners_of_tree(process.supervisor.pid)} <= {host, "127.0.0.1"}
    assert [line for line in said if "Warning" in line] == [
        f"Warning: weights travel to {endpoint} unencrypted: use a network that you trust"
    ]


@pytest.mark.sglang
def test_nobody_else_learns_the_keys(sglang_fleet: ServerFleet, loop: EventLoopThread) -> None:
    [endpoint] = sglang_fleet.endpoints
    told = str(ask(loop, endpoint, "get", {"path": "/server_info"}))
    log = sglang_fleet.processes[endpoint].log
    assert log.stat().st_mode & 0o777 == 0o600
    seen = [told, log.read_text(errors="replace")]
    for process in living(sglang_fleet.pid(endpoint)):
        seen += [Path(f"/proc/{process}/{file}").read_text(errors="replace") for file in ("cmdline", "environ")]
    assert len(seen) >= 2 + 2 * 3
    assert not [text for text in seen if endpoint.api_key in text or endpoint.admin_key in text]


@pytest.mark.sglang
def test_logprobs_are_the_untempered_models(
    sglang_fleet: ServerFleet, sglang_model: Path, loop: EventLoopThread
) -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    params = {"temperature": 0.5, "top_p": 0.8, "max_new_tokens": 512 - len(prompt), "ignore_eos": True}
    body = {"input_ids": prompt, "sampling_params": params, "return_logprob": True}
    answer = ask(loop, sglang_fleet.endpoints[0], "generate", body)
    ids = answer["output_ids"]
    assert len(prompt) + len(ids) == 512, "the whole context length is there"
    model = AutoModelForCausalLM.from_pretrained(sglang_model, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    expected = logits.log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    reported = torch.tensor([entry[0] for entry in answer["meta_info"]["output_token_logprobs"]])
    assert torch.allclose(reported, expected, atol=1e-3)
    tempered = (logits / 0.5).log_softmax(dim=-1).gather(1, torch.tensor(ids)[:, None])[:, 0]
    assert (reported - tempered).abs().mean() > 0.1


@pytest.mark.sglang
def test_a_router_generates_with_a_key_of_its_own(
    sglang_fleet: ServerFleet, sglang_model: Path, tmp_path: Path, loop: EventLoopThread
) -> None:
    if subprocess.run([PYTHON, "-c", "import sglang_router"], check=False, capture_output=True).returncode:
        pytest.skip("needs sglang-router in .venv-sglang")
    settings = ServerSettings(CONFIG, sglang_model, "float32", tmp_path, "cpu", context_length=512)
    router = Router(settings, sglang_fleet.endpoints)
    try:
        answer = ask(loop, router.endpoint, "generate", GENERATE | {"return_logprob": True})
        assert len(answer["output_ids"]) == len(answer["meta_info"]["output_token_logprobs"]) == 2
        [endpoint] = sglang_fleet.endpoints
        for key in ("", endpoint.api_key):
            assert status(loop, Endpoint(router.endpoint.url, key, key), "generate", GENERATE) == 401
        assert [*router.workers()] == [endpoint.url]
        pid = router.process.pid
        keys = (router.endpoint.api_key, endpoint.api_key, endpoint.admin_key)
        seen = [Path(f"/proc/{pid}/{file}").read_text() for file in ("cmdline", "environ")]
        assert not [text for text in [*seen, router.process.log.read_text()] if any(key in text for key in keys)]
    finally:
        router.close()
    assert living(pid) == []


@pytest.mark.sglang
def test_a_hung_server_is_replaced_and_nothing_is_left(sglang_model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    config = CONFIG.model_copy(update={"max_restarts": 1})
    with opened(config, sglang_model, tmp_path, said.append) as fleet:
        [first] = fleet.endpoints
        first_pid = fleet.pid(first)
        assert read_endpoints(tmp_path / "servers.json") == fleet.endpoints
        maps = [Path(f"/proc/{process}/maps").read_text() for process in living(first_pid)]
        shared = {line.split()[-1] for text in maps for line in text.splitlines() if " /dev/shm/sgl" in line}
        assert shared
        for process in living(first_pid):
            os.kill(process, signal.SIGSTOP)
        assert fleet.is_alive(first)
        second = fleet.restart(first)
        assert living(first_pid) == [] and not fleet.is_alive(first)
        assert not [file for file in shared if Path(file).exists()]
        assert fleet.endpoints == read_endpoints(tmp_path / "servers.json") == [second]
        assert second.api_key != first.api_key and second.admin_key != first.admin_key
        second_pid = fleet.pid(second)
        os.kill(second_pid, signal.SIGKILL)
        wait_for(lambda: not fleet.is_alive(second), 30)
        assert living(second_pid) == []
        with pytest.raises(ServerError, match=r"the 1 restarts of rollout\.sglang\.max_restarts are spent; its log: "):
            fleet.restart(second)
        assert fleet.endpoints == []
    assert said[0] == "waiting for 1 SGLang server ..."
    assert [line for line in said if "is ready after" in line and "127.0.0.1" in line]


@pytest.mark.sglang
def test_close_during_the_start_leaves_nothing(sglang_model: Path, tmp_path: Path) -> None:
    settings = ServerSettings(CONFIG, sglang_model, "float32", tmp_path, "cpu", context_length=512)
    fleet = ServerFleet(settings, [[]], print)
    with ThreadPoolExecutor(1) as pool:
        start = pool.submit(fleet.start)
        [process] = wait_for(lambda: [*fleet.processes.values()])
        wait_for(lambda: len(living(process.pid)) >= 3)
        fleet.close()
        assert living(process.pid) == []
        with pytest.raises(ServerError, match="was stopped while it started"):
            start.result()
    assert not (tmp_path / "servers.json").exists()


@pytest.mark.sglang
def test_a_wrong_flag_is_one_line(sglang_model: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"flags": {"mem-fraction-statik": 0.5}})
    expected = r"^rollout\.sglang\.flags: unknown flag --mem-fraction-statik; did you mean --mem-fraction-static\?$"
    with pytest.raises(ValueError, match=expected), opened(config, sglang_model, tmp_path):
        pass


@pytest.mark.sglang
def test_a_model_that_cannot_be_loaded_shows_the_log(sglang_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text((sglang_model / "config.json").read_text())
    said: list[str] = []
    with pytest.raises(ServerError) as caught, opened(CONFIG, model, tmp_path / "run", said.append):
        pass
    message = str(caught.value)
    assert "\n" not in message and "ended while it started" in message and "Cannot find any model weights" in message
    assert message.endswith(f"its log: {tmp_path / 'run' / 'servers' / 'server_0.log'}")
    assert len(said[-1].splitlines()) == 20


SCRIPT = """
import sys
from pathlib import Path
from megatron_oreal.config.rollout import SglangConfig
from megatron_oreal.engines.sglang.servers.fleet import open_servers
from megatron_oreal.engines.sglang.servers.process import ServerSettings
config = SglangConfig(python=sys.argv[1])
with open_servers(ServerSettings(config, Path(sys.argv[2]), "float32", Path(sys.argv[3]), "cpu", 512), print):
    pass
"""


@pytest.mark.sglang
def test_nothing_outlives_a_killed_trainer(sglang_model: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(PYTHON), str(sglang_model), str(tmp_path)]
    trainer = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    [supervisor] = wait_for(lambda: children(trainer.pid, "servers/launcher.py"))
    [server] = wait_for(lambda: children(supervisor, "servers/launcher.py"))
    wait_for(lambda: len(living(server)) >= 3)
    os.kill(server, signal.SIGSTOP)  # what is stopped does not see that its parent has gone
    trainer.kill()
    trainer.wait()
    wait_for(lambda: not living(server) and not living(supervisor), 30)


def children(process: int, name: str) -> list[int]:
    lists = [file.read_text() for file in Path(f"/proc/{process}/task").glob("*/children")]
    found = [int(child) for text in lists for child in text.split()]
    return [child for child in found if name in Path(f"/proc/{child}/cmdline").read_text()]


@pytest.mark.sglang
def test_serve_until_sigterm(sglang_model: Path, tmp_path: Path, loop: EventLoopThread) -> None:
    file = tmp_path / "shared" / "endpoints.json"
    settings = {
        "run_dir": str(tmp_path / "run"),
        "num_steps": 1,
        "model": {"path": str(sglang_model)},
        "data": {"prompts": "none.jsonl", "max_prompt_tokens": 8},
        "rollout": {"max_new_tokens": 8, "sglang": {"python": str(PYTHON), "endpoints_file": str(file)}},
    }
    (tmp_path / "serve.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "megatron_oreal.cli", "serve", str(tmp_path / "serve.yaml")]
    serving = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert serving.stdout is not None
    try:
        told = (line for line in serving.stdout if "is not ready after" not in line)
        lines = [next(told) for _ in range(3)]
        assert lines[0] == "waiting for 1 SGLang server ...\n"
        assert lines[2] == f"serving; the trainer's setting: rollout.sglang.endpoints_file={file}\n"
        assert file.stat().st_mode & 0o777 == 0o600
        config = CONFIG.model_copy(update={"endpoints_file": file})
        with opened(config, sglang_model, tmp_path / "trainer") as fleet:
            [endpoint] = fleet.endpoints
            assert status(loop, endpoint, "generate", GENERATE) == 200
            assert fleet.is_alive(endpoint) and fleet.log_tail(endpoint) == ""
            with pytest.raises(ServerError, match="was started elsewhere: start it again there"):
                fleet.restart(endpoint)
        assert status(loop, endpoint, "generate", GENERATE) == 200, "it goes on after the trainer"
        [supervisor] = children(serving.pid, "servers/launcher.py")
        [server] = children(supervisor, "servers/launcher.py")
        assert len(living(server)) >= 3
        serving.send_signal(signal.SIGTERM)
        assert serving.wait(60) == 0
        assert living(server) == living(supervisor) == []
        assert not file.exists()
        with pytest.raises(ServerError):
            ask(loop, endpoint, "generate", GENERATE)
    finally:
        serving.kill()
        serving.wait()


@pytest.mark.timeout(900)
@pytest.mark.sglang
@pytest.mark.slow
def test_a_port_that_is_taken_during_the_start_is_replaced(sglang_model: Path, tmp_path: Path) -> None:
    with socket.socket() as stranger:
        stranger.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stranger.bind(("127.0.0.1", 0))
        port = stranger.getsockname()[1]
        config = CONFIG.model_copy(update={"ports": (port, port + 20)})
        log = tmp_path / "servers" / "server_0.log"
        threading.Thread(target=lambda: wait_for(log.exists) and stranger.listen()).start()
        with opened(config, sglang_model, tmp_path) as fleet:
            assert fleet.endpoints[0].url != f"http://127.0.0.1:{port}"
            assert "address already in use" in log.read_text()


@pytest.mark.parametrize("python", ["none/bin/python", sys.executable, "/"])
def test_a_python_without_sglang_is_refused(python: str, tmp_path: Path) -> None:
    config = SglangConfig(python=Path(python))
    with pytest.raises(ValueError, match=r"^rollout\.sglang\.python: .*tools/setup_sglang\.sh"):
        with opened(config, tmp_path, tmp_path / "run"):
            pass
    assert not (tmp_path / "run").exists()


def test_servers_of_others_are_taken_as_they_are(tmp_path: Path) -> None:
    endpoints = [Endpoint(f"http://127.0.0.1:{port}", "a", "b") for port in (1, 2)]
    write_endpoints(tmp_path / "servers.json", endpoints)
    config = SglangConfig(python=Path("none"), endpoints_file=tmp_path / "servers.json")
    with opened(config, tmp_path, tmp_path / "run") as fleet:
        assert fleet.endpoints == endpoints and all(map(fleet.is_alive, endpoints))
    assert read_endpoints(tmp_path / "servers.json") == endpoints


def test_servers_of_other_nodes_are_not_started_again(tmp_path: Path) -> None:
    config, file = SglangConfig(placement="colocated"), tmp_path / "servers.json"
    own, other, unknown = (Endpoint(f"http://127.0.0.1:{port}", "a", "b") for port in (1, 2, 3))
    fleet = ServerFleet(ServerSettings(config, tmp_path, "float32", tmp_path, "cpu", context_length=16), [[]], print)
    fleet.endpoints = [own]
    fleet.publish(file, [other])
    assert read_endpoints(file) == fleet.endpoints == [own, other]
    assert [fleet.is_alive(endpoint) for endpoint in (own, other, unknown)] == [False, True, False]
    with pytest.raises(ServerError, match=r":2 was started elsewhere: the run goes on without it$"):
        fleet.restart(other)
    fleet.close()
    assert not file.exists()


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("port", "port is set by rollout.sglang.ports: drop it"),
        ("tp-size", "tp-size is set by rollout.sglang.tensor: drop it"),
        ("admin-api-key", "admin-api-key is set by the run: drop it"),
        ("context-length", "context-length is set by data.max_prompt_tokens and rollout.max_new_tokens: drop it"),
        ("config", "config would go around the servers' keys: drop it"),
        ("kv-events-config", "kv-events-config would go around the servers' keys: drop it"),
        ("disaggregation-mode", "disaggregation-mode would go around the servers' keys: drop it"),
        ("ssl-certfile", "ssl-certfile is set by rollout.sglang.tls: drop it"),
        ("--mem-fraction-static", "write mem-fraction-static instead of --mem-fraction-static"),
        ("mem_fraction_static", "write mem-fraction-static instead of mem_fraction_static"),
        ("a b", "'a b' is no flag"),
    ],
)
def test_flags_of_ours_are_refused(flag: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_flags([flag])
    assert str(caught.value) == f"rollout.sglang.flags: {message}"


def test_flags_are_passed_on(tmp_path: Path) -> None:
    flags = {"disable-overlap-schedule": False, "enable-metrics": True, "mem-fraction-static": 0.5}
    config = SglangConfig(flags=flags, placement="colocated")
    settings = ServerSettings(config, tmp_path, "bfloat16", tmp_path, "cpu", context_length=100)
    command = settings.command(31000)
    assert {"--enable-metrics", "--mem-fraction-static=0.5", "--context-length=108", "--device=cpu"} <= {*command}
    assert "--disable-overlap-schedule" not in command and "--enable-memory-saver" not in command
    on_gpus = ServerSettings(config, tmp_path, "bfloat16", tmp_path, "cuda", context_length=100)
    assert "--enable-memory-saver" in on_gpus.command(31000)


def test_a_launchers_variables_stay_with_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PYTHONPATH"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth0")
    settings = ServerSettings(SglangConfig(), tmp_path, "float32", tmp_path, "cuda", context_length=100)
    environment = settings.environment(["4", "5"])
    assert not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "PYTHONPATH"} & {*environment}
    assert (environment["CUDA_VISIBLE_DEVICES"], environment["NCCL_SOCKET_IFNAME"]) == ("4,5", "eth0")


def test_secrets_stay_with_the_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = (
        "HF_TOKEN",
        "WANDB_API_KEY",
        "AWS_SECRET_ACCESS_KEY",
        "PGPASSWORD",
        "MY_SECRET",
        "github_token",
        "PASSWD",
    )
    secrets += ("PASSWD", "GOOGLE_APPLICATION_CREDENTIALS", "SSH_AUTH_SOCK", "SGLANG_API_KEY")
    harmless = ("TOKENIZERS_PARALLELISM", "SGLANG_MAX_TOKENS", "LD_LIBRARY_PATH", "HF_HOME")
    for name in (*secrets, *harmless):
        monkeypatch.setenv(name, "1")
    config = SglangConfig(secrets=["HF_TOKEN"])
    settings = ServerSettings(config, tmp_path, "float32", tmp_path, "cpu", context_length=100)
    environment = settings.environment([])
    assert {*secrets} & {*environment} == {"HF_TOKEN"} and {*harmless} <= {*environment}


def test_servers_of_one_node_stay_on_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    for host, is_here in (("127.0.0.1", True), ("localhost", True), ("0.0.0.0", False), ("192.0.2.1", False)):
        settings = ServerSettings(SglangConfig(host=host), tmp_path, "float32", tmp_path, "cpu", context_length=100)
        assert ("GLOO_SOCKET_IFNAME" in settings.environment([])) == is_here


def test_logs_follow_no_link_and_are_private(tmp_path: Path) -> None:
    log = tmp_path / "servers" / "server_0.log"
    mine = tmp_path / "mine"
    mine.write_text("mine")
    log.parent.mkdir()
    log.write_text("older\n")
    log.chmod(0o644)
    with open_log(log) as file:
        file.write(b"newer\n")
    assert log.read_text() == "older\nnewer\n" and log.stat().st_mode & 0o777 == 0o600
    log.unlink()
    log.symlink_to(mine)
    with pytest.raises(ValueError, match=r"server_0\.log cannot be written \(.*\); remove it if it is a link"):
        open_log(log)
    log.unlink()
    os.mkfifo(log)
    with pytest.raises(ValueError, match=r"run_dir: .*server_0\.log"):
        open_log(log)
    log.unlink()
    log.parent.rmdir()
    log.parent.symlink_to(tmp_path)
    with pytest.raises(ValueError, match=r"server_0\.log cannot be written"):
        open_log(log)
    assert mine.read_text() == "mine"


SHORTEN = """
import os, sys
from megatron_oreal.engines.sglang.servers import launcher
launcher.MAX_LOG_BYTES = 100
for number in range(40):
    os.write(2, b"%08d\\n" % number)
    launcher.shorten_log(sys.argv[1])
"""


def test_a_log_does_not_grow_without_end(tmp_path: Path) -> None:
    log = tmp_path / "server_0.log"
    with open_log(log) as file:
        subprocess.run([sys.executable, "-c", SHORTEN, str(log)], stderr=file, check=True)
    older = tmp_path / "server_0.log.1"
    assert older.read_text().splitlines() == [f"{number:08d}" for number in range(24, 36)]
    assert log.read_text().splitlines() == [f"{number:08d}" for number in range(36, 40)]
    assert older.stat().st_mode & 0o777 == 0o600 and {*tmp_path.iterdir()} == {log, older}


@pytest.mark.parametrize("certificate", [True, False])
def test_a_certificate_is_pinned(tmp_path: Path, loop: EventLoopThread, certificate: bool) -> None:
    own, other = make_certificate(), make_certificate()
    flags = write_certificate({"certificate": own.certificate, "private_key": own.private_key}, tmp_path)
    assert flags == [f"--ssl-certfile={tmp_path}/certificate.pem", f"--ssl-keyfile={tmp_path}/private_key.pem"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "certificate.pem", tmp_path / "private_key.pem")
    heard: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            heard.append(self.headers["Authorization"])
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(b'{"x": 1}')

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        fingerprint = own.fingerprint if certificate else other.fingerprint
        endpoint = Endpoint(f"https://127.0.0.1:{server.server_port}", "key", "admin", certificate=fingerprint)
        if certificate:
            assert answer(endpoint, "/model_info", "key") == (200, {"x": 1})
            assert ask(loop, endpoint, "get", {"path": "/model_info"}) == {"x": 1}
        else:
            assert answer(endpoint, "/model_info", "key") == (0, None)
            with pytest.raises(ServerError, match="GET /model_info failed"):
                ask(loop, endpoint, "get", {"path": "/model_info"})
        server.shutdown()
    assert heard == (["Bearer key"] * 2 if certificate else [])


def test_clear_traffic_is_named() -> None:
    here, there = Endpoint("http://127.0.0.1:1", "", ""), Endpoint("http://192.0.2.1:2", "", "")
    secure = replace(there, url="https://192.0.2.1:2", certificate="0" * 64)
    config, disk = SglangConfig(), SglangConfig(weight_transport="disk")
    assert clear_traffic([here], config) is None and clear_traffic([secure], disk) is None
    assert "keys, prompts and weights travel to http://192.0.2.1:2 unencrypted" in str(
        clear_traffic([here, there], config)
    )
    assert "Warning: weights travel to https://192.0.2.1:2 unencrypted" in str(clear_traffic([secure], config))
    assert not uses_tls(config) and uses_tls(SglangConfig(host="0.0.0.0", tls=True))
    assert not uses_tls(SglangConfig(host="0.0.0.0", router=True)) and not uses_tls(SglangConfig(host="::", tls=False))
    with pytest.raises(ValueError, match=r"rollout\.sglang\.tls=true: sglang-router cannot check"):
        SglangConfig(router=True, tls=True)
