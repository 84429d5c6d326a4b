"""The package's layers and what each may import, read from the sources."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "megatron_oreal"
MAX_LINES = 450

# A part of the package imports from its own layer and those before it.
LAYERS = (
    ("types", "config", "statistics", "parallel", "kernels"),
    ("observability",),
    ("data", "rewards", "weights"),
    ("algorithms", "checkpoint", "conversion", "engines"),
    ("models", "rollout", "reports"),
    ("run",),
    ("evaluation", "doctor"),
    ("train",),
    ("launch", "commands", "cli"),
)
LAYER_OF = {part: index for index, parts in enumerate(LAYERS) for part in parts}
FILES = sorted((ROOT / PACKAGE).rglob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in FILES}


def imported_names(source: str) -> set[str]:
    """Dotted names that the source imports anywhere, `from a import b` as a and a.b."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in ("import_module", "__import__"):
            names |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed":
            names.add("torch.distributed")
    return names


IMPORTS = {module: imported_names(path.read_text()) for module, path in MODULES.items()}


def part_of(name: str) -> str | None:
    """`rollout` for megatron_oreal.engines.engine, None outside the package."""
    parts = name.split(".")
    return parts[1] if parts[0] == PACKAGE and len(parts) > 1 else None


def modules_of(*parts: str) -> Iterator[str]:
    return (module for module in MODULES if part_of(module) in parts)


def importers_of(*packages: str) -> set[str]:
    def is_inside(name: str) -> bool:
        return any(name == package or name.startswith(f"{package}.") for package in packages)

    return {module for module, names in IMPORTS.items() if any(map(is_inside, names))}


def test_every_kind_of_import_is_seen() -> None:
    source = """
import a.b as c
def late():
    from d import e
if TYPE_CHECKING:
    from f.g import h as i
importlib.import_module("j")
importlib.util.find_spec("k")
torch.distributed.all_reduce(x)
"""
    assert imported_names(source) == {"a.b", "d", "d.e", "f.g", "f.g.h", "j", "torch.distributed"}


def test_every_part_has_a_layer() -> None:
    unknown = {part for part in map(part_of, MODULES) if part is not None} - LAYER_OF.keys()
    assert not unknown, f"name the layer of {sorted(unknown)} in LAYERS"


@pytest.mark.parametrize("module", [module for module in MODULES if module != PACKAGE])
def test_imports_point_to_lower_layers(module: str) -> None:
    own = part_of(module)
    assert own is not None
    imported = {part for part in map(part_of, IMPORTS[module]) if part in LAYER_OF}
    upwards = {part for part in imported if LAYER_OF[part] > LAYER_OF[own]}
    assert not upwards, f"{module} ({own}) imports from {sorted(upwards)}"


def module_imports(module: str) -> set[str]:
    """The package's modules that `module` imports, itself and the packages around it left out."""
    found = set()
    for name in IMPORTS[module]:
        owner = name if name in MODULES else name.rpartition(".")[0]
        # `from package import module` reads as both names; the package itself counts only for what its face defines.
        is_package_of_module = any(other in MODULES for other in IMPORTS[module] if other.startswith(f"{name}."))
        if owner in MODULES and not (owner == name and is_package_of_module):
            found.add(owner)
    return found - {module, PACKAGE}


def import_cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Each cycle once, as the modules on it, found by a walk along the imports."""
    cycles, done = [], set()

    def walk(module: str, trail: list[str]) -> None:
        if module in trail:
            cycles.append(trail[trail.index(module) :])
        elif module not in done:
            for imported in sorted(graph.get(module, ())):
                walk(imported, [*trail, module])
            done.add(module)

    for module in sorted(graph):
        walk(module, [])
    return cycles


def test_a_cycle_is_found() -> None:
    assert import_cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert import_cycles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_modules_import_each_other_in_no_circle() -> None:
    assert import_cycles({module: module_imports(module) for module in MODULES}) == []


def test_config_imports_no_torch_and_nothing_of_the_package() -> None:
    for module in modules_of("config"):
        assert module not in importers_of("torch", "transformers")
        assert {part_of(name) for name in IMPORTS[module]} <= {None, "config"}


@pytest.mark.parametrize("module", ["config", "cli", "weights.families"])
def test_what_a_dry_run_needs_leaves_torch_unloaded(module: str) -> None:
    loaded = "[name for name in ('torch', 'transformers', 'megatron') if name in sys.modules]"
    code = f"import sys, {PACKAGE}.{module}; print({loaded})"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_algorithms_are_pure() -> None:
    banned = importers_of(
        "megatron", "sglang", "triton", "transformer_engine", "torch.distributed", f"{PACKAGE}.observability"
    )
    assert not banned & set(modules_of("algorithms"))


def test_only_the_registry_knows_the_algorithms() -> None:
    """What assembles and drives a run asks an algorithm's configuration what it needs, not which algorithm it is."""
    registry = f"{PACKAGE}.algorithms.registry"
    shared = {"AlgorithmConfig", "TrainConfig", "model"}
    listed = {name for name in IMPORTS[registry] if name.startswith((f"{PACKAGE}.algorithms.", f"{PACKAGE}.config."))}
    named = {name for name in listed if name.split(".")[-1] not in shared and ".model." not in name}
    assert {f"{PACKAGE}.algorithms.oreal", f"{PACKAGE}.config.OrealConfig"} <= named
    assert not importers_of(*named) & set(modules_of("train", "run", "rollout", "models", "engines", "evaluation"))


def test_only_models_and_the_packages_of_weights_import_megatron() -> None:
    assert importers_of("megatron") <= set(modules_of("models", "weights", "checkpoint", "conversion"))


def test_only_the_sglang_engine_speaks_to_servers() -> None:
    """What SGLang's HTTP interface looks like is known in engines/sglang alone."""
    paths = re.compile(r'"/(generate|flush_cache|update_weights_\w+|\w+_memory_occupation|server_info|model_info)\b')
    speakers = {module for module, path in MODULES.items() if paths.search(path.read_text())}
    assert speakers and all(module.startswith(f"{PACKAGE}.engines.sglang.") for module in speakers)


def test_only_kernels_import_triton_and_transformer_engine() -> None:
    assert importers_of("triton", "transformer_engine", "transformer_engine_torch") <= set(modules_of("kernels"))


def test_only_the_launcher_imports_sglang() -> None:
    """It runs in the servers' own environment, as a script: it may import nothing of the package.

    One module takes a function of it that needs neither SGLang nor torch.
    """
    launcher = f"{PACKAGE}.engines.sglang.servers.launcher"
    seeds = f"{PACKAGE}.engines.sglang.servers.seeds"  # which the launcher loads by its path
    assert importers_of("sglang", "sgl_kernel", "ray") <= {launcher, seeds}
    assert importers_of(launcher) <= {f"{PACKAGE}.engines.sglang.servers.listening"}
    assert launcher not in importers_of(PACKAGE)


def test_modules_name_what_they_hold() -> None:
    vague = {"utils", "common", "helpers", "misc"}
    assert not [module for module in MODULES if vague & set(module.split("."))]


def test_half_of_the_modules_are_shorter_than_170_lines() -> None:
    lengths = [len(path.read_text().splitlines()) for path in MODULES.values() if path.name != "__init__.py"]
    assert median(lengths) < 170


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short(module: str) -> None:
    num_lines = len(MODULES[module].read_text().splitlines())
    assert num_lines <= MAX_LINES, f"{module} has {num_lines} lines: split it by noun"
