"""How much faster the updates of one setting are than those of another, of the same step of a check."""

from __future__ import annotations

from pathlib import Path

import click

from tools.gpu.findings import Recorder, read_findings

RATE = "response tokens/s"


@click.command()
@click.option("--findings", type=click.Path(path_type=Path), required=True)
@click.option("--step", required=True)
@click.argument("setting")
@click.argument("base")
def main(findings: Path, step: str, setting: str, base: str) -> None:
    """Records the rate of SETTING over that of BASE, each as SECTION.KEY=VALUE, both measured before."""
    recorder = Recorder(findings, step)
    rates = {each.name: each.value for each in read_findings(findings) if each.step == step}
    found, other = (rates.get(f"{label}: {RATE}") for label in (setting, base))
    name = f"updates with {setting}, as fast as with {base}"
    if isinstance(found, float) and isinstance(other, float):
        recorder.note(name, found / other, "times")
    else:
        recorder.skip(name, "not both were measured")


if __name__ == "__main__":
    main()
