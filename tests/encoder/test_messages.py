"""The parts of messages for people."""

from encoder.messages import listed, said, shown


def test_long_values_are_cut_to_the_limit() -> None:
    assert shown("x" * 10, 12) == repr("x" * 10)
    assert shown("x" * 100, 12) == "'" + "x" * 10 + "…"


def test_a_list_says_how_many_more_there_are() -> None:
    assert listed(["a", "b"], 2) == "a, b"
    assert listed(map(str, range(2000)), 2, "; ") == "0; 1; and 1,998 more"


def test_a_library_that_says_nothing_is_called_by_its_error() -> None:
    assert said(OSError("first\n  second")) == "first second"
    assert said(OSError()) == "OSError"
