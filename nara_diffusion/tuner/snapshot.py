"""All or nothing: a model's structure as it was before an adapter is added, in one snapshot."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any

from torch import nn


@contextmanager
def restored_on_error(*roots: nn.Module) -> Iterator[None]:
    """After an error inside, the `roots` are as before: modules, attributes, parameters and what they train.

    Containers are restored in place, since handles of hooks refer to them. Values that were changed in place are not
    restored; PEFT's initialisations that change the base give its weights new ones.
    """
    modules = {id(module): module for root in roots for module in root.modules()}.values()
    states = [
        (module, [(*each, _copied(each[1])) for each in vars(module).items()]) for module in modules
    ]
    values = [(p, p.data, p.requires_grad) for root in roots for p in root.parameters()]
    try:
        yield
    except BaseException:
        for module, state in states:
            vars(module).clear()
            for name, value, before in state:
                if isinstance(value, list):
                    value[:] = before
                elif before is not None:
                    value.clear()
                    value.update(before)
                vars(module)[name] = value
        for parameter, data, requires_grad in values:
            parameter.data, parameter.requires_grad = data, requires_grad
        raise


def _copied(value: Any) -> Any:
    return copy(value) if type(value) in (dict, list, set, OrderedDict) else None
