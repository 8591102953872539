"""How the module in place of Deformable-DETR's extension is put in place and taken back, and what is never shadowed."""

import importlib.util
import subprocess
import sys
import types

import pytest

from visionkernels.integrations import deformable_detr
from visionkernels.integrations.deformable_detr import NAME, install_extension, uninstall_extension


@pytest.fixture(autouse=True)
def nothing_stays_installed():
    """The names that a test may install, and the modules that it imports, are gone after it."""
    before, finders = dict(sys.modules), list(sys.meta_path)
    yield
    sys.meta_path[:] = finders
    for name in set(sys.modules) - set(before):
        if name.partition(".")[0] in (NAME, "compiled", "project", "upstream"):
            del sys.modules[name]


def test_install_and_uninstall():
    assert importlib.util.find_spec(NAME) is None, "the test needs an environment without a compiled extension"
    before = dict(sys.modules)
    extension = install_extension()
    count = len(sys.meta_path)
    assert install_extension() is extension  # a second call does nothing
    assert len(sys.meta_path) == count
    assert sys.modules == {**before, NAME: extension}
    assert importlib.util.find_spec(NAME) is extension.__spec__  # how some code asks whether there is one
    import MultiScaleDeformableAttention

    assert MultiScaleDeformableAttention is extension
    uninstall_extension()
    assert sys.modules == before
    with pytest.raises(ModuleNotFoundError):
        import MultiScaleDeformableAttention
    with pytest.raises(ValueError, match="'MultiScaleDeformableAttention' is not one"):
        uninstall_extension()


PACKAGE = """
try:
    from project import _C
except ImportError:
    _C = None
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A package like Grounding DINO's or detrex: importing it imports its own `_C`, which may fail."""
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "__init__.py").write_text("from project import attention\n")
    (tmp_path / "project" / "attention.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path / "project"


def test_an_extension_inside_a_package_that_is_imported_later(project):
    extension = install_extension("project._C")
    assert "project" not in sys.modules  # looking for a compiled one has not imported it
    assert install_extension("project._C") is extension
    import project as package

    assert package.attention._C is extension
    import project._C as again

    assert again is extension
    assert importlib.util.find_spec("project._C") is extension.__spec__
    finders = len(sys.meta_path)
    uninstall_extension("project._C")
    assert len(sys.meta_path) == finders - 1
    assert "project._C" not in sys.modules
    assert not hasattr(package, "_C")
    with pytest.raises(ImportError):
        from project import _C  # noqa: F401


def test_an_extension_by_its_full_name_in_a_package_that_is_imported_later(project):
    (project / "__init__.py").write_text("")
    extension = install_extension("project._C")
    import project._C

    assert project._C is extension
    assert project._C.ms_deform_attn_forward is deformable_detr.ms_deform_attn_forward


def test_uninstall_before_the_package_is_imported(project):
    finders = list(sys.meta_path)
    install_extension("project._C")
    uninstall_extension("project._C")
    assert sys.meta_path == finders
    import project as package

    assert package.attention._C is None


def test_an_extension_inside_a_package_that_is_imported_already(project):
    import project as package

    assert package.attention._C is None
    names = set(vars(package))
    extension = install_extension("project._C")
    assert package._C is extension
    uninstall_extension("project._C")
    assert set(vars(package)) == names


def test_a_compiled_extension_that_is_imported_is_never_shadowed(monkeypatch):
    compiled = types.ModuleType(NAME)
    compiled.__file__ = "/site-packages/compiled.so"
    monkeypatch.setitem(sys.modules, NAME, compiled)
    for replace in (False, True):
        with pytest.raises(RuntimeError, match=f"{NAME} is imported already, from /site-packages/compiled.so"):
            install_extension(replace=replace)
    assert sys.modules[NAME] is compiled
    with pytest.raises(ValueError, match="is not one"):
        uninstall_extension()
    assert sys.modules[NAME] is compiled


@pytest.mark.parametrize("name", ["compiled", "project._C"])
def test_a_compiled_extension_that_is_installed_is_replaced_only_on_demand(project, name):
    path = (project.parent / "compiled.py") if name == "compiled" else project / "_C.py"
    path.write_text("compiled = True\n")
    with pytest.raises(RuntimeError, match=f"{name} is installed at .*; uninstall it, or pass replace=True"):
        install_extension(name)
    assert name not in sys.modules
    extension = install_extension(name, replace=True)
    assert importlib.import_module(name) is extension
    uninstall_extension(name)
    assert importlib.import_module(name).compiled


def test_a_directory_of_that_name_is_no_extension(project):
    """Python would import it as a namespace package: nothing is in it."""
    (project.parent / "compiled").mkdir()
    install_extension("compiled")
    uninstall_extension("compiled")


def test_uninstall_leaves_what_somebody_else_has_put_there(monkeypatch):
    install_extension()
    other = types.ModuleType(NAME)
    monkeypatch.setitem(sys.modules, NAME, other)
    with pytest.raises(ValueError, match="is not one"):
        uninstall_extension()
    assert sys.modules[NAME] is other


@pytest.mark.parametrize("name", ["", "a b", "project.", "1st"])
def test_a_name_that_is_none(name):
    with pytest.raises(ValueError, match="name: expected the name of a module"):
        install_extension(name)


@pytest.mark.parametrize(("name", "blocked"), [(NAME, NAME), ("project._C", "project"), ("project._C", "project._C")])
def test_an_import_that_is_blocked(monkeypatch, name, blocked):
    monkeypatch.setitem(sys.modules, blocked, None)
    with pytest.raises(RuntimeError, match=rf"^the import of {blocked} is blocked: sys\.modules\[.* is None; delete"):
        install_extension(name, replace=True)
    assert sys.modules[blocked] is None


def test_a_finder_of_an_old_kind_is_passed_over(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", [object(), *sys.meta_path])
    install_extension()
    uninstall_extension()


@pytest.mark.parametrize("name", [None, 1, b"compiled"])
def test_a_name_that_is_no_string(name):
    with pytest.raises(TypeError, match="name: expected the name of a module"):
        install_extension(name)


def test_installing_loads_nothing():
    code = (
        "import sys, visionkernels\nfrom visionkernels.integrations.deformable_detr import install_extension\n"
        "before = set(sys.modules)\ninstall_extension('groundingdino._C')\nprint(*set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
