"""What modules leave behind is put aside from the collector, and holds nothing that a load has."""

import gc
import sys
import weakref
from types import ModuleType

import pytest

from modelhostd.worker.process import free_memory, importing


class Weight:
    """Stands for what must be freed."""


@pytest.fixture(autouse=True)
def _all_is_collected_again():
    gc.unfreeze()  # what another test put aside may go meanwhile, and is not to be counted
    yield
    gc.unfreeze()
    gc.collect()


@pytest.fixture
def new_module(monkeypatch):
    """Give what imports a module that was not there and fails at another, which leaves a cycle behind."""

    def run():
        try:
            raise ImportError("what is not needed")
        except ImportError as error:
            error.itself = error
        monkeypatch.setitem(sys.modules, "made_up", ModuleType("made_up"))
        return "imported"

    return run


def test_imports_are_put_aside_and_hold_nothing_of_who_imports(new_module):
    """What the importing function held is freed with it, and the collector is on again."""

    def load():
        weight = Weight()
        found = importing(new_module)
        return found, weakref.ref(weight)

    before = gc.get_freeze_count()
    found, weight = load()
    assert (found, weight(), gc.isenabled()) == ("imported", None, True)
    assert gc.get_freeze_count() > before


def test_without_a_new_module_nothing_is_put_aside():
    """A second load of a kind leaves what there is to the collector."""
    before = gc.get_freeze_count()
    assert importing(lambda: 3) == 3
    assert gc.get_freeze_count() == before


def test_an_error_of_an_import_is_raised():
    """Whoever imports is told, and the collector is on again."""
    with pytest.raises(ModuleNotFoundError):
        importing(lambda: __import__("modelhost_has_no_such_module"))
    assert gc.isenabled()


def test_what_was_put_aside_in_a_cycle_is_freed_where_it_matters(new_module):
    """An unload that is not sure of its memory looks at everything."""
    cycle = Weight()
    cycle.itself = cycle
    found = weakref.ref(cycle)
    importing(new_module)
    del cycle
    free_memory(thorough=False)
    assert found() is not None
    free_memory()
    assert found() is None
