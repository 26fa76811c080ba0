"""Everything that can go wrong in the function, as one tree.

    NeedsError
    ├── SettingError               a bad environment variable: the start fails
    ├── RequestError               the caller can mend it
    │   ├── NotJson                400
    │   ├── NotFound               404
    │   ├── MethodNotAllowed       405
    │   ├── BodyTooLarge           413
    │   ├── UnsupportedMediaType   415
    │   └── InvalidInput           422
    ├── Overloaded                 503, at once: the queue is full
    └── ReleaseError               503: no release can be had
        ├── ReleaseRefused         its content is not what the contract says
        └── ReleaseUnavailable     it could not be fetched

Status codes are given by `function.app` alone; they stand here to be read.
A message says what was expected, what was found, and the remedy.
"""


class NeedsError(Exception):
    """The root: nothing else is raised on purpose."""


class SettingError(NeedsError):
    """An environment variable has a value that cannot be used."""


class RequestError(NeedsError):
    """A request that cannot be answered as it stands."""


class NotJson(RequestError):
    """The body is not UTF-8 JSON."""


class NotFound(RequestError):
    """No such path."""


class MethodNotAllowed(RequestError):
    """The path exists, the method does not; `allow` lists those that do."""

    def __init__(self, method: str, allow: str):
        super().__init__(f"method: expected one of {allow}, found {method}; use one of those")
        self.allow = allow


class BodyTooLarge(RequestError):
    """More bytes than MAX_BODY_BYTES."""


class UnsupportedMediaType(RequestError):
    """Not `application/json` in UTF-8."""


class InvalidInput(RequestError):
    """JSON of the wrong shape; `problems` maps JSON pointers to what is wrong there."""

    def __init__(self, problems: dict[str, str]):
        super().__init__("; ".join(problems.values()))
        self.problems = problems


class Overloaded(NeedsError):
    """As many requests wait as may."""


class ReleaseError(NeedsError):
    """No release can be served."""


class ReleaseRefused(ReleaseError):
    """A release whose content breaks the contract: it stays refused until the pointer changes."""


class ReleaseUnavailable(ReleaseError):
    """A release that could not be fetched in time: worth another try."""
