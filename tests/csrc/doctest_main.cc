// The main function of every test program: compiled once, for doctest's own code takes longer than most tests' does.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
