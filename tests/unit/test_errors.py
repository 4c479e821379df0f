import pytest

import compress_bilinear
from compress_bilinear import errors

CHILDREN = [
    value
    for value in vars(errors).values()
    if isinstance(value, type)
    and issubclass(value, Exception)
    and not issubclass(value, Warning)
    and value is not errors.CompressionError
]


@pytest.mark.parametrize("error", CHILDREN)
def test_every_error_is_a_compression_error_and_a_value_error(error):
    assert issubclass(error, compress_bilinear.CompressionError)
    assert issubclass(error, ValueError)


def test_only_an_input_error_is_a_runtime_error_too():
    assert [error for error in CHILDREN if issubclass(error, RuntimeError)] == [errors.InputError]
