"""Each check, on facts that are right and on facts that are wrong: the status, the words and the fix."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_oreal.config import SglangConfig
from megatron_oreal.doctor import files, servers, versions
from megatron_oreal.doctor.collective import AllReduce, check_all_reduce, check_clocks
from megatron_oreal.doctor.configuration import check_configuration, check_fit, load_any
from megatron_oreal.doctor.files import FileFacts, check_files, try_files
from megatron_oreal.doctor.findings import Finding, Report, error, merged, ok, warning
from megatron_oreal.doctor.gpus import Gpu, GpuFacts, check_fp8, check_gpus, check_memory_need, check_transformer_engine
from megatron_oreal.doctor.host import UNLIMITED, HostFacts, check_host, read_host
from megatron_oreal.doctor.network import (
    Link,
    NetworkFacts,
    check_network,
    chosen_by_nccl,
    expected_link,
    read_network,
)
from megatron_oreal.doctor.versions import check_versions, compare_versions, read_requirements, version_facts
from megatron_oreal.engines.sglang.endpoints import Endpoint, write_endpoints
from tests.test_launch import write_run

GIB = 2**30
H100 = Gpu("NVIDIA H100", (9, 0), 79 * GIB, 80 * GIB)
NODE = GpuFacts([H100] * 8, num_local_ranks=8, num_devices=8, cuda="13.0", driver="580.82")
CPU = GpuFacts([], num_local_ranks=1, num_devices=0, cuda=None)
HOST = HostFacts(200 * GIB, None, 16 * GIB, 2**20, UNLIMITED, False, 8, 8, 64)
TWO_NODES = NetworkFacts(
    {"lo": 0, "eth0": 100_000}, host="n1", host_address="10.0.0.1", master="n1", is_on_one_node=False
)


def bad(findings: Iterable[Finding]) -> list[Finding]:
    found = [finding for finding in findings if finding.status != "ok"]
    assert all(finding.fix for finding in found), "what is not ok has a fix"
    return found


def only(findings: Iterable[Finding]) -> tuple[str, str]:
    """The status and the words of the one finding that is not ok."""
    [finding] = bad(findings)
    return finding.status, f"{finding.message}; {finding.fix}"


def test_versions() -> None:
    assert not bad(check_versions())
    needed = [Requirement("torch>=2.8"), Requirement("math-verify==0.9.0")]
    preliminary = {"torch": "2.10.0a0+b4e4ee81d3", "math-verify": "0.9.0"}  # as in NGC's images
    assert not bad(check_versions(needed, preliminary.get))
    status, words = only(check_versions(needed, {"torch": "2.7.1", "math-verify": "0.9.0"}.get))
    assert status == "error" and "torch 2.7.1; needed: torch>=2.8" in words
    assert "math-verify is missing" in only(check_versions(needed, {"torch": "2.8"}.get))[1]
    assert {one.name for one in read_requirements("gpu")} == {"transformer-engine"}
    assert "torch" not in {one.name for one in read_requirements("sglang")}


def test_another_python_and_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(versions.platform, "python_version", lambda: "3.9.2")
        assert only(check_versions()) == ("error", "Python 3.9.2 is not >=3.10; make .venv with another PYTHON")
    monkeypatch.setattr(versions, "PACKAGE", "no-such-package")
    with pytest.raises(ValueError, match="is not installed as a package"):
        list(check_versions())


def test_hosts_with_several_versions() -> None:
    assert not list(compare_versions({"n1": version_facts(), "n2": version_facts()}))
    status, words = only(compare_versions({"n1": {"torch": "2.13.0"}, "n2": {"torch": "2.12.0"}}))
    assert (status, "2.13.0 on n1, 2.12.0 on n2" in words) == ("error", True)


@pytest.mark.parametrize(
    ("facts", "status", "words"),
    [
        (replace(NODE, num_local_ranks=9), "error", "9 processes on a host with 8 visible GPUs"),
        (replace(NODE, gpus=[H100, replace(H100, problem="an illegal memory access")]), "error", "GPU 1 fails"),
        (replace(NODE, num_memory_errors=2), "error", "2 uncorrected memory errors"),
        (replace(NODE, gpus=[replace(H100, free_bytes=20 * GIB)] * 8), "warning", "other processes use 60 of 80 GiB"),
        (replace(NODE, gpus=[H100, replace(H100, name="NVIDIA A100")]), "warning", "several kinds"),
        (replace(CPU, num_devices=8), "error", "install torch for CUDA"),
        (replace(CPU, given="0,1", cuda="13.0"), "error", "the driver must suit CUDA 13.0"),
        (replace(CPU, num_devices=8, cuda="13.0", hides_gpus=True), "warning", "unset it to use the GPUs"),
    ],
)
def test_gpus(facts: GpuFacts, status: str, words: str) -> None:
    found = bad(check_gpus(replace(facts, num_local_ranks=min(facts.num_local_ranks, 9))))
    assert any(one.status == status and words in f"{one.message}; {one.fix}" for one in found)


def test_good_gpus_and_none() -> None:
    assert not bad(check_gpus(NODE)) and not bad(check_gpus(CPU))


def test_transformer_engine_and_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not bad(check_transformer_engine(CPU))
    assert only(check_transformer_engine(NODE))[0] == "warning"
    status, words = only(check_transformer_engine(NODE, wanted=True))
    assert status == "error" and "is not installed" in words
    monkeypatch.setattr("megatron_oreal.doctor.gpus.version", lambda _: "2.10.0")
    assert "cannot be used" in only(check_transformer_engine(NODE))[1]
    monkeypatch.setattr("megatron_oreal.doctor.gpus.check_version", lambda _: None)
    assert not bad(check_transformer_engine(NODE))
    monkeypatch.setattr("megatron_oreal.doctor.gpus.version", lambda _: "2.15.0")
    assert only(check_transformer_engine(NODE))[0] == "warning"
    assert not bad(check_fp8(NODE, "tensorwise", "fp8_grad")) and not bad(check_fp8(CPU))
    assert only(check_fp8(NODE, "mxfp8"))[0] == "error"
    a100 = replace(NODE, gpus=[replace(H100, capability=(8, 0))])
    assert not bad(check_fp8(a100))
    assert "needs >= 8.9" in only(check_fp8(a100, None, "fp8_grad"))[1]
    assert "with no GPU" in only(check_fp8(CPU, "blockwise"))[1]


def test_states_that_do_not_fit() -> None:
    names = "parallel.tensor"
    assert not bad(check_memory_need(50 * GIB, NODE, names))
    assert only(check_memory_need(75 * GIB, NODE, names))[0] == "warning"
    status, words = only(check_memory_need(100 * GIB, NODE, names))
    assert status == "error" and "100.0 of a GPU's 80 GiB; raise parallel.tensor" in words


@pytest.mark.parametrize(
    ("facts", "status", "words"),
    [
        (replace(HOST, available_bytes=3 * GIB), "error", "--mem=0"),
        (replace(HOST, limit_bytes=12 * GIB), "warning", "only 12.0 GiB"),
        (replace(HOST, shm_free_bytes=64 * 2**20), "error", "too little for NCCL; start the container with --ipc=host"),
        (replace(HOST, shm_free_bytes=64 * 2**20, num_gpus=0), "warning", "only /dev/shm has 64 MiB"),
        (replace(HOST, shm_free_bytes=None), "warning", "there is no /dev/shm"),
        (replace(HOST, max_files=1024), "warning", "ulimit -n 4096"),
        (replace(HOST, has_infiniband=True, max_locked_bytes=65536), "error", "--ulimit memlock=-1"),
    ],
)
def test_host(facts: HostFacts, status: str, words: str) -> None:
    found = only(check_host(facts))
    assert found[0] == status and words in found[1]


def test_this_host_is_read() -> None:
    facts = read_host(num_gpus=0)
    assert facts.available_bytes is None or facts.available_bytes > 0
    assert facts.max_files > 0 and facts.num_cores > 0
    assert not bad(check_host(HOST))


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"gloo": "ib9"}, "error", "GLOO_SOCKET_IFNAME=ib9 is no interface; export one of: lo, eth0"),
        ({"nccl": "=eth"}, "error", "NCCL_SOCKET_IFNAME==eth fits no interface"),
        ({"master_is_known": False}, "error", "MASTER_ADDR=n1 cannot be resolved"),
        ({"gloo": "lo"}, "error", "it reaches this node alone"),
        ({"host_address": "127.0.1.1"}, "warning", "export GLOO_SOCKET_IFNAME"),
        ({"host_address": ""}, "warning", "stands for no address"),
        ({"infiniband": {"mlx5_0": ("DOWN", 400.0)}}, "warning", "ports are down: mlx5_0"),
        ({"infiniband": {"mlx5_0": ("ACTIVE", 400.0)}, "infiniband_is_off": True}, "warning", "NCCL_IB_DISABLE=1"),
    ],
)
def test_network(change: dict[str, object], status: str, words: str) -> None:
    found = only(check_network(replace(TWO_NODES, **change)))  # type: ignore[arg-type]
    assert found[0] == status and words in found[1]


def test_good_network() -> None:
    assert not bad(check_network(TWO_NODES))
    assert not bad(check_network(read_network({})))
    assert not bad(check_network(replace(TWO_NODES, host_address="127.0.1.1", gloo="eth0", nccl="^lo")))


def test_interfaces_are_chosen_as_nccl_does() -> None:
    names = ["lo", "eth0", "eth1", "ib0"]
    assert chosen_by_nccl("eth", names) == ["eth0", "eth1"]
    assert chosen_by_nccl("=eth0,ib0", names) == ["eth0", "ib0"]
    assert chosen_by_nccl("^lo,eth", names) == ["ib0"]
    assert chosen_by_nccl("^=eth0", names) == ["lo", "eth1", "ib0"]


def test_what_the_links_should_give() -> None:
    eight = {f"mlx5_{number}": ("ACTIVE", 400.0) for number in range(8)}
    nodes = replace(TWO_NODES, infiniband=eight | {"mlx5_8": ("DOWN", 400.0)})
    assert expected_link(nodes, on_gpus=True) == Link("8 x InfiniBand", 400.0)
    assert expected_link(nodes, on_gpus=False) == Link("Ethernet", 12.5)
    assert expected_link(replace(nodes, nccl="eth0", infiniband_is_off=True), on_gpus=True) == Link("Ethernet", 12.5)
    assert expected_link(replace(nodes, interfaces={"lo": 0}), on_gpus=False).gigabytes_per_second is None
    assert expected_link(read_network({}), on_gpus=False) == Link("loopback", None)


def test_all_reduce() -> None:
    found = AllReduce("nccl", 2**26, seconds=0.001, is_right=True, num_ranks=8)
    assert found.bus_gigabytes_per_second == pytest.approx(2 * 7 / 8 * 2**26 / 0.001 / 1e9)
    assert not bad(check_all_reduce(found, Link("18 NVLinks", 450.0)))
    slow = replace(found, seconds=0.1)
    status, words = only(check_all_reduce(slow, Link("18 NVLinks", 450.0)))
    assert status == "warning" and "1.17 GB/s of 450.0 GB/s (18 NVLinks); NCCL_DEBUG=INFO" in words
    assert not bad(check_all_reduce(slow, Link("loopback", None)))
    assert only(check_all_reduce(replace(found, is_right=False), Link("x", None)))[0] == "error"


def test_clocks() -> None:
    assert not bad(check_clocks([("n1", 0.0), ("n2", 0.01)]))
    assert only(check_clocks([("n1", 0.0), ("n2", -5.0)]))[0] == "warning"
    status, words = only(check_clocks([("n1", 0.0), ("n2", 90.0)]))
    assert status == "error" and "the host n2 differs by +90.0 s; synchronise" in words


FILES = FileFacts(Path("runs"), bytes_per_second=1e9, free_bytes=2**40)


@pytest.mark.parametrize(
    ("facts", "status", "words"),
    [
        (replace(FILES, problem="Read-only file system"), "error", "runs cannot be written (Read-only file system)"),
        (replace(FILES, renames=False), "error", "cannot rename"),
        (replace(FILES, creates_once=False), "error", "cannot create a file exclusively"),
        (replace(FILES, locks=False), "warning", "no POSIX locks"),
        (replace(FILES, free_bytes=1000), "error", "is full"),
        (replace(FILES, free_bytes=5 * GIB), "warning", "only 5.0 GiB free"),
        (replace(FILES, bytes_per_second=1e5), "warning", "takes 0.1 MB/s"),
        (replace(FILES, clock_skew_seconds=-3.0), "warning", "the file system runs differs by -3.0 s"),
        (replace(FILES, clock_skew_seconds=100.0), "error", "synchronise the clocks"),
    ],
)
def test_files(facts: FileFacts, status: str, words: str) -> None:
    found = only(check_files(facts))
    assert found[0] == status and words in found[1]


def test_a_real_folder_is_tried_and_left_clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    facts = try_files(tmp_path / "runs" / "first")  # is not there yet: its nearest parent counts
    assert facts.folder == tmp_path and facts.locks and facts.renames and facts.creates_once and not facts.problem
    assert facts.bytes_per_second > 0 and facts.free_bytes > 0 and abs(facts.clock_skew_seconds) < 60
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(files, "TRY_LOCK", "")  # a process that gets the lock although another holds it
    assert not try_files(tmp_path).locks
    (tmp_path / "file").write_text("")
    assert try_files(tmp_path / "file").problem


def test_sglangs_environment(tmp_path: Path) -> None:
    found = servers.Environment(Path("python"), {"sglang": "0.5.23", "torch": "2.13.0+cpu"})
    assert not bad(servers.check_environment(found, is_needed=True, has_gpus=False))
    assert "install SGLang for CUDA" in only(servers.check_environment(found, True, has_gpus=True))[1]
    old = replace(found, versions={"sglang": "0.4.1"})
    assert "sglang 0.4.1 in python is not >=0.5.20" in only(servers.check_environment(old, True, False))[1]
    nothing = servers.read_environment(tmp_path / "python")
    assert only(servers.check_environment(nothing, True, False))[0] == "error"
    status, words = only(servers.check_environment(nothing, False, False))
    assert status == "warning" and "tools/setup_sglang.sh" in words
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\necho 'no module' >&2\nexit 1\n")
    program.chmod(0o755)
    assert servers.read_environment(program).problem == "no module"
    program.write_text("#!/bin/sh\necho '{}'\n")
    assert "it has no sglang" in only(servers.check_environment(servers.read_environment(program), True, False))[1]


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, "does not answer; start megatron-oreal serve"), (401, "refuses its key"), (503, "answers with status 503")],
)
def test_endpoints(status: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "servers.json"
    assert "cannot be read" in only(servers.check_endpoints(file))[1]
    write_endpoints(file, [Endpoint("http://127.0.0.1:31000", "a", "b"), Endpoint("http://127.0.0.1:31001", "a", "b")])
    monkeypatch.setattr(servers, "key_status", lambda _: 200)
    assert not bad(servers.check_endpoints(file))
    monkeypatch.setattr(servers, "key_status", lambda endpoint: status if "31001" in endpoint.url else 200)
    found = only(servers.check_endpoints(file))
    assert found[0] == "error" and "http://127.0.0.1:31001" in found[1] and words in found[1]


def test_ports() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = SglangConfig(ports=(port, port))
        status, words = only(servers.check_ports(config))
        assert status == "error" and "rollout.sglang.ports" in words
    assert not bad(servers.check_ports(config))
    assert "no address of this node" in only(servers.check_ports(config.model_copy(update={"host": "192.0.2.7"})))[1]


def test_servers_and_trainer_on_the_same_gpus() -> None:
    visible = [str(number) for number in range(8)]
    config = SglangConfig(num_servers=4)
    assert not bad(servers.check_server_gpus(config, 4, visible))
    status, words = only(servers.check_server_gpus(config, 6, visible))
    assert status == "error" and "num_servers=4 x tensor=1 need 4 GPUs, 2 are beside the trainer's" in words
    both = config.model_copy(update={"gpus": [0, 1, 2, 3]})
    assert "the trainer itself has GPU 0" in only(servers.check_server_gpus(both, 4, visible))[1]
    assert not list(servers.check_server_gpus(config, 4, []))


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Path]:
    def write(**settings: object) -> Path:
        return write_run(tmp_path, "run", **settings)

    return write


def test_configuration(run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    file = run(parallel={"tensor": 2})
    config = load_any(file, [])
    assert config == load_any(file, [], "sft") and type(config).__name__ == "SftConfig"
    assert not bad(check_configuration(config))
    with pytest.raises(ValueError, match="configuration of `megatron-oreal sft`"):
        load_any(file, [], "train")
    with pytest.raises(ValueError, match="num_stepz"):
        load_any(file, ["num_stepz=3"], "sft")

    def mistake(*overrides: str) -> str:
        status, words = only(check_configuration(load_any(file, overrides)))
        assert status == "error"
        return words

    assert "model.path: nowhere does not exist; download" in mistake("model.path=nowhere")
    assert "data.examples: nothing.jsonl cannot be read" in mistake("data.examples=nothing.jsonl")
    (tmp_path / "words.jsonl").write_text("not JSON\n")
    assert "is no JSON" in mistake(f"data.examples={tmp_path / 'words.jsonl'}")
    (tmp_path / "words.jsonl").write_text("3\n")
    assert "holds no JSON objects" in mistake(f"data.examples={tmp_path / 'words.jsonl'}")
    assert "must divide the model's" in mistake("parallel.tensor=7")
    (config.model.path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-2.safetensors"}}')
    assert "model-2.safetensors is not in" in mistake()
    (config.model.path / "model.safetensors.index.json").unlink()
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert "must divide the 3 processes started" in {one.message for one in bad(check_configuration(config))}.pop()


def test_a_run_directory_in_use(run: Callable[..., Path]) -> None:
    from megatron_oreal.run.run_lock import take_lock

    config = load_any(run(), [])
    config.run_dir.mkdir(parents=True, exist_ok=True)
    lock = take_lock(config.run_dir)
    try:
        words = only(check_configuration(config))[1]
        assert f"is in use by process {os.getpid()}" in words
    finally:
        lock.release()
    assert not bad(check_configuration(config))


def test_more_processes_than_gpus(run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    config = load_any(run(parallel={"tensor": 2}), [])
    one = replace(NODE, gpus=[H100])
    assert "2 processes on 1 GPUs; lower parallel.data" in only(check_fit(config, one))[1]
    assert not bad(check_fit(config, NODE)) and not list(check_fit(config, CPU))
    tiny = replace(NODE, gpus=[replace(H100, total_bytes=1000)] * 8)
    assert "weights, gradients and optimizer take" in only(check_fit(config, tiny))[1]


def test_a_report_in_lines_and_in_json() -> None:
    n1 = [ok("files", "runs: 100 MB/s"), warning("limits", "few files", "raise them")]
    n2 = [ok("files", "runs: 98 MB/s"), error("gpus", "broken \x1b[2J", "drain\nthe node")]
    report = Report(merged([("n1", n1), ("n2", n2)]), num_ranks=16, hosts=["n1", "n2"], seconds=1.25)
    assert report.text().splitlines() == [
        "ok      files         runs: 100 MB/s",
        "warning limits        few files; raise them [n1]",
        r"error   gpus          broken \x1b[2J; drain the node [n2]",
        "doctor: 1 ok, 1 warnings, 1 errors (16 processes on 2 hosts, 1.2 s)",
    ]
    assert report.exit_code == 1
    read = json.loads(report.json())
    assert read.keys() == {"schema", "status", "num_ranks", "hosts", "seconds", "findings"}
    assert (read["schema"], read["status"], read["num_ranks"], read["hosts"]) == (1, "error", 16, ["n1", "n2"])
    assert read["findings"][1] == {
        "check": "limits",
        "status": "warning",
        "message": "few files",
        "fix": "raise them",
        "hosts": ["n1"],
    }
    assert Report(n1, 1, ["n1"], 0.0).exit_code == 0
