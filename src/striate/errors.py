"""The one kind of error that is written for people."""


class UserError(ValueError):
    """Something the user can put right. Its text is one line: what was found, what was expected, what to do.

    The command line prints that line alone (a traceback only with `--debug`); library users catch it as a
    `ValueError`.
    """
