"""Model families and their published configurations: every public function without arguments that
returns a `Decoder`, in any module here, is a configuration by its name."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bestiary.zoo.decoder import Decoder


def models() -> "dict[str, Callable[[], Decoder]]":
    """Name and builder of every configuration; importing the family files happens here."""
    from bestiary.zoo.decoder import Decoder

    found = {}
    for info in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            signature = inspect.signature(function)
            own = function.__module__ == module.__name__ and not name.startswith("_")
            if own and not signature.parameters and signature.return_annotation is Decoder:
                found[name] = function
    return dict(sorted(found.items()))


def load_model(name: str) -> "Decoder":
    """The configuration called `name`. Raises ValueError for an unknown name."""
    known = models()
    if name not in known:
        raise ValueError(f"model: unknown {name!r}; known: {', '.join(known)}")
    return known[name]()
