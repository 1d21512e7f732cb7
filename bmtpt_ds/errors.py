"""The one exception that stands for a mistake of the user's."""


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one line that names the thing at fault and the mend; the command line prints it and exits with
    status 2, without a traceback. Everything else that is raised is a fault of ours and keeps its traceback.
    """
