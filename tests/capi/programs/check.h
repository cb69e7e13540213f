/* What the test programs share: a check that ends the program with its line, and text as a tensor. */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "wasi_nn_llama.h"

static inline const char *last_error(void)
{
    static _Thread_local char reason[1024];
    uint32_t size = sizeof reason;
    return wasi_nn_last_error(NULL, reason, &size) == success ? reason : "?";
}

#define CHECK(condition)                                                                                \
    do {                                                                                                \
        if (!(condition)) {                                                                             \
            fprintf(stderr, "%s:%d: %s does not hold; last error: %s\n", __FILE__, __LINE__, #condition, last_error()); \
            exit(1);                                                                                    \
        }                                                                                               \
    } while (0)

#define CHECK_CODE(expected, call)                                                                      \
    do {                                                                                                \
        int code_ = (int)(call);                                                                        \
        if (code_ != (int)(expected)) {                                                                 \
            fprintf(stderr, "%s:%d: %s is %d, not %s; last error: %s\n", __FILE__, __LINE__, #call, code_, #expected,  \
                    last_error());                                                                      \
            exit(1);                                                                                    \
        }                                                                                               \
    } while (0)

#endif
