"""The dependency rule, read from includes and imports; and proof that the scanners see what breaks it.

C++:    bindings > {runtime, simulator} > {transport, kernels} > engine > proto > common; within braces nobody sees
        the other. pybind11 in bindings, libfabric in transport's libfabric_* and memory files, CUDA in kernels/cuda
        and above the kernels, torch nowhere; proto and engine neither wait, nor look at a clock, nor do I/O.
Python: PYTHON_LAYERS below. Frameworks only in integrations, and there when called; os.environ only in moe_efa/env.py.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

CPP_LAYERS = (("common",), ("proto",), ("engine",), ("transport", "kernels"), ("runtime", "simulator"), ("bindings",))

TORCH = re.compile(r"(torch|ATen|c10)/")
CUDA = re.compile(r"cuda\w*\.h$|cuda/|cooperative_groups")
LIBFABRIC = re.compile(r"rdma/fi_|rdma/fabric")
PYTHON = re.compile(r"pybind11/|Python\.h$")
INPUT_OUTPUT = re.compile(
    r"(thread|mutex|shared_mutex|condition_variable|future|semaphore|barrier|latch|chrono|ctime|fstream|filesystem)$"
    r"|(unistd|pthread|dlfcn|fcntl|poll|netdb|time)\.h$|sys/|netinet/|arpa/"
)

# The lowest first; a module may import its own group and those before it.
PYTHON_LAYERS = (
    ("_C", "_version", "env", "errors", "config", "device", "nvtx", "presets", "topology"),
    ("reference", "triton_kernels", "quantization", "routing", "rendezvous", "libfabric", "simulator", "host_memory"),
    ("handle", "pointer", "dispatch_placement", "native_group", "group_registry", "plan_tensor", "late_gradients"),
    ("op_kernels", "op_shapes", "ops"),
    ("overlap",),
    ("checkpoint",),
    ("expert_parallel",),
    ("nn",),
    ("models",),
    ("training",),
    ("__init__",),  # what `import moe_efa` gives
    ("integrations",),
    ("bench", "doctor", "plan", "trace"),
    ("cli",),
    ("__main__",),
    ("testing",),  # for tests and benchmarks: nothing in the package imports it
)
FRAMEWORKS = ("deep_ep", "megatron", "torchtitan", "transformer_engine", "transformers", "vllm")
ENVIRONMENT = ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv")


def layer_of(name: str, layers: tuple[tuple[str, ...], ...]) -> int | None:
    return next((level for level, group in enumerate(layers) if name in group), None)


# ---- C++ ----

TOKEN = re.compile(
    r"""(?P<comment>//[^\n]*|/\*.*?\*/)|(?P<string>R"(?P<tag>[^()\s]*)\(.*?\)(?P=tag)"|"(?:\\.|[^"\\\n])*"|'(?:\\.[^']*|[^'\\])')""",
    re.DOTALL,
)
INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t]*([<\"])([^>\"]+)[>\"]", re.MULTILINE)


def without_comments(source: str) -> str:
    return TOKEN.sub(lambda match: " " if match["comment"] else match[0], source)


def without_comments_and_strings(source: str) -> str:
    return TOKEN.sub(" ", source)


def cpp_violations(path: str, source: str) -> Iterator[str]:
    """What breaks the rule in the file at `path`, which is relative to csrc/."""
    layer, name = path.split("/")[0], path.rsplit("/", 1)[-1]
    level = layer_of(layer, CPP_LAYERS)
    if level is None:
        yield f"folder {layer} has no layer: add it to CPP_LAYERS"
        return
    may_call_libfabric = layer == "transport" and name.startswith(("libfabric_", "memory"))

    for bracket, included in INCLUDE.findall(without_comments(source)):
        target = included.split("/")[0]
        target_level = layer_of(target, CPP_LAYERS)
        if ".." in included.split("/"):
            yield f"include of {included}: paths start at csrc/"
        elif target_level is not None and (bracket == "<" or "/" not in included):
            yield f'include of {included}: ours are written "layer/file.h"'
        elif bracket == '"' and target_level is None:
            yield f'include of {included}: only ours are in quotes, as "layer/file.h"'
        elif target_level is not None and target != layer and target_level >= level:
            yield f"{layer} includes {included}, which is not below it"
        if layer == "simulator" and included.startswith("kernels/cuda"):
            yield f"simulator includes {included}: it runs the CPU kernels only"
        if TORCH.match(included):
            yield f"include of {included}: torch is seen by Python only"
        if PYTHON.match(included) and layer != "bindings":
            yield f"include of {included} outside bindings"
        if LIBFABRIC.match(included) and not may_call_libfabric:
            yield f"include of {included} outside transport/libfabric_* and transport/memory*"
        if CUDA.match(included) and (
            layer in ("common", "proto", "engine") or (layer == "kernels" and "kernels/cuda/" not in path)
        ):
            yield f"include of {included} below the CUDA kernels"
        if INPUT_OUTPUT.match(included) and layer in ("proto", "engine"):
            yield f"include of {included}: {layer} has no threads, clocks or I/O"

    if not may_call_libfabric:
        for call in sorted(set(re.findall(r"\bfi_\w+(?=\s*\()", without_comments_and_strings(source)))):
            yield f"call of {call} outside transport/libfabric_* and transport/memory*"


# ---- Python ----


class ImportScanner(ast.NodeVisitor):
    """Collects (imported dotted name, is it run when the module is imported) and uses of the environment."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.imports: list[tuple[str, bool]] = []
        self.environment: list[str] = []
        self.deferred = 0

    def visit_Import(self, node: ast.Import) -> None:
        self.imports += [(alias.name, not self.deferred) for alias in node.names]

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        module = node.module or ""
        if node.level:
            parents = self.package.split(".")
            base = ".".join(parents[: len(parents) - node.level + 1])
            module = f"{base}.{module}" if module else base
        self.imports += [(f"{module}.{alias.name}", not self.deferred) for alias in node.names]
        if module == "os":
            self.environment += [alias.name for alias in node.names if alias.name in ENVIRONMENT]

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name) and node.value.id == "os" and node.attr in ENVIRONMENT:
            self.environment.append(node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        first = node.args[0] if node.args else None
        if name in ("import_module", "__import__") and isinstance(first, ast.Constant) and isinstance(first.value, str):
            self.imports.append((first.value, not self.deferred))
        self.generic_visit(node)

    def _deferred(self, node: ast.AST) -> None:
        self.deferred += 1
        self.generic_visit(node)
        self.deferred -= 1

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _deferred

    def visit_If(self, node: ast.If) -> None:
        test = node.test
        name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", "")
        if name != "TYPE_CHECKING":
            self.generic_visit(node)
            return
        self.deferred += 1
        for child in node.body:
            self.visit(child)
        self.deferred -= 1
        for child in node.orelse:
            self.visit(child)


def module_name(path: str) -> str:
    """The import name of a file: triton_kernels/src/x.py is moe_efa.triton_kernels.x."""
    parts = path.removesuffix(".py").split("/")
    if parts[:2] == ["triton_kernels", "src"]:
        parts = ["moe_efa", *parts[:1], *parts[2:]]
    return ".".join(parts)


def unit_of(imported: str, units: frozenset[str]) -> str | None:
    """The unit of the package that `imported` belongs to: "nn" for moe_efa.nn.layer; None for another package."""
    top, _, rest = imported.partition(".")
    if top != "moe_efa":
        return None
    first = rest.split(".")[0]
    return first if first in units else "__init__"


def python_violations(path: str, source: str, units: frozenset[str]) -> Iterator[str]:
    """What breaks the rule in the file at `path`, relative to the root; `units` are the modules right under moe_efa."""
    name = module_name(path)
    folder = path.split("/")[0]
    scanner = ImportScanner(
        name.removesuffix(".__init__") if path.endswith("/__init__.py") else name.rpartition(".")[0]
    )
    scanner.visit(ast.parse(source, path))

    for imported, _ in scanner.imports:
        if imported.split(".")[0] == "triton_kernels":
            yield f"import of {imported}: that name belongs to an unrelated package; ours is moe_efa.triton_kernels"
    if folder in ("bench", "examples"):
        for imported, _ in scanner.imports:
            private = [part for part in imported.split(".")[1:] if part.startswith("_") and not part.startswith("__")]
            if imported.startswith("moe_efa.") and private:
                yield f"import of {imported}: {folder} uses the public API"
    if folder not in ("moe_efa", "triton_kernels", "examples"):
        return
    if path != "moe_efa/env.py":
        for use in scanner.environment:
            yield f"os.{use}: the environment is read in moe_efa/env.py only"
    if folder == "examples":
        return

    unit = name.split(".")[1]
    level = layer_of(unit, PYTHON_LAYERS)
    if level is None:
        yield f"module {unit} has no layer: add it to PYTHON_LAYERS"
        return
    for imported, at_import in scanner.imports:
        top = imported.split(".")[0]
        if top in ("bench", "tests", "examples"):
            yield f"import of {imported}: the package does not use it"
        if top in FRAMEWORKS and unit != "integrations":
            yield f"import of {imported} outside moe_efa/integrations"
        elif top in FRAMEWORKS and at_import:
            yield f"import of {imported} when the module is imported: frameworks are imported when they are needed"
        target = unit_of(imported, units)
        if target is None or target == unit:
            continue
        target_level = layer_of(target, PYTHON_LAYERS)
        if target_level is None or target_level > level:
            yield f"{unit} imports {imported} ({target}), which is not below it"


# ---- the tree ----


def python_files(root: Path) -> list[Path]:
    folders = ("moe_efa", "triton_kernels", "bench", "tests", "examples")
    return sorted(path for folder in folders for path in (root / folder).rglob("*.py"))


def cpp_files(root: Path) -> list[Path]:
    return sorted(path for path in (root / "csrc").rglob("*") if path.suffix in (".h", ".cc", ".cu", ".cuh"))


def test_cpp_layers(repo_root: Path) -> None:
    files = cpp_files(repo_root)
    assert len(files) > 10
    found = [
        f"csrc/{path.relative_to(repo_root / 'csrc')}: {violation}"
        for path in files
        for violation in cpp_violations(path.relative_to(repo_root / "csrc").as_posix(), path.read_text())
    ]
    assert not found, "\n" + "\n".join(found)


def test_included_files_exist(repo_root: Path) -> None:
    missing = [
        f"{path.relative_to(repo_root)}: {included}"
        for path in cpp_files(repo_root)
        for bracket, included in INCLUDE.findall(without_comments(path.read_text()))
        if bracket == '"' and not (repo_root / "csrc" / included).exists()
    ]
    assert not missing, "\n" + "\n".join(missing)


def test_python_layers(repo_root: Path) -> None:
    files = python_files(repo_root)
    assert len(files) > 10
    units = frozenset(path.name.split(".")[0] for path in (repo_root / "moe_efa").iterdir()) | {"triton_kernels"}
    found = [
        f"{path.relative_to(repo_root)}: {violation}"
        for path in files
        for violation in python_violations(path.relative_to(repo_root).as_posix(), path.read_text(), units)
    ]
    assert not found, "\n" + "\n".join(found)


def test_outer_kernel_folder_is_no_package(repo_root: Path) -> None:
    assert not (repo_root / "triton_kernels" / "__init__.py").exists()


# ---- the scanners ----

UNITS = frozenset(unit for group in PYTHON_LAYERS for unit in group) - {"__init__"}


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("engine/a.cc", '#include "transport/rail.h"', "not below"),
        ("proto/a.h", '#include "engine/engine.h"', "not below"),
        ("transport/a.cc", '#include "kernels/launch.h"', "not below"),
        ("kernels/cpu/a.cc", '#include "transport/rail.h"', "not below"),
        ("runtime/a.cc", '#include "simulator/network.h"', "not below"),
        ("simulator/a.cc", '#include "runtime/group.h"', "not below"),
        ("simulator/a.cc", '#include "kernels/cuda/pack.h"', "CPU kernels only"),
        ("runtime/a.cc", '#include "bindings/bindings.h"', "not below"),
        ("engine/a.cc", '#include "../transport/rail.h"', "start at csrc/"),
        ("engine/a.cc", '#include "engine.h"', "only ours are in quotes"),
        ("engine/a.cc", "#include <proto/imm.h>", "ours are written"),
        ("engine/a.cc", '#  include   "runtime/group.h"  // why not', "not below"),
        ("bindings/a.cc", "#include <torch/extension.h>", "torch is seen by Python only"),
        ("bindings/a.cc", "#include <ATen/ATen.h>", "torch is seen by Python only"),
        ("kernels/cuda/a.cu", "#include <c10/util/Half.h>", "torch is seen by Python only"),
        ("runtime/a.cc", "#include <pybind11/pybind11.h>", "outside bindings"),
        ("runtime/a.cc", "#include <Python.h>", "outside bindings"),
        ("runtime/a.cc", "#include <rdma/fi_domain.h>", "outside transport"),
        ("transport/rail_group.cc", "#include <rdma/fabric.h>", "outside transport/libfabric_*"),
        ("transport/rail_group.cc", "int n = fi_close (&x);", "call of fi_close"),
        ("kernels/libfabric_a.cc", "fi_read(ep);", "call of fi_read"),
        ("engine/a.cc", "#include <cuda_runtime.h>", "below the CUDA kernels"),
        ("common/a.h", "#include <cuda.h>", "below the CUDA kernels"),
        ("proto/a.h", "#include <cudaTypedefs.h>", "below the CUDA kernels"),
        ("kernels/launch.h", "#include <cuda_runtime.h>", "below the CUDA kernels"),
        ("kernels/cpu/a.cc", "#include <cuda_bf16.h>", "below the CUDA kernels"),
        ("engine/a.cc", "#include <thread>", "no threads, clocks or I/O"),
        ("engine/a.cc", "#include <sys/socket.h>", "no threads, clocks or I/O"),
        ("proto/a.h", "#include <chrono>", "no threads, clocks or I/O"),
        ("utils/a.h", "", "has no layer"),
    ],
)
def test_cpp_scanner_sees(path: str, source: str, message: str) -> None:
    assert [violation for violation in cpp_violations(path, source) if message in violation]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("bindings/a.cc", '#include <pybind11/pybind11.h>\n#include "runtime/group.h"\n#include "simulator/network.h"'),
        ("runtime/a.cc", '#include "transport/rail.h"\n#include "kernels/launch.h"\n#include <cuda_runtime.h>'),
        ("simulator/a.cc", '#include "kernels/cpu/pack.h"\n#include "simulator/network.h"\n#include <chrono>'),
        ("transport/libfabric_rail.cc", "#include <rdma/fi_rma.h>\nfi_writemsg(ep, &msg, flags);"),
        ("transport/memory.cc", "#include <rdma/fi_domain.h>\nfi_mr_regattr(d, &a, 0, &mr);"),
        ("engine/a.cc", '// #include "runtime/group.h"\n/* fi_close(x)\n#include <thread> */ int wifi_call(int);'),
        (
            "runtime/a.cc",
            'throw Error("fi_getinfo(" + x); const char* s = R"x(fi_close(a))x"; char c = \'"\'; int n = 1\'0;',
        ),
        ("kernels/cuda/a.cu", '#include <cuda_runtime.h>\n#include "kernels/launch.h"'),
    ],
)
def test_cpp_scanner_accepts(path: str, source: str) -> None:
    assert list(cpp_violations(path, source)) == []


@pytest.mark.parametrize(
    ("path", "source", "message"),
    [
        ("moe_efa/config.py", "from moe_efa import handle", "not below"),
        ("moe_efa/config.py", "from moe_efa import ExpertParallel", "(__init__), which is not below"),
        ("moe_efa/config.py", "import moe_efa", "(__init__), which is not below"),
        ("moe_efa/handle.py", "from .expert_parallel import ExpertParallel", "not below"),
        ("moe_efa/nn/layer.py", "from ..training import trainer", "not below"),
        ("moe_efa/nn/layer.py", "from .. import models", "not below"),
        ("moe_efa/ops.py", "def f():\n    from moe_efa.nn import MoELayer", "not below"),
        ("moe_efa/ops.py", "import importlib\nimportlib.import_module('moe_efa.nn')", "not below"),
        ("moe_efa/reference.py", "if TYPE_CHECKING:\n    from moe_efa.handle import Handle", "not below"),
        ("moe_efa/cli.py", "import moe_efa.testing.spawn", "not below"),
        ("triton_kernels/src/quantize.py", "from moe_efa.handle import Handle", "not below"),
        ("triton_kernels/src/quantize.py", "from ..ops import dispatch", "not below"),
        ("moe_efa/training/__init__.py", "from ..integrations import huggingface", "not below"),
        ("moe_efa/nn/layer.py", "def f():\n    import transformers", "outside moe_efa/integrations"),
        ("moe_efa/integrations/huggingface.py", "from transformers import AutoModel", "when the module is imported"),
        ("moe_efa/integrations/megatron.py", "try:\n    import megatron.core\nexcept E:\n    pass", "when the module"),
        ("moe_efa/ops.py", "import os\nos.environ['A'] = '1'", "moe_efa/env.py only"),
        ("moe_efa/ops.py", "from os import getenv", "moe_efa/env.py only"),
        ("examples/01_a.py", "import os\nprint(os.getenv('A'))", "moe_efa/env.py only"),
        ("triton_kernels/src/a.py", "import os\nos.environ.get('A')", "moe_efa/env.py only"),
        ("bench/a.py", "from moe_efa import _C", "public API"),
        ("examples/01_a.py", "import moe_efa._C", "public API"),
        ("tests/test_a.py", "import triton_kernels", "unrelated package"),
        ("bench/a.py", "from triton_kernels.src import quantize", "unrelated package"),
        ("moe_efa/ops.py", "from tests import helper", "the package does not use it"),
        ("moe_efa/utils.py", "", "has no layer"),
    ],
)
def test_python_scanner_sees(path: str, source: str, message: str) -> None:
    assert [violation for violation in python_violations(path, source, UNITS) if message in violation]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("moe_efa/__init__.py", "from moe_efa import _C\nfrom moe_efa.expert_parallel import ExpertParallel"),
        ("moe_efa/nn/layer.py", "from moe_efa.expert_parallel import ExpertParallel\nfrom .experts import Experts"),
        ("moe_efa/nn/__init__.py", "from .layer import MoELayer"),
        ("moe_efa/integrations/huggingface.py", "import moe_efa\ndef f():\n    import transformers"),
        ("moe_efa/integrations/huggingface.py", "if TYPE_CHECKING:\n    from transformers import Model"),
        ("moe_efa/env.py", "import os\nos.environ.get('A')"),
        ("triton_kernels/src/quantize.py", "import triton\nfrom .reference import BLOCK_SIZE"),
        ("bench/a.py", "import os\nimport moe_efa.testing\nfrom moe_efa import __version__\nos.environ['A'] = '1'"),
    ],
)
def test_python_scanner_accepts(path: str, source: str) -> None:
    assert list(python_violations(path, source, UNITS)) == []
