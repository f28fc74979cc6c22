/* A file system without locks: flock fails (FLOCK=refuse) or lets everybody in (FLOCK=agree). */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

int flock(int descriptor, int operation) {
    (void)descriptor, (void)operation;
    if (strcmp(getenv("FLOCK"), "agree") == 0) return 0;
    errno = ENOLCK;
    return -1;
}
