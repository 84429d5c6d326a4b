"""tools/gpu_check.sh: what the report says of steps that pass, fail, hang and are left out; the tiny check on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools.gpu.check import Check, Folders, Step
from tools.gpu.findings import Finding, Recorder, read_findings
from tools.gpu.random_model import SHAPES, ModelShape
from tools.gpu.report import StepResult, as_markdown, step_status
from tests.support.paths import ROOT

