"""The one exception for mistakes that a user can make and mend."""


class UserError(ValueError):
    """A setting, file or data set that cannot be used.

    The message is one sentence that names the option, what it got and what would do. The command line prints it and
    exits with code 2; in Python it is an ordinary `ValueError`.
    """
