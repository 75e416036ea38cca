"""Several processes as one run: joining, agreeing, ending together."""

from taid_jax.hosts.errors import HostsError as HostsError
from taid_jax.hosts.join import join as join
from taid_jax.hosts.leave import explain_loss as explain_loss
from taid_jax.hosts.leave import finish as finish
from taid_jax.hosts.leave import is_alone as is_alone
from taid_jax.hosts.leave import leave as leave
from taid_jax.hosts.talk import agree as agree
from taid_jax.hosts.talk import agree_on_settings as agree_on_settings
from taid_jax.hosts.talk import from_first as from_first
from taid_jax.hosts.talk import gather as gather
from taid_jax.hosts.talk import is_first as is_first
