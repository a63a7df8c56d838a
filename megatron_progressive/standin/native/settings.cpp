// Settings of the stand-in: environment variables, read when first asked for.
#include "common.h"

#include <unistd.h>

#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace standin {

long setting(const char* name, long otherwise) {
  const char* value = getenv(name);
  return value && *value ? atol(value) : otherwise;
}

std::string text_setting(const char* name) {
  const char* value = getenv(name);
  return value ? value : "";
}

bool checking() {
  static const bool on = text_setting("STANDIN_MODE") == "checking";
  return on;
}

size_t device_bytes() {
  static const size_t bytes = static_cast<size_t>(setting("STANDIN_MIB", 79L << 10)) << 20;
  return bytes;
}

size_t copied_bytes() {
  static const size_t bytes = [] {
    const long mib = setting("STANDIN_COPY_MIB", -1);
    return mib < 0 ? SIZE_MAX : static_cast<size_t>(mib) << 20;
  }();
  return bytes;
}

long timeout_s() {
  static const long seconds = setting("STANDIN_TIMEOUT_S", 120);
  return seconds;
}

void say(const std::string& line) {
  const std::string whole = "stand-in: " + line + "\n";
  // One call, so that lines of several ranks do not mix.
  if (write(STDERR_FILENO, whole.data(), whole.size()) < 0) return;
}

std::string words(const char* format, ...) {
  char buffer[1024];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

}  // namespace standin
