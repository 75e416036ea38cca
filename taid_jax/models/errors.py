"""The error of a model that cannot be used, with a message for the user."""


class ModelError(ValueError):
    """A model, or a setting of one, that does not fit.

    The message is one paragraph that says what was needed, what came and the way out:
    the script prints it without a traceback.
    """
