// Ranks that wait. After a second a waiting process leaves a note (<pid>.wait in the job's folder)
// of the processes that it waits for; a circle of such notes that stays as it is, is a deadlock,
// and a process that has ended will never come.
#include "common.h"
#include "nccl_types.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <fstream>
#include <sstream>

namespace {

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

std::string note_of(pid_t pid) {
  return standin::job_folder() + "/" + std::to_string(pid) + ".wait";
}

// A note: when it was written, the processes waited for, and what for.
struct Note {
  std::string stamp, what;
  std::vector<pid_t> pids;
};

bool read_note(pid_t pid, Note* note) {
  std::ifstream file(note_of(pid));
  std::string line;
  if (!std::getline(file, note->stamp) || !std::getline(file, line)) return false;
  std::istringstream numbers(line);
  for (pid_t one; numbers >> one;) note->pids.push_back(one);
  return static_cast<bool>(std::getline(file, note->what));
}

// A way over notes from a process back to ourselves, as text; empty where there is none.
std::string circle(pid_t from, std::vector<pid_t>& path) {
  for (const pid_t passed : path) if (passed == from) return "";
  Note note;
  if (!read_note(from, &note)) return "";
  path.push_back(from);
  for (const pid_t next : note.pids) {
    const std::string rest = next == getpid() ? " " : circle(next, path);
    if (!rest.empty()) return "; " + note.what + rest + "\n" + note.stamp;
  }
  return "";
}

// The lines that circle() puts stamps on, for people.
std::string without_stamps(const std::string& text) { return text.substr(0, text.find('\n')); }

struct RemoveFolder {
  ~RemoveFolder() {
    unlink(note_of(getpid()).c_str());
    rmdir(standin::job_folder().c_str());  // the last process of the job succeeds
  }
};

}  // namespace

std::string standin::job_folder() {
  static const std::string folder = [] {
    std::string name = text_setting("STANDIN_JOB");
    if (name.empty()) name = "user" + std::to_string(getuid());
    const std::string path = "/dev/shm/standin_" + name;
    if (mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) say("cannot make " + path);
    return path;
  }();
  static RemoveFolder remove;
  return folder;
}

standin::Waiting::Waiting(const Communicator* c, std::string what)
    : communicator_(c), started_(now()), looked_(started_) {
  what_ = words("rank %d of %d waits in %s", c->rank, c->size, what.c_str());
}

standin::Waiting::~Waiting() {
  if (written_) unlink(note_of(getpid()).c_str());
}

std::string standin::Waiting::hopeless(const std::vector<int>& ranks) {
  const double time = now();
  if (time - looked_ < 0.5) return "";
  looked_ = time;
  std::vector<pid_t> pids;
  for (const int rank : ranks) {
    const pid_t pid = communicator_->seats[rank].pid;
    if (const int left = communicator_->seats[rank].left) {
      return words("%s: rank %d %s", what_.c_str(), rank,
                   left == 1 ? "has left the communicator" : "was refused what it asked for");
    }
    if (kill(pid, 0) != 0 && errno == ESRCH) {
      return words("%s: rank %d has ended", what_.c_str(), rank);
    }
    pids.push_back(pid);
  }
  if (!written_) {
    std::ofstream file(note_of(getpid()));
    file << started_ << "\n";
    for (const pid_t pid : pids) file << pid << " ";
    file << "\n" << what_ << "\n";
    written_ = true;
  }
  for (const pid_t pid : pids) {
    std::vector<pid_t> path;
    const std::string found = pid == getpid() ? "" : circle(pid, path);
    if (found.empty()) continue;
    // Twice the same, stamps included: nobody in the circle has moved between the two looks.
    if (found == seen_) {
      usleep(1'500'000);  // our note stays for so long, so that the others find the circle too
      return "deadlock: " + what_ + without_stamps(found);
    }
    seen_ = found;
    return "";
  }
  seen_.clear();
  if (time - started_ > static_cast<double>(timeout_s())) {
    return words("%s: not all ranks came within %ld s", what_.c_str(), timeout_s());
  }
  return "";
}
