"""Raw conversations to shards of token ids: once, before training.

`prepare` cuts the source into pieces (`pieces`), encodes them in parallel (`encode`),
decides which examples are kept (`choose`) and writes them out, shuffled (`merge`).
"""

from taid_jax.data.prepare.options import PRESETS as PRESETS
from taid_jax.data.prepare.options import PrepareOptions as PrepareOptions
from taid_jax.data.prepare.run import REPORT as REPORT
from taid_jax.data.prepare.run import prepare as prepare
