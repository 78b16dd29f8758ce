"""The error of a user's making."""


class UserError(Exception):
    """Bad input or surroundings: one line that says what is wrong, where, and what to do."""
