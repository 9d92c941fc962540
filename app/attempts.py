"""When a client tries again, when it gives up, and the error that it then raises."""

import contextlib
import email.utils
import logging
import random
import ssl
import time

import httpx

CONNECT_TIMEOUT_S = 5.0
FIRST_WAIT_S = 0.25  # where the service does not say how long; doubled each time
LONGEST_WAIT_S = 2.0
# With time these pass: a busy service, one that starts or ends, and what a proxy says of one that it cannot reach.
PASSING = (429, 502, 503, 504)
FINAL_CODE = "deadline_exceeded"  # the service's own 504: it has worked on the request for as long as it may
logger = logging.getLogger("app.client")


class ClientError(Exception):
    """The service refused, failed, or could not be reached.

    Args:
        status: of the response; None where none came.
        code: as the service gives it, or "unreachable" or "timeout".
        message: what was found and what was expected.
        hint: the next step, if one is known.
    """

    def __init__(self, status: int | None, code: str, message: str, hint: str | None = None) -> None:
        super().__init__(f"{message} {hint}" if hint else message)
        self.status = status
        self.code = code
        self.message = message
        self.hint = hint


class Attempts:
    """When to try again, and when to give up. One for each call: all attempts and waits are within its time.

    What passes with time is tried again: a busy service, one that restarts, a connection that breaks. A wait is as long
    as the service says, or else FIRST_WAIT_S, and then twice as long each time. It varies, so that many clients do not
    come back at the same moment. A kept connection that was closed meanwhile is opened anew at once.

    Args:
        timeout_s: for the whole call.
        retries: at most so many; None tries for as long as there is time.
        where: the service was looked for; errors say it.
    """

    def __init__(self, timeout_s: float, retries: int | None, where: str) -> None:
        self._timeout_s = timeout_s
        self._ends_at = time.monotonic() + timeout_s
        self._retries = retries
        self._where = where
        self._tried = 0
        self._next_wait_s = FIRST_WAIT_S

    def timeout(self) -> httpx.Timeout:
        """For the next attempt."""
        self._tried += 1
        left_s = max(self.left_s, 0.001)
        return httpx.Timeout(left_s, connect=min(left_s, CONNECT_TIMEOUT_S))

    @property
    def left_s(self) -> float:
        """Seconds left of the call's time."""
        return self._ends_at - time.monotonic()

    def wait_after_reply(self, response: httpx.Response) -> float:
        """Seconds to wait before the request is sent again.

        Errors: ClientError when it is not to be sent again.
        """
        refusal = _refusal(response)
        if response.status_code not in PASSING or refusal.code == FINAL_CODE:
            raise refusal
        wait_s = _retry_after(response)
        if wait_s is None:
            return self._back_off(refusal)
        return self._checked(wait_s * random.uniform(1, 1.1), wait_s, refusal)

    def wait_after_error(self, error: httpx.RequestError) -> float:
        """The same where there was no reply, or a part of one."""
        if isinstance(error, httpx.TimeoutException) and not isinstance(error, httpx.ConnectTimeout):
            raise self.overdue() from error
        failure = self._failure(error)
        if isinstance(error, httpx.UnsupportedProtocol | httpx.LocalProtocolError) or _is_distrusted(error):
            raise failure from error
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
            wait_s = self._back_off(failure, error)
            if self._tried == 1:
                logger.warning("%s; trying again for up to %g s", failure.message.rstrip("."), self._timeout_s)
            return wait_s
        return 0.0 if self._tried == 1 else self._back_off(failure, error)

    def overdue(self) -> ClientError:
        """The error when the time is over."""
        message = f"{self._where} did not answer in time{self._history}."
        return ClientError(None, "timeout", message, "Give the client a longer timeout.")

    def _back_off(self, giving_up: ClientError, cause: Exception | None = None) -> float:
        wait_s = self._next_wait_s * random.uniform(0.5, 1)
        self._next_wait_s = min(2 * self._next_wait_s, LONGEST_WAIT_S)
        return self._checked(wait_s, wait_s, giving_up, cause)

    def _checked(self, wait_s: float, least_s: float, giving_up: ClientError, cause: Exception | None = None) -> float:
        """The wait, where there is time for it and for one more attempt."""
        out_of_retries = self._retries is not None and self._tried > self._retries
        if out_of_retries or least_s >= self.left_s:
            raise giving_up from cause
        return min(wait_s, self.left_s)

    def _failure(self, error: httpx.RequestError) -> ClientError:
        reason = str(error) or type(error).__name__
        message = f"{self._where}: {reason}{self._history}."
        return ClientError(None, "unreachable", message, "Is the service running there?")

    @property
    def _history(self) -> str:
        passed_s = self._timeout_s - self.left_s
        return f" (tried {self._tried} times in {passed_s:.1f} s)" if self._tried > 1 else ""


def _is_distrusted(error: BaseException | None) -> bool:
    """Whether the other side's certificate is the reason."""
    while error is not None and not isinstance(error, ssl.SSLCertVerificationError):
        error = error.__cause__ or error.__context__
    return error is not None


def _retry_after(response: httpx.Response) -> float | None:
    """Seconds that the service says, as a number or as a date; None if it does not."""
    given = response.headers.get("retry-after", "")
    with contextlib.suppress(ValueError):
        return max(0.0, float(given))
    with contextlib.suppress(ValueError):
        return max(0.0, email.utils.parsedate_to_datetime(given).timestamp() - time.time())
    return None


def _refusal(response: httpx.Response) -> ClientError:
    """The error that a response describes; where a proxy or another service answered, the beginning of what it said."""
    try:
        error = response.json()["error"]
        return ClientError(response.status_code, error["code"], error["message"], error.get("hint"))
    except (ValueError, KeyError, TypeError):
        return ClientError(response.status_code, "http_error", f"{response.status_code}: {response.text[:200]}")
