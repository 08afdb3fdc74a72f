"""The one error that is the user's to mend."""


class UserError(Exception):
    """Input that cannot be used: a flag, a file, a row, a model directory.

    The message is one line that names the flag, file or row and says what to do. Programs print it as
    ``error: <message>`` and exit with code 2, without a traceback.
    """


class TrainingFailure(Exception):
    """Training that must not go on, such as a loss that is not a number.

    The message is one line that says where and what to try. Programs print it and exit with code 1.
    """
