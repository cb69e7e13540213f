/* Callers that do not come to their end, over stand_in.c: a thread that is cancelled while it waits for its call, and a
 * process that was forked while another call held the queue's lock. */
#include <pthread.h>
#include <sys/wait.h>
#include <unistd.h>

#include "calls.h"
#include "check.h"

enum { N_DEADLINE_S = 20 }; /* of a child that hangs */

static void *ctx;
static int code_of_cancelled = -1;
static pid_t child;

int __real_pthread_cond_signal(pthread_cond_t *condition);

/* The queue calls this with its lock held. */
int __wrap_pthread_cond_signal(pthread_cond_t *condition)
{
    if (child == 0) {
        child = fork();
        if (child == 0) {
            alarm(N_DEADLINE_S);
            wasi_nn_python_ends(); /* as in a host that runs Python */
            exit(0);
        }
    }
    return __real_pthread_cond_signal(condition);
}

static void *wait_for_call(void *unused)
{
    (void)unused;
    code_of_cancelled = (int)fini_single(ctx, 1);
    pthread_testcancel();
    return NULL;
}

static void cancel_a_waiting_thread(void)
{
    pthread_t thread;
    void *result = NULL;
    CHECK(pthread_create(&thread, NULL, wait_for_call, NULL) == 0);
    CHECK(pthread_cancel(thread) == 0);
    CHECK_CODE(success, cancel(ctx, 1));
    CHECK(pthread_join(thread, &result) == 0);
    CHECK(code_of_cancelled == success); /* the call was not left */
    CHECK(result == PTHREAD_CANCELED);   /* and the request was not lost */
}

static void fork_with_the_lock_held(void)
{
    int status = -1;
    child = 0;
    CHECK_CODE(runtime_error, compute(ctx, 1));
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

int main(void)
{
    child = -1; /* not yet */
    CHECK_CODE(success, init_backend(&ctx));
    cancel_a_waiting_thread();
    fork_with_the_lock_held();
    CHECK_CODE(success, deinit_backend(ctx));
    puts("done");
    return 0;
}
