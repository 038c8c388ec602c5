"""The emulated GPU: what can be told of it without a CUDA build of torch."""

from __future__ import annotations

import ctypes
import shutil

import pytest
import torch

from bench import cells, emulated_gpu, paper_table
from bench.cells import Cell
from bench.emulated_gpu import __main__ as command
from bench.emulated_gpu import libraries

CPU_BUILD = torch.version.cuda is None
HEADER = """
#define cuMemCreateOf                       cuMemCreateOf_v2
#define cuMemcpyOf                          __CUDA_API_PTDS(cuMemcpyOf_v2)
CUresult CUDAAPI cuInit(unsigned int Flags);
CUresult CUDAAPI cuMemCreateOf(
    size_t size);
typedef CUresult (CUDAAPI *PFN_cuNothing)(void);
"""


@pytest.fixture
def active(monkeypatch):
    monkeypatch.setenv(emulated_gpu.VARIABLE, "1")


@pytest.mark.skipif(not CPU_BUILD, reason="needs a build of torch for the CPU")
def test_a_build_for_the_cpu_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command.os, "execve", lambda *_: pytest.fail("it went on"))
    with pytest.raises(RuntimeError, match="needs a CUDA build of torch"):
        libraries.build(tmp_path)
    assert command.main(["-m", "bench"]) == 2
    assert "needs a CUDA build of torch" in capsys.readouterr().err


def test_the_command_becomes_python_with_the_libraries_in_front(monkeypatch, tmp_path):
    found = []
    monkeypatch.setattr(command, "build", lambda folder: (tmp_path / "libemulated.so", tmp_path / "libcuda.so.1"))
    monkeypatch.setattr(command.os, "execve", lambda *given: found.append(given))
    monkeypatch.setenv("LD_LIBRARY_PATH", "/before")
    command.main(["-m", "bench", "memory"])
    ((program, arguments, environment),) = found
    assert arguments == [program, "-m", "bench", "memory"]
    assert environment["LD_PRELOAD"] == str(tmp_path / "libemulated.so") and environment[emulated_gpu.VARIABLE] == "1"
    assert environment["LD_LIBRARY_PATH"] == f"{tmp_path}:/before"
    assert "emulated-gpu" in environment["TORCHINDUCTOR_CACHE_DIR"], "code for it must not mix with that of a real GPU"


def test_without_a_command_it_says_how(capsys):
    assert command.main([]) == 2
    assert "python -m bench.emulated_gpu -m bench" in capsys.readouterr().err


def test_functions_of_the_driver_are_read_off_its_header(tmp_path):
    header = tmp_path / "cuda.h"
    header.write_text(HEADER)
    expected = {"cuInit", "cuMemCreateOf", "cuMemCreateOf_v2", "cuMemcpyOf", "cuMemcpyOf_v2"}
    assert libraries._driver_functions(header) == expected


def test_what_is_written_out_goes_before_what_does_nothing(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    library = tmp_path / "libcuda.so.1"
    names = {"cuOfNoUse", "cuDeviceGetCount", "emulated_device_memory"}
    libraries._compile([compiler], library, "driver.cpp", names)
    loaded, count = ctypes.CDLL(str(library)), ctypes.c_int(7)
    assert loaded.cuOfNoUse() == 0
    assert loaded.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value == 1


def test_a_source_that_does_not_compile_is_an_error_with_the_reason(tmp_path):
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    with pytest.raises(RuntimeError, match="could not be built:\n"):
        libraries._compile([compiler, "-nostdinc"], tmp_path / "libcuda.so.1", "driver.cpp", set())
    assert not (tmp_path / "libcuda.so.1").exists()


def test_emulated_figures_are_never_called_measured(active):
    with pytest.raises(RuntimeError, match="measured figures were asked for on the emulated GPU"):
        cells.fill(Cell("CoLA", "eager", "tf32", "cuda", "measured"))
    assert (emulated_gpu.how_on_gpu(), emulated_gpu.kind_of("cuda:0"), emulated_gpu.kind_of("cpu")) == (
        "emulated", "emulated", "cpu",
    )  # fmt: skip
    assert paper_table.parse(["--device", "cuda"]).how == ["emulated"]


def test_nor_are_measured_ones_called_emulated():
    with pytest.raises(RuntimeError, match="emulated figures were asked for without the emulated GPU"):
        cells.fill(Cell("CoLA", "eager", "tf32", "cuda", "emulated"))
    assert (emulated_gpu.how_on_gpu(), emulated_gpu.kind_of("cuda")) == ("measured", "cuda")
    assert paper_table.store_of("cuda").path.name == "twelve-cuda.json"
    assert paper_table.parse(["--device", "cpu"]).how == ["measured", "predicted"]


def test_a_cpu_is_measured_as_ever_beside_an_emulated_gpu(active, monkeypatch):
    monkeypatch.setattr(cells, "make_trainee", lambda *_: None)
    monkeypatch.setattr(cells, "_measure", lambda trainee, cell: cell.how)
    assert cells.fill(Cell("CoLA", "eager", "fp32", "cpu", "measured")) == "measured"
    with pytest.raises(RuntimeError, match="emulated figures were asked for"):
        cells.fill(Cell("CoLA", "eager", "fp32", "cpu", "emulated"))
