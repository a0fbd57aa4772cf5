from __future__ import annotations

import pickle

import pytest

import npu_runtime
from npu_runtime.errors import (
    ArtifactError,
    Error,
    InputError,
    ParityError,
    ProgramError,
    UnavailableError,
    UsageError,
    first_line,
)


def test_a_message_gives_what_where_expected_got_and_what_to_do_next() -> None:
    error = Error("it broke", where="a/b", expected=[1], got="two\nlines", hint="mend it")
    assert str(error).splitlines() == [
        "it broke",
        "  where:    a/b",
        "  expected: [1]",
        "  got:      two",
        "            lines",
        "  next:     mend it",
    ]


def test_parts_that_are_not_known_are_left_out() -> None:
    error = Error("it broke", got=0)
    assert str(error) == "it broke\n  got:      0"
    assert error.fields() == {"what": "it broke", "got": "0"}


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        (Error, 1),
        (InputError, 1),
        (ArtifactError, 1),
        (ProgramError, 1),
        (UsageError, 2),
        (ParityError, 3),
        (UnavailableError, 4),
    ],
)
def test_each_error_has_the_exit_code_of_its_kind_and_the_common_base(kind: type[Error], code: int) -> None:
    assert kind.exit_code == code
    assert issubclass(kind, npu_runtime.Error)
    assert getattr(npu_runtime, kind.__name__) is kind


def test_a_wrong_input_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="not this"):
        raise InputError("not this")


def test_an_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(InputError("it broke", where="a", expected=1, got=2, hint="mend it")))
    assert type(error) is InputError
    assert error.fields() == {"what": "it broke", "where": "a", "expected": "1", "got": "2", "next": "mend it"}


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("\n  one \ntwo", "one"),
        ("", ""),
        (RuntimeError("\nCUDA error\nmore"), "CUDA error"),
        (RuntimeError(), "RuntimeError"),
        (MemoryError(" \n"), "MemoryError"),
    ],
)
def test_the_first_line_that_says_something_or_the_kind_of_an_error_that_says_nothing(said: object, line: str) -> None:
    assert first_line(said) == line
