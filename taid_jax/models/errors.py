"""The error of a model that cannot be used, with a message for the user."""

from taid_jax.errors import InputError


class ModelError(InputError):
    """A model, or a setting of one, that does not fit."""
