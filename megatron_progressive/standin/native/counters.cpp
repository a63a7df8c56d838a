// Numbers of what was called: kernels by name, calls that wait for the device, and running sums.
// STANDIN_REPORT=FILE: written to FILE.<pid>.json when the process ends.
#include "common.h"

#include <cxxabi.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <unordered_map>

namespace standin {
namespace {

constexpr size_t kLongestName = 300;

// Never destroyed: libraries are unloaded after our own statics would be.
struct Counters {
  std::mutex mutex;
  std::map<std::string, long> kernels, host, numbers;
  std::unordered_map<const void*, long> launches;
  std::unordered_map<const void*, const char*> names;  // mangled, of __cudaRegisterFunction
};

Counters& all() {
  static Counters* counters = new Counters;
  return *counters;
}

// Kernel names of templates are long, and unreadable before they are demangled.
std::string readable(const char* mangled) {
  int status = 0;
  char* text = abi::__cxa_demangle(mangled, nullptr, nullptr, &status);
  std::string name = status == 0 && text ? text : mangled;
  free(text);
  return name.substr(0, kLongestName);
}

std::map<std::string, long> kernels_by_name() {
  std::map<std::string, long> out = all().kernels;
  for (const auto& [function, times] : all().launches) {
    const auto found = all().names.find(function);
    out[found == all().names.end() ? "(not registered)" : readable(found->second)] += times;
  }
  return out;
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    if (static_cast<unsigned char>(c) >= 0x20) out += c;
  }
  return out + "\"";
}

std::string object(const std::map<std::string, long>& values) {
  std::string out = "{";
  for (const auto& [name, value] : values) {
    out += (out.size() > 1 ? ",\n  " : "\n  ") + quoted(name) + ": " + std::to_string(value);
  }
  return out + "}";
}

std::string report() {
  std::lock_guard<std::mutex> guard(all().mutex);
  return "{\"kernels\": " + object(kernels_by_name()) + ",\n\"host\": " + object(all().host) +
         ",\n\"numbers\": " + object(all().numbers) + "}\n";
}

struct AtExit {
  ~AtExit() {
    const std::string path = text_setting("STANDIN_REPORT");
    if (path.empty() || (all().kernels.empty() && all().launches.empty() && all().numbers.empty())) {
      return;  // not a process that used the device
    }
    const std::string file = path + "." + std::to_string(getpid()) + ".json";
    if (FILE* out = fopen(file.c_str(), "w")) {
      const std::string text = report();
      fwrite(text.data(), 1, text.size(), out);
      fclose(out);
    }
  }
} at_exit;

}  // namespace

void count(const std::string& name) {
  std::lock_guard<std::mutex> guard(all().mutex);
  all().kernels[name]++;
}

void count_host(const char* name) {
  std::lock_guard<std::mutex> guard(all().mutex);
  all().host[name]++;
}

void launched(const void* host_function) {
  std::lock_guard<std::mutex> guard(all().mutex);
  all().launches[host_function]++;
}

void note(const char* name, long delta) {
  std::lock_guard<std::mutex> guard(all().mutex);
  all().numbers[name] += delta;
}

void high_water(const char* name, long value) {
  std::lock_guard<std::mutex> guard(all().mutex);
  long& slot = all().numbers[name];
  slot = std::max(slot, value);
}

long number(const char* name) {
  std::lock_guard<std::mutex> guard(all().mutex);
  const auto found = all().numbers.find(name);
  return found == all().numbers.end() ? 0 : found->second;
}

}  // namespace standin

// Called when a library with kernels is loaded, some 100,000 times by torch's.
STANDIN_API void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int,
                                        uint3*, uint3*, dim3*, dim3*, int*) {
  std::lock_guard<std::mutex> guard(standin::all().mutex);
  standin::all().names[host] = name;
}

// The report as JSON for the Python side; the text stays until the next call of this thread.
STANDIN_API const char* standin_report() {
  thread_local std::string text;
  text = standin::report();
  return text.c_str();
}

STANDIN_API void standin_reset_counts() {
  std::lock_guard<std::mutex> guard(standin::all().mutex);
  standin::all().kernels.clear();
  standin::all().host.clear();
  standin::all().launches.clear();
}

// For the Python side: the host waits for the device to get at a value.
STANDIN_API void standin_host_waits(const char* what) {
  standin::count_host(what);
  standin::host_waits_for_all();
}

// For the driver's library, which launches kernels by name.
STANDIN_API void standin_count(const char* name) { standin::count(name); }
