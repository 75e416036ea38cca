"""How a run of several processes is refused."""

from taid_jax.errors import InputError


class HostsError(InputError):
    """The processes cannot be one run: one is missing, or they disagree."""
