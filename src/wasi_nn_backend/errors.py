"""Every failure that a caller can see, with the one WASI-NN code that it carries.

    WasiNNError
    ├── misuse: the caller can mend it
    │   ├── InvalidArgument        wrong handle, value, type, state of a call
    │   ├── InvalidEncoding        text that is not JSON or UTF-8, an unknown graph encoding
    │   ├── UnsupportedOperation   this backend, build or model cannot do it
    │   ├── TooLarge               the caller's buffer or a limit is too small; ``n_bytes_needed``
    │   ├── NotFound               no graph of that name
    │   ├── ModelNotFound          the name is known, its file is missing
    │   ├── SecurityViolation      not allowed to this caller
    │   └── PromptTooLong          the prompt does not fit the context window
    └── run time: the call was right
        ├── Busy                   no room now, try again
        ├── DeadlineExceeded       it took too long; text so far is kept
        ├── Cancelled              the caller or the host stopped it; text so far is kept
        ├── ContextFull            the window is full; text so far is kept
        ├── EndOfSequence          compute_single has nothing more to give (not a fault)
        ├── MissingMemory          the guest exports no usable memory
        └── RuntimeFailure         llama.cpp or the system failed

Doors translate ``error.code`` to their own numbers through the tables in ``dialects``; nothing else about an error
ever reaches a guest.
"""

from __future__ import annotations

import enum

__all__ = [
    "Busy",
    "Cancelled",
    "ContextFull",
    "DeadlineExceeded",
    "EndOfSequence",
    "ErrorCode",
    "InvalidArgument",
    "InvalidEncoding",
    "MissingMemory",
    "ModelNotFound",
    "NotFound",
    "PromptTooLong",
    "RuntimeFailure",
    "SecurityViolation",
    "TooLarge",
    "UnsupportedOperation",
    "WasiNNError",
]


class ErrorCode(enum.Enum):
    """The union of the error names of all WASI-NN dialects; numbers live in ``dialects``."""

    SUCCESS = "success"
    INVALID_ARGUMENT = "invalid_argument"
    INVALID_ENCODING = "invalid_encoding"
    MISSING_MEMORY = "missing_memory"
    BUSY = "busy"
    TIMEOUT = "timeout"
    RUNTIME_ERROR = "runtime_error"
    UNSUPPORTED_OPERATION = "unsupported_operation"
    TOO_LARGE = "too_large"
    NOT_FOUND = "not_found"
    SECURITY = "security"
    UNKNOWN = "unknown"
    END_OF_SEQUENCE = "end_of_sequence"
    CONTEXT_FULL = "context_full"
    PROMPT_TOO_LONG = "prompt_too_long"
    MODEL_NOT_FOUND = "model_not_found"


class WasiNNError(Exception):
    """Base of all errors of this package. ``str(error)`` says what happened, to what, and what to do."""

    code: ErrorCode = ErrorCode.UNKNOWN


class InvalidArgument(WasiNNError):
    code = ErrorCode.INVALID_ARGUMENT


class InvalidEncoding(WasiNNError):
    code = ErrorCode.INVALID_ENCODING


class MissingMemory(WasiNNError):
    code = ErrorCode.MISSING_MEMORY


class Busy(WasiNNError):
    code = ErrorCode.BUSY


class DeadlineExceeded(WasiNNError):
    code = ErrorCode.TIMEOUT


class Cancelled(WasiNNError):
    # No dialect has a number for "you stopped this yourself"; runtime_error is what the closest ones document.
    code = ErrorCode.RUNTIME_ERROR


class RuntimeFailure(WasiNNError):
    code = ErrorCode.RUNTIME_ERROR


class UnsupportedOperation(WasiNNError):
    code = ErrorCode.UNSUPPORTED_OPERATION


class TooLarge(WasiNNError):
    """A result or a request exceeds a size limit. ``n_bytes_needed`` is 0 where no size would do."""

    code = ErrorCode.TOO_LARGE

    def __init__(self, message: str, n_bytes_needed: int = 0) -> None:
        super().__init__(message)
        self.n_bytes_needed = n_bytes_needed


class NotFound(WasiNNError):
    code = ErrorCode.NOT_FOUND


class ModelNotFound(WasiNNError):
    code = ErrorCode.MODEL_NOT_FOUND


class SecurityViolation(WasiNNError):
    code = ErrorCode.SECURITY


class EndOfSequence(WasiNNError):
    code = ErrorCode.END_OF_SEQUENCE


class ContextFull(WasiNNError):
    code = ErrorCode.CONTEXT_FULL


class PromptTooLong(WasiNNError):
    code = ErrorCode.PROMPT_TOO_LONG
