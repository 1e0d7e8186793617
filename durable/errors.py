class UsageError(RuntimeError):
    """An error that the user can fix: an option, a file, a port. The message says which and how.

    Libraries raise it; the `__main__` of each command prints it and exits with 1."""


class InUse(UsageError):
    """Another program has this --out."""
