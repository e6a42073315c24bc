// Trace: the last few things that happened, kept as numbers and printed only when a run fails.
#pragma once

#include <cstdint>
#include <sstream>
#include <string>
#include <vector>

namespace moe_efa::simulator {

class Trace {
 public:
  explicit Trace(std::size_t lines) : lines_(lines == 0 ? 1 : lines) {}

  void set_time(std::uint64_t time_ns) { time_ns_ = time_ns; }

  // `what` is a literal; numbers that are not negative follow it.
  void add(std::uint32_t rank, const char* what, std::int64_t a = -1, std::int64_t b = -1, std::int64_t c = -1) {
    lines_[next_++ % lines_.size()] = {time_ns_, rank, what, a, b, c};
  }

  std::string text() const {
    std::ostringstream out;
    std::uint64_t first = next_ > lines_.size() ? next_ - lines_.size() : 0;
    for (std::uint64_t i = first; i < next_; ++i) {
      const Line& line = lines_[i % lines_.size()];
      out << "  " << line.time_ns << " ns rank " << line.rank << ": " << line.what;
      for (std::int64_t number : {line.a, line.b, line.c}) {
        if (number >= 0) out << ' ' << number;
      }
      out << '\n';
    }
    return out.str();
  }

 private:
  struct Line {
    std::uint64_t time_ns;
    std::uint32_t rank;
    const char* what;
    std::int64_t a, b, c;
  };
  std::vector<Line> lines_;
  std::uint64_t next_ = 0, time_ns_ = 0;
};

}  // namespace moe_efa::simulator
