"""Methods: pure functions on tensors, one paper or idea a file. No model, no path, no config, no engine.

One alphabet for shapes, in every file below:
    B images in a batch      N patch tokens        P prefix tokens (CLS, distillation, registers)     T = P + N
    H heads                  D width of a head     C embedding width      L blocks      M images of a data set
"""

from __future__ import annotations


class InvalidInput(ValueError):
    """Data or a file that the user gave is wrong. `hint` says what to do about it.

    It stands here because vision, deploy and methods all raise it and none of them may know the engine, which prints
    it.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
