"""Compiling a run's train step for a machine that need not be there."""

from taid_jax.chips import CHIPS as CHIPS
from taid_jax.chips import GPUS as GPUS
from taid_jax.chips import Chip as Chip
from taid_jax.plan.advice import Attempt as Attempt
from taid_jax.plan.advice import find_fit as find_fit
from taid_jax.plan.collectives import Collectives as Collectives
from taid_jax.plan.collectives import count_collectives as count_collectives
from taid_jax.plan.compiled import Plan as Plan
from taid_jax.plan.compiled import plan_step as plan_step
from taid_jax.plan.flops import count_flops as count_flops
from taid_jax.plan.machine import Machine as Machine
from taid_jax.plan.machine import PlanError as PlanError
from taid_jax.plan.machine import find_machine as find_machine
from taid_jax.plan.report import make_plan as make_plan
from taid_jax.plan.report import pair_configs as pair_configs
