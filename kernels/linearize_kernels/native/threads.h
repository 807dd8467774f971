/* Tasks that a few threads share. */

#include <stdint.h>

typedef void (*Task)(void *given, int64_t at, int64_t thread);

/* Run `task` for every number from 0 to `count`, on at most `threads` threads, and return when all are done. `thread` is
   that of the task, below `threads`. A task shares nothing further. */
void share(Task task, void *given, int64_t count, int64_t threads);
