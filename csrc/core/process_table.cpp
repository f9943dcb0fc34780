// The file of bookings and the locks on it.
#include "core/process_table.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <system_error>
#include <thread>
#include <utility>

namespace egm {
namespace {

// As it is in the file, whose head takes the room of one.
struct Entry {
  uint64_t promised_bytes = 0;
  uint64_t pending_bytes = 0;
  uint64_t carveout_bytes = 0;
  uint64_t process = 0;  // its id, for people; in a PID namespace of its own
  uint64_t groups[4] = {};

  bool empty() const { return promised_bytes == 0 && pending_bytes == 0 && carveout_bytes == 0; }
};
static_assert(sizeof(Entry) == 64 && std::tuple_size_v<decltype(Booking::groups)> == 4);

// Head included. Processes that find no free entry see the others and are not seen.
constexpr size_t kEntries = 512;

constexpr auto kLongestWait = std::chrono::seconds(1);

off_t offset_of(size_t entry) { return static_cast<off_t>(entry * sizeof(Entry)); }

struct flock range(int type, size_t entry) {
  struct flock range{};
  range.l_type = static_cast<short>(type);
  range.l_whence = SEEK_SET;
  range.l_start = offset_of(entry);
  range.l_len = sizeof(Entry);
  return range;
}

Booking booking_of(const Entry& entry) {
  Booking booking{Bytes(entry.promised_bytes), Bytes(entry.pending_bytes),
                  Bytes(entry.carveout_bytes)};
  std::copy(std::begin(entry.groups), std::end(entry.groups), booking.groups.begin());
  return booking;
}

Entry entry_of(const Booking& booking) {
  Entry entry{booking.promised.count(), booking.pending.count(), booking.carveout.count(),
              static_cast<uint64_t>(getpid())};
  std::copy(booking.groups.begin(), booking.groups.end(), std::begin(entry.groups));
  return entry;
}

// Not with O_CREAT alone: the kernel refuses that for files of others in folders like /dev/shm
// (fs.protected_regular).
int open_or_create(const std::string& path) {
  constexpr int kFlags = O_RDWR | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK;
  const int found = ::open(path.c_str(), kFlags);
  if (found >= 0 || errno != ENOENT) return found;
  constexpr mode_t kForAll = 0666;
  const int made = ::open(path.c_str(), kFlags | O_CREAT | O_EXCL, kForAll);
  if (made < 0) return errno == EEXIST ? ::open(path.c_str(), kFlags) : made;
  // Past the umask: it is for the processes of all users.
  fchmod(made, kForAll);
  return made;
}

}  // namespace

ProcessTable::ProcessTable(std::string path) : path_(std::move(path)) {}

ProcessTable::~ProcessTable() {
  if (still_there()) ::close(file_);
}

// Somebody may have closed all descriptors, and the number be another file's by now; or removed the
// file, so that processes which come now make another.
bool ProcessTable::still_there() {
  struct stat now{};
  const bool ours =
      file_ >= 0 && fstat(file_, &now) == 0 && now.st_dev == device_ && now.st_ino == inode_;
  if (ours && now.st_nlink > 0) return true;
  if (ours) ::close(file_);
  file_ = -1;
  entry_ = 0;
  return false;
}

bool ProcessTable::open() {
  if (still_there()) return true;
  const int file = open_or_create(path_);
  if (file < 0) {
    problem_ = path_ + " cannot be opened: " + std::generic_category().message(errno);
    return false;
  }
  struct stat now{};
  if (fstat(file, &now) != 0 || !S_ISREG(now.st_mode)) {
    problem_ = path_ + " is no ordinary file";
    ::close(file);
    return false;
  }
  file_ = file;
  device_ = now.st_dev;
  inode_ = now.st_ino;
  problem_.clear();
  return true;
}

bool ProcessTable::lock(int type, size_t entry) const {
  struct flock wanted = range(type, entry);
  return fcntl(file_, F_SETLK, &wanted) == 0;
}

bool ProcessTable::take_entry() {
  for (size_t entry = 1; entry_ == 0 && entry < kEntries; ++entry) {
    if (lock(F_WRLCK, entry)) entry_ = entry;
  }
  return entry_ != 0;
}

ProcessTable::Turn::Turn(ProcessTable& table) : table_(table) {
  if (!table.open()) return;
  // Asked again and again: a lock that is waited for has no time limit.
  constexpr auto kPause = std::chrono::microseconds(200);
  const auto end = std::chrono::steady_clock::now() + kLongestWait;
  while (!(held_ = table.lock(F_WRLCK, 0))) {
    if ((errno != EAGAIN && errno != EACCES) || std::chrono::steady_clock::now() >= end) return;
    std::this_thread::sleep_for(kPause);
  }
}

ProcessTable::Turn::~Turn() {
  if (held_ && table_.still_there()) table_.lock(F_UNLCK, 0);
}

std::vector<Booking> ProcessTable::others() {
  std::vector<Booking> found;
  if (!open()) return found;
  std::vector<Entry> entries(kEntries);
  const ssize_t read = pread(file_, entries.data(), kEntries * sizeof(Entry), 0);
  entries.resize(read > 0 ? static_cast<size_t>(read) / sizeof(Entry) : 0);
  for (size_t entry = 1; entry < entries.size(); ++entry) {
    if (entry == entry_ || entries[entry].empty()) continue;
    struct flock holder = range(F_WRLCK, entry);
    const bool lives = fcntl(file_, F_GETLK, &holder) == 0 && holder.l_type != F_UNLCK;
    if (lives) found.push_back(booking_of(entries[entry]));
  }
  return found;
}

void ProcessTable::publish(const Booking& own) {
  const Entry entry = entry_of(own);
  if (!open() || (entry_ == 0 && (entry.empty() || !take_entry()))) return;
  const ssize_t written = pwrite(file_, &entry, sizeof(Entry), offset_of(entry_));
  if (written == static_cast<ssize_t>(sizeof(Entry))) return;
  // What the file has may be a dead process's, or more than there is now.
  lock(F_UNLCK, entry_);
  entry_ = 0;
}

std::optional<std::string> ProcessTable::problem() {
  if (open()) return std::nullopt;
  return problem_;
}

Booking sum_within(const std::vector<Booking>& bookings, uint64_t group) {
  Booking sum;
  for (const Booking& each : bookings) {
    const auto& groups = each.groups;
    if (group != 0 && std::find(groups.begin(), groups.end(), group) == groups.end()) continue;
    sum.promised = saturated_sum(sum.promised, each.promised);
    sum.pending = saturated_sum(sum.pending, each.pending);
    sum.carveout = saturated_sum(sum.carveout, each.carveout);
  }
  return sum;
}

}  // namespace egm
