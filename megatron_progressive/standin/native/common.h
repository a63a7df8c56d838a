// What the files of the stand-in share. Each file is one concern; this is all they know of others.
#pragma once
#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

#define STANDIN_API extern "C" __attribute__((visibility("default")))

namespace standin {

// settings.cpp: the environment that environment() of the Python side makes.
long setting(const char* name, long otherwise);
std::string text_setting(const char* name);
bool checking();             // STANDIN_MODE=checking
size_t device_bytes();       // memory of a device
size_t copied_bytes();       // larger copies and collectives move nothing (counting)
long timeout_s();            // how long a rank waits for its peers
void say(const std::string& line);  // one line on stderr: "stand-in: …"
std::string words(const char* format, ...) __attribute__((format(printf, 1, 2)));

// counters.cpp: numbers of what was called, written as JSON when the process ends.
void count(const std::string& name);                // "kernels": launches and library calls
void count_host(const char* name);                  // "host": calls that wait for the device
void launched(const void* host_function);           // a kernel by the address of its host stub
void note(const char* name, long delta);            // "numbers": running sums
void high_water(const char* name, long value);      // "numbers": largest value seen
long number(const char* name);

// memory.cpp
struct Block { uintptr_t base; size_t bytes; int device; };
bool find_block(const void* pointer, Block* block);  // the live device block that holds it
std::string freed_block(const void* pointer);        // what was freed there; empty: nothing
bool is_device(const void* pointer);

// streams.cpp: what each stream has finished for whom, for `checking`.
// Both return the line of a refusal, or an empty string.
std::string read_on(uintptr_t stream, const void* pointer, size_t bytes, const char* what);
std::string write_on(uintptr_t stream, const void* pointer, size_t bytes, const char* what);
void forget_block(const Block& block);
void host_waits_for_all();

int current_device();

}  // namespace standin
