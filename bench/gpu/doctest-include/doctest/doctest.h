// As much of doctest's interface as the tests of the CUDA bodies use, for machines without it: cases, checks that
// report and go on, requirements that end a case, and captured values in what is printed. Written for
// bench/gpu_check.py.
//   PROGRAM [SUBSTRING...]   runs the cases whose names contain one of the words, or all
#pragma once

#include <cstdio>
#include <cstring>
#include <exception>
#include <sstream>
#include <string>
#include <vector>

namespace small_doctest {

struct Case {
  const char* name;
  void (*run)();
};

inline std::vector<Case>& cases() {
  static std::vector<Case> all;
  return all;
}

struct Registered {
  Registered(const char* name, void (*run)()) { cases().push_back({name, run}); }
};

struct Ended {};  // a case that cannot go on

struct State {
  const char* name = "";
  std::vector<std::string> captured;
  unsigned long long checks = 0, failed = 0;
};

inline State& state() {
  static State one;
  return one;
}

template <typename T>
std::string text_of(const T& value) {
  std::ostringstream stream;
  stream << value;
  return stream.str();
}

struct Captured {
  Captured(const char* what, const std::string& value) {
    state().captured.push_back(std::string(what) + " := " + value);
  }
  ~Captured() { state().captured.pop_back(); }
  Captured(const Captured&) = delete;
  Captured& operator=(const Captured&) = delete;
};

inline void report(bool good, const char* what, const char* file, int line) {
  State& now = state();
  ++now.checks;
  if (good) return;
  if (++now.failed > 20) return;  // one cause can fail thousands
  std::fprintf(stderr, "%s:%d: %s: not so: %s\n", file, line, now.name, what);
  for (const std::string& value : now.captured) std::fprintf(stderr, "  %s\n", value.c_str());
}

inline int run(int count, char** words) {
  unsigned long long ran = 0;
  for (const Case& one : cases()) {
    bool wanted = count < 2;
    for (int i = 1; i < count; ++i) wanted = wanted || std::strstr(one.name, words[i]) != nullptr;
    if (!wanted) continue;
    state().name = one.name;
    ++ran;
    try {
      one.run();
    } catch (const Ended&) {
    } catch (const std::exception& error) {
      report(false, error.what(), one.name, 0);
    }
    state().captured.clear();
  }
  std::printf("%llu cases, %llu checks, %llu failed\n", ran, state().checks, state().failed);
  return state().failed == 0 && ran > 0 ? 0 : 1;
}

}  // namespace small_doctest

#define SMALL_DOCTEST_JOIN_(a, b) a##b
#define SMALL_DOCTEST_JOIN(a, b) SMALL_DOCTEST_JOIN_(a, b)
#define SMALL_DOCTEST_CASE(name, function)                                                  \
  static void function();                                                                   \
  static const small_doctest::Registered SMALL_DOCTEST_JOIN(function, _at){name, function}; \
  static void function()

#define TEST_CASE(name) SMALL_DOCTEST_CASE(name, SMALL_DOCTEST_JOIN(small_doctest_case_, __LINE__))
#define CHECK(...) small_doctest::report(static_cast<bool>(__VA_ARGS__), #__VA_ARGS__, __FILE__, __LINE__)
#define REQUIRE(...)                                                             \
  do {                                                                           \
    bool small_doctest_good = static_cast<bool>(__VA_ARGS__);                    \
    small_doctest::report(small_doctest_good, #__VA_ARGS__, __FILE__, __LINE__); \
    if (!small_doctest_good) throw small_doctest::Ended{};                       \
  } while (false)
#define FAIL(text)                                          \
  do {                                                      \
    small_doctest::report(false, text, __FILE__, __LINE__); \
    throw small_doctest::Ended{};                           \
  } while (false)
#define CAPTURE(value) \
  small_doctest::Captured SMALL_DOCTEST_JOIN(small_doctest_captured_, __LINE__)(#value, small_doctest::text_of(value))

#if defined(DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN)
int main(int count, char** words) { return small_doctest::run(count, words); }
#endif
