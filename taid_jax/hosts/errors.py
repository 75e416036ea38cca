"""How a run of several processes is refused."""


class HostsError(ValueError):
    """The processes cannot be one run: one is missing, or they disagree."""
