"""The one exception meant for the person at the keyboard."""


class UserError(Exception):
    """Something the user can put right: bad input, a wrong file, impossible settings.

    The message names what was wrong (file, line, field, shape) and what to do. The command line prints it
    without a traceback and exits with status 2.
    """
