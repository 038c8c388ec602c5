"""What is installed is what is in the tree: a wheel has every module and all data, and works in any other folder."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("slimfit_fx", "passes", "pyproject.toml", "setup.py", "README.md", "LICENSE")
USE = """
import slimfit_fx
from slimfit_fx.config import Config
from slimfit_fx.passes.pipeline import build_pipeline, pass_names
print(slimfit_fx.__file__, slimfit_fx.__version__, len(pass_names()), sep="\\n")
print(Config(preset="max", max_gradient_error=0.05).codec_map["float"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of the tree: setuptools leaves files beside its sources."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, copied = ROOT / name, folder / "tree" / name
        if source.is_dir():
            shutil.copytree(source, copied, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copied)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", str(folder / "tree"), *options]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    (found,) = folder.glob("*.whl")
    assert found.name.endswith("-py3-none-any.whl")
    return found


@pytest.fixture(scope="module")
def unpacked(wheel) -> Path:
    """The wheel's contents."""
    with zipfile.ZipFile(wheel) as contents:
        contents.extractall(wheel.parent / "unpacked")
    return wheel.parent / "unpacked"


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    """A folder into which pip installed the wheel, without what it depends on."""
    options = ["--no-deps", "--no-index", "--no-compile", "--target", str(wheel.parent / "installed")]
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", str(wheel), *options]
    done = subprocess.run(command, cwd=wheel.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return wheel.parent / "installed"


def test_every_module_and_all_data_are_in_it(unpacked):
    def modules(folder: Path) -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}

    passes = {f"passes/{name}" for name in modules(ROOT / "passes")}
    assert modules(unpacked / "slimfit_fx") == modules(ROOT / "slimfit_fx") | passes
    assert {path.name for path in unpacked.iterdir() if path.suffix != ".dist-info"} == {"slimfit_fx"}
    for name in ("planning/sensitivity.json", "py.typed"):
        assert (unpacked / "slimfit_fx" / name).read_bytes() == (ROOT / "slimfit_fx" / name).read_bytes()


def test_it_has_licence_readme_and_command(unpacked):
    (info,) = unpacked.glob("*.dist-info")
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    metadata = (info / "METADATA").read_text()
    assert "License-Expression: MIT" in metadata and "Requires-Dist: torch<2.14,>=2.11" in metadata
    assert set(re.findall(r"^Provides-Extra: (.+)$", metadata, re.MULTILINE)) >= {"hf", "lightning", "peft"}
    for extra, library in (("hf", "transformers>=5"), ("lightning", "lightning>=2"), ("peft", "peft>=0")):
        assert re.search(rf'^Requires-Dist: {library}[^;]*; extra == "{extra}"$', metadata, re.MULTILINE), extra
    assert "Fine-tune in a fraction of the memory" in metadata.split("\n\n", 1)[1]
    commands = configparser.ConfigParser()
    commands.read(info / "entry_points.txt")
    assert dict(commands["console_scripts"]) == {"slimfit-fx": "slimfit_fx.cli:app"}


@pytest.mark.slow
def test_it_is_used_from_another_folder(unpacked, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(unpacked)}
    ran = subprocess.run(
        [sys.executable, "-c", USE], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    file, version, passes, codec = ran.stdout.split()
    assert Path(file) == unpacked / "slimfit_fx" / "__init__.py" and int(passes) > 5 and codec == "int8"
    (info,) = unpacked.glob("*.dist-info")
    assert info.name == f"slimfit_fx-{version}.dist-info"


def test_the_installed_command_runs_what_was_installed(installed, tmp_path):
    """Its version is written anew there, so that no other copy can have answered."""
    version = installed / "slimfit_fx" / "_version.py"
    (info,) = installed.glob("*.dist-info")
    environment = {**os.environ, "PYTHONPATH": str(installed)}

    def said() -> str:
        command = [str(installed / "bin" / "slimfit-fx"), "--version"]
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
        assert ran.returncode == 0, ran.stderr
        return ran.stdout.strip()

    assert f"slimfit_fx-{said()}.dist-info" == info.name
    version.write_text('__version__ = "as installed"\n')
    assert said() == "as installed"
