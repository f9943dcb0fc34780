"""The one way in which a build of egm_alloc ends early."""


class BuildStop(SystemExit):
    """End the build with one sentence on standard error and no traceback.

    Parameters
    ----------
    sentence : str
        What is wrong and what to type.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(f"egm_alloc: {sentence}")
