"""The one exception that is the user's business."""


class InputError(ValueError):
    """A mistake in what the user gave: one sentence that names what is wrong and what would be right.

    The command line prints the sentence without a traceback and exits with code 2. It is raised before long
    work starts, and nothing has been written when it is.
    """


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """``", did you mean a or b?"`` for an error message, or what there is when nothing is near."""
    import difflib

    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5)
    if close:
        return f"; did you mean {' or '.join(close)}?"
    listed = ", ".join(sorted(known)[:12])
    return f"; known are {listed}{' ...' if len(known) > 12 else ''}"
