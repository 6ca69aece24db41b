"""Errors when a model is made or loaded, not in its first call.

Transformers asks an implementation for nothing before its first call. Three of its public methods are therefore
wrapped: ``post_init``, which ends the making of every model (while one is loaded, its weights are on meta then: what a
layer cannot compute is seen before anything is read), ``from_pretrained``, after which devices are known too, and
``set_experts_implementation``. For models that do not ask for this implementation they do what they did.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .._errors import ArgumentError
from .experts import NAME, asks_for_expertile, describe, is_experts
from .packed import is_packed, unpack

_WRAPPED = "_expertile_wrapped"


def require_computable(model: nn.Module, *, any_dtype: bool = False) -> None:
    """Fails for a module of experts that asks for this implementation and that no layer computes: says which, and why.

    any_dtype: whether weights that are not on meta may be converted later.
    """
    for name, module in model.named_modules():
        if asks_for_expertile(module) and not is_packed(module):
            weights = next(module.parameters(recurse=False), None)
            try:
                describe(module, any_dtype=any_dtype and weights is not None and not weights.is_meta)
            except ArgumentError as error:
                error.rename({error.argument: f"{name}.{error.argument}" if name else error.argument})
                raise


def _warn_where_there_are_none(model: nn.Module) -> None:
    if not any(is_experts(module) for module in model.modules()):
        name = type(model).__name__
        warnings.warn(f"{name} has no experts that expertile could compute: nothing is changed", stacklevel=3)


def _post_init(original: Any) -> Any:
    @functools.wraps(original)
    def post_init(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        done = original(self, *args, **kwargs)
        # A quantizer replaces modules after this: what it knows of ends with a check of its own.
        if getattr(self.config, "quantization_config", None) is None:
            require_computable(self, any_dtype=True)
        return done

    return post_init


def _from_pretrained(original: Any) -> Any:
    @functools.wraps(original)
    def from_pretrained(cls: type[PreTrainedModel], *args: Any, **kwargs: Any) -> Any:
        loaded = original(cls, *args, **kwargs)
        # With `output_loading_info` a pair.
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        require_computable(model)
        if getattr(model.config, "_experts_implementation", None) == NAME:
            _warn_where_there_are_none(model)
        return loaded

    return classmethod(from_pretrained)


def _set_experts_implementation(original: Any) -> Any:
    @functools.wraps(original)
    def set_experts_implementation(self: PreTrainedModel, experts_implementation: str | dict[str, str]) -> Any:
        configs = {id(module.config): module.config for module in self.modules() if _has_implementation(module)}
        before = {key: config._experts_implementation_internal for key, config in configs.items()}
        done = original(self, experts_implementation)
        try:
            require_computable(self)
        except ArgumentError:
            for key, config in configs.items():
                config._experts_implementation_internal = before[key]
            raise
        for module in self.modules():
            if is_experts(module) and is_packed(module) and not asks_for_expertile(module):
                unpack(module)
        if experts_implementation == NAME:
            _warn_where_there_are_none(self)
        return done

    return set_experts_implementation


def _has_implementation(module: nn.Module) -> bool:
    return hasattr(module.__dict__.get("config"), "_experts_implementation_internal")


def register() -> None:
    """Wraps the three methods, once."""
    if _WRAPPED in PreTrainedModel.__dict__:
        return
    PreTrainedModel.post_init = _post_init(PreTrainedModel.post_init)
    PreTrainedModel.from_pretrained = _from_pretrained(PreTrainedModel.__dict__["from_pretrained"].__func__)
    PreTrainedModel.set_experts_implementation = _set_experts_implementation(PreTrainedModel.set_experts_implementation)
    setattr(PreTrainedModel, _WRAPPED, True)
