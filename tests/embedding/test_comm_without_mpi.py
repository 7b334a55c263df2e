"""Ranks without a working MPI library."""

import sys
import types

import pytest

from dlrm.errors import CommError
from embedding.comm_mpi import world


def test_an_mpi_that_does_not_load_is_one_line(monkeypatch):
    class Broken(types.ModuleType):
        def __getattr__(self, name):
            raise RuntimeError(f"cannot load {name} library\nlibmpi.so: not found\n  libmpi.so.40: not found\n")

    monkeypatch.setitem(sys.modules, "mpi4py", Broken("mpi4py"))
    with pytest.raises(CommError) as caught:
        world(2)
    message = str(caught.value)
    assert "libmpi.so: not found libmpi.so.40: not found); reinstall" in message
    assert "\n" not in message
