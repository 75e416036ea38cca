"""The settings of a run: one frozen dataclass tree, to and from YAML and JSON."""

from taid_jax.settings.checks import SettingsError as SettingsError
from taid_jax.settings.convert import FREE_ON_RESUME as FREE_ON_RESUME
from taid_jax.settings.convert import contradictions as contradictions
from taid_jax.settings.convert import flatten as flatten
from taid_jax.settings.convert import from_dict as from_dict
from taid_jax.settings.convert import to_dict as to_dict
from taid_jax.settings.convert import to_json as to_json
from taid_jax.settings.convert import to_yaml as to_yaml
from taid_jax.settings.data import DataSettings as DataSettings
from taid_jax.settings.epochs import with_date as with_date
from taid_jax.settings.epochs import with_steps as with_steps
from taid_jax.settings.files import read_settings as read_settings
from taid_jax.settings.hosts import HostSettings as HostSettings
from taid_jax.settings.judge import BestBy as BestBy
from taid_jax.settings.judge import JudgeSettings as JudgeSettings
from taid_jax.settings.model import ModelSettings as ModelSettings
from taid_jax.settings.objective import ObjectiveSettings as ObjectiveSettings
from taid_jax.settings.optimizer import OptimizerSettings as OptimizerSettings
from taid_jax.settings.run import RunSettings as RunSettings
from taid_jax.settings.samples import SampleSettings as SampleSettings
from taid_jax.settings.tree import Settings as Settings
