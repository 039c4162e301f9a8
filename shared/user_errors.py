"""A mistake that the user can mend, told so that it can be."""


class UserError(ValueError):
    """The message is all that a user needs: what was given, what was expected, how to mend it.

    Programs end with it as one line and exit code 2. Any other exception is a defect of ours and keeps its traceback.
    """
