"""Checkpoint state declared by its keys, instead of by a pair of methods that list every attribute twice."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Mapping
from typing import Any, ClassVar

from lightning_optim.core.state_version import check_version


class Stateful:
    """Mixin that implements `state_dict` and `load_state_dict` for the state that a class declares.

    Checkpoint keys never change. The attribute of a key has the same name, usually with a leading underscore. Plain
    values are numbers, strings, None, and lists, tuples, sets, deques and dicts of these; loading converts each to the
    container type of the present attribute. A part whose attribute is None is saved as an empty dict.

    Example:
        >>> class Mean(Stateful):
        ...     STATE = ("values", "count")
        ...     def __init__(self):
        ...         self._values, self.count = deque([1.0, 2.0], maxlen=2), 2
        >>> saved = Mean().state_dict()
        >>> saved
        {'values': [1.0, 2.0], 'count': 2}
        >>> other = Mean()
        >>> other.load_state_dict({"values": [3.0, 4.0, 5.0], "count": 3})
        >>> other._values
        deque([4.0, 5.0], maxlen=2)
    """

    STATE: ClassVar[tuple[str, ...]] = ()
    """Keys of plain values."""
    PARTS: ClassVar[tuple[str, ...]] = ()
    """Keys of attributes that have their own `state_dict`."""
    ADDED: ClassVar[tuple[str, ...]] = ()
    """Those keys that checkpoints of the first version do not have; without one its attribute stays as it is."""

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of the state in plain numbers, strings, lists and dicts, for a checkpoint."""
        parts = {key: getattr(self, self._attribute(key)) for key in self.PARTS}
        return {
            **{key: _plain(getattr(self, self._attribute(key))) for key in self.STATE},
            **{key: {} if part is None else part.state_dict() for key, part in parts.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state returned by `state_dict`; of unknown keys a warning is given.

        Args:
            state: The result of `state_dict`.

        Raises:
            KeyError: A key is missing, because another version saved the checkpoint. Nothing has been changed then.
        """
        if missing := [key for key in (*self.STATE, *self.PARTS) if key not in state and key not in self.ADDED]:
            raise KeyError(
                f"Invalid state of {type(self).__name__}: {', '.join(map(repr, missing))} missing; it has "
                f"{', '.join(map(repr, state)) or 'nothing'}. Was it saved by another version of lightning_optim?"
            )
        check_version(state, f"the state of {type(self).__name__}", (*self.STATE, *self.PARTS))
        for key in state.keys() & set(self.STATE):
            attribute = self._attribute(key)
            setattr(self, attribute, _like(getattr(self, attribute), state[key]))
        for key in self.PARTS:
            part = getattr(self, self._attribute(key))
            if part is not None and state.get(key):
                part.load_state_dict(state[key])

    def _attribute(self, key: str) -> str:
        return f"_{key}" if hasattr(self, f"_{key}") else key


def _plain(value: Any) -> Any:
    if isinstance(value, set):
        value = sorted(value)
    if isinstance(value, list | tuple | deque):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _like(present: Any, saved: Any) -> Any:
    """Return a copy of ``saved`` in a container of the type of ``present``."""
    if isinstance(present, deque):
        return deque(saved, maxlen=present.maxlen)
    if isinstance(present, set):
        return {tuple(item) if isinstance(item, list) else item for item in saved}
    if isinstance(present, defaultdict):
        make = present.default_factory
        assert make is not None
        return defaultdict(make, {key: _like(make(), value) for key, value in saved.items()})
    if isinstance(saved, list):
        return list(saved) if isinstance(present, list) else tuple(saved)
    return dict(saved) if isinstance(saved, Mapping) else saved
