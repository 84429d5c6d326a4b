"""Offers the tools as subcommands of `megatron-oreal`. A call imports only its own tool, because some import torch."""

from __future__ import annotations

import importlib
import signal
import sys
from dataclasses import dataclass
from typing import Any

import click

from megatron_oreal.launch import fail


@dataclass(frozen=True, slots=True)
class Tool:
    name: str  # on the command line
    module: str  # whose `main`, or `cli` where there is one, is the click command
    summary: str
    interrupted: str = "nothing was written"  # what holds after Ctrl-C

    @property
    def settings(self) -> dict[str, Any]:
        names = ["-h", "--help"]
        return {"prog_name": f"megatron-oreal {self.name}", "standalone_mode": False, "help_option_names": names}

    def command(self) -> click.Command:
        """Returns a command that hands all its arguments, --help too, to the module's."""

        def call(arguments: tuple[str, ...]) -> None:
            module = importlib.import_module(f"megatron_oreal.commands.{self.module}")
            target: click.Command = getattr(module, "cli", module.main)
            # The exception makes the tool remove its incomplete output.
            signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
            try:
                target.main(list(arguments), **self.settings)
            except click.Abort:
                fail(f"interrupted; {self.interrupted}", 130)

        return click.Command(
            self.name,
            context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
            add_help_option=False,
            help=self.summary,
            params=[click.Argument(["arguments"], nargs=-1, type=click.UNPROCESSED)],
            callback=call,
        )


TOOLS = (
    Tool("doctor", "doctor", "Checks a machine, or the ranks of a job, and what a run needs of them."),
    Tool("export", "export", "Writes a checkpoint of a run, such as the best one, as a Hugging Face directory."),
    Tool("convert", "convert", "Converts checkpoints from Hugging Face to Megatron and back, and inspects them."),
    Tool("prepare-data", "prepare_data", "Makes prompts of public data sets, or of any table, and cleans them."),
    Tool("select-data", "select_data", "Chooses training data from the answers of an evaluation."),
    Tool(
        "tag-skills",
        "tag_skills",
        "Tags prompts with the skills that they take, by a language model.",
        interrupted="the same command asks for what is missing",
    ),
)
