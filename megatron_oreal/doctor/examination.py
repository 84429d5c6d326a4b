"""Runs the whole examination: the checks of each host, the joint checks of the ranks, and the first rank's report.

One process per host checks the host. If a check hangs, for example because a file server does not answer, the doctor
names the check after `seconds` and exits with 1.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from megatron_oreal.config import SglangConfig
from megatron_oreal.doctor.collective import (
    check_all_reduce,
    check_clocks,
    joined,
    measure_all_reduce,
    measure_clocks,
    world_size,
)
from megatron_oreal.doctor.configuration import Config, check_configuration, check_fit
from megatron_oreal.doctor.files import check_files, try_files
from megatron_oreal.doctor.findings import Finding, Report, error, merged, of_mistake, ok
from megatron_oreal.doctor.gpus import GpuFacts, check_fp8, check_gpus, check_transformer_engine, read_gpus
from megatron_oreal.doctor.host import check_host, read_host
from megatron_oreal.doctor.network import NetworkFacts, check_network, expected_link, read_network
from megatron_oreal.doctor.servers import (
    check_endpoints,
    check_environment,
    check_ports,
    check_server_gpus,
    read_environment,
)
from megatron_oreal.doctor.versions import check_versions, compare_versions, version_facts
from megatron_oreal.parallel.collectives import all_gather_object, is_alone
from megatron_oreal.parallel.nodes import this_node

NO_RANKS = "ran on one process: start it under torchrun or srun to try the job's ranks"


class Examination:
    """The findings of this process so far, and its current check."""

    def __init__(self, config: Config | None, folder: Path) -> None:
        self.config, self.folder = config, folder
        self.findings: list[Finding] = []
        self.current = "start"
        self.start = time.monotonic()
        self.host = socket.gethostname()

    def take(self, name: str, check: Callable[[], Iterable[Finding]]) -> None:
        """Adds the findings of a check. An exception becomes an error finding, and the other checks continue."""
        self.current = name
        try:
            self.findings.extend(check())
        except ValueError as mistake:
            self.findings.append(of_mistake(name, mistake))
        except (OSError, RuntimeError) as raised:
            reason = f"{type(raised).__name__}: {str(raised)[:300]}"
            self.findings.append(error(name, f"the check itself failed ({reason})", "see the message"))

    def examine_host(self) -> None:
        """Runs the checks of one process of each host."""
        config = self.config
        self.take("packages", check_versions)
        gpus, network = read_gpus(), read_network()
        self.take("gpus", lambda: check_gpus(gpus))
        wants_engine = config is not None and config.model.implementation == "transformer_engine"
        self.take("te", lambda: check_transformer_engine(gpus, wants_engine))
        fp8 = (None, "bf16") if config is None else (config.model.fp8, config.model.head_precision)
        self.take("fp8", lambda: check_fp8(gpus, *fp8))
        self.take("sglang", lambda: self.check_servers(gpus))
        self.take("interfaces", lambda: check_network(network))
        self.take("host memory", lambda: check_host(read_host(len(gpus.gpus))))
        self.take("files", lambda: check_files(try_files(self.folder)))
        if config is not None:
            self.take("config", lambda: (*check_configuration(config), *check_fit(config, gpus)))

    def check_servers(self, gpus: GpuFacts) -> Iterator[Finding]:
        config = self.config
        servers = SglangConfig() if config is None else config.rollout.sglang
        uses_servers = config is not None and config.rollout.engine == "sglang"
        starts_servers = uses_servers and servers.endpoints_file is None
        if config is not None and not uses_servers:
            yield ok("sglang", "rollout.engine=local needs no servers")
            return
        if starts_servers or not uses_servers:
            yield from check_environment(read_environment(servers.python), starts_servers, bool(gpus.gpus))
        if servers.endpoints_file is not None:
            yield from check_endpoints(servers.endpoints_file)
        node = this_node()
        is_server_node = node.index == 0 or servers.placement == "colocated"
        if starts_servers and is_server_node:
            yield from check_server_gpus(servers, node.num_ranks)
            if node.num_nodes == 1 or servers.placement == "disaggregated":
                yield from check_ports(servers)

    def examine_job(self, network: NetworkFacts, on_gpus: bool) -> list[tuple[str, list[Finding]]]:
        """Collective. Collects the joint findings of the ranks and the findings of each host."""
        if is_alone():
            self.findings.append(ok("all-reduce", NO_RANKS))
            self.findings.append(ok("clocks", "one host has one clock"))
            return [(self.host, self.findings)]
        self.take("all-reduce", lambda: check_all_reduce(measure_all_reduce(), expected_link(network, on_gpus)))
        self.take("clocks", lambda: check_clocks(measure_clocks()))
        self.current = "versions of all hosts"
        versions = dict(all_gather_object((self.host, version_facts())))
        self.take("packages", lambda: compare_versions(versions))
        self.take("files", self.check_shared)
        return all_gather_object((self.host, self.findings))

    def check_shared(self) -> Iterator[Finding]:
        """Collective. Checks whether every other host sees what the first rank writes."""
        folder = self.folder
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        is_first = os.environ.get("RANK", "0") == "0"
        token = all_gather_object(os.urandom(8).hex())[0]
        file = folder / f".doctor-{token}"
        if is_first:
            file.write_text(token)
        all_gather_object(None)
        seen = dict(all_gather_object((self.host, file.exists())))
        if is_first:
            file.unlink(missing_ok=True)
        blind = sorted(host for host, sees in seen.items() if not sees)
        if blind:
            fix = "put run_dir on a file system that all nodes mount at the same path"
            yield error("files", f"{folder} of the first host is not the one of {', '.join(blind[:4])}", fix)
        elif len(seen) > 1:
            yield ok("files", f"all {len(seen)} hosts see the same {folder}")


def examine(config: Config | None, folder: Path, seconds: float, show: Callable[[Report], None]) -> int:
    """Collective. Examines the job, makes the first rank show the report, and returns the exit code of every rank.

    If the ranks do not find each other, one process of each host shows that host's findings.
    """
    examination = Examination(config, folder)
    stop = watch(examination, seconds, show)
    if looks_at_host():
        examination.examine_host()
    examination.current = "meeting of the ranks"
    is_first = os.environ.get("RANK", "0") == "0"
    try:
        with joined(seconds):
            network = read_network()
            by_host = examination.examine_job(network, on_gpus=uses_gpus())
            report = report_of(examination, by_host)
            if is_first:
                show(report)
            all_gather_object(None)  # no rank may end before the report is printed
    except ValueError as mistake:
        found = of_mistake("all-reduce", mistake)
        report = report_of(examination, [(examination.host, [*examination.findings, found])])
        if looks_at_host():
            show(report)
        else:
            print(found.line(1), file=sys.stderr, flush=True)
    stop.set()
    return report.exit_code


def looks_at_host() -> bool:
    return os.environ.get("LOCAL_RANK", "0") == "0"


def uses_gpus() -> bool:
    import torch

    return torch.cuda.is_available()


def report_of(examination: Examination, by_host: list[tuple[str, list[Finding]]]) -> Report:
    hosts = list(dict.fromkeys(host for host, _ in by_host))
    return Report(merged(by_host), world_size(), hosts, time.monotonic() - examination.start)


def watch(examination: Examination, seconds: float, show: Callable[[Report], None]) -> threading.Event:
    """Ends this process with 1 unless the returned event is set in time."""
    stop = threading.Event()

    def wait() -> None:
        if stop.wait(seconds):
            return
        late = error(
            examination.current.split()[0],
            f"{examination.current}: no end after {seconds:.0f} s on {examination.host}",
            "a file server, a rank or a network is lost: look at the other hosts' lines, or raise --seconds",
        )
        show(report_of(examination, [(examination.host, [*examination.findings, late])]))
        os._exit(1)

    threading.Thread(target=wait, name="doctor's clock", daemon=True).start()
    return stop
