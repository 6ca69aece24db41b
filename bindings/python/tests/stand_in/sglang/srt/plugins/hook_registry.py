"""Hooks that come into force together, when all plugins have been loaded."""

import enum
import functools
import pkgutil


class HookType(enum.Enum):
    AFTER = "after"


_registered = {}


class HookRegistry:
    @classmethod
    def register(cls, target, hook, hook_type=HookType.AFTER):
        _registered.setdefault(target, []).append(hook)

    @classmethod
    def apply_hooks(cls):
        for target, hooks in _registered.items():
            owner, name = target.rsplit(".", 1)
            owner = pkgutil.resolve_name(owner)
            setattr(owner, name, functools.reduce(_after, hooks, getattr(owner, name)))
        _registered.clear()


def _after(function, hook):
    @functools.wraps(function)
    def both(*arguments, **named):
        result = function(*arguments, **named)
        changed = hook(result, *arguments, **named)
        return result if changed is None else changed

    return both
