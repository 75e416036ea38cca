"""What the processes of a run tell each other beside their arrays."""

import hashlib
import importlib
import importlib.metadata
import itertools
import json
import platform
import socket
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from taid_jax.hosts.errors import HostsError
from taid_jax.settings import Settings, flatten

# One process may prepare data or write a model while the others wait. A process that
# dies meanwhile is noticed by JAX, so that this need not be short.
_WAIT_MS = 24 * 3600 * 1000
_MOST_LINES = 20
# Those that decide what is computed, what is read and what is written.
_VERSIONS = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers")
_numbers = itertools.count()

Value = TypeVar("Value")


def is_first() -> bool:
    """Returns whether this is the process that writes and prints: the only, or 0."""
    return jax.process_index() == 0


def store() -> Any:
    """Returns JAX's store of keys and values that all processes see.

    JAX has no public name for it; Orbax takes it from the same place.
    """
    return importlib.import_module("jax._src.distributed").global_state.client


def agree(topic: str, facts: Mapping[str, Any]) -> None:
    """Raises unless all processes give the same facts; all of them have to call it.

    Hashes are compared; only where they differ, the facts themselves.

    Args:
        topic: What they are about, in words; each is agreed on once.
        facts: Values that JSON can hold, by name.

    Raises:
        HostsError: On every process, with what differs and where.
    """
    if jax.process_count() == 1:
        return
    text = json.dumps(dict(facts), sort_keys=True, default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()
    mine, values = jax.process_index(), store()
    values.key_value_set(f"taid_jax/{topic}/facts/{mine}", text)
    card = json.dumps([digest, socket.gethostname()])
    values.key_value_set(f"taid_jax/{topic}/hash/{mine}", card)

    def get(kind: str, process: int) -> Any:
        key = f"taid_jax/{topic}/{kind}/{process}"
        return json.loads(values.blocking_key_value_get(key, _WAIT_MS))

    cards = [get("hash", process) for process in range(jax.process_count())]
    others = [process for process, card in enumerate(cards) if card[0] != cards[0][0]]
    if not others:
        return
    first, other = get("facts", 0), get("facts", others[0])
    absent = "nothing"
    lines = [
        f"{name}: {first.get(name, absent)!r} and {other.get(name, absent)!r}"
        for name in sorted(first.keys() | other.keys())
        if first.get(name, absent) != other.get(name, absent)
    ]
    if len(lines) > _MOST_LINES:
        lines[_MOST_LINES:] = [f"... and {len(lines) - _MOST_LINES} more"]
    names = ", ".join(str(process) for process in others)
    raise HostsError(
        f"the processes disagree in their {topic}: not as process 0 has it in process "
        f"{names}. Of process 0 ({cards[0][1]}) and process {others[0]} "
        f"({cards[others[0]][1]}):\n  " + "\n  ".join(lines) + "\nstart all processes "
        "with the same settings, files and versions"
    )


def agree_on_settings(settings: Settings) -> None:
    """Raises unless all processes have the same settings and versions.

    How each found the others is its own affair: `settings.hosts` may differ.

    Raises:
        HostsError: On every process, with what differs and where.
    """
    theirs = {name for name in flatten(settings) if name.startswith("hosts.")}
    facts = {k: v for k, v in flatten(settings).items() if k not in theirs}
    versions = {
        f"version of {name}": importlib.metadata.version(name) for name in _VERSIONS
    }
    python = {"version of Python": platform.python_version()}
    agree("settings", facts | versions | python)


def from_first(make: Callable[[], Value]) -> Value:
    """Returns on every process what process 0 makes; the others wait for it.

    Args:
        make: Called on process 0 only; gives what JSON can hold.
    """
    if jax.process_count() == 1:
        return make()
    # All processes call this in the same order.
    key = f"taid_jax/from_first/{next(_numbers)}"
    if is_first():
        value = make()
        store().key_value_set(key, json.dumps(value))
        return value
    return json.loads(store().blocking_key_value_get(key, _WAIT_MS))


def gather(tree: Any) -> Any:
    """Returns a tree of arrays as numpy arrays on process 0; None as leaves elsewhere.

    One leaf after the other, so that a device holds no more than one of them whole.

    Args:
        tree: Arrays over the devices of all processes; all of them have to call this.
    """
    if jax.process_count() == 1:
        return tree

    def one(leaf: jax.Array) -> np.ndarray | None:
        whole = np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        return whole if is_first() else None

    return jax.tree.map(one, tree)
