import pytest

from supsup import native
from supsup.errors import SlowPath
from supsup.packed import KERNELS as LOOKUP
from supsup.sparse import KERNELS as SPARSE


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    monkeypatch.setattr(native.platformdirs, "user_cache_path", lambda name: tmp_path)
    native.load.cache_clear()
    yield tmp_path
    native.load.cache_clear()


@pytest.mark.parametrize("name", [*LOOKUP, *SPARSE.values()])
def test_kernels_are_compiled_once_and_kept(fresh, name):
    if not native.supported(name):
        assert native.load(name) is None
        return
    assert native.load(name) is not None
    (library,) = (fresh / "kernels").iterdir()
    built = library.stat().st_mtime_ns
    native.load.cache_clear()
    assert native.load(name) is not None
    assert library.stat().st_mtime_ns == built


@pytest.mark.parametrize(
    ("compiler", "remedy"),
    [
        ("/bin/false", r"see that the C\+\+ compiler works"),
        ("/nonexistent/c++ -v", r"install a C\+\+ compiler"),
    ],
)
def test_no_compiler_is_one_warning_with_a_remedy(fresh, monkeypatch, compiler, remedy):
    monkeypatch.setattr(native, "supported", lambda name: True)
    monkeypatch.setenv("CXX", compiler)
    with pytest.warns(SlowPath, match=f"can't be had.*{remedy}"):
        assert native.load("lookup") is None
    assert native.load("lookup") is None  # no second warning: it would be an error here


def test_kernels_take_contiguous_tensors_only():
    import torch

    with pytest.raises(ValueError, match="contiguous"):
        native.pointer(torch.zeros(4, 4).T)


def test_a_cache_that_can_not_be_written_is_named(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(native, "supported", lambda name: True)
    monkeypatch.setattr(native.platformdirs, "user_cache_path", lambda name: tmp_path / "file")
    with pytest.warns(SlowPath, match="see that .*kernels can be written, or .*XDG_CACHE_HOME"):
        assert native.load("lookup") is None
