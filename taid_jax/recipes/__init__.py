"""Settings that are shipped: pairs of models, and methods of distillation.

`pairs/NAME.yaml` is a whole job but for the method, `methods/NAME.yaml` what makes a
method, whatever the models. The key `methods` of a file says what is different for a
method there.
"""

import pathlib
from typing import Literal

from taid_jax.errors import show
from taid_jax.settings import Settings, SettingsError, from_dict, read_settings

Kind = Literal["pair", "method"]

_FOLDER = pathlib.Path(__file__).parent
_SUFFIXES = (".yaml", ".yml", ".json")


def known_recipes(kind: Kind) -> list[str]:
    """Returns the names of the files that are shipped, in order."""
    return sorted(path.stem for path in (_FOLDER / f"{kind}s").glob("*.yaml"))


def find_recipe(kind: Kind, name: str) -> pathlib.Path:
    """Returns the file of a pair or a method.

    Args:
        kind: Of which it is.
        name: One of `known_recipes`, or the path of a file (.yaml, .yml, .json).

    Raises:
        SettingsError: If there is none; it lists the names.
    """
    known = known_recipes(kind)
    if name in known:
        return _FOLDER / f"{kind}s" / f"{name}.yaml"
    if (path := pathlib.Path(name)).suffix in _SUFFIXES and path.is_file():
        return path
    raise SettingsError(
        f"{kind}: need {', '.join(known)}, or a file of settings ({_SUFFIXES[0]}), "
        f"got {show(name)}"
    )


def read_recipe(
    *,
    pair: str | None = None,
    config: str | pathlib.Path | None = None,
    method: str | None = None,
    base: Settings | None = None,
) -> Settings:
    """Returns the settings of a pair, a file and a method, laid over `base` in order.

    What a file says and has no effect under the next one is left out: a pair serves
    several methods.

    Args:
        pair: Of models; a name or a file, as in `find_recipe`.
        config: Of any settings.
        method: A name or a file.
        base: What no file names stays as here; the defaults when None. With a pair and
            a method the output is `runs/PAIR/METHOD` if no file says another one.

    Raises:
        SettingsError: If a file is missing, or cannot be used.
    """
    files: list[str | pathlib.Path] = []
    if pair is not None:
        files.append(find_recipe("pair", pair))
    if config is not None:
        files.append(config)
    name = None
    if method is not None:
        files.append(find_recipe("method", method))
        name = pathlib.Path(method).stem
    if pair is not None and name is not None:
        output = f"runs/{pathlib.Path(pair).stem}/{name}"
        base = from_dict({"output": output}, base)
    if not files:
        return base or Settings()
    *under, last = files
    return read_settings(last, base, under=under, method=name)
