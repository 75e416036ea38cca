"""How a setting is refused."""

from taid_jax.errors import InputError, show


class SettingsError(InputError):
    """A setting is out of range, unknown, or contradicts another."""


def need(name: str, value: object, holds: bool, what: str) -> None:
    """Raises unless a setting holds.

    Args:
        name: Of the setting.
        value: Given.
        holds: Whether it can be used.
        what: That is needed, for the message.

    Raises:
        SettingsError: If it does not hold.
    """
    if not holds:
        raise SettingsError(f"{name}: need {what}, got {show(value)}")
