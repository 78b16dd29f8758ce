"""The errors that are no bugs: what the user can mend, and a stop that was asked for."""


class UserError(Exception):
    """Bad input or surroundings: one line that says what is wrong, where, and what to do."""


class Stopped(Exception):
    """SIGTERM came, and the run ended in good order: one line that says where it goes on."""
