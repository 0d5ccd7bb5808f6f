//! Nothing here: the tests of the whole, over both real binaries, are in `tests/it`.
