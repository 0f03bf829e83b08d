"""The private names of torch that the builder of the C++ kernels needs: Inductor's C++ builder and its cache folder."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch._inductor import cpp_builder, cpu_vec_isa
from torch._inductor.runtime.cache_dir_utils import cache_dir

LEFT_OUT = ("f", "g", "m", "std=")
"""Beginnings of the flags that Inductor compiles its own code with and we do not.

Its arithmetic (``-funsafe-math-optimizations`` and others), ``-march=native``, line tables, its C++ standard.
"""
TAKEN = ("fPIC", "fopenmp")
"""Those that are taken although they begin like one of `LEFT_OUT`."""


class Toolchain(NamedTuple):
    """What makes a library of a source.

    compiler: its path, or its name.
    version: what it says of itself.
    options: Inductor's options for a library that uses torch.
    """

    compiler: str
    version: str
    options: Any

    def builder(self, source: Path, folder: Path, flags: Sequence[str]) -> Any:
        """Inductor's builder of one source, with our flags in place of those of `LEFT_OUT`; it writes to ``folder``."""
        taken = [flag for flag in self.options.get_cflags() if flag.startswith(TAKEN) or not flag.startswith(LEFT_OUT)]
        options = cpp_builder.BuildOptionsBase(
            compiler=self.compiler,
            definitions=self.options.get_definitions(),
            include_dirs=self.options.get_include_dirs(),
            cflags=taken,
            ldflags=self.options.get_ldflags(),
            libraries_dirs=self.options.get_libraries_dirs(),
            libraries=self.options.get_libraries(),
            passthrough_args=[*self.options.get_passthrough_args(), *flags],
        )
        return cpp_builder.CppBuilder(source.stem, str(source), options, str(folder))


def toolchain() -> Toolchain:
    """The C++ compiler that Inductor uses here: what ``CXX`` names, or g++.

    Raises:
        RuntimeError: there is none that works.
    """
    compiler = cpp_builder.get_cpp_compiler()
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    # A chosen ISA would bring its own flags, and compiling and running a program to try it.
    options = cpp_builder.CppTorchOptions(vec_isa=cpu_vec_isa.invalid_vec_isa, include_pytorch=True, compiler=compiler)
    return Toolchain(compiler, said, options)


def inductor_cache() -> Path:
    """Inductor's cache folder: ``TORCHINDUCTOR_CACHE_DIR``, or one of the user's among the temporary files."""
    return Path(cache_dir())


def amx_is_permitted() -> bool:
    """Whether the operating system lets this process use AMX; asks it to."""
    return bool(torch.cpu._init_amx())
