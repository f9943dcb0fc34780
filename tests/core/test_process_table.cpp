// What processes see of each other's bookings, with processes that are forked, stopped and killed.
#include <fcntl.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "checks.h"
#include "core/process_table.h"
#include "fake_root.h"

namespace {

using namespace egm;

// Another process, which has done `work` once this is made, and then waits to be killed.
class Process {
 public:
  explicit Process(const std::function<void()>& work) {
    int done[2];
    if (pipe(done) != 0) throw std::runtime_error("no pipe");
    id_ = fork();
    if (id_ == 0) {
      close(done[0]);
      work();
      if (write(done[1], "", 1) == 1) close(done[1]);
      while (true) pause();
    }
    close(done[1]);
    char byte;
    if (read(done[0], &byte, 1) != 1) expect(false, "the other process came to an end");
    close(done[0]);
  }
  ~Process() { end(); }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  void stop() const { kill(id_, SIGSTOP); }
  void end() {
    if (id_ == 0) return;
    kill(id_, SIGKILL);
    waitpid(id_, nullptr, 0);
    id_ = 0;
  }

 private:
  pid_t id_ = 0;
};

Booking booking(uint64_t promised, uint64_t pending = 0, uint64_t group = 0) {
  return {Bytes(promised), Bytes(pending), Bytes(0), {group}};
}

// Leaks the table: a process holds its entry as long as it lives.
void publish(const std::string& path, const Booking& own) {
  auto* const table = new ProcessTable(path);
  const ProcessTable::Turn turn(*table);
  table->publish(own);
}

// What a new process sees; from a process of its own.
bool is_seen(const std::string& path, const Bytes promised) {
  const pid_t id = fork();
  if (id == 0) _exit(sum_within(ProcessTable(path).others(), 0).promised == promised ? 0 : 1);
  int status = 0;
  waitpid(id, &status, 0);
  return status == 0;
}

Bytes promised(ProcessTable& table) { return sum_within(table.others(), 0).promised; }

void bookings_of_others_are_seen_while_they_live() {
  const FakeRoot root;
  const std::string path = root.path() + "/table";
  ProcessTable table(path);
  expect(table.others().empty(), "nobody");
  table.publish(booking(1));
  Process first([&] { publish(path, booking(20, 7)); });
  const Process second([&] { publish(path, booking(300)); });
  expect(promised(table) == Bytes(320) && sum_within(table.others(), 0).pending == Bytes(7),
         "both, and not the own");
  first.end();
  expect(promised(table) == Bytes(300), "a process that was killed");
  const auto size = std::filesystem::file_size(path);
  const Process third([&] { publish(path, booking(4000)); });
  expect(promised(table) == Bytes(4300), "the next one");
  expect(std::filesystem::file_size(path) == size, "takes the entry of the dead");
}

void what_is_published_replaces_what_was() {
  const FakeRoot root;
  const std::string path = root.path() + "/table";
  const Process other([&] {
    ProcessTable& table = *new ProcessTable(path);
    for (const uint64_t bytes : {500, 20}) table.publish(booking(bytes));
  });
  ProcessTable table(path);
  expect(promised(table) == Bytes(20), "the last");
}

void bookings_count_within_their_groups() {
  const std::vector<Booking> all{booking(1, 2, 77), booking(10, 20, 88), booking(100, 200)};
  expect(sum_within(all, 0).promised == Bytes(111), "all of the host");
  expect(sum_within(all, 88).promised == Bytes(10) && sum_within(all, 88).pending == Bytes(20),
         "one group");
  expect(sum_within(all, 99).promised == Bytes(0), "another group");
  const FakeRoot root;
  const std::string path = root.path() + "/table";
  const Process other([&] { publish(path, {Bytes(1), Bytes(2), Bytes(3), {4, 5, 6, 7}}); });
  const auto seen = ProcessTable(path).others();
  expect(seen.size() == 1 && seen[0].pending == Bytes(2) && seen[0].carveout == Bytes(3) &&
             seen[0].groups == std::array<uint64_t, 4>{4, 5, 6, 7},
         "as it was published");
}

void forked_children_do_not_keep_their_parents_bookings() {
  const FakeRoot root;
  const std::string path = root.path() + "/table";
  pid_t child_id = 0;
  int ids[2];
  if (pipe(ids) != 0) throw std::runtime_error("no pipe");
  Process parent([&] {
    publish(path, booking(5));
    const pid_t id = fork();
    while (id == 0) pause();
    if (write(ids[1], &id, sizeof id) != sizeof id) _exit(1);
  });
  if (read(ids[0], &child_id, sizeof child_id) != sizeof child_id) child_id = 0;
  ProcessTable table(path);
  expect(promised(table) == Bytes(5), "the parent's, once");
  parent.end();
  expect(child_id > 0 && kill(child_id, 0) == 0, "the child lives");
  expect(promised(table) == Bytes(0), "and the parent's booking is gone");
  kill(child_id, SIGKILL);
}

void forked_children_have_entries_of_their_own() {
  const FakeRoot root;
  const std::string path = root.path() + "/table";
  ProcessTable table(path);
  table.publish(booking(5));
  expect(is_seen(path, Bytes(5)), "by a child");
  Process child([&] { publish(path, booking(60)); });
  expect(promised(table) == Bytes(60), "and the parent its child's");
  child.end();
  expect(promised(table) == Bytes(0), "until that ends");
  expect(is_seen(path, Bytes(5)), "which does not end the parent's");
}

// Lost updates would show: each reads, sleeps and writes.
void turns_do_not_overlap() {
  const FakeRoot root;
  const std::string path = root.path() + "/table", counter = root.path() + "/counter";
  constexpr int kProcesses = 4, kTimes = 20;
  std::ofstream(counter) << 0;
  std::vector<pid_t> ids;
  for (int i = 0; i < kProcesses; ++i) {
    ids.push_back(fork());
    if (ids.back() != 0) continue;
    ProcessTable table(path);
    for (int time = 0; time < kTimes; ++time) {
      const ProcessTable::Turn turn(table);
      int count = 0;
      std::ifstream(counter) >> count;
      usleep(300);
      std::ofstream(counter) << count + 1;
    }
    _exit(0);
  }
  for (const pid_t id : ids) waitpid(id, nullptr, 0);
  int count = 0;
  std::ifstream(counter) >> count;
  expect(count == kProcesses * kTimes, "turns: " + std::to_string(count));
}

void a_process_that_ends_or_stops_in_its_turn_stops_nobody() {
  const FakeRoot root;
  const std::string path = root.path() + "/table";
  const auto in_turn = [&] { new ProcessTable::Turn(*new ProcessTable(path)); };
  ProcessTable table(path);
  Process killed(in_turn);
  killed.end();
  {
    const ProcessTable::Turn turn(table);
  }
  const Process stopped(in_turn);
  stopped.stop();
  const ProcessTable::Turn turn(table);
  table.publish(booking(9));
  expect(is_seen(path, Bytes(9)), "seen by others");
}

void without_a_file_it_is_as_if_alone() {
  const FakeRoot root;
  const std::string real = root.path() + "/table", link = root.path() + "/link";
  {
    std::ofstream(real) << "";
  }
  std::filesystem::create_symlink(real, link);
  for (const std::string& path : {root.path() + "/missing/table", root.path(), link}) {
    ProcessTable table(path);
    const ProcessTable::Turn turn(table);
    table.publish(booking(5));
    expect(table.others().empty(), "nobody else: " + path);
    expect(table.problem().value_or("").find(path) == 0, "says why: " + path);
  }
  ProcessTable table(root.path() + "/later/table");
  expect(table.problem().has_value(), "not yet");
  std::filesystem::create_directory(root.path() + "/later");
  expect(!table.problem(), "tried again");
}

void the_file_is_for_all_users() {
  const FakeRoot root;
  const std::string path = root.path() + "/table";
  const mode_t before = umask(077);
  ProcessTable table(path);
  table.publish(booking(5));
  umask(before);
  struct stat status{};
  expect(stat(path.c_str(), &status) == 0 && (status.st_mode & 0777) == 0666, "mode");
}

void files_that_are_removed_or_truncated_are_replaced() {
  const FakeRoot root;
  const std::string path = root.path() + "/table";
  ProcessTable table(path);
  table.publish(booking(5));
  std::filesystem::remove(path);
  const Process later([&] { publish(path, booking(30)); });
  table.publish(booking(5));
  expect(promised(table) == Bytes(30), "in the new file");
  std::filesystem::resize_file(path, 0);
  expect(promised(table) == Bytes(0), "nothing left");
  table.publish(booking(6));
  expect(is_seen(path, Bytes(6)), "seen by others");
}

void descriptors_that_were_closed_are_not_written_to() {
  const FakeRoot root;
  const std::string path = root.path() + "/table", mine = root.path() + "/mine";
  const int lowest = open(mine.c_str(), O_CREAT | O_RDWR, 0600);
  close(lowest);
  ProcessTable table(path);
  table.publish(booking(5));
  close(lowest);
  const int reused = open(mine.c_str(), O_RDWR);
  expect(reused == lowest, "the same number");
  table.publish(booking(7));
  expect(std::filesystem::file_size(mine) == 0, "somebody else's file");
  expect(is_seen(path, Bytes(7)), "seen by others");
  close(reused);
}

void a_booking_that_cannot_be_written_counts_as_none() {
  const FakeRoot root;
  const std::string path = root.path() + "/table";
  // An entry that somebody left.
  Process dead([&] { publish(path, booking(5)); });
  dead.end();
  const Process full([&] {
    signal(SIGXFSZ, SIG_IGN);
    const rlimit none{0, 0};
    setrlimit(RLIMIT_FSIZE, &none);
    publish(path, booking(6));
  });
  ProcessTable table(path);
  expect(promised(table) == Bytes(0), "neither what was there nor what was meant");
}

}  // namespace

int main() {
  bookings_of_others_are_seen_while_they_live();
  what_is_published_replaces_what_was();
  bookings_count_within_their_groups();
  forked_children_do_not_keep_their_parents_bookings();
  forked_children_have_entries_of_their_own();
  turns_do_not_overlap();
  a_process_that_ends_or_stops_in_its_turn_stops_nobody();
  without_a_file_it_is_as_if_alone();
  the_file_is_for_all_users();
  files_that_are_removed_or_truncated_are_replaced();
  descriptors_that_were_closed_are_not_written_to();
  a_booking_that_cannot_be_written_counts_as_none();
  return exit_status();
}
