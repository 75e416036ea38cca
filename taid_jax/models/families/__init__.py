"""The families of models that the decoder can be: one small file each.

A new family is a file like `llama.py` and an entry in `registry.FAMILIES`; what it does
differently from the others is a setting of `DecoderConfig`.
"""

from taid_jax.models.families.family import (
    Family as Family,
    Setting as Setting,
    Weight as Weight,
)
from taid_jax.models.families.registry import (
    FAMILIES as FAMILIES,
    MOST_LAYERS as MOST_LAYERS,
    family_named as family_named,
    is_ignored as is_ignored,
    read_config as read_config,
    supported as supported,
    write_config as write_config,
)
