"""Model families and their published configurations: every public function without arguments that
returns a `Model`, in any module here, is a configuration by its name."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bestiary.zoo.model import Model


def models() -> "dict[str, Callable[[], Model]]":
    """Name and builder of every configuration; importing the family files happens here."""
    from bestiary.zoo.model import Model

    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            signature = inspect.signature(function)
            own = function.__module__ == module.__name__ and not name.startswith("_")
            made = signature.return_annotation
            is_model = inspect.isclass(made) and issubclass(made, Model)
            if own and not signature.parameters and is_model:
                found[name] = function
    return dict(sorted(found.items()))


def load_model(name: str) -> "Model":
    """The configuration called `name`. Raises ValueError for an unknown name."""
    known = models()
    if name not in known:
        raise ValueError(f"model: unknown {name!r}; known: {', '.join(known)}")
    return known[name]()
