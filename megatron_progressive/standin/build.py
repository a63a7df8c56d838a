"""Building the stand-in's two libraries with g++, once for each torch and each version of the
sources, into the user's cache."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

NATIVE = Path(__file__).with_name("native")
PRELOADED, DRIVER, MANAGEMENT = "libstandin.so", "libcuda.so.1", "libnvidia-ml.so.1"
_CALLED = ("cuda", "__cuda", "cublas", "cudnn", "nccl")
"""Names of functions that the preloaded library has to have begin with one of these."""
_CALLERS = ("c10_cuda", "torch_cuda", "torch_python", "torch_cuda_linalg", "torch_cpu")
_COMPILE = ("g++", "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
_SHIM = "_ZN3c104impl3cow23materialize_cow_storageERNS_11StorageImplE"


@dataclass(frozen=True)
class Wheels:
    """Where torch and NVIDIA's libraries of its wheels lie."""

    torch: Path
    nvidia: Path
    version: str
    """Of torch, with its CUDA, as ``2.13.0+cu130``."""

    @property
    def headers(self) -> Path:
        return self.nvidia / "cu13" / "include"


def _wheels() -> Wheels | str:
    """Found without importing torch, which takes seconds; or why not."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return "torch is not installed"
    torch = Path(next(iter(spec.submodule_search_locations)))
    text = (torch / "version.py").read_text()
    version = re.search(r"__version__ = '([^']+)'", text)
    cuda = re.search(r"^cuda[^=]*= '(\d+)[^']*'", text, re.MULTILINE)
    named = version.group(1) if version else "of no known version"
    if cuda is None:
        return f"torch {named} is a build without CUDA"
    if cuda.group(1) != "13":
        return f"torch {named} is a build for CUDA {cuda.group(1)}, and the stand-in is CUDA 13"
    wheels = Wheels(torch, torch.parent / "nvidia", named)
    if not (wheels.headers / "cuda_runtime_api.h").is_file():
        return f"torch {named} comes without NVIDIA's headers ({wheels.headers})"
    return wheels


@functools.cache
def available() -> str | None:
    """None where the stand-in can be used, else one line that says what is missing."""
    for program in ("g++", "nm"):
        if shutil.which(program) is None:
            return f"the stand-in CUDA device is built with {program}, which is not installed"
    wheels = _wheels()
    return None if isinstance(wheels, Wheels) else f"no stand-in CUDA device: {wheels}"


def _cache() -> Path:
    """``MPROG_STANDIN_CACHE``, or a folder of the user's cache."""
    if named := os.environ.get("MPROG_STANDIN_CACHE"):
        return Path(named)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "megatron_progressive" / "standin"


def _key(wheels: Wheels, callers: list[Path]) -> str:
    digest = hashlib.sha256(wheels.version.encode())
    for file in [*sorted(NATIVE.rglob("*")), Path(__file__)]:
        if file.is_file():
            digest.update(file.name.encode() + file.read_bytes())
    for caller in callers:
        digest.update(f"{caller}{caller.stat().st_size}".encode())
    return digest.hexdigest()[:16]


def _callers(wheels: Wheels) -> list[Path]:
    """torch's libraries, whose calls must find a function."""
    found = [wheels.torch / "lib" / f"lib{name}.so" for name in _CALLERS]
    return [path for path in found if path.is_file()]


def _replaced(wheels: Wheels) -> list[Path]:
    """NVIDIA's libraries in whose place the stand-in is: who else calls them finds one too."""
    folders = [wheels.nvidia / name / "lib" for name in ("cu13", "cudnn", "nccl")]
    names = ("libcudart", "libcublas", "libcudnn", "libnccl")
    found = [path for folder in folders for path in sorted(folder.glob("*.so*"))]
    return [path for path in found if path.name.startswith(names) and not path.is_symlink()]


def _names(library: Path, *options: str) -> set[str]:
    """Symbols of the dynamic table (``-D``) or of an object file, without their versions."""
    out = subprocess.run(["nm", *options, str(library)], capture_output=True, text=True, check=True)
    return {line.split()[-1].split("@")[0] for line in out.stdout.splitlines() if line}


def _number(header: Path, *names: str) -> str:
    """A version of a header: the last of the macros that it defines, with weights of 10000, 100
    and 1 where there are three."""
    text = header.read_text()
    found = [re.search(rf"#define {name}\s+(\d+)", text) for name in names]
    numbers = [int(match.group(1)) for match in found if match]
    weights = (10000, 100, 1) if len(numbers) == 3 else (1,)
    return str(sum(n * w for n, w in zip(numbers, weights, strict=True)))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}:\n{done.stderr[-4000:]}")


def _stubs(names: set[str], file: Path) -> None:
    """Functions that nobody is known to call: each returns success."""
    body = "".join(f"STUB long {name}(void) {{ return 0; }}\n" for name in sorted(names))
    file.write_text(f'#define STUB __attribute__((visibility("default")))\n{body}')


def _driver_names(wheels: Wheels) -> set[str]:
    text = (wheels.headers / "cuda.h").read_text()
    versions = re.findall(r"^#define cu[A-Z]\w*\s.*?\b(cu[A-Z]\w*)\)?$", text, re.MULTILINE)
    return {*re.findall(r"CUDAAPI (cu[A-Z]\w*)", text), *versions}


def _compile(wheels: Wheels, callers: list[Path], folder: Path) -> None:
    cuda = _number(wheels.headers / "cuda.h", "CUDA_VERSION")
    nccl = _number(wheels.nvidia / "nccl" / "include" / "nccl.h", "NCCL_VERSION_CODE")
    if nccl == "0":
        parts = ("NCCL_MAJOR", "NCCL_MINOR", "NCCL_PATCH")
        nccl = _number(wheels.nvidia / "nccl" / "include" / "nccl.h", *parts)
    cudnn = _number(
        wheels.nvidia / "cudnn" / "include" / "cudnn_version.h",
        *(f"CUDNN_{part}" for part in ("MAJOR", "MINOR", "PATCHLEVEL")),
    )
    options = [
        f"-I{NATIVE}", f"-isystem{wheels.headers}", f"-DSTANDIN_CUDA_VERSION={cuda}",
        f"-DSTANDIN_NCCL_VERSION={nccl}", f"-DSTANDIN_CUDNN_VERSION={cudnn}",
    ]  # fmt: skip
    has_shim = _SHIM in _names(wheels.torch / "lib" / "libc10.so", "-D", "--defined-only")
    left_out = {"driver.cpp", "nvml.cpp"} | ({"torch_211.cpp"} if has_shim else set())
    sources = [file for file in sorted(NATIVE.glob("*.cpp")) if file.name not in left_out]
    objects = []
    for source in sources:
        objects.append(str(folder / f"{source.stem}.o"))
        _run([*_COMPILE, *options, "-c", str(source), "-o", objects[-1]])
    wanted = set().union(*(_names(path, "-D", "--undefined-only") for path in callers))
    wanted |= set().union(*(_names(path, "-D", "--defined-only") for path in _replaced(wheels)))
    have = set().union(*(_names(Path(path), "--defined-only") for path in objects))
    _stubs({n for n in wanted if n.startswith(_CALLED)} - have, folder / "rest.c")
    _link(folder, PRELOADED, objects, "rest.c")
    driver = str(folder / "driver.o")
    _run([*_COMPILE, *options, "-c", str(NATIVE / "driver.cpp"), "-o", driver])
    unwritten = _driver_names(wheels) - _names(Path(driver), "--defined-only")
    _stubs(unwritten, folder / "driver_rest.c")
    _link(folder, DRIVER, [driver], "driver_rest.c")
    management = ["-shared", f"-Wl,-soname,{MANAGEMENT}", "-o", str(folder / MANAGEMENT)]
    _run([*_COMPILE, *options, str(NATIVE / "nvml.cpp"), *management])
    (folder / "libcuda.so").symlink_to(DRIVER)


def _link(folder: Path, name: str, objects: list[str], stubs: str) -> None:
    rest = str(folder / f"{stubs}.o")
    _run(["g++", "-x", "c", "-w", "-O1", "-fPIC", "-c", str(folder / stubs), "-o", rest])
    libraries = ["-lpthread", "-ldl", f"-Wl,-soname,{name}"]
    _run(["g++", "-shared", "-o", str(folder / name), *objects, rest, *libraries])


def build() -> Path:
    """The folder with the libraries, built when there is none for these sources and this torch;
    processes that ask at the same time build once.

    Raises:
        RuntimeError: the stand-in is not :func:`available`, or a compiler's message.
    """
    if reason := available():
        raise RuntimeError(reason)
    wheels = _wheels()
    assert isinstance(wheels, Wheels)
    callers = _callers(wheels)
    cache = _cache()
    folder = cache / _key(wheels, callers)
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.is_dir():
            with tempfile.TemporaryDirectory(dir=cache) as work:
                made = Path(work) / "made"
                made.mkdir()
                _compile(wheels, callers, made)
                made.rename(folder)
    return folder
