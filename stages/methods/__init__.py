"""Methods: pure functions on tensors, one paper or idea a file. No model, no path, no config, no engine.

One alphabet for shapes, in every file below:
    B images in a batch      N patch tokens        P prefix tokens (CLS, distillation, registers)     T = P + N
    H heads                  D width of a head     C embedding width      L blocks      M images of a data set
"""

from __future__ import annotations


class InvalidInput(ValueError):
    """Data, a file or a setting that the user gave is wrong. `hint` says what to do about it; `field`, where it is
    given, is the place in pipeline.yaml that caused it, such as "model.name".

    It stands here because vision, deploy and methods all raise it and none of them may know the engine, which prints
    it.
    """

    def __init__(self, message: str, hint: str = "", *, field: str = "") -> None:
        super().__init__(message)
        self.hint = hint
        self.field = field
