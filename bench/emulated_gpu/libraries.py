"""Build the libraries that stand in for CUDA's: what returns something is written out, everything else does nothing."""

from __future__ import annotations

import hashlib
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = ("memory.h", "runtime.cpp", "driver.cpp", "libraries.py")
TORCH_LIBRARIES = (
    "libtorch_cuda.so", "libc10_cuda.so", "libtorch_cuda_linalg.so", "libtorch_python.so", "libtorch_cpu.so",
)  # fmt: skip
_DEFINED = re.compile(r"^\S.*?\b((?:__)?cu\w+)\(", re.MULTILINE)
_DECLARED = re.compile(r"\bCUDAAPI\s+(cu[A-Z]\w+)\s*\(")
_RENAMED = re.compile(r"#define\s+(cu[A-Z]\w+)\s+__CUDA_API_PT\w*\((cu\w+)|#define\s+(cu[A-Z]\w+)\s+(cu[A-Z]\w+)")
_WANTED = re.compile(r"\sU ((?:__)?cuda\w*|cublas\w*|cupti\w*)")


def build(folder: Path) -> tuple[Path, Path]:
    """Return (runtime, driver) in a folder below ``folder``; built if they are not there.

    Raises:
        RuntimeError: torch is no CUDA build, its headers are missing, or there is no compiler.
    """
    torch_folder = _torch_folder()
    headers, compiler = _headers(torch_folder), shutil.which("c++") or shutil.which("g++")
    if compiler is None or shutil.which("nm") is None:
        raise RuntimeError("the emulated GPU needs a C++ compiler and nm")
    texts = [(HERE / name).read_bytes() for name in SOURCES]
    built_for = f"{torch_folder} {metadata.version('torch')}".encode()
    key = hashlib.sha256(b"\0".join([*texts, built_for])).hexdigest()[:16]
    place = folder / key
    runtime, driver = place / "libemulated.so", place / "libcuda.so.1"
    if not (runtime.exists() and driver.exists()):
        place.mkdir(parents=True, exist_ok=True)
        flags = [f"-I{headers}", "-idirafter", str(_completed_by(torch_folder)), f"-I{HERE}"]
        _compile([compiler, *flags], runtime, "runtime.cpp", _undefined(torch_folder))
        _compile([compiler, *flags], driver, "driver.cpp", _driver_functions(headers / "cuda.h"))
        link = place / "libcuda.so"  # what Triton links with
        link.unlink(missing_ok=True)
        link.symlink_to(driver.name)
    return runtime, driver


def _torch_folder() -> Path:
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else None
    if folder is None or not (folder / TORCH_LIBRARIES[0]).exists():
        raise RuntimeError("the emulated GPU needs a CUDA build of torch; this one is for the CPU")
    return folder


def _headers(torch_folder: Path) -> Path:
    packages = torch_folder.parent.parent / "nvidia"
    for found in sorted(packages.glob("*/include/cuda_runtime_api.h")):
        if (found.parent / "cuda.h").exists():
            return found.parent
    raise RuntimeError(f"no CUDA headers below {packages}: they come with the CUDA build of torch")


def _completed_by(torch_folder: Path) -> Path:
    """Triton's headers: those beside torch lack a part that does not change from version to version (``crt/``)."""
    return torch_folder.parent.parent / "triton" / "backends" / "nvidia" / "include"


def _undefined(torch_folder: Path) -> set[str]:
    """What torch's libraries want of the CUDA runtime, of cuBLAS and of the profiler's CUPTI."""
    paths = [str(torch_folder / name) for name in TORCH_LIBRARIES if (torch_folder / name).exists()]
    told = subprocess.run(["nm", "-D", "--undefined-only", *paths], check=True, capture_output=True, text=True).stdout
    return set(_WANTED.findall(told))


def _driver_functions(header: Path) -> set[str]:
    """All functions of the driver, under their names in the header and in the library."""
    text = header.read_text(errors="replace")
    names = set(_DECLARED.findall(text))
    for found in _RENAMED.findall(text):
        names |= set(filter(None, found))
    return names


def _compile(compiler: Sequence[str], library: Path, source: str, names: set[str]) -> None:
    missing = sorted(names - set(_DEFINED.findall((HERE / source).read_text())))
    rest = library.with_suffix(".rest.cpp")
    rest.write_text('extern "C" {\n' + "".join(f"long {name}() {{ return 0; }}\n" for name in missing) + "}\n")
    draft = library.with_suffix(".draft")
    command = [*compiler, "-shared", "-fPIC", "-O1", "-std=c++17", str(HERE / source), str(rest), "-o", str(draft),
               f"-Wl,-soname,{library.name}", "-ldl"]  # fmt: skip
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the emulated GPU could not be built:\n{done.stderr[-2000:]}")
    draft.replace(library)
