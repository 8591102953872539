"""The error that a person can put right."""


class UserError(ValueError):
    """What was asked for cannot be done, said in one sentence: which argument, what came, what to do.

    The command line prints it without a traceback and ends with exit code 2.
    """
