// Point-to-point operations: a message is a file in the job's folder, which the receiver takes
// away. Operations of a group go together. Under `checking` a send, or a group with sends, ends
// only when its messages are taken: operations then happen in issue order, as NCCL asks for, and
// an order in which all ranks wait for each other is found by who waits for whom.
#include "common.h"
#include "nccl_types.h"

#include <unistd.h>

#include <cstdio>
#include <cstring>

namespace standin {
std::string refusal_of_memory(const void* pointer, size_t bytes, cudaStream_t stream, bool writes,
                              const char* what);  // nccl_collectives.cpp
}

namespace {

using standin::Communicator;

struct Message {
  bool send;
  void* pointer;
  size_t bytes;
  int peer;
  ncclComm_t c;
};

thread_local int depth = 0;
thread_local std::vector<Message> pending;

std::string path_of(const Communicator* c, int from, int to, long number) {
  return standin::words("%s/%s_m%d_%d_%ld", standin::job_folder().c_str(), c->id.c_str(), from, to,
                        number);
}

std::string post(const Message& m, const std::string& path) {
  const std::string unfinished = path + ".part";
  FILE* file = fopen(unfinished.c_str(), "wb");
  if (!file) return "cannot write " + unfinished;
  const bool written = fwrite(&m.bytes, sizeof m.bytes, 1, file) == 1 &&
                       fwrite(m.pointer, 1, m.bytes, file) == m.bytes;
  const bool closed = fclose(file) == 0;
  if (!written || !closed || rename(unfinished.c_str(), path.c_str()) != 0) {
    return "cannot write " + path;
  }
  return "";
}

std::string take(const Message& m, const std::string& path) {
  standin::Waiting waiting(m.c, standin::words("ncclRecv from %d", m.peer));
  FILE* file = nullptr;
  for (useconds_t pause = 50; !(file = fopen(path.c_str(), "rb")); usleep(pause)) {
    if (pause < 1000) pause *= 2;
    const std::string reason = waiting.hopeless({m.peer});
    if (!reason.empty()) return reason;
  }
  size_t bytes = 0;
  std::string failed;
  if (fread(&bytes, sizeof bytes, 1, file) != 1) failed = "a message without its length";
  if (failed.empty() && bytes != m.bytes) {
    failed = standin::words("ncclRecv of %zu bytes from %d, which sent %zu", m.bytes, m.peer, bytes);
  }
  if (failed.empty() && fread(m.pointer, 1, bytes, file) != bytes) failed = "a message cut short";
  fclose(file);
  unlink(path.c_str());
  return failed;
}

std::string until_taken(const Message& m, const std::string& path) {
  standin::Waiting waiting(m.c, standin::words("ncclSend to %d", m.peer));
  for (useconds_t pause = 50; access(path.c_str(), F_OK) == 0; usleep(pause)) {
    if (pause < 1000) pause *= 2;
    const std::string reason = waiting.hopeless({m.peer});
    if (!reason.empty()) return reason;
  }
  return "";
}

ncclResult_t run_group() {
  const std::vector<Message> group = std::move(pending);
  pending.clear();
  std::vector<std::pair<Message, std::string>> posted;
  for (const Message& m : group) {
    if (!m.send || !m.c->shared) continue;
    const std::string path = path_of(m.c, m.c->rank, m.peer, m.c->sent[m.peer]++);
    const std::string failed = post(m, path);
    if (!failed.empty()) return standin::refuse(m.c, failed);
    posted.emplace_back(m, path);
  }
  for (const Message& m : group) {
    if (m.send || !m.c->shared) continue;
    const std::string path = path_of(m.c, m.peer, m.c->rank, m.c->received[m.peer]++);
    const std::string failed = take(m, path);
    if (!failed.empty()) return standin::refuse(m.c, failed);
  }
  if (!standin::checking()) return ncclSuccess;
  for (const auto& [m, path] : posted) {
    const std::string failed = until_taken(m, path);
    if (failed.empty()) continue;
    unlink(path.c_str());
    return standin::refuse(m.c, failed);
  }
  return ncclSuccess;
}

ncclResult_t issue(const Message& m, cudaStream_t stream) {
  const char* what = m.send ? "ncclSend" : "ncclRecv";
  standin::count(what);
  const std::string failed =
      standin::refusal_of_memory(m.pointer, m.bytes, stream, !m.send, what);
  if (!failed.empty()) return standin::refuse(m.c, failed);
  pending.push_back(m);
  return depth == 0 ? run_group() : ncclSuccess;
}

}  // namespace

STANDIN_API ncclResult_t ncclGroupStart() {
  depth++;
  return ncclSuccess;
}
STANDIN_API ncclResult_t ncclGroupEnd() {
  return --depth == 0 ? run_group() : ncclSuccess;
}
STANDIN_API ncclResult_t ncclSend(const void* pointer, size_t count, ncclDataType_t type, int peer,
                                  ncclComm_t c, cudaStream_t stream) {
  return issue({true, const_cast<void*>(pointer), count * standin::bytes_of(type), peer, c},
               stream);
}
STANDIN_API ncclResult_t ncclRecv(void* pointer, size_t count, ncclDataType_t type, int peer,
                                  ncclComm_t c, cudaStream_t stream) {
  return issue({false, pointer, count * standin::bytes_of(type), peer, c}, stream);
}
STANDIN_API ncclResult_t ncclAlltoAll(const void* send, void* receive, size_t count,
                                      ncclDataType_t type, ncclComm_t c, cudaStream_t stream) {
  const size_t bytes = count * standin::bytes_of(type);
  ncclGroupStart();
  for (int r = 0; r < c->size; r++) {
    const size_t at = bytes * static_cast<size_t>(r);
    ncclResult_t error = ncclSend(static_cast<const char*>(send) + at, count, type, r, c, stream);
    if (error == ncclSuccess) error = ncclRecv(static_cast<char*>(receive) + at, count, type, r, c, stream);
    if (error != ncclSuccess) {
      pending.clear();
      depth--;
      return error;
    }
  }
  return ncclGroupEnd();
}
