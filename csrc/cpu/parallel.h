// Runs tasks on the OpenMP threads that PyTorch already keeps.
#pragma once
#include <cstdint>
#include <functional>

namespace peftkern::cpu {

// Calls run(task) for every task in [0, tasks), on at most `threads` threads, each taking the next free task.
// Returns when all are done; an exception of a task is thrown again here.
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t task)>& run);

// What the threads come from: the path of the OpenMP library in use, or "std::thread".
const char* thread_source();

}  // namespace peftkern::cpu
