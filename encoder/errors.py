"""Every error of the encoder, one class per thing a caller can do about it.

EncoderError
 ├─ CheckpointError       the model folder is missing, incomplete or of another kind: fix the checkpoint
 ├─ PresetFileError       the file of presets is missing or invalid: fix the file
 ├─ RequestError          the request cannot be served as asked: change the request
 │   ├─ InvalidField        one field has a value that is not allowed here
 │   └─ RequestTooLarge     the request is over a fixed limit: waiting does not help
 ├─ Overloaded            the service cannot take it now: come back later
 │   ├─ QueueFull           a stage has no room; retry after the seconds it gives
 │   └─ NotReady            the model is loading, fails, or the service is shutting down
 ├─ DeadlineExceeded      there was no result in time: ask for less, or allow more time
 └─ ModelFailure          the model raised, or produced NaN or infinity: look at the log

A message names the subject, what was expected, what was found, and the next step.
"""

from typing import Self

from encoder.messages import one_line


class EncoderError(Exception):
    """Base of all errors that this package raises on purpose.

    Args:
        message: what is wrong; as `one_line` writes it.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))

    def __copy__(self) -> Self:
        """The same error without a traceback, for each further caller: an exception keeps the frames it passed through.

        `copy.copy` alone would call the class with the message, and some take more than that.
        """
        error = type(self).__new__(type(self), *self.args)
        error.__dict__.update(self.__dict__)
        return error


class CheckpointError(EncoderError):
    """The checkpoint cannot be opened or does not hold the model that its config describes."""


class PresetFileError(EncoderError):
    """The file of presets cannot be read, or a preset in it is invalid."""


class RequestError(EncoderError):
    """The request cannot be served as asked."""


class InvalidField(RequestError):
    """A field has a value that is not allowed.

    Args:
        field: name of the field, as in the request.
        message: the value found, what is allowed, and the next step.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class RequestTooLarge(RequestError):
    """The request is over a fixed limit; waiting does not help."""


class Overloaded(EncoderError):
    """The service cannot take this request now.

    Args:
        message: what is full or not ready, with the numbers.
        retry_after_s: seconds after which a retry makes sense.
    """

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(Overloaded):
    """A stage has no room for all prompts of the request: the tokenizer's, or the model's queue."""


class NotReady(Overloaded):
    """No model works now: it is loading, is loaded again, or has failed; or the service is shutting down."""


class DeadlineExceeded(EncoderError):
    """There was no result within the time allowed.

    Args:
        message: the time, and where it ran out.
        stage: where it ran out; see Deadline.
    """

    def __init__(self, message: str, stage: str) -> None:
        super().__init__(message)
        self.stage = stage


class ModelFailure(EncoderError):
    """The forward pass raised, or its result is not finite."""
